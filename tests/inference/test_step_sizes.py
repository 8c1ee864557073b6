"""Step sizes that are measured, and fixed ones that raise the energy, against matrices written out."""

import dataclasses
import math
import pickle
import warnings

import pytest
import torch
from curved import SMALL_CHAINS
from helpers import attached, local_gradients
from oracles.dense_hessian import of_chain, of_dag, values_of_chain, values_of_dag
from oracles.energy import EnergyProblem
from oracles.graphs import SkipDag, cross_entropy, half_squared_error, skip_dag
from torch import Tensor, nn

import torch2ebm
from torch2ebm.algorithms.given import Given
from torch2ebm.errors import ConfigurationError, NonFiniteError, NotSettledWarning, StepSizeWarning
from torch2ebm.inference.steepness import Stability, measured_stability
from torch2ebm.loss.output_loss import NudgedLoss
from torch2ebm.potentials.node_energies import node_energies

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


CHAINS = {
    **SMALL_CHAINS,
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
    net, x = tanh_net(16, 20).float(), normal(32, 16).float()
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
    net, x = tanh_net(6, depth), normal(3, 6)
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
        found = Stability(steepest=float(values.precisions.max()), r=r)
        update = values.local_update(r / sigma_squared)
        one = torch.eye(len(update), dtype=update.dtype)
        for step in (solver.largest_step(found), solver.good_step(found), 0.1 * solver.good_step(found)):
            assert radius(one - step * update) < 1 + 1e-6  # defective eigenvalues of 0 blur in double precision


def test_beyond_r_of_one_local_error_descent_can_be_unstable_for_every_step() -> None:
    layers = [nn.Linear(3, 3, bias=False).double() for _ in range(8)]
    for seed, layer in enumerate(layers):
        layer.weight.data = 1.5 * torch.linalg.qr(normal(3, 3, seed=seed))[0]
    layers.append(seeded(lambda: nn.Linear(3, 2)))
    values, errors = (make(layers, normal(1, 3), half_squared_error) for make in (values_of_chain, of_chain))
    one = torch.eye(len(values.start), dtype=torch.float64)
    for r, stable in ((0.9, True), (20.0, False)):
        update = values.local_update(r / errors.sigma_squared())
        assert all((radius(one - step * update) < 1) == stable for step in (1.0, 0.5, 0.1, 0.01))
    assert math.isnan(torch2ebm.LocalErrorDescent().largest_step(Stability(steepest=1.0, r=20.0)))


# ---- what a backward does with it


def tanh_net(width: int = 16, depth: int = 3) -> nn.Sequential:
    def make() -> nn.Sequential:
        layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(width, 3))

    return seeded(make)


def told(run) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if issubclass(each.category, StepSizeWarning)]


VALUE = (torch2ebm.GradientDescent, torch2ebm.Momentum)
SOLVERS = [torch2ebm.GradientDescent, torch2ebm.Momentum, torch2ebm.ErrorDescent]
LARGEST = {"GradientDescent": 2.0, "Momentum": 3.8, "ErrorDescent": 2.0}  # over the largest eigenvalue


def steepest_of(kind, net: nn.Module, x: Tensor) -> float:
    problem = values_of_chain if kind in VALUE else of_chain
    layers = [nn.Sequential(*net[i : i + 2]) for i in range(0, len(net), 2)]  # a layer with its activation is a node
    return largest(problem(layers, x, half_squared_error).hessian(1.0))


@pytest.mark.parametrize("kind", SOLVERS)
def test_an_automatic_step_is_reported_with_the_largest_one_and_the_cost(kind) -> None:
    net, x = tanh_net(), normal(5, 16)
    steepest = steepest_of(kind, net, x)
    model = attached(net, torch2ebm.PredictiveCoding(solver=kind(20, "auto")))
    costs = []
    for _ in range(11):
        by_mean(half_squared_error)(model(x)).backward()
        relaxation = model.state.relaxation
        costs.append(relaxation.lr_cost)
        assert relaxation.largest_lr == pytest.approx(LARGEST[kind.__name__] * relaxation.lr, rel=1e-12)
        assert 1 / steepest <= relaxation.lr * (1 + 1e-6) < 1.3 / steepest  # Lanczos comes from below
        assert relaxation.energy[-1] < relaxation.energy[0]
    assert costs[0] > 0 and costs[1:10] == [0.0] * 9 and 0 < costs[10] <= 3


def test_a_fixed_step_is_reported_and_measures_nothing() -> None:
    net, x = tanh_net(), normal(5, 16)
    model = attached(net, torch2ebm.PredictiveCoding(steps=3, lr=0.1))
    by_mean(half_squared_error)(model(x)).backward()
    relaxation = model.state.relaxation
    assert (relaxation.lr, relaxation.largest_lr, relaxation.lr_cost) == (0.1, None, 0.0)


