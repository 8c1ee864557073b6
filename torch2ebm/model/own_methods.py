"""The module's own methods, called on the model: where they call forward, the algorithm runs it.

``model.loss(x)`` is a method of the module, and calls ``self.forward(x)`` or ``self(x)`` there. Left alone, it would be
plain backpropagation.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MethodType
from typing import Any, TypeGuard

import torch
from torch import nn

from torch2ebm.isolation.interrupts import Change, within


def is_own_method(found: object, module: nn.Module, name: str) -> TypeGuard[MethodType]:
    """Whether it is a method that the module's author has written, and no helper of ``nn.Module``."""
    return isinstance(found, MethodType) and found.__self__ is module and not hasattr(nn.Module, name)


def with_forward(
    method: MethodType,
    module: nn.Module,
    answer: Callable[[tuple[Any, ...], Mapping[str, Any], Callable[..., Any]], Any],
    wanted: Callable[[], bool],
    owner: object,
) -> Callable[..., Any]:
    """The method, with ``answer`` in the place of the module's forward while it runs.

    Args:
        method: A bound method of the module.
        module: The module.
        answer: From the arguments of forward, and what runs the module on them, to the output.
        wanted: Whether an algorithm is attached at all.
        owner: What the result is a method of.
    """
    if isinstance(vars(module).get("forward"), _Forward):
        return method

    @functools.wraps(method.__func__)
    def call(_: object, *args: Any, **kwargs: Any) -> Any:
        if not wanted() or not torch.is_grad_enabled():
            return method(*args, **kwargs)
        change = _Forward(module, answer).in_place()
        return within([change], lambda: method(*args, **kwargs))

    vars(call)["__wrapped__"] = method
    with suppress(ValueError, TypeError):  # compiled code has none
        vars(call)["__signature__"] = inspect.signature(method.__func__)
    return MethodType(call, owner)


class _Forward:
    """Stands as the module's forward, and steps aside while the module runs."""

    def __init__(self, module: nn.Module, answer: Callable[..., Any]) -> None:
        self.module, self.answer = module, answer
        self.own = vars(module).get("forward")  # a forward that was patched on the object, None for most
        functools.update_wrapper(self, module.forward)

    def in_place(self) -> Change:
        return Change(lambda: vars(self.module).__setitem__("forward", self), self._restore)

    def _restore(self) -> None:
        if self.own is None:
            vars(self.module).pop("forward", None)
        else:
            vars(self.module)["forward"] = self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # called by self(x), the hooks around the call run there already
        by_call = sys._getframe(1).f_code.co_filename == nn.Module._call_impl.__code__.co_filename
        aside = Change(self._restore, lambda: vars(self.module).__setitem__("forward", self))

        def run(*given: Any, **named: Any) -> Any:
            function = self.module.forward if by_call else self.module
            return function(*given, **named)

        return within([aside], lambda: self.answer(args, kwargs, run))
