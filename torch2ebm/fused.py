"""A relaxation by recorded programs: the same steps and numbers as the eager one, without its Python and autograd.

A step is recorded once for each state of the wave front; a program that follows itself, the step that repeats, goes to
``torch.compile``. The programs are kept from batch to batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from torch2ebm.graph import EnergyGraph
from torch2ebm.inference import Inference
from torch2ebm.programs import NotRecordableError, Program, alias_pattern, not_compiled, record
from torch2ebm.state import Call, LocalGradients
from torch2ebm.structure import fill, leaves_of, map_leaves, signature, template_of

KINDS = 8  # of batches (shapes, losses, modes) that programs are kept for, a graph
Family = dict[Hashable, Any]  # what was recorded for one kind of batch


class Programs:
    """The programs of one algorithm, for each graph that it works on. A copy starts empty."""

    def __init__(self) -> None:
        self._families: WeakKeyDictionary[EnergyGraph, dict[Hashable, Family]] = WeakKeyDictionary()
        self._warned: set[str] = set()

    def family(self, graph: EnergyGraph, key: Hashable) -> Family | None:
        """Those for one kind of batch; None where there are too many kinds."""
        families = self._families.setdefault(graph, {})
        try:
            known = key in families
        except TypeError as error:  # something in it has no hash
            self.warn(f"a setting cannot be compared: {error}")
            return None
        if not known:
            if len(families) >= KINDS:
                self.warn(f"over {KINDS} kinds of batches (shapes, losses, modes); give batches one shape")
                return None
            families[key] = {}
        return families[key]

    def warn(self, reason: str) -> None:
        """Once for each reason."""
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(not_compiled(reason), stacklevel=2)

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        return Programs, ()


class Recorded:
    """A program, what followed it, and how many node functions it stands for."""

    def __init__(self, program: Program, evaluations: int) -> None:
        self.program, self.evaluations = program, evaluations
        self.followers: dict[Hashable, Recorded] = {}


class EagerRun:
    """One relaxation, step by step."""

    def __init__(self, solver: Any, inference: Inference) -> None:
        self.solver, self.inference = solver, inference
        self.state = solver.start(inference)

    def step(self) -> None:
        self.state = self.solver.step(self.inference, self.state)

    def local_gradients(self) -> LocalGradients:
        return self.inference.local_gradients()


class RecordedRun:
    """The same by programs. Where one cannot be recorded, eager steps take over from where the last one ended."""

    def __init__(self, programs: Programs, solver: Any, inference: Inference) -> None:
        self.inference, self._programs = inference, programs
        self._eager = EagerRun(solver, inference)
        self._family, self._fixed = _family(programs, solver, inference)
        self._last: Recorded | None = None
        self._moving: Any = ()  # template of what moves
        self._leaves: list[Any] = []
        self._take_over()

    def step(self) -> None:
        found = self._run(("step", self.inference.measuring), self._eager_step)
        if found is None:
            self._eager.step()
            return
        program, leaves = found
        self._moving, *others = program.result
        self._leaves = leaves
        history, self.inference.driving = fill(others, leaves)
        self.inference.history.append(history)

    def local_gradients(self) -> LocalGradients:
        scale = torch.tensor(self.inference.loss.scale, dtype=torch.float64)
        found = self._run(("collect",), lambda: self._eager_collect(scale), [scale])
        if found is None:
            return self._eager.local_gradients()
        program, leaves = found
        collected, history = fill(program.result, leaves)
        self.inference.history.append(history)
        return self.inference.finished(collected)

    # what is recorded

    def _eager_step(self) -> Any:
        self._eager.step()
        return self._now(), self.inference.history.pop(), self.inference.driving

    def _eager_collect(self, scale: Tensor) -> Any:
        self.inference.scale = scale
        return self.inference.collected(), self.inference.history.pop()

    # what moves, in the inference and the solver's state or, between two programs, as bare leaves

    def _now(self) -> Any:
        return self.inference.moving(), self._eager.state

    def _take_over(self) -> None:
        now = self._now()
        self._moving, self._leaves = template_of(now), list(leaves_of(now))

    def _hand_back(self) -> None:
        moving, self._eager.state = fill(self._moving, self._leaves)
        self.inference.restore(moving)

    # programs

    def _run(
        self, role: Hashable, function: Callable[[], Any], more: Sequence[Tensor] = ()
    ) -> tuple[Program, list[Any]] | None:
        """The program that comes next, and the leaves of its result; None leaves the inference to eager steps."""
        if self._family is None:
            return None
        moving = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        tensors = [*self._fixed, *moving, *more]
        recorded = self._last.followers.get(role) if self._last is not None else None
        if recorded is None:
            key = (role, signature(fill(self._moving, self._leaves)), alias_pattern(tensors))
            if key not in self._family:
                return self._record(key, function, tensors)
            recorded = self._family[key]
            if self._last is not None:
                self._last.followers[role] = recorded
        if recorded is self._last or (self._last is not None and self._last.program.is_compiled):
            recorded.program.compile()
        self._last = recorded
        self.inference.evaluations += recorded.evaluations
        return recorded.program, recorded.program.leaves(tensors)

    def _record(
        self, key: Hashable, function: Callable[[], Any], tensors: Sequence[Tensor]
    ) -> tuple[Program, list[Any]] | None:
        assert self._family is not None
        self._hand_back()
        before = map_leaves(_copy, (self._moving, self._leaves))
        evaluations, sweeps = self.inference.evaluations, len(self.inference.history)
        try:
            program, result = record(function, tensors)
        except NotRecordableError as error:
            self._programs.warn(f"{self._eager.solver!r} cannot be recorded: {error}")
            self._family, (self._moving, self._leaves) = None, before
            self.inference.evaluations = evaluations
            del self.inference.history[sweeps:]
            self.inference.scale = self.inference.loss.scale
            self._hand_back()
            return None
        self._last = self._family[key] = Recorded(program, self.inference.evaluations - evaluations)
        return program, list(leaves_of(result))


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _family(programs: Programs, solver: Any, inference: Inference) -> tuple[Family | None, list[Tensor]]:
    """The programs for this kind of batch, and the tensors of the call that they take; None: go on eagerly."""
    on_loss = inference.loss.recorded()
    if on_loss is None:
        programs.warn("the loss is no composition of torch functions (an EnergyLoss, a write in place)")
        return None, []
    precisions = [leaf for leaf in leaves_of(inference.energies) if isinstance(leaf, Tensor)]
    fixed = [*inference.call.held(), *precisions, *on_loss[1]]
    key = (solver, signature(fixed), on_loss[0], signature(inference.energies), autocast_of(inference.call))
    return programs.family(inference.graph, key), fixed


def autocast_of(call: Call) -> Hashable:
    device = call.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
