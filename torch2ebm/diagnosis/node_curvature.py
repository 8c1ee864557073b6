"""The second derivative of output nodes, in the direction that the loss pulls on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch2ebm.engine.call import Call
from torch2ebm.graph.energy_graph import Node
from torch2ebm.loss.output_loss import OutputLoss


class NodeCurvature:
    """How output nodes bend: the second derivative of <dL/dmu, mu(v)> in the values v that they read.

    It is zero for nodes that are linear in these.

    Args:
        call: The call, after its feed-forward pass.
        loss: Its loss, not nudged.
    """

    def __init__(self, call: Call, loss: OutputLoss) -> None:
        self.call = call
        self.gradients = loss.gradients({slot: call.values[slot].detach() for slot in call.graph.output_slots})[1]

    def product(self, moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By hidden slot, for a direction of the values; a missing one is zero."""
        found: dict[str, Tensor] = {}
        for node in self.call.graph.output_nodes:
            if any(slot in moved for slot in node.reads) and any(slot in self.gradients for slot in node.slots):
                values = [self.call.values[slot].detach() for slot in node.reads]
                along = [
                    moved[s] if s in moved else torch.zeros_like(v) for s, v in zip(node.reads, values, strict=True)
                ]
                try:
                    bent = self._twice(node, values, along)
                except RuntimeError:  # fused attention, or a function of one's own
                    bent = self._by_difference(node, values, along)
                found = summed(found, {s: b for s, b in zip(node.reads, bent, strict=True) if b is not None})
        return found

    def _pulled(self, node: Node, values: Sequence[Tensor], create_graph: bool) -> tuple[list[Tensor], list[Any]]:
        """The leaves, and J^T dL/dmu there."""
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_() for value in values]
            predictions = self.call.evaluate(node, leaves).predictions
            pairs = [
                (prediction, self.gradients[slot].to(prediction))
                for slot, prediction in zip(node.slots, predictions, strict=True)
                if slot in self.gradients and prediction.requires_grad
            ]
            if not pairs:
                return leaves, [None] * len(leaves)
            outputs, cotangents = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, leaves, cotangents, create_graph=create_graph, allow_unused=True)
        return leaves, list(found)

    def _twice(self, node: Node, values: Sequence[Tensor], along: Sequence[Tensor]) -> Sequence[Tensor | None]:
        leaves, slopes = self._pulled(node, values, create_graph=True)
        pairs = [(g, u.to(g)) for g, u in zip(slopes, along, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return [None] * len(leaves)
        gradients, directions = zip(*pairs, strict=True)
        return torch.autograd.grad(gradients, leaves, directions, allow_unused=True)

    def _by_difference(self, node: Node, values: Sequence[Tensor], along: Sequence[Tensor]) -> list[Tensor | None]:
        largest = max(float(u.abs().max()) for u in along)
        if not largest:
            return [None] * len(values)
        size = max(1.0, *(float(v.abs().max()) for v in values))
        width = torch.finfo(values[0].dtype).eps ** (1 / 3) * size / largest
        moved = [[v + sign * width * u.to(v) for v, u in zip(values, along, strict=True)] for sign in (1, -1)]
        above, below = (self._pulled(node, each, create_graph=False)[1] for each in moved)
        return [None if a is None or b is None else (a - b) / (2 * width) for a, b in zip(above, below, strict=True)]


def summed(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By slot; a missing one is zero."""
    joined = dict(first)
    for slot, part in second.items():
        joined[slot] = joined[slot] + part if slot in joined else part
    return joined
