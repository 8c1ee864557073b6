"""Nodes that are cut since somebody keeps a tensor from inside."""

from __future__ import annotations

from torch2ebm.graph.energy_graph import EnergyGraph, Node

DETACHED = "If your loss does not use it, keep tensor.detach(): the nodes then stay whole."


def cut_by_what_is_kept(graph: EnergyGraph, whole: EnergyGraph) -> list[str]:
    """The nodes of ``graph`` that are none of ``whole``, the graph of the same run if nobody kept anything."""
    known = {_outline(node) for node in whole.order}
    return [node.name for node in graph.order if node.operations and _outline(node) not in known]


def _outline(node: Node) -> tuple[str, ...]:
    return tuple(operation.name for operation in node.operations)
