"""One call and its loss, as an algorithm's ``backward`` gets them: for trying out an extension without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.algorithms.given import given_to
from torch2ebm.engine.call import Call
from torch2ebm.isolation.module_state import untouched
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.model.arguments import as_arguments
from torch2ebm.model.energy_model import EnergyModel, convert


def call_and_loss(
    module: nn.Module, inputs: Any, loss_fn: Callable[[Any], Tensor], loss_reduction: str = "mean"
) -> tuple[Call, OutputLoss]:
    """What :meth:`Algorithm.backward` gets for one batch: the call, after its feed-forward pass, and the loss.

    Nothing is trained. Buffers, ``.grad`` and random number generators are left as they were.

    Args:
        module: A module, or a converted model (``torch2ebm.convert(module, nodes=...)`` chooses its nodes).
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        loss_fn: From the model's output to a loss of no dimension.
        loss_reduction: ``"mean"`` for a loss that is a mean over the batch, ``"sum"`` to take it as it is written.

    Returns:
        The call, with ``keep_graph=True``: every node has a value and a pass. And the loss as a function of the
        predictions of the outputs.

    Raises:
        LossNotRecordedError: for a loss that cannot be evaluated again at other predictions.

    Example:
        >>> import torch
        >>> from torch2ebm.extend import call_and_loss
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
        >>> (hidden,), (output,) = [node.slots for node in call.graph.nodes.values()]
        >>> call.values[hidden].shape, loss.delivered[output].shape
        (torch.Size([5, 8]), torch.Size([5, 3]))
    """
    model = module if isinstance(module, EnergyModel) else convert(module)
    args, kwargs = as_arguments(inputs)
    parameters = list(model.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    with untouched(model, device):
        return given_to(lambda given: loss_fn(model.torch2ebm.run(given, args, kwargs)), trained, loss_reduction)
