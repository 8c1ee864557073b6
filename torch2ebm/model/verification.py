"""A cut graph is held against the module itself before anybody gets it: outputs, buffers and one backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torch2ebm.capture.observation import Capture
from torch2ebm.capture.real_run import RealRun, run_once
from torch2ebm.engine.call import Call
from torch2ebm.engine.reverse_sweep import reverse_sweep
from torch2ebm.errors import CaptureMismatchError, NodeEvaluationError, UnsupportedError
from torch2ebm.graph.build import build_graph
from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.graph.granularity import Granularity
from torch2ebm.isolation.module_state import plain_autograd, untouched

DRAWN_AGAIN = 4  # masks of few entries are equal by chance, one time in fifteen on a module that was found at random


def verified(captured: Capture, granularity: Granularity) -> EnergyGraph:
    """Cut the capture in nodes, and hold them against a real run of the module as it is now.

    Raises :class:`CaptureMismatchError` where an output, a buffer or a parameter's gradient differs. Outputs alone
    would not show a backward that tracing has lost (a custom autograd function, a region without gradients).
    """
    graph = build_graph(captured, granularity)
    tensors = captured.reference.tensors
    _check(graph, tensors, run_once(captured.module, captured.signature, tensors))
    if any(node.random for node in graph.order):
        with untouched(captured.module, _device_of(tensors)):
            for seed in range(DRAWN_AGAIN):
                torch.manual_seed(seed)  # of the real run and of the composition: both put it back at their end
                _check(graph, tensors, run_once(captured.module, captured.signature, tensors))
    return graph


def holds_for(captured: Capture, graph: EnergyGraph, tensors: Sequence[Tensor]) -> bool:
    """Whether a graph gives the module's own outputs, buffers and gradients for inputs of other shapes, too."""
    reference = run_once(captured.module, captured.signature, tensors)
    if reference.structure != captured.reference.structure:
        return False
    try:
        _check(graph, tensors, reference)
    except (UnsupportedError, NodeEvaluationError, RuntimeError, ValueError, LookupError, TypeError):
        return False
    return True


def _check(graph: EnergyGraph, tensors: Sequence[Tensor], reference: RealRun) -> None:
    """Raise :class:`CaptureMismatchError` where the composition of the nodes differs from a real run."""
    with plain_autograd(), untouched(graph.module, _device_of(tensors)):
        call = Call(graph, [tensor.detach().clone() for tensor in tensors])
        call.feedforward(keep_graph=True)
        reference.check(graph.module, call.output())
        _check_gradients(graph, call, reference)


def _device_of(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _check_gradients(graph: EnergyGraph, call: Call, reference: RealRun) -> None:
    if reference.gradients is None:
        return
    delivered: dict[str, Tensor] = {}
    for output, cotangent in zip(graph.outputs, reference.cotangents, strict=True):
        if output.slot is not None and cotangent is not None:
            seen = delivered.get(output.slot)
            delivered[output.slot] = cotangent if seen is None else seen + cotangent
    ours = reverse_sweep(call, delivered).gradients.parameters
    trainable = {name: g for name, g in ours.items() if graph.parameters[name].requires_grad}
    if wrong := _differing(trainable, reference.gradients):
        raise CaptureMismatchError(
            f"torch2ebm cannot capture {type(graph.module).__name__}",
            f"another gradient of {', '.join(wrong)}, though the outputs agree",
            "the module's own gradients",
            "Its backward is not that of its forward's operations (a custom autograd function): make the submodule "
            "that holds it one node with nodes=[...].",
        )


def _differing(ours: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> Sequence[str]:
    """Names of the parameters whose gradients differ by more than rounding, relative to the largest gradient.

    One that only one side has is zero on the other: a detach that tracing has lost gives a gradient too many.
    """
    pairs = {
        name: (ours.get(name), real.get(name))
        for name in {**real, **ours}
        if any(g is not None and g.numel() for g in (ours.get(name), real.get(name)))
    }
    sizes = [float(g.abs().max()) for pair in pairs.values() for g in pair if g is not None]
    precisions = [torch.finfo(g.dtype).eps for pair in pairs.values() for g in pair if g is not None]
    tolerance = max(sizes, default=0.0) * max(precisions, default=0.0) ** 0.5
    return [name for name, (a, b) in pairs.items() if float(_distance(a, b)) > tolerance]


def _distance(a: Tensor | None, b: Tensor | None) -> Tensor:
    present = [gradient for gradient in (a, b) if gradient is not None]
    return (present[0] - present[1] if len(present) == 2 else present[0]).abs().max()
