"""Sections that Ctrl-C must not interrupt half-way, and changes that are undone whatever interrupts them."""

from __future__ import annotations

import contextlib
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")
_CONTEXTLIB = contextlib.__file__  # marks frames of contextlib in a traceback


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
        # signal.signal raises outside of the main thread; SIG_IGN, SIG_DFL and None cannot be called later
        if callable(outside) and threading.current_thread() is threading.main_thread():
            self._outside = outside  # first: a signal may arrive between the two lines
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number, frame

    def _remove(self) -> None:
        # taken out first, so that a second removal does nothing
        outside, self._outside = self._outside, None
        if outside is None:
            return
        if signal.getsignal(signal.SIGINT) == self._note:  # a handler set inside stays
            signal.signal(signal.SIGINT, outside)
        noted, self._noted = self._noted, None
        if noted is not None:
            # last: it may raise KeyboardInterrupt, and nothing is left to do after it
            outside(*noted)

    def lifted_in(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """The function, in which SIGINT is handled at once: it may take long, and nothing is half done there."""

        def interruptible() -> Any:
            try:
                # inside the try: a noted signal is raised here, and the section goes on deferring
                self._remove()
                return function()
            finally:
                self._install()

        return interruptible


def undone_by(undo: Callable[[], None], function: Callable[[], Result]) -> Result:
    """Call ``function``; where it fails run ``undo`` twice, as something may come in between; twice must be as once.

    No ``with``: a signal that arrives as a block ends is raised where ``__exit__`` begins, and one that arrives as a
    contextlib generator has yielded, before the block is entered; what was to be restored then is not, or later.
    """
    try:
        try:
            return function()
        except BaseException as error:  # KeyboardInterrupt is no Exception
            _close_left_open(error)
            undo()
            raise
    # a second interrupt may cut the undo itself short: again, from its start
    except BaseException as error:
        _close_left_open(error)
        undo()
        raise


def _close_left_open(error: BaseException) -> None:
    """Close the contextlib generators that an interruption has left suspended (torch's own too), innermost first: else
    each is closed when the traceback is freed, and what it restores then is out of date."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == _CONTEXTLIB]
    # the innermost was entered last, and restores what the one around it had set
    for frame in reversed(frames):
        generator = getattr(frame.f_locals.get("self"), "gen", None)
        if isinstance(generator, Generator):
            generator.close()


class Change(AbstractContextManager[None]):
    """Something to do before a function and to undo after it; undone twice must be as once, and not done at all.

    As a ``with`` it is undone but for a signal in the moment that the block ends; :func:`within` has no such moment.
    """

    def __init__(self, do: Callable[[], Any], undo: Callable[[], None]) -> None:
        self.do, self.undo = do, undo

    def __enter__(self) -> None:
        undone_by(self.undo, self.do)

    def __exit__(self, *error: object) -> None:
        undone_by(self.undo, self.undo)


def within(changes: Sequence[Change], function: Callable[[], Result]) -> Result:
    """Call ``function`` with the changes done, in their order, and undo them, in the other."""

    def done() -> Result:
        for change in changes:
            change.do()
        return function()

    def undo() -> None:
        for change in reversed(changes):
            change.undo()

    def undone() -> Result:
        try:
            return done()
        finally:
            undo()

    return undone_by(undo, undone)


def restored_by(restore: Callable[[], None]) -> Change:
    """What happens inside is undone by ``restore``."""
    return Change(_nothing, restore)


def _nothing() -> None:
    pass
