"""A relaxation by recorded programs: the same steps and numbers as the eager one, without its Python and autograd.

A step is recorded once for each state of the wave front; a program that follows itself, the step that repeats, goes to
the compiler of ``torch.compile``. The programs are kept from batch to batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from torch2ebm.graph import EnergyGraph
from torch2ebm.inference import Inference
from torch2ebm.output_loss import OutputLoss
from torch2ebm.programs import NotRecordableError, Program, alias_pattern, not_compiled, record
from torch2ebm.signature import PLAIN
from torch2ebm.state import Call, LocalGradients
from torch2ebm.structure import fill, leaves_of, signature, template_of

KINDS = 8  # of batches (shapes, losses, settings) that programs are kept for, a graph; and of graphs, a module
OPERATIONS = 170  # at most in a program made of several steps, three or more: it takes longer to compile
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
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


class Recorded:
    """A program, and what followed it.

    Attributes:
        evaluations: How many node functions it stands for.
        followers: By role.
        repeated: By number of rounds, the program that stands for as many of this one.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.evaluations = program, 0
        self.followers: dict[Hashable, Recorded] = {}
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
        self._last: Recorded | None = None

    @property
    def is_broken(self) -> bool:
        """Whether the relaxation has to go on without programs."""
        return self._family is None

    def next(self, role: Hashable, moving: Sequence[Tensor], state: Callable[[], Any]) -> Recorded | None:
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

    def rounds(self, recorded: Recorded, role: Hashable, limit: int) -> int:
        """How many rounds of it shall be run as one program: more than one where it follows itself."""
        if not recorded.repeats(role):
            return 1
        most = min(limit, OPERATIONS // len(recorded.program))
        return next((rounds for rounds in range(most, 2, -1) if limit % rounds == 0), most if most > 2 else 1)

    def leaves(self, recorded: Recorded, moving: Sequence[Tensor], rounds: int = 1, count: int = 0) -> list[Any]:
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
    ) -> tuple[Recorded, Any] | None:
        """Run ``function`` and record it; where that fails, warn: the chain is broken, and ``function`` half done."""
        key = self._key(role, moving, state)  # first: the function may change the state
        try:
            program, result = record(function, [*self._fixed, *moving])
        except NotRecordableError as error:
            self._programs.refuse(*self._kind, f"{role} cannot be recorded: {error}")
            self._family = None
            return None
        self._last = self._known()[key] = Recorded(program)
        return self._last, result

    def _known(self) -> Family:
        assert self._family is not None
        return self._family

    def _key(self, role: Hashable, moving: Sequence[Tensor], state: Any) -> Hashable:
        return role, signature(state), alias_pattern([*self._fixed, *moving])


class EagerRun:
    """One relaxation, step by step."""

    def __init__(self, solver: Any, inference: Inference) -> None:
        self.solver, self.inference = solver, inference
        self.state = solver.start(inference)

    def advance(self, limit: int) -> int:
        """Take a step, or up to ``limit`` of them; returns how many."""
        self.state = self.solver.step(self.inference, self.state)
        return 1

    def local_gradients(self) -> LocalGradients:
        return self.inference.local_gradients()


