"""How the scalar that backward was called on was made of its terms, read off the tape."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor

from torch2ebm.common.nested import ResultReference, leaves_of
from torch2ebm.loss.operations import function_name, target_of, weighted_entries
from torch2ebm.loss.tape import Operation, Place, TapeEntry

_PRODUCTS = frozenset(["mul", "mul_", "multiply", "__mul__", "__rmul__"])
_QUOTIENTS = frozenset(["div", "div_", "divide", "true_divide", "__truediv__"])
_ADDITIVE = frozenset(
    {"add", "add_", "__add__", "__radd__", "sub", "sub_", "__sub__", "__rsub__", "rsub", "subtract", "neg", "negative"}
    | {"positive", "sum", "mean", "stack", "cat", "concat", "hstack", "clone", "to", "double", "float", "view"}
    | {"reshape", "squeeze", "unsqueeze", "flatten", "contiguous", "cpu", "cuda", "alias"}
)


def made_by_sum(entries: Sequence[TapeEntry], wanted: Collection[Place], batch: int) -> bool:
    """Whether a sum over what may be the batch is in it, and no division by its size has made a mean of it."""
    summed: dict[Place, tuple[int, ...]] = {}  # and the sizes that the sums went over
    for entry, reduced in _with_reduced(entries):
        sizes = tuple([size for place in entry.reads for size in summed.get(place, ())])
        if entry.operation.summed and entry.reduced and not reduced:
            sizes += entry.operation.summed
        if sizes and entry.differentiable and not _normalises(entry, batch, sizes):
            summed.update((place, sizes) for place in entry.results if place is not None)
    return not summed.keys().isdisjoint(wanted)


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


def _normalises(entry: TapeEntry, batch: int, sizes: Sequence[int]) -> bool:
    """Whether it divides by a tensor (a mask's sum, for one), or by the batch size and other sizes beside it."""
    name, args = function_name(entry.operation.function), entry.operation.args
    if name not in _QUOTIENTS or len(args) < 2:
        return False
    return isinstance(args[1], (ResultReference, Tensor)) or _counts_samples(args[1], batch, sizes)


def _counts_samples(number: Any, batch: int, sizes: Sequence[int]) -> bool:
    """Whether it is the batch size, or that times some of the other sizes, or the double of one of these."""
    if not isinstance(number, (int, float)):
        return False
    others = list(sizes)
    if batch in others:
        others.remove(batch)
    counts = {batch}
    for size in others:
        counts |= {count * size for count in counts}
    return abs(number) in counts | {2 * count for count in counts}


def terms_of_a_sample(entries: Sequence[TapeEntry], batch: int) -> float:
    """How many terms (tokens, pixels, features) a mean in it takes of each sample; 1 where it is over samples alone."""
    return max([1.0, *(entry.operation.terms / batch for entry in entries if entry.reduced and entry.differentiable)])


def rows_of_targets(entries: Sequence[TapeEntry]) -> list[int]:
    """The sizes of the targets of torch's losses; none where their rows were chosen."""
    if any(chosen(entry.operation) for entry in entries):
        return []
    found = [target_of(entry.operation.function, entry.operation.args, entry.operation.kwargs) for entry in entries]
    return [target.shape[0] for target in found if target is not None and target.ndim]


def chosen(operation: Operation) -> bool:
    """Whether it takes rows that a mask or a list of indices chooses: their number says nothing of the batch."""
    if function_name(operation.function) in ("masked_select", "index_select", "take", "take_along_dim"):
        return True
    if function_name(operation.function) != "__getitem__":
        return False
    index = operation.args[1]
    return any(isinstance(each, (Tensor, list)) for each in (index if isinstance(index, tuple) else [index]))


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
