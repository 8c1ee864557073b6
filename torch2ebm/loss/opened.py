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


def opened(tape: Tape, own: Sequence[Place], wanted: Sequence[Place]) -> Replay | None:
    """The replay with every whole function opened; None where one cannot be."""
    closed = tape.replay_of(own, wanted)
    if not any(entry.operation.whole for entry in closed.entries):
        return closed
    found: dict[Place, Tensor] = {**tape.values, **closed.constants}
    entries: list[TapeEntry] = []
    for entry in closed.entries:
        inside = _inside(entry, found, tape) if entry.operation.whole else [entry]
        if inside is None:
            return None
        for each in inside:
            found.update(each.run(tape.device, found))
        entries += inside
    return replace(closed, entries=entries, writes=any(entry.operation.writes for entry in entries))


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
