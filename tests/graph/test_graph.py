"""Every model of the zoo, cut at every granularity, is still that model."""

import pytest
import torch
from helpers import relative_error
from oracles.graphs import Inputs, backprop, call
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import PROBLEMS, Problem

import torch2ebm
from torch2ebm.common.nested import map_leaves
from torch2ebm.engine.call import Call

GRANULARITIES = ("layer", "preactivation", "activation", "module", "op", "children")

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
every_granularity = pytest.mark.parametrize("nodes", GRANULARITIES)


def converted(problem: Problem, nodes: str) -> tuple[torch2ebm.EnergyModel, nn.Module]:
    module = problem.build()
    return torch2ebm.convert(module, nodes=nodes, example_inputs=problem.inputs(5)), module


def node_by_node(model: torch2ebm.EnergyModel, inputs: Inputs, keep_graph: bool, cut: bool = True) -> Call:
    """The nodes evaluated one after the other, whatever the run has left of them."""
    run = watched(model, inputs)
    run.run.followed = False
    run.feedforward(keep_graph, cut)
    return run


def watched(model: torch2ebm.EnergyModel, inputs: Inputs) -> Call:
    torch.manual_seed(0)
    return model.torch2ebm.new_call(*((inputs, {}) if isinstance(inputs, tuple) else ((), inputs)))


@every_granularity
@every_problem
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_composing_the_nodes_is_the_model_bit_for_bit(problem: Problem, nodes: str, training: bool) -> None:
    twin = problem.build().train(training)
    torch.manual_seed(0)
    expected = pytree.tree_leaves(call(twin, problem.inputs(3)))
    model, module = converted(problem, nodes)
    model.train(training)
    # another batch size than the graph was cut with
    composed = node_by_node(model, problem.inputs(3), keep_graph=False).output()
    assert len(composed) == len(expected)
    for ours, theirs in zip(composed, expected, strict=True):
        assert torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs
    for name, buffer in twin.named_buffers():
        assert torch.equal(module.get_buffer(name), buffer), name


@every_granularity
@every_problem
@pytest.mark.parametrize("keep_graph", [True, False], ids=["graph", "values"])
def test_a_run_that_is_cut_leaves_what_the_nodes_make(problem: Problem, nodes: str, keep_graph: bool) -> None:
    model, module = converted(problem, nodes)
    inputs, state = problem.inputs(3), {name: tensor.clone() for name, tensor in module.state_dict().items()}
    composed = node_by_node(model, inputs, keep_graph)
    module.load_state_dict(state)
    cut = watched(model, inputs)
    assert cut.run.followed or not model.graph.cuts.complete
    cut.feedforward(keep_graph)
    assert composed.values.keys() == cut.values.keys() and composed.passes.keys() == cut.passes.keys()
    assert all(torch.equal(value, cut.values[slot]) for slot, value in composed.values.items())
    for name, ours in cut.passes.items():
        theirs = composed.passes[name]
        for a, b in zip((*ours.inputs, *ours.predictions), (*theirs.inputs, *theirs.predictions), strict=True):
            assert torch.equal(a, b), name


@every_granularity
@every_problem
def test_vector_jacobian_products_node_by_node_are_autograd(problem: Problem, nodes: str) -> None:
    """The chain rule done by hand over the nodes' own graphs, without any algorithm."""
    model, _ = converted(problem, nodes)
    run = node_by_node(model, problem.inputs(5), keep_graph=True)
    leaves = [leaf.detach().requires_grad_() if _is_live(leaf) else leaf for leaf in run.output()]
    in_order = iter(leaves)
    loss = problem.loss(map_leaves(lambda _: next(in_order), run.run.output))
    wanted = [leaf for leaf in leaves if _is_live(leaf)]
    of_outputs = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
    deltas: dict[str, Tensor] = {}
    for reference, leaf in zip(model.graph.outputs, leaves, strict=True):
        if _is_live(leaf) and (gradient := next(of_outputs)) is not None and reference.slot is not None:
            deltas[reference.slot] = gradient
    found: dict[str, Tensor] = {}
    for node in reversed(list(model.nodes.values())):
        evaluated = run.passes[node.name]
        parameters = {name: p for name, p in node.parameters.items() if p.requires_grad}
        wrt = [*evaluated.inputs, *parameters.values()]
        products = evaluated.pullback([deltas.get(slot) for slot in node.slots], wrt)
        for table, names in ((deltas, node.reads), (found, parameters)):
            for name in names:
                product, products = products[0], products[1:]
                if product is not None:
                    table[name] = table[name] + product if name in table else product
    twin = problem.build()
    assert relative_error(found, backprop(twin, problem.inputs(5), problem.loss)) <= 1e-12


