"""The Hopfield-type energy of a graph whose nodes are cut around its activations.

E = sum_n c_n [G_n(s_n) - <s_n, a_n(s_pa)>] with a state s_n at each activation, a_n its pre-activation, G_n' the
inverse of the activation and c_n = feedback^depth(n) (Scellier and Bengio 2017). The parameters are the module's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch2ebm.equilibrium.refusals import check_cut, refuse, watched_operations
from torch2ebm.errors import PartitionError
from torch2ebm.graph.activations import is_activation, kind_of
from torch2ebm.graph.energy_graph import EnergyGraph, Node, identity


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
    """The pre-activations that one node computes; ``states`` names the state that each of its slots drives."""

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
        check_cut(graph)
        refuse(graph)
        # an output that returns a value as it is: the state is where that value is made
        aliases = {n.name: n for n in graph.output_nodes if n.function is identity and not n.operations}
        self.nodes = [node for node in graph.nodes.values() if node.name not in aliases]
        self.fused = self._fused(aliases)
        self.readouts = self._checked(aliases) if readout else self._without_parameters(aliases)
        self._read_out = {slot for node in self.readouts for slot in node.slots}
        self.states: dict[str, State] = {}
        # in topological order, which the depths need
        terms = [term for node in self.nodes if (term := self._term(node)) is not None]
        self.terms = tuple(term for term in terms if term.node.reads)
        self.fixed = tuple(term for term in terms if not term.node.reads)
        self.outputs = {s: self._state_of(s, aliases) for s in graph.output_slots if s not in self._read_out}
        # the deepest: c_o is the smallest weight of a nudged state, so that no nudge is scaled up by c_o / c_n
        self.output_depth = max(self.states[slot].depth for slot in self.nudged())
        self.watched = {
            node.name: name for node in self.nodes if (name := next(watched_operations(node), "")) and node.reads
        }

    def _fused(self, aliases: Mapping[str, Node]) -> dict[str, Node]:
        """The activation of each pre-activation that nothing else reads, by the slot of the pre-activation."""
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
            # an activation of an activation: the first is a state of its own
            and not is_activation(self.graph.owner[slot])
            and slot not in self.graph.output_slots  # the loss reads it
        }

    def _term(self, node: Node) -> Term | None:
        """Register the states that the node makes; return the term of Phi that it computes, None for no term."""
        if not self._read_out.isdisjoint(node.slots):
            return None
        if is_activation(node):
            (source,) = node.reads
            if source in self.fused:  # made with its pre-activation
                return None
            # its source is a state of its own, which the identity reads as this activation's pre-activation
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
        return max((self.states[slot].depth + 1 for slot in reads), default=0)  # longest path

    def _state_of(self, slot: str, aliases: Mapping[str, Node]) -> str:
        owner = self.graph.owner[slot]
        return owner.reads[0] if owner.name in aliases else slot

    def _without_parameters(self, aliases: Mapping[str, Node]) -> tuple[Node, ...]:
        nodes = [node for node in self.graph.output_nodes if node.name not in aliases]
        # a softmax after the last layer, for example: it has nothing to learn, so it needs no state
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
        # first fit in topological order: a chain gets two colours
        for slot in self.states:
            free = next((group for group in groups if group.isdisjoint(neighbours[slot])), None)
            if free is None:
                groups.append({slot})
            else:
                free.add(slot)
        return [frozenset(group) for group in groups]
