"""How curved a loss is in the predictions of the outputs, by differences of its gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch2ebm.engine.call import at_least_single
from torch2ebm.loss.output_loss import OutputLoss

POWER_STEPS = 2


def largest_curvature(
    loss: OutputLoss, predictions: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> tuple[float, float]:
    """A lower bound of the largest absolute eigenvalue of any sample's Hessian, and the accuracy of the differences.

    Power iterations of all samples at once, each from its own gradient: cross-entropy and squared errors have their
    largest curvature near it. ``gradients`` are those of ``loss`` at ``predictions``, all with a batch dimension.
    """
    accuracy = max(torch.finfo(predictions[slot].dtype).eps ** (1 / 3) for slot in gradients)
    # wide enough that rounding of p does not show, small enough that the third derivative does not
    width = accuracy * torch.stack([at_least_single(predictions[slot]).abs().max() for slot in gradients]).max()
    width = width.clamp_min(accuracy)
    direction = {slot: at_least_single(gradient) for slot, gradient in gradients.items()}
    largest = torch.zeros((), device=width.device)
    for _ in range(POWER_STEPS):
        length = _lengths(direction)
        unit = {slot: part / _as_column(length.clamp_min(1e-30), part) for slot, part in direction.items()}
        shifted = {slot: p + (width * unit[slot]).to(p.dtype) if slot in unit else p for slot, p in predictions.items()}
        _, there = loss.gradients(shifted)
        direction = {slot: (at_least_single(there[slot]) - at_least_single(gradients[slot])) / width for slot in unit}
        largest = torch.maximum(largest, _lengths(direction).max())
    return float(largest), accuracy


def _lengths(direction: Mapping[str, Tensor]) -> Tensor:
    """The norm of each sample's direction over all outputs, shape [batch]."""
    return torch.stack([part.flatten(1).square().sum(1) for part in direction.values()]).sum(0).sqrt()


def _as_column(length: Tensor, like: Tensor) -> Tensor:
    return length.reshape(-1, *[1] * (like.ndim - 1))
