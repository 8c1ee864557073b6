"""How strongly, and with which signs, the loss enters the energy."""

from __future__ import annotations

import cmath
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from torch2ebm.common.checks import check_steps
from torch2ebm.common.setting_names import NamedSettings
from torch2ebm.errors import ConfigurationError


class Nudging(NamedSettings, ABC):
    """The nudged phases of an estimate: F = E + beta * loss is relaxed once for each beta (Scellier and Bengio 2017).

    Write a subclass as a frozen dataclass, and check ``beta`` when it is made.

    Attributes:
        is_complex: Whether its nudges are complex numbers, for which only an equilibrium algorithm has states.
        is_relative: Whether its nudges are in units of the inverse curvature, and not of the loss (:class:`Relative`).

    Example:
        One phase that pushes away from the target (Scellier et al. 2023). The examples of the methods go on from it.

        >>> from dataclasses import dataclass, field
        >>> import torch2ebm
        >>> from torch2ebm.extend import Nudging, check_positive
        >>> @dataclass(frozen=True)
        ... class Negative(Nudging):
        ...     beta: float
        ...     def __post_init__(self):
        ...         check_positive("Negative", beta=self.beta)
        ...     @property
        ...     def betas(self):
        ...         return (-self.beta,)
        >>> torch2ebm.PredictiveCoding(nudging=Negative(0.1)).nudging
        Negative(beta=0.1)
    """

    is_complex: ClassVar[bool] = False
    is_relative: ClassVar[bool] = False

    @property
    @abstractmethod
    def betas(self) -> tuple[complex, ...]:
        """The nudge of each phase, in the order in which they are relaxed.

        The estimate is the mean over phases of (dF/dtheta - dE/dtheta at rest) / beta. It tends to the loss's gradient
        as all betas go to 0. Values and errors that ``model.state`` shows are those of the first phase.

        Returns:
            Numbers other than 0, of either sign: factors of the loss, which is summed over samples.

        Example:
            >>> Negative(0.1).betas
            (-0.1,)
        """

    def drawn(self) -> tuple[complex, ...]:
        """The nudges of one backward. Asked for once in each; override it for a nudging that draws random numbers.

        Returns:
            All of :attr:`betas`, or those that a random nudging takes of them this time.

        Example:
            >>> Negative(0.1).drawn()
            (-0.1,)
        """
        return self.betas


@dataclass(frozen=True)
class OneSided(Nudging):
    """One phase at ``beta``: an error of first order in it (Millidge et al. 2022; Scellier and Bengio 2017).

    Args:
        beta: Factor of the loss in the energy, lambda of Millidge et al. 2022.

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
    """Two phases at ``beta`` and ``-beta``: an error of second order (Millidge et al. 2022; Scellier and Bengio 2017).

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
    """One phase at ``beta`` or ``-beta``, drawn anew for each backward (Scellier and Bengio 2017).

    The error is of first order in each backward, and of second order on average. It draws from torch's generator.

    Args:
        beta: Factor of the loss in the energy.

    Raises:
        ConfigurationError: for a ``beta`` that is not positive and finite.

    Example:
        >>> import torch2ebm
        >>> abs(torch2ebm.RandomSign(beta=0.1).drawn()[0])
        0.1
    """

    beta: float

    def __post_init__(self) -> None:
        check_beta("RandomSign", self.beta)

    @property
    def betas(self) -> tuple[float, ...]:
        return (self.beta, -self.beta)

    def drawn(self) -> tuple[float, ...]:
        return self.betas[:1] if bool(torch.rand(()) < 0.5) else self.betas[1:]


