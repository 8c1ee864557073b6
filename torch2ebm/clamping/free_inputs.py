"""A module whose inputs are values: it predicts them by what it is given, and they may leave that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class FreeInput(nn.Module):
    """Hands on what it is given. It has a parameter, so that the result is a value: data have none."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, given: Tensor) -> Tensor:
        return given + self.nothing


class _View(nn.Module):
    """The module, behind a value for each free input. Layers, parameters and buffers are its own objects."""

    _call: Callable[..., Any]

    def __init__(self, module: nn.Module, names: Mapping[str, str], call: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_call", call)  # no submodule: its layers are those below, under their own names
        self._names, self._signature = dict(names), inspect.signature(module.forward)
        self._parameters, self._buffers = module._parameters, module._buffers
        self._modules = {**module._modules, **{name: FreeInput() for name in names.values()}}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        for argument, name in self._names.items():
            bound.arguments[argument] = self.get_submodule(name)(bound.arguments[argument])
        return self._call(*bound.args, **bound.kwargs)


def with_free_inputs(module: nn.Module, names: Mapping[str, str]) -> nn.Module:
    """The module with a value node for each free input.

    Args:
        module: It is called as it is, with its own hooks, and nothing of it changes.
        names: From the name of an argument to the name of its node.
    """
    return _View(module, names, module)


def is_current(view: nn.Module, module: nn.Module, names: Sequence[str]) -> bool:
    """Whether a view still has the layers of its module."""
    own = {name: child for name, child in view._modules.items() if name not in names}
    return own.keys() == module._modules.keys() and all(own[name] is module._modules[name] for name in own)
