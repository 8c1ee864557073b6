"""Tensors that record what you do to the model's output, so that it can be repeated for a prediction that has moved.

``model(x)`` returns tensors of :class:`TapedTensor`. What is computed from them is one too, up to the scalar that
backward is called on, however many numbers it is multiplied by, added to or taken the root of. In everything that is no
step to a loss (to detach, print, format, pickle or copy it) it is an ordinary tensor.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch2ebm.common.nested import ResultReference, leaves_of, map_leaves
from torch2ebm.errors import LossIndependentError
from torch2ebm.isolation.interrupts import undone_by
from torch2ebm.isolation.torch_modes import Stacks
from torch2ebm.loss.operations import (
    is_draw_of_its_own,
    out_of_place,
    summed_sizes,
    terms_averaged,
    weighted_entries,
    writes_in_place,
)
from torch2ebm.loss.outside import factor_outside
from torch2ebm.loss.roots import BACKWARDS, run_backward
from torch2ebm.loss.tape import Operation, Place, Scalar, Tape


class TapedTensor(Tensor):
    """A tensor that knows its tape. It holds no tape alive: autograd's graph of the call does."""

    _tape: weakref.ref[Tape]
    _place: Place
    _refused: Callable[[], None]  # called before a backward is refused
    _scalar: Scalar  # of one number that requires a gradient
    _owns_storage: bool

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        try:
            compiling = torch.compiler.is_compiling()
            if not compiling and func in BACKWARDS:
                args, kwargs = meant((args, kwargs or {}))
                _check_dependent(func, args[0] if args else None)
                return run_backward(func, args, kwargs, _Taping())
            caller = "" if compiling else sys._getframe(1).f_globals.get("__name__", "")
            if "torch._dynamo" in sys.modules:  # it would follow a compiled loss to here, and make no tape of it
                uncompiled = torch.compiler.disable(_modes_undone)  # type: ignore[no-untyped-call]
                return uncompiled(func, args, kwargs or {}, caller)
            return _modes_undone(func, args, kwargs or {}, caller)
        except KeyboardInterrupt:
            _undo_forwards((args, kwargs or {}))
            raise


# attributes outside of the autograd graph: through them no gradient reaches the loss
_NOT_TAPED = frozenset(getattr(Tensor, name).__get__ for name in ("grad", "data", "grad_fn", "_base"))
_READS_NUMBERS = frozenset(
    [
        *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__float__, Tensor.__int__),
        *(Tensor.__index__, Tensor.__contains__, torch.is_nonzero, Tensor.is_nonzero, torch.equal, Tensor.equal),
        *(torch.allclose, Tensor.allclose, Tensor.__complex__),
    ]
)
# torch makes something else of a subclass here
_OF_ORDINARY_TENSORS = frozenset(
    [
        *(Tensor.__format__, Tensor.__repr__, Tensor.__reduce_ex__, Tensor.__deepcopy__, Tensor.__array__),
        *(Tensor.detach, torch.detach),
    ]
)
_LEAVE = _OF_ORDINARY_TENSORS | _READS_NUMBERS | _NOT_TAPED


def _modes_undone(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], caller: str) -> Any:
    stacks = Stacks.now()
    return undone_by(stacks.restore, lambda: _run_on_tape(func, args, kwargs, caller))


def stand_for(kept: Tensor, taped: Tensor) -> None:
    """Let a tensor that forward has left with somebody be the taped one in all that is done to it from now on.

    By its class alone: a view can neither be detached in place nor get another history.
    """
    kept.__class__ = TapedTensor
    kept._instead = taped  # type: ignore[attr-defined]


def meant(structure: Any) -> Any:
    """The structure with each tensor that stands for another replaced by that."""
    if any(hasattr(leaf, "_instead") for leaf in leaves_of(structure)):
        return map_leaves(lambda leaf: getattr(leaf, "_instead", leaf), structure)
    return structure


