"""What the names in a question stand for: nodes, inputs and outputs, as slots of the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from torch2ebm.common.known_names import unknown_name
from torch2ebm.errors import ConfigurationError
from torch2ebm.graph.energy_graph import EnergyGraph, identity

INPUT, OUTPUT = "input", "output"
Value = TypeVar("Value")


def output_names(output: Any, prefix: str = "") -> Iterator[str]:
    """A name for each leaf of what a model returns, in the order of ``leaves_of``: keys, fields, ``output_0``."""
    parts: list[tuple[str, Any]]
    if isinstance(output, (tuple, list)) and not isinstance(output, torch.Size):
        names = getattr(output, "_fields", None) or [f"{OUTPUT}_{i}" for i in range(len(output))]
        parts = list(zip(names, output, strict=False))
    elif isinstance(output, Mapping):
        parts = [(str(key), part) for key, part in output.items()]
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        parts = [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    else:
        yield prefix or OUTPUT
        return
    for name, part in parts:
        yield from output_names(part, f"{prefix}.{name}" if prefix else name)


@dataclass(frozen=True, eq=False)
class Places:
    """The slots that names stand for.

    Attributes:
        graph: Whose they are.
        inputs: Name of a free input to the name of its node; ``"input"`` too where there is one input.
        fixed: Names of inputs that are given as they are, and have no node.
        outputs: Name of each leaf of the output to its slot; ``"output"`` too where there is one.
    """

    graph: EnergyGraph
    inputs: Mapping[str, str]
    fixed: frozenset[str]
    outputs: Mapping[str, str]

    @staticmethod
    def of(graph: EnergyGraph, output: Any, inputs: Mapping[str, str], fixed: frozenset[str]) -> Places:
        named = {
            name: _followed(graph, reference.slot)
            for name, reference in zip(output_names(output), graph.outputs, strict=False)
            if reference.slot is not None
        }
        if len(named) == 1:
            named = {**named, OUTPUT: next(iter(named.values()))}
        return Places(graph, inputs, fixed, named)

    @property
    def also(self) -> dict[str, str]:
        """Further names of nodes of one value: those of inputs and outputs, to the node's own."""
        graph, found = self.graph, dict(self.inputs)
        for name, slot in self.outputs.items():
            if len(graph.owner[slot].slots) == 1:
                found.setdefault(name, graph.owner[slot].name)
        return {name: node for name, node in found.items() if name not in graph.nodes}

    def by_node(self, where: str, named: Mapping[str, Value]) -> dict[str, Value]:
        """What is given by any name, by the node's own. Raises :class:`ConfigurationError` for a node named twice."""
        also, found = self.also, dict[str, Value]()
        for name, value in named.items():
            node = also.get(name, name)
            if node in found:
                raise ConfigurationError(
                    where, f"{name!r} for the node {node!r}, which is named too", "each node once", "Leave one out."
                )
            found[node] = value
        return found

    def slots(self, where: str, name: str) -> tuple[str, ...]:
        """The slots of a name.

        Raises:
            UnknownNameError: for a name that nothing has.
            ConfigurationError: for an input that has no node, since it is given as a whole.
        """
        nodes = self.graph.nodes
        if name in nodes:
            return nodes[name].slots if not _is_follower(self.graph, name) else tuple(nodes[name].reads)
        if name in self.inputs:
            return nodes[self.inputs[name]].slots
        if name in self.outputs:
            return (self.outputs[name],)
        if name in self.fixed:
            raise ConfigurationError(
                where,
                f"{name!r}, an input that is given to the call itself",
                "an input that is free, wholly or in part, or the name of a node",
                f"Pass it to the call, and a mask or free=[{name!r}] where it may move.",
            )
        raise unknown_name(where, name, [*nodes, *self.inputs, *self.outputs])


def _is_follower(graph: EnergyGraph, name: str) -> bool:
    """Whether a node only shows the value of another one: an output that is read inside, too."""
    node = graph.nodes[name]
    return node.function is identity and len(node.reads) == 1


def _followed(graph: EnergyGraph, slot: str) -> str:
    node = graph.owner[slot]
    return node.reads[0] if _is_follower(graph, node.name) else slot
