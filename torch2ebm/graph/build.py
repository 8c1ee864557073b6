"""From groups of operations to an :class:`EnergyGraph`: one compiled function a node, one for the static part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from torch2ebm.capture.functions import hung_on_autograd
from torch2ebm.capture.in_place import called_by
from torch2ebm.capture.observation import Capture
from torch2ebm.capture.run import Run
from torch2ebm.common.nested import leaves_of
from torch2ebm.errors import PartitionError
from torch2ebm.graph.cuts import cuts_of, draws_of
from torch2ebm.graph.energy_graph import EnergyGraph, Node, Operation, OutputReference, identity
from torch2ebm.graph.generated import function_of
from torch2ebm.graph.granularity import Granularity
from torch2ebm.graph.naming import described, name_of, operation_name, unique_name
from torch2ebm.graph.operations import parameters_of
from torch2ebm.graph.partition import Group, Partition
from torch2ebm.graph.roles import Roles, assign_roles
from torch2ebm.isolation.random_numbers import drawn_from

_GROUP_NORMS = (functional.group_norm, torch.group_norm, torch.ops.aten.group_norm.default)


def build_graph(capture: Capture, granularity: Granularity) -> EnergyGraph:
    """Cut a captured graph in value nodes.

    Raises :class:`PartitionError` where no output depends on a parameter, or a value is no floating point tensor.
    """
    roles = assign_roles(capture)
    partition = Partition(capture, roles, granularity)
    return _Assembly(capture, roles, partition.groups()).graph()


class _Assembly:
    def __init__(self, capture: Capture, roles: Roles, groups: Sequence[Group]) -> None:
        self.capture, self.roles, self.groups = capture, roles, groups
        self.position = {node: i for i, node in enumerate(capture.graph.nodes)}
        self.group_of = {node: i for i, group in enumerate(groups) for node in group.members}
        self.names_of_parameters = {id(p): name for name, p in capture.module.named_parameters()}
        self.returned = list(next(n for n in capture.graph.nodes if n.op == "output").all_input_nodes)
        self._assign_once()
        self.core = [self._with_repeated(group.members) for group in groups]
        self.body = [
            core | self._with_repeated(n for n in roles.once if self.group_of[n] == i)
            for i, core in enumerate(self.core)
        ]
        self._assign_results()
        self.later_draws = [self._later_draws(body) for body in self.body]

    def _assign_once(self) -> None:
        """What the feed-forward pass fixes is computed in the last of the groups that it needs."""
        for node in self.roles.once:
            self.group_of[node] = max(self.group_of[source] for source in self._computed_sources(node))

    def _computed_sources(self, node: fx.Node) -> Iterator[fx.Node]:
        for source in node.all_input_nodes:
            if source in self.group_of:
                yield source
            elif source in self.roles.repeated:
                yield from self._computed_sources(source)

    def _with_repeated(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        found = set(nodes)
        pending = list(found)
        while pending:
            for source in pending.pop().all_input_nodes:
                if source in self.roles.repeated and source not in found:
                    found.add(source)
                    pending.append(source)
        return found

    def _assign_results(self) -> None:
        """Slots: what is read as a value by another group. Exports: what is read as a constant."""
        self.slots: list[list[fx.Node]] = [[] for _ in self.groups]
        self.exports: list[list[fx.Node]] = [[] for _ in self.groups]
        for i, body in enumerate(self.body):
            for node in self._sorted(body):
                for source in node.all_input_nodes:
                    if self.group_of.get(source, i) != i:
                        read_as_value = source in self.roles.live and node in self.core[i]
                        _add(self.slots if read_as_value else self.exports, self.group_of[source], source)
        self.read = [bool(slots) for slots in self.slots]
        self.read_slots = [list(slots) for slots in self.slots]
        for node in self.returned:
            if node in self.group_of:
                _add(self.slots if node in self.roles.live else self.exports, self.group_of[node], node)

    def _later_draws(self, body: Iterable[fx.Node]) -> dict[fx.Node, tuple[str, int]]:
        """The draws of a node but its first: the name of the generators' state before each, and its operation.

        Between two of them forward may draw for others: each is wound back on its own.
        """
        operations = self.capture.trace.operations
        draws = [n for n in self._sorted(body) if n in operations and self.capture.facts[n].random]
        return {node: (f"{node.name}.generators", operations[node]) for node in draws[1:]}

    def _sorted(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return sorted(nodes, key=self.position.__getitem__)

    # nodes

    def graph(self) -> EnergyGraph:
        taken: set[str] = set()
        nodes: list[Node] = []
        names: list[str] = []
        output_slot: dict[fx.Node, str] = {}
        for i, group in enumerate(self.groups):
            node = self._node(i, unique_name(name_of(group, self.capture.module, self.roles), taken))
            nodes.append(node)
            names.append(node.name)
            for operation in self.slots[i]:
                self._check_value(node, operation)
                if operation not in self.returned:
                    continue
                output_slot[operation] = operation.name
                if self.read[i]:  # a returned value that others read keeps its value: an output of its own follows it
                    slot = output_slot[operation] = f"{operation.name}.output"
                    name = unique_name(f"{node.name}.output", taken)
                    nodes.append(
                        Node(name, (), (), identity, {}, 0, (slot,), (operation.name,), description="identity")
                    )
        if not output_slot:
            raise PartitionError(
                f"torch2ebm.convert({type(self.capture.module).__name__})",
                "no output that depends on a parameter",
                "at least one",
                "A model without parameters has nothing to learn; check that forward uses them.",
            )
        outputs = self._outputs(output_slot)
        buffers = self.capture.run.changed_buffers
        bodies = {name: self._sorted(body) for name, body in zip(names, self.body, strict=True)}
        shapes = {operation.name: self.capture.facts[operation].shape for slots in self.slots for operation in slots}
        shapes |= {slot: shapes[operation.name] for operation, slot in output_slot.items()}
        return EnergyGraph(
            self.capture.module,
            nodes,
            self._clamp(),
            outputs,
            buffers,
            shapes,
            self._inputs(),
            cuts_of(
                self.capture,
                self.roles,
                bodies,
                {node: name for name, slots in zip(names, self.slots, strict=True) for node in slots},
                [
                    node
                    for slots, read in zip(self.slots, self.read_slots, strict=True)
                    for node in slots
                    if node in read
                ],
                {node: self._name_of_export(node) for exports in self.exports for node in exports},
            ),
            tuple(self.capture.trace.constants),
            self.capture.held,
            self.capture.run.opaque,
            {name: draws[0] for name, body in bodies.items() if (draws := draws_of(self.capture, body))},
        )

    def _name_of_export(self, node: fx.Node) -> str:
        return f"{node.name}.fixed" if node in self.roles.live else node.name

    def _inputs(self) -> dict[str, tuple[str, ...]]:
        """What is made of the input tensors' contents, not of their shapes alone, and of which."""
        found: dict[fx.Node, tuple[str, ...]] = {}
        made_of = map(tuple, map(sorted, self.capture.run.origins))
        origins = dict(zip(self.capture.trace.constants, made_of, strict=True))
        for node in self.capture.graph.nodes:
            fact = self.capture.facts.get(node)
            if node.op == "placeholder":
                found[node] = origins.get(node.name, ())
            elif node not in self.roles.live and fact is not None and (fact.tensor or fact.data):
                found[node] = tuple(dict.fromkeys(n for s in node.all_input_nodes for n in found.get(s, ())))
        return {node.name: names for node, names in found.items() if names}

    def _node(self, i: int, name: str) -> Node:
        body, core = self._sorted(self.body[i]), self._sorted(self.core[i])
        external = [source for node in body for source in node.all_input_nodes if source not in self.body[i]]
        values = [
            source
            for source in dict.fromkeys(external)
            if source in self.roles.live and any(source in node.all_input_nodes for node in core)
        ]
        constants = [s for s in dict.fromkeys(external) if s not in values and s.op != "get_attr"]
        fixed = {s: self._name_of_export(s) for s in (*constants, *self.exports[i])}
        results = [*self.slots[i], *self.exports[i]]
        facts = self.capture.facts
        return Node(
            name,
            parents=(),
            children=(),
            function=self._compiled(name, [*values, *constants], body, results, self.later_draws[i]),
            parameters=self._parameters(body),
            level=0,
            slots=tuple(node.name for node in self.slots[i]),
            reads=tuple(node.name for node in values),
            constants=(*(fixed[node] for node in constants), *(state for state, _ in self.later_draws[i].values())),
            exports=tuple(fixed[node] for node in self.exports[i]),
            random=any(facts[node].random for node in body),
            batch_statistics=any(facts[node].batch_statistics for node in body),
            group_norm=any(_needs_input_gradients(self._called(node).target) for node in body),
            description=described(self._sorted(self.groups[i].members), self.capture.module, self.roles),
            operations=tuple(self._called(node) for node in core),
        )

    def _called(self, node: fx.Node) -> Operation:
        return Operation(operation_name(node, self.capture.module), node.target)

    def _compiled(
        self,
        name: str,
        arguments: Sequence[fx.Node],
        body: Sequence[fx.Node],
        results: Sequence[fx.Node],
        wound_back: Mapping[fx.Node, tuple[str, int]] = MappingProxyType({}),
    ) -> Callable[..., Any]:
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in arguments}
        states = {node: graph.placeholder(f"{node.name}_generators") for node in wound_back}
        for node in body:
            for source in node.all_input_nodes:
                if source.op == "get_attr" and source not in copies:
                    copies[source] = graph.node_copy(source)
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node in states:
                copies[node] = _wound_back(copies[node], states[node])
        for node in results:
            if node.op == "get_attr" and node not in copies:
                copies[node] = graph.node_copy(node)
        graph.output(tuple(copies[node] for node in results))
        return function_of(graph, self.capture.module, name)

    def _parameters(self, body: Iterable[fx.Node]) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for node in body:
            for parameter in parameters_of(node, self.capture.module):
                found[self.names_of_parameters[id(parameter)]] = parameter
        return found

    def _check_value(self, node: Node, operation: fx.Node) -> None:
        if not self.capture.facts[operation].tensor:
            raise PartitionError(
                f"node '{node.name}'",
                f"a result of {operation.format_node()} that is no tensor",
                "tensors, tuples, lists or dicts of them",
                "Make the submodule that uses it one node: nodes=[...].",
            )

    # the rest of the model

    def _clamp(self) -> Callable[[Run], dict[str, Any]]:
        body = self._sorted({*self.roles.static, *self._with_repeated(self._returned_static())})
        read = {source for group in self.body for node in group for source in node.all_input_nodes} | set(self.returned)
        results = [n for n in body if n in read] + [n for n in self.returned if n.op == "get_attr"]
        placeholders = [node for node in self.capture.graph.nodes if node.op == "placeholder"]
        function = self._compiled("static", placeholders, body, results)
        states = [state for draws in self.later_draws for state in draws.values()]

        def clamp(run: Run) -> dict[str, Any]:
            arguments = self.capture.inputs(run)
            environment = {node.name: argument for node, argument in zip(placeholders, arguments, strict=True)}
            environment.update({name: run.random.get(i) for name, i in states})
            if body or results:
                environment.update(zip([node.name for node in results], function(*arguments), strict=True))
            return environment

        return clamp

    def _returned_static(self) -> list[fx.Node]:
        return [node for node in self.returned if node in self.roles.repeated]

    def _outputs(self, output_slot: dict[fx.Node, str]) -> tuple[OutputReference, ...]:
        output = next(node for node in self.capture.graph.nodes if node.op == "output")
        references = []
        for leaf in leaves_of(output.args[0]):
            if leaf in output_slot:
                references.append(OutputReference(slot=output_slot[leaf]))
            elif isinstance(leaf, fx.Node):
                references.append(OutputReference(constant=leaf.name))
            else:
                references.append(OutputReference(literal=leaf))
        return tuple(references)


def _add(results: list[list[fx.Node]], index: int, node: fx.Node) -> None:
    if node not in results[index]:
        results[index].append(node)


def _needs_input_gradients(target: Any) -> bool:
    """Group norms, for a fault of torch (see :meth:`NodePass.pullback`), and backward hooks, which are given them."""
    opaque = getattr(target, "opaque_module", None)
    if opaque is not None:
        return any(isinstance(part, nn.GroupNorm) or hung_on_autograd(part) for part in opaque.modules())
    return target in _GROUP_NORMS


def _wound_back(draw: fx.Node, state: fx.Node) -> fx.Node:
    """The draw from the generators as the run had them before it."""
    graph = draw.graph
    with graph.inserting_before(draw):
        found = graph.call_function(drawn_from(called_by(draw)), (state, *draw.args), draw.kwargs)
    graph.erase_node(draw)
    return found
