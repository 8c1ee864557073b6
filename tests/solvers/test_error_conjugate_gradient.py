"""Conjugate gradients on the errors: against dense solves, in how many steps, and what is said of kinks."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import attached, local_gradients, relative_error
from oracles.dense_hessian import ErrorProblem, of_chain
from oracles.graphs import half_squared_error
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import NonFiniteError

TIGHT = torch2ebm.ErrorConjugateGradient(tol=1e-10, steps=400)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(make, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def linear_chain(depth: int, outputs: int) -> nn.Sequential:
    def make() -> nn.Sequential:
        net = nn.Sequential(*[nn.Linear(6, 6) for _ in range(depth - 1)], nn.Linear(6, outputs))
        for layer in net[:-1]:
            nn.init.orthogonal_(layer.weight)
        return net

    return seeded(make)


def mean_of(loss):
    return torch2ebm.EnergyLoss(lambda output: loss(output) / len(output))


def relaxed(net: nn.Module, x: Tensor, loss=half_squared_error, solver=TIGHT, nodes: Any = "children", **settings: Any):
    model = attached(net, torch2ebm.PredictiveCoding(solver=solver, **settings), nodes=nodes)
    gradients = local_gradients(model, (x,), mean_of(loss))
    return gradients, model.state


def falls(energy) -> bool:
    return all(after <= before + 1e-12 * abs(before) for before, after in pairwise(energy))


# ---- quadratic energies


def dense_errors(problem: ErrorProblem, beta: float) -> Tensor:
    """Where a quadratic energy is smallest: one Newton step from errors of zero."""
    zero = torch.zeros_like(problem.precisions)
    slope = torch.autograd.functional.jacobian(lambda e: problem.energy(e, beta), zero)
    hessian = torch.autograd.functional.hessian(lambda e: problem.energy(e, beta), zero)
    return torch.linalg.solve(hessian, -slope)


@pytest.mark.parametrize("beta", [0.01, 1.0, 1e4])
@pytest.mark.parametrize("precisions", [[1.0, 1.0], [0.01, 100.0]], ids=["unit", "precisions"])
def test_errors_are_those_of_a_dense_solve(beta: float, precisions: list[float]) -> None:
    net, x = linear_chain(3, 2), normal(5, 6)
    given = {"0": precisions[0], "1": precisions[1]}
    solver = torch2ebm.ErrorConjugateGradient(tol=1e-6)
    _, state = relaxed(net, x, solver=solver, precisions=given, nudging=torch2ebm.OneSided(beta))
    expected = dense_errors(of_chain(list(net), x, half_squared_error, precisions), beta).reshape(2, 5, 6)
    torch.testing.assert_close(state.error["0"], expected[0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(state.error["1"], expected[1], rtol=1e-8, atol=1e-10)
    assert state.relaxation.steps <= 3 and state.relaxation.converged


@pytest.mark.parametrize("depth", [5, 20, 200])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("nudging", [torch2ebm.OneSided(1.0), torch2ebm.Relative(100.0)], ids=["beta 1", "r 100"])
def test_a_quadratic_energy_takes_one_step_more_than_outputs_at_any_depth(depth: int, outputs: int, nudging) -> None:
    _, state = relaxed(
        linear_chain(depth, outputs),
        normal(4, 6),
        solver=torch2ebm.ErrorConjugateGradient(tol=1e-7),
        nudging=nudging,
        nodes="layer",
    )
    assert state.relaxation.steps <= outputs + 1
    assert state.relaxation.converged and state.relaxation.settled == 1.0 and state.relaxation.on_kinks == 0.0
    assert state.relaxation.residual <= 1e-7 and falls(state.relaxation.energy)


def test_descent_with_a_fixed_step_takes_far_more() -> None:
    """The negative twin: the same energy, and the largest step that cannot diverge."""
    net, x = linear_chain(20, 3), normal(4, 6)
    with torch.no_grad():  # three curvatures, far apart
        net[-1].weight.mul_(torch.tensor([[1.0], [0.1], [0.01]]))
    _, state = relaxed(net, x, nudging=torch2ebm.Relative(100.0), nodes="layer")
    descent = torch2ebm.ErrorDescent(steps=20, lr=1 / 101)
    _, other = relaxed(net, x, solver=descent, nudging=torch2ebm.Relative(100.0), nodes="layer")
    assert relative_error({"": other.error["0"]}, {"": state.error["0"]}) > 0.1


def test_the_curvature_that_it_meets_is_below_the_largest_and_near_it() -> None:
    net, x = linear_chain(4, 3), normal(5, 6)
    _, state = relaxed(net, x)
    expected = of_chain(list(net), x, half_squared_error).sigma_squared()
    assert 0.5 * expected <= state.relaxation.sigma_squared <= expected * (1 + 1e-9)


# ---- beyond them


def deep(depth: int, activation, outputs: int = 4) -> nn.Sequential:
    def make() -> nn.Sequential:
        layers = [nn.Sequential(nn.Linear(8, 8), activation()) for _ in range(depth - 1)]
        return nn.Sequential(*layers, nn.Linear(8, outputs))

    return seeded(make)


def classes(output: Tensor) -> Tensor:
    return F.cross_entropy(output, torch.arange(len(output)) % output.shape[1], reduction="sum")


NETS = {
    "tanh": lambda: deep(4, nn.Tanh),
    "ReLU": lambda: deep(4, nn.ReLU),
    "batch norm": lambda: seeded(
        lambda: nn.Sequential(
            nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)
        )
    ),
    "max pooling": lambda: seeded(
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 6, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6, 4)
        )
    ),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("beta", [0.1, 3.0, 100.0])
def test_the_energy_never_rises(name: str, beta: float) -> None:
    _, state = relaxed(NETS[name](), normal(6, 8), classes, nudging=torch2ebm.OneSided(beta))
    assert falls(state.relaxation.energy)
    assert state.relaxation.energy[-1] < state.relaxation.energy[0]


@pytest.mark.parametrize("name", ["tanh", "batch norm"])
@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_its_fixed_point_is_that_of_descent(name: str, beta: float) -> None:
    ours, state = relaxed(NETS[name](), normal(6, 8), classes, nudging=torch2ebm.OneSided(beta))
    descent = torch2ebm.ErrorDescent(20_000, 0.05, tol=1e-11)
    theirs, other = relaxed(NETS[name](), normal(6, 8), classes, solver=descent, nudging=torch2ebm.OneSided(beta))
    assert state.relaxation.converged and other.relaxation.converged
    assert relative_error(ours, theirs) < 1e-7


def test_a_sample_relaxes_the_same_alone_or_in_a_batch() -> None:
    net, x = deep(4, nn.Tanh), normal(5, 8)
    ours, state = relaxed(net, x, lambda output: output.exp().sum(), nudging=torch2ebm.OneSided(2.0))
    assert state.relaxation.sample_residual.shape == (5,)
    alone = [
        relaxed(net, sample[None], lambda output: output.exp().sum(), nudging=torch2ebm.OneSided(2.0))[0]
        for sample in x
    ]
    mean = {name: sum(each[name] for each in alone) / len(x) for name in ours}
    assert relative_error(ours, mean) < 1e-8


class Centred(nn.Module):
    """Samples depend on each other, and nothing says so."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * (x - x.mean(0)) + x.roll(1, 0)


