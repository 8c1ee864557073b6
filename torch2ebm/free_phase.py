"""The free phase of equilibrium algorithms: what ``model(x)`` is, and what is done where it does not settle."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torch2ebm.equilibrium import Equilibrium, Influence, States
from torch2ebm.errors import ConfigurationError, DivergenceError, NotSettledError, NotSettledWarning
from torch2ebm.fused import Programs
from torch2ebm.hopfield import HopfieldGraph
from torch2ebm.settling import Change, Settled, settle
from torch2ebm.solvers.base import check_steps, check_tolerance
from torch2ebm.state import Call, InferenceState, Relaxation
from torch2ebm.updates import Damped, GaussSeidel, Synchronous, Update

REMEDY = (
    "Take a lower feedback (feedback=0.5), some damping (damping=0.5), more free_steps, update=AndersonMixing(), or "
    "bounded activations."
)
DRIFTING = 0.1  # of what a nudge has moved


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
    """To each slot what stands in one of several mappings, under a name of its own."""

    def __init__(self, places: Mapping[str, tuple[States, str]]) -> None:
        self._places = places

    def __getitem__(self, slot: str) -> Tensor:
        mapping, name = self._places[slot]
        return mapping[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True)
class FreePhase:
    """How an algorithm relaxes without a loss; the settings that all equilibrium algorithms share.

    Args:
        steps: Steps of all states.
        feedback: Strength of the feedback per depth.
        damping: The part of a step that is taken back.
        tol: Largest change at which the phase ends early; 0 takes all steps.
        readout: Whether the outputs are read out of the states, and have none.
        update: How a step moves the states; None for all at once.
        programs: Where recorded steps are kept; None records none.
    """

    steps: int
    feedback: float = 1.0
    damping: float = 0.0
    tol: float = 0.0
    readout: bool = False
    update: Update | None = None
    programs: Programs | None = field(default=None, compare=False)

    def check(self, where: str) -> None:
        """Raise :class:`ConfigurationError` for an illegal setting of the algorithm ``where``."""
        check_steps(where, self.steps)
        check_tolerance(where, self.tol)
        _check_between(where, "feedback", self.feedback, 0 < self.feedback <= 1 if _number(self.feedback) else False)
        _check_between(where, "damping", self.damping, 0 <= self.damping < 1 if _number(self.damping) else False)
        if self.update is not None and not isinstance(self.update, Update):
            remedy = "For example AndersonMixing()."
            raise ConfigurationError(f"{where}(update=...)", repr(self.update), "AndersonMixing or GaussSeidel", remedy)
        if self.update is not None and self.damping:
            got = f"damping={self.damping:g} and update={self.update!r}"
            raise ConfigurationError(where, got, "one of them", "Damping belongs to the update of all states at once.")

    def settings(self) -> str:
        """Those that are not the default, as they stand in an algorithm's ``repr``."""
        parts = [f"free_steps={self.steps}"]
        parts += [f"feedback={self.feedback:g}"] * (self.feedback != 1)
        parts += [f"damping={self.damping:g}"] * (self.damping != 0)
        parts += [f"tol={self.tol:g}"] * (self.tol != 0) + ["readout=True"] * self.readout
        parts += [f"update={self.update!r}"] * (self.update is not None)
        parts += ["compile=True"] * (self.programs is not None)
        return ", ".join(parts)

    def run(self, call: Call) -> Free:
        """Feed-forward, then relax; the call's values become the equilibrium's.

        Raises :class:`DivergenceError` where the states run away, :class:`NoEquilibriumError` and
        :class:`PartitionError` where the graph has no energy.
        """
        key = ("Hopfield", self.readout)
        hopfield = call.graph.once(key, lambda: HopfieldGraph(call.graph, self.readout))
        call.feedforward(keep_graph=False)
        equilibrium = Equilibrium(call, hopfield, self.feedback)
        feedforward = {slot: call.values[slot].detach() for slot in call.graph.output_slots}
        update, settled = self._settled(equilibrium)
        outputs = equilibrium.outputs(settled.states)
        for slot, value in outputs.items():
            outputs[slot] = value.to(call.values[slot].dtype)
        if math.isfinite(settled.relaxation.residual):  # else the feed-forward values say where it began
            self._leave(call, equilibrium, settled)
        call.values.update(outputs)
        free = Free(equilibrium, settled, update, _distance(outputs, feedforward))
        call.equilibrium = free
        return free

    def _leave(self, call: Call, equilibrium: Equilibrium, settled: Settled) -> None:
        """The feed-forward values go: where the states have settled is what the call is about."""
        for slot, state in equilibrium.hopfield.states.items():
            call.values[state.source], call.values[slot] = settled.drives[slot], settled.states[slot]
        equilibrium.states = dict(settled.states)

    def settled(
        self,
        equilibrium: Equilibrium,
        start: States,
        steps: int,
        update: Update,
        influence: Influence,
        beta: float = 0.0,
        angle: float = 0.0,
    ) -> Settled:
        """Where ``steps`` lead from ``start``, by these settings; a nudged phase too."""
        return settle(equilibrium, start, steps, update, influence, self.tol, beta, angle, self.programs)

    def _settled(self, equilibrium: Equilibrium) -> tuple[Update, Settled]:
        """The first update, or another where states cycle or run away; where one was asked for, unless it settles."""
        tried: list[tuple[Update, Settled]] = []
        for update in self._updates():
            settled = self.settled(equilibrium, equilibrium.states, self.steps, update, Influence())
            tried.append((update, settled))
            if math.isfinite(settled.relaxation.residual):
                if not settled.unsettled or not (settled.cycling or self.update is not None):
                    break
            elif not _are_finite(equilibrium.states):  # bad numbers came in: who checks these says which
                break
        best = min(tried, key=lambda pair: _badness(pair[1].relaxation))
        _check(equilibrium, best[1])
        return best

    def _updates(self) -> Sequence[Update]:
        plain = Damped(self.damping) if self.damping else Synchronous()
        first = plain if self.update is None else self.update
        return tuple(dict.fromkeys([first, Damped(max(self.damping, 0.5)), GaussSeidel()]))


