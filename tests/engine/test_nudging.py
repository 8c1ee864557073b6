"""The loss in the energy: the infinitesimal limit (Millidge et al. 2022), its orders, what a large nudge destroys."""

import math

import pytest
import torch
from helpers import attached, local_gradients, relative_error
from oracles.energy import EnergyProblem, by_optimizer
from oracles.graphs import SkipDag, backprop, cross_entropy, half_squared_error, skip_dag
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ConfigurationError, DivergenceError, DivergenceWarning, LostMinimumError, NoStateError
from torch2ebm.graph.energy_graph import Node
from torch2ebm.inference.divergence import check_phases

NAMES = [vertex.name for vertex in skip_dag().vertices]
CONVERGED = torch2ebm.AndersonErrorDescent(200, 0.3, tol=1e-14)


def summed(loss):
    def of(output: Tensor) -> Tensor:
        return loss(output)

    of.reduction = "sum"
    return torch2ebm.EnergyLoss(of)


def estimate(
    nudging, loss=cross_entropy, solver=CONVERGED, **settings
) -> tuple[dict[str, Tensor], torch2ebm.EnergyModel]:
    algorithm = torch2ebm.PredictiveCoding(solver=solver, nudging=nudging, loss_reduction="sum", **settings)
    model = attached(SkipDag(), algorithm, nodes=NAMES)
    return local_gradients(model, (skip_dag().inputs["x"],), summed(loss)), model


def distance(nudging, loss=cross_entropy) -> float:
    """|g - backprop| over |backprop|, all parameters together; the relaxation must have converged."""
    ours, model = estimate(nudging, loss)
    assert all(phase.converged and phase.residual <= 1e-14 for phase in model.state.phases)
    reference = backprop(SkipDag(), (skip_dag().inputs["x"],), loss)
    difference = math.fsum(float((ours[name] - g).square().sum()) for name, g in reference.items())
    return math.sqrt(difference / math.fsum(float(g.square().sum()) for g in reference.values()))


# The orders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [half_squared_error, cross_entropy])
@pytest.mark.parametrize(("nudging", "order"), [(torch2ebm.OneSided, 1), (torch2ebm.Symmetric, 2)])
def test_the_gradient_error_is_of_the_nudging_s_order(nudging, order: int, loss) -> None:
    """Millidge et al. 2022: slopes 1 and 2 on a tanh residual graph with a shared weight."""
    betas = [1e-3, 3e-3, 1e-2]
    errors = [distance(nudging(beta), loss) for beta in betas]
    for (beta, error), (larger, error_there) in zip(
        zip(betas, errors, strict=True), list(zip(betas, errors, strict=True))[1:], strict=False
    ):
        assert math.log(error_there / error) / math.log(larger / beta) == pytest.approx(order, abs=0.1)


def test_one_side_alone_does_not_have_the_second_order() -> None:
    """The negative twin: half of a symmetric pair is of first order."""
    assert distance(torch2ebm.OneSided(1e-2)) > 5 * distance(torch2ebm.Symmetric(1e-2))


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_a_nudge_is_the_factor_of_the_loss_in_the_energy(beta: float) -> None:
    problem = EnergyProblem(skip_dag(), cross_entropy, beta=beta)
    values = by_optimizer(problem, 7, lambda v: torch.optim.SGD(v, lr=0.1))
    ours, model = estimate(torch2ebm.OneSided(beta), solver=torch2ebm.GradientDescent(7, 0.1))
    assert relative_error(ours, problem.parameter_gradients(values)) <= 1e-10
    assert model.state.relaxation.beta == beta
    assert model.state.relaxation.energy[-1] == pytest.approx(float(problem.of_values(values)), rel=1e-12)


def test_symmetric_nudging_is_the_mean_of_both_signs() -> None:
    beta, expected = 0.05, None
    for signed in (beta, -beta):
        problem = EnergyProblem(skip_dag(), half_squared_error, beta=signed)
        values = by_optimizer(problem, 7, lambda v: torch.optim.SGD(v, lr=0.1))
        part = problem.parameter_gradients(values)
        expected = part if expected is None else {name: (expected[name] + g) / 2 for name, g in part.items()}
    ours, model = estimate(torch2ebm.Symmetric(beta), half_squared_error, torch2ebm.GradientDescent(7, 0.1))
    assert relative_error(ours, expected) <= 1e-10
    assert [phase.beta for phase in model.state.phases] == [beta, -beta]
    assert model.state.relaxation == model.state.phases[0]


