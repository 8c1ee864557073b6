"""Step sizes that are measured, and fixed ones that raise the energy, against matrices written out."""

import math

import pytest
import torch
from helpers import attached
from oracles.dense_hessian import of_chain, of_dag, values_of_chain, values_of_dag
from oracles.energy import EnergyProblem
from oracles.graphs import SkipDag, cross_entropy, half_squared_error, skip_dag
from torch import Tensor, nn
from torch.nn import functional as F

import torch2ebm
from torch2ebm.algorithms.given import Given
from torch2ebm.engine.node_energies import node_energies
from torch2ebm.errors import NonFiniteError
from torch2ebm.inference.steepness import measured_stability
from torch2ebm.loss.output_loss import NudgedLoss

NAMES = [vertex.name for vertex in skip_dag().vertices]
X = skip_dag().inputs["x"]
PRECISIONS = {"first": 2.5, "gated": 0.4, "third": torch.linspace(0.5, 2.0, 6, dtype=torch.float64)}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(make) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


def by_mean(loss):
    return torch2ebm.EnergyLoss(lambda output: loss(output) / len(output))


def largest(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])


def given(net: nn.Module, nodes, x: Tensor, loss):
    """The call and the loss of one backward."""
    algorithm = Given("mean")
    by_mean(loss)(attached(net, algorithm, nodes)(x)).backward(retain_graph=True)
    return algorithm.found[0]


def stability(net, nodes, x, loss, coordinates, beta=1.0, precisions=None, energies=None, **settings):
    call, of_outputs = given(net, nodes, x, loss)
    named = node_energies("test", precisions or {}, energies or {})
    products = settings.pop("products", 400)
    return measured_stability(call, NudgedLoss(of_outputs, beta), named, coordinates, products, 1e-9, **settings)


# ---- the largest eigenvalue, against the matrix


@pytest.mark.parametrize("loss", [half_squared_error, cross_entropy])
@pytest.mark.parametrize("precisions", [{}, PRECISIONS], ids=["unit", "precisions"])
@pytest.mark.parametrize("beta", [0.1, 1.0, 30.0])
def test_on_a_dag_with_shared_weights(loss, precisions, beta: float) -> None:
    problem = EnergyProblem(skip_dag(), loss, precisions=precisions)
    in_errors = stability(SkipDag(), NAMES, X, loss, "errors", beta, precisions)
    assert in_errors.steepest == pytest.approx(largest(of_dag(problem).hessian(beta)), rel=1e-6)
    in_values = stability(SkipDag(), NAMES, X, loss, "values", beta, precisions)
    assert in_values.steepest == pytest.approx(largest(values_of_dag(problem).hessian(beta)), rel=1e-6)
    local = stability(SkipDag(), NAMES, X, loss, "local errors", beta, precisions)
    assert local.r == pytest.approx(beta * of_dag(problem).sigma_squared(), rel=1e-6)
    assert local.steepest == pytest.approx(float(values_of_dag(problem).precisions.max()), rel=1e-6)


