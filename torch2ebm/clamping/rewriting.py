"""An energy graph in which some values are given: their readers read the data, and their predictions are outputs.

A clamp has no direction. Where the value of a node is given, nothing moves there: its children read what is given, and
its own prediction is held against that, as an output is against a target. So a clamped graph is a graph like any
other, and every solver relaxes it::

    x -> a -> b -> c -> output          b clamped to y:          x -> a -> b    (an output, phi(y, b))
                                                                 y -> c -> output
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch

from torch2ebm.clamping.pattern import Pattern, data_name, given_name, mask_name, value_name
from torch2ebm.errors import ConfigurationError
from torch2ebm.graph.energy_graph import EnergyGraph, Node, OutputReference, identity

Take = Callable[[Sequence[Any]], Any]  # one argument of a node's function, from what the rewritten node is given


def clamped_graph(graph: EnergyGraph, pattern: Pattern) -> EnergyGraph:
    """The graph under a pattern of clamps; the same one where nothing changes but the loss.

    Raises:
        ConfigurationError: where tied values would have to be known before themselves.
    """
    return graph.once(("clamped", pattern.kind), lambda: _Rewriting(graph, pattern).graph())


def is_prediction(graph: EnergyGraph, pattern: Pattern, node: Node) -> bool:
    """Whether a node has no value, here as in the graph itself: what is given acts on its prediction."""
    return node.name not in graph.nodes or (graph.nodes[node.name].is_output and pattern.carried.isdisjoint(node.slots))


def place_of_data(graph: EnergyGraph, pattern: Pattern, slot: str) -> str:
    """The slot of the rewritten graph whose prediction is held against what is given for a slot."""
    node = graph.owner[slot]
    apart = is_prediction(graph, pattern, node) or all(map(pattern.is_whole, node.slots))
    return slot if apart else data_name(slot)


@dataclass(frozen=True, eq=False)
class _Redirected:
    """A node's function, whose arguments come from elsewhere; further arguments are handed on as results."""

    function: Callable[..., Any]
    takes: tuple[Take, ...]
    handed_on: tuple[Take, ...] = ()
    slots: int = 0

    def __call__(self, *arguments: Any) -> Any:
        found = self.function(*[take(arguments) for take in self.takes])
        if not self.handed_on:
            return found
        found = found if isinstance(found, tuple) else (found,)
        return (*found[: self.slots], *(take(arguments) for take in self.handed_on), *found[self.slots :])


