"""What looks at a call and its loss as an algorithm's backward gets them, and gives no gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.engine.call import Call
from torch2ebm.engine.results import InferenceState, LocalGradients
from torch2ebm.errors import LossNotRecordedError
from torch2ebm.loss.output_loss import OutputLoss


def given_to(
    lossy: Callable[[Algorithm], Tensor], trained: Sequence[Tensor], loss_reduction: str
) -> tuple[Call, OutputLoss]:
    """The call and the loss that an algorithm's backward would get, for a loss that is computed by way of it."""
    given = Given(loss_reduction)
    with torch.enable_grad():
        loss = lossy(given)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise LossNotRecordedError("loss_fn", got, "a tensor of no dimension", "Reduce the loss to one number.")
        # retained: this backward is over, and the call is about to be used
        torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    return given.found[0]


class Given(Algorithm):
    """Keeps what ``backward`` is given, and gives no gradient."""

    def __init__(self, loss_reduction: str) -> None:
        self.loss_reduction: str = loss_reduction
        self.found: list[tuple[Call, OutputLoss]] = []

    def forward(self, call: Call) -> None:
        call.feedforward(keep_graph=True)

    def backward(self, call: Call, kept: None, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        self.found.append((call, loss))
        state = InferenceState(call.graph, call.batch_size, call.values, {})
        return LocalGradients({}, [None] * len(call.tensors), state)
