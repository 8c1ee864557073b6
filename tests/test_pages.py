"""The HTML pages of a run and of a comparison: what they hold, names that stay text, and nothing from elsewhere."""

import html
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from algorithms_list import ROWS
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ConfigurationError, DivergenceWarning, NoStateError
from torch2ebm.pages.run_page import MOST_STEPS
from torch2ebm.pages.skeleton import as_json

EVIL = '"</script><b>'
WORSE = "l&<img src=x onerror=alert(1)>'`${1}\u2028"
X, LABELS = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4), torch.tensor([0, 1, 2, 0, 1])
CODING = torch2ebm.PredictiveCoding(steps=6, lr=0.1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*parts).double()


def run_of(algorithm: torch2ebm.Algorithm, module: nn.Module | None = None) -> torch2ebm.EnergyModel:
    model = torch2ebm.convert(net() if module is None else module)
    model.attach(algorithm)
    F.cross_entropy(model(X), LABELS).backward()
    return model


class Parsed(HTMLParser):
    """Elements, texts and the data of a page, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.within: list[str] = []
        self.rows: list[list[str]] = []
        self.data: Any = None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "wbr"):
            self.within.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.within.pop() == tag, tag  # every element is closed, in its turn

    def handle_data(self, data: str) -> None:
        if self.within[-1:] == ["script"] and self.elements[-1][1].get("id") == "data":
            self.data = json.loads(data)
        else:
            self.texts.append(data)
            if "td" in self.within:
                self.rows[-1][-1] += data

    def having(self, attribute: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if attribute in attributes]

    @property
    def columns(self) -> dict[str, list[float]]:
        """Node, or the loss, to its energies at the steps of the slider."""
        run = self.data["run"]
        return dict(zip([*run["names"], "the loss"], run["columns"], strict=False))


# ---- what the page of a run holds


def test_the_data_are_the_energies_of_the_relaxation() -> None:
    model = run_of(CODING)
    relaxation = model.state.relaxation
    page = Parsed(torch2ebm.report(model).to_html())
    found = page.columns
    assert found.keys() == {*relaxation.node_energy, "the loss"}
    for name, energies in relaxation.node_energy.items():
        assert found[name] == pytest.approx(energies, rel=1e-5)
    assert found["the loss"] == pytest.approx(relaxation.loss, rel=1e-5)
    run = page.data["run"]
    assert run["steps"] == list(range(7)) and run["total"] == pytest.approx(relaxation.energy, rel=1e-5)
    of_errors = [sum(column[i] for column in relaxation.node_energy.values()) for i in range(7)]
    assert run["errors"] == pytest.approx(of_errors, rel=1e-4)
    lines = {line["name"]: line["y"] for line in page.data["charts"]["energy"]["lines"]}
    assert lines["total"] == run["total"] and lines["of the loss"] == run["loss"]


def test_every_node_has_a_box_and_the_loss_has_one_below_them() -> None:
    model = run_of(CODING)
    page = Parsed(torch2ebm.report(model).to_html())
    kinds = [attributes["data-kind"] for attributes in page.having("data-kind")]
    assert sorted(kinds) == ["input", "loss", "node", "node", "output"]
    coloured = {attributes["data-kind"]: attributes["data-column"] for attributes in page.having("data-column")}
    assert coloured["loss"] == str(len(page.data["run"]["names"]))  # the last column
    assert set(model.nodes) <= set(page.texts)
    assert "an output: the loss acts on its prediction" in page.texts
    all_coloured = run_of(torch2ebm.ZeroDivergence())
    assert "an output: the loss acts" not in torch2ebm.report(all_coloured).to_html()


def test_the_angles_are_those_of_the_comparison() -> None:
    model = run_of(CODING)
    report = torch2ebm.report(model, F.cross_entropy, (X, LABELS))
    expected = torch2ebm.compare(net(), F.cross_entropy, (X, LABELS), {"": CODING})
    page = Parsed(report.to_html())
    rows = {row[0]: row for row in page.rows if row}
    assert rows.keys() == {"all as one vector", *expected.parameters}
    for name, agreement in expected.agreement[""].items():
        assert rows[name][1] == f"{agreement.angle:.2f}" and rows[name][2] == f"{agreement.relative_error:.4g}"
    assert rows["all as one vector"][1] == f"{expected.overall[''].angle:.2f}"
    assert report.comparison is not None and report.comparison.overall[""].angle == expected.overall[""].angle
    without = torch2ebm.report(model)
    assert without.comparison is None and not any(Parsed(without.to_html()).rows)
    assert "Not measured" in without.to_html() and "Not measured" not in report.to_html()


def test_settings_and_what_went_wrong_are_told() -> None:
    page = torch2ebm.report(run_of(torch2ebm.PredictiveCoding(steps=1, lr=0.1))).to_html()
    assert "no error has reached 0" in page and "steps=1, lr=0.1" in html.unescape(page)
    calibrated = torch2ebm.report(run_of(torch2ebm.PredictiveCoding()))
    assert "no error has reached" not in calibrated.to_html() and "Look at this" not in calibrated.to_html()
    assert f"{calibrated.relaxation.settled:.0%} of the samples" in calibrated.to_html()
    unsettled = torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorConjugateGradient(1e-9, 2))
    assert "the values still move" in torch2ebm.report(run_of(unsettled)).to_html()


def test_a_long_relaxation_is_thinned_out_and_the_page_says_so() -> None:
    model = run_of(torch2ebm.PredictiveCoding(steps=1000, lr=0.1))
    text = torch2ebm.report(model).to_html()
    page, energy = Parsed(text), model.state.relaxation.energy
    steps = page.data["run"]["steps"]
    assert steps[0] == 0 and steps[-1] == 1000 and 100 < len(steps) <= MOST_STEPS + 1
    assert page.data["run"]["total"] == pytest.approx([energy[step] for step in steps], rel=1e-5)
    assert f"The slider has {len(steps)} of 1,001 moments: one of every 5 steps" in text
    (slider,) = [attributes for tag, attributes in page.elements if tag == "input"]
    assert slider["max"] == str(len(steps) - 1)
    assert "moments" not in torch2ebm.report(run_of(CODING)).to_html()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_algorithm_has_a_page(row: Any) -> None:
    model = run_of(row.algorithm)
    state = model.state
    page = Parsed(torch2ebm.report(model).to_html())
    slides = bool(state.relaxation.energy)
    assert any(tag == "input" for tag, _ in page.elements) == slides == bool(page.data["charts"])
    if not slides:
        ended = {name: float(energy.sum()) for name, energy in state.energy.items()}
        assert {name: column[0] for name, column in page.columns.items()} == pytest.approx(ended, rel=1e-5)
    assert {a["data-kind"] for a in page.having("data-kind")} == {"input", "node", "output", *(["loss"] * slides)}


def test_a_run_that_has_no_numbers_has_a_page() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DivergenceWarning)
        model = run_of(torch2ebm.PredictiveCoding(steps=200, lr=50.0, on_divergence="warn"))
    text = torch2ebm.report(model).to_html()
    run = Parsed(text).data["run"]  # NaN would be no JSON
    energy = model.state.relaxation.energy
    assert run["total"][0] == pytest.approx(energy[0], rel=1e-5) and set(run["loss"]) == {None}
    assert "the relaxation ran away" in text and "ran away" not in torch2ebm.report(run_of(CODING)).to_html()


# ---- names, files, notebooks


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_hostile_names_stay_text(kind: str) -> None:
    hostile = type(EVIL, (nn.Sequential,), {})()
    for name, part in zip((EVIL, "tanh", WORSE), (nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), strict=True):
        hostile.add_module(name, part.double())
    model = run_of(CODING, hostile)
    named = {EVIL: CODING, WORSE: torch2ebm.ZeroDivergence()}
    compared = torch2ebm.compare(hostile, F.cross_entropy, (X, LABELS), named, steps=[1, 2])
    made = torch2ebm.report(model, F.cross_entropy, (X, LABELS)) if kind == "run" else compared
    page = Parsed(made.to_html())
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and not {"b", "img"} & set(tags)
    assert not page.having("onerror")
    lines = page.data["charts"]["energy" if kind == "run" else "angle"]["lines"]
    names = page.data["run"]["names"] if kind == "run" else [line["name"] for line in lines]
    assert EVIL in names
    assert {f"{EVIL}.weight", f"{WORSE}.weight"} <= {cell for row in page.rows for cell in row}
    if kind == "run":
        assert f"One learning step of {EVIL}" in page.texts


def test_data_come_back_as_they_went_in_whatever_they_hold() -> None:
    data = {"a": [EVIL, WORSE, "<!--<script>"], "b": (1.0, 0, None, True, float("nan"), float("inf"), 0.1234567891)}
    text = as_json(data)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": data["a"], "b": [1.0, 0, None, True, None, None, 0.123457]}


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_page_loads_nothing_from_elsewhere(kind: str) -> None:
    compared = torch2ebm.compare(net(), F.cross_entropy, (X, LABELS), [CODING], steps=[1])
    text = (torch2ebm.report(run_of(CODING)) if kind == "run" else compared).to_html()
    assert set(re.findall(r"\w+://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, which nobody loads
    page = Parsed(text)
    loaded = [
        attributes[name] for name in ("src", "href", "srcset", "data", "action") for attributes in page.having(name)
    ]
    assert loaded == ["data:,"]
    assert "@import" not in text and "url(" not in re.sub(r"url\(#\w+\)", "", text)
    (policy,) = [a["content"] for a in page.having("http-equiv")]
    assert policy is not None and policy.startswith("default-src 'none'")


def test_a_page_is_written_where_a_path_is_given(tmp_path: Path) -> None:
    report = torch2ebm.report(run_of(CODING))
    assert report.to_html(tmp_path / "run.html") == report.to_html()
    assert (tmp_path / "run.html").read_text(encoding="utf-8") == report.to_html()
    with pytest.raises(ConfigurationError, match="path of a file"):
        report.to_html(3)  # type: ignore[arg-type]  # open() would take it for a file that is open
    with pytest.raises(ConfigurationError, match="path of a file"):
        torch2ebm.compare(net(), F.cross_entropy, (X, LABELS), [CODING]).to_html(3)  # type: ignore[arg-type]


def test_a_notebook_shows_the_page_in_a_frame() -> None:
    report = torch2ebm.report(run_of(CODING))
    frame = Parsed(report._repr_html_())
    ((tag, attributes),) = frame.elements
    assert tag == "iframe" and attributes["srcdoc"] == report.to_html() and attributes["sandbox"] == "allow-scripts"
    assert repr(report) == "Report(Sequential, PredictiveCoding, steps=6)"
    with_angle = torch2ebm.report(run_of(CODING), F.cross_entropy, (X, LABELS))
    assert re.fullmatch(r"Report\(Sequential, PredictiveCoding, steps=6, angle=[\d.]+ degrees\)", repr(with_angle))


# ---- the run is as before, and what is no run is refused


def test_the_run_is_as_before() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    model = run_of(CODING, module)
    state, buffers = model.state, [buffer.clone() for buffer in module.buffers()]
    gradients, drawn = [p.grad.clone() for p in module.parameters() if p.grad is not None], torch.get_rng_state()
    torch2ebm.report(model, F.cross_entropy, (X, LABELS))
    assert model.state is state and torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(a, b) for a, b in zip(buffers, module.buffers(), strict=True))
    now = [p.grad for p in module.parameters() if p.grad is not None]
    assert len(now) == len(gradients) == 6
    assert all(torch.equal(a, b) for a, b in zip(gradients, now, strict=True))


def test_an_optimizer_or_a_wrapper_stands_for_its_model() -> None:
    module = net()
    model = torch2ebm.convert(module)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), model, CODING)
    F.cross_entropy(model(X), LABELS).backward()
    expected = torch2ebm.report(model).to_html()
    assert torch2ebm.report(optimizer).to_html() == expected
    assert torch2ebm.report(nn.DataParallel(model)).to_html() == expected  # type: ignore[no-untyped-call]


def never_called(output: Tensor, target: Tensor) -> Tensor:
    raise AssertionError("called")


NO_RUN: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "a plain module": ((net(),), ConfigurationError, "got a Sequential"),
    "a class": ((nn.Linear,), ConfigurationError, "got the class Linear"),
    "nothing": ((None,), ConfigurationError, "got a NoneType"),
    "before a backward": ((torch2ebm.convert(net()),), NoStateError, "without a backward by an algorithm"),
    "a loss alone": ((run_of(CODING), never_called), ConfigurationError, "batch=.*None beside a loss_fn"),
    "a batch alone": ((run_of(CODING), None, (X, LABELS)), ConfigurationError, "loss_fn=.*None beside a batch"),
    "no pair": ((run_of(CODING), never_called, X), ConfigurationError, r"\(inputs, target\)"),
    "a loss that was computed": ((run_of(CODING), X.sum(), (X, LABELS)), ConfigurationError, "no function"),
    "a class of losses": ((run_of(CODING), nn.CrossEntropyLoss, (X, LABELS)), ConfigurationError, "parentheses"),
}


@pytest.mark.parametrize("case", NO_RUN)
def test_what_is_no_run_is_refused(case: str) -> None:
    arguments, kind, says = NO_RUN[case]
    with pytest.raises(kind, match=says) as refused:
        torch2ebm.report(*arguments)
    error = refused.value
    assert error.where.startswith("torch2ebm.report") and error.got and error.expected and error.remedy


def test_a_run_is_over_at_the_next_forward() -> None:
    model = run_of(CODING)
    model(X)
    with pytest.raises(NoStateError, match="no backward since the last forward"):
        torch2ebm.report(model)


# ---- the page of a comparison


def test_the_page_of_a_comparison_has_every_parameter_and_the_curves() -> None:
    named = {"slow": CODING, "exact": torch2ebm.ZeroDivergence()}
    compared = torch2ebm.compare(net(), F.cross_entropy, (X, LABELS), named, steps=[4, 1, 2])
    page = Parsed(compared.to_html())
    rows = {(row[0], row[1]): row for row in page.rows if len(row) == 6}
    assert rows.keys() == {(parameter, name) for parameter in compared.parameters for name in named}
    for (parameter, name), row in rows.items():
        agreement = compared.agreement[name][parameter]
        assert row[2] == f"{agreement.angle:.2f}" and row[3] == f"{agreement.relative_error:.4g}"
    overall = {row[0]: row[1] for row in page.rows if len(row) == 5}
    assert overall == {name: f"{compared.overall[name].angle:.2f}" for name in named}
    angle = page.data["charts"]["angle"]
    assert angle["x"] == [1, 2, 4]  # from left to right, in whatever order they were asked for
    for line in angle["lines"]:
        each = [[a.angle for a in compared.along[line["name"]][step].values()] for step in (1, 2, 4)]
        assert line["y"] == pytest.approx([sum(angles) / len(angles) for angles in each], rel=1e-5, abs=1e-9)
    without = Parsed(torch2ebm.compare(net(), F.cross_entropy, (X, LABELS), named).to_html())
    assert without.data["charts"] == {} and not without.having("data-chart")
