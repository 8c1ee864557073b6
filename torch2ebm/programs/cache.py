"""A relaxation by recorded programs: the same steps and numbers as the eager one, without its Python and autograd.

A step is recorded once for each state of the wave front; a program that follows itself, the step that repeats, goes to
the compiler of ``torch.compile``. The programs are kept from batch to batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from torch2ebm.common.nested import signature
from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.programs.compiler import not_compiled
from torch2ebm.programs.program import Program
from torch2ebm.programs.record import NotRecordableError, alias_pattern, record_program

KINDS = 8  # of batches (shapes, losses, settings) that programs are kept for, a graph; and of graphs, a module
OPERATIONS = 170  # at most in a program made of several steps, three or more: it takes longer to compile
Family = dict[Hashable, Any]  # what was recorded for one kind of batch


class Programs:
    """The programs of one algorithm, for each graph that it works on. A copy starts empty."""

    def __init__(self) -> None:
        self._families: WeakKeyDictionary[EnergyGraph, dict[Hashable, Family | None]] = WeakKeyDictionary()
        self._graphs: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how many it has had
        self._warned: set[str] = set()

    def family(self, graph: EnergyGraph, key: Hashable) -> Family | None:
        """Those for one kind of batch; None where there are too many kinds, or it was refused."""
        families = self._families.get(graph, {})
        try:
            known = key in families
        except TypeError as error:  # something in it has no hash
            self.warn(f"a setting cannot be compared: {error}")
            return None
        if not known:
            graphs = self._graphs.get(graph.module, 0) + (graph not in self._families)
            if len(families) >= KINDS or graphs > KINDS:
                self.warn(f"over {KINDS} kinds of batches (shapes, losses, settings); keep shapes and settings")
                return None
            families[key], self._families[graph], self._graphs[graph.module] = {}, families, graphs
        return families[key]

    def refuse(self, graph: EnergyGraph, key: Hashable, reason: str) -> None:
        """Never try this kind of batch again."""
        self._families[graph][key] = None
        self.warn(reason)

    def warn(self, reason: str) -> None:
        """Once for each reason."""
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(not_compiled(reason), stacklevel=2)

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        return Programs, ()


class ChainedProgram:
    """A program, and what followed it.

    Attributes:
        evaluations: How many node functions it stands for.
        followers: By role.
        repeated: By number of rounds, the program that stands for as many of this one.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.evaluations = program, 0
        self.followers: dict[Hashable, ChainedProgram] = {}
        self.repeated: dict[int, Program] = {}

    def repeats(self, role: Hashable) -> bool:
        """Whether it has been seen to follow itself."""
        return self.followers.get(role) is self


class Chain:
    """The programs of one relaxation, each found from the one before it.

    Args:
        fixed: Tensors that stand still during the relaxation.
        key: All else that stands still, and that a program takes for granted.
    """

    def __init__(self, programs: Programs, graph: EnergyGraph, key: Hashable, fixed: Sequence[Tensor]) -> None:
        self._kind = graph, (key, signature(fixed))
        self._family = programs.family(*self._kind)
        self._programs, self._fixed = programs, fixed
        self._last: ChainedProgram | None = None

    @property
    def is_broken(self) -> bool:
        """Whether the relaxation has to go on without programs."""
        return self._family is None

    def next(self, role: Hashable, moving: Sequence[Tensor], state: Callable[[], Any]) -> ChainedProgram | None:
        """The program for ``role`` from here on; None where it is to be recorded, from the same state.

        Args:
            role: What is to be done.
            moving: The tensors that it is to be done to.
            state: Their structure, with all else that moves, asked for where the program is not known from the last.
        """
        recorded = self._last.followers.get(role) if self._last is not None else None
        if recorded is None:
            recorded = self._known().get(self._key(role, moving, state()))
            if recorded is None:
                return None
            if self._last is not None:
                self._last.followers[role] = recorded
        if recorded.repeats(role):  # what runs once a batch is not worth the time to compile
            recorded.program.compile()
        self._last = recorded
        return recorded

    def rounds(self, recorded: ChainedProgram, role: Hashable, limit: int) -> int:
        """How many rounds of it shall be run as one program: more than one where it follows itself."""
        if not recorded.repeats(role):
            return 1
        most = min(limit, OPERATIONS // len(recorded.program))
        return next((rounds for rounds in range(most, 2, -1) if limit % rounds == 0), most if most > 2 else 1)

    def leaves(self, recorded: ChainedProgram, moving: Sequence[Tensor], rounds: int = 1, count: int = 0) -> list[Any]:
        """What it makes of ``moving``; of several rounds see :meth:`Program.repeated`."""
        program = recorded.program
        if rounds > 1:
            if rounds not in recorded.repeated:
                recorded.repeated[rounds] = program.repeated(rounds, count, len(self._fixed))
            program = recorded.repeated[rounds]
            program.compile()
        return program.leaves([*self._fixed, *moving])

    def record(
        self, role: Hashable, moving: Sequence[Tensor], state: Any, function: Callable[[], Any]
    ) -> tuple[ChainedProgram, Any] | None:
        """Run ``function`` and record it; where that fails, warn: the chain is broken, and ``function`` half done."""
        key = self._key(role, moving, state)  # first: the function may change the state
        try:
            program, result = record_program(function, [*self._fixed, *moving])
        except NotRecordableError as error:
            self._programs.refuse(*self._kind, f"{role} cannot be recorded: {error}")
            self._family = None
            return None
        self._last = self._known()[key] = ChainedProgram(program)
        return self._last, result

    def _known(self) -> Family:
        assert self._family is not None
        return self._family

    def _key(self, role: Hashable, moving: Sequence[Tensor], state: Any) -> Hashable:
        return role, signature(state), alias_pattern([*self._fixed, *moving])
