"""The loss of one call as a function of the predictions of the outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LossExpansion:
    """A loss around some predictions, to second order.

    Attributes:
        value: The loss there, of no dimension.
        gradients: By output slot; a missing one is zero.
        hessian_product: From a direction in these slots (a missing one is zero) to the Hessian's product with it.
    """

    value: Tensor
    gradients: Mapping[str, Tensor]
    hessian_product: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class OutputLoss(ABC):
    """The loss of one call as a function of the predictions of the outputs.

    Attributes:
        delivered: Gradient of the user's scalars with respect to each output slot, as autograd delivered it.
        scale: Factor from dF/dtheta to ``.grad``: the outer factor over lambda B.
        unit: Factor from ``delivered`` to the gradient of the loss summed over samples: B for a mean, 1 for a sum.
        factor: The outer factor alone (accumulation's, a gradient scaler's).
    """

    delivered: Mapping[str, Tensor]
    scale: float
    unit: float
    factor: float

    @abstractmethod
    def gradients(self, predictions: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """lambda times the loss summed over samples, and its gradient in each prediction it depends on."""

    @abstractmethod
    def expanded(self, predictions: Mapping[str, Tensor]) -> LossExpansion:
        """The same with the second derivative."""

    def program_inputs(self) -> tuple[Hashable, list[Tensor]] | None:
        """All that ``gradients`` depends on beside the predictions: what stays the same from call to call, and the
        tensors that do not. None where that is not known.
        """
        return None


class NudgedLoss(OutputLoss):
    """``beta`` times a loss; the scale divides by ``beta`` again (lambda of Millidge et al. 2022)."""

    def __init__(self, loss: OutputLoss, beta: float) -> None:
        self._loss, self._beta = loss, beta
        self.delivered, self.factor = loss.delivered, loss.factor
        self.scale, self.unit = loss.scale / beta, loss.unit * beta

    def gradients(self, predictions: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        value, gradients = self._loss.gradients(predictions)
        return value * self._beta, self._nudged(gradients)

    def expanded(self, predictions: Mapping[str, Tensor]) -> LossExpansion:
        found = self._loss.expanded(predictions)
        return LossExpansion(
            found.value * self._beta,
            self._nudged(found.gradients),
            lambda direction: self._nudged(found.hessian_product(direction)),
        )

    def program_inputs(self) -> tuple[Hashable, list[Tensor]] | None:
        found = self._loss.program_inputs()
        return None if found is None else ((self._beta, found[0]), found[1])

    def _nudged(self, by_slot: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {slot: tensor * self._beta for slot, tensor in by_slot.items()}
