"""Energies whose gradients are not those of their value are refused at attach; right ones are not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch2ebm
from torch2ebm.engine.energies import Energy
from torch2ebm.errors import ConfigurationError, EnergyGradientError
from torch2ebm.potentials import energy_check

Both = tuple[Tensor, Tensor]


class Made(Energy):
    """Of two functions of error and prediction."""

    def __init__(self, of: Callable[..., Tensor], slopes: Callable[..., Both], **settings: Any) -> None:
        self.of, self.slopes, self.settings = of, slopes, settings

    def of_samples(self, error: Tensor, prediction: Tensor) -> Tensor:
        return self.of(error, prediction, **self.settings).flatten(1).sum(1)

    def of_batch(self, error: Tensor, prediction: Tensor) -> Tensor:
        return self.of(error, prediction, **self.settings).sum()

    def gradients(self, error: Tensor, prediction: Tensor) -> Both:
        return self.slopes(error, prediction, **self.settings)


def twice(slope: Tensor) -> Both:
    return slope, slope


def by_autograd(of: Callable[..., Tensor]) -> Callable[..., Both]:
    def slopes(error: Tensor, prediction: Tensor, **settings: Any) -> Both:
        with torch.enable_grad():
            value, mu = (error + prediction).requires_grad_(), prediction.detach().clone().requires_grad_()
            found = torch.autograd.grad(of(value - mu, mu, **settings).sum(), [value, mu])
        return found[0], -found[1]

    return slopes


def poisson(e: Tensor, p: Tensor) -> Tensor:
    return p - (e + p) * p.log()  # a rate above 0


def kullback_leibler(e: Tensor, p: Tensor) -> Tensor:
    return (e + p) * ((e + p) / p).log()


def bernoulli(e: Tensor, p: Tensor) -> Tensor:
    value = e + p
    if not bool(((value > 0) & (value < 1)).all()):
        raise ValueError("a probability is between 0 and 1")
    return F.binary_cross_entropy_with_logits(p, value, reduction="none")


def simplex(e: Tensor, p: Tensor) -> Tensor:
    if not torch.allclose((e + p).sum(-1), torch.ones(()).to(e), atol=1e-2) or not bool((p > 0).all()):
        raise ValueError("no distribution")
    return (e + p) * (e + p).log() - (e + p) * p.log()


def clamped(e: Tensor, p: Tensor) -> Tensor:
    return p.clamp_min(1e-6) - (e + p) * p.clamp_min(1e-6).log()


def truncated(e: Tensor, p: Tensor) -> Tensor:
    return torch.where(e.abs() < 0.5, 0.5 * e**2, 0.125)  # flat, beyond a kink


VECTOR = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 0.1, 3.0])
RIGHT = {
    "half squares": Made(lambda e, p: 0.5 * e**2, lambda e, p: twice(e)),
    "laplace": Made(lambda e, p: e.abs(), lambda e, p: twice(e.sign())),
    "huber": Made(
        lambda e, p: F.huber_loss(e, torch.zeros_like(e), reduction="none"), lambda e, p: twice(e.clamp(-1, 1))
    ),
    "truncated squares": Made(truncated, lambda e, p: twice(torch.where(e.abs() < 0.5, e, 0.0))),
    "student": Made(lambda e, p: torch.log1p(e**2), lambda e, p: twice(2 * e / (1 + e**2))),
    "von mises": Made(lambda e, p: 1 - e.cos(), lambda e, p: twice(e.sin())),
    "weighted by the prediction": Made(
        lambda e, p: 0.5 * e**2 * p.exp(), by_autograd(lambda e, p: 0.5 * e**2 * p.exp())
    ),
    "precision of each feature": Made(
        lambda e, p, weight: 0.5 * weight * e**2, lambda e, p, weight: twice(weight * e), weight=VECTOR
    ),
    "precision of each channel": Made(
        lambda e, p, weight: 0.5 * weight * e**2, lambda e, p, weight: twice(weight * e), weight=VECTOR.reshape(7, 1, 1)
    ),
    "poisson": Made(poisson, lambda e, p: (-p.log(), (e + p) / p - 1)),
    "poisson, clamped": Made(clamped, lambda e, p: (-p.log(), (e + p) / p - 1)),
    "kullback-leibler": Made(kullback_leibler, lambda e, p: (((e + p) / p).log() + 1, (e + p) / p)),
    "bernoulli of logits": Made(bernoulli, lambda e, p: (-p, (e + p) - p.sigmoid())),
    "on the simplex": Made(simplex, by_autograd(simplex)),
    "in single precision inside": Made(lambda e, p: 0.5 * e.float() ** 2, lambda e, p: twice(e)),
    "in half precision inside": Made(lambda e, p: 0.5 * e.bfloat16() ** 2, lambda e, p: twice(e.bfloat16())),
    "weight of each sample": Made(
        lambda e, p, weight: 0.5 * weight[:, None] * e**2,
        lambda e, p, weight: twice(weight[:, None] * e),
        weight=VECTOR,
    ),
    "large": Made(lambda e, p: 5e7 * e**2, lambda e, p: twice(1e8 * e)),
    "small": Made(lambda e, p: 5e-9 * e**2, lambda e, p: twice(1e-8 * e)),
    "random": Made(lambda e, p: 0.5 * e**2 + torch.rand(()), lambda e, p: twice(e)),
    "images alone": Made(lambda e, p: 0.5 * F.avg_pool2d(e, 1) ** 2, lambda e, p: twice(F.avg_pool2d(e, 1))),
    "no gradient of torch's own": Made(
        lambda e, p: torch.tensor(0.5 * np.square(e.numpy())), lambda e, p: twice(torch.tensor(e.numpy()))
    ),
}
WRONG = {
    "another factor": (Made(lambda e, p: 0.5 * e**2, lambda e, p: twice(2 * e)), "dphi/dvalue"),
    "another sign": (Made(lambda e, p: 0.5 * e**2, lambda e, p: (e, -e)), "-dphi/dprediction"),
    "without a sign": (Made(lambda e, p: 0.5 * e**2, lambda e, p: twice(e.abs())), "dphi/dvalue"),
    "laplace as squares": (Made(lambda e, p: e.abs(), lambda e, p: twice(e)), "dphi/dvalue"),
    "the prediction forgotten": (
        Made(lambda e, p: 0.5 * e**2 * p.exp(), lambda e, p: twice(e * p.exp())),
        "-dphi/dpred",
    ),
    "poisson": (Made(poisson, lambda e, p: (-p.log(), (e + p) / p)), "-dphi/dprediction"),
    "one per cent off": (Made(lambda e, p: 0.5 * e**2, lambda e, p: twice(1.01 * e)), "dphi/dvalue"),
    "a precision forgotten": (
        Made(lambda e, p, weight: 0.5 * weight * e**2, lambda e, p, weight: twice(e), weight=VECTOR),
        "dphi/dvalue",
    ),
    "a weight of each sample forgotten": (
        Made(lambda e, p, weight: 0.5 * weight[:, None] * e**2, lambda e, p, weight: twice(e), weight=VECTOR),
        "dphi/dvalue",
    ),
    "no number": (Made(lambda e, p: 0.5 * e**2, lambda e, p: twice(e * math.nan)), "dphi/dvalue"),
    "in single precision inside": (Made(lambda e, p: 0.5 * e.float() ** 2, lambda e, p: twice(1.1 * e)), "dphi/dvalue"),
}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))


def attach(energy: Energy, module: nn.Module | None = None, **settings: Any) -> torch2ebm.EnergyOptimizer:
    module = net() if module is None else module
    algorithm = torch2ebm.PredictiveCoding(steps=5, energies={"0": energy}, **settings)
    return torch2ebm.EnergyOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), torch2ebm.convert(module), algorithm)


@pytest.mark.parametrize("energy", list(RIGHT.values()), ids=list(RIGHT))
def test_a_right_energy_is_taken(energy: Energy) -> None:
    attach(energy)


@pytest.mark.parametrize(("energy", "derivative"), list(WRONG.values()), ids=list(WRONG))
def test_a_wrong_one_is_refused_by_its_name_and_the_derivative(energy: Energy, derivative: str) -> None:
    with pytest.raises(EnergyGradientError) as caught:
        attach(energy)
    error = caught.value
    assert error.where == "Made.gradients, the energy of node '0'" and f"for {derivative}" in error.got
    assert "by differences of Made.of_batch" in error.expected and error.remedy
    assert isinstance(error, ConfigurationError)


def test_gradients_of_another_shape_are_refused() -> None:
    with pytest.raises(EnergyGradientError, match=r"a tensor of shape .* for dphi/dvalue") as caught:
        attach(Made(lambda e, p: 0.5 * e**2, lambda e, p: twice(torch.cat([e, e]))))
    assert "a tensor of shape" in caught.value.expected


def test_the_numbers_of_the_message_are_those_of_the_energy() -> None:
    with pytest.raises(EnergyGradientError) as caught:
        attach(Made(lambda e, p: 0.5 * e**2, lambda e, p: twice(3 * e)))
    got, expected = float(caught.value.got.split()[0]), float(caught.value.expected.split(",")[0])
    words = caught.value.got.replace(",", "").split()
    error = float(words[words.index("value") + 1]) - float(words[-1])
    assert got == pytest.approx(3 * expected, rel=1e-4) and expected == pytest.approx(error, rel=1e-2)


def test_nothing_is_attached_and_nothing_drawn_where_one_is_refused() -> None:
    module, wrong = net(), WRONG["another factor"][0]
    model, sgd = torch2ebm.convert(module), torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(EnergyGradientError):
        torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.PredictiveCoding(steps=5, energies={"0": wrong}))
    torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.PredictiveCoding(steps=5))  # not taken


@pytest.mark.parametrize("name", ["half squares", "random"])
def test_the_user_s_generators_stay_as_they_are(name: str) -> None:
    module, of = net(), RIGHT[name]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    attach(Made(of.of, of.slopes), module)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


def test_an_energy_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Energy] = []
    monkeypatch.setattr(energy_check, "_check", lambda name, energy: checked.append(energy))
    one, other = (Made(lambda e, p: 0.5 * e**2, lambda e, p: twice(e)) for _ in range(2))
    for energy in (one, one, other, one):
        attach(energy)
    assert checked == [one, other]
    attach(torch2ebm.Gaussian(2.0)), attach(torch2ebm.Categorical())
    assert len(checked) == 2


def test_classes_without_a_hash_or_with_slots_are_checked_too() -> None:
    @dataclass(slots=True)
    class Slotted(Energy):
        factor: float

        def of_samples(self, error: Tensor, prediction: Tensor) -> Tensor:
            return (0.5 * error**2).flatten(1).sum(1)

        def of_batch(self, error: Tensor, prediction: Tensor) -> Tensor:
            return self.of_samples(error, prediction).sum()

        def gradients(self, error: Tensor, prediction: Tensor) -> Both:
            return twice(self.factor * error)

    attach(Slotted(1.0))
    with pytest.raises(EnergyGradientError, match="Slotted"):
        attach(Slotted(1.5))


def test_incremental_predictive_coding_checks_them_too() -> None:
    module, wrong = net(), WRONG["another factor"][0]
    algorithm = torch2ebm.IncrementalPredictiveCoding(energies={"0": wrong})
    with pytest.raises(EnergyGradientError, match="Made"):
        torch2ebm.EnergyOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), torch2ebm.convert(module), algorithm)


def test_the_library_s_own_energies_agree_with_their_values() -> None:
    """They are not checked at attach; here they are."""
    for energy in (torch2ebm.Gaussian(3.0), torch2ebm.Gaussian(VECTOR), torch2ebm.Categorical()):
        energy_check._check("0", energy)
