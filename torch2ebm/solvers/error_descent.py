"""Gradient descent on the errors: one reverse sweep moves every level."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from torch2ebm.common.checks import check_step_size, check_steps_or_auto, check_tolerance
from torch2ebm.inference.error_inference import ErrorInference
from torch2ebm.inference.solver import ErrorSolver
from torch2ebm.inference.step_size import auto_rate, descend


@dataclass(frozen=True)
class ErrorDescent(ErrorSolver):
    """``e <- e - lr dF/de``, a value being its prediction plus its error (Goemaere et al. 2025).

    It has the minima of descent on the values, and the same energy. In these coordinates a deep network is far better
    conditioned: on a 20-layer tanh chain 10 steps do what 551 do on the values. Errors are stored, so float32 keeps
    them where the nudge is small.

    Args:
        steps: Most inference steps; ``"auto"``: until dF/de is at most ``tol`` of ``pi e`` in every node and sample.
        lr: Step size; ``"auto"``: from the curvature, measured as training goes on.
        tol: Stop when no entry of dF/de exceeds it in any node or sample; 0 does all steps. With
            ``steps="auto"`` it is relative, and 0 stands for 0.01.

    Raises:
        ConfigurationError: for an illegal step size, fewer than one step, a negative ``tol``.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent(steps=5, lr=0.5)).solver
        ErrorDescent(steps=5, lr=0.5, tol=0.0)
    """

    steps: int | str = 10
    lr: float | str = 0.3
    tol: float = 0.0

    one_step_is_backprop = True
    remedy: ClassVar[str] = 'Take a smaller step size, lr="auto", or fewer steps.'
    coordinates: ClassVar[str] = "errors"

    def __post_init__(self) -> None:
        check_steps_or_auto("ErrorDescent", self.steps)
        check_step_size("ErrorDescent", self.lr)
        check_tolerance("ErrorDescent", self.tol)

    def with_steps(self, steps: int) -> ErrorDescent:
        return replace(self, steps=steps)

    def start(self, inference: ErrorInference) -> Tensor | None:
        return auto_rate(self, inference)  # descent remembers nothing else

    def step(self, inference: ErrorInference, state: Tensor | None) -> Tensor | None:
        # dF/de_n = pi_n e_n - d_n, d_n = sum_c J_c^T d_c (Goemaere et al. 2025); safe to move while the sweep goes on
        for slot, gradient in inference.total_sweep():
            descend(inference, slot, gradient, self.lr, state)
        return state
