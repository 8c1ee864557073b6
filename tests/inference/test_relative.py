"""Nudges in units of the curvature: what beta becomes of r, when it is measured, and what the gradient is then."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import attached, local_gradients, relative_error
from oracles.dense_hessian import of_chain, of_dag
from oracles.energy import EnergyProblem
from oracles.graphs import SkipDag, backprop, cross_entropy, half_squared_error, skip_dag
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ConfigurationError, CurvatureWarning, NonFiniteError, NoSignalWarning
from torch2ebm.extend import Nudging

NAMES = [vertex.name for vertex in skip_dag().vertices]
X = skip_dag().inputs["x"]
PRECISIONS = {"first": 2.5, "gated": 0.4}


def summed(loss, factor: float = 1.0):
    def of(output: Tensor) -> Tensor:
        return factor * loss(output)

    of.reduction = "sum"
    return torch2ebm.EnergyLoss(of)


def coding(nudging, **settings: Any) -> torch2ebm.PredictiveCoding:
    solver = settings.pop("solver", torch2ebm.AndersonErrorDescent(200, 0.3, tol=1e-13))
    return torch2ebm.PredictiveCoding(solver=solver, nudging=nudging, loss_reduction="sum", **settings)


def estimate(nudging, loss=cross_entropy, factor: float = 1.0, **settings: Any):
    model = attached(SkipDag(), coding(nudging, **settings), nodes=NAMES)
    return local_gradients(model, (X,), summed(loss, factor)), model.state


def curvature(loss, **settings: Any) -> float:
    return of_dag(EnergyProblem(skip_dag(), loss, **settings)).sigma_squared()


@pytest.mark.parametrize("loss", [half_squared_error, cross_entropy])
@pytest.mark.parametrize("precisions", [{}, PRECISIONS], ids=["unit", "precisions"])
def test_beta_is_r_over_the_curvature(loss, precisions) -> None:
    ours, state = estimate(torch2ebm.Relative(0.3), loss, precisions=precisions)
    expected = curvature(loss, precisions=precisions)
    assert state.relaxation.sigma_squared == pytest.approx(expected, rel=1e-6)
    assert state.relaxation.beta == pytest.approx(0.3 / expected, rel=1e-6)
    assert state.relaxation.r == pytest.approx(0.3, rel=1e-12)
    fixed, _ = estimate(torch2ebm.OneSided(state.relaxation.beta), loss, precisions=precisions)
    assert relative_error(ours, fixed) == 0.0  # the same inference, to the last bit


@pytest.mark.parametrize("outputs", [1, 2, 5])
@pytest.mark.parametrize("depth", [3, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beta_is_right_where_the_outputs_have_fewer_directions_than_products(outputs, depth, dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Linear(6, 6) for _ in range(depth)], nn.Linear(6, outputs)).double()
    for layer in net[:-1]:
        nn.init.orthogonal_(layer.weight)
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = of_chain(list(net), x, half_squared_error).sigma_squared()
    model = attached(net.to(dtype), coding(torch2ebm.Relative(0.1), solver=torch2ebm.ErrorDescent(1)), nodes="layer")
    local_gradients(model, (x.to(dtype),), summed(half_squared_error))
    assert model.state.relaxation.sigma_squared == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("sides", "order"), [(torch2ebm.OneSided(1.0), 1), (torch2ebm.Symmetric(1.0), 2)])
def test_the_gradient_error_is_of_the_order_of_its_sides(sides, order: int) -> None:
    reference = backprop(SkipDag(), (X,), cross_entropy)
    near, far = (relative_error(estimate(torch2ebm.Relative(r, sides))[0], reference) for r in (1e-3, 1e-2))
    assert math.log10(far / near) == pytest.approx(order, abs=0.1)


def test_symmetric_sides_are_two_phases() -> None:
    _, state = estimate(torch2ebm.Relative(0.1, torch2ebm.Symmetric(2.0)))
    assert [round(phase.r, 9) for phase in state.phases] == [0.2, -0.2]
    assert torch2ebm.Relative(0.1, torch2ebm.Symmetric(2.0)).betas == (0.2, -0.2)


def test_the_scale_of_the_loss_is_that_of_the_gradient_and_of_nothing_else() -> None:
    plain, state = estimate(torch2ebm.Relative(1.0))
    scaled, other = estimate(torch2ebm.Relative(1.0), factor=1000.0)
    assert relative_error(scaled, {name: 1000 * gradient for name, gradient in plain.items()}) < 1e-6
    assert relative_error(dict(other.error), dict(state.error)) > 0  # the output's error is the loss's gradient
    for name in NAMES[:-1]:
        torch.testing.assert_close(other.error[name], state.error[name], rtol=1e-6, atol=1e-9)
    fixed = [estimate(torch2ebm.OneSided(1.0), factor=factor)[0] for factor in (1.0, 1000.0)]
    assert relative_error(fixed[1], {name: 1000 * gradient for name, gradient in fixed[0].items()}) > 0.1  # the twin


def test_curvature_is_measured_on_every_so_many_calls_and_reported() -> None:
    found = []
    for every in (1, 3):
        model = attached(
            SkipDag(), coding(torch2ebm.Relative(0.1, every=every), solver=torch2ebm.ErrorDescent(2)), NAMES
        )
        costs, scales = [], []
        for factor in (1.0, 2.0, 3.0, 4.0):
            local_gradients(model, (X,), summed(cross_entropy, factor))
            costs.append(model.state.relaxation.curvature_cost)
            scales.append(model.state.relaxation.sigma_squared / curvature(cross_entropy))
        found.append((costs, [round(scale, 5) for scale in scales]))
    (every_cost, every_scale), (third_cost, third_scale) = found
    assert every_scale == [1.0, 2.0, 3.0, 4.0] and all(cost > 0 for cost in every_cost)
    assert third_scale == [1.0, 1.0, 1.0, 4.0]
    assert [cost > 0 for cost in third_cost] == [True, False, False, True]
    assert max(every_cost[1:]) <= 3.0  # the first also sees whether samples are independent
    assert every_cost[1] / torch2ebm.Relative(0.1).every < 0.3


def test_a_nudge_of_ones_own_is_taken_in_units_of_the_loss() -> None:
    class Twice(Nudging):
        betas = (0.2,)

    _, state = estimate(torch2ebm.Relative(0.5, Twice()))
    assert state.relaxation.r == pytest.approx(0.1, rel=1e-12)


# ---- losses that are not convex


def test_a_loss_that_is_not_convex_is_named_and_keeps_its_minimum() -> None:
    def saddle(output: Tensor) -> Tensor:
        return (output[:, 0].square() - 3 * output[:, 1].square()).sum()

    with pytest.warns(CurvatureWarning, match="not convex"):
        _, state = estimate(torch2ebm.Relative(0.5), saddle)
    lowest = float(torch.linalg.eigvalsh(of_dag(EnergyProblem(skip_dag(), saddle)).gauss_newton())[0])
    assert state.relaxation.sigma_squared == pytest.approx(-lowest, rel=1e-6)
    assert state.relaxation.converged


def test_a_loss_without_curvature_makes_errors_of_length_r() -> None:
    def linear(output: Tensor) -> Tensor:
        return (output * torch.tensor([1.0, -2.0, 0.5], dtype=output.dtype)).sum()

    with pytest.warns(CurvatureWarning, match="no curvature"):
        _, state = estimate(torch2ebm.Relative(1e-3), linear)
    lengths = sum(state.error[name].square().sum(1) for name in NAMES[:-1]).sqrt()
    assert float(lengths.max()) == pytest.approx(1e-3, rel=1e-2)


def test_a_loss_without_curvature_is_told_once() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model = attached(net, torch2ebm.PredictiveCoding(nudging=torch2ebm.Relative(0.1, every=1)))

    def backward() -> None:
        model(torch.ones(5, 3)).sum(1).mean().backward()

    with pytest.warns(CurvatureWarning, match="no curvature"):
        backward()
    backward()  # which would be an error if it warned
    backward()


def test_a_loss_of_nothing_gives_gradients_of_zero() -> None:
    with pytest.warns(NoSignalWarning, match="every error is exactly zero"):
        ours, _ = estimate(torch2ebm.Relative(0.1), lambda output: 0.0 * output.sum())
    assert not any(bool(gradient.any()) for gradient in ours.values())


def test_a_curvature_that_is_not_finite_is_named_and_nothing_changes() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[1].weight.mul_(1e200)
    model = attached(net, torch2ebm.PredictiveCoding(nudging=torch2ebm.Relative(0.1), solver=torch2ebm.ErrorDescent(2)))
    loss = torch2ebm.EnergyLoss(lambda output: (1e-250 * output).square().mean() * 1e250)
    with pytest.raises(NonFiniteError, match="curvature"):
        loss(model(torch.ones(2, 3, dtype=torch.float64))).backward()
    assert all(p.grad is None for p in net.parameters())


# ---- what is refused


@pytest.mark.parametrize("r", [0, -0.1, math.nan, math.inf, True, "0.1", None])
def test_an_illegal_r_is_named(r) -> None:
    with pytest.raises(ConfigurationError, match=r"Relative\(r="):
        torch2ebm.Relative(r)


@pytest.mark.parametrize(
    "settings",
    [
        {"every": 0},
        {"every": 1.5},
        {"sides": 1.0},
        {"sides": torch2ebm.Holomorphic(0.1)},
        {"sides": torch2ebm.Relative(0.1)},
    ],
    ids=str,
)
def test_other_illegal_settings_are_named(settings) -> None:
    with pytest.raises(ConfigurationError, match=rf"Relative\({next(iter(settings))}="):
        torch2ebm.Relative(0.1, **settings)


def test_an_equilibrium_algorithm_refuses_it() -> None:
    with pytest.raises(ConfigurationError, match="another curvature"):
        torch2ebm.EquilibriumPropagation(torch2ebm.Relative(0.1))


# ---- errors beside the values


def bounded(scale: float, bound: float | None) -> tuple[torch2ebm.Relaxation, float]:
    """The report, and the longest error of a sample over its values, for a net with small or large weights behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        net[4].weight.mul_(scale)
    coding = torch2ebm.PredictiveCoding(nudging=torch2ebm.Relative(0.1, largest_error=bound))
    model = attached(net, coding)
    F.cross_entropy(model(torch.ones(5, 6, dtype=torch.float64)), torch.tensor([0, 1, 2, 3, 0])).backward()
    by_node = (model.state.error, layers(net))
    errors, values = (sum(part[name].detach().square().sum(1) for name in ("0", "2")) for part in by_node)
    return model.state.relaxation, float((errors / values).max().sqrt())


