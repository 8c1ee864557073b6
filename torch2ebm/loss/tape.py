"""The tape: the operations from the models' outputs to the loss, in order, so that they can be run again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch2ebm.common.nested import ResultReference, leaves_of, map_leaves, signature
from torch2ebm.isolation.torch_modes import Ambient


class Place:
    """Where a tensor stands on a tape; an object and no number, so that two tapes can be joined."""

    __slots__ = ()


@dataclass(frozen=True)
class Operation:
    """What has run, as it is to be run again.

    Attributes:
        writes: Whether it writes in place, so that a replay works on copies and leaves no entry out.
        summed: The sizes that it sums over, where it is a sum over what may be the batch.
        terms: How many terms it averages; 0 where it is no mean.
        factor: Of a gradient scaler or of an accumulation: it is no part of the loss, and a replay leaves it out.
        whole: Whether it is a function of the user's own, whose inside is on no tape.
        adopts: Whether it has written on a tensor that was on no tape, and now is.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    writes: bool = False
    summed: tuple[int, ...] = ()
    terms: int = 0
    factor: float | Tensor | None = None
    whole: bool = False
    adopts: bool = False


@dataclass(frozen=True)
class TapeEntry:
    """An operation on a tape: each tensor that stands on the tape has its reference in its place."""

    operation: Operation
    reads: tuple[Place, ...]
    results: tuple[Place | None, ...]  # for each leaf of the result, None where it is no tensor
    ambient: Ambient  # a target computed under no_grad must not pass a gradient in the replay either
    differentiable: bool  # whether a result requires a gradient
    reduced: bool  # whether every result has no dimension

    def run(self, device: str, found: Mapping[Place, Any]) -> Iterator[tuple[Place, Any]]:
        args, kwargs = resolved(self.operation.args, found), resolved(self.operation.kwargs, found)
        result = self.ambient.run(device, self.operation.function, args, kwargs)
        return ((place, leaf) for place, leaf in zip(self.results, leaves_of(result), strict=True) if place is not None)


@dataclass
class Scalar:
    """A tensor of one number on a tape. A backward that goes through it leaves here with which gradient.

    Attributes:
        asked: While a backward is called on this scalar: the gradient that it was given, or True for 1.
        task: The backward that has come through last, as autograd numbers them.
        factor: The gradient that arrived then.
    """

    place: Place
    value: Tensor
    asked: Tensor | bool | None = None
    task: int = -1
    factor: Tensor | None = None

    def arrived(self, gradient: Tensor | None) -> None:
        if gradient is not None:
            self.task, self.factor = torch._C._current_graph_task_id(), gradient.detach()

    @property
    def given(self) -> float | None:
        """The gradient that whoever called backward on it gave; of a complex one, which has no sign, the size."""
        if not isinstance(self.asked, Tensor):
            return None
        return float(self.asked.abs() if self.asked.is_complex() else self.asked)

    @property
    def unexplained(self) -> float | None:
        """What stands before it though backward was called neither on it nor on what the tape knows to follow it."""
        if self.asked is not None or self.factor is None or bool((self.factor == 1).all()):
            return None
        return float(self.factor.abs())


@dataclass(frozen=True)
class Replay:
    """What is run to get the tensors at ``wanted`` when the outputs of one call have moved."""

    wanted: tuple[Place, ...]
    entries: Sequence[TapeEntry]
    constants: Mapping[Place, Tensor]  # the outputs of other calls, as their forward passes left them
    writes: bool


