"""The loss of one call as a function of the predictions of the outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LossExpansion:
    """A loss around some predictions, to second order.

    Attributes:
        value: The loss there, of no dimension.
        gradients: By output slot; a missing one is zero.
        hessian_product: From a direction in these slots (a missing one is zero) to the Hessian's product with it.

    Example:
        >>> import torch
        >>> from torch2ebm.extend import call_and_loss
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
        >>> (output,) = call.graph.output_slots
        >>> around = loss.expanded({output: torch.ones(5, 3)})
        >>> around.hessian_product({output: torch.ones(5, 3)})[output].unique()  # of the sum: 5 * 2 / 15
        tensor([0.6667])
    """

    value: Tensor
    gradients: Mapping[str, Tensor]
    hessian_product: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class OutputLoss(ABC):
    """The loss of one call as a function of the predictions of the outputs.

    B is the batch size, and lambda what a nudging multiplies the loss by, else 1. The energy of predictive coding takes
    lambda times the loss summed over samples: B times a mean, or the loss as it is written under
    ``loss_reduction="sum"``.

    Attributes:
        delivered: Gradient of the user's loss with respect to each output slot, as autograd delivered it.
        scale: Factor from dF/dtheta to ``.grad``: ``factor`` over lambda B.
        unit: Factor from ``delivered`` to the gradient of the loss summed over samples: B for a mean, 1 for a sum.
        factor: What stands before the loss and is no part of it: a gradient scaler's, an accumulation's.

    Example:
        The examples of the methods go on from this one.

        >>> import torch
        >>> from torch2ebm.extend import NudgedLoss, call_and_loss
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
        >>> loss.unit, loss.scale, loss.factor
        (5.0, 0.2, 1.0)
        >>> (output,) = call.graph.output_slots
        >>> predictions = {output: torch.ones(5, 3)}
    """

    delivered: Mapping[str, Tensor]
    scale: float
    unit: float
    factor: float

    @abstractmethod
    def gradients(self, predictions: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """lambda times the loss summed over samples, and its gradient in each prediction it depends on.

        Args:
            predictions: One for each output slot, in its shape.

        Returns:
            The loss, of no dimension, and its gradient by output slot, in the shape of the prediction. A slot that it
            does not depend on is missing.

        Example:
            >>> value, gradients = loss.gradients(predictions)
            >>> value, gradients[output].shape
            (tensor(5.), torch.Size([5, 3]))
        """

    @abstractmethod
    def expanded(self, predictions: Mapping[str, Tensor]) -> LossExpansion:
        """The same with the second derivative.

        Args:
            predictions: One for each output slot, in its shape.

        Returns:
            Value, gradients and products with the Hessian there.

        Example:
            >>> loss.expanded(predictions).value
            tensor(5.)
        """

    def program_inputs(self) -> tuple[Hashable, list[Tensor]] | None:
        """All that ``gradients`` depends on beside the predictions, for ``compile=True``.

        Returns:
            What stays the same from call to call, and the tensors that do not. None, the default, where that is not
            known: steps with such a loss are not recorded.

        Example:
            >>> loss.program_inputs() is None
            False
        """
        return None


class NudgedLoss(OutputLoss):
    """``beta`` times a loss; the scale divides by ``beta`` again (lambda of Millidge et al. 2022).

    Args:
        loss: The loss of the call.
        beta: Its factor in the energy, of either sign.

    Example:
        >>> import torch
        >>> from torch2ebm.extend import NudgedLoss, call_and_loss
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
        >>> nudged = NudgedLoss(loss, beta=0.1)
        >>> round(nudged.unit, 9), round(nudged.scale, 9)
        (0.5, 2.0)
    """

    def __init__(self, loss: OutputLoss, beta: float) -> None:
        self._loss = loss
        self._beta = torch.tensor(beta, dtype=torch.float64)  # an input of programs: it may follow the curvature
        self.delivered, self.factor = loss.delivered, loss.factor
        self.scale, self.unit = loss.scale / beta, loss.unit * beta

    def gradients(self, predictions: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        value, gradients = self._loss.gradients(predictions)
        return (value * self._beta).to(value.dtype), self._nudged(gradients)

    def expanded(self, predictions: Mapping[str, Tensor]) -> LossExpansion:
        found = self._loss.expanded(predictions)
        return LossExpansion(
            (found.value * self._beta).to(found.value.dtype),
            self._nudged(found.gradients),
            lambda direction: self._nudged(found.hessian_product(direction)),
        )

    def program_inputs(self) -> tuple[Hashable, list[Tensor]] | None:
        found = self._loss.program_inputs()
        return None if found is None else (("nudged", found[0]), [*found[1], self._beta])

    def _nudged(self, by_slot: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {slot: (tensor * self._beta).to(tensor.dtype) for slot, tensor in by_slot.items()}
