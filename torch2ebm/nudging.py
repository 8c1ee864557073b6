"""How strongly, and with which signs, the loss enters the energy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from torch2ebm.errors import ConfigurationError


class Nudging(ABC):
    """The nudged phases of an estimate: F = E + beta * loss is relaxed once for each beta."""

    @property
    @abstractmethod
    def betas(self) -> tuple[float, ...]:
        """The nudge of each phase; the estimate is the mean over phases of (dF/dtheta - dE/dtheta at rest) / beta."""


@dataclass(frozen=True)
class OneSided(Nudging):
    """One phase at ``beta``: an error of first order in it (paper A; algorithms.md A1).

    Args:
        beta: Factor of the loss in the energy, lambda of paper A.

    Raises:
        ConfigurationError: for a ``beta`` that is not positive and finite.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.OneSided(beta=0.1).betas
        (0.1,)
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        check_beta("OneSided", self.beta)

    @property
    def betas(self) -> tuple[float, ...]:
        return (self.beta,)


@dataclass(frozen=True)
class Symmetric(Nudging):
    """Two phases at ``beta`` and ``-beta``: an error of second order (paper A; algorithms.md A1).

    A large negative nudge can destroy the minimum that it moves, which is found when it happens.

    Args:
        beta: Factor of the loss in the energy.

    Raises:
        ConfigurationError: for a ``beta`` that is not positive and finite.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.Symmetric(beta=0.1).betas
        (0.1, -0.1)
    """

    beta: float

    def __post_init__(self) -> None:
        check_beta("Symmetric", self.beta)

    @property
    def betas(self) -> tuple[float, ...]:
        return (self.beta, -self.beta)


@dataclass(frozen=True)
class RandomSign(Nudging):
    """One phase at ``beta`` or ``-beta``, drawn anew for each backward (Scellier and Bengio 2017): an error of first
    order in each, of second order on average. Draws from torch's generator.

    Args:
        beta: Factor of the loss in the energy.

    Raises:
        ConfigurationError: for a ``beta`` that is not positive and finite.

    Example:
        >>> import torch2ebm
        >>> abs(torch2ebm.RandomSign(beta=0.1).betas[0])
        0.1
    """

    beta: float

    def __post_init__(self) -> None:
        check_beta("RandomSign", self.beta)

    @property
    def betas(self) -> tuple[float, ...]:
        return (self.beta if bool(torch.rand(()) < 0.5) else -self.beta,)


def check_beta(where: str, beta: object) -> None:
    number = isinstance(beta, (int, float)) and not isinstance(beta, bool)
    if not (number and math.isfinite(beta) and beta > 0):  # type: ignore[arg-type,operator]
        raise ConfigurationError(f"{where}(beta=...)", repr(beta), "a finite number above 0", "Choose another.")