@dataclass(frozen=True)
class Holomorphic(Nudging):
    """Nudges on a circle of complex numbers (Laborieux and Zenke 2022), for
    :class:`EquilibriumPropagation` alone: the error falls geometrically in ``points``, for a beta that is not small.

    Needs holomorphic activations: tanh, sigmoid, softplus, SiLU, identity. ``points=2`` is ``Symmetric(beta)``. States
    at conjugate nudges are conjugate, so that half of the points are relaxed.

    Args:
        beta: Size of the nudges.
        points: How many stand on the circle, 2 or more.

    Raises:
        ConfigurationError: for a ``beta`` that is not positive and finite, or fewer than 2 points.

    Example:
        >>> import torch2ebm
        >>> [complex(round(b.real, 3), round(b.imag, 3)) for b in torch2ebm.Holomorphic(0.1, points=4).betas]
        [(0.1+0j), 0.1j, (-0.1+0j)]
    """

    is_complex = True

    beta: float
    points: int = 4

    def __post_init__(self) -> None:
        check_beta("Holomorphic", self.beta)
        if not isinstance(self.points, int) or isinstance(self.points, bool) or self.points < 2:
            got = repr(self.points)
            raise ConfigurationError("Holomorphic(points=...)", got, "a whole number, 2 or more", "Choose another.")

    @property
    def angles(self) -> tuple[float, ...]:
        """Angles of the nudges from 0 to pi; those between stand for their conjugates, too."""
        return tuple(2 * math.pi * k / self.points for k in range(self.points // 2 + 1))

    @property
    def betas(self) -> tuple[complex, ...]:
        """One nudge for each of :attr:`angles`."""
        return tuple(cmath.rect(self.beta, angle) for angle in self.angles)

    @property
    def weights(self) -> tuple[complex, ...]:
        """w_k such that the estimate is the real part of the sum of w_k dF/dtheta at the k-th nudge."""
        last = len(self.angles) - 1
        alone = [k == 0 or (k == last and self.points % 2 == 0) for k in range(last + 1)]
        return tuple((1 if one else 2) / (self.points * b) for one, b in zip(alone, self.betas, strict=True))


@dataclass(frozen=True)
class Relative(Nudging):
    """A nudge in units of the curvature: ``beta = r / sigma_squared``, measured as training goes on.

    Sigma squared is the largest eigenvalue of the loss's Hessian in the errors (:meth:`EnergyModel.curvature`). It
    grows by orders of magnitude while a network learns, so no fixed ``beta`` fits. ``r`` means the same everywhere:
    towards 0 the gradient is backprop's, far above 1 the output is clamped. Gradients are in the scale of your loss.
    A loss that the model returns has its curvature in the last node, which counts.

    A loss with negative curvature has ``r`` divided by the largest absolute eigenvalue. One without any curvature has
    errors of length ``r`` in its steepest sample. Both are told by a ``CurvatureWarning``.

    Before a network has learned, the curvature is so small that errors can be as long as the values themselves. There
    the curvature at the start says little of where they end. ``largest_error`` makes ``beta`` smaller in that case.

    Args:
        r: How strong the nudge is.
        sides: ``OneSided(1)``, or another nudging whose betas ``r`` multiplies. ``Symmetric(1)`` relaxes twice, at
            ``r`` and at ``-r``; from ``r = 1`` on the second has no minimum.
        every: Curvature is measured on every so many calls of a graph, and carried in between; 1 measures on each.
        largest_error: The length of a sample's errors over that of its values is at most about this much; None for no
            such bound. ``PredictiveCoding()`` takes ``Relative(0.1, largest_error=0.1)``.

    Raises:
        ConfigurationError: for an ``r`` or a bound that is not positive and finite, or fewer than one call.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net)
        >>> coding = torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent(5), nudging=torch2ebm.Relative(0.1))
        >>> optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, coding)
        >>> torch.nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
        >>> relaxation = model.state.relaxation
        >>> round(relaxation.beta * relaxation.sigma_squared, 6)
        0.1
    """

    is_relative = True

    r: float
    sides: Nudging = field(default_factory=OneSided)
    every: int = 10
    largest_error: float | None = None

    def __post_init__(self) -> None:
        check_number_above_0("Relative(r=...)", self.r)
        if self.largest_error is not None:
            check_number_above_0("Relative(largest_error=...)", self.largest_error)
        check_steps("Relative", self.every, "every")
        if not isinstance(self.sides, Nudging) or self.sides.is_complex or self.sides.is_relative:
            got, expected = repr(self.sides), "a nudging of real numbers in units of the loss"
            raise ConfigurationError("Relative(sides=...)", got, expected, "For example Symmetric(1.0).")

    @property
    def betas(self) -> tuple[float, ...]:
        """``r`` times those of ``sides``, to be divided by the curvature."""
        return tuple(self.r * beta.real for beta in self.sides.betas)

    def drawn(self) -> tuple[float, ...]:
        return tuple(self.r * beta.real for beta in self.sides.drawn())


def check_beta(where: str, beta: object) -> None:
    check_number_above_0(f"{where}(beta=...)", beta)


def check_number_above_0(where: str, found: object) -> None:
    number = isinstance(found, (int, float)) and not isinstance(found, bool)
    if not (number and math.isfinite(found) and found > 0):  # type: ignore[arg-type,operator]
        raise ConfigurationError(where, repr(found), "a finite number above 0", "Choose another.")
