"""Tensors that record what you do to the model's output, so that it can be repeated for a prediction that has moved.

``model(x)`` returns tensors of :class:`TapedTensor`. The first tensor of no dimension that is computed from them and
has a gradient is the loss. You get it as an ordinary tensor, whose hook says with which outer factor it entered the
backward.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch2ebm.common.nested import ResultReference, leaves_of, map_leaves
from torch2ebm.errors import LossIndependentError
from torch2ebm.isolation.interrupts import undone_by
from torch2ebm.isolation.torch_modes import Stacks
from torch2ebm.loss.tape import Scalar, Tape


class TapedTensor(Tensor):
    """A tensor that knows its tape. It holds no tape alive: autograd's graph of the call does."""

    _tape: weakref.ref[Tape]
    _place: int
    _refused: Callable[[], None]  # called before a backward is refused

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        try:
            if "torch._dynamo" in sys.modules:  # it would follow a compiled loss to here, and make no tape of it
                uncompiled = torch.compiler.disable(_modes_undone)  # type: ignore[no-untyped-call]
                return uncompiled(func, args, kwargs or {})
            return _modes_undone(func, args, kwargs or {})
        except KeyboardInterrupt:
            _undo_forwards((args, kwargs or {}))
            raise


def _modes_undone(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    stacks = Stacks.now()
    return undone_by(stacks.restore, lambda: _run_on_tape(func, args, kwargs))


def stand_for(kept: Tensor, taped: Tensor) -> None:
    """Let a tensor that forward has left with somebody be the taped one in all that is done to it from now on.

    By its class alone: a view can neither be detached in place nor get another history.
    """
    kept.__class__ = TapedTensor
    kept._instead = taped  # type: ignore[attr-defined]


def _meant(leaf: Any) -> Any:
    return getattr(leaf, "_instead", leaf) if isinstance(leaf, TapedTensor) else leaf


def _run_on_tape(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.is_grad_enabled() and any(hasattr(leaf, "_instead") for leaf in leaves_of((args, kwargs))):
        args, kwargs = map_leaves(_meant, (args, kwargs))
    if func is Tensor.backward and isinstance(args[0], TapedTensor) and not args[0].requires_grad:
        args[0]._refused()
        raise LossIndependentError(
            "loss.backward()",
            "a loss without a gradient in the model's output",
            "a loss that depends on it",
            "Look for a detach(), an argmax or a torch.no_grad() between model(x) and the loss.",
        )
    # else the operation would come back to __torch_function__
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    if func in _NOT_TAPED:
        return map_leaves(_untaped(args), result)
    # a shape or a number: nothing to replay
    if not _writes_in_place(func, kwargs) and not any(isinstance(leaf, Tensor) for leaf in leaves_of(result)):
        return result
    return put_on_tape(func, args, kwargs, result)


# attributes outside of the autograd graph: through them no gradient reaches the loss
_NOT_TAPED = frozenset(getattr(Tensor, name).__get__ for name in ("grad", "data", "grad_fn", "_base"))


def put_on_new_tape(tape: Tape, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a call as taped tensors; one of no dimension is a loss already."""
    return [_marked(output, tape, index, None) for index, output in enumerate(outputs)]


def put_on_tape(
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    result: Any,
    summed: bool | None = None,
    writes: bool | None = None,
) -> Any:
    """Record an operation that has run; returns its result with the tensors marked."""
    tapes = {id(tape): tape for leaf in leaves_of((args, kwargs)) if (tape := _tape_of(leaf)) is not None}
    if not tapes:
        return map_leaves(_untaped((args, kwargs)), result)
    if len(tapes) > 1:  # one call's replay cannot move the outputs of the other
        for tape in tapes.values():
            tape.obstacle = f"{function_name(function)} mixes the outputs of two forward calls"
        return map_leaves(_plain, result)
    tape = next(iter(tapes.values()))
    made_by_sum = _is_sum(function, args, kwargs) if summed is None else summed
    writing = _writes_in_place(function, kwargs) if writes is None else writes
    own_args, own_kwargs = map_leaves(lambda leaf: _referred(leaf, tape), (args, kwargs))
    indices = iter(tape.append(function, own_args, own_kwargs, result, writing))

    def mark(leaf: Any) -> Any:
        index = next(indices)
        return _marked(leaf, tape, index, made_by_sum) if isinstance(leaf, Tensor) else leaf

    return map_leaves(mark, result)


def _marked(tensor: Tensor, tape: Tape, index: int, summed: bool | None) -> Tensor:
    if tensor.ndim == 0 and tensor.requires_grad:
        # ordinary from here on: scaling, sums and backward are autograd's
        loss: Tensor = _plain(tensor)
        scalar = Scalar(index, bool(summed), weakref.ref(loss), loss.detach())
        tape.scalars.append(scalar)

        def seen(gradient: Tensor | None) -> None:
            # what arrives at the loss is its outer factor: that of accumulation, of a gradient scaler
            if gradient is not None:  # as for an output that no loss was made of
                scalar.factors.append(gradient.detach())

        loss.register_hook(seen)  # type: ignore[no-untyped-call]
        return loss
    if tensor.ndim == 0 and not tensor.is_floating_point():  # a count, or an index
        ordinary: Tensor = _plain(tensor)
        return ordinary
    marked = tensor if isinstance(tensor, TapedTensor) else _as_taped(tensor)
    marked._tape, marked._place, marked._refused = weakref.ref(tape), index, tape.refused
    return marked


def _as_taped(tensor: Tensor) -> TapedTensor:
    """torch 2.6's compiler, where it follows a compiled loss to here, fails on ``as_subclass``."""
    if torch.compiler.is_compiling():
        uncompiled: Callable[..., TapedTensor] = torch.compiler.disable(Tensor.as_subclass)  # type: ignore[no-untyped-call]
        return uncompiled(tensor, TapedTensor)
    return tensor.as_subclass(TapedTensor)


def _undo_forwards(arguments: Any) -> None:
    """The loss was interrupted, and no backward will follow."""
    for leaf in leaves_of(arguments):
        if isinstance(leaf, TapedTensor) and hasattr(leaf, "_refused"):
            leaf._refused()


def _tape_of(leaf: Any) -> Tape | None:
    return leaf._tape() if isinstance(leaf, TapedTensor) and hasattr(leaf, "_tape") else None


def _referred(leaf: Any, tape: Tape) -> Any:
    """What stands for an argument on the tape."""
    if isinstance(leaf, TapedTensor):
        # a tensor of another, finished call is a constant like any target
        return ResultReference(leaf._place) if _tape_of(leaf) is tape else _plain(leaf)
    if isinstance(leaf, Tensor) and leaf.ndim == 0:
        return tape.loss_read_again(leaf) or leaf
    return leaf


def _plain(leaf: Any) -> Any:
    return leaf.as_subclass(Tensor) if isinstance(leaf, TapedTensor) else leaf


def _untaped(arguments: Any) -> Callable[[Any], Any]:
    """Marks what ``.data`` and the like return: on no tape, yet known again where somebody takes it for a loss."""
    source = next((leaf for leaf in leaves_of(arguments) if isinstance(leaf, TapedTensor)), None)

    def mark(leaf: Any) -> Any:
        if source is None or not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.requires_grad:
            return _plain(leaf)
        marked = leaf.as_subclass(TapedTensor)
        marked._refused = source._refused
        return marked

    return mark


def plain(structure: Any) -> Any:
    """The same structure with ordinary tensors in place of taped ones."""
    with torch._C.DisableTorchFunctionSubclass():
        return map_leaves(_plain, structure)


def function_name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))


def _writes_in_place(function: Callable[..., Any], kwargs: Any) -> bool:
    name = function_name(function)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _IN_PLACE or kwargs.get("inplace") is True or "out" in kwargs


# operators that write although their names end in two underscores
_IN_PLACE = frozenset(
    ["__setitem__"]
    + [f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or")]
)
_SUMS = frozenset([torch.sum, Tensor.sum, torch.nansum, Tensor.nansum])


def _is_sum(function: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    if function in _SUMS or kwargs.get("reduction") == "sum":
        return True
    # a reduction given by position: only where the word occurs is the signature looked up
    if not any(isinstance(argument, str) and argument == "sum" for argument in args):
        return False
    try:
        return inspect.signature(function).bind(*args, **kwargs).arguments.get("reduction") == "sum"
    except (TypeError, ValueError):  # a builtin has no signature
        return False
