"""How far errors reach: steps to every level, nodes that pass nothing on, nodes and parameters without a gradient."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch2ebm.engine.call import Call
from torch2ebm.engine.reverse_sweep import reverse_sweep
from torch2ebm.engine.signal import steps_to_reach
from torch2ebm.graph.energy_graph import EnergyGraph, Node
from torch2ebm.loss.output_loss import OutputLoss

FEWEST = 8  # samples from which on units that are zero in all of them are told


@dataclass(frozen=True)
class Reach:
    """What stands in the way of errors on one batch.

    Attributes:
        dead: Nodes whose derivative is zero in everything: in the values that they read, and in their parameters.
        zeros: Nodes whose value is zero everywhere, but not dead.
        idle: Node to the share of its units that are zero in every sample, where that is at least a half.
        unreached: Nodes that backprop's error does not reach, or reaches as exact zeros.
    """

    dead: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    idle: tuple[tuple[str, float], ...] = ()
    unreached: tuple[str, ...] = ()


def steps_to_reach_all(graph: EnergyGraph, slots: Collection[str]) -> int:
    """Steps of descent on values until an error has come to every node: the longest of the shortest paths.

    Args:
        graph: Of the call.
        slots: The outputs that the loss depends on.
    """
    return max(steps_to_reach(graph, slots).values(), default=0)


def reach_of(call: Call, loss: OutputLoss) -> Reach:
    """Look at the feed-forward pass of a call that has kept its graph."""
    dead, zeros, idle = [], [], []
    for node in call.graph.nodes.values():
        values = [call.values[slot].detach() for slot in node.slots]
        if _passes_nothing(call, node):
            dead.append(node.name)
        elif all(value.numel() and not bool(value.any()) for value in values):
            zeros.append(node.name)
        elif not node.is_output and (share := _idle_units(values, call.batch_size)) >= 0.5:
            idle.append((node.name, share))
    deltas = reverse_sweep(call, loss.delivered, retain_graph=True).deltas
    unreached = [
        node.name
        for node in call.graph.hidden_nodes
        if not any(slot in deltas and bool(deltas[slot].any()) for slot in node.slots)
    ]
    return Reach(tuple(dead), tuple(zeros), tuple(idle), tuple(unreached))


def _passes_nothing(call: Call, node: Node) -> bool:
    """Whether no direction of its prediction depends on anything, by its products with a random one."""
    with torch.enable_grad():
        evaluated = call.evaluate(node, [call.values[slot].detach().requires_grad_() for slot in node.reads])
    trained = [call.parameters[name] for name in node.parameters if call.parameters[name].requires_grad]
    wrt = [*evaluated.inputs, *trained]
    if not wrt:
        return False
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(p.shape, generator=generator).to(p) for p in evaluated.predictions]
    return not any(product is not None and bool(product.any()) for product in evaluated.pullback(cotangents, wrt))


def _idle_units(values: list[Tensor], batch_size: int) -> float:
    shares = [
        float((value == 0).all(0).double().mean())
        for value in values
        if batch_size >= FEWEST and value.ndim > 1 and len(value) == batch_size
    ]
    return max(shares, default=0.0)


def without_gradient(gradients: Mapping[str, Tensor | None]) -> tuple[str, ...]:
    """The parameters whose gradient is missing, or an exact zero in every entry."""
    return tuple(name for name, each in gradients.items() if each is None or not bool(each.any()))
