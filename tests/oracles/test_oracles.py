"""The oracles agree with one another, and every problem of the zoo is fit to be tested on."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from helpers import FX_SEES_SIZES
from oracles import graphs as oracles
from oracles.graphs import Dag, Gradients, binomial_tail, skip_dag
from torch import Tensor, fx, nn
from zoo import PROBLEMS, Problem, call, tagged

EXACT = 1e-12
every_loss = pytest.mark.parametrize("loss", [oracles.half_squared_error, oracles.cross_entropy])
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)

Loss = Callable[[Tensor], Tensor]


def distance(found: Gradients, expected: Gradients) -> float:
    """Relative error over all parameters together."""
    assert found.keys() == expected.keys()
    difference = math.fsum((found[name] - expected[name]).square().sum().item() for name in expected)
    size = math.fsum(value.square().sum().item() for value in expected.values())
    return math.sqrt(difference / size)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.norm())


# ---- graphs


def test_the_skip_dag_has_what_its_docstring_claims() -> None:
    dag = skip_dag()
    level = oracles.levels(dag)
    spans = [level[p] - level[v.name] for v in dag.vertices for p in v.parents if p not in dag.inputs]
    readers = [level[v.name] for v in dag.vertices if "first.0.weight" in v.parameters]
    assert max(spans) == 5
    assert sorted(readers) == [2, 6]


@every_loss
def test_levelled_zero_divergence_is_backprop(loss: Loss) -> None:
    dag = skip_dag()
    found = oracles.dag_zero_divergence(dag, loss, levelled=True)
    assert distance(found.gradients, oracles.dag_backprop(dag, loss).gradients) <= EXACT


@every_loss
def test_unlevelled_graph_breaks_exactness(loss: Loss) -> None:
    dag = skip_dag()
    found = oracles.dag_zero_divergence(dag, loss, levelled=False)
    assert distance(found.gradients, oracles.dag_backprop(dag, loss).gradients) > 1


def test_levelling_keeps_the_function_and_the_levels() -> None:
    dag = skip_dag()
    graph = oracles.with_identities(dag)
    level = oracles.levels(graph)
    assert {name: level[name] for name in oracles.levels(dag)} == oracles.levels(dag)
    assert all(level[p] - level[v.name] == 1 for v in graph.vertices for p in v.parents if p not in dag.inputs)
    assert torch.equal(oracles.dag_feedforward(graph)[dag.output], oracles.dag_feedforward(dag)[dag.output])


@every_loss
@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_gamma_scales_each_level_by_its_power(loss: Loss, gamma: float) -> None:
    dag = skip_dag()
    level = oracles.levels(dag)
    found = oracles.dag_zero_divergence(dag, loss, levelled=True, gamma=gamma).gradients
    expected = oracles.dag_backprop(dag, loss).gradients
    for name, powers in _levels_of_readers(dag, level).items():
        if len(powers) == 1:
            assert apart(found[name], gamma ** powers[0] * expected[name]) <= EXACT


def _levels_of_readers(dag: Dag, level: dict[str, int]) -> dict[str, list[int]]:
    return {name: [level[v.name] for v in dag.vertices if name in v.parameters] for name in dag.parameters}


@every_loss
@pytest.mark.parametrize("lr", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [0, 1, 4, 7, 12])
def test_fixed_prediction_weighs_each_path_length_by_a_binomial_tail(loss: Loss, lr: float, steps: int) -> None:
    dag = skip_dag()
    errors = oracles.dag_fixed_prediction(dag, loss, steps, lr).errors
    for name, parts in oracles.path_length_contributions(dag, loss).items():
        expected = -sum(binomial_tail(steps, lr, length) * part for length, part in parts.items())
        torch.testing.assert_close(errors[name], expected, rtol=EXACT, atol=EXACT)


@every_loss
def test_path_lengths_add_up_to_backprop(loss: Loss) -> None:
    dag = skip_dag()
    errors = oracles.dag_backprop(dag, loss).errors
    for name, parts in oracles.path_length_contributions(dag, loss).items():
        assert apart(-torch.stack(list(parts.values())).sum(0), errors[name]) <= EXACT


@every_loss
def test_fixed_prediction_with_unit_steps_is_backprop_from_the_depth_on_and_not_before(loss: Loss) -> None:
    dag = skip_dag()
    depth = max(oracles.levels(dag).values())
    expected = oracles.dag_backprop(dag, loss).gradients
    assert distance(oracles.dag_fixed_prediction(dag, loss, depth, 1.0).gradients, expected) <= EXACT
    assert distance(oracles.dag_fixed_prediction(dag, loss, depth - 1, 1.0).gradients, expected) > 1e-6


def test_strict_finds_a_stationary_point_of_the_energy() -> None:
    dag = skip_dag()
    state = oracles.dag_strict(dag, oracles.half_squared_error, 2500, 0.25)
    values = {name: state.values[name].clone().requires_grad_() for name in dag.hidden}
    gradients = torch.autograd.grad(_energy(dag, values), list(values.values()))
    assert max(part.abs().max().item() for part in gradients) <= EXACT


def _energy(dag: Dag, values: dict[str, Tensor]) -> Tensor:
    """The energy by its definition, for a half squared error at the output."""
    known = {**dag.inputs, **values}
    predictions = {
        v.name: v.function(*(known[p] for p in v.parents), *(dag.parameters[p] for p in v.parameters))
        for v in dag.vertices
    }
    hidden = sum((values[name] - predictions[name]).square().sum() / 2 for name in dag.hidden)
    return hidden + oracles.half_squared_error(predictions[dag.output])


@every_loss
def test_the_module_is_the_graph(loss: Loss) -> None:
    dag = skip_dag()
    module = oracles.SkipDag(dag.parameters)
    names = {name for name, _ in module.named_children()}
    assert names == {vertex.name for vertex in dag.vertices}
    assert all(value.data_ptr() == dag.parameters[name].data_ptr() for name, value in module.named_parameters())
    state = oracles.dag_backprop(dag, loss)
    assert apart(module(dag.inputs["x"]), state.values[dag.output]) <= EXACT
    assert distance(oracles.backprop(module, (dag.inputs["x"],), loss), state.gradients) <= EXACT


# ---- chains


def _chain() -> tuple[list[nn.Module], Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)]
        return [layer.double() for layer in layers], torch.randn(4, 4, dtype=torch.float64)


def _parameters(layers: list[nn.Module]) -> list[list[nn.Parameter]]:
    return [list(layer.parameters()) for layer in layers]


@every_loss
@pytest.mark.parametrize(("steps", "lr"), [(0, 0.1), (1, 0.5), (20, 0.1), (7, 1.0)])
def test_strict_equals_its_formulas(loss: Loss, steps: int, lr: float) -> None:
    layers, x = _chain()
    weights, biases = zip(*(layer.parameters() for layer in layers[::2]), strict=True)
    found = oracles.strict(layers, _parameters(layers), x, loss, steps, lr)
    expected = oracles.strict_by_formulas(weights, biases, x, loss, steps, lr)
    for left, right in ((found.values, expected.values), (found.errors, expected.errors)):
        torch.testing.assert_close(left, right, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=EXACT, atol=EXACT)


@every_loss
def test_strict_on_a_chain_is_strict_on_a_graph(loss: Loss) -> None:
    layers, x = _chain()
    found = oracles.strict(layers, _parameters(layers), x, loss, 20, 0.1)
    dag = _as_dag(layers, x)
    state = oracles.dag_strict(dag, loss, 20, 0.1)
    for layer, name in enumerate(state.values):
        assert apart(found.values[layer], state.values[name]) <= EXACT
        assert apart(found.errors[layer], state.errors[name]) <= EXACT
    for layer in (0, 2, 4):
        for kind, part in zip(("weight", "bias"), found.gradients[layer], strict=True):
            assert apart(part, state.gradients[f"{layer}.{kind}"]) <= EXACT


def _as_dag(layers: list[nn.Module], x: Tensor) -> Dag:
    vertices: list[oracles.Vertex] = []
    parameters: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        names = [f"{index}.{name}" for name, _ in layer.named_parameters()]
        function = nn.functional.linear if names else torch.tanh
        vertices.append(oracles.Vertex(f"v{index}", (f"v{index - 1}" if index else "x",), tuple(names), function))
        parameters.update(zip(names, layer.parameters(), strict=True))
    return Dag(tuple(vertices), parameters, {"x": x})


@pytest.mark.parametrize("lr", [0.1, 0.5, 1.0])
def test_fixed_prediction_on_a_chain_scales_backprop(lr: float) -> None:
    layers, x = _chain()
    dag = _as_dag(layers, x)
    level = oracles.levels(dag)
    expected = oracles.dag_backprop(dag, oracles.cross_entropy).errors
    for steps in range(8):
        errors = oracles.dag_fixed_prediction(dag, oracles.cross_entropy, steps, lr).errors
        for name, error in errors.items():
            scaled = binomial_tail(steps, lr, level[name]) * expected[name]
            torch.testing.assert_close(error, scaled, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("problem", tagged("chain", without=("frozen",)), ids=lambda problem: problem.name)
def test_before_any_step_only_the_last_layer_has_a_gradient_and_it_is_backprops(problem: Problem) -> None:
    module, inputs = problem.build(), problem.inputs(5)
    assert isinstance(module, nn.Sequential) and isinstance(inputs, tuple)
    layers = list(module)
    state = oracles.strict(layers, _parameters(layers), inputs[0], lambda output: 5 * problem.loss(output), 0, 0.1)
    assert all(part.count_nonzero() == 0 for layer in state.gradients[:-1] for part in layer)
    expected = list(oracles.backprop(module, inputs, problem.loss).values())
    for part, gradient in zip(reversed(state.gradients[-1]), reversed(expected), strict=False):
        assert apart(part / 5, gradient) <= EXACT


def test_binomial_tail_by_counting() -> None:
    assert binomial_tail(3, 0.5, 2) == 0.5
    assert binomial_tail(5, 0.3, 0) == pytest.approx(1, abs=EXACT)
    assert binomial_tail(2, 0.3, 3) == 0
    assert binomial_tail(4, 1.0, 4) == 1


def test_deep_linear_closed_form_is_where_descent_ends() -> None:
    generator = torch.Generator().manual_seed(3)
    widths = [4, 6, 5, 3]
    weights = [
        torch.randn(out, into, generator=generator, dtype=torch.float64) / math.sqrt(into)
        for into, out in pairwise(widths)
    ]
    x, y = (torch.randn(5, width, generator=generator, dtype=torch.float64) for width in (4, 3))
    v1 = x @ weights[0].T
    v2 = v1 @ weights[1].T
    for _ in range(3000):
        e1, e2, e3 = v1 - x @ weights[0].T, v2 - v1 @ weights[1].T, y - v2 @ weights[2].T
        v1, v2 = v1 + 0.2 * (e2 @ weights[1] - e1), v2 + 0.2 * (e3 @ weights[2] - e2)
    energy = 0.5 * torch.cat([e1, e2, e3], dim=1).square().sum(1)
    closed = oracles.deep_linear_energy(weights, x, y)
    assert apart(closed.energy, energy) <= EXACT
    assert apart(closed.output_error, e3) <= EXACT


# ---- the zoo


def test_names_are_unique_and_many() -> None:
    assert len({problem.name for problem in PROBLEMS}) == len(PROBLEMS) >= 24


@every_problem
@pytest.mark.parametrize("batch", [2, 5])
def test_a_problem_is_deterministic_and_has_gradients(problem: Problem, batch: int) -> None:
    first, second = (oracles.backprop(problem.build(), problem.inputs(batch), problem.loss) for _ in range(2))
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert gradient.dtype == torch.float64
        assert torch.equal(gradient, second[name]), name
        assert gradient.isfinite().all(), name
        assert 1e-4 < gradient.abs().max() < 3, f"{name}: {gradient.abs().max():.1e}"


@every_problem
def test_a_problem_builds_in_train_mode_and_leaves_the_random_state(problem: Problem) -> None:
    before = torch.get_rng_state()
    module = problem.build()
    problem.inputs(2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(part.training for part in module.modules())
    assert all(value.dtype == torch.float64 for value in module.parameters())


@every_problem
def test_a_loss_is_a_scalar_that_can_be_taken_twice(problem: Problem) -> None:
    output = call(problem.build(), problem.inputs(3))
    first, second = problem.loss(output), problem.loss(output)
    assert first.shape == () and first.isfinite()
    assert torch.equal(first, second)


@every_problem
def test_a_problem_traces_symbolically_to_the_same_function(problem: Problem) -> None:
    if problem.name == "gpt" and not FX_SEES_SIZES:
        with pytest.raises(TypeError, match="arange"):
            fx.symbolic_trace(problem.build())
        return
    traced = fx.symbolic_trace(problem.build())
    for batch in (2, 5):
        found = oracles.backprop(traced, problem.inputs(batch), problem.loss)
        assert distance(found, oracles.backprop(problem.build(), problem.inputs(batch), problem.loss)) <= EXACT


@every_problem
def test_a_loss_is_a_mean_over_the_batch(problem: Problem) -> None:
    """The squared or logarithmic loss of a batch stays of the size of one sample's, whatever the batch."""
    sizes = [problem.loss(call(problem.build(), problem.inputs(batch))).item() for batch in (2, 64)]
    assert 0.2 < sizes[0] / sizes[1] < 5
