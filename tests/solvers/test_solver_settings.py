"""Illegal settings of every solver are refused when it is made, by name; the ends of the legal ranges are taken."""

import inspect
import math
from typing import Any

import pytest
from solvers_list import ROWS, Row

import torch2ebm
from torch2ebm.errors import ConfigurationError

VALUE_AND_ERROR = tuple(type(row.settings) for row in ROWS)
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


def test_no_solver_is_left_out() -> None:
    public = {getattr(torch2ebm, name) for name in torch2ebm.__all__}
    solvers = {kind for kind in public if isinstance(kind, type) and issubclass(kind, torch2ebm.Solver)}
    optional = {torch2ebm.ODEFlow, torch2ebm.Langevin}  # these record nothing, and have files of their own
    assert set(VALUE_AND_ERROR) == solvers - {torch2ebm.Solver} - optional


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_list_has_every_setting_off_its_default(row: Row) -> None:
    plain = type(row.settings)()
    assert [name for name in fields(type(plain)) if getattr(row.settings, name) == getattr(plain, name)] == []
    assert row.settings.steps == 7


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
