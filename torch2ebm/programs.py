"""Programs: what a function does to tensors, recorded once as a list of ATen calls and run again on others.

A program runs no Python of ours and builds no autograd graph. While recording, tensors are known by identity: those
that the caller names become inputs wherever the function finds them, in a module, a buffer or a closure.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from torch2ebm.draws import UnknownDrawError, is_draw
from torch2ebm.errors import CompilationWarning, NodeEvaluationError
from torch2ebm.structure import fill, leaves_of, template_of

_aten = torch.ops.aten
_ALIASES = frozenset([_aten.detach.default, _aten.alias.default])  # without autograd each is its argument
_LIFTS = frozenset([_aten.lift_fresh_copy.default, _aten.lift_fresh.default])  # a number in the code, made a tensor


class NotRecordableError(Exception):
    """The function does something that a program cannot repeat."""


@dataclass(frozen=True)
class _Source:
    """Where a leaf of a program's result comes from: one of its outputs, an input as it stands, or a constant."""

    output: int = -1
    input: int = -1
    constant: Any = None

    def leaf(self, outputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> Any:
        if self.output >= 0:
            return outputs[self.output]
        return tensors[self.input] if self.input >= 0 else self.constant


class Program:
    """One recorded function of tensors.

    Attributes:
        result: The structure of what the function returned, without its leaves.
        is_compiled: Whether ``torch.compile`` has been asked to make it faster.
    """

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[int], sources: list[_Source], result: Any):
        self._graph_module, self._inputs, self._sources, self.result = graph_module, inputs, sources, result
        self._run: Callable[..., Sequence[Tensor]] = graph_module.forward
        self.is_compiled = False

    def leaves(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The leaves of the function's result for other tensors, given in the order they had when recording."""
        with torch.no_grad():
            outputs = self._run(*[tensors[i] for i in self._inputs])
        return [source.leaf(outputs, tensors) for source in self._sources]

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        return fill(self.result, self.leaves(tensors))

    def compile(self) -> None:
        """Hand the program to ``torch.compile``; where that fails, warn and go on with the recorded calls."""
        if self.is_compiled:
            return
        self.is_compiled = True
        compiled = torch.compile(self._graph_module, dynamic=False, fullgraph=True)

        def first(*inputs: Tensor) -> Sequence[Tensor]:
            self._run = self._graph_module.forward
            copies = [each.clone() for each in inputs]  # a compiler that fails half-way leaves the inputs alone
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the compiler about itself
                    compiled(*copies)
            except Exception as error:  # whatever a compiler may raise
                warnings.warn(not_compiled(f"torch.compile failed: {first_line(error)}"), stacklevel=2)
            else:
                self._run = compiled
            return self._run(*inputs)

        self._run = first


def not_compiled(reason: str) -> CompilationWarning:
    return CompilationWarning(f"compile=True: {reason}. The inference goes on without, with the same numbers.")


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def record(function: Callable[[], Any], tensors: Sequence[Tensor]) -> tuple[Program, Any]:
    """Run ``function`` once, on real numbers; returns the program and the result.

    Raises :class:`NotRecordableError` where the result would depend on a tensor that is not among ``tensors``, on a
    number taken out of one, or on fresh random numbers.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # it loads sympy

    positions = _first_positions(tensors)
    named = [tensors[i] for i in positions]
    found: list[Any] = []

    def traced(*inputs: Tensor) -> list[Tensor]:
        found.append(function())
        return [leaf for leaf in leaves_of(found[0]) if isinstance(leaf, Tensor) and not _is_one_of(leaf, named)]

    try:
        graph_module = make_fx(traced, tracing_mode="real")(*named)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, UnknownDrawError, NodeEvaluationError, TypeError, ValueError) as error:
        raise NotRecordableError(first_line(error)) from error
    _check(graph_module)
    _simplify(graph_module)
    used = _keep_used_inputs(graph_module)
    sources = _sources(found[0], {id(tensor): i for tensor, i in zip(named, positions, strict=True)})
    program = Program(graph_module, [positions[i] for i in used], sources, template_of(found[0]))
    return program, found[0]


def _first_positions(tensors: Sequence[Tensor]) -> list[int]:
    first: dict[int, int] = {}
    for i, tensor in enumerate(tensors):
        first.setdefault(id(tensor), i)
    return list(first.values())


def _is_one_of(tensor: Tensor, named: Sequence[Tensor]) -> bool:
    return any(tensor is each for each in named)


def _sources(result: Any, inputs: Mapping[int, int]) -> list[_Source]:
    sources, outputs = [], 0
    for leaf in leaves_of(result):
        if not isinstance(leaf, Tensor):
            sources.append(_Source(constant=leaf))
        elif id(leaf) in inputs:
            sources.append(_Source(input=inputs[id(leaf)]))
        else:
            sources.append(_Source(output=outputs))
            outputs += 1
    return sources


def _check(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and is_draw(node.target):
            raise NotRecordableError(f"{node.target} draws fresh random numbers")
        if node.op == "get_attr" and any(user.target not in _LIFTS for user in node.users):
            tensor = getattr(graph_module, node.target, None)
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
            raise NotRecordableError(f"a tensor of shape {shape} comes from outside of the model, its input and the loss")


def _simplify(graph_module: fx.GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target in _ALIASES:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()


def _keep_used_inputs(graph_module: fx.GraphModule) -> list[int]:
    used = []
    for i, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        if node.users:
            used.append(i)
        else:
            graph_module.graph.erase_node(node)
    graph_module.recompile()
    return used


def alias_pattern(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Which of the tensors are one and the same."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(tensor), i) for i, tensor in enumerate(tensors))
