"""The Hopfield-type energy of a graph that is cut around its activations, and what has none.

E = sum_n c_n [G_n(s_n) - <s_n, a_n(s_pa)>] with a state s_n at each activation, a_n its pre-activation, G_n' the
inverse of the activation and c_n = feedback^depth(n) (Scellier and Bengio 2017). The parameters are the module's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from torch2ebm.activations import activation_kind, operation_name
from torch2ebm.errors import NoEquilibriumError, PartitionError
from torch2ebm.graph import EnergyGraph, Node, Operation, identity

_NORMALISATIONS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)
_NORMALISING = frozenset(["layer_norm", "group_norm", "rms_norm", "instance_norm"])
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_WHOLE_NUMBERS = frozenset(["round", "floor", "ceil", "trunc", "sign", "heaviside", "argmax", "argmin", "one_hot"])
_MAX_POOLS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)
_WATCHED_MODULES = (*_MAX_POOLS, nn.Softmax, nn.MultiheadAttention)
_WATCHED = ("max_pool", "adaptive_max_pool", "softmax", "scaled_dot_product_attention", "multi_head_attention")


@dataclass(frozen=True, eq=False)
class State:
    """A value that relaxes: s = activation(drive).

    Attributes:
        slot: The slot of the graph whose value it is.
        name: The node's.
        source: The slot of its pre-activation, where that is another one.
        activation: The node that is the activation; None for the identity.
        depth: Longest path from the inputs, in states.
        kind: Name of the activation.
    """

    slot: str
    name: str
    source: str
    activation: Node | None
    depth: int
    kind: str = "identity"


@dataclass(frozen=True, eq=False)
class Term:
    """Pre-activations that one node computes from states; ``states`` has the slot of one state a slot of the node."""

    node: Node
    states: tuple[str, ...]


class HopfieldGraph:
    """States, the terms <s_n, a_n(s_pa)> of Phi, and where the loss acts.

    Attributes:
        states: By slot, in topological order.
        terms: Those that depend on states.
        fixed: Those whose pre-activations depend on clamped inputs alone.
        outputs: Slot of the model's output -> slot of the state that it is.
        readouts: Nodes whose prediction the loss reads and that have no state: outputs without parameters (a softmax or
            a loss after the last layer), and all outputs if the read-out is to be outside of the states.
        output_depth: Depth of c_o, which multiplies the loss.

    Raises:
        PartitionError: where an activation is part of a larger node.
        NoEquilibriumError: where a part of the module has no equilibrium, all such parts at once.
    """

    def __init__(self, graph: EnergyGraph, readout: bool = False) -> None:
        self.graph = graph
        _check_cut(graph)
        refuse(graph)
        aliases = {n.name: n for n in graph.output_nodes if n.function is identity and not n.operations}
        self.nodes = [node for node in graph.nodes.values() if node.name not in aliases]
        self.fused = self._fused(aliases)
        self.readouts = self._checked(aliases) if readout else self._without_parameters(aliases)
        self._read_out = {slot for node in self.readouts for slot in node.slots}
        self.states: dict[str, State] = {}
        terms = [term for node in self.nodes if (term := self._term(node)) is not None]
        self.terms = tuple(term for term in terms if term.node.reads)
        self.fixed = tuple(term for term in terms if not term.node.reads)
        self.outputs = {s: self._state_of(s, aliases) for s in graph.output_slots if s not in self._read_out}
        self.output_depth = max(self.states[slot].depth for slot in self.nudged())
        self.watched = {node.name: name for node in self.nodes if (name := next(_watched(node), "")) and node.reads}

    def _fused(self, aliases: Mapping[str, Node]) -> dict[str, Node]:
        """Slot of a pre-activation that its activation alone reads -> the activation."""
        readers: dict[str, list[Node]] = {}
        for node in self.graph.nodes.values():
            for slot in node.reads:
                readers.setdefault(slot, []).append(node)
        return {
            slot: nodes[0]
            for slot, nodes in readers.items()
            if len(nodes) == 1
            and nodes[0].name not in aliases
            and is_activation(nodes[0])
            and not is_activation(self.graph.owner[slot])
            and slot not in self.graph.output_slots
        }

    def _term(self, node: Node) -> Term | None:
        """Register the states that the node makes; the term of Phi that it computes, if it does."""
        if not self._read_out.isdisjoint(node.slots):
            return None
        if is_activation(node):
            (source,) = node.reads
            if source in self.fused:
                return None
            self._add(State(node.slots[0], node.name, node.slots[0], node, self._depth([source]), kind_of(node)))
            read = Node(f"{node.name}.read", (), (), identity, {}, 0, (f"{source}.read",), (source,))
            return Term(read, (node.slots[0],))
        for slot in node.slots:
            activation = self.fused.get(slot)
            if activation is None:
                self._add(State(slot, node.name, slot, None, self._depth(node.reads)))
            else:
                made = activation.slots[0]
                kind = kind_of(activation)
                self._add(State(made, activation.name, slot, activation, self._depth(node.reads), kind))
        return Term(node, tuple(self._made(slot) for slot in node.slots))

    def _made(self, slot: str) -> str:
        return self.fused[slot].slots[0] if slot in self.fused else slot

    def _add(self, state: State) -> None:
        self.states[state.slot] = state

    def _depth(self, reads: Sequence[str]) -> int:
        return max((self.states[slot].depth + 1 for slot in reads), default=0)

    def _state_of(self, slot: str, aliases: Mapping[str, Node]) -> str:
        owner = self.graph.owner[slot]
        return owner.reads[0] if owner.name in aliases else slot

    def _without_parameters(self, aliases: Mapping[str, Node]) -> tuple[Node, ...]:
        nodes = [node for node in self.graph.output_nodes if node.name not in aliases]
        return tuple(node for node in nodes if node.reads and not node.parameters and not is_activation(node))

    def _checked(self, aliases: Mapping[str, Node]) -> tuple[Node, ...]:
        found = tuple(self.graph.output_nodes)
        for node in found:
            if node.name in aliases or not node.reads or is_activation(node):
                raise PartitionError(
                    f"readout=True, output '{node.name}'",
                    "an output that goes on through the model, is an activation, or depends on no state",
                    "one that a parameterised operation reads out of the states",
                    "Leave readout=False, or put the last activation into the loss.",
                )
        return found

    def nudged(self) -> frozenset[str]:
        """Slots of the states that the loss acts on."""
        return frozenset([*self.outputs.values(), *(slot for node in self.readouts for slot in node.reads)])

    @cached_property
    def colours(self) -> list[frozenset[str]]:
        """Groups of states none of which reads another of its group: what may move together, first fit."""
        neighbours: dict[str, set[str]] = {slot: set() for slot in self.states}
        for term in self.terms:
            group = {*term.states, *term.node.reads}
            for slot in group:
                neighbours[slot] |= group - {slot}
        groups: list[set[str]] = []
        for slot in self.states:
            free = next((group for group in groups if group.isdisjoint(neighbours[slot])), None)
            if free is None:
                groups.append({slot})
            else:
                free.add(slot)
        return [frozenset(group) for group in groups]


def is_activation(node: Node) -> bool:
    """Whether the node is an activation and nothing else."""
    if len(node.operations) != 1 or len(node.reads) != 1 or node.parameters or len(node.slots) != 1:
        return False
    return activation_kind(node.operations[0].target) is not None and not node.constants


def kind_of(node: Node) -> str:
    return activation_kind(node.operations[0].target) or ""


# What has no equilibrium ----------------------------------------------------------------------------------------------


def _check_cut(graph: EnergyGraph) -> None:
    """The nodes must be cut around the activations: inside a larger node one could not be told from the rest."""
    for node in graph.nodes.values():
        larger = [operation for operation in node.operations if activation_kind(operation.target)]
        if node.reads and larger and not is_activation(node) and not _cut_by_partition(node, larger):
            raise PartitionError(
                f"node '{node.name}' ({node.description})",
                "a node with an activation inside",
                "nodes that are cut around the activations",
                "Convert with nodes='auto', which asks the algorithm, or with nodes='activation'.",
            )
        for operation in node.operations:
            if isinstance(operation.target, nn.Module) and not _is_known(operation.target):
                raise PartitionError(
                    f"node '{node.name}'",
                    f"a {type(operation.target).__name__} kept whole, whose activations cannot be seen",
                    "nodes that are cut around the activations",
                    "Convert with nodes='auto', or with nodes='activation'.",
                )


def _cut_by_partition(node: Node, larger: Sequence[Operation]) -> bool:
    """An activation of what no state feeds, or with tensors for bounds, is no state but part of a pre-activation."""
    return not node.reads or bool(node.constants)


def _is_known(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def refuse(graph: EnergyGraph) -> None:
    """Raise :class:`NoEquilibriumError` with every part of the module that a relaxation cannot settle."""
    found = [problem for node in graph.nodes.values() for problem in _problems(node)]
    if found:
        raise NoEquilibriumError(
            "equilibrium of the module",
            "; ".join(dict.fromkeys(found)),
            "parts with an energy: linear maps, convolutions, pooling, sums, activations without parameters",
            "Use model.eval() for batch norm and dropout, leave the part out, or take PredictiveCoding, whose values "
            "need no equilibrium of the module.",
        )


def _problems(node: Node) -> Iterator[str]:
    if node.random:
        yield f"'{node.name}' ({node.description}) draws random numbers, so each step would have another energy"
    if node.batch_statistics:
        yield f"'{node.name}' ({node.description}) normalises by the batch, whose statistics move with the states"
    for operation in node.operations:
        yield from _problem(node, operation)


def _problem(node: Node, operation: Operation) -> Iterator[str]:
    target, name = operation.target, operation_name(operation.target)
    if isinstance(target, _RECURRENT):
        yield f"'{operation.name}' ({type(target).__name__}) has a state and an order in time of its own"
    elif isinstance(target, nn.PReLU) or name == "prelu":
        yield f"'{operation.name}' (PReLU) is an activation with parameters, whose share the energy would miss"
    elif node.reads and (isinstance(target, _NORMALISATIONS) or name in _NORMALISING):
        label = type(target).__name__ if isinstance(target, nn.Module) else name
        yield f"'{operation.name}' ({label}) normalises each sample by its own states, and does not settle in a loop"
    elif node.reads and name in _WHOLE_NUMBERS:
        yield f"'{operation.name}' ({name}) makes whole numbers of states, through which no feedback comes"


def _watched(node: Node) -> Iterator[str]:
    """Operations that may settle or not: max-pooling and softmax."""
    for operation in node.operations:
        name = operation_name(operation.target)
        if isinstance(operation.target, _WATCHED_MODULES) or (
            not isinstance(operation.target, nn.Module) and name.startswith(_WATCHED)
        ):
            yield operation.name
