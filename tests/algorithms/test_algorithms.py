"""Predictive coding, fixed prediction and Z-IL against the papers and against references written without the engine."""

import itertools

import pytest
import torch
from helpers import FullSweep, attached, local_gradients, relative_error
from oracles.graphs import (
    SkipDag,
    backprop,
    binomial_tail,
    cross_entropy,
    dag_backprop,
    dag_fixed_prediction,
    dag_strict,
    dag_zero_divergence,
    deep_linear_energy,
    half_squared_error,
    levels,
    path_length_contributions,
    skip_dag,
    strict,
    strict_by_formulas,
)
from torch import Tensor, nn
from zoo import PROBLEMS, Problem, tagged

import torch2ebm
from torch2ebm.algorithms.zero_divergence import by_levels
from torch2ebm.graph.energy_graph import Node
from torch2ebm.inference.value_inference import ValueInference

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
every_granularity = pytest.mark.parametrize("nodes", ["layer", "preactivation", "module", "op", "children"])
both_losses = pytest.mark.parametrize("loss", [half_squared_error, cross_entropy])

NAMES = [vertex.name for vertex in skip_dag().vertices]
HIDDEN = skip_dag().hidden


def tanh_chain(depth: int = 4, width: int = 6, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth - 1)]
        return nn.Sequential(*layers, nn.Linear(width, 3)).double()


def batch(size: int = 5, width: int = 6) -> Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(1)).double()


def mean_cross_entropy(output: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, torch.arange(len(output)) % output.shape[1])


def as_a_sum(loss) -> torch2ebm.EnergyLoss:
    """All of the loss in the energy, the 1/2 of a half squared error too, and known to be a sum over samples."""

    def summed(output: Tensor) -> Tensor:
        return loss(output)

    summed.reduction = "sum"
    return torch2ebm.EnergyLoss(summed)


def of_skip_dag(algorithm: torch2ebm.Algorithm, loss) -> tuple[dict[str, Tensor], torch2ebm.EnergyModel]:
    model = attached(SkipDag(), algorithm, nodes=NAMES)
    return local_gradients(model, (skip_dag().inputs["x"],), as_a_sum(loss)), model


# Z-IL -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["reverse", "levels"])
@every_granularity
@every_problem
def test_zero_divergence_is_backprop(problem: Problem, nodes: str, schedule: str) -> None:
    model = attached(problem.build(), torch2ebm.ZeroDivergence(schedule), nodes)
    inputs = problem.inputs(4)
    reference = backprop(problem.build(), inputs, problem.loss)
    assert relative_error(local_gradients(model, inputs, problem.loss), reference) <= 1e-12


@both_losses
def test_both_schedules_give_the_literal_schedule_s_gradients_and_minus_delta(loss) -> None:
    reference = dag_backprop(skip_dag(), loss)
    literal = dag_zero_divergence(skip_dag(), loss, levelled=True)
    assert relative_error(literal.gradients, reference.gradients) <= 1e-12
    for schedule in ("reverse", "levels"):
        gradients, model = of_skip_dag(torch2ebm.ZeroDivergence(schedule), loss)
        assert relative_error(gradients, reference.gradients) <= 1e-12
        for name in NAMES:
            torch.testing.assert_close(model.state.error[name], reference.errors[name], rtol=1e-11, atol=1e-13)
            assert model.state.error[name].grad_fn is None and not model.state.error[name].requires_grad
        for name in HIDDEN:  # v = vhat + e
            expected = reference.values[name] + reference.errors[name]
            torch.testing.assert_close(model.state.value[name], expected, rtol=1e-12, atol=1e-13)


def test_errors_are_minus_delta_of_the_loss_summed_over_samples() -> None:
    """For a mean loss L over B samples, delta is that of B L."""
    model = attached(tanh_chain(), torch2ebm.ZeroDivergence(), "children")
    local_gradients(model, (batch(),), cross_entropy)
    of_the_sum = model.state.error["1"]
    local_gradients(model, (batch(),), mean_cross_entropy)
    torch.testing.assert_close(model.state.error["1"], of_the_sum, rtol=1e-12, atol=1e-14)


