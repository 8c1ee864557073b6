"""An :class:`EnergyLoss` of torch operations, opened for ``compile=True``: its operations in the place of its call.

Eagerly the loss function itself runs at every step, whatever it does. A program runs no Python, so here the function
runs once on taped tensors. What reads a number out of one, to branch on it for example, stays closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torch2ebm.common.nested import ResultReference, leaves_of
from torch2ebm.loss.tape import Operation, Place, Replay, Tape, TapeEntry, resolved
from torch2ebm.loss.taped_tensor import TapedTensor, put_on_new_tape, tape_of

_ARITHMETIC = frozenset([Tensor.mul, torch.mul, Tensor.div, torch.div, Tensor.add, torch.add, Tensor.sub, torch.sub])


def opened(tape: Tape, own: Sequence[Place], wanted: Sequence[Place]) -> Replay | None:
    """The replay with every whole function opened; None where one cannot be."""
    closed = tape.replay_of(own, wanted)
    if not any(entry.operation.whole for entry in closed.entries):
        with_tensors = [_with_tensors(entry, tape) for entry in closed.entries]
        changed = any(ours is not theirs for ours, theirs in zip(with_tensors, closed.entries, strict=True))
        return replace(closed, entries=with_tensors) if changed else closed
    found: dict[Place, Tensor] = {**tape.values, **closed.constants}
    entries: list[TapeEntry] = []
    for entry in closed.entries:
        inside = _inside(entry, found, tape) if entry.operation.whole else [entry]
        if inside is None:
            return None
        for each in inside:
            found.update(each.run(tape.device, found))
        entries += [_with_tensors(each, tape) for each in inside]
    return replace(closed, entries=entries, writes=any(entry.operation.writes for entry in entries))


def _with_tensors(entry: TapeEntry, tape: Tape) -> TapeEntry:
    """A coefficient of a loss as a tensor, since a number of Python's would be a setting of the program."""
    function, args = entry.operation.function, entry.operation.args
    if function not in _ARITHMETIC or entry.operation.kwargs or len(args) != 2 or not entry.reduced:
        return entry
    if not any(type(arg) is float for arg in args) or entry.dtype not in (torch.float32, torch.float64):
        return entry
    made = [torch.full((), a, dtype=entry.dtype, device=tape.device) if type(a) is float else a for a in args]
    return replace(entry, operation=replace(entry.operation, args=tuple(made)))


def _inside(entry: TapeEntry, found: dict[Place, Tensor], outer: Tape) -> list[TapeEntry] | None:
    """The operations of a whole function on the same places; None where it does more than these."""
    places = list(dict.fromkeys(entry.reads))
    tape = Tape(len(places), torch.device(outer.device))
    tape.outputs = places
    with torch.enable_grad():
        leaves = [found[place].detach().clone().requires_grad_() for place in places]
        taped = dict(zip(places, put_on_new_tape(tape, [leaf * 1 for leaf in leaves]), strict=True))
        args, kwargs = (resolved(each, taped) for each in (entry.operation.args, entry.operation.kwargs))
        result = entry.operation.function(*args, **kwargs)
    if not isinstance(result, TapedTensor) or tape_of(result) is not tape or tape.left:
        return None
    if any(isinstance(leaf, TapedTensor) and leaf is result for leaf in leaves_of((args, kwargs))):
        return None
    alias = Operation(Tensor.positive, (ResultReference(result._place),), {})
    last = replace(entry, operation=alias, reads=(result._place,))
    return [*tape.leading_to([result._place]), last]
