"""What looks at a call and its loss as an algorithm's backward gets them, and gives no gradient."""

from __future__ import annotations

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.engine.call import Call
from torch2ebm.engine.results import InferenceState, LocalGradients
from torch2ebm.loss.output_loss import OutputLoss


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