@both_losses
def test_unlevelled_graph_breaks_exactness(loss) -> None:
    reference = dag_backprop(skip_dag(), loss)
    model = torch2ebm.convert(SkipDag(), nodes=NAMES, example_inputs=skip_dag().inputs["x"])
    call = model.torch2ebm.new_call((skip_dag().inputs["x"],), {})
    call.feedforward(keep_graph=True)
    output = call.values[model.graph.output_slots[0]].detach().requires_grad_()
    delivered = {model.graph.output_slots[0]: torch.autograd.grad(loss(output), output)[0]}
    levelled = by_levels(call, model.graph.levelled(), delivered, 1.0, gamma=1.0)
    unlevelled = by_levels(call, model.graph, delivered, 1.0, gamma=1.0)
    assert relative_error(levelled.parameters, reference.gradients) <= 1e-12
    assert relative_error(unlevelled.parameters, reference.gradients) > 1
    literal = dag_zero_divergence(skip_dag(), loss, levelled=False)
    last = {name: g for name, g in unlevelled.parameters.items() if name.startswith("output")}
    assert relative_error(last, {name: literal.gradients[name] for name in last}) <= 1e-12


def test_where_the_loss_is_linear_even_the_unlevelled_schedule_is_the_literal_one() -> None:
    """Then the output's error stands still in the oracle too, and errors that stay for several steps are seen."""
    dag = skip_dag()
    model = torch2ebm.convert(SkipDag(), nodes=NAMES, example_inputs=dag.inputs["x"])
    call = model.torch2ebm.new_call((dag.inputs["x"],), {})
    call.feedforward(keep_graph=True)
    slot = model.graph.output_slots[0]
    factors = torch.arange(1, call.values[slot].numel() + 1, dtype=torch.float64).sin().reshape(call.values[slot].shape)
    unlevelled = by_levels(call, model.graph, {slot: factors}, 1.0, gamma=0.9)
    literal = dag_zero_divergence(dag, lambda output: (factors * output).sum(), levelled=False, gamma=0.9)
    assert relative_error(unlevelled.parameters, literal.gradients) <= 1e-12


@pytest.mark.parametrize("schedule", ["reverse", "levels"])
@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_a_step_other_than_one_scales_a_level_by_its_power(gamma: float, schedule: str) -> None:
    reference = dag_backprop(skip_dag(), half_squared_error).gradients
    literal = dag_zero_divergence(skip_dag(), half_squared_error, levelled=True, gamma=gamma).gradients
    gradients, _ = of_skip_dag(torch2ebm.ZeroDivergence(schedule, gamma=gamma), half_squared_error)
    assert relative_error(gradients, literal) <= 1e-11
    level = levels(skip_dag())
    for vertex in skip_dag().vertices:
        for name in set(vertex.parameters) - {"first.0.weight"}:  # the shared weight mixes powers
            expected = gamma ** level[vertex.name] * reference[name]
            torch.testing.assert_close(gradients[name], expected, rtol=1e-11, atol=1e-14)


# Fixed prediction -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # few steps reach few levels
@pytest.mark.parametrize("method", ["closed_form", "sweep"])
@pytest.mark.parametrize(("steps", "lr"), list(itertools.product([1, 3, 7, 20], [0.1, 0.5, 1.0])))
def test_on_a_chain_fixed_prediction_follows_the_binomial_law(steps: int, lr: float, method: str) -> None:
    module, x = tanh_chain(depth=5), batch()
    reference = backprop(module, (x,), cross_entropy)
    model = attached(module, torch2ebm.FixedPrediction(steps, lr, method=method, loss_reduction="sum"), "children")
    gradients = local_gradients(model, (x,), cross_entropy)
    for name, g in gradients.items():
        share = binomial_tail(steps, lr, 4 - int(name[0]))
        torch.testing.assert_close(g, share * reference[name], rtol=1e-12, atol=1e-15)
        assert (g == 0).all() or steps >= 4 - int(name[0])


