"""How the scalar that backward was called on was made of its terms, read off the tape."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor

from torch2ebm.common.nested import ResultReference, leaves_of
from torch2ebm.loss.operations import function_name, weighted_entries
from torch2ebm.loss.tape import Place, TapeEntry

_PRODUCTS = frozenset(["mul", "mul_", "multiply", "__mul__", "__rmul__"])
_QUOTIENTS = frozenset(["div", "div_", "divide", "true_divide", "__truediv__"])
_ADDITIVE = frozenset(
    {"add", "add_", "__add__", "__radd__", "sub", "sub_", "__sub__", "__rsub__", "rsub", "subtract", "neg", "negative"}
    | {"positive", "sum", "mean", "stack", "cat", "concat", "hstack", "clone", "to", "double", "float", "view"}
    | {"reshape", "squeeze", "unsqueeze", "flatten", "contiguous", "cpu", "cuda", "alias"}
)


def made_by_sum(entries: Sequence[TapeEntry], wanted: Collection[Place], batch: int) -> bool:
    """Whether a sum over what may be the batch is in it, and no division by its size has made a mean of it."""
    summed: set[Place] = set()
    for entry, reduced in _with_reduced(entries):
        places = [place for place in entry.results if place is not None]
        sums = (entry.operation.summed and entry.reduced and not reduced) or not summed.isdisjoint(entry.reads)
        if sums and entry.differentiable and not _normalises(entry, batch):
            summed.update(places)
    return not summed.isdisjoint(wanted)


def of_rows(entries: Sequence[TapeEntry], wanted: Collection[Place]) -> bool:
    """Whether backward was called on a vector of losses of samples: one of no scalars that were stacked."""
    made = [pair for pair in _with_reduced(entries) if not set(wanted).isdisjoint(pair[0].results)]
    return any(entry.operation.function is weighted_entries and not reduced for entry, reduced in made)


def _with_reduced(entries: Sequence[TapeEntry]) -> Iterator[tuple[TapeEntry, bool]]:
    """Each entry, and whether all that it reads was computed from what has no dimension: no batch is left in it."""
    of_scalars: set[Place] = set()
    for entry in entries:
        reduced = bool(entry.reads) and of_scalars.issuperset(entry.reads)
        if reduced or entry.reduced:
            of_scalars.update(place for place in entry.results if place is not None)
        yield entry, reduced


def _normalises(entry: TapeEntry, batch: int) -> bool:
    """Whether it divides by a tensor (a mask's sum, for one), or by the batch size or a multiple of it."""
    name, args = function_name(entry.operation.function), entry.operation.args
    if name not in _PRODUCTS | _QUOTIENTS or len(args) < 2:
        return False
    if name in _QUOTIENTS:
        return isinstance(args[1], (ResultReference, Tensor)) or _is_multiple(args[1], batch)
    return any(_is_multiple(1 / arg, batch) for arg in args if isinstance(arg, (int, float)) and arg)


def _is_multiple(number: Any, batch: int) -> bool:
    if not isinstance(number, (int, float)) or not math.isfinite(number) or not number:
        return False
    times = abs(number) / batch
    return round(times) >= 1 and abs(times - round(times)) <= 1e-9 * times


def terms_of_a_sample(entries: Sequence[TapeEntry], batch: int) -> float:
    """How many terms (tokens, pixels, features) a mean in it takes of each sample; 1 where it is over samples alone."""
    return max([1.0, *(entry.operation.terms / batch for entry in entries if entry.reduced and entry.differentiable)])


def is_sum_over_calls(entries: Sequence[TapeEntry], own: Collection[Place], others: Collection[Place]) -> bool:
    """Whether the loss is one part that depends on the outputs of this call, plus one that depends on other calls'.

    Each call then relaxes on its own, the other part being a constant.
    """
    here, elsewhere = set(own), set(others)
    for entry in entries:
        reads_own, reads_others = not here.isdisjoint(entry.reads), not elsewhere.isdisjoint(entry.reads)
        if reads_own and reads_others and not _adds(entry):
            return False
        places = [place for place in entry.results if place is not None]
        here.update(places if reads_own else ())
        elsewhere.update(places if reads_others else ())
    return True


def _adds(entry: TapeEntry) -> bool:
    name, args = function_name(entry.operation.function), entry.operation.args
    if name in _PRODUCTS:
        return len(entry.reads) == 1
    if name in _QUOTIENTS:
        return len(entry.reads) == 1 and any(isinstance(leaf, ResultReference) for leaf in leaves_of(args[:1]))
    return name in _ADDITIVE
