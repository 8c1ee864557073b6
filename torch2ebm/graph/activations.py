"""Which operations are activations: element by element, without parameters, of one argument."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch2ebm.graph.energy_graph import EnergyGraph, Node


def is_activation(node: Node) -> bool:
    """Whether the node is an activation and nothing else."""
    if len(node.operations) != 1 or len(node.reads) != 1 or node.parameters or len(node.slots) != 1:
        return False
    return activation_kind(node.operations[0].target) is not None and not node.constants


def kind_of(node: Node) -> str:
    return activation_kind(node.operations[0].target) or ""


_FUNCTIONS = frozenset(
    [
        *("relu", "relu6", "tanh", "sigmoid", "hardsigmoid", "hardtanh", "clamp", "clamp_min", "clamp_max", "clip"),
        *("gelu", "silu", "softplus", "leaky_relu", "elu", "selu", "celu", "mish", "softsign", "hardswish"),
        *("logsigmoid", "tanhshrink"),
    ]
)
HOLOMORPHIC = frozenset(["tanh", "sigmoid", "softplus", "silu", "identity"])

# operations whose derivative jumps, by name without underscores and dimensions
_KINKED = frozenset(
    [
        *("relu", "relu6", "leakyrelu", "prelu", "rrelu", "hardtanh", "hardsigmoid", "hardswish", "hardshrink"),
        *("softshrink", "threshold", "clamp", "clampmin", "clampmax", "clip", "abs", "absolute", "maximum", "minimum"),
        *("max", "min", "amax", "amin", "fmax", "fmin", "median", "nanmedian", "mode", "kthvalue", "topk", "sort"),
        *("argsort", "quantile", "nanquantile", "cummax", "cummin", "aminmax", "where", "maskedfill", "sign", "round"),
        *("floor", "ceil", "trunc", "frac", "fmod", "remainder", "heaviside", "maxpool", "adaptivemaxpool"),
        *(
            "fractionalmaxpool",
            "maxunpool",
            "rnnrelu",
            "rnnrelucell",
            "norm",
            "vectornorm",
            "cdist",
            "celu",
            "copysign",
        ),
    ]
)


def may_have_kinks(graph: EnergyGraph) -> bool:
    """Whether some operation's derivative jumps, as a ReLU's does; what cannot be looked into may have such a one."""
    return any(_is_kinked(each.target) for node in graph.nodes.values() for each in node.operations)


def _is_kinked(target: Any) -> bool:
    name = re.sub(r"\dd$", "", operation_name(target)).replace("_", "")  # max_pool2d: maxpool
    return name in _KINKED or not (isinstance(target, str) or _is_of_torch(target))


def _is_of_torch(target: Any) -> bool:
    package = str(getattr(target, "__module__", "")).partition(".")[0]
    return package in ("torch", "_operator", "math") and not isinstance(target, nn.Module)


def activation_kind(target: Any) -> str | None:
    """The name of an activation, as ``torch`` spells the function without underscores; None for all else.

    ``target`` is a function or the name of a tensor method.

    Example:
        >>> activation_kind(functional.leaky_relu), activation_kind("clamp"), activation_kind(functional.prelu)
        ('leakyrelu', 'clamp', None)
    """
    name = operation_name(target)
    return name.replace("_", "") if name in _FUNCTIONS and _is_torchs(name, target) else None


def operation_name(target: Any) -> str:
    """What ``torch`` calls a function or a tensor method."""
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _is_torchs(name: str, target: Any) -> bool:
    if isinstance(target, str):
        return True
    return any(getattr(place, name, None) is target for place in (torch, functional, Tensor))
