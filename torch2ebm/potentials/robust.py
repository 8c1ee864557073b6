"""Energies that a large error costs less than its square: functions of the error alone, summed over its entries."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torch2ebm.common.checks import check_positive
from torch2ebm.engine.energies import Energy


class _OfErrors(Energy):
    """Each entry of the error on its own."""

    entrywise = True

    def of_samples(self, error: Tensor, prediction: Tensor) -> Tensor:
        each = self._each(error)
        return each.flatten(1).sum(1) if each.ndim > 1 else each

    def of_batch(self, error: Tensor, prediction: Tensor) -> Tensor:
        return self._each(error).sum()

    def gradients(self, error: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        slope = self._slope(error)
        return slope, slope

    @abstractmethod
    def _each(self, error: Tensor) -> Tensor: ...

    @abstractmethod
    def _slope(self, error: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Laplace(_OfErrors):
    """``|value - prediction| / scale``: few errors are other than zero.

    The derivative jumps at zero; it is 0 there. A value whose messages are weaker than ``1 / scale`` rests on the jump.
    A solver comes near, and no nearer: such samples count in ``relaxation.on_kinks``, and the gradients of the node's
    weights are not those of the equilibrium (``NotSettledWarning``). ``Huber(delta, 1 / (scale * delta))`` is the same
    with the jump rounded off: take it for a free node that learns.

    Args:
        scale: Mean absolute error b of the Laplace distribution.

    Raises:
        ConfigurationError: for a scale that is not positive and finite.

    Example:
        >>> import torch, torch2ebm
        >>> torch2ebm.Laplace(scale=2.0).of_samples(torch.tensor([[1.0, -3.0]]), torch.zeros(1, 2))
        tensor([2.])
    """

    scale: float = 1.0

    has_kinks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("Laplace", scale=self.scale)

    def _each(self, error: Tensor) -> Tensor:
        return error.abs() / self.scale

    def _slope(self, error: Tensor) -> Tensor:
        return error.sign() / self.scale


@dataclass(frozen=True)
class Huber(_OfErrors):
    """``precision / 2 * error^2`` up to an error of ``delta``, and a straight line beyond (Huber 1964).

    Args:
        delta: Largest absolute error that is squared.
        precision: Inverse variance there.

    Raises:
        ConfigurationError: for a setting that is not positive and finite.

    Example:
        >>> import torch, torch2ebm
        >>> torch2ebm.Huber(delta=1.0).of_samples(torch.tensor([[1.0, -3.0]]), torch.zeros(1, 2))
        tensor([3.])
    """

    delta: float = 1.0
    precision: float = 1.0

    def __post_init__(self) -> None:
        check_positive("Huber", delta=self.delta, precision=self.precision)

    def precision_at_rest(self) -> float:
        return self.precision

    def _each(self, error: Tensor) -> Tensor:
        inside = error.clamp(-self.delta, self.delta)
        return self.precision * inside * (error - 0.5 * inside)

    def _slope(self, error: Tensor) -> Tensor:
        return self.precision * error.clamp(-self.delta, self.delta)


@dataclass(frozen=True)
class StudentT(_OfErrors):
    """``(degrees + 1) / 2 * log(1 + (error / scale)^2 / degrees)``: an outlier pulls the less, the farther it is.

    It is not convex beyond an error of ``scale * sqrt(degrees)``: a strong nudge may then have several equilibria.

    Args:
        degrees: Degrees of freedom.
        scale: Of the error.

    Raises:
        ConfigurationError: for a setting that is not positive and finite.

    Example:
        >>> import torch, torch2ebm
        >>> torch2ebm.StudentT(degrees=1.0).of_samples(torch.tensor([[1.0]]), torch.zeros(1, 1))
        tensor([0.6931])
    """

    degrees: float = 3.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive("StudentT", degrees=self.degrees, scale=self.scale)

    def precision_at_rest(self) -> float:
        return (self.degrees + 1) / (self.degrees * self.scale**2)

    def _each(self, error: Tensor) -> Tensor:
        ratio = error / (self.scale * math.sqrt(self.degrees))
        size = ratio.abs().clamp_min(1.0)  # where the square of a large one would overflow
        far = torch.log(size) + 0.5 * torch.log1p(size.reciprocal().square())
        near = 0.5 * torch.log1p(ratio.clamp(-1, 1).square())
        return (self.degrees + 1) * torch.where(ratio.abs() > 1, far, near)

    def _slope(self, error: Tensor) -> Tensor:
        width = self.scale * math.sqrt(self.degrees)
        ratio = error / width
        size = ratio.abs().clamp_min(1.0)
        # r / (1 + r^2), as 1 / (r + 1 / r) where r is large
        return (
            (self.degrees + 1)
            / width
            * torch.where(
                ratio.abs() > 1, ratio.sign() / (size + size.reciprocal()), ratio / (1 + ratio.clamp(-1, 1).square())
            )
        )


@dataclass(frozen=True)
class VonMises(_OfErrors):
    """``concentration * (1 - cos(error))``: for angles in radians, which are the same after a whole turn.

    It is the negative log-likelihood of the distribution of von Mises (1918). Near zero it is half the squared error
    times the concentration. It is not convex beyond a quarter of a turn.

    Args:
        concentration: Inverse variance of small errors.

    Raises:
        ConfigurationError: for a concentration that is not positive and finite.

    Example:
        >>> import math, torch, torch2ebm
        >>> torch2ebm.VonMises().of_samples(torch.tensor([[math.pi / 2], [math.pi]]), torch.zeros(2, 1))
        tensor([1.0000, 2.0000])
    """

    concentration: float = 1.0

    def __post_init__(self) -> None:
        check_positive("VonMises", concentration=self.concentration)

    def precision_at_rest(self) -> float:
        return self.concentration

    def _each(self, error: Tensor) -> Tensor:
        return 2 * self.concentration * torch.sin(error / 2).square()  # 1 - cos(e) without cancellation

    def _slope(self, error: Tensor) -> Tensor:
        return self.concentration * torch.sin(error)
