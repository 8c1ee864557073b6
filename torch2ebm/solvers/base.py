"""What every solver is, and the one loop that drives them all."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

from torch2ebm.energies import Energy
from torch2ebm.error_inference import ErrorInference
from torch2ebm.errors import ConfigurationError, DivergenceError, NonFiniteError
from torch2ebm.fused import EagerRun, Programs, RecordedRun
from torch2ebm.inference import LOSS, Inference, energies
from torch2ebm.output_loss import OutputLoss
from torch2ebm.state import Call, LocalGradients, Relaxation
from torch2ebm.value_inference import ValueInference

REMEDY = "Take a smaller step size (lr), or fewer steps."
RISE = 1e3  # an energy that has risen by so many times its start is no overshoot any more
WATCHED = 100  # steps between two looks at the energy; each waits for the device

Form = TypeVar("Form", bound=Inference)


class Solver(ABC, Generic[Form]):
    """How values relax: :meth:`start`, then :meth:`step` until ``steps`` are done or the residual is at most ``tol``.

    Attributes:
        steps: Most inference steps to do.
        tol: Stop once no entry of the driving term (dF/dv, dF/de) exceeds it in any node or sample; 0 never stops.
        remedy: What to try where it diverges.
    """

    steps: int
    tol: float
    remedy: ClassVar[str] = REMEDY

    @abstractmethod
    def inference(self, call: Call, loss: OutputLoss, energies: Mapping[str, Energy], retain_call: bool) -> Form:
        """What this solver moves: values, or errors."""

    @abstractmethod
    def with_steps(self, steps: int) -> Solver[Form]:
        """The same solver with another number of steps."""

    @abstractmethod
    def start(self, inference: Form) -> Any:
        """The solver's own state for one relaxation."""

    @abstractmethod
    def step(self, inference: Form, state: Any) -> Any:
        """Move once; returns the next state."""


class ValueSolver(Solver[ValueInference]):
    """A solver that moves values."""

    def inference(
        self, call: Call, loss: OutputLoss, energies: Mapping[str, Energy], retain_call: bool
    ) -> ValueInference:
        return ValueInference(call, loss, energies, retain_call)


class ErrorSolver(Solver[ErrorInference]):
    """A solver that moves errors: a value is its prediction plus its error."""

    def inference(
        self, call: Call, loss: OutputLoss, energies: Mapping[str, Energy], retain_call: bool
    ) -> ErrorInference:
        return ErrorInference(call, loss, energies, retain_call)


def relax(solver: Solver[Form], inference: Form, beta: float = 1.0, programs: Programs | None = None) -> LocalGradients:
    """Relax, take the local gradients where the relaxation ends, and check both; by recorded programs where given.

    Raises :class:`NonFiniteError` where the first energy is no number, :class:`DivergenceError` where a later one is.
    """
    run = EagerRun(solver, inference) if programs is None else RecordedRun(programs, solver, inference)
    steps, residual = 0, math.inf
    while steps < solver.steps:
        inference.measuring = solver.tol > 0 or steps == solver.steps - 1
        steps += run.advance(_steps_unwatched(solver, steps))
        if inference.measuring:
            residual = float(inference.residual())
            if residual <= solver.tol:
                break
        if steps % WATCHED == 0 and _has_run_away(inference):
            break
    gradients = run.local_gradients()
    relaxation = report(inference, steps, residual, solver.tol, beta, solver.remedy)
    return replace(gradients, state=replace(gradients.state, relaxation=relaxation, phases=(relaxation,)))


def _steps_unwatched(solver: Solver[Any], steps: int) -> int:
    """How many may be taken before somebody looks at the relaxation."""
    return 1 if solver.tol > 0 else max(1, min(solver.steps - 1 - steps, WATCHED - steps % WATCHED))


def _has_run_away(inference: Inference) -> bool:
    """Whether the last energy is past what :func:`report` lets through: the steps that are left would be wasted."""
    first, last = (float(sum(inference.history[i].values())) for i in (0, -1))
    return not (math.isfinite(last) and last <= _ceiling(first))


def _ceiling(first: float) -> float:
    return first + RISE * abs(first) + 1.0


def report(
    inference: Inference, steps: int, residual: float, tol: float, beta: float = 1.0, remedy: str = REMEDY
) -> Relaxation:
    """How the relaxation went. Raises :class:`NonFiniteError` or :class:`DivergenceError` where it went wrong."""
    names = [node.name for node in inference.graph.hidden_nodes]
    table = energies(inference.history, [*names, LOSS])
    loss = table.pop(LOSS)
    total = tuple(sum(column) for column in zip(loss, *table.values(), strict=True))
    check_energies(total, {**table, "the loss": loss}, remedy)
    converged = residual <= tol if tol > 0 else None
    return Relaxation(
        steps, converged, residual, total, table, loss, inference.residual_of_samples(), tol=tol, beta=beta
    )


def check_energies(total: tuple[float, ...], parts: Mapping[str, tuple[float, ...]], remedy: str = REMEDY) -> None:
    """Raise :class:`NonFiniteError` for a start, :class:`DivergenceError` for a later energy, that went wrong."""
    ceiling = _ceiling(total[0])
    bad = next((step for step, energy in enumerate(total) if not (math.isfinite(energy) and energy <= ceiling)), None)
    if bad is None:
        return
    broken = (name for name, column in parts.items() if not math.isfinite(column[bad]))
    where = next(broken, max(parts, key=lambda name: parts[name][bad]))
    if not math.isfinite(total[0]):
        raise NonFiniteError(
            f"{where}, feed-forward pass (inference step 0)",
            f"energy {total[0]}",
            "a finite number",
            "Look for NaN or infinity in the input, the target and the parameters.",
        )
    raise DivergenceError(
        f"{where}, inference step {bad}",
        f"energy {total[bad]:.4g} after {total[0]:.4g} at the start",
        "an energy that falls",
        remedy,
        total[: bad + 1],
    )


def check_positive(where: str, **numbers: float) -> None:
    """Refuse a step size, a nudge or a rate that is not positive and finite."""
    for name, number in numbers.items():
        if not (isinstance(number, (int, float)) and math.isfinite(number) and number > 0):
            raise ConfigurationError(f"{where}({name}=...)", repr(number), "a finite number above 0", "Choose another.")


def check_steps(where: str, steps: int) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigurationError(f"{where}(steps=...)", repr(steps), "a whole number, 1 or more", "Choose another.")


def check_tolerance(where: str, tol: float) -> None:
    if not (isinstance(tol, (int, float)) and math.isfinite(tol) and tol >= 0):
        raise ConfigurationError(f"{where}(tol=...)", repr(tol), "a finite number, 0 or more", "0 runs all steps.")
