"""The second derivative of output nodes, in the direction that the loss pulls on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from torch2ebm.engine.call import Call, NodePass, at_least_single
from torch2ebm.loss.output_loss import OutputLoss


class NodeCurvature:
    """How output nodes bend: the second derivative of <dL/dmu, mu(v)> in the values v that they read.

    It is zero for nodes that are linear in these. Where the last node computes the loss, all curvature is here.

    Args:
        call: The call, after its feed-forward pass.
        loss: Its loss, nudged or not.
        passes: An evaluation of each output node there, by name, whose graph is kept.
    """

    def __init__(self, call: Call, loss: OutputLoss, passes: Mapping[str, NodePass]) -> None:
        self.call = call
        gradients = loss.gradients({slot: call.values[slot].detach() for slot in call.graph.output_slots})[1]
        self.passes = [
            passes[node.name]
            for node in call.graph.output_nodes
            if node.reads and any(slot in gradients for slot in node.slots)
        ]
        self._pulls = gradients
        self._slopes: dict[str, Sequence[Tensor | None]] = {}  # by node, as functions of what it reads
        self._without: set[str] = set()  # nodes that cannot be differentiated twice

    @property
    def reads(self) -> dict[str, Tensor]:
        """The values that these nodes read, by hidden slot."""
        return {
            slot: at_least_single(value)
            for evaluated in self.passes
            for slot, value in zip(evaluated.node.reads, evaluated.inputs, strict=True)
        }

    def product(self, moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By hidden slot, for a direction of the values; a missing one is zero."""
        found: dict[str, Tensor] = {}
        for evaluated in self.passes:
            node = evaluated.node
            if any(slot in moved for slot in node.reads):
                along = [
                    moved[slot].to(value) if slot in moved else torch.zeros_like(value)
                    for slot, value in zip(node.reads, evaluated.inputs, strict=True)
                ]
                bent = zip(node.reads, self._bent(evaluated, along), strict=True)
                found = summed(found, {slot: at_least_single(part) for slot, part in bent if part is not None})
        return found

    def _bent(self, evaluated: NodePass, along: Sequence[Tensor]) -> Sequence[Tensor | None]:
        if evaluated.node.name not in self._without:
            try:
                found = self._twice(evaluated, along)
            except RuntimeError:  # fused attention, or a function of one's own
                found = []
            cut = not any(part is not None and bool(part.any()) for part in found) and self._is_ones_own(evaluated)
            if found and not cut:
                return found
            self._without.add(evaluated.node.name)
        return self._by_difference(evaluated, along)

    def _pulled(self, evaluated: NodePass, create_graph: bool) -> Sequence[Tensor | None]:
        """J^T dL/dmu, by what the node reads."""
        pairs = [
            (prediction, self._pulls[slot].to(prediction))
            for slot, prediction in zip(evaluated.node.slots, evaluated.predictions, strict=True)
            if slot in self._pulls and prediction.requires_grad
        ]
        if not pairs:
            return [None] * len(evaluated.inputs)
        outputs, cotangents = zip(*pairs, strict=True)
        return torch.autograd.grad(
            outputs, evaluated.inputs, cotangents, retain_graph=True, create_graph=create_graph, allow_unused=True
        )

    def _twice(self, evaluated: NodePass, along: Sequence[Tensor]) -> Sequence[Tensor | None]:
        name = evaluated.node.name
        if name not in self._slopes:
            with torch.enable_grad():
                self._slopes[name] = self._pulled(evaluated, create_graph=True)
        pairs = [(g, u.to(g)) for g, u in zip(self._slopes[name], along, strict=True) if _moves(g)]
        if not pairs:
            return [None] * len(along)
        slopes: Any
        slopes, directions = zip(*pairs, strict=True)
        return torch.autograd.grad(slopes, evaluated.inputs, directions, retain_graph=True, allow_unused=True)

    def _is_ones_own(self, evaluated: NodePass) -> bool:
        """Whether a function of the user's own is in it: its second derivative may be cut off without a word."""
        left = [prediction.grad_fn for prediction in evaluated.predictions]
        seen: set[Any] = set()
        while left:
            function = left.pop()
            if function is None or function in seen:
                continue
            if isinstance(function, BackwardCFunction):
                return True
            seen.add(function)
            left += [following for following, _ in function.next_functions]
        return False

    def _by_difference(self, evaluated: NodePass, along: Sequence[Tensor]) -> list[Tensor | None]:
        values = [value.detach() for value in evaluated.inputs]
        largest = max(float(u.abs().max()) for u in along)
        if not largest:
            return [None] * len(values)
        size = max(1.0, *(float(v.abs().max()) for v in values))
        width = torch.finfo(values[0].dtype).eps ** (1 / 3) * size / largest

        def at(shift: float) -> Sequence[Tensor | None]:
            with torch.enable_grad():
                moved = [(v + shift * u).requires_grad_() for v, u in zip(values, along, strict=True)]
                return self._pulled(self.call.evaluate(evaluated.node, moved), create_graph=False)

        pairs = zip(at(width), at(-width), strict=True)
        return [None if a is None or b is None else (a - b) / (2 * width) for a, b in pairs]


def _moves(slope: Tensor | None) -> bool:
    return slope is not None and slope.requires_grad


def summed(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By slot; a missing one is zero."""
    joined = dict(first)
    for slot, part in second.items():
        joined[slot] = joined[slot] + part if slot in joined else part
    return joined
