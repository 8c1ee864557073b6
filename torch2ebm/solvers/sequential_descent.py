"""Values move one node after another, from the output back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from torch2ebm.solvers.base import ValueSolver, check_positive, check_steps, check_tolerance
from torch2ebm.value_inference import ValueInference


@dataclass(frozen=True)
class SequentialDescent(ValueSolver):
    """``v <- v - lr / (1 + t) dF/dv`` in reverse order, each node seeing the error that its children have left.

    Sequential inference learning (Alonso et al. 2023; algorithms.md D6): a single step carries the error to all
    nodes, so few steps are enough. The energy of a step is that of the errors left behind.

    Args:
        steps: Most inference steps.
        lr: Step size of the first step; step t has ``lr / (1 + t)``, counted from 0.
        tol: Stop when no entry of dF/dv exceeds it in any node or sample; 0 does all steps.

    Raises:
        ConfigurationError: for a step size that is not positive and finite, fewer than one step, a negative ``tol``.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.PredictiveCoding(solver=torch2ebm.SequentialDescent(steps=3, lr=0.5)).solver.steps
        3
    """

    steps: int = 3
    lr: float = 0.1
    tol: float = 0.0

    def __post_init__(self) -> None:
        check_steps("SequentialDescent", self.steps)
        check_positive("SequentialDescent", lr=self.lr)
        check_tolerance("SequentialDescent", self.tol)

    def with_steps(self, steps: int) -> SequentialDescent:
        return replace(self, steps=steps)

    def start(self, inference: ValueInference) -> int:
        return 0

    def step(self, inference: ValueInference, state: int) -> int:
        rate = -self.lr / (1 + state)

        def move(slot: str, gradient: Tensor) -> None:
            inference.move(slot, gradient, rate)

        inference.sequential_sweep(move)
        return state + 1
