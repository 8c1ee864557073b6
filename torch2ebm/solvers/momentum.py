"""Gradient descent on the values with momentum (Polyak's heavy ball)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from torch2ebm.common.checks import check_positive, check_steps, check_tolerance
from torch2ebm.errors import ConfigurationError
from torch2ebm.inference.solver import ValueSolver
from torch2ebm.inference.value_inference import ValueInference


@dataclass(frozen=True)
class Momentum(ValueSolver):
    """``m <- momentum m - lr dF/dv``, ``v <- v + m`` for all values at once (Polyak's heavy ball).

    Args:
        steps: Most inference steps.
        lr: Step size.
        momentum: How much of the last step is made again, from 0 up to but not including 1.
        tol: Stop when no entry of dF/dv exceeds it in any node or sample; 0 does all steps.

    Raises:
        ConfigurationError: for a step size, momentum, number of steps or ``tol`` outside these ranges.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.PredictiveCoding(solver=torch2ebm.Momentum(steps=50, lr=0.1, momentum=0.8)).solver.momentum
        0.8
    """

    steps: int = 20
    lr: float = 0.1
    momentum: float = 0.9
    tol: float = 0.0

    def __post_init__(self) -> None:
        check_steps("Momentum", self.steps)
        check_positive("Momentum", lr=self.lr)
        check_fraction("Momentum", momentum=self.momentum)
        check_tolerance("Momentum", self.tol)

    def with_steps(self, steps: int) -> Momentum:
        return replace(self, steps=steps)

    def start(self, inference: ValueInference) -> dict[str, Tensor]:
        return {}  # a value that no error has reached has no velocity

    def step(self, inference: ValueInference, state: dict[str, Tensor]) -> dict[str, Tensor]:
        for slot, gradient in inference.sweep():
            if slot in state:
                # m <- momentum m - lr dF/dv, then v <- v + m (Polyak 1964); torch.optim.SGD puts lr outside of m
                state[slot].mul_(self.momentum).sub_(gradient, alpha=self.lr)
            else:
                # a new tensor: a gradient may be an error that others still read
                state[slot] = gradient * -self.lr
            inference.move(slot, state[slot], 1.0)
        return state


def check_fraction(where: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not (isinstance(number, (int, float)) and not isinstance(number, bool) and 0 <= number < 1):
            raise ConfigurationError(f"{where}({name}=...)", repr(number), "a number in [0, 1)", "Choose another.")