class _Rewriting:
    def __init__(self, graph: EnergyGraph, pattern: Pattern) -> None:
        self.original, self.pattern = graph, pattern
        self.outputs = list(graph.outputs)
        self.draws = dict(graph.draws)

    def graph(self) -> EnergyGraph:
        order: list[Node] = []
        for node in self.original.order:
            order += self._rewritten(node)
        original = self.original
        return EnergyGraph(
            original.module,
            self._sorted(order),
            original.clamp,
            tuple(self.outputs),
            original.changing_buffers,
            inputs=original.inputs,
            constants=original.constants,
            held=original.held,
            opaque=original.opaque,
            draws=self.draws,
        )

    def _rewritten(self, node: Node) -> list[Node]:
        pattern, read = self.pattern, self._reading(node)
        tied = [slot for slot in node.slots if slot in pattern.ties]
        if is_prediction(self.original, pattern, node):
            return [self._with_ties(read, tied)]
        data = [slot for slot in node.slots if pattern.is_data(slot)]
        if not data:
            return [read, *self._carried(read)]
        if all(map(pattern.is_whole, node.slots)):  # nothing of it is left to move
            self.outputs += [OutputReference(slot=slot) for slot in data]
            return [self._with_ties(read, tied)]
        copy = replace(
            read,
            name=data_name(read.name),
            slots=tuple(map(data_name, read.slots)),
            exports=tuple(map(data_name, read.exports)),
        )
        if node.name in self.draws:
            self.draws[copy.name] = self.draws[node.name]
        self.outputs += [OutputReference(slot=data_name(slot)) for slot in data]
        return [read, self._with_ties(copy, tied), *self._carried(read)]

    def _carried(self, node: Node) -> list[Node]:
        """Outputs that get a value: an output of its own follows each."""
        found = []
        for slot in node.slots:
            if slot in self.pattern.carried:
                follower = f"{slot}|output"
                found.append(
                    Node(follower, (), (), identity, {}, 0, (follower,), (slot,), description="identity"),
                )
                self.outputs = [replace(o, slot=follower) if o.slot == slot else o for o in self.outputs]
        return found

    def _with_ties(self, node: Node, tied: Sequence[str]) -> Node:
        """The node with the values that its predictions are held against among its own predictions."""
        if not tied:
            return node
        others = [self.pattern.ties[slot] for slot in tied]
        reads = (*node.reads, *(other for other in dict.fromkeys(others) if other not in node.reads))
        shift = len(reads) - len(node.reads)
        own = len(node.reads)
        takes = [_take(i if i < own else i + shift) for i in range(own + len(node.constants))]
        values = tuple(value_name(slot) for slot in tied)
        self.outputs += [OutputReference(slot=value) for value in values]
        return replace(
            node,
            function=_Redirected(
                node.function, tuple(takes), tuple(_take(reads.index(o)) for o in others), len(node.slots)
            ),
            reads=reads,
            slots=(*node.slots, *values),
        )

    def _reading(self, node: Node) -> Node:
        """The node with data in the place of the clamped values that it reads."""
        pattern = self.pattern
        if not any(pattern.is_data(slot) for slot in node.reads):
            return node
        sources = [pattern.ties.get(slot, slot) for slot in node.reads if not self._is_given(slot)]
        reads = tuple(dict.fromkeys(sources))
        given = dict.fromkeys(slot for slot in node.reads if slot in pattern.given)
        more = [name for slot in given for name in self._names(slot)]
        constants = (*node.constants, *more)
        places: Mapping[str, int] = {name: len(reads) + i for i, name in enumerate(constants)}
        takes = [self._take(slot, reads, places) for slot in node.reads]
        takes += [_take(len(reads) + i) for i in range(len(node.constants))]
        return replace(node, function=_Redirected(node.function, tuple(takes)), reads=reads, constants=constants)

    def _is_given(self, slot: str) -> bool:
        return slot in self.pattern.given and slot not in self.pattern.masks

    def _names(self, slot: str) -> list[str]:
        return [given_name(slot), mask_name(slot)] if slot in self.pattern.masks else [given_name(slot)]

    def _take(self, slot: str, reads: Sequence[str], places: Mapping[str, int]) -> Take:
        if self._is_given(slot):
            return _take(places[given_name(slot)])
        here = reads.index(self.pattern.ties.get(slot, slot))
        if slot not in self.pattern.masks:
            return _take(here)
        mask, given = places[mask_name(slot)], places[given_name(slot)]
        return lambda arguments: torch.where(arguments[mask], arguments[given], arguments[here])

    def _sorted(self, order: Sequence[Node]) -> list[Node]:
        """Parents before children: a tie may have turned two of them round."""
        if not self.pattern.ties:
            return list(order)
        owner = {slot: node.name for node in order for slot in node.slots}
        exporter = {name: node.name for node in order for name in node.exports}
        sorter = TopologicalSorter(
            {
                node.name: [
                    *(owner[slot] for slot in node.reads),
                    *(exporter[name] for name in node.constants if name in exporter),
                ]
                for node in order
            }
        )
        try:
            names = list(sorter.static_order())
        except CycleError as error:
            raise ConfigurationError(
                "clamp={node: the name of another node}",
                f"values that would have to be known before themselves: {' -> '.join(error.args[1])}",
                "two predictions of one value, neither of which is made of the other",
                "Tie other nodes.",
            ) from error
        by_name = {node.name: node for node in order}
        return [by_name[name] for name in names]


def _take(place: int) -> Take:
    return lambda arguments: arguments[place]
