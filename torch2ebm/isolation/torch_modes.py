"""Torch's modes put back after an interruption, and the lock for what changes torch itself.

Torch keeps the modes that are entered on stacks of its own, in C++. A Ctrl-C inside of a mode's ``__exit__`` can leave
it there; every later operation of the thread would then go through it. :class:`Modes` notes the stacks, and restores
them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from torch2ebm.isolation.interrupts import Change

# Module-level flags that say whether a dispatch mode is entered, which torch keeps beside the stack. TorchDispatchMode
# sets them in __enter__ and puts them back in __exit__; how many there are depends on the version of torch.
_FLAGS = tuple(
    name
    for name in (
        "_is_in_torch_dispatch_mode",
        "_is_in_non_infra_torch_dispatch_mode",
        "_is_in_any_mode_without_ignore_compile_internals",
    )
    if hasattr(_python_dispatch, name)
)
# the third flag has a copy in C++, which guards read
_set_native_flag = getattr(_python_dispatch, "set_is_in_mode_without_ignore_compile_internals", None)


@dataclass(frozen=True)
class Stacks:
    """The function modes and the dispatch modes that are entered, outermost first."""

    functions: tuple[Any, ...]
    dispatched: tuple[Any, ...]
    flags: tuple[bool, ...]

    @staticmethod
    def now() -> Stacks:
        flags = tuple([getattr(_python_dispatch, name) for name in _FLAGS])
        return Stacks(_functions(), _dispatched(), flags)

    def restore(self) -> None:
        # push and pop, not __enter__ and __exit__: these keep states of their own, which may be half changed
        excess, missing = _differences(_functions(), self.functions)
        for _ in excess:
            torch._C._pop_torch_function_stack()
        for mode in missing:
            torch._C._push_on_torch_function_stack(mode)
        excess, missing = _differences(_dispatched(), self.dispatched)
        for mode in reversed(excess):  # fake, functional and proxy modes have a place of their own in torch, by key
            torch._C._pop_torch_dispatch_stack(getattr(mode, "_mode_key", None))
        for mode in missing:
            torch._C._push_on_torch_dispatch_stack(mode)
        for name, flag in zip(_FLAGS, self.flags, strict=True):
            setattr(_python_dispatch, name, flag)
        if _set_native_flag is not None and len(_FLAGS) == 3:
            _set_native_flag(self.flags[2])


def _functions() -> tuple[Any, ...]:
    length = torch._C._len_torch_function_stack()
    return tuple([torch._C._get_function_stack_at(i) for i in range(length)]) if length else ()


def _dispatched() -> tuple[Any, ...]:
    length = torch._C._len_torch_dispatch_stack()
    return tuple([torch._C._get_dispatch_stack_at(i) for i in range(length)]) if length else ()


def _differences(found: tuple[Any, ...], expected: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The modes to pop and those to push, from the first place on where the stacks differ."""
    same = 0
    while same < min(len(found), len(expected)) and found[same] is expected[same]:
        same += 1
    return found[same:], expected[same:]


def entered(mode: TorchFunctionMode | TorchDispatchMode) -> Change:
    """Enter the mode; undo it by restoring the stacks as they are now. A pop would pop another mode if run twice."""
    return Change(mode.__enter__, Stacks.now().restore)


@dataclass(frozen=True)
class Autocast:
    """Autocasting on one type of device.

    ``torch.autocast`` also counts how deep it is nested, so that the outermost one clears the cache of cast weights.
    That count cannot be read without changing it. So it is left alone here, and the cache is always cleared.
    """

    device: str
    enabled: bool
    dtype: torch.dtype
    cache: bool

    @staticmethod
    def now(device: str) -> Autocast:
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return Autocast(device, enabled, dtype, torch.is_autocast_cache_enabled())

    def set(self) -> None:
        torch.set_autocast_enabled(self.device, self.enabled)
        torch.set_autocast_dtype(self.device, self.dtype)
        torch.set_autocast_cache_enabled(self.cache)

    def restore(self) -> None:
        torch.clear_autocast_cache()
        self.set()

    def entered(self) -> Change:
        return Change(self.set, Autocast.now(self.device).restore)


def in_own_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, on the device of a tensor: it is for the user's forward, and not for algebra of our own on that."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


@dataclass(frozen=True, slots=True)
class Ambient:
    """Whether gradients are on, and how autocast stands: what an operation depends on beside its arguments."""

    grad: bool
    autocast: bool
    dtype: torch.dtype | None  # None where autocast is off: there it says nothing

    @staticmethod
    def now(device: str) -> Ambient:
        autocast = torch.is_autocast_enabled(device)
        return Ambient(torch.is_grad_enabled(), autocast, torch.get_autocast_dtype(device) if autocast else None)

    def run(self, device: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call ``function`` in these modes."""
        if Ambient.now(device) == self:
            return function(*args, **kwargs)
        dtype = self.dtype or torch.get_autocast_dtype(device)
        autocast = Autocast(device, self.autocast, dtype, torch.is_autocast_cache_enabled())
        with torch.set_grad_enabled(self.grad), autocast.entered():
            return function(*args, **kwargs)


@dataclass(frozen=True)
class Modes:
    """All modes of the thread, and whether gradients are on."""

    stacks: Stacks
    autocast: Autocast
    grad: bool

    @staticmethod
    def now(device: str) -> Modes:
        return Modes(Stacks.now(), Autocast.now(device), torch.is_grad_enabled())

    def restore(self) -> None:
        self.stacks.restore()  # first: function modes see the calls below, set_grad_enabled among them
        self.autocast.restore()
        torch._C._set_grad_enabled(self.grad)


# For tracing, recording and compiling, which patch torch for the whole process: fx patches nn.Module, the tracer here
# autograd.Function and torch's factories. Reentrant: the user's forward
# runs under it, and may convert or train another model.
TRACING = threading.RLock()


def exporting() -> bool:
    """Whether something traces or exports what runs now."""
    is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)  # not in torch 2.6
    return torch._C._get_tracing_state() is not None or is_exporting()
