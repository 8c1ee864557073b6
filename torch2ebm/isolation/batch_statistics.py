"""Batch norm statistics: recorded in the feed-forward pass and, where frozen, used again while values move."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Statistics = list[tuple[Tensor, Tensor]]


class _BatchNormInterceptor(TorchFunctionMode):
    """Call ``replace`` in place of every batch norm that would use batch statistics, in the order of the calls."""

    def __init__(self, replace: Callable[..., Tensor]) -> None:
        super().__init__()
        self.replace = replace

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.batch_norm:
            call = _batch_norm_arguments(*args, **kwargs)
            if call["training"]:
                return self.replace(**call)
        return func(*args, **kwargs)


def _batch_norm_arguments(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Any]:
    return dict(locals())  # the signature of functional.batch_norm binds positions to names


def keeping_statistics(statistics: Statistics) -> TorchFunctionMode:
    """Run batch norms as they are and append each one's batch mean and (biased) variance to ``statistics``."""

    def replace(**call: Any) -> Tensor:
        batch = call["input"].detach()
        # torch computes the statistics of half precision in float32, too
        if batch.dtype in (torch.float16, torch.bfloat16):
            batch = batch.float()
        dimensions = [0, *range(2, batch.ndim)]  # all but the channels
        # biased, as batch norm normalises; only its running variance is unbiased
        variance, mean = torch.var_mean(batch, dimensions, correction=0)
        # torch refuses running statistics of another dtype than the weight's
        dtype = mean.dtype if call["weight"] is None else call["weight"].dtype
        statistics.append((mean.to(dtype), variance.to(dtype)))
        return functional.batch_norm(**call)

    return _BatchNormInterceptor(replace)


def frozen_statistics(statistics: Statistics) -> TorchFunctionMode:
    """Run batch norms with the recorded statistics, which then are constants, and leave the running ones alone."""
    remaining = iter(statistics)

    def replace(**call: Any) -> Tensor:
        mean, variance = next(remaining)
        # training=False: the given statistics are constants, and no running one moves
        return functional.batch_norm(**{**call, "running_mean": mean, "running_var": variance, "training": False})

    return _BatchNormInterceptor(replace)