def _are_finite(states: States) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in states.values())


def _badness(relaxation: Relaxation) -> float:
    return relaxation.residual if math.isfinite(relaxation.residual) else math.inf


def _check(equilibrium: Equilibrium, settled: Settled) -> None:
    """Raise or warn where it has not settled, whatever came before: the output is not that of an equilibrium."""
    check_finite(equilibrium, settled, "free phase", equilibrium.states)
    if not settled.unsettled or not math.isfinite(settled.relaxation.residual):
        return
    last, watched = settled.relaxation, equilibrium.hopfield.watched
    name = equilibrium.hopfield.states[settled.moving_most()].name
    reason = f" It has {', '.join(sorted(watched.values()))} in the loop, which may not settle." if watched else ""
    warnings.warn(
        NotSettledWarning(
            f"The free phase has not settled: after {last.steps} {last.update} steps the states of '{name}' still move "
            f"by {last.residual:.0e} a step, with values up to {settled.size:.0e}.{reason} {REMEDY}"
        ),
        stacklevel=2,
    )


def check_drift(free: Free, phases: Sequence[Settled], where: str) -> None:
    """A difference to the free state shows what the nudge moved, and what would have moved anyway.

    Where the second may be a tenth, the free phase is continued, which tells the two apart. Raises
    :class:`NotSettledError` where the drift is more than what the nudge has moved, and warns where it is a tenth. Both
    are Euclidean lengths over all samples, whose gradients are summed.
    """
    settled, steps = free.settled, max(phase.relaxation.steps for phase in phases)
    if not settled.relaxation.residual > settled.rounding:  # numbers that are none are named by who checks them
        return
    bound = settled.drift(steps) / settled.pace[0] * settled.distance
    if not bound > DRIFTING * max(_distance_of(phase.states, settled.states) for phase in phases):
        return
    on = settle(free.equilibrium, settled.states, steps, free.update, Influence()).states
    drift, moved = _distance_of(on, settled.states), max(_distance_of(phase.states, on) for phase in phases)
    if not drift > DRIFTING * moved:
        return
    name = free.equilibrium.hopfield.states[settled.moving_most()].name
    got = (
        f"a free phase that still moves by {settled.relaxation.residual:.0e} a step, whose drift in {steps} steps is "
        f"{drift / moved:.0%} of what the nudge moves"
    )
    remedy = (
        "Take more free_steps, a lower feedback, damping, a larger beta, or EquilibriumPropagation(Symmetric(beta)), "
        "in which the drift cancels."
    )
    if drift > moved:
        expected = "a free equilibrium from which the nudge alone moves the states"
        raise NotSettledError(f"{name}, {where}", got, expected, remedy)
    warnings.warn(NotSettledWarning(f"{name}, {where}: got {got}. {remedy}"), stacklevel=2)


