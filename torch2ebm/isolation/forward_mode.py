"""Forward-mode differentiation, of which torch has one level that all threads of a process see, and what stays out."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch2ebm.errors import UnsupportedError

_LEVEL = threading.RLock()  # torch's level is the process's, so its lock is, too
_OWNERS: list[int] = []  # the thread that is inside
_NOBODY = -1


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


@contextmanager
def without_transforms(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, no transform of torch.func and no level of forward mode is under way.

    Raises :class:`UnsupportedError` where one has a hand in these tensors.
    """
    if torch._C._functorch.peek_interpreter_stack() is None and not entered_here():
        yield
        return
    wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
    if any(map(wrapped, tensors)):
        raise UnsupportedError(
            "model(...)",
            "an input that a transform of torch.func has a hand in",
            "inputs from outside of the transform",
            "Take gradients in inputs by torch.autograd.grad; values may be transformed.",
        )
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack  # slow to load, and seldom needed

    _OWNERS.append(_NOBODY)
    try:
        with temporarily_clear_interpreter_stack():
            yield
    finally:
        _OWNERS.pop()


@functools.cache
def _loaded() -> None:
    """The first dual tensor of a process loads scripts of torch's own, for which torch warns that it will have none."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        make: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
        make(torch.zeros(1), torch.zeros(1))
