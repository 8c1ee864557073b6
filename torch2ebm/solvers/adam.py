"""Adam on the values: a step size of its own for every entry."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch2ebm.solvers.base import ValueSolver, check_positive, check_steps, check_tolerance
from torch2ebm.solvers.momentum import check_fraction
from torch2ebm.value_inference import ValueInference


@dataclass
class Moments:
    """Running means of a slot's gradient and of its square."""

    first: Tensor
    second: Tensor
    count: int = 0


@dataclass(frozen=True)
class Adam(ValueSolver):
    """Adam (Kingma and Ba 2015) on all values at once.

    A value's moments begin when the first error reaches it. Not ``torch.optim.Adam``, which moves weights.

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
        >>> torch2ebm.PredictiveCoding(solver=torch2ebm.Adam(steps=50, lr=0.01)).solver.lr
        0.01
    """

    steps: int = 20
    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    tol: float = 0.0

    def __post_init__(self) -> None:
        check_steps("Adam", self.steps)
        check_positive("Adam", lr=self.lr, eps=self.eps)
        check_fraction("Adam", **dict(zip(("betas[0]", "betas[1]"), self.betas, strict=True)))
        check_tolerance("Adam", self.tol)

    def with_steps(self, steps: int) -> Adam:
        return replace(self, steps=steps)

    def start(self, inference: ValueInference) -> dict[str, Moments]:
        return {}

    def step(self, inference: ValueInference, state: dict[str, Moments]) -> dict[str, Moments]:
        for slot, gradient in inference.sweep():
            moments = state.get(slot)
            if moments is None:
                moments = state[slot] = Moments(torch.zeros_like(gradient), torch.zeros_like(gradient))
            inference.move(slot, self._direction(moments, gradient), -self.lr)
        return state

    def _direction(self, moments: Moments, gradient: Tensor) -> Tensor:
        first, second = self.betas
        moments.count += 1
        moments.first.lerp_(gradient, 1 - first)
        moments.second.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (moments.second / (1 - second**moments.count)).sqrt_().add_(self.eps)
        return moments.first / (1 - first**moments.count) / root
