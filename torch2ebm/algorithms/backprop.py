"""Ordinary autograd as one more algorithm: the reference for all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.engine.call import Call
from torch2ebm.engine.results import InferenceState, LocalGradients
from torch2ebm.loss.output_loss import OutputLoss


@dataclass(frozen=True)
class Backprop(Algorithm):
    """Autograd through the whole model at once; ``state.error`` is minus backprop's delta of every node.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.Backprop()
        Backprop()
    """

    reevaluates_loss = False

    def forward(self, call: Call) -> None:
        call.feedforward(keep_graph=True, cut=False)  # uncut: this alone is not local, one graph runs through all nodes

    def backward(self, call: Call, kept: None, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        parameters = {name: p for name, p in call.parameters.items() if p.requires_grad}
        values = {slot: value for slot, value in call.values.items() if value.requires_grad}
        # autograd delivers nothing for an output that the loss does not read
        outputs = [slot for slot in loss.delivered if slot in values]
        # one run for parameters, inputs and values: a second one would walk the same graph again
        products = torch.autograd.grad(
            [values[slot] for slot in outputs],
            [*parameters.values(), *call.tensors, *values.values()],
            [loss.delivered[slot] for slot in outputs],
            retain_graph=retain_graph,
            allow_unused=True,  # a parameter without a path to the loss keeps its .grad, as in plain torch
        )
        found = iter(products)
        gradients = {name: product for name in parameters if (product := next(found)) is not None}
        of_inputs = [next(found) for _ in call.tensors]
        deltas = {slot: product for slot in values if (product := next(found)) is not None}
        predictions = {slot: value.detach() for slot, value in call.values.items()}
        # e = -delta, of the loss summed over samples: unit is B for a mean
        state = InferenceState(call.graph, call.batch_size, predictions, deltas, -loss.unit)
        return LocalGradients(gradients, of_inputs, state)
