"""What the user does to the model's output, recorded so that it can be done again to a prediction that has moved.

``model(x)`` returns :class:`Recorded` tensors. The first tensor of no dimension computed from them that has a gradient
is the loss: it is handed back as an ordinary tensor, whose hook says with which outer factor it entered the backward.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch2ebm.errors import LossIndependentError, LossNotRecordedError
from torch2ebm.interrupts import undone_by
from torch2ebm.modes import Autocast, Stacks
from torch2ebm.structure import Reference, leaves_of, map_leaves, signature


@dataclass(frozen=True)
class Context:
    """The modes that an operation ran under."""

    grad: bool
    autocast: bool
    dtype: torch.dtype

    @staticmethod
    def now(device: str) -> Context:
        return Context(torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def run(self, device: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call ``function`` in these modes."""
        now = Context.now(device)
        if now == self or (now.grad == self.grad and not now.autocast and not self.autocast):
            return function(*args, **kwargs)
        autocast = Autocast(device, self.autocast, self.dtype, torch.is_autocast_cache_enabled())
        with torch.set_grad_enabled(self.grad), autocast.entered():
            return function(*args, **kwargs)


@dataclass(frozen=True)
class Operation:
    function: Callable[..., Any]
    args: Any
    kwargs: Any
    results: tuple[int, ...]  # the index of each leaf of the result, -1 where it is no tensor
    context: Context
    writes: bool


@dataclass
class Scalar:
    """A loss: where it stands on the tape, whether a sum made it, and the factors it entered backwards with."""

    index: int
    summed: bool
    handed_out: weakref.ref[Tensor]  # the ordinary tensor that the user has
    value: Tensor  # of no dimension
    absorbed: bool = False  # read by a later operation on the tape, through which its gradient comes
    factors: list[Tensor] = field(default_factory=list)


class Tape:
    """The operations on the outputs of one call, in order, so that writes in place and views replay as they ran."""

    def __init__(self, outputs: int, device: torch.device, refused: Callable[[], None] = lambda: None) -> None:
        self.length = outputs
        self.refused = refused
        self.device = device.type
        self.operations: list[Operation] = []
        self._programs: dict[tuple[tuple[int, ...], int], tuple[list[Operation], bool]] = {}
        self.scalars: list[Scalar] = []
        self.obstacle = ""

    def refer(self, leaf: Any) -> Any:
        """What stands for an argument on the tape. A loss that is read by a further operation is a step to another."""
        if isinstance(leaf, Recorded):
            return Reference(leaf._place) if _tape_of(leaf) is self else _plain(leaf)
        if isinstance(leaf, Tensor) and leaf.ndim == 0:
            for scalar in self.scalars:
                if scalar.handed_out() is leaf:
                    scalar.absorbed = True
                    return Reference(scalar.index)
        return leaf

    def append(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any, writes: bool) -> list[int]:
        """Append an operation whose arguments refer to earlier ones; returns the index of each leaf of its result."""
        indices = [self._index(leaf) if isinstance(leaf, Tensor) else -1 for leaf in leaves_of(result)]
        self.operations.append(Operation(function, args, kwargs, tuple(indices), Context.now(self.device), writes))
        return indices

    def _index(self, leaf: Tensor) -> int:
        self.length += 1
        return self.length - 1

    def replay(self, outputs: Sequence[Tensor], wanted: Sequence[int]) -> list[Tensor]:
        """The tensors at ``wanted`` for other outputs. What was written in place is written to copies."""
        found: dict[int, Any] = dict(enumerate(outputs))
        operations, writes = self._program(tuple(wanted))
        if writes:
            found = {index: output.clone() for index, output in found.items()}
        for operation in operations:
            args = _resolved(operation.args, found)
            kwargs = _resolved(operation.kwargs, found) if operation.kwargs else {}
            result = operation.context.run(self.device, operation.function, args, kwargs)
            found.update(zip(operation.results, leaves_of(result), strict=True))
        return [found[index] for index in wanted]

    def recorded(self, wanted: Sequence[int]) -> tuple[Hashable, list[Tensor]] | None:
        """What a replay repeats, and the tensors in it; None unless all of it is torch's own and writes nothing."""
        operations, writes = self._program(tuple(wanted))
        if writes or not all(_is_of_torch(operation.function) for operation in operations):
            return None
        arguments = [(operation.args, operation.kwargs) for operation in operations]
        steps = [(o.function, o.results, o.context, signature(a)) for o, a in zip(operations, arguments, strict=True)]
        return (self.length, tuple(wanted), *steps), [t for t in leaves_of(arguments) if isinstance(t, Tensor)]

    def _program(self, wanted: tuple[int, ...]) -> tuple[list[Operation], bool]:
        """The operations to run, and whether one of them writes in place; found once, replayed at every step."""
        key = (wanted, len(self.operations))
        if key not in self._programs:
            operations = self._needed(wanted)
            self._programs[key] = operations, any(operation.writes for operation in operations)
        return self._programs[key]

    def _needed(self, wanted: Sequence[int]) -> list[Operation]:
        if any(operation.writes for operation in self.operations):
            last = max(i for i, operation in enumerate(self.operations) if set(operation.results) & set(wanted))
            return self.operations[: last + 1]
        needed, kept = set(wanted), []
        for operation in reversed(self.operations):
            if needed & set(operation.results):
                kept.append(operation)
                needed |= set(_references((operation.args, operation.kwargs)))
        return kept[::-1]


