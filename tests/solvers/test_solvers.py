"""How values relax: every solver against its own formula on F, written without the engine."""

import itertools

import pytest
import torch
from helpers import attached, local_gradients, relative_error
from oracles.energy import EnergyProblem, by_optimizer, gradient
from oracles.graphs import SkipDag, backprop, cross_entropy, half_squared_error, skip_dag
from solvers_list import ROWS
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import DivergenceError

NAMES = [vertex.name for vertex in skip_dag().vertices]
HIDDEN = skip_dag().hidden
LOSSES = [half_squared_error, cross_entropy]


def summed(loss):
    def of(output: Tensor) -> Tensor:
        return loss(output)

    of.reduction = "sum"
    return torch2ebm.EnergyLoss(of)


def relaxed(algorithm: torch2ebm.PredictiveCoding, loss) -> tuple[dict[str, Tensor], torch2ebm.EnergyModel]:
    model = attached(SkipDag(), algorithm, nodes=NAMES)
    return local_gradients(model, (skip_dag().inputs["x"],), summed(loss)), model


def predictive_coding(solver: torch2ebm.Solver, **settings) -> torch2ebm.PredictiveCoding:
    return torch2ebm.PredictiveCoding(solver=solver, loss_reduction="sum", **settings)


SOLVERS = [pytest.param(row.make, row.formula, id=row.name) for row in ROWS if row.formula is not None]
ENERGIES = {
    "unit": {},
    "precisions": {
        "precisions": {"first": 2.5, "gated": 0.4, "third": torch.linspace(0.5, 2.0, 6, dtype=torch.float64)}
    },
    "categorical": {"categorical": ("residual", "mixture")},
}


def settings_of(case: str) -> dict:
    settings = dict(ENERGIES[case])
    if "categorical" in settings:
        return {"energies": {name: torch2ebm.Categorical() for name in settings["categorical"]}}
    return settings


@pytest.mark.parametrize("case", ENERGIES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("steps", [1, 3, 12])
@pytest.mark.parametrize(("make", "by_formula"), SOLVERS)
def test_values_and_gradients_are_those_of_the_formula(make, by_formula, steps: int, loss, case: str) -> None:
    problem = EnergyProblem(skip_dag(), loss, **ENERGIES[case])
    values = by_formula(problem, steps)
    ours, model = relaxed(predictive_coding(make(steps), **settings_of(case)), loss)
    for name in HIDDEN:
        torch.testing.assert_close(model.state.value[name], values[name], rtol=1e-11, atol=1e-13)
    for name, expected in problem.parameter_gradients(values).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-13)
    energy = model.state.relaxation.energy
    assert len(energy) == steps + 1
    assert energy[0] == pytest.approx(float(problem.of_values(problem.feedforward())), rel=1e-12)
    assert energy[-1] == pytest.approx(float(problem.of_values(values)), rel=1e-11)


@pytest.mark.parametrize("case", ENERGIES)
def test_energy_of_each_sample_sums_to_the_node_s_energy(case: str) -> None:
    _, model = relaxed(predictive_coding(torch2ebm.GradientDescent(12, 0.1), **settings_of(case)), cross_entropy)
    for name in HIDDEN:
        of_samples = model.state.energy[name]
        assert of_samples.shape == (4,)
        assert float(of_samples.sum()) == pytest.approx(model.state.relaxation.node_energy[name][-1], rel=1e-11)


@pytest.mark.parametrize("make", [p.values[0] for p in SOLVERS], ids=[p.id for p in SOLVERS])
def test_each_solver_is_told_apart_from_gradient_descent(make) -> None:
    """The negative twin of the formulas: another solver's values are another result."""
    ours, _ = relaxed(predictive_coding(make(5)), cross_entropy)
    problem = EnergyProblem(skip_dag(), cross_entropy)
    other = by_optimizer(problem, 5, lambda v: torch.optim.SGD(v, lr=0.05))
    assert relative_error(ours, problem.parameter_gradients(other)) > 1e-2


def test_a_precision_left_out_would_be_noticed() -> None:
    problem = EnergyProblem(skip_dag(), cross_entropy, **ENERGIES["precisions"])
    ours, _ = relaxed(predictive_coding(torch2ebm.GradientDescent(12, 0.1)), cross_entropy)
    values = by_optimizer(problem, 12, lambda v: torch.optim.SGD(v, lr=0.1))
    assert relative_error(ours, problem.parameter_gradients(values)) > 1e-2


# Equilibria -----------------------------------------------------------------------------------------------------------

TIGHT = [row.tight for row in ROWS if row.tight is not None]


