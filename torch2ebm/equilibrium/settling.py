"""The loop that settles the states of an equilibrium algorithm, and the report of how far from rest it ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch2ebm.engine.results import InferenceState, Relaxation
from torch2ebm.equilibrium.dynamics import Equilibrium, Influence, States
from torch2ebm.equilibrium.updates import ProgramUpdate, Update, UpdateHistory
from torch2ebm.programs.cache import Programs

UNSETTLED = 0.05  # of what the states are; output and gradient are then wrong by about as large a part
RETURNING = 0.05  # of what one step moves: a mode of eigenvalue -0.95 or less
LOOKED_AT = 3  # last steps: a change is compared with that of two steps before, see drift
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
        moved: Largest change of each state in the last step, by slot.
        distance: Euclidean length of that change, over all states and samples.
        pace: Largest change of each of the last three steps, or of fewer; the newest first.
        rounding: The largest change that may be rounding error alone.
    """

    states: States
    drives: States
    relaxation: Relaxation
    size: float
    cycling: bool
    moved: Mapping[str, float]
    distance: float
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
        # per two steps; of two steps alone the ratio is per step, hence the square
        shrinking = min(_ratio(self.pace) ** (2 if len(self.pace) == 2 else 1), 1.0)
        pairs = steps / 2  # geometric series over pairs
        terms = pairs if shrinking == 1 else shrinking * (1 - shrinking**pairs) / (1 - shrinking)
        return (self.pace[0] + before) * terms

    @property
    def unsettled(self) -> bool:
        """Whether as many steps again would move it by more than a twentieth of what the states are."""
        # not ... <=: NaN is unsettled
        return not self.drift(self.relaxation.steps) <= max(UNSETTLED * self.size, self.rounding)

    @property
    def growing(self) -> bool:
        """Whether the last steps came no nearer."""
        # not ... <: NaN grows
        return len(self.pace) == LOOKED_AT and not _ratio(self.pace) < 1

    def moving_most(self) -> str:
        """The slot whose state moved most in the last step."""
        # NaN first: max would pass over it, since every comparison with it is false
        return max(self.moved, key=lambda slot: math.inf if math.isnan(self.moved[slot]) else self.moved[slot])


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
    programs: Programs | None = None,
) -> Settled:
    """Repeat the step, and say how far from a fixed point it ended. Never raises: look at ``residual``."""
    if programs is not None:
        update = ProgramUpdate(programs, update, equilibrium, influence)
    past, states, done = UpdateHistory(), start, 0
    pace: list[Tensor] = []  # oldest first
    earlier: States = {}  # two steps before the last, to see a cycle of length two
    while True:
        made = update.step(equilibrium, states, influence, past)
        done += 1
        # a maximum over all states costs a pass: without a tolerance the last three are enough
        if tol > 0 or done > steps - LOOKED_AT:
            pace = [*pace[1 - LOOKED_AT :], _largest_change(made.start, made.states)]
        # tol is of an undamped step, which is 1 / share times this one; float() waits for the device
        if done == steps or (tol > 0 and float(pace[-1]) <= tol * update.share):
            break
        if tol > 0 or done == steps - 1:  # the next step may be the last
            earlier = made.start
        states = made.states
        del made  # a copy of the drives, which the next step does not need
    change = StateChange.between(made.start, made.states, equilibrium.call.batch_size)
    returned = _largest_change(earlier, made.states) if earlier else pace[-1]
    numbers = [change.length, returned, _largest(made.states), *change.largest.values(), *reversed(pace)]
    # one transfer to the host for all numbers
    distance, back, size, *rest = torch.stack(numbers).tolist()
    moved, paces = dict(zip(change.largest, rest, strict=False)), rest[len(change.largest) :]
    residual = paces[0] / update.share
    relaxation = Relaxation(
        done,
        residual <= tol if tol > 0 else None,
        residual,
        sample_residual=None if change.by_sample is None else change.by_sample / update.share,
        tol=tol,
        beta=beta,
        angle=angle,
        update=update.name,
    )
    # two steps led back, though each moved: an eigenvalue near -1
    cycling, rounding = done > 1 and back < RETURNING * paces[0], ROUNDING * equilibrium.precision * size
    return Settled(made.states, made.drives, relaxation, size, cycling, moved, distance, tuple(paces), rounding)