def test_a_step_follows_the_nudge_and_the_precisions() -> None:
    net, x = tanh_net(), normal(5, 16)
    found = []
    for settings in ({}, {"precisions": {"0": 8.0}}, {"nudging": torch2ebm.OneSided(50.0)}):
        model = attached(net, torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent(3, "auto"), **settings))
        by_mean(half_squared_error)(model(x)).backward()
        found.append(model.state.relaxation.lr)
        net = tanh_net()
    assert found[1] <= 1 / 8 and found[2] < found[0] / 3


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_step_that_raises_the_energy_is_told_once_and_the_remedy_helps(kind) -> None:
    net, x = tanh_net(), normal(5, 16)
    limit = LARGEST[kind.__name__] / steepest_of(kind, net, x)

    def backward(solver) -> None:
        model = attached(tanh_net(), torch2ebm.PredictiveCoding(solver=solver))

        def run() -> None:
            for _ in range(3):
                by_mean(half_squared_error)(model(x)).backward()

        said = told(run)
        return said, model.state.relaxation.energy

    said, energy = backward(kind(12, 1.15 * limit))
    assert len(said) == 1 and kind.__name__ in said[0] and 'lr="auto"' in said[0]
    named = float(said[0].split("does not raise it is ")[1].split(";")[0])
    assert named == pytest.approx(limit, rel=0.02)  # three digits of a measurement to a hundredth
    assert energy[-1] > min(energy)
    for stable in (kind(20, "auto"), kind(20, 0.2 * limit)):
        said, energy = backward(stable)
        assert said == [] and energy[-1] < energy[0]


def test_nothing_is_measured_where_the_energy_falls(monkeypatch) -> None:
    def measured(*_):
        raise AssertionError

    monkeypatch.setattr("torch2ebm.inference.step_size.measured_stability", measured)
    model = attached(tanh_net(), torch2ebm.PredictiveCoding(steps=20, lr=0.05))
    by_mean(half_squared_error)(model(normal(5, 16))).backward()


def test_local_errors_say_where_no_step_is_known_to_be_stable() -> None:
    x = normal(5, 16)

    def backward(beta: float) -> list[str]:
        coding = torch2ebm.PredictiveCoding(
            solver=torch2ebm.LocalErrorDescent(20, "auto"), nudging=torch2ebm.OneSided(beta), on_divergence="skip"
        )
        model = attached(tanh_net(), coding)
        return told(lambda: [by_mean(half_squared_error)(model(x)).backward() for _ in range(2)])

    sigma_squared = steepest_of(torch2ebm.ErrorDescent, tanh_net(), x) - 1
    assert backward(0.5 / sigma_squared) == []
    (said,) = backward(5 / sigma_squared)
    assert "LocalErrorDescent" in said and "ErrorDescent" in said


def test_a_step_becomes_shorter_where_the_curvature_grows_on_the_way() -> None:
    """The loss is a parabola around the start and a quartic outside, which steps of 1 / lambda overshoot."""
    net, x = tanh_net(depth=1), normal(5, 16)
    start = net(x).detach()
    loss = torch2ebm.EnergyLoss(lambda o: ((o - 1).square().sum(1) + 3 * (o - start).pow(4).sum(1)).mean())
    model = attached(net, torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent(20, "auto")))
    found = []
    for _ in range(30):
        loss(model(x)).backward()
        found.append(model.state.relaxation)
    rose = [each.energy[-1] > min(each.energy) + 1e-3 for each in found]
    assert rose[0] and sum(rose) <= 3
    assert found[1].lr == pytest.approx(found[0].lr / 2, rel=0.1) and found[1].lr < found[2].lr < found[0].lr


# ---- steps


def equilibrium(net, x, beta: float) -> dict[str, Tensor]:
    coding = torch2ebm.PredictiveCoding(
        solver=torch2ebm.ErrorConjugateGradient(1e-13, 500), nudging=torch2ebm.OneSided(beta)
    )
    return local_gradients(attached(net, coding), (x,), by_mean(half_squared_error))


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [*SOLVERS, torch2ebm.LocalErrorDescent])
def test_as_many_steps_as_a_deep_chain_needs(kind, compile: bool) -> None:
    """Messages that become weaker from level to level: no level may be left behind although it weighs nothing."""
    x = normal(4, 6)

    def net() -> nn.Sequential:
        made = tanh_net(6, 20)
        with torch.no_grad():
            for layer in made[::2]:
                layer.weight.copy_(0.6 * torch.linalg.qr(layer.weight)[0] if layer.out_features == 6 else layer.weight)
        return made

    expected = equilibrium(net(), x, 0.2)
    coding = torch2ebm.PredictiveCoding(
        solver=kind("auto", "auto", tol=1e-4), nudging=torch2ebm.OneSided(0.2), compile=compile
    )
    model = attached(net(), coding)
    found = local_gradients(model, (x,), by_mean(half_squared_error))
    relaxation = model.state.relaxation
    assert relaxation.converged and relaxation.settled == 1.0 and relaxation.residual <= 1e-4
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) < 1e-3 * float(gradient.norm())


