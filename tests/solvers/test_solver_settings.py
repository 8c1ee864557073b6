"""Illegal settings of every solver are refused when it is made, by name; the ends of the legal ranges are taken."""

import inspect
import math
from typing import Any

import pytest

import torch2ebm
from torch2ebm.errors import ConfigurationError

VALUE_AND_ERROR = (
    *(torch2ebm.GradientDescent, torch2ebm.Momentum, torch2ebm.AdamDescent, torch2ebm.SequentialDescent),
    *(torch2ebm.ErrorDescent, torch2ebm.LocalErrorDescent, torch2ebm.AndersonErrorDescent),
)
LINEAR = (torch2ebm.Neumann, torch2ebm.FixedPointSolve, torch2ebm.ConjugateGradient)
BAD: dict[str, tuple[Any, ...]] = {
    "steps": (0, -1, 1.5, True, "3", None),
    "terms": (-1, 1.5, True, "3", None),
    "lr": (0, -0.1, math.nan, math.inf, "0.1", None),
    "eps": (0, -1e-8, math.nan),
    "tol": (-1e-9, math.nan, math.inf, "0", None),
    "momentum": (1, 1.5, -0.1, math.nan, True, "0.9", None),
    "betas": ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan)),
    "memory": (0, -1, math.nan, None),
}
EDGES: dict[str, Any] = {"steps": 1, "terms": 0, "tol": 0, "momentum": 0, "betas": (0, 0), "memory": 1}


def fields(kind: type) -> list[str]:
    return list(inspect.signature(kind).parameters)


def test_every_setting_of_every_solver_is_looked_at() -> None:
    assert {name for kind in (*VALUE_AND_ERROR, *LINEAR) for name in fields(kind)} == BAD.keys()


CASES = [(kind, name, value) for kind in (*VALUE_AND_ERROR, *LINEAR) for name in fields(kind) for value in BAD[name]]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_an_illegal_setting_is_named(kind: type, name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"{kind.__name__}\({name}(\[[01]\])?=") as caught:
        kind(**{name: value})
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("kind", [*VALUE_AND_ERROR, *LINEAR])
def test_the_ends_of_the_ranges_are_legal(kind: type) -> None:
    settings = {name: EDGES[name] for name in fields(kind) if name in EDGES}
    made = kind(**settings)
    assert {name: getattr(made, name) for name in settings} == settings
