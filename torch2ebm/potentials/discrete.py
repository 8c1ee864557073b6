"""Energies of nodes whose prediction is the parameter of a distribution over events or counts.

With ``A`` the logarithm of its normaliser, both have two forms. A free node's value is a parameter as its prediction
is, and the energy is the divergence between the two distributions, ``A(mu) - A(v) + A'(v) (v - mu)``. A clamped node's
value is data, and the energy is the negative log-likelihood, ``A(mu) - v mu``.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torch2ebm.engine.energies import Energy


class _OfParameter(Energy):
    """Each entry on its own."""

    entrywise = True

    def of_samples(self, error: Tensor, prediction: Tensor) -> Tensor:
        each = self._each(error, prediction)
        return each.flatten(1).sum(1) if each.ndim > 1 else each

    def of_batch(self, error: Tensor, prediction: Tensor) -> Tensor:
        return self._each(error, prediction).sum()

    def gradients(self, error: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        value = error + prediction
        if self.observed:
            return -prediction, value - self._mean(prediction)
        return self._variance(value) * error, self._difference(error, value, prediction)

    def _each(self, error: Tensor, prediction: Tensor) -> Tensor:
        value = error + prediction
        if self.observed:
            return self._normaliser(prediction) - value * prediction
        # near the prediction by a series: the difference would lose its digits
        near = torch.finfo(error.dtype).eps ** 0.25
        small = error.clamp(-near, near)
        return torch.where(error.abs() < near, self._series(small, value), self._divergence(error, value, prediction))

    @abstractmethod
    def _normaliser(self, parameter: Tensor) -> Tensor: ...

    @abstractmethod
    def _mean(self, parameter: Tensor) -> Tensor: ...

    @abstractmethod
    def _variance(self, parameter: Tensor) -> Tensor: ...

    @abstractmethod
    def _difference(self, error: Tensor, value: Tensor, prediction: Tensor) -> Tensor:
        """Of the means, without cancellation."""

    @abstractmethod
    def _divergence(self, error: Tensor, value: Tensor, prediction: Tensor) -> Tensor:
        """Where the error is no small one."""

    @abstractmethod
    def _series(self, error: Tensor, value: Tensor) -> Tensor:
        """``A'' e^2 / 2 - A''' e^3 / 6 + A'''' e^4 / 24`` at the value."""


@dataclass(frozen=True)
class Bernoulli(_OfParameter):
    """Of events, for a node whose prediction are logits: KL(sigmoid(value) || sigmoid(prediction)).

    With ``observed=True`` the value is data, between 0 and 1, and no logits: the energy is the binary cross entropy,
    ``softplus(prediction) - value * prediction``. A value far out, where the sigmoid is flat, hardly moves.

    Args:
        observed: Whether the value is data, for a node that is clamped to it.

    Example:
        >>> import torch, torch2ebm
        >>> data, logits = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)
        >>> torch2ebm.Bernoulli(observed=True).of_samples(data - logits, logits)
        tensor([1.3863])
        >>> torch2ebm.Bernoulli().of_samples(torch.zeros(1, 2), logits)  # the value is the prediction
        tensor([0.])
    """

    observed: bool = False

    def _normaliser(self, parameter: Tensor) -> Tensor:
        return -F.logsigmoid(-parameter)  # softplus gives up digits above 20

    def _mean(self, parameter: Tensor) -> Tensor:
        return parameter.sigmoid()

    def _variance(self, parameter: Tensor) -> Tensor:
        return parameter.sigmoid() * (-parameter).sigmoid()

    def _difference(self, error: Tensor, value: Tensor, prediction: Tensor) -> Tensor:
        high, low = torch.maximum(value, prediction), torch.minimum(value, prediction)
        return -error.sign() * high.sigmoid() * (-low).sigmoid() * torch.expm1(-error.abs())

    def _divergence(self, error: Tensor, value: Tensor, prediction: Tensor) -> Tensor:
        # the same with both signs turned; with values below 0 no digits are lost
        turned = torch.where(value > 0, -1.0, 1.0).to(value)
        value, prediction, error = turned * value, turned * prediction, turned * error
        near = torch.log1p(prediction.sigmoid() * torch.expm1(error.clamp(-1, 1)))
        fall = torch.where(error.abs() > 1, self._normaliser(value) - self._normaliser(prediction), near)
        return value.sigmoid() * error - fall

    def _series(self, error: Tensor, value: Tensor) -> Tensor:
        mean, variance = value.sigmoid(), self._variance(value)
        third, fourth = 1 - 2 * mean, 1 - 6 * variance
        return variance * error.square() * (0.5 - third * error / 6 + fourth * error.square() / 24)


@dataclass(frozen=True)
class Poisson(_OfParameter):
    """Of counts, for a node whose prediction are log rates: KL(Poisson(exp(value)) || Poisson(exp(prediction))).

    With ``observed=True`` the value is data, counts, and no logarithm. The energy is then the negative log-likelihood
    without the term of the count alone: ``exp(prediction) - value * prediction``, as ``torch.nn.PoissonNLLLoss`` has
    it. Rates are exponentials: in float32 they overflow beyond a logarithm of 88.

    Args:
        observed: Whether the value is data, for a node that is clamped to it.

    Example:
        >>> import torch, torch2ebm
        >>> counts, log_rates = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2)
        >>> torch2ebm.Poisson(observed=True).of_samples(counts - log_rates, log_rates)
        tensor([2.])
        >>> torch2ebm.Poisson().of_samples(torch.zeros(1, 2), log_rates)  # the value is the prediction
        tensor([0.])
    """

    observed: bool = False

    def _normaliser(self, parameter: Tensor) -> Tensor:
        return parameter.exp()

    def _mean(self, parameter: Tensor) -> Tensor:
        return parameter.exp()

    def _variance(self, parameter: Tensor) -> Tensor:
        return parameter.exp()

    def _difference(self, error: Tensor, value: Tensor, prediction: Tensor) -> Tensor:
        return -error.sign() * torch.maximum(value, prediction).exp() * torch.expm1(-error.abs())

    def _divergence(self, error: Tensor, value: Tensor, prediction: Tensor) -> Tensor:
        inside = error.clamp(-1, 1)
        far = value.exp() * (error - 1) + prediction.exp()
        return torch.where(error.abs() > 1, far, value.exp() * (torch.expm1(-inside) + inside))

    def _series(self, error: Tensor, value: Tensor) -> Tensor:
        return value.exp() * error.square() * (0.5 - error / 6 + error.square() / 24)
