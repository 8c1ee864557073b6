"""What the tape has to know of an operation before it is put there: whether it writes, sums or averages."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch2ebm.common.nested import leaves_of


def function_name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))


# writing in place


def writes_in_place(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    name = function_name(function)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _IN_PLACE or kwargs.get("inplace") is True or "out" in kwargs


# operators that write although their names end in two underscores
_IN_PLACE = frozenset(
    ["__setitem__"]
    + [f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or")]
)


def out_of_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same on a copy: ``add`` for ``add_``, and for what has no such twin itself, given a copy."""
    name = function_name(function)
    if name == "__setitem__":
        return _with_item
    twin: Callable[..., Any] | None = getattr(Tensor, name.removesuffix("_"), None)
    if name.endswith("_") and not name.endswith("__") and twin is not None:
        return twin
    return partial(_on_copy, function)


def _on_copy(function: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return function(tensor.clone(), *args, **kwargs)


def _with_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    copied = tensor.clone()
    copied[index] = value
    return copied


# random numbers

_DRAWS = frozenset(
    {"bernoulli", "binomial", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "normal", "poisson"}
    | {"rand_like", "randint_like", "randn_like", "random", "uniform"}
)


def is_draw_of_its_own(function: Callable[..., Any]) -> bool:
    """Whether it draws numbers that stand for themselves: an action, a noise. They are drawn once a loss."""
    name = function_name(function)
    return name.removesuffix("_") in _DRAWS


# sums and means

_SUMS = frozenset([torch.sum, Tensor.sum, torch.nansum, Tensor.nansum])
_MEANS = frozenset([torch.mean, Tensor.mean, torch.nanmean, Tensor.nanmean])
_OF_CLASSES = frozenset([F.cross_entropy, F.nll_loss])
_OF_ELEMENTS = frozenset(
    [
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.kl_div,
        F.poisson_nll_loss,
        F.gaussian_nll_loss,
        F.soft_margin_loss,
    ]
)


def summed_sizes(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of what the operation sums; empty where it is no sum."""
    if not is_sum(function, args, kwargs):
        return ()
    summed = next((leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)), None)
    return tuple(summed.shape) if summed is not None else ()


def is_sum(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> bool:
    if function in _SUMS or kwargs.get("reduction") == "sum":
        return True
    # a reduction given by position: only where the word occurs is the signature looked up
    if not any(isinstance(argument, str) and argument == "sum" for argument in args):
        return False
    try:
        return inspect.signature(function).bind(*args, **kwargs).arguments.get("reduction") == "sum"
    except (TypeError, ValueError):  # a builtin has no signature
        return False


def target_of(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The target of one of torch's losses, where it is an ordinary tensor."""
    if function not in _OF_CLASSES | _OF_ELEMENTS:
        return None
    target = args[1] if len(args) > 1 else kwargs.get("target")
    return target if isinstance(target, Tensor) else None


def terms_averaged(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> int:
    """How many terms the operation takes the mean of, to one number; 0 where it is no mean that is known here."""
    if not args or not isinstance(args[0], Tensor):
        return 0
    if function in _MEANS:
        return args[0].numel()
    if function not in _OF_CLASSES | _OF_ELEMENTS or "sum" in args or kwargs.get("reduction", "mean") != "mean":
        return 0
    target = args[1] if len(args) > 1 else kwargs.get("target")
    if function in _OF_ELEMENTS or not isinstance(target, Tensor):
        return args[0].numel()
    return target.numel() if not target.is_floating_point() else math.prod(target.shape) // target.shape[-1]


def weighted_entries(losses: Tensor, weights: Tensor) -> Tensor:
    """What a backward on a vector of losses differentiates: their sum, each with the gradient that it was given."""
    return (losses * weights).sum()
