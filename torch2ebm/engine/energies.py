"""Energies of a node, one small class each: how far its value is from its prediction."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch2ebm.common.setting_names import NamedSettings
from torch2ebm.errors import ConfigurationError


def gaussian_energy(error: Tensor) -> Tensor:
    """Half the squared error of each sample, shape ``[batch]`` (Millidge et al. 2022)."""
    return 0.5 * error.square().flatten(1).sum(1) if error.ndim > 1 else 0.5 * error.square()


def gaussian_energy_of_batch(error: Tensor) -> Tensor:
    """Half the squared error summed over samples, shape ``[]``, in one pass over the data."""
    flat = error.reshape(-1)
    return 0.5 * flat.dot(flat)


class Energy(NamedSettings, ABC):
    """phi(value, prediction) of one node: zero, and smallest, where the value is the prediction.

    All three methods take the error (value minus prediction) beside the prediction: near the prediction a difference of
    values would lose it to rounding (Goemaere et al. 2025). Both have the shape of the node's value, for example
    ``[batch, features]``. Write a subclass as a frozen dataclass: ``compile=True`` compares its settings.

    Example:
        Half the squared error, written out. The examples of the methods go on from it.

        >>> import torch
        >>> from torch2ebm.extend import Energy
        >>> class HalfSquares(Energy):
        ...     def of_samples(self, error, prediction):
        ...         return (0.5 * error**2).flatten(1).sum(1)
        ...     def of_batch(self, error, prediction):
        ...         return self.of_samples(error, prediction).sum()
        ...     def gradients(self, error, prediction):
        ...         return error, error
        >>> energy = HalfSquares()
        >>> error, prediction = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.zeros(2, 2)
    """

    @abstractmethod
    def of_samples(self, error: Tensor, prediction: Tensor) -> Tensor:
        """Energy of each sample: what ``model.state.energy`` shows.

        Args:
            error: Value minus prediction, shape ``[batch, ...]``.
            prediction: In the same shape.

        Returns:
            Shape ``[batch]``.

        Example:
            >>> energy.of_samples(error, prediction)
            tensor([2.5000, 4.5000])
        """

    @abstractmethod
    def of_batch(self, error: Tensor, prediction: Tensor) -> Tensor:
        """Energy summed over samples: what a relaxation's history shows, in every step.

        Args:
            error: Value minus prediction, of any shape.
            prediction: In the same shape.

        Returns:
            A tensor of no dimension.

        Example:
            >>> energy.of_batch(error, prediction)
            tensor(7.)
        """

    @abstractmethod
    def gradients(self, error: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """dphi/dvalue and -dphi/dprediction, of the energy summed over samples: what moves the values.

        ``EnergyOptimizer`` checks them against :meth:`of_batch` once, by differences at random values, and raises
        :class:`EnergyGradientError` where they do not agree. Nothing checks them while training. A test by
        ``torch.autograd.grad`` does: with the prediction at hand, ``error`` is ``value - prediction``.

        Args:
            error: Value minus prediction, of any shape.
            prediction: In the same shape.

        Returns:
            Both in the shape of the value. For a function of the error alone they are one and the same; return the same
            tensor twice then.

        Example:
            >>> own, back = energy.gradients(error, prediction)
            >>> value, mu = error.clone().requires_grad_(), prediction.clone().requires_grad_()
            >>> of_value, of_mu = torch.autograd.grad(energy.of_batch(value - mu, mu), [value, mu])
            >>> torch.allclose(own, of_value), torch.allclose(back, -of_mu)
            (True, True)
        """


@dataclass(frozen=True, eq=False)
class Gaussian(Energy):
    """``precision / 2 * |value - prediction|^2``: what a node has unless another energy is given.

    Args:
        precision: Inverse variance pi, a number or a tensor that broadcasts against the node's value.

    Raises:
        ConfigurationError: for a precision that is not positive and finite everywhere.

    Example:
        >>> import torch, torch2ebm
        >>> torch2ebm.Gaussian(precision=4.0).of_samples(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
        tensor([10.])
    """

    precision: float | Tensor = 1.0

    def __post_init__(self) -> None:
        check_precision("Gaussian(precision=...)", self.precision)

    def of_samples(self, error: Tensor, prediction: Tensor) -> Tensor:
        return gaussian_energy(error * self._root(error))

    def of_batch(self, error: Tensor, prediction: Tensor) -> Tensor:
        return gaussian_energy_of_batch(error * self._root(error))

    def gradients(self, error: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        weighted = error * self._like(error)
        return weighted, weighted

    def _like(self, error: Tensor) -> Any:
        return self.precision.to(error) if isinstance(self.precision, Tensor) else self.precision

    def _root(self, error: Tensor) -> Any:
        return self._like(error) ** 0.5


@dataclass(frozen=True)
class Categorical(Energy):
    """KL(softmax(value) || softmax(prediction)): for a node whose prediction are logits.

    Predictive coding beyond Gaussian distributions (Pinchetti et al. 2022). A shift of all logits costs nothing.

    Args:
        dim: The dimension of the classes; all others but the batch are summed over.

    Example:
        >>> import torch, torch2ebm
        >>> torch2ebm.Categorical().of_samples(torch.ones(1, 3), torch.tensor([[0.0, 1.0, 2.0]]))
        tensor([0.])
    """

    dim: int = -1

    def of_samples(self, error: Tensor, prediction: Tensor) -> Tensor:
        divergence = self._divergence(error, prediction)
        return divergence.flatten(1).sum(1) if divergence.ndim > 1 else divergence

    def of_batch(self, error: Tensor, prediction: Tensor) -> Tensor:
        return self._divergence(error, prediction).sum()

    def gradients(self, error: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        probability, ratio = self._probability(error, prediction)
        divergence = (probability * ratio).sum(self.dim, keepdim=True)
        return probability * (ratio - divergence), probability * -torch.expm1(-ratio)  # p - q without cancellation

    def _probability(self, error: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """p of the value, and log p - log q, q being that of the prediction."""
        of_prediction = torch.log_softmax(prediction, self.dim)
        # log p - log q = error - log sum q exp(error); from the error, since the value may equal the prediction
        ratio = error - torch.logsumexp(of_prediction + error, self.dim, keepdim=True)
        return (of_prediction + ratio).exp(), ratio

    def _divergence(self, error: Tensor, prediction: Tensor) -> Tensor:
        probability, ratio = self._probability(error, prediction)
        return (probability * ratio).sum(self.dim)


def precision_of(energy: Energy | None) -> float | Tensor:
    """The precision of a Gaussian, and 1 for every other energy, whose curvature is no constant."""
    return energy.precision if isinstance(energy, Gaussian) else 1.0


def check_precision(where: str, precision: object) -> None:
    if isinstance(precision, Tensor):
        legal = bool((torch.isfinite(precision) & (precision > 0)).all())
    else:
        number = isinstance(precision, (int, float)) and not isinstance(precision, bool)
        legal = number and math.isfinite(precision) and precision > 0  # type: ignore[operator,arg-type]
    if not legal:
        raise ConfigurationError(
            where, repr(precision), "a finite number above 0, or a tensor of them", "Choose another."
        )