def _is_live(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


@every_granularity
@every_problem
def test_no_autograd_graph_crosses_a_node_boundary(problem: Problem, nodes: str) -> None:
    """From a node's prediction a backward reaches its parameters and the leaves it reads, and nothing else."""
    model, module = converted(problem, nodes)
    run = node_by_node(model, problem.inputs(5), keep_graph=True)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for node in model.nodes.values():
        evaluated = run.passes[node.name]
        allowed = {id(leaf) for leaf in evaluated.inputs} | {id(p) for p in node.parameters.values()}
        reached = {id(leaf) for prediction in evaluated.predictions for leaf in _leaves_behind(prediction)}
        assert reached <= allowed, [names.get(leaf) for leaf in reached - allowed]
        assert all(leaf.is_leaf for leaf in evaluated.inputs)


def _leaves_behind(tensor: Tensor) -> list[Tensor]:
    found, seen, pending = [], set(), [tensor.grad_fn]
    while pending:
        function = pending.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            found.append(function.variable)
        pending += [following for following, _ in function.next_functions]
    return found


def test_the_boundary_test_sees_a_graph_that_crosses() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model = torch2ebm.convert(module, example_inputs=torch.randn(2, 3).double())
    run = node_by_node(model, (torch.randn(2, 3).double(),), keep_graph=True, cut=False)
    behind_the_output = _leaves_behind(run.values[model.graph.output_slots[0]])
    assert any(leaf is module[0].weight for leaf in behind_the_output)


@every_granularity
@every_problem
def test_parameters_stay_the_module_s_own_objects(problem: Problem, nodes: str) -> None:
    model, module = converted(problem, nodes)
    own = dict(module.named_parameters())
    in_nodes = {name: p for node in model.nodes.values() for name, p in node.parameters.items()}
    assert in_nodes.keys() == own.keys()
    assert all(in_nodes[name] is own[name] for name in own)


@every_granularity
@every_problem
def test_levels_are_longest_paths_to_an_output(problem: Problem, nodes: str) -> None:
    model, _ = converted(problem, nodes)
    for node in model.nodes.values():
        children = [model.nodes[child].level for child in node.children]
        assert node.level == (max(children) + 1 if children else 0)
        assert all(node.name in model.nodes[child].parents for child in node.children)
    levelled = model.graph.levelled()
    for node in levelled.nodes.values():
        assert all(levelled.nodes[parent].level == node.level + 1 for parent in node.parents)


def test_levelling_adds_one_identity_less_than_the_levels_an_edge_spans() -> None:
    from oracles.graphs import SkipDag, levels, skip_dag, with_identities

    names = [vertex.name for vertex in skip_dag().vertices]
    model = torch2ebm.convert(SkipDag(), nodes=names, example_inputs=skip_dag().inputs["x"])
    assert dict(model.graph.levels) == levels(skip_dag())
    spans = [(model.nodes[p].level, n.level) for n in model.nodes.values() for p in n.parents]
    added = sum(upper - lower - 1 for upper, lower in spans)
    assert len(model.graph.levelled().nodes) == len(model.nodes) + added
    assert len(model.nodes) + added == len(with_identities(skip_dag()).vertices)


def test_named_submodules_become_one_node_each() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    module = nn.Sequential(nn.Linear(3, 4), block, nn.Tanh(), nn.Linear(4, 2))
    model = torch2ebm.convert(module, nodes=["1"], example_inputs=torch.randn(2, 3))
    assert list(model.nodes) == ["0", "1", "3"]
    assert set(model.nodes["1"].parameters) == {"1.0.weight", "1.0.bias", "1.2.weight", "1.2.bias"}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("layer", ["Linear > Tanh", "Linear > Tanh", "Linear"]),
        ("preactivation", ["Linear", "Tanh > Linear", "Tanh > Linear"]),
        ("module", ["Linear", "Tanh", "Linear", "Tanh", "Linear"]),
        ("children", ["Linear", "Tanh", "Linear", "Tanh", "Linear"]),
    ],
)
def test_what_a_granularity_cuts(nodes: str, expected: list[str]) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model = torch2ebm.convert(module, nodes=nodes, example_inputs=torch.randn(2, 3))
    assert [node.description for node in model.nodes.values()] == expected


def test_a_value_that_is_returned_and_read_on_gets_an_output_of_its_own() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = torch.tanh(self.body(x))
            return self.head(features), features

    model = torch2ebm.convert(Features(), example_inputs=torch.randn(2, 3))
    assert {name: node.level for name, node in model.nodes.items()} == {"body": 1, "body.output": 0, "head": 0}


def test_infinite_mask_values_are_no_value_nodes() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.scores(x).masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf).softmax(1)

    model = torch2ebm.convert(Masked(), nodes="op", example_inputs=torch.randn(4, 4))
    assert [node.description for node in model.nodes.values()] == ["Linear", "masked_fill > softmax"]
