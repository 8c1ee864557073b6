"""Checks of phases that have not settled: a warning, or an error where the gradient would be noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch

from torch2ebm.equilibrium.dynamics import Equilibrium, Influence, States
from torch2ebm.equilibrium.settling import Free, Settled, StateChange, settle
from torch2ebm.errors import ConfigurationError, DivergenceError, NotSettledError, NotSettledWarning

REMEDY = (
    "Take a lower feedback (feedback=0.5), some damping (damping=0.5), more free_steps, update=AndersonMixing(), or "
    "bounded activations."
)
DRIFTING = 0.1  # of what a nudge has moved


def are_finite(states: States) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in states.values())


def warn_if_unsettled(equilibrium: Equilibrium, settled: Settled) -> None:
    """Raise or warn where it has not settled, whatever came before: the output is not that of an equilibrium."""
    check_finite(equilibrium, settled, "free phase", equilibrium.states)
    # infinite inputs: who checks the inputs names them
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
    # an estimate first, so that a settled phase is not continued in vain
    bound = settled.drift(steps) / settled.pace[0] * settled.distance
    if not bound > DRIFTING * max(_distance_of(phase.states, settled.states) for phase in phases):
        return
    # as many steps as the nudged phase had, without a nudge: what is left is the nudge's
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
    return float(StateChange.between(others, states, 0).length)


def _movement(phase: Settled, free: Settled) -> float:
    return max(float(each) for each in StateChange.between(free.states, phase.states, 0).largest.values())


def check_nudged(free: Free, phase: Settled, where: str) -> None:
    """Warn where a phase that began at a settled state cycles, or comes no nearer: few steps may be meant, not these.

    The first steps say nothing: on their way down and back up again the nudge's changes may grow.
    """
    # down to the first state and back: two steps for each level
    arrived = phase.relaxation.steps > 2 * (free.equilibrium.hopfield.output_depth + 1)
    if not arrived or free.settled.unsettled or not (phase.cycling or phase.growing):
        return
    last, moved = phase.relaxation, _movement(phase, free.settled)
    # small against what the nudge moved, or no number: no harm, or named elsewhere
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
    # where bad numbers came in, the check of what was given names their source
    if math.isfinite(settled.relaxation.residual) or not are_finite(given):
        return
    name = equilibrium.hopfield.states[settled.moving_most()].name
    raise DivergenceError(
        f"{name}, {phase}, within {settled.relaxation.steps} steps",
        "states that are NaN or infinite",
        "states that settle",
        REMEDY,
    )
