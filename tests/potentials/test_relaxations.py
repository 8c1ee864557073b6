"""Where values come to rest under each ready energy: a dense minimiser of the formula says the same."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor, nn

import torch2ebm
from torch2ebm import Bernoulli, FunctionEnergy, Huber, Laplace, OneSided, Poisson, PredictiveCoding, StudentT
from torch2ebm.errors import ConfigurationError, NotSettledWarning
from torch2ebm.extend import Energy

Formula = Callable[[Tensor, Tensor], Tensor]


def matrix() -> Tensor:
    factor = torch.tensor([[1.2, 0.0, 0.0], [0.4, 0.7, 0.0], [-0.3, 0.5, 1.5]], dtype=torch.float64)
    return factor @ factor.T


def full() -> Energy:
    precision = torch2ebm.Precision(3, full=True).double()
    factor = torch.linalg.cholesky(matrix())
    with torch.no_grad():
        precision.log.copy_(factor.diagonal().log())
        precision.below.copy_(factor.tril(-1))  # type: ignore[union-attr]
    return torch2ebm.Gaussian(precision)


ROWS: dict[str, tuple[Callable[[], Energy], Formula]] = {
    "Huber": (
        lambda: Huber(0.3, 2.0),
        lambda v, mu: 2 * F.huber_loss(v, mu, reduction="sum", delta=0.3),
    ),
    "StudentT": (lambda: StudentT(3.0, 0.8), lambda v, mu: -D.StudentT(3.0, mu, 0.8).log_prob(v).sum()),
    "Bernoulli": (
        Bernoulli,
        lambda v, mu: D.kl_divergence(D.Bernoulli(logits=v), D.Bernoulli(logits=mu)).sum(),
    ),
    "Poisson": (Poisson, lambda v, mu: D.kl_divergence(D.Poisson(v.exp()), D.Poisson(mu.exp())).sum()),
    "a function": (
        lambda: FunctionEnergy(lambda v, mu: (v - mu).cosh().log() * (1 + mu**2)),
        lambda v, mu: ((v - mu).cosh().log() * (1 + mu**2)).sum(),
    ),
    "a function of the error": (
        lambda: FunctionEnergy(lambda e: ((1 + e**2).sqrt() - 1).sum(1) + 7, of_error=True),
        lambda v, mu: (1 + (v - mu) ** 2).sqrt().sum(),
    ),
    "a matrix": (full, lambda v, mu: 0.5 * torch.einsum("bi,ij,bj->", v - mu, matrix(), v - mu)),
}


def net_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return x, 0.7 * torch.randn(5, 2, generator=generator, dtype=torch.float64)


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (output - y).square().sum(1).mean()


def relaxed(algorithm: Any) -> Any:
    net, (x, y) = net_of(), batch()
    model = torch2ebm.convert(net)
    keep = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
    loss_of(model(x), y).backward()
    assert keep.model is model
    return model


def minimised(formula: Formula) -> list[Tensor]:
    """Values of both hidden nodes, by LBFGS on the energy written out, from the feed-forward pass on."""
    net, (x, y) = net_of(), batch()
    values = [net[:2](x).detach().requires_grad_(), net[:4](x).detach().requires_grad_()]
    lbfgs = torch.optim.LBFGS(
        values, max_iter=4000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def energy() -> Tensor:
        lbfgs.zero_grad()
        found = formula(values[0], net[:2](x)) + formula(values[1], net[2:4](values[0]))
        found = found + 5 * loss_of(net[4](values[1]), y)
        found.backward()
        return found

    lbfgs.step(energy)
    assert max(float(value.grad.abs().max()) for value in values) < 1e-7  # type: ignore[union-attr]
    return [value.detach() for value in values]


@pytest.mark.parametrize("solver", ["errors", "values"])
@pytest.mark.parametrize("name", ROWS)
def test_values_rest_at_the_minimum_of_the_formula(name: str, solver: str) -> None:
    make, formula = ROWS[name]
    solvers = {
        "errors": torch2ebm.ErrorConjugateGradient(tol=1e-8, steps=600),
        "values": torch2ebm.Momentum(steps=3000, lr=0.1, tol=1e-9),
    }
    algorithm = PredictiveCoding(energies={"0": make(), "2": make()}, solver=solvers[solver], nudging=OneSided(1.0))
    state = relaxed(algorithm).state
    expected = minimised(formula)
    for node, value in zip(("0", "2"), expected, strict=True):
        torch.testing.assert_close(state.value[node], value, rtol=0, atol=1e-6)
    energy = state.relaxation.energy
    if solver == "errors":
        assert all(after <= before + 1e-12 for before, after in itertools.pairwise(energy))


@pytest.mark.parametrize("name", [*ROWS, "Categorical"])
def test_the_default_settles_and_its_energy_never_rises(name: str) -> None:
    make = torch2ebm.Categorical if name == "Categorical" else ROWS[name][0]
    relaxation = relaxed(PredictiveCoding(energies={"0": make(), "2": make()})).state.relaxation
    assert relaxation.converged and relaxation.settled >= 0.8
    pairs = zip(relaxation.energy, relaxation.energy[1:], strict=False)
    assert all(after <= before + 1e-12 for before, after in pairs)


@pytest.mark.parametrize("name", ROWS)
def test_the_gradient_of_a_weight_is_that_of_the_formula_at_rest(name: str) -> None:
    make, formula = ROWS[name]
    algorithm = PredictiveCoding(
        energies={"0": make(), "2": make()}, solver=torch2ebm.ErrorConjugateGradient(1e-8, 600), nudging=OneSided(1.0)
    )
    model = relaxed(algorithm)
    net, (x, y) = net_of(), batch()
    first, second = minimised(formula)
    energy = formula(first, net[:2](x)) + formula(second, net[2:4](first)) + 5 * loss_of(net[4](second), y)
    (energy / 5).backward()
    ours = dict(model.named_parameters())
    for number, parameter in net.named_parameters():
        found = next(each for name, each in ours.items() if name.endswith(number))
        torch.testing.assert_close(found.grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_laplace_off_its_jump_rests_where_the_formula_is_smallest() -> None:
    """One value, one output: v - mu is off zero, where the loss pulls with more than 1 / scale."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Identity(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
    model = torch2ebm.convert(net, nodes=["0", "2"])
    algorithm = PredictiveCoding(
        energies={"0": Laplace(2.0)}, solver=torch2ebm.ErrorConjugateGradient(1e-9), nudging=OneSided(1.0)
    )
    keep = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
    x, y = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[5.0], [-4.0]]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model(x), y).backward()
    # |v - mu| / 2 + (v + 1 - y)^2 / 2 is smallest at v = y - 1 -+ 1/2
    expected = torch.tensor([[3.5], [-4.5]]).double()
    assert keep.model is model
    torch.testing.assert_close(model.state.value["0"], expected, rtol=0, atol=1e-6)


def test_laplace_on_its_jump_is_told() -> None:
    with pytest.warns(NotSettledWarning, match="Huber"):
        state = relaxed(PredictiveCoding(energies={"2": Laplace(0.5)})).state
    assert state.relaxation.on_kinks > 0
    energy = state.relaxation.energy
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(energy))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rounded = relaxed(PredictiveCoding(energies={"2": Huber(0.01, 1 / (0.5 * 0.01))})).state
    assert rounded.relaxation.settled == 1.0


@pytest.mark.parametrize(
    "energy", [Bernoulli(observed=True), Poisson(observed=True), torch2ebm.Categorical(observed=True)]
)
@pytest.mark.parametrize("algorithm", [PredictiveCoding, torch2ebm.IncrementalPredictiveCoding])
def test_a_free_node_takes_no_energy_of_data(algorithm: Any, energy: Energy) -> None:
    with pytest.raises(ConfigurationError, match="whose value is data"):
        relaxed(algorithm(energies={"2": energy}))