def layers(net: nn.Sequential) -> dict[str, torch.Tensor]:
    first = net[1](net[0](torch.ones(5, 6, dtype=torch.float64)))
    return {"0": first, "2": net[3](net[2](first))}


def test_small_curvature_makes_errors_as_long_as_values_and_the_bound_keeps_them_short() -> None:
    free, long = bounded(0.1, None)
    assert free.r == pytest.approx(0.1) and long > 0.3
    held, short = bounded(0.1, 0.1)
    assert short == pytest.approx(0.1, rel=0.1)  # the error of a nudge is in proportion to it, but for what it moves
    assert held.sigma_squared == pytest.approx(free.sigma_squared) and held.r < 0.04
    assert held.curvature_cost > free.curvature_cost > 0


def test_a_bound_that_errors_are_below_changes_nothing() -> None:
    assert bounded(0.1, 10.0)[0].beta == bounded(0.1, None)[0].beta


def test_the_default_has_the_bound() -> None:
    assert torch2ebm.PredictiveCoding().nudging == torch2ebm.Relative(0.1, largest_error=0.1)


@pytest.mark.parametrize("bound", [0, -1.0, float("nan"), float("inf"), True, "0.1"])
def test_an_illegal_bound_is_named(bound) -> None:
    with pytest.raises(ConfigurationError, match=r"Relative\(largest_error=...\)"):
        torch2ebm.Relative(0.1, largest_error=bound)


def test_a_head_of_zeros_is_no_loss_without_curvature_and_is_measured_again() -> None:
    """Nothing reaches the hidden layer at first, as in backprop; pytest makes an error of a warning."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    nn.init.zeros_(net[2].weight)
    model, optimizer = torch2ebm.convert(net), torch.optim.SGD(net.parameters(), lr=0.5)
    wrapped = torch2ebm.EnergyOptimizer(optimizer, model, torch2ebm.PredictiveCoding())
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    classes = torch.tensor([0, 1, 2, 3, 0])
    found = []
    for _ in range(2):
        wrapped.zero_grad()
        F.cross_entropy(model(x), classes).backward()
        found.append((model.state.relaxation, net[2].weight.grad.clone(), net[0].weight.grad.clone()))
        wrapped.step()
    (first, head, hidden), (second, _, later) = found
    assert first.sigma_squared == 0.0 and head.any() and not hidden.any()
    assert second.sigma_squared > 0 and second.curvature_cost > 0 and later.any()