def test_an_error_that_many_levels_share_is_waited_for() -> None:
    """Each level's own gradient is a hundredth of its error long before the sum over 20 levels is."""
    x = normal(4, 6)

    def net() -> nn.Sequential:
        made = tanh_net(6, 20)
        with torch.no_grad():
            for layer in made[:-1:2]:
                layer.weight.copy_(0.7 * torch.linalg.qr(layer.weight)[0])
        return made

    expected = equilibrium(net(), x, 1.0)
    model = attached(net(), torch2ebm.PredictiveCoding(solver=torch2ebm.GradientDescent("auto", "auto")))
    found = local_gradients(model, (x,), by_mean(half_squared_error))
    assert model.state.relaxation.converged
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) < 1e-2 * float(gradient.norm())


def test_a_criterion_for_the_whole_sample_would_leave_the_first_levels_behind() -> None:
    """The negative twin: after 12 of 20 levels the gradient is small beside the error, and the first ones have none."""
    x = normal(4, 6)
    made = tanh_net(6, 20)
    with torch.no_grad():
        for layer in made[:-1:2]:
            layer.weight.copy_(0.3 * torch.linalg.qr(layer.weight)[0])
    model = attached(made, torch2ebm.PredictiveCoding(solver=torch2ebm.GradientDescent(12, "auto")))
    by_mean(half_squared_error)(model(x)).backward()
    state = model.state
    assert state.relaxation.residual < 0.01 * float(state.error["38"].norm())
    assert state.unreached


def test_a_ceiling_that_is_met_is_told_once(monkeypatch) -> None:
    monkeypatch.setattr("torch2ebm.inference.relaxation.CEILING", 5)
    model = attached(tanh_net(), torch2ebm.PredictiveCoding(steps="auto", lr=0.01))
    with pytest.warns(NotSettledWarning, match=r'GradientDescent\(steps="auto"\)'):
        by_mean(half_squared_error)(model(normal(5, 16))).backward()
    by_mean(half_squared_error)(model(normal(5, 16))).backward()  # which would be an error if it warned
    assert model.state.relaxation.converged is False and model.state.relaxation.steps == 5


def test_samples_on_kinks_end_it_too() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)))
    model = attached(net, torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent("auto", "auto")))
    by_mean(lambda o: 5 * half_squared_error(o - 1))(model(normal(64, 8))).backward()
    relaxation = model.state.relaxation
    assert relaxation.converged and relaxation.settled + relaxation.on_kinks == pytest.approx(1.0)
    assert 0 < relaxation.on_kinks < 1 and relaxation.steps < 300
    assert relaxation.energy[-1] == pytest.approx(min(relaxation.energy), rel=1e-3)


# ---- settings


@pytest.mark.parametrize("setting", ["steps", "lr"])
@pytest.mark.parametrize("kind", [*SOLVERS, torch2ebm.LocalErrorDescent, torch2ebm.PredictiveCoding])
def test_what_is_no_number_and_not_auto_is_refused_and_auto_is_named(kind, setting: str) -> None:
    for bad in ("Auto", "AUTO", "", -1, True if setting == "steps" else math.nan, None):
        with pytest.raises(ConfigurationError, match='or "auto"') as caught:
            kind(**{setting: bad})
        assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("solver", [torch2ebm.AdamDescent, torch2ebm.SequentialDescent, torch2ebm.AndersonErrorDescent])
def test_solvers_without_such_a_step_refuse_it(solver) -> None:
    with pytest.raises(ConfigurationError, match="lr"):
        solver(lr="auto")
    with pytest.raises(ConfigurationError, match="steps"):
        solver(steps="auto")


def test_settings_are_shown_kept_copied_and_compared() -> None:
    coding = torch2ebm.PredictiveCoding(steps="auto", lr="auto")
    assert coding.solver == torch2ebm.GradientDescent("auto", "auto") and (coding.steps, coding.lr) == ("auto", "auto")
    assert "GradientDescent(steps='auto', lr='auto', tol=0.0)" in repr(coding)
    again = pickle.loads(pickle.dumps(coding))
    assert again == coding and again.solver == coding.solver
    assert coding.with_steps(3).solver == torch2ebm.GradientDescent(3, "auto")
    assert dataclasses.replace(coding, lr=0.2).solver == torch2ebm.GradientDescent("auto", 0.2)
    assert torch2ebm.PredictiveCoding(lr="auto").solver == torch2ebm.GradientDescent(20, "auto")
    assert torch2ebm.PredictiveCoding(steps="auto", solver=torch2ebm.Momentum("auto")).steps == "auto"
    with pytest.raises(ConfigurationError, match="steps='auto' beside solver="):
        torch2ebm.PredictiveCoding(steps="auto", solver=torch2ebm.Momentum(3))
