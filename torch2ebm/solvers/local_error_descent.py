"""Errors relax by messages from their own children only."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from torch2ebm.common.checks import check_step_size, check_steps_or_auto, check_tolerance
from torch2ebm.inference.error_inference import ErrorInference
from torch2ebm.inference.solver import ErrorSolver
from torch2ebm.inference.steepness import Stability
from torch2ebm.inference.step_size import auto_rate, descend


@dataclass(frozen=True)
class LocalErrorDescent(ErrorSolver):
    """``e_n <- e_n + lr (sum_c J_c^T pi_c e_c - pi_n e_n)``, a value being its prediction plus its error.

    The fixed points are those of descent on the values, and float32 keeps small errors (Goemaere et al. 2025). But the
    update is no gradient of F: it can diverge at a true minimum, for every step size. It is safe for small nudges;
    elsewhere :class:`ErrorDescent` is the same idea with the exact gradient.

    Args:
        steps: Most inference steps; ``"auto"``: until dF/de is at most ``tol`` of ``pi e`` in every node and sample.
        lr: Step size; ``"auto"``: from the curvature, measured as training goes on.
        tol: Stop when no entry of the update's bracket exceeds it in any node or sample; 0 does all steps. With
            ``steps="auto"`` it is relative, and 0 stands for 0.01.

    Raises:
        ConfigurationError: for an illegal step size, fewer than one step, a negative ``tol``.

    Example:
        >>> import torch2ebm
        >>> nudging = torch2ebm.OneSided(beta=1e-4)
        >>> torch2ebm.PredictiveCoding(solver=torch2ebm.LocalErrorDescent(steps=50), nudging=nudging).nudging
        OneSided(beta=0.0001)
    """

    steps: int | str = 20
    lr: float | str = 0.5
    tol: float = 0.0

    coordinates: ClassVar[str] = "local errors"
    descends: ClassVar[bool] = False
    remedy: ClassVar[str] = "This update is no descent and can diverge for every lr: use ErrorDescent."

    def __post_init__(self) -> None:
        check_steps_or_auto("LocalErrorDescent", self.steps)
        check_step_size("LocalErrorDescent", self.lr)
        check_tolerance("LocalErrorDescent", self.tol)

    def with_steps(self, steps: int) -> LocalErrorDescent:
        return replace(self, steps=steps)

    def largest_step(self, stability: Stability) -> float:
        # A change of an error comes back through the loss, over k levels filtered k + 1 times by
        # lr / (z - 1 + lr pi). Where lr pi <= 1 a filter never amplifies, |z| >= 1, so a loop gain r < 1 is stable.
        return 1 / stability.steepest if stability.r < 1 else math.nan

    def good_step(self, stability: Stability) -> float:
        return 1 / (stability.steepest * (1 + stability.r))

    def start(self, inference: ErrorInference) -> Tensor | None:
        return auto_rate(self, inference)  # descent remembers nothing else

    def step(self, inference: ErrorInference, state: Tensor | None) -> Tensor | None:
        # e += lr (sum_c J_c^T pi_c e_c - pi_n e_n): J^T of the errors, where the exact gradient has J^T of the d_c
        for slot, gradient in inference.local_sweep():
            descend(inference, slot, gradient, self.lr, state)
        return state
