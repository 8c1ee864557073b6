"""Gradient descent on the values with momentum (Polyak's heavy ball)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from torch2ebm.common.checks import check_step_size, check_steps_or_auto, check_tolerance
from torch2ebm.errors import ConfigurationError
from torch2ebm.inference.solver import ValueSolver
from torch2ebm.inference.steepness import Stability
from torch2ebm.inference.step_size import auto_rate
from torch2ebm.inference.value_inference import ValueInference


@dataclass
class Velocity:
    """The step size, where it is measured, and m of each slot; a value that no error has reached has none."""

    rate: Tensor | None
    of_slots: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Momentum(ValueSolver):
    """``m <- momentum m - lr dF/dv``, ``v <- v + m`` for all values at once (Polyak's heavy ball).

    Args:
        steps: Most inference steps; ``"auto"``: until dF/dv is at most ``tol`` of ``pi e`` in every node and sample.
        lr: Step size; ``"auto"``: from the curvature, measured as training goes on.
        momentum: How much of the last step is made again, from 0 up to but not including 1.
        tol: Stop when no entry of dF/dv exceeds it in any node or sample; 0 does all steps. With
            ``steps="auto"`` it is relative, and 0 stands for 0.01.

    Raises:
        ConfigurationError: for a step size, momentum, number of steps or ``tol`` outside these ranges.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.PredictiveCoding(solver=torch2ebm.Momentum(steps=50, lr=0.1, momentum=0.8)).solver.momentum
        0.8
    """

    steps: int | str = 20
    lr: float | str = 0.1
    momentum: float = 0.9
    tol: float = 0.0

    remedy: ClassVar[str] = 'Take a smaller step size, lr="auto", or fewer steps.'
    coordinates: ClassVar[str] = "values"
    descends: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_steps_or_auto("Momentum", self.steps)
        check_step_size("Momentum", self.lr)
        check_fraction("Momentum", momentum=self.momentum)
        check_tolerance("Momentum", self.tol)

    def with_steps(self, steps: int) -> Momentum:
        return replace(self, steps=steps)

    def largest_step(self, stability: Stability) -> float:
        return 2 * (1 + self.momentum) / stability.steepest  # Polyak 1964

    def start(self, inference: ValueInference) -> Velocity:
        return Velocity(auto_rate(self, inference))

    def step(self, inference: ValueInference, state: Velocity) -> Velocity:
        of_slots = state.of_slots
        for slot, gradient in inference.sweep():
            if slot not in of_slots:
                # a new tensor: a gradient may be an error that others still read
                of_slots[slot] = gradient * (-float(self.lr) if state.rate is None else -state.rate)
            # m <- momentum m - lr dF/dv, then v <- v + m (Polyak 1964); torch.optim.SGD puts lr outside of m
            elif state.rate is None:
                of_slots[slot].mul_(self.momentum).sub_(gradient, alpha=float(self.lr))
            else:
                of_slots[slot].mul_(self.momentum).sub_(gradient * state.rate)
            inference.move(slot, of_slots[slot], 1.0)
        return state


def check_fraction(where: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not (isinstance(number, (int, float)) and not isinstance(number, bool) and 0 <= number < 1):
            raise ConfigurationError(f"{where}({name}=...)", repr(number), "a number in [0, 1)", "Choose another.")