def test_samples_that_depend_on_each_other_come_to_rest_all_the_same() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Centred(), nn.Linear(8, 4)))
    ours, state = relaxed(net, normal(6, 8), classes, nodes="module", nudging=torch2ebm.OneSided(1.0))
    descent = torch2ebm.ErrorDescent(20_000, 0.02, tol=1e-11)
    theirs, _ = relaxed(net, normal(6, 8), classes, solver=descent, nodes="module", nudging=torch2ebm.OneSided(1.0))
    assert falls(state.relaxation.energy)
    assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("depth", [20, 200])
@pytest.mark.parametrize(("r", "limit"), [(0.1, 5), (1.0, 15)])
def test_smooth_chains_are_at_rest_after_few_evaluations(depth: int, r: float, limit: int) -> None:
    solver = torch2ebm.ErrorConjugateGradient(tol=0.01)
    net = deep(depth, nn.Tanh)
    for block in net[:-1]:
        nn.init.orthogonal_(block[0].weight)
    _, state = relaxed(net, normal(8, 8), classes, solver=solver, nodes="layer", nudging=torch2ebm.Relative(r))
    _, end = relaxed(net, normal(8, 8), classes, nodes="layer", nudging=torch2ebm.Relative(r))
    energy = state.relaxation.energy[: limit + 1]
    assert min(energy) - end.relaxation.energy[-1] <= 1e-4 * abs(end.relaxation.energy[-1])


