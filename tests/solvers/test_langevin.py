"""Draws against the posterior of a linear Gaussian network, which is known in closed form."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ConfigurationError, DivergenceError


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Linear:
    """x -> v0 -> v1 -> y, all linear, with the precisions 2, 1 and 1: F = 1/2 v^T H v - b^T v + const."""

    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2))
        self.model = torch2ebm.convert(self.net)
        self.x, self.y = torch.randn(1, 2), torch.randn(1, 2)
        second, third = self.net[1].weight.detach(), self.net[2].weight.detach()
        self.hessian = torch.zeros(5, 5)
        self.hessian[:3, :3] = 2 * torch.eye(3) + second.T @ second
        self.hessian[:3, 3:] = -second.T
        self.hessian[3:, :3] = -second
        self.hessian[3:, 3:] = torch.eye(2) + third.T @ third
        b0 = 2 * self.net[0](self.x) - (self.net[1].bias @ second)[None]
        b1 = self.net[1].bias[None] + (self.y - self.net[2].bias) @ third
        self.mean = torch.linalg.solve(self.hessian, torch.cat([b0, b1], 1).T).T[0].detach()

    def draws(self, **settings: object) -> Tensor:
        """Independent ones: the last of every chain, ``[chains, 5]``."""
        sampler = torch2ebm.Langevin(chains=3000, thinning=1, **settings)  # type: ignore[arg-type]
        found = self.model.infer(self.x, clamp={"output": self.y}, precisions={"0": 2.0}, solver=sampler)
        return torch.cat([found.samples["0"], found.samples["1"]], 3)[-1, :, 0]


def p_values(draws: Tensor, mean: Tensor, covariance: Tensor) -> tuple[float, float]:
    """How likely deviations as large are, of the mean and of the covariance, for normal draws."""
    count, size = draws.shape
    root = torch.linalg.cholesky(torch.linalg.inv(covariance))
    white = (draws - mean) @ root
    of_mean = count * white.mean(0).square().sum()
    off = torch.cov(white.T) - torch.eye(size)
    of_covariance = count * (off.triu(1).square().sum() + off.diagonal().square().sum() / 2)

    def p(statistic: Tensor, degrees: int) -> float:
        return float(torch.special.gammaincc(torch.tensor(degrees / 2), statistic / 2))

    return p(of_mean, size), p(of_covariance, size * (size + 1) // 2)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_mean_and_covariance_are_those_of_the_posterior(temperature: float) -> None:
    linear = Linear()
    draws = linear.draws(temperature=temperature, steps=700, burn_in=699, lr=0.01)
    covariance = temperature * torch.linalg.inv(linear.hessian)
    assert min(p_values(draws, linear.mean, covariance)) > 0.01
    assert p_values(draws, linear.mean, 1.3 * covariance)[1] < 1e-4  # the twin: another temperature


def test_a_step_size_widens_the_draws_by_what_is_documented() -> None:
    linear = Linear()
    draws = linear.draws(steps=80, burn_in=79, lr=0.2)
    posterior = torch.linalg.inv(linear.hessian)
    widened = posterior @ torch.linalg.inv(torch.eye(5) - 0.1 * linear.hessian)
    assert min(p_values(draws, linear.mean, widened)) > 0.01
    assert p_values(draws, linear.mean, posterior)[1] < 1e-4


def test_free_outputs_and_inputs_are_drawn_too() -> None:
    """x ~ N(0, 1), v = W x + noise, y = W' v + noise: the variance of y is 1 + W'W'^T + W'W W^T W'^T."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    sampler = torch2ebm.Langevin(steps=900, burn_in=899, lr=0.01, chains=3000)
    found = torch2ebm.convert(net).infer(
        torch.zeros(1, 1), free=["input"], prior={"input": torch2ebm.Gaussian()}, solver=sampler
    )
    assert found.samples["1"].shape == (1, 3000, 1, 1) and found.samples["input"].shape == (1, 3000, 1, 1)
    first, last = net[0].weight.detach(), net[1].weight.detach()
    variance = 1 + last @ last.T + last @ first @ first.T @ last.T
    assert min(p_values(found.samples["1"][0, :, 0], torch.zeros(1), variance)) > 0.01
    assert min(p_values(found.samples["input"][0, :, 0], torch.zeros(1), torch.eye(1))) > 0.01