def _run_on_tape(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], caller: str) -> Any:
    if torch.is_grad_enabled():
        args, kwargs = meant((args, kwargs))
    if func in _LEAVE and args and (tape := tape_of(args[0])) is not None:
        tape.left = True
    if func in _OF_ORDINARY_TENSORS:
        return func(*plain(args), **plain(kwargs))
    # else the operation would come back to __torch_function__
    with torch._C.DisableTorchFunctionSubclass():
        if func in _NOT_TAPED:
            return map_leaves(_untaped(args), func(*args, **kwargs))
        if is_draw_of_its_own(func):
            return map_leaves(_off_tape, func(*args, **kwargs))
        operation = _operation(func, args, kwargs, caller)
        result = func(*args, **kwargs)
        if operation.adopts:
            return _adopted(operation, args[0], result)
        # a shape or a number: nothing to replay
        if not operation.writes and not any(map(_belongs_on_tape, leaves_of(result))):
            return map_leaves(_plain, _left(result, args))
        return _taped(operation, result)


def _left(result: Any, args: tuple[Any, ...]) -> Any:
    """A tensor of no dimension that is no float, a comparison for example, is one that Python may decide by."""
    if any(isinstance(leaf, Tensor) for leaf in leaves_of(result)):
        for tape in filter(None, map(tape_of, leaves_of(args))):
            tape.left = True
    return result


def _belongs_on_tape(leaf: Any) -> bool:
    """Whether a loss may depend on it: a number of no dimension that is no float is a count, or an index."""
    return isinstance(leaf, Tensor) and (leaf.ndim > 0 or leaf.is_floating_point() or leaf.is_complex())


def _operation(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], caller: str) -> Operation:
    """What goes on the tape; made before it runs, since it may write on what it reads."""
    factor = factor_outside(func, args, caller)
    if factor is not None:
        return Operation(Tensor.positive, args[:1], {}, factor=factor)
    if not writes_in_place(func, kwargs):
        return Operation(
            func, args, kwargs, summed=summed_sizes(func, args, kwargs), terms=terms_averaged(func, args, kwargs)
        )
    written = args[0] if args and "out" not in kwargs else None
    if isinstance(written, TapedTensor) and getattr(written, "_owns_storage", False):
        return Operation(out_of_place(func), args, kwargs)  # no view of it shows what is written
    if type(written) is Tensor:
        return Operation(out_of_place(func), (written.detach().clone(), *args[1:]), kwargs, adopts=True)
    return Operation(func, args, kwargs, writes=True)


def _adopted(operation: Operation, written: Tensor, result: Any) -> Any:
    """A tensor of the user's own that losses are written on, one by one, is on the tape from then on."""
    if written.requires_grad:
        written.__class__ = TapedTensor
        _taped(operation, written)
    return _plain(result) if result is not written else written


def _off_tape(leaf: Any) -> Any:
    """What keeps its numbers when the prediction moves; what was written in place stays the very tensor."""
    if isinstance(leaf, TapedTensor) and hasattr(leaf, "_tape"):
        del leaf._tape
        return leaf
    return _plain(leaf)


