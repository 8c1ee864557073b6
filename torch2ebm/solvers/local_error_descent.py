"""Errors relax by messages from their own children only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch2ebm.common.checks import check_positive, check_steps, check_tolerance
from torch2ebm.inference.error_inference import ErrorInference
from torch2ebm.inference.solver import ErrorSolver


@dataclass(frozen=True)
class LocalErrorDescent(ErrorSolver):
    """``e_n <- e_n + lr (sum_c J_c^T pi_c e_c - pi_n e_n)``, a value being its prediction plus its error.

    The fixed points are those of descent on the values, and float32 keeps small errors (Goemaere et al. 2025). But the
    update is no gradient of F: it can diverge at a true minimum, for every step size. It is safe for small nudges;
    elsewhere :class:`ErrorDescent` is the same idea with the exact gradient.

    Args:
        steps: Most inference steps.
        lr: Step size.
        tol: Stop when no entry of the update's bracket exceeds it in any node or sample; 0 does all steps.

    Raises:
        ConfigurationError: for a step size that is not positive and finite, fewer than one step, a negative ``tol``.

    Example:
        >>> import torch2ebm
        >>> nudging = torch2ebm.OneSided(beta=1e-4)
        >>> torch2ebm.PredictiveCoding(solver=torch2ebm.LocalErrorDescent(steps=50), nudging=nudging).nudging
        OneSided(beta=0.0001)
    """

    steps: int = 20
    lr: float = 0.5
    tol: float = 0.0

    remedy: ClassVar[str] = "This update is no descent and can diverge for every lr: use ErrorDescent."

    def __post_init__(self) -> None:
        check_steps("LocalErrorDescent", self.steps)
        check_positive("LocalErrorDescent", lr=self.lr)
        check_tolerance("LocalErrorDescent", self.tol)

    def with_steps(self, steps: int) -> LocalErrorDescent:
        return replace(self, steps=steps)

    def start(self, inference: ErrorInference) -> None:
        return None

    def step(self, inference: ErrorInference, state: None) -> None:
        # e += lr (sum_c J_c^T pi_c e_c - pi_n e_n): J^T of the errors, where the exact gradient has J^T of the d_c
        for slot, gradient in inference.local_sweep():
            inference.move(slot, gradient, -self.lr)
