"""What a model was called with, checked before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torch2ebm.engine.finite import all_finite, count_bad
from torch2ebm.errors import ConfigurationError, NodeEvaluationError, NonFiniteError


def as_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def takes_any_arguments(module: nn.Module) -> bool:
    kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
    return inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.VAR_KEYWORD in kinds


def check_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigurationError(
            f"model(...), {type(module).__name__}.forward",
            f"{len(args)} positional arguments and {sorted(kwargs) or 'no keywords'}",
            f"the arguments {inspect.signature(module.forward)}",
            f"Python says: {error}.",
        ) from error


def check_inputs(tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if tensor.is_meta:
            raise NodeEvaluationError(
                f"model(...), input {i}",
                "a tensor on the meta device",
                "a tensor with data",
                "Move it: tensor.to(...).",
            )
        if tensor.is_floating_point() and not all_finite(tensor):
            raise NonFiniteError(
                f"model(...), input {i}", count_bad(tensor), "finite numbers", "Check how the batch was made."
            )
        if tensor.ndim and tensor.shape[0] == 0:
            raise ConfigurationError(f"model(...), input {i}", "a batch of 0", "at least one sample", "Skip the batch.")
