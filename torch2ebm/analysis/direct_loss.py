"""The loss of a call, computed anew from the output at other predictions by the function that you have written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torch2ebm.analysis.energy_function import EnergyFunction, Point
from torch2ebm.engine.call import pull_back
from torch2ebm.errors import LossNotRecordedError
from torch2ebm.loss.output_loss import LossExpansion, OutputLoss
from torch2ebm.loss.replayed_loss import expansion_of, present


class DirectLoss(OutputLoss):
    """``loss_of`` of the module's output, summed over samples.

    Args:
        function: F of the call, which knows the form of its output.
        loss_of: From the output to one number.
        multiplier: What makes a sum over samples of it: the batch size for a mean, 1 for a sum.
    """

    def __init__(self, function: EnergyFunction, loss_of: Callable[[Any], Tensor], multiplier: int) -> None:
        self._function, self._loss_of = function, loss_of
        self.factor, self.unit, self.scale = 1.0, float(multiplier), 1 / multiplier
        values = function.call.values
        predictions = {slot: values[slot] for slot in function.graph.output_slots}
        self.delivered = {slot: each * self.scale for slot, each in self.gradients(predictions)[1].items()}

    def total(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """Of no dimension, with the graph of the predictions."""
        loss = self._loss_of(self._function.output(Point(predictions, predictions, {})))
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise LossNotRecordedError("loss_fn", got, "a tensor of no dimension", "Reduce the loss to one number.")
        return loss * self.unit

    def gradients(self, predictions: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        value, leaves = self._at(predictions)
        found = pull_back([value], [torch.ones_like(value)], list(leaves.values()))
        return value.detach(), present(leaves, found)

    def expanded(self, predictions: Mapping[str, Tensor]) -> LossExpansion:
        return expansion_of(*self._at(predictions))

    def _at(self, predictions: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {slot: prediction.detach().requires_grad_() for slot, prediction in predictions.items()}
        with torch.enable_grad():
            return self.total(leaves), leaves
