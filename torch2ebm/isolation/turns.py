"""Functions that run by turns: each in a thread of its own, of which one at a time runs.

A relaxation is one loop. Where several relax side by side on one loss, each has to wait, in the midst of its loop,
until the others have moved as far.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic

import torch

from torch2ebm.isolation.interrupts import Result
from torch2ebm.isolation.torch_modes import Modes


class _Abandoned(BaseException):
    """Raised in a function that is not to go on."""


class _Turn(Generic[Result]):
    """One function; ``asked`` is the question that it waits on, ``over`` whether it has returned or raised."""

    def __init__(self, function: Callable[[Callable[[Any], Any]], Result], device: torch.device) -> None:
        self._function, self._device = function, device
        self._modes, self._context = Modes.now(device.type), contextvars.copy_context()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._context.run, args=(self._run,), daemon=True)
        self._abandoned = False
        self._answer: Any = None
        self.asked: Any = None
        self.over = False
        self.result: Result
        self.error: BaseException | None = None

    def resume(self, answer: Any = None) -> None:
        """Let it run until it asks again or is over; what it raises comes out here."""
        self._answer = answer
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._stopped.acquire()
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """End it where it asks next, and wait for that."""
        self._abandoned = True
        self._go.release()
        while self._thread.ident is not None and self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._modes.restore()  # they are the thread's own
            with torch.cuda.stream(self._stream):  # of None it does nothing
                self.result = self._function(self._ask)
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.over = True
            self._stopped.release()

    def _ask(self, question: Any) -> Any:
        self.asked = question
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned
        return self._answer


def by_turns(
    functions: Sequence[Callable[[Callable[[Any], Any]], Result]],
    answers: Callable[[dict[int, Any]], dict[int, Any]],
    device: torch.device,
) -> list[Result]:
    """Run functions that ask side by side: the answers come when each that still runs has asked.

    Args:
        functions: Each is given what it asks by.
        answers: From the questions, by the number of the function, to an answer for each.
        device: Where they compute.

    Returns:
        What the functions return. What one of them raises ends all.
    """
    turns = [_Turn(function, device) for function in functions]
    try:
        given: dict[int, Any] = dict.fromkeys(range(len(turns)))
        while given:
            for number, answer in given.items():
                turns[number].resume(answer)
            running = {number: turns[number].asked for number in given if not turns[number].over}
            given = answers(running) if running else {}
        return [turn.result for turn in turns]
    finally:
        for turn in turns:
            if not turn.over:
                turn.abandon()
