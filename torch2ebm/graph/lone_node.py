"""A graph with one node, on which there is nothing to relax."""

from __future__ import annotations

from torch2ebm.graph.energy_graph import EnergyGraph

ALONE = "it has every parameter, so there is no value that could relax, and predictive coding is backpropagation."
FINER = "Ask for finer nodes, for example torch2ebm.convert(net, nodes='op'), or convert a part of the module."


def lone_node(graph: EnergyGraph) -> str:
    """The node that has every parameter, where several modules have some; else an empty text."""
    owners = [node.name for node in graph.nodes.values() if node.parameters]
    modules = {name.rpartition(".")[0] for name in graph.parameters}
    return owners[0] if len(owners) == 1 and len(modules) > 1 else ""