@dataclass(frozen=True, eq=False)
class StateChange:
    """What a step has changed, without a copy of all states.

    Attributes:
        largest: Largest change of each state, by slot.
        length: Euclidean, of all changes together.
        by_sample: Largest change of each sample, shape ``[batch]``; None where a state has no batch dimension.
    """

    largest: Mapping[str, Tensor]
    length: Tensor
    by_sample: Tensor | None

    @staticmethod
    def between(before: States, after: States, batch_size: int) -> StateChange:
        largest, squares, rows = dict[str, Tensor](), list[Tensor](), list[Tensor]()
        for slot, state in after.items():
            change = _change(before[slot], state)
            largest[slot] = change.max()
            # one number for each state, and no copy of all changes
            squares.append(torch.linalg.vector_norm(change).square())
            if change.ndim and change.shape[0] == batch_size:
                rows.append(change.reshape(batch_size, -1).amax(1))
        # every state has to have the batch dimension, or the number would miss some
        by_sample = torch.stack(rows).amax(0) if len(rows) == len(after) else None
        return StateChange(largest, torch.stack(squares).sum().sqrt(), by_sample)


def _largest_change(before: States, after: States) -> Tensor:
    return torch.stack([_change(before[slot], state).max() for slot, state in after.items()]).max()


def _largest(states: States) -> Tensor:
    return torch.stack([magnitude(state).max() for state in states.values()]).max()


def magnitude(tensor: Tensor) -> Tensor:
    """Absolute values; of complex numbers by their parts, since ``abs`` is kept for what is holomorphic."""
    return torch.hypot(tensor.real, tensor.imag) if tensor.is_complex() else tensor.abs()


def _change(before: Tensor, after: Tensor) -> Tensor:
    difference = after - before
    # abs_ cannot write real numbers into a complex tensor
    return magnitude(difference) if difference.is_complex() else difference.abs_()


@dataclass(frozen=True, eq=False)
class Free:
    """The free equilibrium of one call.

    Attributes:
        update: The update that settled, which nudged phases then use too.
        feedforward_distance: |equilibrium - feed-forward| / |feed-forward| over all outputs, no dimension.
    """

    equilibrium: Equilibrium
    settled: Settled
    update: Update
    feedforward_distance: Tensor

    def report_of(self, nudged: Sequence[Settled]) -> InferenceState:
        """Prediction: the free equilibrium. Error: what the first nudged phase changed, of states and drives."""
        first, free = nudged[0], self.settled
        errors, of_drives = Difference(first.states, free.states), Difference(first.drives, free.drives)
        state = self.report(errors, of_drives, first.relaxation)
        return replace(state, phases=(free.relaxation, *[each.relaxation for each in nudged]))

    def report(self, errors: States, of_drives: States, relaxation: Relaxation) -> InferenceState:
        """Free values of states, and of the pre-activations that they were made of, each with its error."""
        equilibrium, free = self.equilibrium, self.settled
        predictions = dict(equilibrium.outputs(free.states))
        place = {slot: (errors, state) for slot, state in equilibrium.hopfield.outputs.items()}
        # The source first: where it is the slot of the state itself, the state overwrites it.
        for slot, state in equilibrium.hopfield.states.items():
            predictions[state.source], place[state.source] = free.drives[slot], (of_drives, slot)
            predictions[slot], place[slot] = free.states[slot], (errors, slot)
        return InferenceState(
            equilibrium.call.graph,
            equilibrium.call.batch_size,
            predictions,
            Placed(place),
            relaxation=relaxation,
            feedforward_distance=float(self.feedforward_distance),
        )


class Difference(Mapping[str, Tensor]):
    """a - b, of complex numbers the real part, computed when it is asked for."""

    def __init__(self, a: States, b: States) -> None:
        self._a, self._b = a, b

    def __getitem__(self, slot: str) -> Tensor:
        difference = self._a[slot] - self._b[slot]
        return difference.real if difference.is_complex() else difference

    def __iter__(self) -> Iterator[str]:
        return iter(self._b)

    def __len__(self) -> int:
        return len(self._b)


class Placed(Mapping[str, Tensor]):
    """A view of several mappings: each slot has a mapping and a name in it."""

    def __init__(self, places: Mapping[str, tuple[States, str]]) -> None:
        self._places = places

    def __getitem__(self, slot: str) -> Tensor:
        mapping, name = self._places[slot]
        return mapping[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
