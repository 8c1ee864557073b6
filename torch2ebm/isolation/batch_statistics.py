"""The statistics of batch norms while values move: those of the values, or those of the feed-forward pass.

A batch norm in train mode normalises by the mean and variance of the batch that it is given, so its prediction is a
function of the whole batch. The running statistics move once a step, in the module's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Statistics = list[tuple[Tensor, Tensor]]


class _BatchNormInterceptor(TorchFunctionMode):
    """Hands every batch norm that would use batch statistics to ``replace``, in the order of the calls."""

    def __init__(self, replace: Callable[..., Tensor]) -> None:
        super().__init__()
        self.replace = replace

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # nn.BatchNorm calls the function as well; one that calls torch.batch_norm itself is not seen
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
    # the signature of functional.batch_norm, so that positional arguments get their names
    return dict(locals())


def statistics_of(batch: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel of a batch."""
    if batch.dtype in (torch.float16, torch.bfloat16):
        batch = batch.float()  # var_mean would return half precision, where batch_norm itself computes in single
    dimensions = [0, *range(2, batch.ndim)]  # all but the channels
    # biased, as what normalises the batch is (Ioffe and Szegedy 2015, algorithm 1); the running variance is not
    variance, mean = torch.var_mean(batch, dimensions, correction=0)
    # torch refuses statistics of another dtype than the weight's ("mixed dtype ... parameter of type Float")
    dtype = mean.dtype if weight is None else weight.dtype
    return mean.to(dtype), variance.to(dtype)


def keeping_statistics(statistics: Statistics) -> TorchFunctionMode:
    """Run batch norms as they are and append each one's batch mean and (biased) variance to ``statistics``."""

    def replace(**call: Any) -> Tensor:
        statistics.append(statistics_of(call["input"].detach(), call["weight"]))
        return functional.batch_norm(**call)

    return _BatchNormInterceptor(replace)


def frozen_statistics(statistics: Statistics) -> TorchFunctionMode:
    """Run batch norms with the statistics that were kept, as constants, and leave the running ones alone."""
    remaining = iter(statistics)  # by order of calls: a node runs the same batch norms, in the same order, each time

    def replace(**call: Any) -> Tensor:
        mean, variance = next(remaining)
        # as in eval mode, which uses the "running" statistics that it is given, and updates none
        return functional.batch_norm(**{**call, "running_mean": mean, "running_var": variance, "training": False})

    return _BatchNormInterceptor(replace)


def live_statistics() -> TorchFunctionMode:
    """Run batch norms with the statistics of what they are given, and leave the running ones alone."""
    return _BatchNormInterceptor(
        lambda **call: functional.batch_norm(**call | {"running_mean": None, "running_var": None})
    )
