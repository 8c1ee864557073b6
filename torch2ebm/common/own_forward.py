"""Whether a function that somebody puts in a forward's place calls the forward that it replaces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import nn


def calls_one_of(function: Any, forwards: Collection[Callable[..., Any]]) -> bool:
    """Whether ``function`` is one of ``forwards`` or holds one: as what it wraps, in its closure, as a default.

    What a function looks up while it runs (``type(self).forward``) is not seen.
    """
    waiting, seen = [function], set[int]()
    while waiting:
        each = waiting.pop()
        if any(each is forward for forward in forwards):
            return True
        if id(each) not in seen and callable(each) and not isinstance(each, (nn.Module, type)):
            seen.add(id(each))
            waiting += _held_by(each)
    return False


def _held_by(function: Any) -> Iterator[Any]:
    yield from getattr(function, "__dict__", {}).values()  # __wrapped__, and what a callable object keeps
    if isinstance(function, MethodType):
        yield function.__func__
        yield from (
            () if isinstance(function.__self__, nn.Module) else getattr(function.__self__, "__dict__", {}).values()
        )
    elif isinstance(function, functools.partial):
        yield from (function.func, *function.args, *function.keywords.values())
    elif isinstance(function, FunctionType):
        yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        yield from _closed_over(function)
        read = (function.__globals__.get(name) for name in function.__code__.co_names)
        # of plain functions there would be no end; a script keeps a forward as the method that it is
        yield from (each for each in read if isinstance(each, (MethodType, functools.partial)))


def _closed_over(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a cell that is still empty
            continue
