"""Gradient descent on the values: the inference of predictive coding in the literature."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch2ebm.common.checks import check_positive, check_steps, check_tolerance
from torch2ebm.inference.solver import ValueSolver
from torch2ebm.inference.value_inference import ValueInference


@dataclass(frozen=True)
class GradientDescent(ValueSolver):
    """``v <- v - lr dF/dv`` for all values at once (Rosenbaum 2022, strict update).

    Args:
        steps: Most inference steps.
        lr: Step size.
        tol: Stop when no entry of dF/dv exceeds it in any node or sample; 0 does all steps.

    Raises:
        ConfigurationError: for a step size that is not positive and finite, fewer than one step, a negative ``tol``.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.PredictiveCoding(solver=torch2ebm.GradientDescent(steps=100, lr=0.2, tol=1e-4)).solver.steps
        100
    """

    steps: int = 20
    lr: float = 0.1
    tol: float = 0.0

    def __post_init__(self) -> None:
        check_steps("GradientDescent", self.steps)
        check_positive("GradientDescent", lr=self.lr)
        check_tolerance("GradientDescent", self.tol)

    def with_steps(self, steps: int) -> GradientDescent:
        return replace(self, steps=steps)

    def start(self, inference: ValueInference) -> None:
        return None  # descent remembers nothing

    def step(self, inference: ValueInference, state: None) -> None:
        # Synchronous, though it moves each slot as it comes: a slot comes after all its children,
        # and after its own error is sent.
        for slot, gradient in inference.sweep():
            inference.move(slot, gradient, -self.lr)
