"""A mapping over the nodes of a graph, each entry computed when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from torch2ebm.common.known_names import unknown_name
from torch2ebm.common.text import listed
from torch2ebm.graph.energy_graph import EnergyGraph


class PerNode(Mapping[str, Any]):
    """Node name to tensor (a tuple of tensors for a node of several slots), computed when asked for."""

    # By function and not as a dict: a value is a sum of two tensors, which most users never read.
    def __init__(self, graph: EnergyGraph, of_slot: Callable[[str], Tensor]) -> None:
        self._graph, self._of_slot = graph, of_slot

    def __getitem__(self, name: str) -> Any:
        if name not in self._graph.nodes:
            raise unknown_name("model.state", name, self._graph.nodes)
        found = tuple(self._of_slot(slot) for slot in self._graph.nodes[name].slots)
        return found[0] if len(found) == 1 else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._graph.nodes)

    def __len__(self) -> int:
        return len(self._graph.nodes)

    def __repr__(self) -> str:
        return f"PerNode({listed(list(self))})"
