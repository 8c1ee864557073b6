"""Checks of the numbers and choices that people pass, each with the same four-part error."""

from __future__ import annotations

import math

from torch2ebm.errors import ConfigurationError


def check_positive(where: str, **numbers: float) -> None:
    """Refuse a step size, a nudge or a rate that is not positive and finite."""
    for name, number in numbers.items():
        if not (isinstance(number, (int, float)) and math.isfinite(number) and number > 0):
            raise ConfigurationError(f"{where}({name}=...)", repr(number), "a finite number above 0", "Choose another.")


def check_steps(where: str, steps: int) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigurationError(f"{where}(steps=...)", repr(steps), "a whole number, 1 or more", "Choose another.")


def check_tolerance(where: str, tol: float) -> None:
    if not (isinstance(tol, (int, float)) and math.isfinite(tol) and tol >= 0):
        raise ConfigurationError(f"{where}(tol=...)", repr(tol), "a finite number, 0 or more", "0 runs all steps.")


REDUCTIONS = ("mean", "sum")


def check_reduction(where: str, loss_reduction: str) -> None:
    if loss_reduction not in REDUCTIONS:
        raise ConfigurationError(
            f"{where}(loss_reduction=...)",
            repr(loss_reduction),
            "'mean' or 'sum'",
            "'mean' fits a loss that is a mean over the batch, 'sum' takes the loss as it is written.",
        )


def check_choice(where: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{where}({name}=...)", repr(value), f"one of {choices}", "Choose one of them.")
