"""Accelerated error descent can rest in a saddle: told, against the dense Hessian of the energy in the errors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import attached
from torch import Tensor, nn

import torch2ebm
from torch2ebm import AndersonErrorDescent, ErrorConjugateGradient, OneSided, PredictiveCoding
from torch2ebm.errors import NotAMinimumWarning

# seed, depth, activation, gain, beta; the first three have a sample that comes to rest in a saddle
CASES = [
    (38, 4, nn.GELU, 3.0, 1.0),
    (68, 2, nn.GELU, 2.0, 10.0),
    (69, 3, nn.GELU, 2.0, 10.0),
    (0, 2, nn.Tanh, 1.0, 1.0),
]


class Case:
    """A chain of width 4 with two outputs, strong weights and a strong nudge; four samples."""

    def __init__(
        self, seed: int, depth: int, act: type[nn.Module], gain: float, beta: float, dtype: torch.dtype
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            old = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
            try:
                layers = [layer for _ in range(depth) for layer in (nn.Linear(4, 4), act())]
                self.net = nn.Sequential(*layers, nn.Linear(4, 2))
                self.x, self.y = torch.randn(4, 4), torch.randn(4, 2) * 2
            finally:
                torch.set_default_dtype(old)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.mul_(gain)
        self.net, self.x, self.y = self.net.to(dtype), self.x.to(dtype), self.y.to(dtype)
        self.beta = beta

    def learned(self, solver: torch2ebm.Solver[Any], batches: int = 1, compile: bool = False) -> tuple[Any, list[str]]:
        model = attached(self.net, PredictiveCoding(solver=solver, nudging=OneSided(self.beta), compile=compile))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(batches):
                model.zero_grad()
                (0.5 * (model(self.x) - self.y).square().sum(1).mean()).backward()
        return model, [str(each.message) for each in caught if issubclass(each.category, NotAMinimumWarning)]

    def curvatures(self, model: Any, sample: int) -> tuple[float, Tensor]:
        """|dF/de| and the eigenvalues of F's Hessian in all errors of a sample, where these have come to."""
        errors = torch.cat([model.state.error[n.name][sample] for n in model.graph.hidden_nodes]).double()
        net = [layer.double() for layer in self.net]

        def energy(flat: Tensor) -> Tensor:
            value = self.x[sample].double()
            for layer, act, error in zip(net[:-1:2], net[1::2], flat.split(4), strict=True):
                value = act(layer(value)) + error
            return 0.5 * flat.square().sum() + self.beta * 0.5 * (net[-1](value) - self.y[sample]).square().sum()

        slope = torch.autograd.functional.jacobian(energy, errors)
        return float(slope.norm()), torch.linalg.eigvalsh(torch.autograd.functional.hessian(energy, errors))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed {case[0]}")
def test_each_sample_that_rests_in_a_saddle_is_named(case: tuple[Any, ...]) -> None:
    given = Case(*case, torch.float64)
    model, said = given.learned(AndersonErrorDescent(60, 0.03 if case[0] == 68 else 0.3), batches=3)
    first, _ = given.learned(AndersonErrorDescent(60, 0.03 if case[0] == 68 else 0.3))
    at_minimum = first.state.relaxation.at_minimum
    assert model.state.relaxation.at_minimum is None  # the third relaxation is not looked at
    saddles = []
    for sample in range(4):
        slope, curvatures = given.curvatures(first, sample)
        if slope < 1e-5:
            saddles += [sample] * bool(curvatures[0] < -0.1)
            assert bool(at_minimum[sample]) == bool(curvatures[0] > 0)
    assert bool(saddles) == (case[0] != 0) == (len(said) == 1)
    if saddles:
        assert f"in {len(saddles)} of 4 samples ({', '.join(map(str, saddles))})" in said[0]
        assert "AndersonErrorDescent(" in said[0] and "ErrorConjugateGradient()" in said[0]


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: f"seed {case[0]}")
def test_what_the_warning_says_to_take_ends_in_a_minimum(case: tuple[Any, ...]) -> None:
    given = Case(*case, torch.float64)
    model, said = given.learned(ErrorConjugateGradient(1e-8, 400))
    assert said == []
    for sample in range(4):
        slope, curvatures = given.curvatures(model, sample)
        assert curvatures[0] > 0 and slope < 1e-3


@pytest.mark.parametrize("compile", [False, True])
def test_a_look_changes_nothing(compile: bool) -> None:
    """The first relaxation is looked at, the second is not; weights stand still, so both are the same."""
    given = Case(*CASES[3], torch.float64)
    solver = AndersonErrorDescent(2, 0.3)
    looked, _ = given.learned(solver, 1, compile)
    unlooked, _ = given.learned(solver, 2, compile)
    assert looked.state.relaxation.energy == pytest.approx(unlooked.state.relaxation.energy, rel=1e-14)
    assert len(looked.state.relaxation.energy) == 3
    for name in ("0", "2"):
        torch.testing.assert_close(looked.state.error[name], unlooked.state.error[name], rtol=1e-13, atol=0.0)


def test_single_precision_sees_it_too_and_sees_none_in_an_ordinary_net() -> None:
    assert len(Case(*CASES[0], torch.float32).learned(AndersonErrorDescent(60, 0.3))[1]) == 1
    model, said = Case(*CASES[3], torch.float32).learned(AndersonErrorDescent(30, 0.3))
    assert said == [] and bool(model.state.relaxation.at_minimum.all())
