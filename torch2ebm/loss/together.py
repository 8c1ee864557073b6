"""Several calls that one loss joins: they relax side by side, each with values of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

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
    joined, over = Joined(losses), False

    def turn(number: int, ask: Callable[[Any], Any]) -> LocalGradients:
        def asked(question: Any) -> Any:
            # the steps that follow in optimizer.step() come one call after the other, from where the others stand
            return joined.answers({number: question})[number] if over else ask(question)

        return backwards[number](JointLoss(losses[number], joined.delivered[number], asked))

    try:
        return by_turns([partial(turn, number) for number in range(len(losses))], joined.answers, device)
    finally:
        over = True
