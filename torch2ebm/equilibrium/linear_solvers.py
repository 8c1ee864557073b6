"""Solvers of (I - J^T) z = b, the linear system of recurrent backprop (Almeida 1987; Pineda 1987)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torch2ebm.common.checks import check_steps, check_tolerance
from torch2ebm.common.setting_names import NamedSettings
from torch2ebm.errors import ConfigurationError

Vector = dict[str, Tensor]  # by slot of a state


class System(Protocol):
    """Products with the Jacobian J of a step, by slot of a state.

    Example:
        J is one half here. The examples of the methods go on from this one.

        >>> import torch
        >>> class Halving:
        ...     def transposed(self, z):
        ...         return {slot: 0.5 * each for slot, each in z.items()}
        ...     product = transposed
        >>> system = Halving()
    """

    def transposed(self, z: Vector) -> Vector:
        """J^T z.

        Args:
            z: By slot, in the shape of the state, for example ``[batch, features]``.

        Returns:
            The same slots and shapes.

        Example:
            >>> system.transposed({"h": torch.ones(1, 2)})
            {'h': tensor([[0.5000, 0.5000]])}
        """
        ...

    def product(self, v: Vector) -> Vector:
        """J v.

        Args:
            v: By slot, in the shape of the state.

        Returns:
            The same slots and shapes.

        Example:
            >>> system.product({"h": torch.ones(1, 2)})
            {'h': tensor([[0.5000, 0.5000]])}
        """
        ...


@dataclass(frozen=True, eq=False)
class Solution:
    """What a linear solver has found.

    Attributes:
        z: By slot, in the shape of ``b``.
        steps: How many were made.
        residual: Largest absolute entry of b - (I - J^T) z, over slots and samples.

    Example:
        >>> import torch
        >>> from torch2ebm.extend import Solution
        >>> Solution({"h": torch.ones(1, 2)}, steps=3, residual=0.0).steps
        3
    """

    z: Vector
    steps: int
    residual: float


class LinearSolver(NamedSettings, ABC):
    """How recurrent backprop solves (I - J^T) z = b: ``RecurrentBackprop(solver)`` (Almeida 1987; Pineda 1987).

    Attributes:
        steps: Most steps, each of one product with J^T, or of one with J and one with J^T.
        tol: Largest entry of the residual at which it ends early; 0 takes all steps.

    Example:
        z <- J^T z + b. The example of the method goes on from this one.

        >>> from dataclasses import dataclass
        >>> import torch
        >>> from torch2ebm.extend import LinearSolver, Solution
        >>> @dataclass(frozen=True)
        ... class Picard(LinearSolver):
        ...     steps: int = 50
        ...     tol: float = 0.0
        ...     def solve(self, system, b):
        ...         z = b
        ...         for _ in range(self.steps):
        ...             before, products = z, system.transposed(z)
        ...             z = {slot: products[slot] + b[slot] for slot in b}
        ...         change = max(float((z[slot] - before[slot]).abs().max()) for slot in b)
        ...         return Solution(z, self.steps, change)
    """

    steps: int
    tol: float

    @abstractmethod
    def solve(self, system: System, b: Vector) -> Solution:
        """One linear system for all samples of a batch.

        Args:
            system: Products with J and J^T.
            b: By slot of a state, in its shape: the loss's gradient, summed over samples.

        Returns:
            z in the shapes of ``b``, the steps, and the residual.

        Example:
            >>> class Halving:
            ...     def transposed(self, z):
            ...         return {slot: 0.5 * each for slot, each in z.items()}
            ...     product = transposed
            >>> Picard().solve(Halving(), {"h": torch.ones(1, 2)}).z["h"]  # 1 / (1 - 1/2)
            tensor([[2., 2.]])
        """


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """z = sum of (J^T)^k b for k = 0, ..., ``terms``: backprop through the last ``terms`` + 1 steps of a settled net.

    Converges like rho(J)^terms, where the spectral radius rho(J) is below 1.

    Args:
        terms: The highest power of J^T; 0 takes b alone.

    Raises:
        ConfigurationError: for a number of terms that is no whole number, 0 or more.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.Neumann(terms=5).steps
        5
    """

    terms: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.terms, int) or isinstance(self.terms, bool) or self.terms < 0:
            raise ConfigurationError(
                "Neumann(terms=...)", repr(self.terms), "a whole number, 0 or more", "Choose another."
            )

    @property
    def steps(self) -> int:  # type: ignore[override]
        return self.terms

    @property
    def tol(self) -> float:  # type: ignore[override]
        return 0.0

    def solve(self, system: System, b: Vector) -> Solution:
        # k = 0; z = sum_k (J^T)^k b, truncated (Neumann series of (I - J^T)^-1)
        power = z = b
        for _ in range(self.terms):
            power = system.transposed(power)
            z = _plus(z, power)
        # b - (I - J^T) z = (J^T)^(K + 1) b: one product more, for the report alone
        return Solution(z, self.terms, largest(system.transposed(power)))


@dataclass(frozen=True)
class FixedPointSolve(LinearSolver):
    """z <- J^T z + b until it stands still: the Neumann series, until ``tol`` is met.

    Args:
        steps: Most steps.
        tol: Largest change at which it ends early; 0 takes all steps.

    Raises:
        ConfigurationError: for an illegal number of steps or tolerance.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.FixedPointSolve(steps=50, tol=1e-6)
        FixedPointSolve(steps=50, tol=1e-06)
    """

    steps: int = 100
    tol: float = 0.0

    def __post_init__(self) -> None:
        check_steps("FixedPointSolve", self.steps)
        check_tolerance("FixedPointSolve", self.tol)

    def solve(self, system: System, b: Vector) -> Solution:
        z, steps, residual = b, 0, torch.inf
        while steps < self.steps:
            moved = _plus(system.transposed(z), b)
            steps += 1
            # the number waits for the device: only where it is asked for
            if self.tol > 0 or steps == self.steps:
                # J^T z + b - z is the residual of z, the point before
                residual = largest(_plus(moved, z, -1.0))
            z = moved
            if residual <= self.tol:
                break
        return Solution(z, steps, residual)


@dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    """Conjugate gradients on the normal equations (I - J)(I - J^T) z = (I - J) b, each sample with its own step sizes.

    Needs no spectral radius below 1, and ends in about as many steps as a sample has states, a few more where the
    system is ill-conditioned.

    Args:
        steps: Most steps, each one product with J and one with J^T.
        tol: Largest entry of b - (I - J^T) z at which it ends early; 0 takes all steps.

    Raises:
        ConfigurationError: for an illegal number of steps or tolerance.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.ConjugateGradient(steps=30)
        ConjugateGradient(steps=30, tol=0.0)
    """

    steps: int = 50
    tol: float = 0.0

    def __post_init__(self) -> None:
        check_steps("ConjugateGradient", self.steps)
        check_tolerance("ConjugateGradient", self.tol)

    def solve(self, system: System, b: Vector) -> Solution:
        # CGNR on A z = b with A = I - J^T: the residual of the system itself is carried along
        z: Vector = {slot: torch.zeros_like(each) for slot, each in b.items()}
        residual = b
        # A^T r, with A^T = I - J
        gradient = direction = _plus(residual, system.product(residual), -1.0)
        size = dot(gradient, gradient)  # [batch]
        steps = 0
        while steps < self.steps and not (self.tol > 0 and largest(residual) <= self.tol):
            image = _plus(direction, system.transposed(direction), -1.0)
            rate = _ratio(size, dot(image, image))  # |A^T r|^2 / |A d|^2, [batch]
            z = _along(z, direction, rate)
            residual = _along(residual, image, -rate)
            gradient = _plus(residual, system.product(residual), -1.0)
            before, size = size, dot(gradient, gradient)
            direction = _along(gradient, direction, _ratio(size, before))  # |A^T r_new|^2 / |A^T r|^2, [batch]
            steps += 1
        return Solution(z, steps, largest(residual))


def _plus(a: Vector, b: Vector, factor: float = 1.0) -> Vector:
    return {slot: a[slot].add(b[slot], alpha=factor) for slot in a}


def _along(a: Vector, b: Vector, rate: Tensor) -> Vector:
    """a + rate b, one rate a sample, or one in all."""
    return {slot: a[slot] + b[slot] * _spread(rate, b[slot]) for slot in a}


def _spread(rate: Tensor, like: Tensor) -> Tensor:
    return rate.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype) if rate.ndim else rate.to(like.dtype)


def dot(a: Vector, b: Vector) -> Tensor:
    """Inner product of each sample, shape ``[batch]``; one number where the states do not share a batch dimension."""
    # a state without the batch dimension joins the samples: then they share one step size
    whole = len({each.shape[0] if each.ndim else 0 for each in a.values()}) > 1 or any(not v.ndim for v in a.values())
    of: Callable[[Tensor], Tensor] = torch.sum if whole else _of_samples
    parts = [of(a[slot] * b[slot]) for slot in a]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _of_samples(product: Tensor) -> Tensor:
    return product.reshape(len(product), -1).sum(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; 0 where a sample is solved exactly and both are 0."""
    return torch.where(denominator > 0, numerator / denominator.clamp_min(torch.finfo(denominator.dtype).tiny), 0.0)


def largest(vector: Mapping[str, Tensor]) -> float:
    return float(torch.stack([each.abs().max() for each in vector.values()]).max())
