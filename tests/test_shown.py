"""What a console and a notebook show: a few lines, the names of the user's as text, and never an error."""

import html
import warnings
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch2ebm
from torch2ebm.errors import DivergenceWarning

X, LABELS = torch.linspace(-1, 1, 24).reshape(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
EVIL = "<script>alert('&')</script>"


def deep(layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [part for _ in range(layers - 1) for part in (nn.Linear(4, 4), nn.Tanh())]
    return nn.Sequential(*parts, nn.Linear(4, 3))


def relaxed(net: nn.Module, algorithm: Any = None) -> Any:
    model = torch2ebm.convert(net)
    model.attach(algorithm or torch2ebm.PredictiveCoding(steps=3))
    F.cross_entropy(model(X), LABELS).backward()
    return model


def compared(net: nn.Module, **options: Any) -> torch2ebm.GradientComparison:
    algorithms = [torch2ebm.ZeroDivergence(), torch2ebm.PredictiveCoding(steps=2)]
    return torch2ebm.compare(net, F.cross_entropy, (X, LABELS), algorithms, **options)


def shown(layers: int) -> dict[str, Any]:
    model = relaxed(deep(layers))
    return {
        "state": model.state,
        "graph": model.graph,
        "comparison": compared(deep(layers)),
        "report": torch2ebm.check(deep(layers), X),
        "relaxation": model.state.relaxation,
        "node": model.nodes["0"],
        "errors": model.state.error,
        "gradients": compared(deep(layers), steps=[1, 2]),
    }


@pytest.mark.parametrize("name", shown(2))
@pytest.mark.parametrize("layers", [2, 40])
def test_a_few_lines_are_shown(name: str, layers: int) -> None:
    text = repr(shown(layers)[name])
    assert len(text.splitlines()) <= 14 and max(map(len, text.splitlines())) <= 260
    assert "tensor(" not in text and "object at 0x" not in text


def test_the_numbers_are_those_of_the_state() -> None:
    model = relaxed(deep(2))
    state = model.state
    row = next(line.split() for line in repr(state).splitlines() if line.startswith("0 "))
    assert float(row[-2]) == pytest.approx(float(state.error["0"].norm()), rel=1e-3)
    assert float(row[-1]) == pytest.approx(float(state.energy["0"].sum()), rel=1e-3)
    assert "6 samples, 2 nodes" in repr(state) and "steps=3" in repr(state)


def test_a_comparison_shows_the_agreement_over_all_parameters() -> None:
    comparison = compared(deep(2))
    text = repr(comparison)
    for name in comparison.algorithms:
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert f"{comparison.overall[name].angle:.2f}" in line
    assert "30 more" not in text and "... and 30 more" in repr(relaxed(deep(40)).state)


class Cells(HTMLParser):
    """The text of the cells, and the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("name", ["state", "graph", "comparison", "report"])
def test_names_stay_text_in_a_notebook(name: str) -> None:
    net = nn.Sequential()
    net.add_module(EVIL, nn.Linear(4, 4))
    net.add_module("b", nn.Tanh())
    net.add_module("c", nn.Linear(4, 3))
    model = relaxed(net)
    made = {
        "state": lambda: model.state,
        "graph": lambda: model.graph,
        "comparison": lambda: compared(net),
        "report": lambda: torch2ebm.check(net, X),
    }
    page = made[name]()._repr_html_()
    assert "<script" not in page and html.escape(EVIL) in page
    cells = Cells(page)
    assert "script" not in cells.tags and any(EVIL in text for text in cells.text)


def test_every_node_and_every_parameter_is_in_the_notebook() -> None:
    model = relaxed(deep(40))
    for shown_there in (model.state, model.graph):
        assert set(model.nodes) <= set(Cells(shown_there._repr_html_()).text)
    comparison = compared(deep(40))
    assert set(comparison.parameters) <= set(Cells(comparison._repr_html_()).text)


def test_a_state_of_values_that_ran_away_is_shown() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DivergenceWarning)
        model = relaxed(deep(3), torch2ebm.PredictiveCoding(steps=200, lr=50.0, on_divergence="warn"))
    assert "?" in repr(model.state) and "?" in model.state._repr_html_()


def test_a_state_without_a_relaxation_is_shown() -> None:
    assert "steps=0" in repr(relaxed(deep(2), torch2ebm.ZeroDivergence()).state)


def test_a_value_without_a_batch_dimension_has_no_energy_to_show() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).mean(0)).expand(len(x), 3)

    assert "?" in repr(relaxed(Pooled(), torch2ebm.ZeroDivergence()).state)