# ---- kinks


def on_a_kink(activation) -> torch2ebm.Relaxation:
    """The energy's smallest point has the value at 0, where a ReLU's gradient jumps from 1 to 0.

    With v = 0.1 + e the energy is e^2 / 2 + 1/2 e'^2 + (out + 1)^2 / 2: its slope is above 0 for v > 0, and -0.1 below.
    """
    net = nn.Sequential(nn.Linear(1, 1, bias=False), activation, nn.Linear(1, 1)).double()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[2].weight.fill_(1.0)
        net[2].bias.fill_(1.0)
    x = torch.full((3, 1), 0.1, dtype=torch.float64)
    solver = torch2ebm.ErrorConjugateGradient(tol=1e-4, steps=60)
    _, state = relaxed(net, x, lambda output: 0.5 * output.square().sum(), solver=solver)
    return state


def test_a_sample_that_rests_on_a_kink_is_told_apart() -> None:
    state = on_a_kink(nn.ReLU())
    assert state.relaxation.on_kinks == 1.0 and state.relaxation.settled == 0.0
    assert state.relaxation.converged and state.relaxation.residual > 1e-2
    assert state.relaxation.steps < 60 and falls(state.relaxation.energy)
    assert float(state.value["0"].abs().max()) < 5e-3


def test_without_the_kink_it_is_settled() -> None:
    """The negative twin: the same net with a smooth rectifier."""
    state = on_a_kink(nn.Softplus(beta=5))
    assert state.relaxation.on_kinks == 0.0 and state.relaxation.settled == 1.0
    assert state.relaxation.residual <= 1e-4


class Rectified(nn.Module):
    """A residual block with a kink."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_rest_is_where_the_energy_is_at_its_end_though_some_samples_still_move_on_kinks() -> None:
    net = seeded(lambda: nn.Sequential(*[Rectified() for _ in range(20)], nn.Linear(16, 4)))
    nudging = torch2ebm.Relative(0.1)
    _, state = relaxed(net, normal(32, 16), classes, solver=torch2ebm.ErrorConjugateGradient(), nudging=nudging)
    _, end = relaxed(net, normal(32, 16), classes, solver=torch2ebm.ErrorConjugateGradient(1e-6, 200), nudging=nudging)
    found = state.relaxation
    assert found.converged and 0.5 <= found.settled + found.on_kinks <= 1.0
    lowest = end.relaxation.energy[-1]
    assert found.energy[-1] - lowest <= 0.02 * (found.energy[0] - lowest)
    assert found.steps < end.relaxation.steps


def test_a_relaxation_cut_short_is_neither() -> None:
    _, state = relaxed(
        deep(4, nn.Tanh), normal(6, 8), classes, solver=torch2ebm.ErrorConjugateGradient(tol=1e-12, steps=2),
        nudging=torch2ebm.OneSided(10.0),
    )  # fmt: skip
    assert state.relaxation.steps == 2 and not state.relaxation.converged
    assert state.relaxation.settled < 1.0 and state.relaxation.on_kinks == 0.0
    assert falls(state.relaxation.energy)


# ---- ends of the range


def test_one_layer_has_nothing_to_relax_and_learns_as_backprop_does() -> None:
    net, x = seeded(lambda: nn.Sequential(nn.Linear(8, 4))), normal(5, 8)
    ours, state = relaxed(net, x, classes)
    loss = classes(net(x)) / 5
    expected = dict(zip(ours, torch.autograd.grad(loss, list(net.parameters())), strict=True))
    assert relative_error(ours, expected) < 1e-12 and state.relaxation.converged


def test_errors_far_below_float32_s_rounding_of_the_values_are_kept() -> None:
    net, x = deep(6, nn.Tanh), normal(5, 8)
    exact, _ = relaxed(net, x, classes, nudging=torch2ebm.Relative(1e-3))
    single, _ = relaxed(net.float(), x.float(), classes, solver=torch2ebm.ErrorConjugateGradient(1e-4),
                        nudging=torch2ebm.Relative(1e-3))  # fmt: skip
    assert relative_error({name: g.double() for name, g in single.items()}, exact) < 1e-3


def test_a_loss_that_is_no_number_is_named() -> None:
    with pytest.raises(NonFiniteError):
        relaxed(deep(3, nn.Tanh), normal(4, 8), lambda output: (output - 1e3).log().sum())