@pytest.mark.parametrize("method", ["closed_form", "sweep"])
@pytest.mark.parametrize(("steps", "lr"), list(itertools.product([1, 4, 12], [0.1, 0.5, 1.0, 1.3])))
@both_losses
@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # few steps reach few levels
def test_on_a_graph_fixed_prediction_is_the_literal_sweep(loss, steps: int, lr: float, method: str) -> None:
    reference = dag_fixed_prediction(skip_dag(), loss, steps, lr)
    algorithm = torch2ebm.FixedPrediction(steps, lr, method=method, loss_reduction="sum")
    gradients, model = of_skip_dag(algorithm, loss)
    for name, expected in reference.gradients.items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-11, atol=1e-13)
    for name in NAMES:
        torch.testing.assert_close(model.state.error[name], reference.errors[name], rtol=1e-11, atol=1e-13)


def test_on_a_graph_each_path_is_weighted_by_its_length() -> None:
    steps, lr = 6, 0.3
    contributions = path_length_contributions(skip_dag(), cross_entropy)
    _, model = of_skip_dag(torch2ebm.FixedPrediction(steps, lr, loss_reduction="sum"), cross_entropy)
    delta = dag_backprop(skip_dag(), cross_entropy).errors
    for name in HIDDEN:
        weighted = sum(binomial_tail(steps, lr, k) * part for k, part in contributions[name].items())
        torch.testing.assert_close(model.state.error[name], -weighted, rtol=1e-11, atol=1e-14)
        missing = 1 - binomial_tail(steps, lr, levels(skip_dag())[name])
        bound = missing * sum(part.norm() for part in contributions[name].values())
        assert (model.state.error[name] - delta[name]).norm() <= bound * (1 + 1e-12)


@pytest.mark.parametrize("method", ["closed_form", "sweep"])
def test_fixed_prediction_at_step_one_is_backprop_from_the_depth_on_and_not_before(method: str) -> None:
    reference = dag_backprop(skip_dag(), cross_entropy).gradients
    depth = max(levels(skip_dag()).values())
    exact, _ = of_skip_dag(torch2ebm.FixedPrediction(depth, 1.0, method=method), cross_entropy)
    early, model = of_skip_dag(torch2ebm.FixedPrediction(depth - 1, 1.0, method=method), cross_entropy)
    assert relative_error(exact, reference) <= 1e-12
    assert relative_error(early, reference) > 0.01
    assert model.state.unreached == ()  # shorter paths have arrived


@pytest.mark.parametrize("nodes", ["layer", "op"])
@every_problem
@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # few steps reach few levels
def test_closed_form_equals_the_sweep(problem: Problem, nodes: str) -> None:
    inputs = problem.inputs(3)
    found = []
    for method in ("closed_form", "sweep"):
        model = attached(problem.build(), torch2ebm.FixedPrediction(9, 0.4, method=method), nodes)
        found.append(local_gradients(model, inputs, problem.loss))
    assert found[0].keys() == found[1].keys()
    for name, g in found[0].items():
        scale = backprop(problem.build(), inputs, problem.loss)[name].abs().max()
        assert (g - found[1][name]).abs().max() <= 1e-12 * scale


# Predictive coding ----------------------------------------------------------------------------------------------------


@both_losses
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_strict_equals_hand_written_inference_on_a_chain(steps: int, loss) -> None:
    module, x = tanh_chain(), batch()
    oracle = strict(list(module), [list(layer.parameters()) for layer in module], x, loss, steps, 0.2)
    model = attached(module, torch2ebm.PredictiveCoding(steps, 0.2, loss_reduction="sum"), "children")
    gradients = local_gradients(model, (x,), torch2ebm.EnergyLoss(loss))
    expected = dict(zip(gradients, itertools.chain(*oracle.gradients), strict=True))
    assert relative_error(gradients, expected) <= 1e-12
    for node, value, error in zip(model.nodes, oracle.values, oracle.errors, strict=True):
        torch.testing.assert_close(model.state.error[node], error, rtol=1e-11, atol=1e-14)
        if not model.nodes[node].is_output:
            torch.testing.assert_close(model.state.value[node], value, rtol=1e-12, atol=1e-14)
        difference = model.state.value[node] - model.state.prediction[node]
        torch.testing.assert_close(model.state.error[node], difference, rtol=1e-11, atol=1e-14)


