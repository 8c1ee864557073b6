"""What a function mode does not see, seen: custom autograd functions and, where asked for, calls of modules.

Torch calls neither through ``__torch_function__``. While a watched run is under way, ``torch.autograd.Function.apply``
and ``torch.nn.Module.__call__`` ask the watch of their own thread first. Other threads are served as ever.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn


class Watching(Protocol):
    """Who is told of calls."""

    def applied(self, function: type, apply: Callable[..., Any], args: Any, kwargs: Any) -> Any: ...

    def called(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any: ...


class _Thread(threading.local):
    watch: Watching | None = None


_APPLY = torch.autograd.Function.__dict__["apply"].__func__.__code__
_THREAD = _Thread()
_LOCK = threading.Lock()
_PATCHES: dict[str, tuple[int, Any]] = {}  # name -> how many watched runs need it, and what stood there before


def _apply(function: type, *args: Any, **kwargs: Any) -> Any:
    apply = _PATCHES["apply"][1].__func__
    watch = _THREAD.watch
    if watch is None:
        return apply(function, *args, **kwargs)
    return watch.applied(function, apply, args, kwargs)


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    call = _PATCHES["__call__"][1]
    watch = _THREAD.watch
    if watch is None:
        return call(module, *args, **kwargs)
    return watch.called(module, call, args, kwargs)


# name -> (owner, replacement); from __dict__, since getattr would bind the classmethod to Function itself
_PLACES: dict[str, tuple[type, Any]] = {
    "apply": (torch.autograd.Function, classmethod(_apply)),
    "__call__": (nn.Module, _call),
}


def inside_custom_function() -> bool:
    """Whether a custom autograd function's forward is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _APPLY:
            return True
        frame = frame.f_back
    return False


@contextmanager
def told_of_calls(watch: Watching, custom: bool, modules: bool) -> Iterator[None]:
    """Tell ``watch`` of what its thread calls inside: custom functions, modules."""
    names = [name for name, wanted in (("apply", custom), ("__call__", modules)) if wanted]
    before = _THREAD.watch
    for name in names:
        _installed(name)
    _THREAD.watch = watch
    try:
        yield
    finally:
        _THREAD.watch = before
        for name in names:
            _removed(name)


@contextmanager
def untold() -> Iterator[None]:
    """Tell nobody of what is called inside."""
    before, _THREAD.watch = _THREAD.watch, None
    try:
        yield
    finally:
        _THREAD.watch = before


def _installed(name: str) -> None:
    owner, replacement = _PLACES[name]
    with _LOCK:
        count, original = _PATCHES.get(name, (0, None))
        if owner.__dict__[name] is not replacement:  # it may stand there: torch.fx puts back what it has found
            original = owner.__dict__[name]
            setattr(owner, name, replacement)
        _PATCHES[name] = (count + 1, original)


def _removed(name: str) -> None:
    owner, replacement = _PLACES[name]
    with _LOCK:
        count, original = _PATCHES[name]
        _PATCHES[name] = (count - 1, original)
        if count == 1 and owner.__dict__[name] is replacement:
            setattr(owner, name, original)
