"""Gradient descent on the values: the inference of predictive coding in the literature."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from torch2ebm.common.checks import check_step_size, check_steps_or_auto, check_tolerance
from torch2ebm.inference.solver import ValueSolver
from torch2ebm.inference.step_size import auto_rate, descend
from torch2ebm.inference.value_inference import ValueInference


@dataclass(frozen=True)
class GradientDescent(ValueSolver):
    """``v <- v - lr dF/dv`` for all values at once (Rosenbaum 2022, strict update).

    Args:
        steps: Most inference steps; ``"auto"``: until dF/dv is at most ``tol`` of ``pi e`` in every node and sample.
        lr: Step size; ``"auto"``: from the curvature, measured as training goes on.
        tol: Stop when no entry of dF/dv exceeds it in any node or sample; 0 does all steps. With
            ``steps="auto"`` it is relative, and 0 stands for 0.01.

    Raises:
        ConfigurationError: for an illegal step size, fewer than one step, a negative ``tol``.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.PredictiveCoding(solver=torch2ebm.GradientDescent(steps=100, lr=0.2, tol=1e-4)).solver.steps
        100
    """

    steps: int | str = 20
    lr: float | str = 0.1
    tol: float = 0.0

    remedy: ClassVar[str] = 'Take a smaller step size, lr="auto", or fewer steps.'
    coordinates: ClassVar[str] = "values"

    def __post_init__(self) -> None:
        check_steps_or_auto("GradientDescent", self.steps)
        check_step_size("GradientDescent", self.lr)
        check_tolerance("GradientDescent", self.tol)

    def with_steps(self, steps: int) -> GradientDescent:
        return replace(self, steps=steps)

    def start(self, inference: ValueInference) -> Tensor | None:
        return auto_rate(self, inference)  # descent remembers nothing else

    def step(self, inference: ValueInference, state: Tensor | None) -> Tensor | None:
        # Synchronous, though it moves each slot as it comes: a slot comes after all its children,
        # and after its own error is sent.
        for slot, gradient in inference.sweep():
            descend(inference, slot, gradient, self.lr, state)
        return state