class RecordedRun:
    """The same by programs. Where one cannot be recorded, eager steps take over from where the last one ended."""

    def __init__(self, programs: Programs, solver: Any, inference: Inference) -> None:
        self.inference, self._eager = inference, EagerRun(solver, inference)
        self._chain = _chain(programs, solver, inference)
        if self._chain is None or self._chain.is_broken:
            inference.call.forget_draws()
        now = self._now()
        self._moving: Any = template_of(now)
        self._leaves: list[Any] = list(leaves_of(now))

    def advance(self, limit: int) -> int:
        """Take a step, or up to ``limit`` of them where one program stands for several; returns how many."""
        role = f"a step of {self._eager.solver!r}, measured: {self.inference.measuring}"
        found = self._run(role, self._eager_step, limit=limit)
        if found is None:
            return self._eager.advance(limit)
        (self._moving, *others), leaves = found
        count = _size(self._moving)
        self._leaves, rest = leaves[:count], leaves[count:]
        each = _size(others)
        for start in range(0, len(rest), each):
            history, self.inference.driving = fill(others, [*self._leaves, *rest[start : start + each]])
            self.inference.history.append(history)
        return len(rest) // each

    def local_gradients(self) -> LocalGradients:
        scale = torch.tensor(self.inference.loss.scale, dtype=torch.float64)
        found = self._run("the local gradients", lambda: self._eager_collect(scale), [scale])
        if found is None:
            return self._eager.local_gradients()
        collected, history = fill(*found)
        self.inference.history.append(history)
        return self.inference.finished(collected)

    # what is recorded

    def _eager_step(self) -> Any:
        self._eager.advance(1)
        return self._now(), self.inference.history.pop(), self.inference.driving

    def _eager_collect(self, scale: Tensor) -> Any:
        self.inference.scale = scale
        return self.inference.collected(), self.inference.history.pop()

    # what moves: in the inference and the solver's state or, between two programs, as a template and its leaves

    def _now(self) -> Any:
        return self.inference.moving(), self._eager.state

    def _hand_back(self) -> None:
        moving, self._eager.state = fill(self._moving, self._leaves)
        self.inference.restore(moving)

    # programs

    def _run(
        self, role: Hashable, function: Callable[[], Any], more: Sequence[Tensor] = (), limit: int = 1
    ) -> tuple[Any, list[Any]] | None:
        """The result of what comes next, as a template and its leaves; None leaves the inference to eager steps."""
        if self._chain is None or self._chain.is_broken:
            return None
        moving = [*(leaf for leaf in self._leaves if isinstance(leaf, Tensor)), *more]
        recorded = self._chain.next(role, moving, lambda: fill(self._moving, self._leaves))
        if recorded is None:
            return self._record(self._chain, role, moving, function)
        rounds = self._chain.rounds(recorded, role, limit)
        self.inference.evaluations += rounds * recorded.evaluations
        return recorded.program.result, self._chain.leaves(recorded, moving, rounds, len(self._leaves))

    def _record(
        self, chain: Chain, role: Hashable, moving: Sequence[Tensor], function: Callable[[], Any]
    ) -> tuple[Any, list[Any]] | None:
        self._hand_back()
        before = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        evaluations, sweeps = self.inference.evaluations, len(self.inference.history)
        found = chain.record(role, moving, self._now(), function)
        if found is None:
            self._leaves, self.inference.scale = before, self.inference.loss.scale
            self.inference.evaluations = evaluations
            del self.inference.history[sweeps:]
            self.inference.call.forget_draws()
            self._hand_back()
            return None
        recorded, result = found
        recorded.evaluations = self.inference.evaluations - evaluations
        return recorded.program.result, list(leaves_of(result))


def _chain(programs: Programs, solver: Any, inference: Inference) -> Chain | None:
    fixed = fixed_tensors(programs, inference.call, inference.loss)
    if fixed is None:
        return None
    on_loss, tensors = fixed
    precisions = [leaf for leaf in leaves_of(inference.energies) if isinstance(leaf, Tensor)]
    key = (solver, on_loss, signature(inference.energies), surroundings(inference.call))
    return Chain(programs, inference.graph, key, [*tensors, *precisions])


def fixed_tensors(programs: Programs, call: Call, loss: OutputLoss | None) -> tuple[Hashable, list[Tensor]] | None:
    """What of the loss stays from call to call, and the tensors of call and loss; None, with a warning, for some."""
    on_loss = (None, []) if loss is None else loss.recorded()
    if on_loss is None:
        programs.warn("the loss is no composition of torch functions (an EnergyLoss, a write in place)")
        return None
    return on_loss[0], [*call.held(), *on_loss[1]]


def surroundings(call: Call) -> Hashable:
    """What is set for process, thread or parts of the module, and stands in a program or in its compiled code."""
    device = call.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    parts = call.graph.once(surroundings, lambda: tuple(_whole_modules(call.graph)))
    settings = tuple([_settings(part) for part in parts])
    return autocast, torch.get_default_dtype(), deterministic, torch.get_num_threads(), settings


def _whole_modules(graph: EnergyGraph) -> Iterator[nn.Module]:
    """Those that nodes call as they are; of the others, a capture holds for their settings alone."""
    called = [operation.target for node in graph.order for operation in node.operations]
    return (part for module in called if isinstance(module, nn.Module) for part in module.modules())


def _settings(module: nn.Module) -> Hashable:
    """Its attributes that are no tensors and no objects, a dropout's probability for one."""
    own = [(name, value) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
    return tuple(
        [(name, signature(value)) for name, value in own if all(isinstance(e, PLAIN) for e in leaves_of(value))]
    )


def _size(structure: Any) -> int:
    return sum(1 for _ in leaves_of(structure))
