"""Ready energies against the distributions of torch that they are named after, in double precision and at extremes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor

import torch2ebm
from torch2ebm.extend import Energy

SHAPES = [(6,), (3, 4), (3, 2, 4)]


def summed(each: Tensor) -> Tensor:
    return each.flatten(1).sum(1) if each.ndim > 1 else each


def against_density(of: Callable[[Tensor], D.Distribution]) -> Callable[[Tensor, Tensor], Tensor]:
    """Minus the logarithm of a density, from that at its mode on."""
    return lambda value, mu: of(mu).log_prob(mu) - of(mu).log_prob(value)


def huber(value: Tensor, mu: Tensor) -> Tensor:
    return 2.5 * F.huber_loss(value, mu, reduction="none", delta=0.7)


ROWS: dict[str, tuple[Energy, Callable[[Tensor, Tensor], Tensor]]] = {
    "Laplace": (torch2ebm.Laplace(0.4), against_density(lambda mu: D.Laplace(mu, 0.4))),
    "Huber": (torch2ebm.Huber(0.7, 2.5), huber),
    "StudentT": (torch2ebm.StudentT(3.5, 0.4), against_density(lambda mu: D.StudentT(3.5, mu, 0.4))),
    "VonMises": (torch2ebm.VonMises(2.5), against_density(lambda mu: D.VonMises(mu, torch.tensor(2.5).to(mu)))),
    "Bernoulli": (
        torch2ebm.Bernoulli(),
        lambda value, mu: D.kl_divergence(D.Bernoulli(logits=value), D.Bernoulli(logits=mu)),
    ),
    "Poisson": (torch2ebm.Poisson(), lambda value, mu: D.kl_divergence(D.Poisson(value.exp()), D.Poisson(mu.exp()))),
}
OF_DATA: dict[str, tuple[Energy, Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "Bernoulli": (
        torch2ebm.Bernoulli(observed=True),
        lambda drawn: drawn.sigmoid().round(),
        lambda value, mu: -D.Bernoulli(logits=mu).log_prob(value),
    ),
    "Bernoulli, grey": (
        torch2ebm.Bernoulli(observed=True),
        torch.sigmoid,
        lambda value, mu: F.binary_cross_entropy_with_logits(mu, value, reduction="none"),
    ),
    "Poisson": (
        torch2ebm.Poisson(observed=True),
        lambda drawn: drawn.exp().round(),
        lambda value, mu: -D.Poisson(mu.exp()).log_prob(value) - torch.lgamma(value + 1),
    ),
}


def drawn(shape: tuple[int, ...], seed: int = 0, size: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(size * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("size", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ROWS)
def test_the_energy_of_a_free_node_is_the_formula(name: str, shape: tuple[int, ...], size: float) -> None:
    energy, formula = ROWS[name]
    value, mu = drawn(shape, size=size)
    expected = formula(value, mu)
    found = energy.of_samples(value - mu, mu)
    torch.testing.assert_close(found, summed(expected), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(energy.of_batch(value - mu, mu), expected.sum(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OF_DATA)
def test_the_energy_of_data_is_a_negative_log_likelihood(name: str, shape: tuple[int, ...]) -> None:
    energy, data, formula = OF_DATA[name]
    value, mu = drawn(shape)
    value = data(value)
    torch.testing.assert_close(energy.of_samples(value - mu, mu), summed(formula(value, mu)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(energy.of_batch(value - mu, mu), formula(value, mu).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4)])
def test_the_categorical_energy_of_data_is_the_cross_entropy(shape: tuple[int, ...]) -> None:
    value, mu = drawn(shape)
    energy = torch2ebm.Categorical(observed=True)
    parts = value.softmax(-1)
    expected = -(parts * D.Categorical(logits=mu).logits).sum(-1)
    torch.testing.assert_close(energy.of_samples(parts - mu, mu), summed(expected), rtol=1e-12, atol=1e-12)
    classes = value.argmax(-1)
    one_hot = F.one_hot(classes, 4).double()
    by_class = -D.Categorical(logits=mu).log_prob(classes)
    torch.testing.assert_close(energy.of_samples(one_hot - mu, mu), summed(by_class), rtol=1e-12, atol=1e-12)


EVERY = [
    *(energy for energy, _ in ROWS.values()),
    *(energy for energy, *_ in OF_DATA.values()),
    torch2ebm.Categorical(observed=True),
    torch2ebm.FunctionEnergy(lambda value, mu: (value - mu).cosh().log() * mu.exp()),
    torch2ebm.FunctionEnergy(lambda error: (error**4).flatten(1).sum(1) if error.ndim > 1 else error**4, of_error=True),
]


@pytest.mark.parametrize("size", [1e-5, 1.0, 5.0])
@pytest.mark.parametrize("energy", EVERY, ids=lambda energy: repr(energy)[:30])
def test_the_two_derivatives_are_those_of_autograd(energy: Energy, size: float) -> None:
    for shape in SHAPES:
        value, mu = drawn(shape)
        value = mu + size * value
        value, mu = value.requires_grad_(), mu.requires_grad_()
        own, against = torch.autograd.grad(energy.of_batch(value - mu, mu), [value, mu])
        found = energy.gradients((value - mu).detach(), mu.detach())
        # near the prediction the second derivative cancels in autograd's way, and not in the energy's
        torch.testing.assert_close(found[0], own, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found[1], -against, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["Huber", "StudentT", "Bernoulli", "Poisson"])
def test_second_derivatives_by_gradcheck(name: str) -> None:
    energy = ROWS[name][0]
    value, mu = (each.requires_grad_() for each in drawn((2, 3)))
    assert torch.autograd.gradcheck(lambda v, p: energy.of_batch(v - p, p), [value, mu])
    assert torch.autograd.gradcheck(lambda v, p: energy.gradients(v - p, p), [value, mu])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_a_thousand_overflow_nowhere(dtype: torch.dtype) -> None:
    """KL(Bernoulli(p) || Bernoulli(q)) with p = 1 and q = sigmoid(-1000) is 1000; the other way round it is as much."""
    value = torch.tensor([[1e3, -1e3, 1e3, -1e3, 0.0]], dtype=dtype)
    mu = torch.tensor([[-1e3, 1e3, 1e3, -1e3, 1e3]], dtype=dtype)
    energy = torch2ebm.Bernoulli()
    each = torch.stack([energy.of_batch(value[:, i] - mu[:, i], mu[:, i]) for i in range(5)])
    expected = torch.tensor([1e3, 1e3, 0.0, 0.0, 500 - 0.6931471805599453], dtype=dtype)
    torch.testing.assert_close(each, expected, rtol=1e-6, atol=0)
    own, against = energy.gradients(value - mu, mu)
    assert torch.isfinite(own).all()
    torch.testing.assert_close(against, torch.tensor([[1.0, -1.0, 0.0, 0.0, -0.5]], dtype=dtype), rtol=0, atol=0)
    data = torch.tensor([[0.0, 1.0, 1.0]], dtype=dtype)
    logits = torch.tensor([[1e3, -1e3, 1e3]], dtype=dtype)
    observed = torch2ebm.Bernoulli(observed=True)
    torch.testing.assert_close(observed.of_samples(data - logits, logits), torch.tensor([2e3], dtype=dtype))
    torch.testing.assert_close(
        observed.gradients(data - logits, logits)[1], torch.tensor([[-1.0, 1.0, 0.0]], dtype=dtype)
    )
    categorical = torch2ebm.Categorical(observed=True)
    one_hot = torch.tensor([[1.0, 0.0, 0.0]], dtype=dtype)
    torch.testing.assert_close(categorical.of_samples(one_hot - logits, logits), torch.tensor([0.6931472], dtype=dtype))


def test_far_out_the_divergence_of_two_events_keeps_its_digits() -> None:
    """By what is missing to certainty, p = sigmoid(-30) and q = sigmoid(-25): 1 - p and 1 - q lose their digits."""
    p, q = 1 / (1 + math.exp(30)), 1 / (1 + math.exp(25))
    expected = (1 - p) * (math.log1p(-p) - math.log1p(-q)) + p * (math.log(p) - math.log(q))
    for value, mu in ((30.0, 25.0), (-30.0, -25.0)):
        error, at = torch.tensor([[value - mu]]).double(), torch.tensor([[mu]]).double()
        assert abs(float(torch2ebm.Bernoulli().of_batch(error, at)) / expected - 1) < 1e-12


def test_a_large_error_overflows_in_no_robust_energy() -> None:
    error = torch.tensor([[1e30, -1e30]])
    for energy in (torch2ebm.Laplace(), torch2ebm.Huber(), torch2ebm.StudentT()):
        assert torch.isfinite(energy.of_batch(error, error))
        assert torch.isfinite(energy.gradients(error, error)[0]).all()
    # 4 / 2 * log(1 + 1e60 / 3) of each
    expected = torch.tensor(2 * 2 * (60 * math.log(10) - math.log(3)))
    torch.testing.assert_close(torch2ebm.StudentT(3.0).of_batch(error, error), expected)


@pytest.mark.parametrize("name", ["Bernoulli", "Poisson"])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-3, 1e-2, 1e-1])
def test_near_the_prediction_single_precision_keeps_its_digits(name: str, size: float) -> None:
    energy = ROWS[name][0]
    value, mu = drawn((4, 5), seed=1)
    error, mu = (size * value).float(), mu.float()
    exact = energy.of_samples(error.double(), mu.double())
    torch.testing.assert_close(energy.of_samples(error, mu).double(), exact, rtol=3e-5, atol=0)
    own, against = energy.gradients(error, mu)
    in_double = energy.gradients(error.double(), mu.double())
    torch.testing.assert_close(own.double(), in_double[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(against.double(), in_double[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["Bernoulli", "Poisson"])
@pytest.mark.parametrize("size", [1e-7, 1e-5, 1.1e-4, 1.3e-4, 1e-3])
def test_near_the_prediction_the_energy_is_its_series(name: str, size: float) -> None:
    """A''(v) e^2 / 2 - A'''(v) e^3 / 6, from the derivatives of the normaliser alone."""
    value, mu = drawn((4, 5), seed=2)
    error = size * value
    at = error + mu
    if name == "Poisson":
        second = third = at.exp()
    else:
        p = at.sigmoid()
        second, third = p * (1 - p), p * (1 - p) * (1 - 2 * p)
    expected = (second * error**2 / 2 - third * error**3 / 6).sum(1)
    found = ROWS[name][0].of_samples(error, mu)
    torch.testing.assert_close(found, expected, rtol=max(1e-9, size**2), atol=0)


@pytest.mark.parametrize("name", ROWS)
def test_the_energy_is_zero_and_stationary_at_the_prediction(name: str) -> None:
    energy, (mu, _) = ROWS[name][0], drawn((3, 4))
    zero = torch.zeros_like(mu)
    assert torch.equal(energy.of_samples(zero, mu), torch.zeros(3).double())
    assert all(torch.equal(slope.abs(), zero) for slope in energy.gradients(zero, mu))


@pytest.mark.parametrize(
    ("energy", "formula"),
    [
        (torch2ebm.Huber(0.3, 2.5), lambda e: 2.5 * F.huber_loss(e, torch.zeros_like(e), reduction="sum", delta=0.3)),
        (torch2ebm.StudentT(3.0, 0.5), lambda e: -D.StudentT(3.0, 0.0, 0.5).log_prob(e).sum()),
    ],
    ids=["Huber", "StudentT"],
)
def test_the_precision_at_rest_is_the_second_derivative_there(energy: Energy, formula: Callable[..., Tensor]) -> None:
    hessian = torch.autograd.functional.hessian(formula, torch.zeros(1).double())
    assert abs(float(energy.precision_at_rest()) - float(hessian)) < 1e-9


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch2ebm.Laplace(0.0),
        lambda: torch2ebm.Laplace(float("nan")),
        lambda: torch2ebm.Huber(delta=-1.0),
        lambda: torch2ebm.Huber(precision=float("inf")),
        lambda: torch2ebm.StudentT(degrees=0),
        lambda: torch2ebm.StudentT(scale=-2.0),
        lambda: torch2ebm.VonMises(0.0),
    ],
)
def test_an_illegal_setting_is_refused(make: Callable[[], Energy]) -> None:
    with pytest.raises(torch2ebm.errors.ConfigurationError, match="finite number above 0"):
        make()