def test_the_matrix_is_the_second_derivative_where_outputs_are_linear() -> None:
    problem = values_of_dag(EnergyProblem(skip_dag(), cross_entropy, precisions=PRECISIONS))
    whole = torch.autograd.functional.hessian(lambda values: problem.energy(values, 0.7), problem.start)
    torch.testing.assert_close(problem.hessian(0.7), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("without", ["precisions", "loss", "messages"])
def test_each_part_of_the_matrix_counts(without: str) -> None:
    """The negative twin."""
    problem = values_of_dag(EnergyProblem(skip_dag(), cross_entropy, precisions=PRECISIONS))
    whole = largest(problem.hessian(30.0))
    others = {
        "precisions": lambda: problem.hessian(30.0, torch.eye(len(problem.start), dtype=torch.float64)),
        "loss": lambda: problem.hessian(0.0),
        "messages": lambda: torch.diag(problem.precisions) + 30.0 * problem.of_loss(),
    }
    assert largest(others[without]()) != pytest.approx(whole, rel=1e-4)


class Attention(nn.Module):
    """Fused attention, which has no forward-mode derivative and no second one on a CPU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.all = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.all(x).chunk(3, -1))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


CHAINS = {
    "tanh": (lambda: [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)], (4, 5)),
    "convolutions": (
        lambda: [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)],
        (3, 2, 6, 6),
    ),
    "attention": (
        lambda: [nn.Linear(4, 8), Attention(8), nn.LayerNorm(8), nn.Flatten(), nn.Linear(24, 3)],
        (4, 3, 4),
    ),
    "batch norm": (
        lambda: [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)],
        (6, 5),
    ),
}


def chain(name: str, **settings):
    make, shape = CHAINS[name]
    net = seeded(lambda: nn.Sequential(*make()))
    twin = list(seeded(lambda: nn.Sequential(*make())))  # running statistics of one move, where the oracle runs it
    x = normal(*shape)
    return net, x, of_chain(twin, x, cross_entropy, **settings), values_of_chain(twin, x, cross_entropy, **settings)


@pytest.mark.parametrize("name", CHAINS)
def test_on_chains(name: str) -> None:
    net, x, errors, values = chain(name)
    for coordinates, problem in (("errors", errors), ("values", values)):
        found = stability(net, "children", x, cross_entropy, coordinates, 3.0)
        assert found.steepest == pytest.approx(largest(problem.hessian(3.0)), rel=1e-6)


def test_an_energy_of_ones_own_counts_by_its_second_derivative() -> None:
    net, x, _, values = chain("tanh")
    categorical = torch2ebm.Categorical()
    curvature = torch.diag(values.precisions)
    start = values.start[24:48].reshape(4, 6)  # what the first tanh gives
    for sample, logits in enumerate(start):
        p, at = logits.softmax(0), slice(24 + 6 * sample, 30 + 6 * sample)
        curvature[at, at] = torch.diag(p) - torch.outer(p, p)  # d2 KL(softmax v || softmax mu) / dv2 at v = mu
    found = stability(net, "children", x, cross_entropy, "values", 3.0, energies={"1": categorical})
    assert found.steepest == pytest.approx(largest(values.hessian(3.0, curvature)), rel=1e-6)
    assert found.steepest != pytest.approx(largest(values.hessian(3.0)), rel=1e-3)


def test_what_the_call_has_given_away_is_computed_again() -> None:
    net, x, _, values = chain("tanh")
    call, loss = given(net, "children", x, cross_entropy)
    for node in call.graph.hidden_nodes:
        for slot in node.slots:
            del call.values[slot]
    found = measured_stability(call, loss, {}, "values", 400, 1e-9)
    assert found.steepest == pytest.approx(largest(values.hessian(1.0)), rel=1e-6)


@pytest.mark.parametrize("coordinates", ["values", "errors"])
def test_three_products_are_near_and_cheap(coordinates: str) -> None:
    layers = [part for _ in range(20) for part in (nn.Linear(16, 16), nn.Tanh())]
    net, x = seeded(lambda: nn.Sequential(*layers, nn.Linear(16, 3))).float(), normal(32, 16).float()
    call, loss = given(net, "auto", x, cross_entropy)
    exact = measured_stability(call, loss, {}, coordinates, 60, 1e-3)  # and sees whether samples are independent
    found = measured_stability(call, loss, {}, coordinates, 3, exact=False)
    assert 0.7 * exact.steepest < found.steepest <= 1.01 * exact.steepest
    assert found.products == 3 and found.backprops <= 3


def test_what_is_not_finite_is_named() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)))
    with torch.no_grad():
        net[1].weight.mul_(1e200)
    model = attached(net, torch2ebm.PredictiveCoding(steps=3, lr="auto"))
    with pytest.raises(NonFiniteError):
        (1e-250 * model(normal(4, 5))).square().mean().backward()
    assert all(p.grad is None for p in net.parameters())


# ---- stability of each solver


def momentum_matrix(hessian: Tensor, lr: float, momentum: float) -> Tensor:
    """Of (v, m): m' = momentum m - lr H v, v' = v + m'."""
    one = torch.eye(len(hessian), dtype=hessian.dtype)
    return torch.cat(
        [torch.cat([one - lr * hessian, momentum * one], 1), torch.cat([-lr * hessian, momentum * one], 1)]
    )


def radius(matrix: Tensor) -> float:
    return float(torch.linalg.eigvals(matrix).abs().max())


def descent_matrix(solver, values, errors, beta: float, lr: float) -> Tensor:
    if isinstance(solver, torch2ebm.Momentum):
        return momentum_matrix(values.hessian(beta), lr, solver.momentum)
    matrix = errors.hessian(beta) if isinstance(solver, torch2ebm.ErrorDescent) else values.hessian(beta)
    return torch.eye(len(matrix), dtype=matrix.dtype) - lr * matrix


@pytest.mark.parametrize("precisions", [{}, PRECISIONS], ids=["unit", "precisions"])
@pytest.mark.parametrize(
    "solver",
    [
        torch2ebm.GradientDescent(),
        torch2ebm.ErrorDescent(),
        torch2ebm.Momentum(momentum=0.0),
        torch2ebm.Momentum(momentum=0.9),
    ],
    ids=repr,
)
def test_the_largest_step_is_where_stability_ends(solver, precisions) -> None:
    problem = EnergyProblem(skip_dag(), half_squared_error, precisions=precisions)
    values, errors = values_of_dag(problem), of_dag(problem)
    found = stability(SkipDag(), NAMES, X, half_squared_error, solver.coordinates, 0.5, precisions)
    step = solver.largest_step(found)
    assert radius(descent_matrix(solver, values, errors, 0.5, 0.999 * step)) < 1
    assert radius(descent_matrix(solver, values, errors, 0.5, 1.001 * step)) > 1
    assert solver.good_step(found) < step


def levelled(depth: int, gain: float):
    layers = [part for _ in range(depth) for part in (nn.Linear(6, 6), nn.Tanh())]
    net, x = seeded(lambda: nn.Sequential(*layers, nn.Linear(6, 3))), normal(3, 6)
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(gain)
    precisions = torch.linspace(0.5, 2.0, 2 * depth).tolist()
    return of_chain(list(net), x, cross_entropy, precisions), values_of_chain(list(net), x, cross_entropy, precisions)


@pytest.mark.parametrize("gain", [0.5, 1.5, 2.5])
@pytest.mark.parametrize("depth", [1, 3, 6])
def test_local_error_descent_is_stable_up_to_its_largest_step(depth: int, gain: float) -> None:
    errors, values = levelled(depth, gain)
    solver, sigma_squared = torch2ebm.LocalErrorDescent(), errors.sigma_squared()
    for r in (0.1, 0.5, 0.99):
        found = torch2ebm.inference.steepness.Stability(steepest=float(values.precisions.max()), r=r)
        update = values.local_update(r / sigma_squared)
        one = torch.eye(len(update), dtype=update.dtype)
        for step in (solver.largest_step(found), solver.good_step(found), 0.1 * solver.good_step(found)):
            assert radius(one - step * update) < 1 + 1e-6  # defective eigenvalues of 0 blur in double precision


def test_beyond_r_of_one_local_error_descent_can_be_unstable_for_every_step() -> None:
    errors, values = levelled(12, 2.5)
    update = values.local_update(20 / errors.sigma_squared())
    one = torch.eye(len(update), dtype=update.dtype)
    assert all(radius(one - step * update) > 1 for step in (0.5, 0.1, 0.01, 0.001))
    unsafe = torch2ebm.inference.steepness.Stability(steepest=2.0, r=20.0)
    assert math.isnan(torch2ebm.LocalErrorDescent().largest_step(unsafe))
