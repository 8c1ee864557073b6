"""Sums of the gradients of parameters and clamped inputs, node by node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch2ebm.engine.call import Call, NodePass
from torch2ebm.graph.energy_graph import Node


@dataclass
class GradientSum:
    """Gradients of parameters, shared ones summed, and of clamped inputs."""

    parameters: dict[str, Tensor] = field(default_factory=dict)
    clamped: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self,
        call: Call,
        evaluated: NodePass,
        cotangents: Sequence[Tensor | None],
        wrt: Sequence[Tensor] = (),
        retain_graph: bool = False,
    ) -> Sequence[Tensor | None]:
        """Add the node's share, and return the products with ``wrt`` from the same pass."""
        # a shared parameter comes up in each of its nodes, where its gradients add up
        parameters = {name: p for name in evaluated.node.parameters if (p := call.parameters[name]).requires_grad}
        clamped = call.clamped_inputs(evaluated.node)
        # one product for all: a second one would walk the graph of the node again, which the first has freed
        products = evaluated.pullback(
            cotangents, [*wrt, *parameters.values(), *clamped.values()], retain_graph=retain_graph
        )
        found = iter(products[len(wrt) :])
        for name, parameter in parameters.items():
            product = next(found)
            # zero and not None: the node is part of the graph, even where no error has reached it
            _add(self.parameters, name, torch.zeros_like(parameter) if product is None else product)
        for name in clamped:
            product = next(found)
            if product is not None:  # inputs may stay without a gradient, as in autograd
                _add(self.clamped, name, product)
        return products[: len(wrt)]

    def add_zeros(self, call: Call, node: Node) -> None:
        for name in node.parameters:
            parameter = call.parameters[name]
            if parameter.requires_grad and name not in self.parameters:
                self.parameters[name] = torch.zeros_like(parameter)


def _add(total: dict[str, Tensor], name: str, product: Tensor) -> None:
    # not in place: of a sum the product may be the cotangent itself, which others read
    total[name] = total[name] + product if name in total else product


@dataclass(frozen=True)
class Swept:
    """The result of one sweep: gradients, and minus the error of each slot that has one."""

    gradients: GradientSum = field(default_factory=GradientSum)
    deltas: dict[str, Tensor] = field(default_factory=dict)
