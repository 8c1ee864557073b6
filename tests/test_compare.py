"""What ``compare`` reports: forms of batches, names, tables, and along inference the numbers of shorter ones."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from algorithms_list import ROWS
from oracles.graphs import binomial_tail
from solvers_list import ROWS as SOLVERS
from torch import Tensor, nn

import torch2ebm


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


X, LABELS = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4), torch.tensor([0, 1, 2, 0, 1])
FIXED = torch2ebm.FixedPrediction(steps=20, lr=0.3)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = chain(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor, other: Tensor, labels: Tensor | None = None) -> Tensor:
        output = self.body(x) + self.head(other)
        return output if labels is None else F.cross_entropy(output, labels)


def test_every_form_of_a_batch_means_the_same() -> None:
    module = TwoInputs()
    forms = [
        (F.cross_entropy, ((X, X.flip(0)), LABELS)),
        (F.cross_entropy, ({"x": X, "other": X.flip(0)}, LABELS)),
        (lambda output: F.cross_entropy(output, LABELS), {"x": X, "other": X.flip(0)}),
        (lambda loss: loss, {"x": X, "other": X.flip(0), "labels": LABELS}),
    ]
    found = [torch2ebm.compare(copy.deepcopy(module), loss, batch, [FIXED]).agreement for loss, batch in forms]
    for each in found[1:]:
        for name, expected in found[0]["FixedPrediction"].items():
            ours = each["FixedPrediction"][name]
            assert ours.relative_error == pytest.approx(expected.relative_error, rel=1e-10)
            assert ours.norm_ratio == pytest.approx(expected.norm_ratio, rel=1e-10)


def test_along_inference_the_norm_ratio_is_the_binomial_law() -> None:
    """Rosenbaum 2022: the direction is backprop's from t >= the level on, only the scale differs; before it, zero."""
    comparison = torch2ebm.compare(chain(), F.cross_entropy, (X, LABELS), [FIXED], steps=[1, 3, 8])
    assert comparison.steps == (1, 3, 8)
    for steps, agreements in comparison.along["FixedPrediction"].items():
        for level, layer in enumerate(("4", "2", "0")):
            found = agreements[f"{layer}.weight"]
            assert found.norm_ratio == pytest.approx(binomial_tail(steps, 0.3, level), rel=1e-10, abs=1e-14)
            if steps >= level:
                assert found.angle < 1e-6 and found.sign_agreement == 1
            else:
                assert found.angle == 90 and found.relative_error == 1
    assert (
        comparison.along["FixedPrediction"][8]
        == torch2ebm.compare(chain(), F.cross_entropy, (X, LABELS), [FIXED.with_steps(8)]).agreement["FixedPrediction"]
    )


def test_numbers_of_the_dictionary_and_of_the_tables_are_the_agreements() -> None:
    algorithms = {"exact": torch2ebm.ZeroDivergence(), "fixed": FIXED}
    comparison = torch2ebm.compare(chain(), F.cross_entropy, (X, LABELS), algorithms, steps=[1, 4])
    numbers = comparison.to_dict()
    assert numbers.keys() == {"exact", "fixed", "along"}
    for name in algorithms:
        for parameter in comparison.parameters:
            agreement = comparison.agreement[name][parameter]
            assert numbers[name][parameter]["angle"] == agreement.angle
            assert numbers["along"][name][4][parameter] == vars(comparison.along[name][4][parameter])
    first, second = comparison.table().split("\n\n")
    assert len(first.splitlines()) == 2 + 2 * len(comparison.parameters) + 2
    ratio = comparison.agreement["fixed"]["0.weight"].norm_ratio
    assert re.search(rf"^0\.weight +fixed +1\.000000 +0\.00 .* {ratio:.4f} +100\.0%$", first, re.M)
    header, _, exact, fixed = second.splitlines()
    assert header.split("  ")[0] == "mean angle [deg] after" and header.endswith("1 step  4 steps")
    angles = [a.angle for a in comparison.along["fixed"][1].values()]
    assert exact.split() == ["exact", "0.00", "0.00"]
    assert fixed.split()[:2] == ["fixed", f"{sum(angles) / len(angles):.2f}"]


def test_two_of_a_kind_are_told_apart_by_their_settings() -> None:
    comparison = torch2ebm.compare(chain(), F.cross_entropy, (X, LABELS), [FIXED, FIXED.with_steps(2)])
    assert comparison.algorithms == ("FixedPrediction", repr(FIXED.with_steps(2)))
    assert "along" not in comparison.to_dict() and comparison.along == {}


MADE = [row.settings for row in ROWS if row.settings is not None]
STEPLESS = [torch2ebm.Backprop, torch2ebm.ZeroDivergence]
SETTINGS = {type(made).__name__: made for made in MADE if type(made) not in STEPLESS}


def test_every_algorithm_that_has_steps_is_here() -> None:
    public = {getattr(torch2ebm, name) for name in torch2ebm.__all__}
    kinds = {kind for kind in public if isinstance(kind, type) and issubclass(kind, torch2ebm.Algorithm)}
    assert {type(made) for made in MADE} == kinds - {torch2ebm.Algorithm}


@pytest.mark.parametrize("kind", STEPLESS)
def test_an_algorithm_without_steps_is_its_own_copy(kind: type[torch2ebm.Algorithm]) -> None:
    assert kind().with_steps(3) == kind()


@pytest.mark.parametrize("made", SETTINGS.values(), ids=SETTINGS)
def test_another_number_of_steps_keeps_every_other_setting(made: torch2ebm.Algorithm) -> None:
    other = made.with_steps(3)
    assert type(other) is type(made) and "steps=3" in repr(other)
    assert re.sub(r"(steps)=\d+", r"\1=n", repr(other)) == re.sub(r"(steps)=\d+", r"\1=n", repr(made)) != repr(other)


@pytest.mark.parametrize("solver", [row.settings for row in SOLVERS], ids=lambda solver: type(solver).__name__)
def test_another_number_of_steps_keeps_every_other_setting_of_a_solver(solver: torch2ebm.Solver) -> None:
    other = solver.with_steps(3)
    assert type(other) is type(solver) and {**vars(solver), "steps": 3} == vars(other)
