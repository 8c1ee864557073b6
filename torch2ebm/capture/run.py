"""What a watched run leaves: its operations as records, its numbers and constants, and the cuts that it may follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from torch2ebm.isolation.random_numbers import RandomState
from torch2ebm.isolation.torch_modes import Ambient


class _Reference:
    """Stands for a leaf among the arguments of an operation. No dataclass: :mod:`nested` would look inside."""

    __slots__ = ("place",)

    def __init__(self, place: Any) -> None:
        self.place = place

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.place == self.place

    def __hash__(self) -> int:
        return hash((type(self), self.place))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.place!r})"


class Hot(_Reference):
    """A result: the parameter of this path, or the tensor of this number that an operation has made."""


class Constant(_Reference):
    """A tensor that depends on no parameter."""


class Number(_Reference):
    """A number, or an object that is neither tensor nor number; each run has its own."""


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One watched operation, apart from its numbers: what a graph is made of.

    Attributes:
        function: A function of torch, a custom autograd function (a class), or :class:`ModuleCall`.
        args: Positional arguments, with :class:`Hot`, :class:`Constant` and :class:`Number` in place of leaves.
        kwargs: The same for keywords.
        results: The result, with the number of each tensor in its place and None for anything else.
        sources: For each tensor of the result that shares its memory with a hot argument: this argument.
        wrote: Hot arguments and constants that it has written in place.
        random: Whether it drew random numbers.
        ambient: Whether gradients were on, and how autocast stood, where that was not as when the run began.
        scopes: The calls of submodules that it is part of, outermost first: a label of the call, and the path.
        place: The line of the user's code.
    """

    function: Any
    args: Any
    kwargs: Any
    results: Any
    sources: Mapping[int, Hot]
    wrote: tuple[Hot | Constant, ...]
    random: bool
    ambient: Ambient | None
    scopes: tuple[tuple[str, str], ...]
    place: str


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """A module that is one operation, since what it does inside cannot be followed."""

    path: str


@dataclass(frozen=True, eq=False)
class Cuts:
    """What a run of a known sequence has to do at its operations, so that it leaves what a graph's nodes would.

    Attributes:
        records: The operations that the graph was made of.
        sequence: Their keys, one for each.
        output: The key of what the run returns.
        numbers: Their numbers.
        slots: Number of a result to the slot whose value it is.
        kept: The same for results that no other node reads, and that are not handed on as leaves.
        rewritten: Those of all these results that forward writes in place later.
        exports: Number of a result to the name under which nodes read it as a constant.
        random: Operations that draw random numbers for some node.
        normalised: Operation to the node that it normalises for by the statistics of the batch.
        copied: Those constants that forward changes after they were read.
        opaque: Paths of modules that are one operation.
        held: Results that somebody may hold after the run.
        effects: Operations that only write a buffer, as :attr:`Run.effects`.
        origins: Constant to the arguments that it is made of, as :attr:`Run.origins`.
        names: Constant to the argument that it is, as :attr:`Run.names`.
        complete: Whether what a run leaves at the cuts is all that the nodes would make.
        references: To each result in a run after which nobody held any.
    """

    records: Sequence[Record]
    sequence: tuple[Any, ...]
    output: Any
    numbers: Sequence[Sequence[Any]]
    slots: Mapping[int, str]
    kept: Mapping[int, str]
    rewritten: frozenset[int]
    exports: Mapping[int, str]
    random: frozenset[int]
    normalised: Mapping[int, str]
    copied: frozenset[int]
    opaque: frozenset[str]
    held: frozenset[int]
    effects: frozenset[tuple[int, Any]]
    origins: Sequence[frozenset[str]]
    names: Sequence[str | None]
    complete: bool = True
    references: list[int] = field(default_factory=list)

    @cached_property
    def noted(self) -> frozenset[int]:
        """Results that a run has to do something about."""
        return frozenset((*self.slots, *self.kept, *self.exports))

    def to_follow(self) -> Cuts:
        """The same sequence, for a graph whose nodes are not what lies between cuts of a run."""
        nothing: dict[int, str] = {}
        return replace(
            self,
            slots=nothing,
            kept=nothing,
            exports=nothing,
            normalised=nothing,
            rewritten=frozenset(),
            complete=False,
        )

    def same_until(self, other: Cuts, index: int, results: int, constants: int) -> bool:
        """Whether a run that has followed these up to an operation can go on with the others."""

        def before(found: Mapping[int, str], end: int) -> dict[int, str]:
            return {i: name for i, name in found.items() if i < end}

        return (
            self.complete == other.complete
            and {each for each in self.effects if each[0] <= index}
            == {each for each in other.effects if each[0] <= index}
            and self.sequence[:index] == other.sequence[:index]
            and all(
                before(getattr(self, name), end) == before(getattr(other, name), end)
                for names, end in ((("slots", "kept", "exports"), results), (("normalised",), index))
                for name in names
            )
            and not any(i < results for i in self.rewritten ^ other.rewritten)
            and not any(i < index for i in self.random ^ other.random)
            and not any(i < constants for i in self.copied ^ other.copied)
        )


