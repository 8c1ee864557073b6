"""How many floating-point operations strict predictive coding asks for, counted from the graph.

Every node is run once on its own, forward and back, under torch's formulas (``measure.flops``). How often each is
needed follows from the graph alone: an error reaches a node one step after its child, and what reads nothing but
clamped inputs never changes its prediction. No program of the library is run for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from measure import flops

import torch2ebm
from torch2ebm.engine.call import Call, NodePass
from torch2ebm.graph.energy_graph import EnergyGraph, Node


@dataclass(frozen=True)
class NodeCost:
    """Operations of one evaluation, of J^T to the node's inputs, and of J^T to its parameters."""

    forward: int
    to_inputs: int
    to_parameters: int


def node_costs(model: torch2ebm.EnergyModel, *inputs: torch.Tensor) -> dict[str, NodeCost]:
    """Of every node, for these inputs of the model."""
    call = model.torch2ebm.new_call(inputs, {})
    call.feedforward(keep_graph=False)
    return {node.name: _cost(call, node) for node in call.graph.nodes.values()}


def _cost(call: Call, node: Node) -> NodeCost:
    leaves = [call.values[slot].detach().requires_grad_() for slot in node.reads]
    parameters = [call.parameters[name] for name in node.parameters if call.parameters[name].requires_grad]
    passes: list[NodePass] = []

    def forward() -> None:
        with torch.enable_grad():
            passes.append(call.evaluate(node, leaves))

    counted = flops(forward)
    cotangents = [torch.ones_like(prediction) for prediction in passes[0].predictions]
    back = [
        flops(lambda wrt=wrt: passes[0].pullback(cotangents, wrt, retain_graph=True))  # type: ignore[misc]
        for wrt in (leaves, parameters)
    ]
    return NodeCost(counted, *back)


def strict_flops(graph: EnergyGraph, costs: Mapping[str, NodeCost], steps: int, wave_front: bool = True) -> int:
    """The feed-forward pass, ``steps`` sweeps, and the parameters' gradients at the values where they end.

    Without ``wave_front`` every node takes part in every sweep.
    """
    total = sum(cost.forward for cost in costs.values())
    hidden = {slot for node in graph.hidden_nodes for slot in node.slots}
    moved = set() if wave_front else hidden
    for _ in range(steps):
        running = _running(graph, moved)
        total += sum(costs[n.name].forward + costs[n.name].to_inputs for n in running if n.reads)
        moved = moved | {slot for node in running for slot in node.reads}
    return total + sum(costs[n.name].forward + costs[n.name].to_parameters for n in _running(graph, moved))


def _running(graph: EnergyGraph, moved: set[str]) -> list[Node]:
    """Outputs, and the nodes whose error is not exactly zero: their own value, or one that they read, has moved."""
    return [n for n in graph.nodes.values() if n.is_output or not moved.isdisjoint((*n.slots, *n.reads))]
