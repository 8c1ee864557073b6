"""What a program takes for granted beside its inputs: settings of torch, of the thread and of called submodules."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.common.nested import leaves_of, signature
from torch2ebm.engine.call import Call
from torch2ebm.graph.energy_graph import EnergyGraph
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
        programs.warn("the loss is no composition of torch functions (an EnergyLoss, a write in place)")
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
    return number if isinstance(number, (type, *_FUNCTIONS)) else object()


def _whole_modules(graph: EnergyGraph) -> Iterator[nn.Module]:
    """Those that nodes call as they are; of the others, the sequence of operations says all."""
    called = [getattr(operation.target, "opaque_module", None) for node in graph.order for operation in node.operations]
    return (part for module in called if module is not None for part in module.modules())


def _settings(module: nn.Module) -> Hashable:
    """Its attributes that are no tensors and no objects, a dropout's probability for one."""
    own = [(name, value) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
    return tuple(
        [(name, signature(value)) for name, value in own if all(isinstance(e, PLAIN) for e in leaves_of(value))]
    )
