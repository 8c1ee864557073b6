"""Diverged relaxations: how phases reveal one, and the choice between an error, a warning and a skipped batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch2ebm.common.checks import check_choice
from torch2ebm.engine.call import Call
from torch2ebm.engine.results import InferenceState, LocalGradients, Relaxation
from torch2ebm.errors import DivergenceError, DivergenceWarning, LostMinimumError

CHOICES = ("raise", "warn", "skip")
# To first order both signs of a nudge leave the same energy in the errors. At 9 times, the second order is half the
# first: for a quadratic energy of curvature h, ((1 + beta h) / (1 - beta h))^2 = 9 at beta h = 1/2.
ASYMMETRY = 9.0


def check_on_divergence(where: str, choice: str) -> None:
    check_choice(where, "on_divergence", choice, CHOICES)


def no_gradients(choice: str, error: DivergenceError, call: Call) -> LocalGradients:
    """The result of a diverged relaxation that is not to raise: no gradient, so ``.grad`` stays as it is."""
    if choice == "raise":
        raise error
    if choice == "warn":
        warnings.warn(DivergenceWarning(f"{error} This batch gives no gradient."), stacklevel=2)
    relaxation = Relaxation(converged=False, residual=float("inf"), energy=error.energy)
    # without values and errors: who asks for them is told that the relaxation ran away
    state = InferenceState(call.graph, call.batch_size, {}, {}, relaxation=relaxation, phases=(relaxation,))
    return LocalGradients({}, [None] * len(call.tensors), state)


def check_phases(phases: Sequence[Relaxation]) -> None:
    """Raise :class:`LostMinimumError` where a negative nudge has left the minimum that the positive one moves."""
    positive = next((phase for phase in phases if phase.beta > 0), None)
    for phase in phases:
        if phase.beta > 0 or positive is None:  # a random sign has one phase, and no mirror
            continue
        # errors are linear in a small beta, so their energy goes like beta^2 (Millidge et al. 2022)
        mirrored = (phase.beta / positive.beta) ** 2 * _errors(positive)
        if _errors(phase) > ASYMMETRY * mirrored:
            raise _lost(phase, positive, _errors(phase) / mirrored if mirrored else float("inf"))


def of_phase(error: DivergenceError, beta: float) -> DivergenceError:
    """The error of a phase that ran away; with a negative nudge the minimum may be gone, whatever the step size."""
    if beta > 0:
        return error
    return LostMinimumError(
        f"{error.where}, negative nudge {beta:g}",
        error.got,
        "an energy that falls to the minimum that a small nudge moves",
        f"Take a smaller beta, or OneSided(beta), whose nudge keeps the minimum. {error.remedy}",
        error.energy,
    )


def _errors(phase: Relaxation) -> float:
    """The energy of the prediction errors at the end, without the loss."""
    return sum(column[-1] for column in phase.node_energy.values())


def _lost(phase: Relaxation, positive: Relaxation, ratio: float) -> LostMinimumError:
    growth = {name: column[-1] - positive.node_energy[name][-1] for name, column in phase.node_energy.items()}
    node = max(growth, key=lambda name: growth[name])
    return LostMinimumError(
        f"{node}, negative nudge {phase.beta:g}, inference step {phase.steps}",
        f"{ratio:.3g} times the prediction error of the positive nudge",
        "phases that mirror each other: the negative nudge has lost the minimum, or is about to",
        "Take a smaller beta, or OneSided(beta), whose nudge keeps the minimum.",
        phase.energy,
    )