def test_strict_equals_written_out_matrix_formulas() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    linears = [module[i] for i in (0, 2, 4)]
    weights, biases = [layer.weight.detach() for layer in linears], [layer.bias.detach() for layer in linears]
    oracle = strict_by_formulas(weights, biases, batch(), cross_entropy, 12, 0.1)
    model = attached(module, torch2ebm.PredictiveCoding(12, 0.1, loss_reduction="sum"), "module")
    gradients = local_gradients(model, (batch(),), cross_entropy)
    assert relative_error(gradients, dict(zip(gradients, itertools.chain(*oracle.gradients), strict=True))) <= 1e-12


@both_losses
@pytest.mark.parametrize("steps", [1, 3, 5, 6, 25])
def test_strict_equals_hand_written_inference_on_a_graph(steps: int, loss) -> None:
    reference = dag_strict(skip_dag(), loss, steps, 0.15)
    gradients, model = of_skip_dag(torch2ebm.PredictiveCoding(steps, 0.15, loss_reduction="sum"), loss)
    for name, expected in reference.gradients.items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-11, atol=1e-14)
    for name in HIDDEN:
        torch.testing.assert_close(model.state.value[name], reference.values[name], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(model.state.error[name], reference.errors[name], rtol=1e-10, atol=1e-14)


def test_a_stale_error_would_be_noticed() -> None:
    """The negative twin of the tests above: one step less is another gradient."""
    one, _ = of_skip_dag(torch2ebm.PredictiveCoding(5, 0.15, loss_reduction="sum"), cross_entropy)
    reference = dag_strict(skip_dag(), cross_entropy, 4, 0.15)
    assert relative_error(one, reference.gradients) > 1e-3


def test_deep_linear_equilibrium_has_the_closed_form_energy() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = nn.Sequential(*[nn.Linear(5, 5, bias=False) for _ in range(3)]).double()
    x, y = batch(4, 5), batch(4, 5).flip(0)
    closed = deep_linear_energy([layer.weight.detach() for layer in module], x, y)
    solver = torch2ebm.GradientDescent(steps=4000, lr=0.3, tol=1e-13)
    model = attached(module, torch2ebm.PredictiveCoding(solver=solver, loss_reduction="sum"), "children")
    local_gradients(model, (x,), lambda output: (0.5 * (output - y).square()).sum())
    relaxation = model.state.relaxation
    assert relaxation.converged and relaxation.residual <= 1e-13 and relaxation.steps < 4000
    torch.testing.assert_close(relaxation.energy[-1], float(closed.energy.sum()), rtol=1e-12, atol=0)
    torch.testing.assert_close(model.state.error["2"], closed.output_error, rtol=1e-10, atol=1e-12)
    # an output's energy is half its squared error where the loss is that, so per sample the nodes sum to F*
    torch.testing.assert_close(sum(model.state.energy.values()), closed.energy, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("nodes", ["layer", "module", "op"])
@pytest.mark.parametrize(
    "problem", tagged(without=("batch_coupled", "dropout", "kinks", "stop_gradient")), ids=lambda p: p.name
)
def test_energy_falls_along_the_relaxation(problem: Problem, nodes: str) -> None:
    model = attached(problem.build(), torch2ebm.PredictiveCoding(8, 0.02), nodes)
    local_gradients(model, problem.inputs(4), problem.loss)
    relaxation = model.state.relaxation
    assert len(relaxation.energy) == 9
    if model.graph.hidden_nodes:
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(relaxation.energy))
        assert relaxation.energy[-1] < relaxation.energy[0]
    parts = zip(relaxation.loss, *relaxation.node_energy.values(), strict=True)
    assert relaxation.energy == pytest.approx([sum(part) for part in parts], rel=1e-12)


def test_a_small_loss_makes_predictive_coding_backprop() -> None:
    """The relaxed energy's gradient tends to backprop's as lambda -> 0, to first order (Millidge et al. 2022)."""
    module, x = tanh_chain(), batch()
    reference = backprop(module, (x,), cross_entropy)
    solver = torch2ebm.GradientDescent(steps=3000, lr=0.4, tol=1e-15)
    distances = []
    for small in (1e-2, 1e-3):
        # with "sum" a constant inside the scalar is lambda itself: the recorder sees one number, the loss
        loss = torch2ebm.EnergyLoss(lambda output, small=small: small * cross_entropy(output))
        model = attached(module, torch2ebm.PredictiveCoding(solver=solver, loss_reduction="sum"), "children")
        gradients = {name: g / small for name, g in local_gradients(model, (x,), loss).items()}
        distances.append(relative_error(gradients, reference))
    assert distances[1] < 0.02 and distances[0] / distances[1] == pytest.approx(10, rel=0.2)


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.StepSizeWarning")  # a step of 1 is no stable one
@pytest.mark.filterwarnings("ignore::torch2ebm.errors.LoneNodeWarning")  # one child has every parameter
@every_granularity
@pytest.mark.parametrize("problem", tagged(without=("batch_norm", "batch_coupled")), ids=lambda p: p.name)
def test_one_full_step_of_error_descent_has_the_errors_of_zero_divergence(problem: Problem, nodes: str) -> None:
    """dF/de at the feed-forward pass is backprop's delta (Goemaere et al. 2025): e = -delta after a step of size 1."""
    one = torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent(1, 1.0))
    inputs = problem.inputs(4)
    states = []
    for algorithm in (one, torch2ebm.ZeroDivergence()):
        model = attached(problem.build(), algorithm, nodes)
        local_gradients(model, inputs, problem.loss)
        states.append(model.state)
    for node in model.graph.hidden_nodes:
        ours, exact = (state.error[node.name] for state in states)
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-13)