def test_a_mean_loss_and_a_summed_one_have_the_same_nudge() -> None:
    x = skip_dag().inputs["x"]
    algorithm = torch2ebm.PredictiveCoding(5, 0.1, nudging=torch2ebm.OneSided(0.2))
    ours, _ = estimate(torch2ebm.OneSided(0.2), solver=torch2ebm.GradientDescent(5, 0.1))

    def mean(output: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, torch.arange(len(output)) % output.shape[1])

    of_mean = local_gradients(attached(SkipDag(), algorithm, NAMES), (x,), mean)
    assert relative_error({name: g * len(x) for name, g in of_mean.items()}, ours) <= 1e-12


# The free phase -------------------------------------------------------------------------------------------------------


def test_the_free_phase_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the feed-forward pass, whose gradient of the energy is zero: one phase a beta, and no more evaluations."""
    calls: list[str] = []
    evaluate = Node.evaluate
    monkeypatch.setattr(Node, "evaluate", lambda node, *args: calls.append(node.name) or evaluate(node, *args))
    for nudging, phases in ((torch2ebm.OneSided(0.1), 1), (torch2ebm.Symmetric(0.1), 2)):
        algorithm = torch2ebm.PredictiveCoding(6, 0.1, nudging=nudging, loss_reduction="sum")
        model = attached(SkipDag(), algorithm, NAMES)
        for _ in range(2):  # the capture, and the check of the first run that is cut
            local_gradients(model, (skip_dag().inputs["x"],), summed(cross_entropy))
        calls.clear()
        local_gradients(model, (skip_dag().inputs["x"],), summed(cross_entropy))
        # none of the forward, which is the module's own run
        assert calls.count("output") == phases * (6 + 1)


# A negative nudge that loses the minimum ------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [torch2ebm.GradientDescent(300, 0.1), torch2ebm.ErrorDescent(300, 0.1)])
def test_a_negative_nudge_that_loses_the_minimum_is_named(solver: torch2ebm.Solver) -> None:
    with pytest.raises(LostMinimumError, match=r"negative nudge -0\.9.*smaller beta") as caught:
        estimate(torch2ebm.Symmetric(0.9), half_squared_error, solver)
    assert isinstance(caught.value, DivergenceError)
    assert any(name in caught.value.where for name in NAMES)


@pytest.mark.parametrize("beta", [1e-3, 1e-2, 0.1])
def test_a_negative_nudge_that_keeps_the_minimum_is_taken(beta: float) -> None:
    _, model = estimate(torch2ebm.Symmetric(beta), half_squared_error)
    assert all(phase.converged for phase in model.state.phases)


def test_near_the_minimum_of_the_loss_a_symmetric_nudge_is_taken() -> None:
    """Gradients that cancel over the batch are no sign of a lost minimum."""
    x = skip_dag().inputs["x"]
    target = SkipDag()(x).detach() + 1e-3 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    _, model = estimate(torch2ebm.Symmetric(0.1), lambda y: (0.5 * (y - target).square()).sum())
    assert len(model.state.phases) == 2


def quadratic_minimum(curvature: float) -> torch2ebm.EnergyModel:
    """One value v with F = (v - mu)^2 / 2 + beta (w v - t)^2 in equilibrium, beta = 1/10, 2 w^2 = ``curvature``."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)).double()
    with torch.no_grad():
        net[1].weight.fill_((curvature / 2) ** 0.5)
    settled = torch2ebm.GradientDescent(2000, 0.3, tol=1e-13)
    return attached(net, torch2ebm.PredictiveCoding(solver=settled, nudging=torch2ebm.Symmetric(0.1)))


def backward_of_squared_error(model: torch2ebm.EnergyModel) -> None:
    x, target = torch.ones(1, 1).double(), torch.full((1, 1), 3.0).double()
    nn.functional.mse_loss(model(x), target).backward()


def test_the_bound_of_a_lost_minimum_is_where_beta_times_the_curvature_is_one_half() -> None:
    """e(beta) = -beta g / (1 + beta h): the squares at -beta and beta are as ((1 + beta h) / (1 - beta h))^2 = 9."""
    kept = quadratic_minimum(4.9)
    backward_of_squared_error(kept)
    positive, negative = (sum(c[-1] for c in phase.node_energy.values()) for phase in kept.state.phases)
    assert negative / positive == pytest.approx((1.49 / 0.51) ** 2, rel=1e-6)
    with pytest.raises(LostMinimumError, match="times the prediction error"):
        backward_of_squared_error(quadratic_minimum(5.1))