@pytest.mark.parametrize("case", ["unit", "precisions"])
@pytest.mark.parametrize("solver", TIGHT, ids=lambda s: type(s).__name__)
def test_all_solvers_reach_the_same_equilibrium(solver: torch2ebm.Solver, case: str) -> None:
    _, model = relaxed(predictive_coding(solver, **settings_of(case)), cross_entropy)
    relaxation = model.state.relaxation
    assert relaxation.converged and relaxation.residual <= 1e-13 and relaxation.steps < solver.steps
    values = {name: model.state.value[name] for name in HIDDEN}
    problem = EnergyProblem(skip_dag(), cross_entropy, **ENERGIES[case])
    assert max(float(slope.abs().max()) for slope in gradient(problem.of_values, values).values()) <= 2e-12
    _, other = relaxed(predictive_coding(TIGHT[-1], **settings_of(case)), cross_entropy)
    for name in HIDDEN:
        torch.testing.assert_close(values[name], other.state.value[name], rtol=0, atol=1e-8)


def test_a_local_error_update_diverges_where_descent_converges() -> None:
    """A linear chain: weights 3, 3, 1 after the first value, lambda 1."""
    net = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(4)]).double()
    for layer, weight in zip(net, (1.0, 3.0, 3.0, 1.0), strict=True):
        nn.init.constant_(layer.weight, weight)
    x = torch.ones(1, 1).double()

    def loss(output: Tensor) -> Tensor:
        return (0.5 * (output - 1).square()).sum()

    def run(solver: torch2ebm.Solver) -> torch2ebm.Relaxation:
        model = attached(net, torch2ebm.PredictiveCoding(solver=solver), "children")
        local_gradients(model, (x,), loss)
        return model.state.relaxation

    assert run(torch2ebm.GradientDescent(4000, 0.1, tol=1e-9)).converged
    assert run(torch2ebm.ErrorDescent(4000, 0.01, tol=1e-9)).converged
    for lr in (0.5, 0.1, 0.02):
        with pytest.raises(DivergenceError, match="ErrorDescent") as caught:
            run(torch2ebm.LocalErrorDescent(4000, lr))
        assert caught.value.energy[0] == pytest.approx(32.0)


# Convergence ----------------------------------------------------------------------------------------------------------


def deep(depth: int, width: int = 16, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth - 1)]
        net = nn.Sequential(*layers, nn.Linear(width, 5)).double()
        for module in net.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight)
    return net


def inputs(batch: int = 6, width: int = 16) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(3)).double()


def mean_cross_entropy(output: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, torch.arange(len(output)) % output.shape[1])


def residual_in_the_values(net: nn.Sequential, model: torch2ebm.EnergyModel, x: Tensor) -> float:
    """Largest entry of dF/dv at the state's values, by autograd on the written-out energy."""
    values = [model.state.value[str(i)].clone().requires_grad_() for i in range(len(net) - 1)]
    predictions = [layer(value) for layer, value in zip(net, [x, *values], strict=True)]
    energy = sum(0.5 * (v - mu).square().sum() for v, mu in zip(values, predictions, strict=False))
    energy = energy + len(x) * mean_cross_entropy(predictions[-1])
    return max(float(slope.abs().max()) for slope in torch.autograd.grad(energy, values))


def test_error_descent_needs_thirty_times_fewer_steps_on_a_deep_chain() -> None:
    """Goemaere et al. 2025: 20 tanh layers of width 64 to a residual of dF/dv of 1e-3 of its start."""
    net, x = deep(20, 64), inputs(8, 64)

    def run(solver: torch2ebm.Solver) -> torch2ebm.EnergyModel:
        model = attached(net, torch2ebm.PredictiveCoding(solver=solver), "children")
        local_gradients(model, (x,), mean_cross_entropy)
        return model

    tol = 1e-3 * run(torch2ebm.GradientDescent(1, 0.1)).state.relaxation.residual
    on_values = run(torch2ebm.GradientDescent(600, 0.5, tol=tol))  # at .6 it does not converge
    assert on_values.state.relaxation.converged
    assert residual_in_the_values(net, on_values, x) <= tol
    on_errors = next(
        n for n in range(1, 40) if residual_in_the_values(net, run(torch2ebm.ErrorDescent(n, 0.4)), x) <= tol
    )
    accelerated = next(
        n for n in range(1, 40) if residual_in_the_values(net, run(torch2ebm.AndersonErrorDescent(n, 0.4)), x) <= tol
    )
    assert on_values.state.relaxation.steps >= 30 * on_errors
    assert on_errors > accelerated