# The wave front -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 12])
@pytest.mark.parametrize("problem", tagged(without=("batch_norm",)), ids=lambda p: p.name)
def test_the_wave_front_changes_no_bit(problem: Problem, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> dict[str, Tensor]:
        model = attached(problem.build(), torch2ebm.PredictiveCoding(steps, 0.1))
        return local_gradients(model, problem.inputs(3), problem.loss)

    waved = run()
    monkeypatch.setattr("torch2ebm.inference.solver.ValueInference", FullSweep)
    full = run()
    assert waved.keys() == full.keys()
    for name, g in waved.items():
        assert torch.equal(g, full[name]) or (g - full[name]).abs().max() <= 1e-15 * full[name].abs().max(), name


def test_the_wave_front_evaluates_only_what_the_error_has_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    class Counted(ValueInference):
        def local_gradients(self):  # the sweeps are over
            counts.append(self.evaluations)
            return super().local_gradients()

    monkeypatch.setattr("torch2ebm.inference.solver.ValueInference", Counted)
    depth, steps = 12, 5
    model = attached(tanh_chain(depth), torch2ebm.PredictiveCoding(steps, 0.1), "children")
    local_gradients(model, (batch(),), mean_cross_entropy)
    assert counts == [sum(1 + t for t in range(steps))]  # at step t the levels 0 .. t; every sweep would be 11
    assert model.state.unreached == tuple(str(i) for i in range(depth - 1 - steps))
    for name, parameter in model.named_parameters():
        reached = name.split(".")[0] not in model.state.unreached
        assert bool((parameter.grad != 0).any()) == reached


def test_predictions_fed_by_clamped_inputs_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model = attached(module, torch2ebm.PredictiveCoding(10, 0.1))
    for _ in range(2):  # the capture, and the check of the first run that is cut
        local_gradients(model, (batch(),), mean_cross_entropy)
    calls: list[str] = []
    evaluate = Node.evaluate
    monkeypatch.setattr(Node, "evaluate", lambda node, *args: calls.append(node.name) or evaluate(node, *args))
    local_gradients(model, (batch(),), mean_cross_entropy)
    assert calls.count("0") == 1  # the parameters' gradient: the feed-forward pass is the module's own
    assert calls.count("2") == 10 + 1
