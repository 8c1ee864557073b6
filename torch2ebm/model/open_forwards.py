"""The forwards of a model that no backward has answered yet, and what they did to its buffers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from torch2ebm.engine.finite import (
    check_gradients,
    check_unskipped,
)
from torch2ebm.engine.results import LocalGradients
from torch2ebm.errors import PlainBackwardWarning
from torch2ebm.isolation.interrupts import Result, undone_by
from torch2ebm.isolation.module_state import BufferHistory
from torch2ebm.isolation.torch_modes import Modes


class OpenForwards:
    """The forwards of a model that no backward has answered yet, and what they did to its buffers.

    Attributes:
        accumulation: What the user's loop divides the loss by, and which is no part of it.
    """

    def __init__(self) -> None:
        self.accumulation = 1
        self.histories: deque[BufferHistory] = deque(maxlen=16)  # of forwards that are never answered the latest
        self.opened_since_step = self.answered_since_step = False
        self.answers = 0  # backwards that have come through, ever
        self.later: deque[Iterator[LocalGradients]] = deque(maxlen=16)  # of algorithms whose weights move with values
        self.overflowed: deque[BufferHistory] = deque(maxlen=16)  # of forwards whose gradients a scaler has to skip

    @property
    def unanswered(self) -> bool:
        """Whether there was a forward since the last step, and no backward."""
        return self.opened_since_step and not self.answered_since_step

    def stepped(self) -> None:
        self.opened_since_step = self.answered_since_step = False
        self.given_up()

    def given_up(self) -> None:
        """The gradients since the last step have been used, or set to zero."""
        self.later.clear()
        self.overflowed.clear()

    def check_skipped(self, gradients: Mapping[str, Tensor]) -> None:
        """Raise :class:`NonFiniteError` where a step would take what a gradient scaler should have skipped."""
        if not self.overflowed:
            return
        try:
            check_unskipped(gradients)
        except BaseException:
            while self.overflowed:
                self.overflowed.pop().undo()
            raise

    def later_gradients(self) -> Iterator[dict[str, Tensor]]:
        """By name, summed over the backwards since the last step; each once the weights have moved on the one before.

        Raises :class:`NonFiniteError` where one is not finite.
        """
        for together in zip(*self.later, strict=False):
            total: dict[str, Tensor] = {}
            for gradients in together:
                found = {**gradients.parameters, **gradients.learned}
                check_gradients(found)
                for name, gradient in found.items():
                    total[name] = total[name] + gradient if name in total else gradient
            yield total

    def opened(self, history: BufferHistory) -> None:
        self.histories.append(history)
        self.opened_since_step = True

    def closed(self, history: BufferHistory) -> None:
        """A backward has answered this forward; it and those before it stay as they are."""
        while history in self.histories:
            self.histories.popleft()
        self.answered_since_step = True
        self.answers += 1

    def withdrawn_on_error(self, history: BufferHistory, function: Callable[[], Result]) -> Result:
        """Call it; an exception before the caller has its output is as if there had been no forward."""
        opened, modes = self.opened_since_step, Modes.now("cpu")

        def withdraw() -> None:
            modes.restore()
            history.before.restore()
            if history in self.histories:
                self.histories.remove(history)
            self.opened_since_step = opened

        return undone_by(withdraw, function)

    def without_a_trace(self, function: Callable[[], Result]) -> Result:
        """Call it; where it fails it is as if it, and the forwards that it was to answer, had not been."""
        histories, later, answered = list(self.histories), list(self.later), self.answered_since_step

        def undo() -> None:
            self.histories.clear()
            self.histories.extend(histories)
            self.later.clear()
            self.later.extend(later)
            self.undo()
            self.answered_since_step = answered

        return undone_by(undo, function)

    def undo(self) -> None:
        """A step is refused: give the buffers what they held before these forwards."""
        while self.histories:
            self.histories.pop().undo()


def nothing_attached(module: str) -> PlainBackwardWarning:
    """What is said of forwards whose backwards train, and which no algorithm answers."""
    return PlainBackwardWarning(
        f"model(...), EnergyModel({module}): got a loop that trains by backpropagation, since nothing is attached to "
        "the converted model; expected an EnergyOptimizer of this model. Write optimizer = "
        "torch2ebm.EnergyOptimizer(optimizer, model, torch2ebm.PredictiveCoding()) before the loop; convert the net "
        "once, and attach to what convert has returned."
    )
