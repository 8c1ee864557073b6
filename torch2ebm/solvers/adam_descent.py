"""Adam on the values: a step size of its own for every entry."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torch2ebm.common.checks import check_positive, check_steps, check_tolerance
from torch2ebm.inference.solver import ValueSolver
from torch2ebm.inference.value_inference import ValueInference
from torch2ebm.solvers.momentum import check_fraction


@dataclass
class Moments:
    """Running means of the gradient and its square, for each slot; missing ones are zero."""

    steps: int = 0  # t, of all slots: a value reached late is corrected as if its gradients so far were zeros
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class AdamDescent(ValueSolver):
    """Adam (Kingma and Ba 2015) on all values at once.

    The same numbers as ``torch.optim.Adam`` on the values, which is the optimizer of weights.

    Args:
        steps: Most inference steps.
        lr: Step size.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the root of the second mean.
        tol: Stop when no entry of dF/dv exceeds it in any node or sample; 0 does all steps.

    Raises:
        ConfigurationError: for a step size, decay, number of steps or ``tol`` outside their ranges.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.PredictiveCoding(solver=torch2ebm.AdamDescent(steps=50, lr=0.01)).solver.lr
        0.01
    """

    steps: int = 20
    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    tol: float = 0.0

    def __post_init__(self) -> None:
        check_steps("AdamDescent", self.steps)
        check_positive("AdamDescent", lr=self.lr, eps=self.eps)
        check_fraction("AdamDescent", **dict(zip(("betas[0]", "betas[1]"), self.betas, strict=True)))
        check_tolerance("AdamDescent", self.tol)

    def with_steps(self, steps: int) -> AdamDescent:
        return replace(self, steps=steps)

    def start(self, inference: ValueInference) -> Moments:
        return Moments()

    def step(self, inference: ValueInference, state: Moments) -> Moments:
        state.steps += 1
        for slot, gradient in inference.sweep():
            inference.move(slot, self._direction(state, slot, gradient), -self.lr)
        return state

    def _direction(self, state: Moments, slot: str, gradient: Tensor) -> Tensor:
        first_decay, second_decay = self.betas
        # m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2 (Kingma and Ba 2015, algorithm 1)
        first = state.first.setdefault(slot, torch.zeros_like(gradient)).lerp_(gradient, 1 - first_decay)
        second = state.second.setdefault(slot, torch.zeros_like(gradient)).mul_(second_decay)
        second.addcmul_(gradient, gradient, value=1 - second_decay)
        # eps outside of the root, after the correction, as torch.optim.Adam has it
        root = (second / (1 - second_decay**state.steps)).sqrt_().add_(self.eps)
        # m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
        return first / (1 - first_decay**state.steps) / root
