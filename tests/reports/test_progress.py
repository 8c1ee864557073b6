"""How far each node has come: by a formula, 1 at rest; and stiff energies, whose stable step gets nowhere, are told."""

from __future__ import annotations

import warnings
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import attached
from torch import Tensor, nn

import torch2ebm
from torch2ebm import ErrorConjugateGradient, ErrorDescent, GradientDescent, Momentum, PredictiveCoding, Relative
from torch2ebm.errors import StepSizeWarning

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(6, 8, generator=GENERATOR).double(), torch.arange(6) % 3


def chain(act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = [nn.Linear(8, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 3)]
        return nn.Sequential(*layers).double()


def learned(algorithm: torch2ebm.Algorithm, factor: float = 1.0, batches: int = 1) -> tuple[Any, list[str]]:
    """The model after some batches, and what was told of step sizes."""
    model = attached(chain(), algorithm)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(batches):
            model.zero_grad()
            (factor * F.cross_entropy(model(X), Y)).backward()
    return model, [str(each.message) for each in caught if issubclass(each.category, StepSizeWarning)]


def by_hand(steps: int, lr: float, precision: float) -> list[float]:
    """Descent on the values of the chain in plain torch; the last gradient beside the errors where it has led."""
    net = chain()
    layers = [nn.Sequential(net[i], net[i + 1]) for i in (0, 2, 4)]
    values: list[Tensor] = []
    for layer in layers:
        values.append(layer(values[-1] if values else X).detach())

    def errors() -> list[Tensor]:
        return [v - layer(p) for v, layer, p in zip(values, layers, [X, *values], strict=False)]

    gradients: list[Tensor] = []
    for _ in range(steps):
        values = [value.detach().requires_grad_() for value in values]
        weights = [precision, 1.0, 1.0]
        energy = sum(0.5 * w * e.square().sum() for w, e in zip(weights, errors(), strict=True))
        energy = energy + F.cross_entropy(net[6](values[-1]), Y, reduction="sum")
        gradients = list(torch.autograd.grad(energy, values))
        values = [(value - lr * gradient).detach() for value, gradient in zip(values, gradients, strict=True)]
    found = []
    for weight, error, gradient in zip([precision, 1.0, 1.0], errors(), gradients, strict=True):
        e, g = weight * error.detach().abs().amax(1), gradient.abs().amax(1)
        found.append(float((e / (e + g)).median()))
    return found


@pytest.mark.parametrize(("steps", "precision", "compile"), [(6, 1.0, False), (6, 4.0, False), (3, 4.0, True)])
def test_progress_is_that_of_the_formula(steps: int, precision: float, compile: bool) -> None:
    coding = PredictiveCoding(steps, 0.2, precisions={"0": precision}, compile=compile)
    model, _ = learned(coding, batches=2 if compile else 1)
    assert list(model.state.progress) == ["0", "2", "4"]
    assert list(model.state.progress.values()) == pytest.approx(by_hand(steps, 0.2, precision), rel=1e-9)
    assert max(model.state.progress.values()) < 0.9  # few steps are no rest


@pytest.mark.parametrize(
    "solver",
    [
        GradientDescent(1000, 0.3),
        ErrorDescent(300, 0.3),
        ErrorConjugateGradient(1e-6, 50),
        GradientDescent("auto", 0.3),
    ],
    ids=repr,
)
def test_it_is_one_at_rest_and_the_summary_has_it(solver: torch2ebm.Solver[Any]) -> None:
    model, _ = learned(PredictiveCoding(solver=solver))
    assert all(0.98 < share <= 1.0 for share in model.state.progress.values())
    header, *rows = model.summary().splitlines()
    assert "progress" in header
    assert all(row.split()[-2] == "1" or row.split()[-2].startswith("0.99") for row in rows[1:4])


def test_what_no_error_has_reached_has_made_none_and_a_sweep_has_none_to_make() -> None:
    model, _ = learned(PredictiveCoding(2, 0.2))
    progress = model.state.progress
    assert progress["0"] == 0.0 < progress["2"] < progress["4"]
    swept, _ = learned(torch2ebm.ZeroDivergence())
    assert swept.state.progress == {} and "progress" not in swept.summary()


def test_a_residual_over_the_error_is_not_divided_by_it_again() -> None:
    """``steps="auto"`` measures a relative residual: 0.5 means half, whatever the errors' size."""
    model, _ = learned(PredictiveCoding(solver=GradientDescent("auto", 0.3, tol=0.5)))
    relaxation = model.state.relaxation
    assert torch.equal(model.state.relative_residual, relaxation.sample_residual)
    shares = {name: float((1 / (1 + relaxation.slot_residual[name])).median()) for name in relaxation.slot_residual}
    assert sorted(model.state.progress.values()) == pytest.approx(sorted(shares.values()))


# ---- stiff energies

AUTO = [GradientDescent(20, "auto"), ErrorDescent(20, "auto"), Momentum(20, "auto", 0.5)]


@pytest.mark.parametrize("solver", AUTO, ids=lambda each: type(each).__name__)
def test_a_loss_of_a_million_times_is_told_once_with_a_cure_that_works(solver: Any) -> None:
    model, said = learned(PredictiveCoding(solver=solver), 1e6, batches=3)
    (message,) = said
    assert message.startswith(f'{type(solver).__name__}(20, lr="auto"): the energy is stiff')
    assert "condition number" in message and "nudging=Relative(0.1)" in message and "torch2ebm.diagnose" in message
    assert median(model.state.progress.values()) < 0.1
    for cure in (PredictiveCoding(), PredictiveCoding(solver=solver, nudging=Relative(0.1))):
        cured, silent = learned(cure, 1e6)
        assert silent == [] and median(cured.state.progress.values()) > 0.9
        # what the cure gives is near backprop's gradient, in the scale of the loss; without it, far below
        reference = chain()
        (1e6 * F.cross_entropy(reference(X), Y)).backward()
        whole = float(reference[0].weight.grad.norm())
        assert float(cured.get_parameter("0.weight").grad.norm()) > 0.5 * whole
        assert float(model.get_parameter("0.weight").grad.norm()) < 1e-2 * whole


@pytest.mark.parametrize("solver", AUTO, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("factor", [1e-3, 1.0, 30.0])
def test_ordinary_losses_and_enough_steps_are_told_nothing(solver: Any, factor: float) -> None:
    assert learned(PredictiveCoding(solver=solver), factor)[1] == []


def test_enough_steps_for_a_stiff_energy_are_told_nothing() -> None:
    assert len(learned(PredictiveCoding(10, "auto"), 1e4)[1]) == 1
    assert learned(PredictiveCoding(2000, "auto"), 1e4)[1] == []
