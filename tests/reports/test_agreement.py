"""The measures of how one gradient agrees with another, against plane geometry."""

import math

import pytest
import torch
from torch import Tensor

from torch2ebm.reports.agreement import agreement


def turned(degrees: float, length: float) -> Tensor:
    """A vector at an angle to (3, 4, 0), in a plane with it."""
    along = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    across = torch.tensor([-0.48, 0.36, 0.8], dtype=torch.float64)
    angle = math.radians(degrees)
    return length * (math.cos(angle) * along + math.sin(angle) * across)


@pytest.mark.parametrize("degrees", [0.0, 1e-7, 30.0, 90.0, 135.0, 180.0])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0])
def test_the_measures_are_those_of_a_triangle(degrees: float, ratio: float) -> None:
    found = agreement(turned(degrees, 5 * ratio), turned(0.0, 5.0))
    cosine = math.cos(math.radians(degrees))
    assert found.cosine == pytest.approx(cosine, abs=1e-15)
    assert found.angle == pytest.approx(degrees, abs=1e-13)
    assert found.norm_ratio == pytest.approx(ratio, rel=1e-14)
    # law of cosines, in the form that does not cancel
    squared = (1 - ratio) ** 2 + 4 * ratio * math.sin(math.radians(degrees / 2)) ** 2
    assert found.relative_error == pytest.approx(math.sqrt(squared), rel=1e-6, abs=1e-15)


def test_signs_are_counted_entry_by_entry() -> None:
    assert agreement(torch.tensor([1.0, -2.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])).sign_agreement == 0.75


def test_where_one_is_zero_there_is_no_direction() -> None:
    zero, some = torch.zeros(3), torch.ones(3)
    of_zero, to_zero, both = agreement(zero, some), agreement(some, zero), agreement(zero, zero)
    assert math.isnan(of_zero.cosine) and (of_zero.angle, of_zero.relative_error, of_zero.norm_ratio) == (90, 1, 0)
    assert math.isnan(to_zero.cosine) and to_zero.angle == 90
    assert to_zero.relative_error == to_zero.norm_ratio == math.inf
    assert (both.cosine, both.angle, both.relative_error, both.norm_ratio) == (1, 0, 0, 1)


def test_half_precision_is_measured_in_double() -> None:
    large = torch.full((4,), 6e4, dtype=torch.float16)  # its square is no float16
    assert agreement(large, large / 2).norm_ratio == 2.0