def put_on_new_tape(tape: Tape, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a call as taped tensors."""
    return [_marked(output, tape, place) for output, place in zip(outputs, tape.outputs, strict=True)]


def taken_off(structure: Any) -> tuple[Any, list[Tape]]:
    """The arguments of a call as ordinary tensors, and the tapes that a gradient in them goes back to."""
    taped = [leaf for leaf in leaves_of(structure) if isinstance(leaf, TapedTensor)]
    if not taped:
        return structure, []
    tapes = [tape for leaf in taped if leaf.requires_grad and (tape := tape_of(leaf)) is not None]
    return plain(meant(structure)), tapes


def put_on_tape(operation: Operation, result: Any) -> Any:
    """Record an operation that has run; returns its result with the tensors marked."""
    with torch._C.DisableTorchFunctionSubclass():
        return _taped(operation, result)


def _taped(operation: Operation, result: Any) -> Any:
    arguments = (operation.args, operation.kwargs)
    tape = _tape_for(list(leaves_of(arguments)))
    if tape is None:
        return map_leaves(_untaped(arguments), result)
    args, kwargs = map_leaves(lambda leaf: _referred(leaf, tape), arguments)
    recorded = replace(operation, args=args, kwargs=kwargs)
    places = iter(tape.append(recorded, result))

    def mark(leaf: Any) -> Any:
        place = next(places)
        if place is None or not _belongs_on_tape(leaf):
            tape.left = True
            return _plain(leaf)
        return _marked(leaf, tape, place)

    return map_leaves(mark, result)


def _tape_for(leaves: Sequence[Any]) -> Tape | None:
    """The tape of an operation on these. What has no gradient does not join two tapes: it is a constant."""
    on_tapes = [(leaf, tape) for leaf in leaves if (tape := tape_of(leaf)) is not None]
    tapes = {id(tape): tape for _, tape in on_tapes}
    if len(tapes) > 1:
        tapes = {id(tape): tape for leaf, tape in on_tapes if leaf.requires_grad and torch.is_grad_enabled()}
    if not tapes:
        return None
    tape, *others = tapes.values()
    for other in others:
        tape.join(other)
    return tape


def _marked(tensor: Tensor, tape: Tape, place: Place) -> Tensor:
    owns_storage = tensor.ndim == 0 and not hasattr(tensor, "_tape") and not tensor._is_view()
    marked = tensor if isinstance(tensor, TapedTensor) else _as_taped(tensor)
    marked._tape, marked._place, marked._refused = weakref.ref(tape), place, tape.refused
    marked._owns_storage = owns_storage or getattr(marked, "_owns_storage", False)
    if tensor.requires_grad and tensor.numel() == 1:
        _watch(marked, tape, place)
    return marked


def _watch(marked: TapedTensor, tape: Tape, place: Place) -> None:
    """A backward that comes through tells the tape, from the node of autograd's graph: no hook is on the tensor."""
    node, scalar, number = marked.grad_fn, Scalar(place, marked.as_subclass(Tensor).detach()), marked.output_nr
    marked._scalar = scalar
    tape.scalars.append(scalar)
    if node is not None:
        node.register_prehook(lambda gradients: scalar.arrived(gradients[number]))


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


def tape_of(leaf: Any) -> Tape | None:
    """The tape that a tensor is on; None for all else, and where the call that it came from is over."""
    tape = leaf._tape() if isinstance(leaf, TapedTensor) and hasattr(leaf, "_tape") else None
    return None if tape is None else tape.whole()


def _referred(leaf: Any, tape: Tape) -> Any:
    """What stands for an argument on the tape; a constant without the graph that it came from, which may hold ours."""
    if isinstance(leaf, TapedTensor) and tape_of(leaf) is tape:
        return ResultReference(leaf._place)
    if isinstance(leaf, Tensor):
        # a tensor of another, finished call is a constant like any target
        leaf = _plain(leaf)
        return leaf.detach() if leaf.requires_grad else leaf
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


# backward


class _Taping:
    def is_taped(self, leaf: Any) -> bool:
        return isinstance(leaf, TapedTensor)

    def plain(self, structure: Any) -> Any:
        return plain(structure)

    def weighted(self, losses: Tensor, weights: Tensor) -> Tensor:
        operation = Operation(weighted_entries, (losses, weights), {})
        return put_on_tape(operation, weighted_entries(plain(losses), weights))  # type: ignore[no-any-return]


def _check_dependent(func: Callable[..., Any], root: Any) -> None:
    if func is not Tensor.backward or not isinstance(root, TapedTensor):
        return
    with torch._C.DisableTorchFunctionSubclass():
        dependent = root.requires_grad
    if not dependent:
        root._refused()
        raise LossIndependentError(
            "loss.backward()",
            "a loss without a gradient in the model's output",
            "a loss that depends on it",
            "Look for a detach(), an argmax or a torch.no_grad() between model(x) and the loss.",
        )
