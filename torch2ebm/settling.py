"""How the states of an equilibrium algorithm settle: one step, repeated, and how far from a fixed point it ends."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch2ebm.equilibrium import Equilibrium, Influence, States
from torch2ebm.state import Relaxation

UNSETTLED = 1e-2
RETURNING = 0.05  # of what one step moves: a mode of eigenvalue -0.95 or less


@dataclass(frozen=True, eq=False)
class Settled:
    """Where a relaxation ended.

    Attributes:
        states: By slot.
        drives: What each activation was last applied to, by the slot of its state.
        relaxation: Steps and residual: the largest change that an undamped step would make.
        size: Largest entry of a state.
        cycling: Whether two steps lead back nearly to where they started: a cycle of length two.
        changes: What the last step changed.
    """

    states: States
    drives: States
    relaxation: Relaxation
    size: float
    cycling: bool
    changes: States

    @property
    def unsettled(self) -> bool:
        """Whether it still moves by more than a hundredth of what the states are."""
        return not self.relaxation.residual <= UNSETTLED * self.size

    def moving_most(self) -> str:
        """The slot whose state moved most in the last step."""
        sizes = {slot: float(magnitude(change).max()) for slot, change in self.changes.items()}
        return max(sizes, key=lambda slot: math.inf if math.isnan(sizes[slot]) else sizes[slot])


class Update(ABC):
    """How one step moves the states.

    Attributes:
        name: As it stands in the report.
        share: The part that it takes of the way to where an undamped step leads.
    """

    name: str
    share: float

    @abstractmethod
    def step(self, equilibrium: Equilibrium, states: States, influence: Influence) -> tuple[States, States]:
        """The next states, and the drives that they came from."""


@dataclass(frozen=True)
class Synchronous(Update):
    """All states at once, from the states before."""

    name: str = field(default="synchronous", init=False)
    share: float = field(default=1.0, init=False)

    def step(self, equilibrium: Equilibrium, states: States, influence: Influence) -> tuple[States, States]:
        drives = equilibrium.drive(states)
        influence.nudge(equilibrium, states, drives)
        moved = equilibrium.activate(drives)
        influence.hold(moved)
        return moved, drives


@dataclass(frozen=True)
class Damped(Update):
    """The synchronous step, of which ``damping`` is taken back: s <- damping s + (1 - damping) f(s)."""

    damping: float
    name: str = field(default="damped", init=False)

    @property
    def share(self) -> float:  # type: ignore[override]
        return 1 - self.damping

    def step(self, equilibrium: Equilibrium, states: States, influence: Influence) -> tuple[States, States]:
        moved, drives = Synchronous().step(equilibrium, states, influence)
        return {slot: moved[slot].lerp(states[slot], self.damping) for slot in moved}, drives


@dataclass(frozen=True)
class Sequential(Update):
    """One colour of the state graph after another, each from the states as they then are (Gauss-Seidel)."""

    colours: tuple[frozenset[str], ...]
    name: str = field(default="sequential", init=False)
    share: float = field(default=1.0, init=False)

    def step(self, equilibrium: Equilibrium, states: States, influence: Influence) -> tuple[States, States]:
        current, all_drives = dict(states), {}
        for colour in self.colours:
            drives = equilibrium.drive(current, colour)
            influence.nudge(equilibrium, current, drives)
            moved = equilibrium.activate(drives)
            influence.hold(moved)
            current.update(moved)
            all_drives.update(drives)
        return current, all_drives


def settle(
    equilibrium: Equilibrium,
    start: States,
    steps: int,
    update: Update,
    influence: Influence,
    tol: float = 0.0,
    beta: float = 0.0,
    angle: float = 0.0,
) -> Settled:
    """Repeat the step, and say how far from a fixed point it ended. Never raises: look at ``residual``."""
    states, drives, done = start, start, 0
    earlier = before = start
    while done < steps:
        earlier, before = before, states
        states, drives = update.step(equilibrium, states, influence)
        done += 1
        if tol > 0 and float(_largest(_changes(before, states))) <= tol * update.share:
            break
    changes = _changes(before, states)
    by_sample = _by_sample(changes, equilibrium.call.batch_size)
    largest = _largest(changes) if by_sample is None else by_sample.max()
    sizes = torch.stack([largest, _largest(_changes(earlier, states)), _largest(states)]).tolist()
    residual = sizes[0] / update.share
    relaxation = Relaxation(
        done,
        residual <= tol if tol > 0 else None,
        residual,
        sample_residual=None if by_sample is None else by_sample / update.share,
        tol=tol,
        beta=beta,
        angle=angle,
        update=update.name,
    )
    cycling = done > 1 and sizes[1] < RETURNING * sizes[0]
    return Settled(states, drives, relaxation, sizes[2], cycling, changes)


def _changes(before: States, after: States) -> dict[str, Tensor]:
    return {slot: after[slot] - before[slot] for slot in after}


def _largest(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([magnitude(each).max() for each in tensors.values()]).max()


def magnitude(tensor: Tensor) -> Tensor:
    """Absolute values; of complex numbers by their parts, since ``abs`` is kept for what is holomorphic."""
    return torch.hypot(tensor.real, tensor.imag) if tensor.is_complex() else tensor.abs()


def _by_sample(changes: States, batch_size: int) -> Tensor | None:
    if any(each.ndim == 0 or each.shape[0] != batch_size for each in changes.values()):
        return None
    rows = [magnitude(each).reshape(batch_size, -1).amax(1) for each in changes.values()]
    return torch.stack(rows).amax(0)
