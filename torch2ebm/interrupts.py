"""What Ctrl-C may not cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class InterruptsDeferred:
    """A section in which SIGINT is noted, and handled where the section ends, by the handler that stands outside.

    Python runs signal handlers in the main thread alone: elsewhere, and where SIGINT has no handler of Python's, there
    is nothing to defer.
    """

    def __init__(self) -> None:
        self._outside: Any = None
        self._noted: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> InterruptsDeferred:
        self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _install(self) -> None:
        outside = signal.getsignal(signal.SIGINT)
        if callable(outside) and threading.current_thread() is threading.main_thread():
            self._outside = outside
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number, frame

    def _remove(self) -> None:
        outside, self._outside = self._outside, None
        if outside is None:
            return
        if signal.getsignal(signal.SIGINT) == self._note:  # a handler set inside stays
            signal.signal(signal.SIGINT, outside)
        noted, self._noted = self._noted, None
        if noted is not None:
            outside(*noted)

    def lifted_in(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """The function, in which SIGINT is handled at once: it may take long, and nothing is half done there."""

        def interruptible() -> Any:
            self._remove()
            try:
                return function()
            finally:
                self._install()

        return interruptible


@contextmanager
def restored_by(restore: Callable[[], None]) -> Iterator[None]:
    """Run ``restore`` at the end, and once more where something came in between; twice must be as once."""
    try:
        try:
            yield
        finally:
            restore()
    except BaseException:
        restore()
        raise
