"""Which operations are activations: element by element, without parameters, of one argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
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
_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.Hardsigmoid, nn.Hardtanh, nn.GELU, nn.SiLU, nn.Softplus, nn.LeakyReLU),
    *(nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Softsign, nn.Hardswish, nn.LogSigmoid, nn.Tanhshrink, nn.Identity),
)
HOLOMORPHIC = frozenset(["tanh", "sigmoid", "softplus", "silu", "identity"])


def activation_kind(target: Any) -> str | None:
    """The name of an activation, as ``torch`` spells the function without underscores; None for all else.

    ``target`` is a module, a function, an operator of ``torch.export``, or the name of a tensor method.

    Example:
        >>> activation_kind(nn.LeakyReLU()), activation_kind(torch.clamp), activation_kind(nn.PReLU())
        ('leakyrelu', 'clamp', None)
    """
    if isinstance(target, nn.Module):
        return type(target).__name__.lower() if type(target) in _MODULES else None
    name = operation_name(target)
    return name.replace("_", "") if name in _FUNCTIONS and _is_torchs(name, target) else None


def operation_name(target: Any) -> str:
    """What ``torch`` calls a function, an operator or a tensor method."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _is_torchs(name: str, target: Any) -> bool:
    if isinstance(target, (str, torch._ops.OpOverload)):
        return True
    return any(getattr(place, name, None) is target for place in (torch, functional, Tensor))
