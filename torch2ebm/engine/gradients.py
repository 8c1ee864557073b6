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
    """Gradients of parameters, shared ones summed, and of clamped inputs, added up node by node.

    What is added is taken as it is: give cotangents in the scale of ``.grad`` (``OutputLoss.scale`` brings them there).

    Attributes:
        parameters: By qualified name, in the parameter's shape, summed over the batch.
        clamped: By name of the clamped input, in its shape; :meth:`Call.input_gradients` takes it.

    Example:
        The examples of the methods go on from this one.

        >>> import torch
        >>> from torch2ebm.extend import GradientSum, call_and_loss
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
        >>> gradients = GradientSum()
        >>> gradients.parameters
        {}
    """

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
        """Add one node's share, by one vector-Jacobian product.

        Args:
            call: The call that the pass is of.
            evaluated: A pass of the node.
            cotangents: One for each slot of the node, in the shape of its prediction; None is zero.
            wrt: Leaves whose products are wanted from the same pass, for example ``evaluated.inputs``.
            retain_graph: Whether the pass will be used again.

        Returns:
            The products with ``wrt``: what the node sends to its parents. None is zero.

        Example:
            >>> last = call.passes["2"]
            >>> (message,) = gradients.add(call, last, [torch.ones(5, 3)], last.inputs)
            >>> message.shape, gradients.parameters["2.bias"]
            (torch.Size([5, 8]), tensor([5., 5., 5.]))
        """
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
        """Give the node's parameters a gradient of zero where they have none: no error has reached it.

        Args:
            call: The call whose parameters they are.
            node: One of ``call.graph.nodes``.

        Example:
            >>> gradients.add_zeros(call, call.graph.nodes["0"])
            >>> gradients.parameters["0.bias"]
            tensor([0., 0., 0., 0., 0., 0., 0., 0.])
        """
        for name in node.parameters:
            parameter = call.parameters[name]
            if parameter.requires_grad and name not in self.parameters:
                self.parameters[name] = torch.zeros_like(parameter)


def _add(total: dict[str, Tensor], name: str, product: Tensor) -> None:
    # not in place: of a sum the product may be the cotangent itself, which others read
    total[name] = total[name] + product if name in total else product


@dataclass(frozen=True)
class Swept:
    """What a sweep makes of the gradients that autograd delivered.

    Attributes:
        gradients: Of parameters and clamped inputs, in the scale of what was delivered.
        deltas: Minus the error of each slot that has one, in the shape of its value.

    Example:
        >>> import torch
        >>> from torch2ebm.extend import call_and_loss, reverse_sweep
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
        >>> swept = reverse_sweep(call, loss.delivered)
        >>> len(swept.deltas), swept.gradients.parameters["0.weight"].shape
        (2, torch.Size([8, 4]))
    """

    gradients: GradientSum = field(default_factory=GradientSum)
    deltas: dict[str, Tensor] = field(default_factory=dict)
