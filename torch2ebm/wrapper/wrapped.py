"""What the wrapped optimizer has of its own, reached through the wrapper: ``train()``, ``first_step()``, ``rho``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def is_wrappeds(name: str, optimizer: Optimizer) -> bool:
    """Whether a name that the wrapper does not have is the wrapped optimizer's. Private names are each one's own."""
    return not name.startswith("_") and hasattr(optimizer, name)


def method_of(found: object, optimizer: Optimizer, around: Callable[[Callable[[], Any]], Any]) -> Any:
    """What was found on the wrapped optimizer; a method of its own is called inside of ``around``."""
    if not (isinstance(found, MethodType) and found.__self__ is optimizer):
        return found
    bound = found

    @functools.wraps(found)
    def method(*args: Any, **kwargs: Any) -> Any:
        return around(lambda: bound(*args, **kwargs))

    return method


def with_closures(
    args: Sequence[Any], kwargs: Mapping[str, Any], change: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments, with each closure among them changed."""

    def of(value: Any) -> Any:
        return change(value) if callable(value) and not isinstance(value, (nn.Module, type)) else value

    return [of(value) for value in args], {name: of(value) for name, value in kwargs.items()}


def evaluates_again(optimizer: Optimizer) -> bool:
    """Whether it cannot do without a closure, as LBFGS: it runs it on weights that it has moved already."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def versions(parameters: Sequence[Tensor]) -> list[int]:
    """What changes where somebody has written a parameter in place."""
    return [-1 if parameter.is_inference() else parameter._version for parameter in parameters]