class Recorded(Tensor):
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
    return undone_by(stacks.restore, lambda: _run_and_recorded(func, args, kwargs))


def _run_and_recorded(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is Tensor.backward and isinstance(args[0], Recorded) and not args[0].requires_grad:
        args[0]._refused()
        raise LossIndependentError(
            "loss.backward()",
            "a loss without a gradient in the model's output",
            "a loss that depends on it",
            "Look for a detach(), an argmax or a torch.no_grad() between model(x) and the loss.",
        )
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    if func in _NOT_RECORDED:
        return map_leaves(_untaped(args), result)
    if not _writes_in_place(func, kwargs) and not any(isinstance(leaf, Tensor) for leaf in leaves_of(result)):
        return result
    return record(func, args, kwargs, result)


_NOT_RECORDED = frozenset(getattr(Tensor, name).__get__ for name in ("grad", "data", "grad_fn", "_base"))


def start(tape: Tape, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a call as recorded tensors; one of no dimension is a loss already."""
    return [_marked(output, tape, index, None) for index, output in enumerate(outputs)]


def record(
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
    if len(tapes) > 1:
        for tape in tapes.values():
            tape.obstacle = f"{_name(function)} mixes the outputs of two forward calls"
        return map_leaves(_plain, result)
    tape = next(iter(tapes.values()))
    made_by_sum = _is_sum(function, args, kwargs) if summed is None else summed
    writing = _writes_in_place(function, kwargs) if writes is None else writes
    referring = map_leaves(tape.refer, args), map_leaves(tape.refer, kwargs)
    indices = iter(tape.append(function, *referring, result, writing))

    def mark(leaf: Any) -> Any:
        index = next(indices)
        return _marked(leaf, tape, index, made_by_sum) if isinstance(leaf, Tensor) else leaf

    return map_leaves(mark, result)


def _marked(tensor: Tensor, tape: Tape, index: int, summed: bool | None) -> Tensor:
    if tensor.ndim == 0 and tensor.requires_grad:
        loss: Tensor = _plain(tensor)
        scalar = Scalar(index, bool(summed), weakref.ref(loss), loss.detach())
        tape.scalars.append(scalar)
        loss.register_hook(lambda gradient: scalar.factors.append(gradient.detach()))  # type: ignore[no-untyped-call]
        return loss
    if tensor.ndim == 0 and not tensor.is_floating_point():
        ordinary: Tensor = _plain(tensor)
        return ordinary
    marked = tensor if isinstance(tensor, Recorded) else _as_recorded(tensor)
    marked._tape, marked._place, marked._refused = weakref.ref(tape), index, tape.refused
    return marked


def _as_recorded(tensor: Tensor) -> Recorded:
    """torch 2.6's compiler, where it follows a compiled loss to here, fails on ``as_subclass``."""
    if torch.compiler.is_compiling():
        uncompiled: Callable[..., Recorded] = torch.compiler.disable(Tensor.as_subclass)  # type: ignore[no-untyped-call]
        return uncompiled(tensor, Recorded)
    return tensor.as_subclass(Recorded)


def _undo_forwards(arguments: Any) -> None:
    """The loss was interrupted, and no backward will follow."""
    for leaf in leaves_of(arguments):
        if isinstance(leaf, Recorded) and hasattr(leaf, "_refused"):
            leaf._refused()


def _tape_of(leaf: Any) -> Tape | None:
    return leaf._tape() if isinstance(leaf, Recorded) and hasattr(leaf, "_tape") else None


def _plain(leaf: Any) -> Any:
    return leaf.as_subclass(Tensor) if isinstance(leaf, Recorded) else leaf


def _untaped(arguments: Any) -> Callable[[Any], Any]:
    """Marks what ``.data`` and the like return: on no tape, yet known again where somebody takes it for a loss."""
    source = next((leaf for leaf in leaves_of(arguments) if isinstance(leaf, Recorded)), None)

    def mark(leaf: Any) -> Any:
        if source is None or not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.requires_grad:
            return _plain(leaf)
        marked = leaf.as_subclass(Recorded)
        marked._refused = source._refused
        return marked

    return mark


def plain(structure: Any) -> Any:
    """The same structure with ordinary tensors in place of recorded ones."""
    with torch._C.DisableTorchFunctionSubclass():
        return map_leaves(_plain, structure)


def _resolved(structure: Any, found: dict[int, Any]) -> Any:
    return map_leaves(lambda leaf: found[leaf.index] if isinstance(leaf, Reference) else leaf, structure)


def _references(structure: Any) -> Iterator[int]:
    return (leaf.index for leaf in leaves_of(structure) if isinstance(leaf, Reference))


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))


