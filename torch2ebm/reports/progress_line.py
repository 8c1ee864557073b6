"""A line that says how far a long relaxation is."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from io import BufferedIOBase, RawIOBase
from typing import Final, TextIO

from torch2ebm.errors import ConfigurationError
from torch2ebm.inference.relaxation import InferenceStep

MINUTE: Final = 60.0  # seconds between two lines of what is no terminal


class Progress:
    """One line on the terminal that says how far a relaxation is: step, energy, residual and time.

    Give it as ``on_step`` to :class:`PredictiveCoding`, or to ``model.infer``. It appears where a relaxation takes
    longer than ``after`` seconds, is rewritten in place, and goes when the relaxation ends, also by an error or
    Ctrl-C. Where the stream is no terminal, for example a log file, there is a line a minute. A step that is not shown
    costs nothing but the look at the clock. With ``compile=True``, steps run one by one where they would run several
    at a time.

    Args:
        after: Seconds that a relaxation may take unseen.
        every: Seconds from one rewriting to the next.
        stream: Where the line goes; None is ``sys.stderr``.
        clock: Gives the time in seconds.

    Raises:
        ConfigurationError: for a number of seconds that is negative or not finite, a stream that takes no text, or a
            clock that is no function.

    Example:
        >>> import torch, torch2ebm
        >>> from torch2ebm.monitor import Progress
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net)
        >>> found = model.infer(torch.randn(5, 4), clamp={"output": torch.zeros(5, 3)}, on_step=Progress())
    """

    def __init__(
        self,
        *,
        after: float = 2.0,
        every: float = 0.2,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_seconds("after", after)
        _check_seconds("every", every)
        _check_stream(stream)
        if not callable(clock) or isinstance(clock, type):
            raise ConfigurationError(
                "Progress(clock=...)", repr(clock), "a function that gives the time in seconds", "Try time.monotonic."
            )
        self.after, self.every, self.stream, self.clock = after, every, stream, clock
        self._begun = self._shown = -math.inf
        self._width = 0

    def wants(self, step: int, last: bool) -> bool:
        """Whether the line is to be written now, or taken away."""
        now = self.clock()
        if step == 1:
            self._begun, self._shown = now, -math.inf
            self._clear()  # of a relaxation that was broken off
        if last:
            self._clear()
            return False
        wait = self.every if self._is_terminal() else MINUTE
        due = max(self._begun + (self.after if self._is_terminal() else MINUTE), self._shown + wait)
        return now >= due

    def __call__(self, step: InferenceStep, /) -> None:
        self._shown = self.clock()
        took = int(self._shown - self._begun)
        residual = "" if math.isnan(step.residual) else f", residual {step.residual:.2e}"
        text = f"step {step.step}, energy {step.energy:.6g}{residual}, {took // 60}:{took % 60:02}"
        if not self._is_terminal():
            self._write(f"{text}\n")
            return
        text = text[: shutil.get_terminal_size().columns - 1].ljust(self._width)
        self._width = len(text)  # before it is written: Ctrl-C may come in between
        self._write(f"\r{text}")

    def closed(self) -> None:
        """Take the line away: a relaxation has ended, or was broken off."""
        self._clear()

    def _clear(self) -> None:
        if self._width:
            self._write(f"\r{' ' * self._width}\r")
            self._width = 0

    def _out(self) -> TextIO | None:
        """Where the line goes; nowhere once that is closed."""
        out = sys.stderr if self.stream is None else self.stream
        return None if getattr(out, "closed", False) is True else out

    def _is_terminal(self) -> bool:
        return bool(getattr(self._out(), "isatty", bool)())

    def _write(self, text: str) -> None:
        out = self._out()
        if out is not None:
            with suppress(OSError):  # a terminal that has gone is no reason to end a training
                out.write(text)
                out.flush()


def _check_seconds(name: str, seconds: object) -> None:
    legal = isinstance(seconds, (int, float)) and math.isfinite(seconds) and seconds >= 0
    if not legal or isinstance(seconds, bool):
        raise ConfigurationError(
            f"Progress({name}=...)", repr(seconds), "a finite number of seconds, 0 or more", "For example 2.0."
        )


def _check_stream(stream: object) -> None:
    if fault := _fault(stream):
        raise ConfigurationError(
            "Progress(stream=...)",
            f"{stream!r:.80}, which {fault}",
            "an open stream of text",
            "For example sys.stderr.",
        )


def _fault(stream: object) -> str:
    """Why a stream takes no text; nothing where it does."""
    if stream is None:
        return ""
    if isinstance(stream, type):
        return "is a class"
    if missing := [name for name in ("write", "flush") if not callable(getattr(stream, name, None))]:
        return f"has no method {missing[0]}"
    if getattr(stream, "closed", False) is True:
        return "is closed"
    if isinstance(stream, (RawIOBase, BufferedIOBase)):
        return "takes bytes"
    writable = getattr(stream, "writable", None)
    return "is open for reading alone" if callable(writable) and not writable() else ""
