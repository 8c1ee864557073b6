"""The tape: the operations from the model's output to the loss, in order, so that they can be run again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch2ebm.common.nested import ResultReference, leaves_of, map_leaves, signature
from torch2ebm.isolation.torch_modes import Ambient


@dataclass(frozen=True)
class TapeEntry:
    function: Callable[..., Any]
    args: Any
    kwargs: Any
    results: tuple[int, ...]  # the index of each leaf of the result, -1 where it is no tensor
    ambient: Ambient  # a target computed under no_grad must not pass a gradient in the replay either
    writes: bool


@dataclass
class Scalar:
    """A loss: where it stands on the tape, whether a sum made it, and the factors it entered backwards with."""

    index: int
    summed: bool
    handed_out: weakref.ref[Tensor]  # the user's ordinary tensor; weak, since its hook holds this scalar
    value: Tensor  # of no dimension
    absorbed: bool = False  # read by a later entry on the tape, through which its gradient comes
    factors: list[Tensor] = field(default_factory=list)


class Tape:
    """The entries on the outputs of one call, in order, so that writes in place and views replay as they ran."""

    def __init__(self, outputs: int, device: torch.device, refused: Callable[[], None] = lambda: None) -> None:
        self.length = outputs
        self.refused = refused
        self.device = device.type
        self.entries: list[TapeEntry] = []
        # by the indices wanted and the length then: the tape may grow after a first backward
        self._entries: dict[tuple[tuple[int, ...], int], tuple[list[TapeEntry], bool]] = {}
        self.scalars: list[Scalar] = []
        self.obstacle = ""

    def loss_read_again(self, leaf: Tensor) -> ResultReference | None:
        """The place of a loss on the tape; None for other tensors. One that is read again is a step to a later loss."""
        for scalar in self.scalars:
            if scalar.handed_out() is leaf:  # by identity: == of tensors is no bool
                scalar.absorbed = True
                return ResultReference(scalar.index)
        return None

    def append(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any, writes: bool) -> list[int]:
        """Append an entry whose arguments refer to earlier ones; returns the index of each leaf of its result."""
        indices = [self._index(leaf) if isinstance(leaf, Tensor) else -1 for leaf in leaves_of(result)]
        self.entries.append(TapeEntry(function, args, kwargs, tuple(indices), Ambient.now(self.device), writes))
        return indices

    def _index(self, leaf: Tensor) -> int:
        self.length += 1
        return self.length - 1

    def replay(self, outputs: Sequence[Tensor], wanted: Sequence[int]) -> list[Tensor]:
        """The tensors at ``wanted`` for other outputs. What was written in place is written to copies."""
        found: dict[int, Any] = dict(enumerate(outputs))
        entries, writes = self._entries_for(tuple(wanted))
        if writes:
            # else a write would reach the caller's prediction
            found = {index: output.clone() for index, output in found.items()}
        for entry in entries:
            args = _resolved(entry.args, found)
            kwargs = _resolved(entry.kwargs, found) if entry.kwargs else {}
            result = entry.ambient.run(self.device, entry.function, args, kwargs)
            found.update(zip(entry.results, leaves_of(result), strict=True))
        return [found[index] for index in wanted]

    def program_inputs(self, wanted: Sequence[int]) -> tuple[Hashable, list[Tensor]] | None:
        """What a replay repeats, and the tensors in it; None unless all of it is torch's own and writes nothing."""
        entries, writes = self._entries_for(tuple(wanted))
        if writes or not all(_is_of_torch(entry.function) for entry in entries):
            return None
        arguments = [(entry.args, entry.kwargs) for entry in entries]
        steps = [(o.function, o.results, o.ambient, signature(a)) for o, a in zip(entries, arguments, strict=True)]
        return (self.length, tuple(wanted), *steps), [t for t in leaves_of(arguments) if isinstance(t, Tensor)]

    def _entries_for(self, wanted: tuple[int, ...]) -> tuple[list[TapeEntry], bool]:
        """The entries to run, and whether one of them writes in place; found once, replayed at every step."""
        key = (wanted, len(self.entries))
        if key not in self._entries:
            entries = self._needed(wanted)
            self._entries[key] = entries, any(entry.writes for entry in entries)
        return self._entries[key]

    def _needed(self, wanted: Sequence[int]) -> list[TapeEntry]:
        if any(entry.writes for entry in self.entries):
            # A write changes what views made before it show, which no argument tells: all entries run, in order.
            last = max(i for i, entry in enumerate(self.entries) if set(entry.results) & set(wanted))
            return self.entries[: last + 1]
        needed, kept = set(wanted), []
        # backwards from the loss: metrics and logging on the output are not replayed
        for entry in reversed(self.entries):
            if needed & set(entry.results):
                kept.append(entry)
                needed |= set(_references((entry.args, entry.kwargs)))
        return kept[::-1]


def _resolved(structure: Any, found: dict[int, Any]) -> Any:
    return map_leaves(lambda leaf: found[leaf.index] if isinstance(leaf, ResultReference) else leaf, structure)


def _references(structure: Any) -> Iterator[int]:
    return (leaf.index for leaf in leaves_of(structure) if isinstance(leaf, ResultReference))


def _is_of_torch(function: Callable[..., Any]) -> bool:
    """Whether a function is torch's own, whose result depends on its arguments and modes alone."""
    owner = getattr(function, "__objclass__", None) or getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or getattr(type(owner), "__module__", "")
    return owner is Tensor or owner is torch._C.TensorBase or str(module).split(".")[0] == "torch"