def _is_of_torch(function: Callable[..., Any]) -> bool:
    """Whether its result depends on nothing but its arguments."""
    owner = getattr(function, "__objclass__", None) or getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or getattr(type(owner), "__module__", "")
    return owner is Tensor or owner is torch._C.TensorBase or str(module).split(".")[0] == "torch"


def _writes_in_place(function: Callable[..., Any], kwargs: Any) -> bool:
    name = _name(function)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _IN_PLACE or kwargs.get("inplace") is True or "out" in kwargs


_IN_PLACE = frozenset(
    ["__setitem__"]
    + [f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or")]
)
_SUMS = frozenset([torch.sum, Tensor.sum, torch.nansum, Tensor.nansum])


def _is_sum(function: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    if function in _SUMS or kwargs.get("reduction") == "sum":
        return True
    if not any(isinstance(argument, str) and argument == "sum" for argument in args):
        return False
    try:
        return inspect.signature(function).bind(*args, **kwargs).arguments.get("reduction") == "sum"
    except (TypeError, ValueError):
        return False


class EnergyLoss:
    """The explicit form of a loss, for one that the recorder cannot follow.

    The loss function is called on ordinary tensors, and again whenever the prediction has moved, whatever it does
    inside (NumPy, compiled code, custom autograd functions).

    Args:
        loss_fn: From the model's output, and whatever else it is called with, to a loss of no dimension.

    Raises:
        LossNotRecordedError: when called, if the loss has a dimension.

    Example:
        >>> import torch, torch2ebm
        >>> criterion = torch2ebm.EnergyLoss(torch.nn.functional.cross_entropy)
        >>> criterion(torch.zeros(2, 4), torch.tensor([0, 1]))
        tensor(1.3863)
    """

    def __init__(self, loss_fn: Callable[..., Tensor]) -> None:
        self.loss_fn = loss_fn

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = self.loss_fn(*plain(args), **plain(kwargs))
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise LossNotRecordedError(
                f"EnergyLoss({_name(self.loss_fn)})", got, "a tensor of no dimension", "Reduce it to one number."
            )
        given = {**getattr(self.loss_fn, "keywords", {}), **kwargs}  # those of a functools.partial
        summed = getattr(self.loss_fn, "reduction", given.get("reduction")) == "sum"
        return record(self.loss_fn, args, kwargs, loss, summed, writes=True)  # type: ignore[no-any-return]