def _distance_of(states: States, others: States) -> float:
    return float(Change.between(others, states, 0).length)


def _movement(phase: Settled, free: Settled) -> float:
    return max(float(each) for each in Change.between(free.states, phase.states, 0).largest.values())


def check_nudged(free: Free, phase: Settled, where: str) -> None:
    """Warn where a phase that began at a settled state cycles, or comes no nearer: few steps may be meant, not these.

    The first steps say nothing: on their way down and back up again the nudge's changes may grow.
    """
    arrived = phase.relaxation.steps > 2 * (free.equilibrium.hopfield.output_depth + 1)
    if not arrived or free.settled.unsettled or not (phase.cycling or phase.growing):
        return
    last, moved = phase.relaxation, _movement(phase, free.settled)
    if not DRIFTING * moved < last.residual < math.inf:
        return
    name = free.equilibrium.hopfield.states[phase.moving_most()].name
    message = (
        f"The {where} does not settle: after {last.steps} {last.update} steps the states of '{name}' still move by "
        f"{last.residual:.0e} a step, where {moved:.0e} was moved in all. Take a smaller nudge, a lower feedback "
        "(feedback=0.5), or some damping (damping=0.5)."
    )
    warnings.warn(NotSettledWarning(message), stacklevel=2)


def check_signal(where: str, free: Free, amount: float, margin: float) -> None:
    """What reaches the first states is amount * feedback^depth of the output's nudge; rounding must not reach it.

    Raises :class:`ConfigurationError` where it is below ``margin`` times the precision of the states.
    """
    equilibrium = free.equilibrium
    precision = max(torch.finfo(value.dtype).eps for value in free.settled.states.values())
    signal = amount * equilibrium.output_weight
    if signal < margin * precision:
        part = "" if amount == 1 else f"{amount:g} * "
        raise ConfigurationError(
            where,
            f"a signal of {part}{equilibrium.feedback:g}^{equilibrium.hopfield.output_depth} = {signal:.2g}",
            f"at least {margin * precision:.2g} in numbers of precision {precision:.2g}",
            "Take a larger feedback or nudge, model.double(), or RecurrentBackprop, which takes no difference.",
        )


def check_finite(equilibrium: Equilibrium, settled: Settled, phase: str, given: States) -> None:
    """Raise :class:`DivergenceError` where a phase ended in numbers that are none, though the ``given`` ones are."""
    if math.isfinite(settled.relaxation.residual) or not _are_finite(given):
        return
    name = equilibrium.hopfield.states[settled.moving_most()].name
    raise DivergenceError(
        f"{name}, {phase}, within {settled.relaxation.steps} steps",
        "states that are NaN or infinite",
        "states that settle",
        REMEDY,
    )


def _distance(outputs: States, feedforward: States) -> Tensor:
    difference = torch.stack([(outputs[slot] - value).square().sum() for slot, value in feedforward.items()]).sum()
    size = torch.stack([value.square().sum() for value in feedforward.values()]).sum()
    return (difference / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt()


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_between(where: str, name: str, value: object, legal: bool) -> None:
    if not legal:
        expected = "a number above 0, at most 1" if name == "feedback" else "a number from 0 to below 1"
        raise ConfigurationError(f"{where}({name}=...)", repr(value), expected, "Choose another.")
