"""A function of tensors, run once and recorded as a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from torch2ebm.common.nested import leaves_of, template_of
from torch2ebm.errors import NodeEvaluationError, first_line
from torch2ebm.isolation.random_numbers import UnknownDrawError, is_draw
from torch2ebm.isolation.torch_modes import TRACING
from torch2ebm.programs.program import Program, Source, keep_used_inputs

_aten = torch.ops.aten
_ALIASES = frozenset([_aten.detach.default, _aten.alias.default])  # without autograd each is its argument
_LIFTS = frozenset([_aten.lift_fresh_copy.default, _aten.lift_fresh.default])  # a number in the code, made a tensor


class NotRecordableError(Exception):
    """The function does something that a program cannot repeat."""


def record_program(function: Callable[[], Any], tensors: Sequence[Tensor]) -> tuple[Program, Any]:
    """Run ``function`` once, on real numbers; returns the program and the result.

    Raises :class:`NotRecordableError` where the result would depend on a tensor that is not among ``tensors``, on a
    number taken out of one, or on fresh random numbers.
    """
    positions = _first_positions(tensors)
    named = [tensors[i] for i in positions]
    graph_module, result = _traced(function, named)
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and is_draw(node.target, node.args, node.kwargs):
            raise NotRecordableError(f"{node.target} draws fresh random numbers")
    used = keep_used_inputs(graph_module)
    sources = _sources(result, {id(tensor): i for tensor, i in zip(named, positions, strict=True)})
    return Program(graph_module, [positions[i] for i in used], sources, template_of(result)), result


def _traced(function: Callable[[], Any], named: Sequence[Tensor]) -> tuple[fx.GraphModule, Any]:
    from torch.fx.experimental.proxy_tensor import make_fx  # it loads sympy

    found: list[Any] = []

    def traced(*inputs: Tensor) -> list[Tensor]:
        found.append(function())
        return [leaf for leaf in leaves_of(found[0]) if isinstance(leaf, Tensor) and not _is_one_of(leaf, named)]

    try:
        with TRACING:
            graph_module = make_fx(traced, tracing_mode="real")(*named)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, UnknownDrawError, NodeEvaluationError, TypeError, ValueError) as error:
        raise NotRecordableError(first_line(error)) from error
    _check_sources(graph_module)
    _check_shapes(graph_module)
    _simplify(graph_module)
    return graph_module, found[0]


def _first_positions(tensors: Sequence[Tensor]) -> list[int]:
    first: dict[int, int] = {}
    for i, tensor in enumerate(tensors):
        first.setdefault(id(tensor), i)
    return list(first.values())


def _is_one_of(tensor: Tensor, named: Sequence[Tensor]) -> bool:
    return any(tensor is each for each in named)


def _sources(result: Any, inputs: Mapping[int, int]) -> list[Source]:
    sources, outputs = [], 0
    for leaf in leaves_of(result):
        if not isinstance(leaf, Tensor):
            sources.append(Source(constant=leaf))
        elif id(leaf) in inputs:
            sources.append(Source(input=inputs[id(leaf)]))
        else:
            sources.append(Source(output=outputs))
            outputs += 1
    return sources


def _check_shapes(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
            continue
        if node.target is not _aten.index.Tensor or any(_is_mask(index) for index in node.args[1]):
            raise NotRecordableError(f"the shape of what {node.target} returns depends on numbers in a tensor")


def _is_mask(index: fx.Node | None) -> bool:
    return index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8)


def _check_sources(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and any(user.target not in _LIFTS for user in node.users):
            tensor = getattr(graph_module, node.target, None)
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
            raise NotRecordableError(
                f"a tensor of shape {shape} comes from outside of the model, its input and the loss"
            )


def _simplify(graph_module: fx.GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target in _ALIASES:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    for node in graph_module.graph.nodes:
        node.meta.clear()  # it holds the tensors of the recording


def alias_pattern(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Which of the tensors are one and the same."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(tensor), i) for i, tensor in enumerate(tensors))
