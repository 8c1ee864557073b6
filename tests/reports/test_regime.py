"""What a result says of its regime: r, residual over |e|, share of settled samples, and backprop in disguise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import attached
from oracles.graphs import backprop
from torch import nn

import torch2ebm
from torch2ebm import AndersonErrorDescent, ErrorDescent, GradientDescent, PredictiveCoding, Relative

HIDDEN = "backprop with hidden step sizes"
GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(6, 8, generator=GENERATOR).double(), torch.arange(6) % 3


def chain() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def loss(output: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, Y)


def learned(algorithm: torch2ebm.Algorithm) -> torch2ebm.EnergyModel:
    model = attached(chain(), algorithm)
    loss(model(X)).backward()
    return model


@pytest.mark.parametrize("solver", [ErrorDescent(steps=1, lr=0.3), AndersonErrorDescent(steps=1, lr=0.3)], ids=repr)
def test_one_step_of_error_descent_is_backprop_and_says_so(solver: torch2ebm.Solver) -> None:
    """Shown by the gradients themselves: lr times backprop's direction in the node before the output's."""
    model = learned(PredictiveCoding(solver=solver))
    last = model.state.relaxation
    assert last.is_backprop and last.regime == HIDDEN
    assert HIDDEN in repr(last) and HIDDEN in repr(model.state) and f"regime: {HIDDEN}" in model.summary()
    reference = backprop(chain(), (X,), loss)
    # the gradients of the first layer are lr times backprop's: it reads inputs, which do not move
    ours = model.get_parameter("0.weight").grad
    torch.testing.assert_close(ours, 0.3 * reference["0.weight"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "solver", [ErrorDescent(steps=2, lr=0.3), GradientDescent(steps=8, lr=0.1), AndersonErrorDescent(steps=3)], ids=repr
)
def test_inference_does_not_say_so(solver: torch2ebm.Solver) -> None:
    model = learned(PredictiveCoding(solver=solver))
    assert not model.state.relaxation.is_backprop and HIDDEN not in model.summary()


@pytest.mark.parametrize(
    ("r", "words"), [(0.1, "near backprop"), (1.0, "between backprop and clamped"), (10.0, "near a clamped output")]
)
def test_r_says_where_between_backprop_and_a_clamped_output(r: float, words: str) -> None:
    model = learned(PredictiveCoding(nudging=Relative(r)))
    last = model.state.relaxation
    assert last.r == pytest.approx(r) == pytest.approx(last.beta * last.sigma_squared)
    assert last.regime == words and words in model.summary() and f"r={r:.4g}" in repr(last)
    assert f"{last.settled:.0%} of the samples settled" in model.summary()
    residuals = model.state.relative_residual
    assert residuals is last.sample_residual  # relative already
    assert f"{float(residuals.median()):.1e} (median), {float(residuals.max()):.1e} (worst sample)" in model.summary()


def test_a_residual_of_values_is_taken_over_the_errors() -> None:
    model = learned(PredictiveCoding(steps=8, lr=0.1))
    errors = [model.state.error[node].abs().flatten(1).amax(1) for node in list(model.nodes)[:-1]]
    expected = model.state.relaxation.sample_residual / torch.stack(errors).amax(0)
    torch.testing.assert_close(model.state.relative_residual, expected)
    further = learned(PredictiveCoding(steps=400, lr=0.1))
    assert float(further.state.relative_residual.max()) < 1e-3 * float(expected.max())
    assert model.state.relaxation.median_residual == pytest.approx(
        float(model.state.relaxation.sample_residual.median())
    )


def test_where_nothing_was_measured_nothing_is_said() -> None:
    model = learned(torch2ebm.ZeroDivergence())
    assert model.state.relaxation.regime == "" and "regime" not in model.summary()
    assert model.state.relative_residual is None
