"""Newton's method on functions whose minima, and whose curvature on the way, are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torch2ebm.implicit.newton import BySlot, Minimum, Point, minimise, moved

Function = Callable[[Tensor], Tensor]


class Plain(Point):
    """A function of one vector, by autograd, with no preconditioner and no kinks."""

    def __init__(self, function: Function, at: Tensor) -> None:
        self.function, self.at = function, at.detach().double()
        self.values, self.parts = {"x": self.at}, {"f": float(function(self.at))}

    @property
    def gradient(self) -> BySlot:
        leaf = self.at.clone().requires_grad_()
        return {"x": torch.autograd.grad(self.function(leaf), leaf)[0]}

    def hessian_product(self, direction: BySlot) -> BySlot:
        return {"x": torch.autograd.functional.hvp(self.function, self.at, direction["x"])[1]}

    def precondition(self, gradient: BySlot) -> BySlot:
        return gradient

    @property
    def residual(self) -> float:
        return float(self.gradient["x"].abs().max())

    def moved(self, direction: BySlot, length: float) -> Plain:
        return Plain(self.function, moved(self.values, direction, length)["x"])

    def freed(self) -> Plain:
        return self


def found(function: Function, start: list[float], tol: float = 1e-12, steps: int = 100, products: int = 200) -> Minimum:
    return minimise(Plain(function, torch.tensor(start)), tol, steps, products)


def value_of(minimum: Minimum) -> Tensor:
    assert isinstance(minimum.point, Plain)
    return minimum.point.at


MATRIX = torch.diag(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)) + 0.5


def test_a_quadratic_is_solved_by_conjugate_gradients() -> None:
    b = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    minimum = found(lambda x: 0.5 * x @ MATRIX @ x - b @ x, [0.0, 0.0, 0.0])
    torch.testing.assert_close(value_of(minimum), torch.linalg.solve(MATRIX, b), rtol=1e-12, atol=1e-13)
    assert minimum.converged and minimum.steps <= 6
    values = [sum(parts.values()) for parts in minimum.history]
    assert len(values) == minimum.steps + 1 and values == sorted(values, reverse=True)


def test_rosenbrocks_valley_ends_in_its_minimum() -> None:
    minimum = found(lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2, [-1.2, 1.0])
    torch.testing.assert_close(value_of(minimum), torch.ones(2, dtype=torch.float64), rtol=1e-10, atol=0.0)
    assert minimum.converged


@pytest.mark.parametrize("start", [1e-3, -1e-3, 0.3])
def test_negative_curvature_is_left_downhill_to_the_minimum_on_that_side(start: float) -> None:
    """Double well, curvature -1 at 0: the step along it is lengthened, so few steps lead from 0.001 to 1."""
    minimum = found(lambda x: 0.25 * x[0] ** 4 - 0.5 * x[0] ** 2, [start])
    assert float(value_of(minimum)) == pytest.approx(math.copysign(1, start), rel=1e-10)
    assert minimum.converged and minimum.steps <= 8


def test_negative_curvature_met_on_the_way_uses_what_was_found_before_it() -> None:
    """Positive curvature along the gradient's first direction, negative in the second."""
    minimum = found(lambda x: 5 * x[0] ** 2 + 0.25 * x[1] ** 4 - 0.5 * x[1] ** 2 + 0.1 * x[0] * x[1], [1.0, 0.05])
    slope = torch.autograd.functional.jacobian(
        lambda x: 5 * x[0] ** 2 + 0.25 * x[1] ** 4 - 0.5 * x[1] ** 2 + 0.1 * x[0] * x[1], value_of(minimum)
    )
    assert minimum.converged and float(slope.abs().max()) <= 1e-12 and abs(float(value_of(minimum)[1])) > 0.9


def test_a_stationary_start_stays() -> None:
    minimum = found(lambda x: 0.25 * x[0] ** 4 - 0.5 * x[0] ** 2, [0.0])
    assert (minimum.steps, minimum.products, float(value_of(minimum))) == (0, 0, 0.0) and minimum.converged


def test_it_stops_after_the_steps_and_says_that_it_has_not_converged() -> None:
    def function(x: Tensor) -> Tensor:
        return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    minimum = found(function, [-1.2, 1.0], steps=3)
    assert minimum.steps == 3 and not minimum.converged
    assert float(function(value_of(minimum))) < float(function(torch.tensor([-1.2, 1.0])))


def test_few_products_a_step_lead_there_in_more_steps() -> None:
    b = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    few = found(lambda x: 0.5 * x @ MATRIX @ x - b @ x, [0.0, 0.0, 0.0], tol=1e-5, steps=1000, products=1)
    many = found(lambda x: 0.5 * x @ MATRIX @ x - b @ x, [0.0, 0.0, 0.0], tol=1e-5)
    assert few.converged and few.steps > many.steps and few.products == few.steps


def test_rounding_ends_it_where_no_step_leads_down_any_more() -> None:
    """A tol of 0 cannot be met where the gradient at the best number there is is not 0."""
    minimum = found(lambda x: (x[0] ** 2 - 2) ** 2 + 1, [1.0], tol=0.0, steps=1000)
    assert minimum.steps < 30 and float(value_of(minimum)) == pytest.approx(math.sqrt(2), rel=1e-8)


def test_a_gradient_that_does_not_belong_to_the_function_moves_nothing() -> None:
    """The negative twin: uphill by its own account, no length lowers the value."""

    class Wrong(Plain):
        @property
        def gradient(self) -> BySlot:
            return {"x": -super().gradient["x"]}

        def moved(self, direction: BySlot, length: float) -> Wrong:
            return Wrong(self.function, moved(self.values, direction, length)["x"])

    minimum = minimise(Wrong(lambda x: (x * x).sum(), torch.ones(2)), 1e-12, 100)
    assert (minimum.steps, minimum.converged) == (0, False)
