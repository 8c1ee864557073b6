"""Programs: what a function does to tensors, recorded once as a list of ATen calls and run again on others.

A program runs no Python of ours and builds no autograd graph. While recording, tensors are known by identity: those
that the caller names become inputs wherever the function finds them, in a module, a buffer or a closure.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from torch2ebm.common.nested import fill
from torch2ebm.isolation.torch_modes import TRACING
from torch2ebm.programs.compiler import compiled_by_torch, not_compiled


@dataclass(frozen=True)
class Source:
    """Where a leaf of a program's result comes from: one of its outputs, an input as it stands, or a constant."""

    output: int = -1
    input: int = -1
    constant: Any = None

    @property
    def is_constant(self) -> bool:
        return self.output < 0 and self.input < 0

    def leaf(self, outputs: Sequence[Any], tensors: Sequence[Any]) -> Any:
        if self.output >= 0:
            return outputs[self.output]
        return tensors[self.input] if self.input >= 0 else self.constant


class Program:
    """One recorded function of tensors.

    Attributes:
        result: The structure of what the function returned, without its leaves.
        size: How many leaves that has.
        is_compiled: Whether the compiler has been asked to make it faster.
    """

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[int], sources: list[Source], result: Any):
        self._graph_module, self._inputs, self._sources, self.result = graph_module, inputs, sources, result
        self._run: Callable[..., Sequence[Tensor]] = graph_module.forward
        self.is_compiled = False

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those that it takes, of its first inputs alone: the others come late."""
        return [tensors[i] for i in self._inputs if i < len(tensors)]

    def leaves(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The leaves of the function's result for other tensors, given in the order they had when recording."""
        with torch.no_grad():
            outputs = self._run(*[tensors[i] for i in self._inputs])
        return [source.leaf(outputs, tensors) for source in self._sources]

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        return fill(self.result, self.leaves(tensors))

    def __len__(self) -> int:
        """How many operations it calls."""
        return len(self._graph_module.graph.nodes) - len(self._inputs) - 1

    def repeated(self, rounds: int, count: int, first: int) -> Program:
        """Several rounds as one program: tensors among the first ``count`` leaves of one go into the next.

        They are the inputs from number ``first`` on. The new program's leaves are these, as the last round leaves
        them, and then the others of every round.
        """
        template, graph = self._graph_module.graph, fx.Graph()
        placeholders = template.find_nodes(op="placeholder")
        positions = sorted({*self._inputs, *[source.input for source in self._sources if source.input >= 0]})
        inputs = {i: graph.placeholder(f"tensor_{i}") for i in positions}
        moving = [i for i, source in enumerate(self._sources[:count]) if not source.is_constant]
        current: Any = dict(inputs)
        others: list[fx.Node | Source] = []
        for _ in range(rounds):
            copies: Any = dict(zip(placeholders, [current[i] for i in self._inputs], strict=True))
            returned: Any = graph.graph_copy(template, copies)
            found = [source if source.is_constant else source.leaf(returned, current) for source in self._sources]
            current |= {first + place: found[i] for place, i in enumerate(moving)}
            others += found[count:]
        leaves = [*found[:count], *others]
        known = {node: Source(input=i) for i, node in inputs.items()}
        outputs = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node) and leaf not in known))
        known |= {node: Source(output=i) for i, node in enumerate(outputs)}
        graph.output(outputs)
        sources = [known[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        module = fx.GraphModule(self._graph_module, graph)
        used = [positions[i] for i in keep_used_inputs(module)]
        return Program(module, used, sources, list(range(len(sources))))

    def compile(self) -> None:
        """Hand the program to torch's compiler; where that fails or computes otherwise, warn, and go on without."""
        if not self.is_compiled:
            self.is_compiled, self._run = True, self._first_compiled

    def _first_compiled(self, *inputs: Tensor) -> Sequence[Tensor]:
        self._run = self._graph_module.forward
        if not any(each.is_complex() or each.is_neg() for each in inputs):  # the compiler makes no code for these
            with TRACING:
                reason, compiled = compiled_by_torch(self._graph_module, inputs)
            if reason:
                warnings.warn(not_compiled(reason), stacklevel=2)
            else:
                self._run = compiled
        return self._run(*inputs)


def keep_used_inputs(graph_module: fx.GraphModule) -> list[int]:
    used = []
    for i, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        if node.users:
            used.append(i)
        else:
            graph_module.graph.erase_node(node)
    graph_module.recompile()
    return used
