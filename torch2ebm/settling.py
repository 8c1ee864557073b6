"""How the states of an equilibrium algorithm settle: one step, repeated, and how far from a fixed point it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch2ebm.equilibrium import Equilibrium, Influence, States
from torch2ebm.state import Relaxation
from torch2ebm.updates import Past, Update

UNSETTLED = 0.05  # of what the states are; output and gradient are then wrong by about as large a part
RETURNING = 0.05  # of what one step moves: a mode of eigenvalue -0.95 or less
LOOKED_AT = 3  # steps, the last ones
ROUNDING = 16  # times the precision of the numbers: below it a change says nothing


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
        pace: Largest change of each of the last three steps, or of fewer; the newest first.
        rounding: What numbers of this precision and size cannot tell from no change.
    """

    states: States
    drives: States
    relaxation: Relaxation
    size: float
    cycling: bool
    changes: States
    pace: tuple[float, ...]
    rounding: float

    def drift(self, steps: int) -> float:
        """How far so many steps more would lead, from how the last changes have shrunk, or have not.

        A layered net's changes come in pairs, since J of a graph of two colours has eigenvalues in pairs +-x: the
        changes of two steps are compared with those of the two before.
        """
        if not self.relaxation.residual > self.rounding:  # or it is no number
            return self.relaxation.residual
        before = self.pace[min(1, len(self.pace) - 1)]
        shrinking = min(_ratio(self.pace) ** (2 if len(self.pace) == 2 else 1), 1.0)
        pairs = steps / 2
        terms = pairs if shrinking == 1 else shrinking * (1 - shrinking**pairs) / (1 - shrinking)
        return (self.pace[0] + before) * terms

    @property
    def unsettled(self) -> bool:
        """Whether as many steps again would move it by more than a twentieth of what the states are."""
        return not self.drift(self.relaxation.steps) <= max(UNSETTLED * self.size, self.rounding)

    @property
    def growing(self) -> bool:
        """Whether the last steps came no nearer."""
        return len(self.pace) == LOOKED_AT and not _ratio(self.pace) < 1

    def moving_most(self) -> str:
        """The slot whose state moved most in the last step."""
        sizes = {slot: float(magnitude(change).max()) for slot, change in self.changes.items()}
        return max(sizes, key=lambda slot: math.inf if math.isnan(sizes[slot]) else sizes[slot])


def _ratio(pace: Sequence[float]) -> float:
    return 1.0 if len(pace) == 1 else pace[0] / pace[-1] if pace[-1] else math.inf


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
    past, last, states, done = Past(), list[tuple[States, States]](), start, 0
    while done < steps:
        made = update.step(equilibrium, states, influence, past)
        states = made.states
        last = [*last[1 - LOOKED_AT :], (made.start, made.states)]
        done += 1
        if tol > 0 and float(_largest(_changes(*last[-1]))) <= tol * update.share:
            break
    changes = _changes(*last[-1])
    by_sample = _by_sample(changes, equilibrium.call.batch_size)
    largest = _largest(changes) if by_sample is None else by_sample.max()
    two = _largest(_changes(last[max(len(last) - 2, 0)][0], states))
    before = [_largest(_changes(*pair)) for pair in last[-2::-1]]
    moved, returned, size, *paces = torch.stack([largest, two, _largest(states), *before]).tolist()
    residual = moved / update.share
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
    cycling, rounding = done > 1 and returned < RETURNING * moved, ROUNDING * equilibrium.precision * size
    return Settled(states, made.drives, relaxation, size, cycling, changes, (moved, *paces), rounding)


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
