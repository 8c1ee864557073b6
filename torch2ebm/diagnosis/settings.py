"""What settings of an algorithm say of nudge and step size, and the same algorithm with others."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.algorithms.incremental_predictive_coding import IncrementalPredictiveCoding
from torch2ebm.algorithms.predictive_coding import PredictiveCoding
from torch2ebm.engine.nudging import Relative
from torch2ebm.engine.results import Relaxation
from torch2ebm.solvers import ErrorDescent, GradientDescent, Momentum

VALUES, ERRORS = "values", "errors"


@dataclass(frozen=True)
class StepSize:
    """The step size of a descent.

    Attributes:
        lr: As it was given.
        effective: What is compared with two over the largest eigenvalue.
        of: ``"values"`` or ``"errors"``.
    """

    lr: float
    effective: float
    of: str


def step_size(algorithm: Algorithm) -> StepSize | None:
    """None where there is none, or where no eigenvalue bounds it."""
    mover: Any = algorithm.solver if isinstance(algorithm, PredictiveCoding) else algorithm
    lr = getattr(mover, "lr", None)
    if not isinstance(lr, (int, float)):
        return None
    if isinstance(mover, (GradientDescent, IncrementalPredictiveCoding)):
        return StepSize(lr, lr, VALUES)
    if isinstance(mover, Momentum):  # heavy ball is stable up to 2 (1 + momentum) over the eigenvalue
        return StepSize(lr, lr / (1 + mover.momentum), VALUES)
    return StepSize(lr, lr, ERRORS) if isinstance(mover, ErrorDescent) else None


def nudge_of(algorithm: Algorithm, radius: float) -> float | None:
    """beta: how strongly the loss enters the energy in the strongest phase; None for algorithms of another energy.

    Args:
        algorithm: Which.
        radius: What a relative nudge is divided by.
    """
    if isinstance(algorithm, IncrementalPredictiveCoding):
        return 1.0
    if not isinstance(algorithm, PredictiveCoding):
        return None
    largest = max(abs(beta) for beta in algorithm.nudging.betas)
    return largest / (radius or 1.0) if isinstance(algorithm.nudging, Relative) else largest


def relaxes(algorithm: Algorithm) -> bool:
    """Whether it goes towards the equilibrium of predictive coding's energy."""
    return isinstance(algorithm, (PredictiveCoding, IncrementalPredictiveCoding))


def went_all_the_way(relaxation: Relaxation) -> bool:
    """Whether the solver itself says so."""
    return bool(relaxation.converged)


def with_lr(algorithm: Algorithm, lr: float) -> Algorithm:
    """The same with another step size."""
    if isinstance(algorithm, PredictiveCoding):
        return replace(algorithm, solver=replace(algorithm.solver, lr=lr))  # type: ignore[type-var]
    return replace(algorithm, lr=lr)  # type: ignore[type-var]


def has_lr(algorithm: Algorithm) -> bool:
    mover: Any = algorithm.solver if isinstance(algorithm, PredictiveCoding) else algorithm
    return is_dataclass(mover) and isinstance(getattr(mover, "lr", None), (int, float))


def has_setting(algorithm: Algorithm, name: str) -> bool:
    """Whether ``dataclasses.replace`` can give it another one."""
    return is_dataclass(algorithm) and any(field.name == name and field.init for field in fields(algorithm))


def calibrated(algorithm: Algorithm, loss_reduction: str) -> PredictiveCoding:
    """``PredictiveCoding()`` with nothing set but what belongs to the model and the loss."""
    kept = ("energies", "batch_statistics", "loss_reduction")
    given = {name: getattr(algorithm, name) for name in kept if has_setting(algorithm, name)}
    if loss_reduction:
        given["loss_reduction"] = loss_reduction
    return PredictiveCoding(**{name: value for name, value in given.items() if value is not None})
