"""What a program takes for granted beside its inputs: settings of torch, of the thread and of called submodules."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch2ebm.common.nested import signature
from torch2ebm.engine.call import Call
from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.isolation.opaque_state import OpaqueState
from torch2ebm.isolation.random_numbers import RandomState
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.programs.cache import Programs

PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, slice, type(Ellipsis))
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def fixed_tensors(programs: Programs, call: Call, loss: OutputLoss | None) -> tuple[Hashable, list[Tensor]] | None:
    """What of the loss stays from call to call, and the tensors of call and loss; None, with a warning, for some."""
    on_loss = (None, []) if loss is None else loss.program_inputs()
    if on_loss is None:
        programs.warn(
            "the loss is no composition of torch functions (an EnergyLoss of more than these, a write in place), or "
            "joins several calls"
        )
        return None
    if any(isinstance(each, OpaqueState) and each.moves for each in call.environment.values()):
        programs.warn("a module that is evaluated as a whole changes its own state in each call")
        return None
    return on_loss[0], [*call.held(), *on_loss[1]]


def surroundings(call: Call) -> Hashable:
    """What is set for process, thread or parts of the module, and stands in a program or in its compiled code."""
    device = call.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    parts = call.graph.once(surroundings, lambda: tuple(_whole_modules(call.graph)))
    settings = tuple([_settings(part) for part in parts])
    numbers = tuple([(name, _told_by(each)) for name, each in call.environment.items() if not isinstance(each, Tensor)])
    return autocast, torch.get_default_dtype(), deterministic, torch.get_num_threads(), settings, numbers


def _told_by(number: Any) -> Hashable:
    """What tells a number of the run from another, which a program would be stale for; an object may always differ."""
    if isinstance(number, PLAIN):
        return signature(number)
    if isinstance(number, RandomState):
        return RandomState  # what is drawn from it is an input of the program
    if isinstance(number, OpaqueState):
        return OpaqueState  # the settings of its module are looked at
    return number if isinstance(number, (type, *_FUNCTIONS)) else object()


def _whole_modules(graph: EnergyGraph) -> Iterator[nn.Module]:
    """Those that nodes call as they are; of the others, the sequence of operations says all."""
    called = [getattr(operation.target, "opaque_module", None) for node in graph.order for operation in node.operations]
    return (part for module in called if module is not None for part in module.modules())


def _settings(module: nn.Module) -> Hashable:
    """Its attributes that are no tensors, a dropout's probability for one, and what config objects hold."""
    own = [(name, value) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
    return tuple([(name, _content(value, _DEPTH)) for name, value in own])


_DEPTH = 4  # of objects in objects


def _content(value: Any, depth: int) -> Hashable:
    """What tells an attribute from what it was; a tensor, an array or a module is told by being itself."""
    if isinstance(value, PLAIN):
        return signature(value)
    if isinstance(value, (type, *_FUNCTIONS)):
        return value
    if not depth:
        return id(value)
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, (Tensor, nn.Module)):
        return id(value)
    if isinstance(value, Mapping):
        return tuple([(_content(key, depth), _content(each, depth - 1)) for key, each in value.items()])
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return type(value), tuple([_content(each, depth - 1) for each in value])
    names = getattr(value, "__dict__", None)
    return id(value) if names is None else (type(value), _content(dict(names), depth - 1))