@dataclass(eq=False)
class Run:
    """What a watched run has left.

    Attributes:
        output: What the module returned, as it returned it.
        sequence: The key of each operation.
        numbers: The numbers of each operation, in the order of its arguments.
        constants: What hot operations have read and no parameter has made, detached.
        external: Those constants that require a gradient, by their place: the tensor of the user.
        returned: The key of the output: its structure, and what each leaf is.
        records: The operations; None where the run has followed known cuts to the end.
        cuts: Those of the graph that it has followed at last; None where it was recorded from the start.
        matched: Whether it has had the sequence of these to its end.
        followed: Whether it was cut by them, too.
        copied: Constants that were changed after they were read.
        leaves: Slot to the leaf that was handed on.
        predictions: Slot to what the node has made, at the end of its own autograd graph.
        exports: Name to what nodes read as a constant.
        random: Operation that draws random numbers to the state of the generators before it.
        normalised: Node to the inputs and weights of its batch norms.
        hot: The tensors that operations have made, by number.
        origins: Constant to the names of the arguments that it was made of.
        names: Constant to the name of the argument that it is, None for others.
        opaque: Path of each module that is one operation, to the reason.
        values_read: Lines of code at which Python has read a number off a hot tensor, to how.
        kept: Results with a gradient that somebody else still holds, by a hook or an attribute, by number.
        originals: Constants as the caller has them, each with its version when the run ended.
        changed_buffers: Names of the buffers that forward has changed.
        effects: Operations that only write a buffer, and are no part of the sequence: how many operations came before
            each, and its key.
    """

    output: Any = None
    sequence: list[Any] = field(default_factory=list)
    numbers: list[Sequence[Any]] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    external: dict[int, Tensor] = field(default_factory=dict)
    returned: Any = None
    records: list[Record] | None = None
    cuts: Cuts | None = None
    matched: bool = False
    followed: bool = False
    copied: frozenset[int] = frozenset()
    leaves: dict[str, Tensor] = field(default_factory=dict)
    predictions: dict[str, Tensor] = field(default_factory=dict)
    exports: dict[str, Tensor] = field(default_factory=dict)
    random: dict[int, RandomState] = field(default_factory=dict)
    normalised: dict[str, list[tuple[Tensor, Tensor | None]]] = field(default_factory=dict)
    hot: list[Tensor] = field(default_factory=list)
    origins: list[frozenset[str]] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)
    changed_buffers: tuple[str, ...] = ()
    effects: set[tuple[int, Any]] = field(default_factory=set)
    values_read: dict[str, str] = field(default_factory=dict)
    external_leaves: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)
    originals: list[tuple[Tensor, int]] = field(default_factory=list)

    def as_recorded(self, constants: int) -> None:
        """Have what the cuts that were followed know, as far as they were: up to so many constants."""
        assert self.cuts is not None
        self.records = list(self.cuts.records[: len(self.sequence)])
        more = max(0, constants - len(self.cuts.names))  # of operations that are no part of the sequence
        self.origins = [*self.cuts.origins[:constants], *[frozenset[str]()] * more]
        self.names = [*self.cuts.names[:constants], *[None] * more]

    def outline(self) -> Run:
        """What a graph is made of, without the tensors of this run."""
        return Run(
            sequence=self.sequence,
            numbers=self.numbers,
            returned=self.returned,
            records=self.records,
            copied=self.copied,
            origins=self.origins,
            names=self.names,
            opaque=self.opaque,
            changed_buffers=self.changed_buffers,
            effects=self.effects,
        )

    def released(self) -> None:
        """What the run has left at the cuts is somebody else's by now."""
        self.leaves, self.predictions, self.normalised, self.hot = {}, {}, {}, []
