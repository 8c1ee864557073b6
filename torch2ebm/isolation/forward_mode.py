"""Forward-mode differentiation of the package's own: torch has one level of it, which all threads of a process see."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LEVEL = threading.RLock()  # torch's level is the process's, so its lock is, too
_OWNERS: list[int] = []  # the thread that is inside


@contextmanager
def own_level() -> Iterator[None]:
    """Inside, tensors can have tangents; a second thread waits for the first one."""
    with _LEVEL:
        _loaded()
        _OWNERS.append(threading.get_ident())
        try:
            with forward_ad.dual_level():
                yield
        finally:
            _OWNERS.pop()


def entered_here() -> bool:
    """Whether a level is under way that no other thread has entered by :func:`own_level`."""
    return forward_ad._current_level >= 0 and _OWNERS[-1:] in ([], [threading.get_ident()])


@functools.cache
def _loaded() -> None:
    """The first dual tensor of a process loads scripts of torch's own, for which torch warns that it will have none."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        make: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
        make(torch.zeros(1), torch.zeros(1))