def test_what_is_given_in_part_is_drawn_in_part() -> None:
    linear = Linear()
    mask = torch.tensor([[True, False]])
    sampler = torch2ebm.Langevin(steps=20, burn_in=10, thinning=5, lr=0.05, chains=4)
    found = linear.model.infer(linear.x, clamp={"output": linear.y}, mask={"output": mask}, solver=sampler)
    drawn = found.samples["2"]
    assert drawn.shape == (2, 4, 1, 2) and bool((drawn[..., 0] == linear.y[0, 0]).all())
    assert len(drawn[..., 1].unique()) == 8


def test_noise_is_as_torch_or_a_generator_says() -> None:
    linear = Linear()

    def drawn(generator: torch.Generator | None = None) -> Tensor:
        sampler = torch2ebm.Langevin(steps=12, burn_in=10, lr=0.05, generator=generator)
        return linear.model.infer(linear.x, clamp={"output": linear.y}, solver=sampler).samples["0"]

    torch.manual_seed(3)
    one, other = drawn(), drawn()
    torch.manual_seed(3)
    assert torch.equal(drawn(), one) and not torch.equal(one, other)
    seeded = [drawn(torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*seeded)


def test_automatic_steps_do_not_run_away_and_too_long_ones_are_told() -> None:
    linear = Linear()
    draws = linear.draws(steps=300, burn_in=299, lr="auto")
    assert torch.allclose(torch.cov(draws.T), torch.linalg.inv(linear.hessian), atol=0.15)
    with pytest.raises(DivergenceError, match='lr="auto"'):
        linear.draws(steps=300, burn_in=299, lr=2.0)


@pytest.mark.parametrize(("factor", "told"), [(0.01, 0), (1e4, 1)])
def test_chains_that_are_too_short_in_training_are_told_once(factor: float, told: int) -> None:
    """A factor of 1e4 makes a step of about 1e-5, so that 20 of them move no latent by its prior's width."""
    net = nn.Sequential(nn.Linear(2, 3))
    model, y = torch2ebm.convert(net), torch.randn(5, 3)
    sampler = torch2ebm.Langevin(steps=20, burn_in=10, lr="auto")
    algorithm = torch2ebm.PredictiveCoding(free=["input"], solver=sampler)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), model, algorithm)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            (factor * 0.5 * (model(torch.zeros(5, 2)) - y).square().sum(1).mean()).backward()
    assert len(caught) == told and all("Take more steps" in str(each.message) for each in caught)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"steps": 0},
        {"lr": 0.0},
        {"burn_in": 1000},
        {"burn_in": -1},
        {"thinning": 0},
        {"thinning": 901},
        {"chains": 0},
    ],
)
def test_illegal_settings_are_named(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="Langevin"):
        torch2ebm.Langevin(**settings)  # type: ignore[arg-type]


def test_fewer_steps_keep_a_draw() -> None:
    assert torch2ebm.Langevin(steps=1000, burn_in=800, thinning=50).with_steps(10).burn_in == 5


def test_chains_of_what_counts_something_else_are_refused() -> None:
    """A context whose length happens to be the batch's would be there once for each chain."""

    class WithContext(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return self.last(self.first(x) + context.sum(0))

    model, context = torch2ebm.convert(WithContext()), torch.randn(4, 3)
    sampler = torch2ebm.Langevin(steps=10, burn_in=5, chains=3)
    with pytest.raises(ConfigurationError, match="chains=3"):
        model.infer(torch.randn(4, 3), context, solver=sampler)
    assert model.infer(torch.randn(6, 3), context, solver=sampler).samples["first"].shape == (5, 3, 6, 3)
