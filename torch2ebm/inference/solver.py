"""What every solver is, and the one loop that drives them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

from torch2ebm.engine.call import Call
from torch2ebm.engine.energies import Energy
from torch2ebm.inference.base import Inference
from torch2ebm.inference.error_inference import ErrorInference
from torch2ebm.inference.value_inference import ValueInference
from torch2ebm.loss.output_loss import OutputLoss

REMEDY = "Take a smaller step size (lr), or fewer steps."
Form = TypeVar("Form", bound=Inference)


class Solver(ABC, Generic[Form]):
    """How values relax: :meth:`start`, then :meth:`step` until ``steps`` are done or the residual is at most ``tol``.

    Attributes:
        steps: Most inference steps to do.
        tol: Stop once no entry of the driving term (dF/dv, dF/de) exceeds it in any node or sample; 0 never stops.
        remedy: What to try where it diverges.
    """

    steps: int
    tol: float
    remedy: ClassVar[str] = REMEDY

    @abstractmethod
    def inference(self, call: Call, loss: OutputLoss, energies: Mapping[str, Energy], retain_call: bool) -> Form:
        """What this solver moves: values, or errors."""

    @abstractmethod
    def with_steps(self, steps: int) -> Solver[Form]:
        """The same solver with another number of steps."""

    @abstractmethod
    def start(self, inference: Form) -> Any:
        """The solver's own state for one relaxation."""

    @abstractmethod
    def step(self, inference: Form, state: Any) -> Any:
        """Move once; returns the next state."""


class ValueSolver(Solver[ValueInference]):
    """A solver that moves values."""

    def inference(
        self, call: Call, loss: OutputLoss, energies: Mapping[str, Energy], retain_call: bool
    ) -> ValueInference:
        return ValueInference(call, loss, energies, retain_call)


class ErrorSolver(Solver[ErrorInference]):
    """A solver that moves errors: a value is its prediction plus its error."""

    def inference(
        self, call: Call, loss: OutputLoss, energies: Mapping[str, Energy], retain_call: bool
    ) -> ErrorInference:
        return ErrorInference(call, loss, energies, retain_call)
