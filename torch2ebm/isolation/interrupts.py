"""Sections that Ctrl-C cannot leave half done.

Python runs signal handlers between any two bytecodes. A ``KeyboardInterrupt`` can therefore come between a change and
the ``try`` that would undo it, or inside of ``__exit__``. There are two answers: the signal is deferred
(:class:`InterruptsDeferred`), or the undoing may be interrupted and done again (:class:`Change`, :func:`within`).
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")
_CONTEXTLIB = contextlib.__file__


class InterruptsDeferred:
    """A section in which SIGINT is noted; the handler of before handles it when the section ends.

    Python runs signal handlers in the main thread alone. In other threads, and where SIGINT has no Python handler,
    there is nothing to defer.
    """

    def __init__(self) -> None:
        self._outside: Any = None
        self._noted: int | None = None  # the signal's number alone: its frame would hold what runs in it

    def __enter__(self) -> InterruptsDeferred:
        self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _install(self) -> None:
        outside = signal.getsignal(signal.SIGINT)
        # not callable: SIG_DFL and SIG_IGN, and None for a handler that C code has installed
        if callable(outside) and threading.current_thread() is threading.main_thread():
            self._outside = outside
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number

    def _remove(self) -> None:
        outside, self._outside = self._outside, None
        if outside is None:
            return
        # ==, as each access makes a new bound method; a handler that the section itself has set stays
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, outside)
        # last, as it may raise: by now the old handler stands again
        noted, self._noted = self._noted, None
        if noted is not None:
            outside(noted, sys._getframe())

    def lifted_in(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """The function, with SIGINT handled at once inside: for what may take long and leaves nothing half done."""

        def interruptible() -> Any:
            try:
                self._remove()
                return function()
            finally:
                self._install()

        return interruptible


def undone_by(undo: Callable[[], None], function: Callable[[], Result]) -> Result:
    """Call ``function``; if it fails, run ``undo``, and once more if a signal interrupts ``undo``.

    ``undo`` must therefore be able to run twice. This is no ``with``, because two moments are unprotected there. A
    signal that arrives as a block ends is raised where ``__exit__`` begins; one that arrives just after the generator
    of a context manager has yielded is raised before the block is entered. Then nothing is restored, or too late.
    """
    try:
        try:
            return function()
        except BaseException as error:
            _close_left_open(error)
            undo()
            raise
    except BaseException as error:
        _close_left_open(error)
        undo()
        raise


def _close_left_open(error: BaseException) -> None:
    """Close the ``@contextmanager`` generators that an interruption has left suspended, innermost first.

    Torch has many of them. Left alone, each is closed when the traceback is freed, and restores what is out of date.
    """
    # the frames of contextlib's own __enter__ and __exit__, whose self holds the generator
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == _CONTEXTLIB]
    for frame in reversed(frames):
        generator = getattr(frame.f_locals.get("self"), "gen", None)
        if isinstance(generator, Generator):
            generator.close()


class Change(AbstractContextManager[None]):
    """Something to do before a function and to undo after it.

    ``undo`` must be able to run twice, and to run where ``do`` did not. In a ``with`` statement, a signal in the moment
    that the block ends leaves the change in place; :func:`within` has no such moment.
    """

    def __init__(self, do: Callable[[], Any], undo: Callable[[], None]) -> None:
        self.do, self.undo = do, undo

    def __enter__(self) -> None:
        undone_by(self.undo, self.do)

    def __exit__(self, *error: object) -> None:
        undone_by(self.undo, self.undo)


def within(changes: Sequence[Change], function: Callable[[], Result]) -> Result:
    """Call ``function`` between the changes, done in their order, and their undoing in reverse order."""

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

    # undone_by around it: a signal between the call and the finally, or inside of undo itself, undoes once more
    return undone_by(undo, undone)


def restored_by(restore: Callable[[], None]) -> Change:
    """What happens inside is undone by ``restore``."""
    return Change(_nothing, restore)


def _nothing() -> None:
    pass
