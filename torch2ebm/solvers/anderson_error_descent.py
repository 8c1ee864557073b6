"""Error descent with Anderson acceleration: the last steps predict where the gradient is smallest."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torch2ebm.common.checks import check_positive, check_steps, check_tolerance
from torch2ebm.common.rows import Rows, least_squares
from torch2ebm.inference.error_inference import ErrorInference
from torch2ebm.inference.solver import ErrorSolver, Rest
from torch2ebm.isolation.torch_modes import in_own_precision
from torch2ebm.solvers.saddles import SaddleCheck


@dataclass
class AndersonHistory:
    """The last errors and gradients, all slots of a sample in one row; the newest last."""

    errors: list[Tensor] = field(default_factory=list)  # [batch, entries]
    gradients: list[Tensor] = field(default_factory=list)  # [batch, entries]


@dataclass(frozen=True)
class AndersonErrorDescent(ErrorSolver):
    """Anderson acceleration of error descent (Anderson 1965; Walker and Ni 2011), each sample on its own.

    The next errors are a step from that affine combination of the last ``memory`` iterates whose gradient is
    smallest. Where values have no batch dimension the batch is one sample. The gradient is zero in a saddle too: the
    first relaxation is looked at, later ones more and more seldom, and a ``NotAMinimumWarning`` tells of one.

    Args:
        steps: Most inference steps.
        lr: Step size from the combined iterate.
        memory: How many iterates are combined.
        tol: Stop when no entry of dF/de exceeds it in any node or sample; 0 does all steps.

    Raises:
        ConfigurationError: for an illegal step size, number of steps, ``memory`` or ``tol``.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.PredictiveCoding(solver=torch2ebm.AndersonErrorDescent(steps=10)).solver.memory
        5
    """

    steps: int = 10
    lr: float = 0.3
    memory: int = 5
    tol: float = 0.0

    one_step_is_backprop = True

    def __post_init__(self) -> None:
        check_steps("AndersonErrorDescent", self.steps)
        check_positive("AndersonErrorDescent", lr=self.lr, memory=self.memory)
        check_tolerance("AndersonErrorDescent", self.tol)

    def with_steps(self, steps: int) -> AndersonErrorDescent:
        return replace(self, steps=steps)

    def start(self, inference: ErrorInference) -> AndersonHistory:
        return AndersonHistory()

    def rest(self, inference: ErrorInference, state: AndersonHistory) -> Rest:
        found = super().rest(inference, state)
        # without a tolerance only the last step is asked
        ends = found.reached or not self.tol
        return replace(found, at_minimum=SaddleCheck.of(inference).look(inference, self) if ends else None)

    def step(self, inference: ErrorInference, state: AndersonHistory) -> AndersonHistory:
        # the whole sweep first: weights of a sample need the gradients of all its slots
        found = dict(inference.total_sweep())
        rows = Rows(inference.values, tuple(inference.values), inference.call.batch_size)
        state.errors.append(rows.pack(inference.errors))
        state.gradients.append(rows.pack(found))
        # `memory` differences to the newest need one iterate more
        del state.errors[: -self.memory - 1], state.gradients[: -self.memory - 1]
        # into the errors at once, without `move`: slots are one vector here
        rows.unpack(self._next(state), inference.errors)
        return state

    def _next(self, state: AndersonHistory) -> Tensor:
        error, gradient = state.errors[-1], state.gradients[-1]
        if len(state.errors) == 1:
            return error - self.lr * gradient  # no difference yet: plain descent
        steps = torch.stack([error - past for past in state.errors[:-1]], 2)  # [batch, entries, memory]
        changes = torch.stack([gradient - past for past in state.gradients[:-1]], 2)
        # w = argmin |g_k - dG w|,  e <- (e_k - dE w) - lr (g_k - dG w) (Walker and Ni 2011)
        with in_own_precision(gradient):
            weights = least_squares(changes, gradient)  # [batch, memory, 1]
            return (error - (steps @ weights).squeeze(2)) - self.lr * (gradient - (changes @ weights).squeeze(2))