def test_a_met_tolerance_ends_the_relaxation_and_an_unmet_one_is_reported() -> None:
    x = inputs()

    def run(solver: torch2ebm.Solver) -> torch2ebm.Relaxation:
        model = attached(deep(4), torch2ebm.PredictiveCoding(solver=solver), "children")
        local_gradients(model, (x,), mean_cross_entropy)
        return model.state.relaxation

    for make in (torch2ebm.GradientDescent, torch2ebm.Momentum, torch2ebm.ErrorDescent, torch2ebm.AdamDescent):
        free = run(make(steps=30, lr=0.1))
        assert free.converged is None and free.steps == 30 and free.sample_converged is None
        loose = run(make(steps=30, lr=0.1, tol=1e3))
        assert loose.converged is True and loose.steps == 1 and bool(loose.sample_converged.all())
        unmet = run(make(steps=3, lr=0.01, tol=1e-12))
        assert unmet.converged is False and unmet.steps == 3 and not bool(unmet.sample_converged.any())


def test_convergence_is_reported_for_each_sample() -> None:
    x = inputs()
    solver = torch2ebm.GradientDescent(12, 0.3, tol=1e-9)

    def residual(x: Tensor, labels: Tensor) -> Tensor:
        model = attached(deep(3), torch2ebm.PredictiveCoding(solver=solver), "children")
        local_gradients(model, (x,), lambda y: nn.functional.cross_entropy(y, labels))
        relaxation = model.state.relaxation
        assert relaxation.sample_residual.shape == (len(x),)
        assert float(relaxation.sample_residual.max()) == relaxation.residual
        assert torch.equal(relaxation.sample_converged, relaxation.sample_residual <= 1e-9)
        return relaxation.sample_residual

    labels = torch.arange(len(x)) % 5
    together = residual(x, labels)
    alone = torch.cat([residual(x[i : i + 1], labels[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-13)
    assert together.max() > 1.05 * together.min()  # the samples differ


def test_anderson_needs_fewer_steps_than_error_descent() -> None:
    tol = 1e-8

    def steps(solver: torch2ebm.Solver) -> int:
        model = attached(deep(8), torch2ebm.PredictiveCoding(solver=solver), "children")
        local_gradients(model, (inputs(),), mean_cross_entropy)
        assert model.state.relaxation.converged
        return model.state.relaxation.steps

    assert steps(torch2ebm.AndersonErrorDescent(200, 0.3, tol=tol)) < 0.6 * steps(
        torch2ebm.ErrorDescent(2000, 0.3, tol=tol)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [torch2ebm.AndersonErrorDescent(150, 0.3), torch2ebm.ErrorDescent(150, 0.3)])
def test_steps_beyond_the_equilibrium_stay_there(solver: torch2ebm.Solver, dtype: torch.dtype) -> None:
    """Without a tol there are steps left when nothing changes any more, to the last bit."""
    for net in (deep(4).to(dtype), nn.Sequential(nn.Linear(16, 1, bias=False), nn.Linear(1, 5, bias=False)).to(dtype)):
        model = attached(net, torch2ebm.PredictiveCoding(solver=solver), "children")
        local_gradients(model, (inputs().to(dtype),), mean_cross_entropy)
        relaxation = model.state.relaxation
        assert relaxation.residual <= 100 * torch.finfo(dtype).eps
        assert relaxation.energy[-1] == pytest.approx(min(relaxation.energy), rel=1e-5)


# Precision of the numbers ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # which is what it shows
def test_in_single_precision_stored_errors_beat_stored_values() -> None:
    """Goemaere et al. 2025: relative gradient error at lambda 1e-5 about 3e-2 with values stored, 3e-5 with errors."""
    net, x = deep(4), inputs()
    reference = backprop(net, (x,), mean_cross_entropy)

    def distance(solver: torch2ebm.Solver, beta: float) -> float:
        twin = deep(4).float()
        algorithm = torch2ebm.PredictiveCoding(solver=solver, nudging=torch2ebm.OneSided(beta))
        model = attached(twin, algorithm, "children")
        gradients = local_gradients(model, (x.float(),), mean_cross_entropy)
        return relative_error({name: g.double() for name, g in gradients.items()}, reference)

    for beta, worst in ((1e-5, 5e-5), (1e-6, 5e-6)):
        on_values = distance(torch2ebm.GradientDescent(60, 0.5), beta)
        for solver in (torch2ebm.ErrorDescent(30, 0.5), torch2ebm.LocalErrorDescent(60, 0.5)):
            on_errors = distance(solver, beta)
            assert on_errors <= worst + 5 * beta
            assert on_values > 50 * on_errors


def test_a_run_away_relaxation_is_found_while_its_numbers_are_finite() -> None:
    model = attached(deep(4), torch2ebm.PredictiveCoding(60, 3.0), "children")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(DivergenceError, match=r"inference step \d+.*energy") as caught:
        local_gradients(model, (inputs(),), mean_cross_entropy)
    curve = caught.value.energy
    assert curve[-1] > 1e3 * curve[0] and all(b >= a for a, b in itertools.pairwise(curve[-5:]))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
