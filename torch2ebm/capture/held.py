"""Results of a run that somebody else still holds when it ends, and may use in the loss."""

from __future__ import annotations

import functools
import gc
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.capture.functions import tensors_of
from torch2ebm.capture.run import Cuts, Run
from torch2ebm.isolation.module_state import may_be_packed


def held_elsewhere(run: Run, numbers: Mapping[int, int], cuts: Cuts | None) -> dict[int, Tensor]:
    """Results that have more references than the run and its output: somebody has kept them, and may use them."""
    found = _references(run.hot)
    if run.matched and cuts is not None and cuts.references == found:
        return {}  # as in an earlier run, in which nobody held any
    own = Counter(map(id, (*run.hot, *run.leaves.values(), *run.predictions.values(), *tensors_of(run.output))))
    own.update(id(tensor) for tensor, _ in run.originals)  # a constant that forward has written hot numbers into
    none = _references([object()])[0] - 1  # what looking itself adds
    more = [
        run.hot[i]
        for i, count in enumerate(found)
        if count - none > own[id(run.hot[i])]
        and run.hot[i].requires_grad
        and count - none - _references_of_torch(run.hot[i]) > own[id(run.hot[i])]
        and not isinstance(run.hot[i], nn.Parameter)
    ]
    if more and may_be_packed():  # they refer to what autograd saves
        more = _referred(more, run)
    if run.matched and cuts is not None and not more:
        cuts.references[:] = found
    return {numbers[id(tensor)]: tensor for tensor in more}


def _referred(tensors: list[Tensor], run: Run) -> list[Tensor]:
    """Those that an object of Python refers to, beside the run: all of them are looked through once."""
    known = [tensors, run.hot, run.leaves, run.predictions, run.output, vars(run), run]
    referrers = gc.get_referrers(*tensors)
    others = [r for r in referrers if not isinstance(r, FrameType) and all(r is not each for each in known)]
    held = {id(each) for referrer in others for each in gc.get_referents(referrer)}
    return [tensor for tensor in tensors if id(tensor) in held]


def _references_of_torch(tensor: Tensor) -> int:
    """What a tensor that C++ holds, as autograd does what it saves, adds to its references from Python."""
    return int(_torch_counts_itself() and tensor._use_count() > 1)  # type: ignore[attr-defined]


@functools.cache
def _torch_counts_itself() -> bool:
    """Whether torch has a reference to the Python object of a tensor that it holds; older versions have none."""
    if not hasattr(Tensor, "_use_count"):
        return False
    # in a thread of its own: hooks on saved tensors, a checkpoint's for example, would take these for the model's
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_counts_what_is_saved).result()


def _counts_what_is_saved() -> bool:
    made = [torch.ones(1, requires_grad=True).exp()]  # saves its result
    before = _references(made)
    saved = made[0] * made[0]
    after = _references(made)
    del saved
    return before != after or before[0] > _references([object()])[0]


def _references(things: Sequence[Any]) -> list[int]:
    return [sys.getrefcount(things[i]) for i in range(len(things))]