class Tape:
    """The entries on the outputs of one call, in order, so that writes in place and views replay as they ran.

    A tape that an operation has joined to another's goes on as part of it.
    """

    def __init__(self, outputs: int, device: torch.device, refused: Callable[[], None] = lambda: None) -> None:
        self.outputs = [Place() for _ in range(outputs)]
        self.refused = refused
        self.device = device.type
        self.entries: list[TapeEntry] = []
        self.scalars: list[Scalar] = []
        self.values: dict[Place, Tensor] = {}  # of the outputs of every call on it, in the forward pass
        self.calls: list[weakref.ref[Any]] = []  # whose outputs are on it; weak, since they hold the tape
        self.fed: list[weakref.ref[Tape]] = []  # of calls that were given a tensor from this one
        self.left = False  # by a number that was read, or a detached tensor: what is made of these is on no tape
        self._joined_to: Tape | None = None
        self._replays: dict[tuple[tuple[Place, ...], tuple[Place, ...], int], Replay] = {}

    def whole(self) -> Tape:
        """The tape that holds the entries."""
        tape = self
        while tape._joined_to is not None:
            tape = tape._joined_to
        return tape

    def join(self, other: Tape) -> None:
        """An operation reads tensors of both. No entry of one has read the other's, so they may follow each other."""
        self.entries.extend(other.entries)
        self.scalars.extend(other.scalars)
        self.values.update(other.values)
        self.calls.extend(other.calls)
        self.fed.extend(other.fed)
        other._joined_to = self

    def append(self, operation: Operation, result: Any) -> list[Place | None]:
        """Append an entry whose arguments refer to earlier ones; returns the place of each leaf of its result."""
        tensors = [leaf if isinstance(leaf, Tensor) else None for leaf in leaves_of(result)]
        places = [None if leaf is None else Place() for leaf in tensors]
        found = [leaf for leaf in tensors if leaf is not None]
        entry = TapeEntry(
            operation,
            tuple(_references((operation.args, operation.kwargs))),
            tuple(places),
            Ambient.now(self.device),
            any(leaf.requires_grad for leaf in found),
            all(leaf.ndim == 0 for leaf in found),
        )
        self.entries.append(entry)
        return places

    # which scalars a backward was called on

    def roots(self, task: int) -> list[Scalar]:
        """The scalars that this backward was called on: where torch has not told, those that it came through, without
        those that another one of them was computed from.
        """
        arrived = [scalar for scalar in self.scalars if scalar.task == task]
        if any(scalar.asked is not None for scalar in arrived):
            return [scalar for scalar in arrived if scalar.asked is not None]
        followed = {scalar.place for scalar in arrived}
        read: set[Place] = set()
        for entry in reversed(self.entries if len(arrived) > 1 else ()):
            if entry.operation.writes or (entry.differentiable and not followed.isdisjoint(entry.results)):
                followed.update(entry.reads)
                read.update(entry.reads)
        return [scalar for scalar in arrived if scalar.place not in read]

    def followed_by(self, task: int) -> list[Tape]:
        """The tapes after this one, of calls that were given a tensor from it, which this backward came through."""
        given = [tape.whole() for reference in self.fed if (tape := reference()) is not None]
        found = {id(tape): tape for tape in given if tape is not self and (tape.roots(task) or tape.followed_by(task))}
        return list(found.values())

    def leading_to(self, wanted: Iterable[Place]) -> list[TapeEntry]:
        """The entries that these places come from, in order."""
        wanted = set(wanted)
        if any(entry.operation.writes for entry in self.entries):
            # A write changes what views made before it show, which no argument tells: all entries run, in order.
            last = max((i for i, entry in enumerate(self.entries) if not wanted.isdisjoint(entry.results)), default=-1)
            return self.entries[: last + 1]
        needed, kept = wanted, []
        # backwards from the loss: metrics and logging on the output are not replayed
        for entry in reversed(self.entries):
            if not needed.isdisjoint(entry.results):
                kept.append(entry)
                needed.update(entry.reads)
        return kept[::-1]

    def moving(self, wanted: Iterable[Place]) -> set[Place]:
        """The places that a gradient of these reaches."""
        reached = set(wanted)
        for entry in reversed(self.entries):
            if entry.operation.writes or (entry.differentiable and not reached.isdisjoint(entry.results)):
                reached.update(entry.reads)
        return reached

    # running again

    def replay(self, own: Sequence[Place], outputs: Sequence[Tensor], wanted: Sequence[Place]) -> list[Tensor]:
        """The tensors at ``wanted`` for other outputs of one call. What was written in place is written to copies."""
        replay = self._replay(tuple(own), tuple(wanted))
        found: dict[Place, Any] = {**replay.constants, **dict(zip(own, outputs, strict=True))}
        if replay.writes:
            # else a write would reach the caller's prediction
            found = {place: output.clone() for place, output in found.items()}
        for entry in replay.entries:
            found.update(entry.run(self.device, found))
        return [found[place] for place in wanted]

    def program_inputs(self, own: Sequence[Place], wanted: Sequence[Place]) -> tuple[Hashable, list[Tensor]] | None:
        """What a replay repeats, and the tensors in it; None unless all of it is torch's own and writes nothing."""
        replay = self._replay(tuple(own), tuple(wanted))
        if replay.writes or not all(_is_of_torch(entry.operation.function) for entry in replay.entries):
            return None
        produced = [place for entry in replay.entries for place in entry.results if place is not None]
        number = {place: i for i, place in enumerate([*own, *replay.constants, *produced])}
        steps, tensors = [], list(replay.constants.values())
        for entry in replay.entries:
            numbered = _numbered((entry.operation.args, entry.operation.kwargs), number)
            results = tuple([None if place is None else number[place] for place in entry.results])
            steps.append((entry.operation.function, results, entry.ambient, signature(numbered)))
            tensors.extend(leaf for leaf in leaves_of(numbered) if isinstance(leaf, Tensor))
        return (len(own), len(replay.constants), tuple([number[place] for place in wanted]), *steps), tensors

    def replay_of(self, own: Sequence[Place], wanted: Sequence[Place]) -> Replay:
        """What is run, as it stands."""
        return self._replay(tuple(own), tuple(wanted))

    def take(self, own: Sequence[Place], replay: Replay) -> None:
        """Run this from now on for what it leads to."""
        self._replays[tuple(own), replay.wanted, len(self.entries)] = replay

    def _replay(self, own: tuple[Place, ...], wanted: tuple[Place, ...]) -> Replay:
        """Found once for a loss, run at every step."""
        key = (own, wanted, len(self.entries))
        if key not in self._replays:
            entries = self.leading_to(wanted)
            others = {place: value for place, value in self.values.items() if place not in own}
            writes = any(entry.operation.writes for entry in entries)
            found = Replay(wanted, entries, others, writes)
            self._replays[key] = found if writes or not others else self._folded(found, own)
        return self._replays[key]

    def _folded(self, replay: Replay, own: tuple[Place, ...]) -> Replay:
        """Without the entries on the outputs of other calls alone: what they give stands among the constants."""
        moving, kept, found = set(own), [], dict(replay.constants)
        with torch.no_grad():
            for entry in replay.entries:
                if moving.isdisjoint(entry.reads):
                    found.update(entry.run(self.device, found))
                else:
                    kept.append(entry)
                    moving.update(place for place in entry.results if place is not None)
        read = {place for entry in kept for place in entry.reads} | set(replay.wanted)
        return replace(replay, entries=kept, constants={place: found[place] for place in found if place in read})


def resolved(structure: Any, found: Mapping[Place, Any]) -> Any:
    if not structure:
        return structure
    return map_leaves(lambda leaf: found[leaf.index] if isinstance(leaf, ResultReference) else leaf, structure)


def _numbered(structure: Any, number: Mapping[Place, int]) -> Any:
    def numbered(leaf: Any) -> Any:
        return ResultReference(number[leaf.index]) if isinstance(leaf, ResultReference) else leaf

    return map_leaves(numbered, structure)


def _references(structure: Any) -> Iterator[Place]:
    return (leaf.index for leaf in leaves_of(structure) if isinstance(leaf, ResultReference))


def _is_of_torch(function: Callable[..., Any]) -> bool:
    """Whether a function is torch's own, whose result depends on its arguments and modes alone."""
    owner = getattr(function, "__objclass__", None) or getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or getattr(type(owner), "__module__", "")
    return owner is Tensor or owner is torch._C.TensorBase or str(module).split(".")[0] == "torch"
