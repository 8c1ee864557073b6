"""Which operations are activations: element by element, without parameters, of one argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torch2ebm.graph.energy_graph import Node


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
