"""Results as data frames: the numbers are those of the results, and what is missing of pandas is named."""

import sys
from dataclasses import astuple, fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch2ebm

X, Y = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4), torch.tensor([0, 1, 2, 0, 1])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def relaxed(algorithm: torch2ebm.extend.Algorithm) -> torch2ebm.InferenceState:
    model = torch2ebm.convert(net())
    model.attach(algorithm)
    F.cross_entropy(model(X), Y).backward()
    return model.state


def test_without_pandas_the_message_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    found = torch2ebm.convert(net()).infer(X)
    for result in (torch2ebm.Relaxation(), found, torch2ebm.check(net(), X)):
        with pytest.raises(torch2ebm.errors.ConfigurationError, match=r"pip install torch2ebm\[pandas\]"):
            result.to_dataframe()


def test_a_comparison_has_a_row_for_each_parameter_algorithm_and_step() -> None:
    pytest.importorskip("pandas")
    algorithms = [torch2ebm.ZeroDivergence(), torch2ebm.PredictiveCoding(steps=8, lr=0.1)]
    comparison = torch2ebm.compare(net(), F.cross_entropy, (X, Y), algorithms, steps=[1, 8])
    frame = comparison.to_dataframe()
    measures = [each.name for each in fields(torch2ebm.Agreement)]
    assert list(frame.columns) == ["parameter", "algorithm", "step", *measures]
    assert len(frame) == len(frame.drop_duplicates(["parameter", "algorithm", "step"])) == 6 * 2 * 3
    given = frame[frame.step.isna()].set_index(["algorithm", "parameter"])
    for name, each in comparison.agreement.items():
        for parameter, agreement in each.items():
            assert tuple(given.loc[(name, parameter), measures]) == astuple(agreement)
    last = frame[(frame.algorithm == "PredictiveCoding") & (frame.step == 8)].set_index("parameter")
    assert dict(last.angle) == {p: a.angle for p, a in comparison.along["PredictiveCoding"][8].items()}
    assert frame.angle.dtype == float and str(frame.step.dtype) == "Int64"
    assert torch2ebm.compare(net(), F.cross_entropy, (X, Y), algorithms).to_dataframe().step.isna().all()


def test_the_energies_of_a_step_sum_to_that_of_the_relaxation() -> None:
    pytest.importorskip("pandas")
    state = relaxed(torch2ebm.PredictiveCoding(steps=6, lr=0.1))
    frame = state.relaxation.to_dataframe()
    assert list(frame.columns) == ["step", "node", "energy"] and set(frame.node) == {"0", "2", "(loss)"}
    assert list(frame.groupby("step").energy.sum()) == pytest.approx(list(state.relaxation.energy), rel=1e-12)
    curve = frame[frame.node == "2"].sort_values("step").energy
    assert list(curve) == list(state.relaxation.node_energy["2"])
    whole = state.to_dataframe()
    assert list(whole.columns) == ["phase", *frame.columns] and whole.drop(columns="phase").equals(frame)


def test_a_state_has_all_its_phases() -> None:
    pytest.importorskip("pandas")
    nudging = torch2ebm.Symmetric(0.1)
    state = relaxed(torch2ebm.PredictiveCoding(steps=4, lr=0.1, nudging=nudging))
    frame = state.to_dataframe()
    assert len(state.phases) == 2 and list(frame.phase.unique()) == [0, 1]
    for phase, relaxation in enumerate(state.phases):
        assert frame[frame.phase == phase].drop(columns="phase").reset_index(drop=True).equals(
            relaxation.to_dataframe()
        )  # fmt: skip


def test_without_a_history_there_is_a_table_without_rows() -> None:
    pytest.importorskip("pandas")
    assert relaxed(torch2ebm.ZeroDivergence()).to_dataframe().empty
    assert list(torch2ebm.Relaxation().to_dataframe().columns) == ["step", "node", "energy"]


def test_what_was_inferred_has_a_row_a_node() -> None:
    pytest.importorskip("pandas")
    found = torch2ebm.convert(net(), example_inputs=X).infer(X, clamp={"output": torch.zeros(5, 3).double()})
    frame = found.to_dataframe().set_index("node")
    assert list(frame.index) == list(found.parts)
    for name in ("0", "2"):
        assert frame.energy[name] == pytest.approx(float(found.node_energy[name].sum()), rel=1e-12)
        assert frame.error[name] == pytest.approx(float(found.error[name].norm()), rel=1e-12)
        assert frame["shape"][name] == str(list(found.value[name].shape)) and frame.given[name] == "free"


def test_the_terms_of_an_energy_have_a_row_a_sample_and_node() -> None:
    pytest.importorskip("pandas")
    model = torch2ebm.convert(net())
    values = {"0": torch.ones(5, 6).double(), "2": torch.zeros(5, 5).double()}
    terms = model.energy(values, X, loss_fn=lambda o, t: F.cross_entropy(o, t, reduction="none"), target=Y)
    frame = terms.to_dataframe()
    assert set(frame.node) == {"0", "2", "(loss)"} and len(frame) == 15
    assert list(frame.groupby("sample").energy.sum()) == pytest.approx(terms.total.tolist(), rel=1e-12)


def test_findings_have_a_row_each() -> None:
    pytest.importorskip("pandas")
    report = torch2ebm.check(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)), torch.randn(3, 4))
    frame = report.to_dataframe()
    assert [tuple(row) for row in frame.itertuples(index=False)] == [astuple(each) for each in report.findings]
    assert "random" in set(frame.kind)
    diagnosis = torch2ebm.diagnose(net(), F.cross_entropy, (X, Y), torch2ebm.PredictiveCoding(steps=1, lr=1e-3))
    frame = diagnosis.to_dataframe()
    assert list(frame.is_problem) == [True] * len(diagnosis.problems) + [False] * len(diagnosis.notes)
    assert list(frame.text) == [each.text for each in (*diagnosis.problems, *diagnosis.notes)] and len(frame)
