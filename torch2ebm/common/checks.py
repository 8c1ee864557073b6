"""Checks of the numbers and choices that people pass, and of packages. Each raises the same four-part error."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from torch2ebm.errors import ConfigurationError

REDUCTIONS = ("mean", "sum")


def takes(function: Callable[..., Any], arguments: int) -> bool:
    """Whether a function can be called with so many positional arguments; a function of C, which does not say, can."""
    try:
        inspect.signature(function).bind(*range(arguments))
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def require(module: str, extra: str) -> ModuleType:
    """The imported module. Raises :class:`ConfigurationError` that names the extra to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"import {module}", str(error), "an optional package of torch2ebm", f"Run pip install torch2ebm[{extra}]."
        ) from error


def check_positive(where: str, **numbers: float) -> None:
    """Refuse a step size, a nudge or a rate that is not positive and finite.

    Args:
        where: Who was given it, for the error: the name of the class.
        numbers: By the name of the argument.

    Raises:
        ConfigurationError: for the first that is illegal.

    Example:
        >>> from torch2ebm.extend import check_positive
        >>> check_positive("Mine", lr=-1.0)
        Traceback (most recent call last):
        torch2ebm.errors.ConfigurationError: Mine(lr=...): got -1.0; expected a finite number above 0. Choose another.
    """
    for name, number in numbers.items():
        _check_number(where, name, number, "a finite number above 0", _is_positive(number))


def check_finite(where: str, **numbers: float) -> None:
    """Refuse a factor of either sign that is no finite number."""
    for name, number in numbers.items():
        legal = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
        _check_number(where, name, number, "a finite number", legal)


AUTO = "auto"  # what a step size or a number of steps may be beside a number


def check_step_size(where: str, lr: float | str) -> None:
    """Refuse a step size that is neither ``"auto"`` nor positive and finite."""
    if not _is_word(lr):
        _check_number(where, "lr", lr, f'a finite number above 0, or "{AUTO}"', _is_positive(lr))


def check_steps_or_auto(where: str, steps: int | str) -> None:
    """Refuse a number of steps that is neither ``"auto"`` nor a whole number, 1 or more."""
    if not _is_word(steps):
        _check_number(where, "steps", steps, f'a whole number, 1 or more, or "{AUTO}"', _is_count(steps))


def _is_word(setting: object) -> bool:
    return isinstance(setting, str) and setting == AUTO


def _check_number(where: str, name: str, number: object, expected: str, legal: bool) -> None:
    if not legal:
        raise ConfigurationError(f"{where}({name}=...)", repr(number), expected, "Choose another.")


def _is_positive(number: object) -> bool:
    return isinstance(number, (int, float)) and math.isfinite(number) and number > 0


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def check_steps(where: str, steps: int, name: str = "steps") -> None:
    """Refuse a number of steps that is no whole number, 1 or more.

    Args:
        where: Who was given it, for the error.
        steps: The number.
        name: Of the argument.

    Raises:
        ConfigurationError: if it is illegal.

    Example:
        >>> from torch2ebm.extend import check_steps
        >>> check_steps("MySolver", 20)
    """
    _check_number(where, name, steps, "a whole number, 1 or more", _is_count(steps))


def check_tolerance(where: str, tol: float) -> None:
    """Refuse a tolerance that is negative, infinite or no number; 0 is legal.

    Args:
        where: Who was given it, for the error.
        tol: The number.

    Raises:
        ConfigurationError: if it is illegal.

    Example:
        >>> from torch2ebm.extend import check_tolerance
        >>> check_tolerance("MySolver", 0.0)
    """
    if not (isinstance(tol, (int, float)) and math.isfinite(tol) and tol >= 0):
        raise ConfigurationError(f"{where}(tol=...)", repr(tol), "a finite number, 0 or more", "0 runs all steps.")


def check_reduction(where: str, loss_reduction: str) -> None:
    # a check of its own beside check_choice: the remedy says what each word means
    if loss_reduction not in REDUCTIONS:
        raise ConfigurationError(
            f"{where}(loss_reduction=...)",
            repr(loss_reduction),
            "'mean' or 'sum'",
            "'mean' fits a loss that is a mean over the batch, 'sum' takes the loss as it is written.",
        )


def check_choice(where: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is none of the choices.

    Args:
        where: Who was given it, for the error.
        name: Name of the argument.
        value: The word.
        choices: The legal ones.

    Raises:
        ConfigurationError: if it is none of them.

    Example:
        >>> from torch2ebm.extend import check_choice
        >>> check_choice("MyAlgorithm", "schedule", "reverse", ("reverse", "levels"))
    """
    if value not in choices:
        raise ConfigurationError(f"{where}({name}=...)", repr(value), f"one of {choices}", "Choose one of them.")
