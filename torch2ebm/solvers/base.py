"""What every solver is, and the one loop that drives them all."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

from torch2ebm.errors import ConfigurationError, DivergenceError, NonFiniteError
from torch2ebm.inference import LOSS, Inference, energies
from torch2ebm.state import LocalGradients, Relaxation


class Solver(ABC):
    """How values relax: :meth:`start`, then :meth:`step` until ``steps`` are done or the residual is at most ``tol``.

    Attributes:
        steps: Most inference steps to do.
        tol: Stop once no entry of the driving term (dF/dv for values) exceeds it in any node or sample; 0 never stops.
    """

    steps: int
    tol: float

    @abstractmethod
    def with_steps(self, steps: int) -> Solver:
        """The same solver with another number of steps."""

    @abstractmethod
    def start(self, inference: Inference) -> Any:
        """The solver's own state for one relaxation."""

    @abstractmethod
    def step(self, inference: Inference, state: Any) -> Any:
        """Move the values once; returns the next state."""


def relax(solver: Solver, inference: Inference) -> LocalGradients:
    """Relax the values, take the local gradients where they end, and check both.

    Raises :class:`NonFiniteError` where the first energy is no number, :class:`DivergenceError` where a later one is.
    """
    state = solver.start(inference)
    steps, residual = 0, math.inf
    while steps < solver.steps:
        inference.measuring = solver.tol > 0 or steps == solver.steps - 1
        state = solver.step(inference, state)
        steps += 1
        if inference.measuring:
            residual = float(inference.residual())
            if residual <= solver.tol:
                break
    gradients = inference.local_gradients()
    relaxation = _report(inference, steps, residual, solver.tol)
    return replace(gradients, state=replace(gradients.state, relaxation=relaxation))


def _report(inference: Inference, steps: int, residual: float, tol: float) -> Relaxation:
    names = [node.name for node in inference.graph.hidden_nodes]
    table = energies(inference.history, [*names, LOSS])
    loss = table.pop(LOSS)
    total = tuple(sum(column) for column in zip(loss, *table.values(), strict=True))
    _check(total, table)
    converged = residual <= tol if tol > 0 else None
    return Relaxation(steps, converged, residual, total, table, loss)


def _check(total: tuple[float, ...], table: dict[str, tuple[float, ...]]) -> None:
    bad = next((step for step, energy in enumerate(total) if not math.isfinite(energy)), None)
    if bad is None:
        return
    node = next((name for name, column in table.items() if not math.isfinite(column[bad])), "the loss")
    if bad == 0:
        raise NonFiniteError(
            f"{node}, feed-forward pass (inference step 0)",
            f"energy {total[0]}",
            "a finite number",
            "Look for NaN or infinity in the input, the target and the parameters.",
        )
    raise DivergenceError(
        f"{node}, inference step {bad}",
        f"energy {total[bad]} after {total[0]:.4g} at the start",
        "an energy that falls",
        "Take a smaller step size (lr), or fewer steps.",
        total,
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
