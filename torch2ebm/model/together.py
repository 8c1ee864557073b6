"""Several calls that one loss joins: they relax side by side, each with values of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from torch2ebm.engine.results import LocalGradients
from torch2ebm.isolation.turns import by_turns
from torch2ebm.loss.joint_loss import Joined, JointLoss
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.loss.replayed_loss import ReplayedLoss

Backward = Callable[[OutputLoss], LocalGradients]


def relaxed_together(
    losses: Sequence[ReplayedLoss], backwards: Sequence[Backward], device: torch.device
) -> list[LocalGradients]:
    """What the algorithm of each call makes of the loss, evaluated whenever all of them have moved.

    Args:
        losses: The loss of each call, with the others standing still.
        backwards: From a loss to local gradients: the algorithm's, for each call.
        device: Where they compute.
    """
    joined = Joined(losses)

    def turn(number: int) -> Callable[..., LocalGradients]:
        return lambda ask: backwards[number](JointLoss(losses[number], joined.delivered[number], ask))

    return by_turns([turn(number) for number in range(len(losses))], joined.answers, device)