@pytest.mark.parametrize(("energy", "is_lost"), [(2.2, False), (2.3, True)])
def test_phases_of_unequal_nudges_are_compared_at_one_nudge(energy: float, is_lost: bool) -> None:
    """Errors go like beta, energies like its square: half of the nudge mirrors a quarter of the energy, times 9."""

    def phase(beta: float, of_errors: float) -> torch2ebm.Relaxation:
        return torch2ebm.Relaxation(steps=1, beta=beta, node_energy={"node": (0.0, of_errors)})

    phases = [phase(0.2, 1.0), phase(-0.1, energy)]
    if is_lost:
        with pytest.raises(LostMinimumError, match="node"):
            check_phases(phases)
    else:
        check_phases(phases)


def test_the_gradient_of_an_input_is_the_mean_of_the_phases() -> None:
    """It tends to autograd's as beta goes to 0, at second order; the sum of the phases would be twice that."""
    distances = []
    for beta in (1e-2, 1e-3):
        model = attached(SkipDag(), torch2ebm.PredictiveCoding(solver=CONVERGED, nudging=torch2ebm.Symmetric(beta)))
        x = skip_dag().inputs["x"].clone().requires_grad_()
        reference = x.detach().clone().requires_grad_()
        nn.functional.mse_loss(model(x), torch.zeros(4, 3).double()).backward()
        nn.functional.mse_loss(SkipDag()(reference), torch.zeros(4, 3).double()).backward()
        distances.append(float((x.grad - reference.grad).norm() / reference.grad.norm()))
    assert distances[1] < 1e-5
    assert math.log10(distances[0] / distances[1]) == pytest.approx(2, abs=0.1)


# What a run-away relaxation does --------------------------------------------------------------------------------------


def running_away(choice: str) -> tuple[torch2ebm.EnergyModel, torch.optim.Optimizer, dict[str, Tensor]]:
    module = SkipDag()
    model = torch2ebm.convert(module, nodes=NAMES)
    algorithm = torch2ebm.PredictiveCoding(80, 3.0, loss_reduction="sum", on_divergence=choice)
    inner = torch.optim.Adam(module.parameters(), lr=0.1)
    optimizer = torch2ebm.EnergyOptimizer(inner, model, algorithm)
    return model, optimizer, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("choice", ["warn", "skip"])
def test_a_skipped_batch_moves_nothing(choice: str) -> None:
    model, optimizer, before = running_away(choice)
    loss = summed(cross_entropy)(model(skip_dag().inputs["x"]))
    if choice == "warn":
        with pytest.warns(DivergenceWarning, match="no gradient"):
            loss.backward()
    else:
        loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])
    relaxation = model.state.relaxation
    assert relaxation.converged is False and relaxation.energy[-1] > 100 * relaxation.energy[0]
    with pytest.raises(NoStateError, match="ran away"):
        model.state.value["first"]


def test_a_skipped_batch_leaves_the_accumulated_gradient() -> None:
    model, _, _ = running_away("skip")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    summed(cross_entropy)(model(skip_dag().inputs["x"])).backward()
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_by_default_divergence_raises_and_nothing_is_lost() -> None:
    model, _, before = running_away("raise")
    loss = summed(cross_entropy)(model(skip_dag().inputs["x"]))
    with pytest.raises(DivergenceError):
        loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0, -0.1, math.nan, math.inf, "1", True, None])
@pytest.mark.parametrize("nudging", [torch2ebm.OneSided, torch2ebm.Symmetric])
def test_an_illegal_nudge_is_refused(nudging, beta) -> None:
    with pytest.raises(ConfigurationError, match="beta"):
        nudging(beta)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nudging": 0.1}, "nudging object"),
        ({"solver": "adam"}, "solver object"),
        ({"precisions": {"first": 0.0}}, "first.*above 0"),
        ({"precisions": {"first": -1.0}}, "first.*above 0"),
        ({"precisions": {"first": math.nan}}, "first.*above 0"),
        ({"precisions": {"first": torch.tensor([1.0, math.inf])}}, "first.*above 0"),
        ({"precisions": {"first": "high"}}, "first.*above 0"),
        ({"energies": {"first": 2.0}}, "first.*energy object"),
        ({"energies": {"first": torch2ebm.Gaussian(2.0)}, "precisions": {"first": 2.0}}, "first in both"),
        ({"on_divergence": "ignore"}, "on_divergence.*raise"),
    ],
)
def test_illegal_settings_are_refused(settings, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        torch2ebm.PredictiveCoding(**settings)


@pytest.mark.parametrize(("name", "message"), [("nowhere", "no node has"), ("output", "energy is the loss")])
def test_an_energy_for_no_node_or_for_an_output_is_refused(name: str, message: str) -> None:
    model = attached(SkipDag(), torch2ebm.PredictiveCoding(precisions={name: 2.0}), nodes=NAMES)
    with pytest.raises(ConfigurationError, match=message):
        model(skip_dag().inputs["x"])
