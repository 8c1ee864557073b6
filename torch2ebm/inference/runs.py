"""Drives one relaxation: by eager steps, or by programs that were recorded once and run again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch2ebm.common.nested import fill, leaves_of, settings_of, template_of
from torch2ebm.engine.results import LocalGradients
from torch2ebm.inference.base import Inference
from torch2ebm.inference.solver import Rest
from torch2ebm.potentials.energy_parameters import tensors_of
from torch2ebm.programs.cache import Chain, Programs
from torch2ebm.programs.surroundings import fixed_tensors, surroundings


class EagerRun:
    """One relaxation, step by step."""

    def __init__(self, solver: Any, inference: Inference) -> None:
        self.solver, self.inference = solver, inference
        self.state = solver.start(inference)

    def advance(self, limit: int) -> int:
        """Take a step, or up to ``limit`` of them; returns how many."""
        self.state = self.solver.step(self.inference, self.state)
        return 1

    def show(self) -> None:
        """Have the inference be what the steps have made of it."""

    def rest(self) -> Rest:
        rest: Rest = self.solver.rest(self.inference, self.state)
        return rest

    def local_gradients(self) -> LocalGradients:
        return self.inference.local_gradients()


class ProgramRun:
    """One relaxation by programs. Where one cannot be recorded, eager steps go on from where the last program ended."""

    def __init__(self, programs: Programs, solver: Any, inference: Inference) -> None:
        self.inference, self._eager = inference, EagerRun(solver, inference)
        self._chain = _chain(programs, solver, inference)
        if self._chain is None or self._chain.is_broken:
            # eager steps repeat draws by the state of the generator, which serves every operation
            inference.call.forget_draws()
        else:
            inference.recorded = True
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
        # a program of several rounds returns what moves once, and energies and driving terms of each round
        for start in range(0, len(rest), each):
            history, self.inference.driving = fill(others, [*self._leaves, *rest[start : start + each]])
            self.inference.history.append(history)
        return len(rest) // each

    def show(self) -> None:
        """Have the inference be what the steps have made of it."""
        if self._chain is not None and not self._chain.is_broken:
            self._hand_back()

    def rest(self) -> Rest:
        if self._chain is not None and not self._chain.is_broken:  # else eager steps have gone on from there
            self._hand_back()
        return self._eager.rest()

    def local_gradients(self) -> LocalGradients:
        # an input: as a constant, the outer factor of the first batch would stay in the program
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
        # popped: `advance` appends it, after a recording and after a program alike
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
        # steps move tensors in place: a recording that fails half-way is undone by these copies
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
        # a program runs no Python that could count
        recorded.evaluations = self.inference.evaluations - evaluations
        return recorded.program.result, list(leaves_of(result))


def _chain(programs: Programs, solver: Any, inference: Inference) -> Chain | None:
    fixed = fixed_tensors(programs, inference.call, inference.loss)
    if fixed is None:
        return None
    on_loss, tensors = fixed
    # attributes and not the objects: one of a class that is not frozen may have others in the next batch
    energies = tuple((name, settings_of(energy)) for name, energy in inference.energies.items())
    own = [tensor for each in (solver, *inference.energies.values()) for tensor in tensors_of(each)]
    key = (settings_of(solver), on_loss, energies, surroundings(inference.call))
    return Chain(programs, inference.graph, key, [*tensors, *own])


def _size(structure: Any) -> int:
    return sum(1 for _ in leaves_of(structure))
