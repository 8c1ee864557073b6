"""A cut graph is held against the module itself before anybody gets it: outputs, buffers and one backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torch2ebm.algorithms import ZeroDivergence
from torch2ebm.assembly import build_graph
from torch2ebm.capture import Capture, Reference, plain_autograd, real_run, untouched
from torch2ebm.errors import CaptureMismatchError
from torch2ebm.graph import EnergyGraph
from torch2ebm.partition import Granularity
from torch2ebm.state import Call, LossExpansion, OutputLoss


def verified(captured: Capture, granularity: Granularity) -> EnergyGraph:
    """Cut the capture in nodes, and hold them against a real run of the module as it is now.

    Raises :class:`CaptureMismatchError` where an output, a buffer or a parameter's gradient differs. Outputs alone
    would not show a backward that tracing has lost (a custom autograd function, a region without gradients).
    """
    graph = build_graph(captured, granularity)
    tensors = captured.reference.tensors
    device = tensors[0].device if tensors else torch.device("cpu")
    with plain_autograd(), untouched(captured.module, device):
        reference = real_run(captured.module, captured.signature, tensors)
    with plain_autograd(), untouched(captured.module, device):
        call = Call(graph, tensors)
        call.feedforward(keep_graph=True)
        reference.check(captured.module, call.output())
        _check_gradients(graph, call, reference)
    return graph


class _Cotangents(OutputLoss):
    """Gradients of the outputs, from no loss."""

    scale = unit = 1.0

    def __init__(self, delivered: Mapping[str, Tensor]) -> None:
        self.delivered = delivered

    def gradients(self, predictions: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        raise AssertionError("the reverse sweep needs the loss at the feed-forward prediction only")

    def expanded(self, predictions: Mapping[str, Tensor]) -> LossExpansion:
        raise AssertionError("the reverse sweep needs no second derivative")


def _check_gradients(graph: EnergyGraph, call: Call, reference: Reference) -> None:
    if reference.gradients is None:
        return
    delivered: dict[str, Tensor] = {}
    for output, cotangent in zip(graph.outputs, reference.cotangents, strict=True):
        if output.slot is not None and cotangent is not None:
            seen = delivered.get(output.slot)
            delivered[output.slot] = cotangent if seen is None else seen + cotangent
    ours = ZeroDivergence().backward(call, _Cotangents(delivered), retain_graph=False).parameters
    if wrong := _differing(ours, reference.gradients):
        raise CaptureMismatchError(
            f"torch2ebm cannot capture {type(graph.module).__name__}",
            f"another gradient of {', '.join(wrong)}, though the outputs agree",
            "the module's own gradients",
            "Its backward is not that of its forward's operations (a custom autograd function): make the submodule "
            "that holds it one node with nodes=[...].",
        )


def _differing(ours: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> Sequence[str]:
    """Names of the parameters whose gradients differ by more than rounding, relative to the largest gradient."""
    if not real:
        return ()
    largest = max(float(gradient.abs().max()) for gradient in real.values() if gradient.numel())
    tolerance = largest * max(torch.finfo(gradient.dtype).eps for gradient in real.values()) ** 0.5
    return [
        name
        for name, gradient in real.items()
        if gradient.numel() and float((ours.get(name, torch.zeros_like(gradient)) - gradient).abs().max()) > tolerance
    ]
