"""Newton's method with matrix-free conjugate gradients, on any objective of named tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BySlot = Mapping[str, Tensor]
SUFFICIENT = 1e-4  # share of the predicted decrease that a step has to bring (Armijo)
HALVINGS = 40
DOUBLINGS = 10  # along negative curvature, where the model knows no length


class Point(ABC):
    """An objective, expanded to second order where it stands.

    Attributes:
        values: Where that is.
        parts: The objective's terms by name; it is their sum. Known before any derivative is.
    """

    values: BySlot
    parts: Mapping[str, float]

    @property
    def value(self) -> float:
        return sum(self.parts.values())

    @property
    @abstractmethod
    def gradient(self) -> BySlot:
        """The gradient in the values."""

    @abstractmethod
    def hessian_product(self, direction: BySlot) -> BySlot:
        """The Hessian at this point, applied to a direction."""

    @abstractmethod
    def precondition(self, gradient: BySlot) -> BySlot:
        """A symmetric positive approximation of the inverse Hessian, applied to a gradient."""

    @property
    @abstractmethod
    def residual(self) -> float:
        """What is compared with ``tol``."""

    @abstractmethod
    def moved(self, direction: BySlot, length: float) -> Point:
        """The point at ``values + length * direction``; where that is across a kink, the kink may hold it."""

    @abstractmethod
    def freed(self) -> Point:
        """The same place, without the kinks that the objective falls off from; itself where there is none."""


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where the minimisation ended.

    Attributes:
        point: The last point.
        steps: Newton steps done.
        products: Hessian products done, in all steps.
        converged: Whether the residual is at most ``tol``.
        history: ``parts`` at the start of every step and at the end.
    """

    point: Point
    steps: int
    products: int
    converged: bool
    history: tuple[Mapping[str, float], ...]

    def then(self, other: Minimum) -> Minimum:
        """This one, gone on with by ``other`` from where it ended."""
        history = (*self.history, *other.history[1:])
        return Minimum(other.point, self.steps + other.steps, self.products + other.products, other.converged, history)


def minimise(start: Point, tol: float, steps: int, products: int = 200) -> Minimum:
    """A stationary point reached by descent from ``start`` (Nocedal and Wright, algorithm 7.1: line-search Newton-CG).

    Every step lowers the objective, up to rounding, so the end is in the basin of the start as far as steps along
    negative curvature stay in it. It ends when the residual is at most ``tol``, after ``steps`` steps, or where no
    direction leads down any more (rounding, or a kink).

    Args:
        start: Where to begin.
        tol: Residual to reach.
        steps: Most Newton steps.
        products: Most Hessian products in one step.
    """
    point = start
    history, used, done = [point.parts], 0, 0
    first = 0.0
    while point.residual > tol and done < steps:
        point = point.freed()
        norm = _norm(point)
        first = max(first, norm)
        if not norm > 0:
            break
        direction, spent, curved = _conjugate_gradients(point, min(0.1, norm / first) * norm, products)
        used += spent
        following = _searched(point, direction, curved) or _searched(point, _descent(point), False)
        if following is None:
            break
        fell = point.value - following.value > _noise(point)
        if not fell and following.residual >= point.residual:
            break  # rounding is all that is left
        point, done = following, done + 1
        history.append(point.parts)
    return Minimum(point, done, used, point.residual <= tol, tuple(history))


def is_finite(point: Point) -> bool:
    """Whether the gradient at a point, and the Hessian along it, are numbers."""
    found = [*point.gradient.values(), *point.hessian_product(_descent(point)).values()]
    return all(bool(torch.isfinite(part).all()) for part in found)


def _norm(point: Point) -> float:
    return math.sqrt(max(_dot(point.gradient, point.precondition(point.gradient)), 0.0))


def _descent(point: Point) -> BySlot:
    return _scaled(point.precondition(point.gradient), -1.0)


def _conjugate_gradients(point: Point, enough: float, products: int) -> tuple[BySlot, int, bool]:
    """H d = -g up to a residual of ``enough``; also the products spent, and whether negative curvature ended it."""
    residual = dict(point.gradient)
    conditioned = point.precondition(residual)
    step = _scaled(conditioned, -1.0)
    solution: BySlot = _scaled(step, 0.0)
    squared = _dot(residual, conditioned)
    for spent in range(1, products + 1):
        product = point.hessian_product(step)
        curvature = _dot(step, product)
        if not curvature > 0:
            return (step if spent == 1 else solution), spent, spent == 1
        rate = squared / curvature
        solution = moved(solution, step, rate)
        residual = dict(moved(residual, product, rate))
        conditioned = point.precondition(residual)
        previous, squared = squared, _dot(residual, conditioned)
        if not math.sqrt(max(squared, 0.0)) > enough:
            break
        step = moved(_scaled(conditioned, -1.0), step, squared / previous)
    return solution, spent, False


def _searched(point: Point, direction: BySlot, expand: bool) -> Point | None:
    """The first of 1, 1/2, 1/4, ... of ``direction`` that lowers the objective enough; None if there is none."""
    slope = _dot(point.gradient, direction)
    if not slope < 0:
        return None
    for halvings in range(HALVINGS):
        length = 0.5**halvings
        found = point.moved(direction, length)
        if found.value <= point.value + SUFFICIENT * length * slope + _noise(point):
            return _lengthened(point, direction, found) if expand and halvings == 0 else found
    return None


def _lengthened(point: Point, direction: BySlot, found: Point) -> Point:
    for doublings in range(1, DOUBLINGS + 1):
        longer = point.moved(direction, 2.0**doublings)
        if not longer.value < found.value:
            break
        found = longer
    return found


def _noise(point: Point) -> float:
    """Differences of the objective below this are rounding."""
    epsilon = max((torch.finfo(value.dtype).eps for value in point.values.values()), default=0.0)
    return 4 * epsilon * sum(abs(part) for part in point.parts.values())


def _dot(one: BySlot, other: BySlot) -> float:
    return float(sum((tensor * other[name]).sum() for name, tensor in one.items()))


def _scaled(vector: BySlot, factor: float) -> dict[str, Tensor]:
    return {name: tensor * factor for name, tensor in vector.items()}


def moved(vector: BySlot, direction: BySlot, length: float) -> dict[str, Tensor]:
    return {name: torch.add(tensor, direction[name], alpha=length) for name, tensor in vector.items()}
