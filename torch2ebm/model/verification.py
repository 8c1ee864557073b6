"""A cut graph is held against the module's own run before anybody gets it: outputs, and one backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch2ebm.capture.behind import replaced_parameters
from torch2ebm.capture.functions import is_among, written_parameters
from torch2ebm.capture.observation import is_live
from torch2ebm.capture.run import Run
from torch2ebm.common.nested import leaves_of
from torch2ebm.engine.call import Call
from torch2ebm.engine.reverse_sweep import reverse_sweep
from torch2ebm.errors import CaptureMismatchError
from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.isolation.module_state import plain_autograd, untouched


def verify(graph: EnergyGraph, run: Run, device: torch.device, swapped: Mapping[str, Tensor]) -> None:
    """Hold the composition of the nodes against the run.

    Raises:
        CaptureMismatchError: where an output or a parameter's gradient differs. Outputs alone would not show a backward
            that the graph has lost.
    """
    with plain_autograd(), untouched(graph.module, device):
        call = Call(graph, run, device, 1, swapped)
        call.feedforward(keep_graph=True)
        real = _returned(graph, run)
        _check_outputs(graph, run, real, call.output())
        _check_gradients(graph, call, run, real)


def same_by_cuts(graph: EnergyGraph, run: Run, device: torch.device, swapped: Mapping[str, Tensor]) -> bool:
    """Whether what a run has left at its cuts gives the values and gradients of the composition of the nodes."""
    delivered = {
        reference.slot: uneven(leaf)
        for leaf, reference in zip(_returned(graph, run), graph.outputs, strict=True)
        if reference.slot is not None and is_live(leaf) and not leaf.is_nested
    }
    cut, cut_values = swept(graph, run, device, swapped, delivered)
    run.followed = False
    composed, composed_values = swept(graph, run, device, swapped, delivered)
    run.followed = True
    return not differing(cut, composed) and all(same(v, composed_values[slot]) for slot, v in cut_values.items())


def swept(
    graph: EnergyGraph,
    run: Run,
    device: torch.device,
    swapped: Mapping[str, Tensor],
    delivered: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of trainable parameters by one reverse sweep, and all values; the run can be used again."""
    left = dict(run.leaves), dict(run.predictions), dict(run.normalised), list(run.hot)
    with plain_autograd(), untouched(graph.module, device):
        call = Call(graph, run, device, 1, swapped)
        call.feedforward(keep_graph=True)
        run.leaves, run.predictions, run.normalised, run.hot = left
        gradients = reverse_sweep(call, delivered, retain_graph=True).gradients.parameters
    trainable = {name: g for name, g in gradients.items() if call.parameters[name].requires_grad}
    return trainable, {slot: value.detach() for slot, value in call.values.items()}


def check_opaque(call: Call) -> None:
    """Hold the outputs of a call that were computed again against the run's, where some module is evaluated as a whole.

    Raises:
        CaptureMismatchError: where they differ: what the module reads is no state of it that could be put back.
    """
    if not call.run.followed:
        _check_outputs(call.graph, call.run, _returned(call.graph, call.run), call.output())


def _returned(graph: EnergyGraph, run: Run) -> list[Any]:
    """The leaves of the output, and what else may reach the loss; None where this run has none of it."""
    return [*leaves_of(run.output), *(run.kept.get(number) for number in graph.held)]


def _check_outputs(graph: EnergyGraph, run: Run, real: Sequence[Any], ours: Sequence[Any]) -> None:
    wrong = [
        f"output {i}"
        for i, reference in enumerate(graph.outputs)
        if reference.slot is not None and real[i] is not None and not same(ours[i], real[i])
    ]
    if wrong:
        raise CaptureMismatchError(
            f"torch2ebm cannot capture {type(graph.module).__name__}",
            f"another result in {', '.join(wrong)}",
            "the module's own outputs",
            _written_between(graph, run)
            or "Its forward does something that no recorded operation shows (a view written in place, the order of "
            "random draws): make that submodule one node with nodes=[...].",
        )


def same(ours: Any, real: Any) -> bool:
    if not isinstance(ours, Tensor) or ours.dtype != real.dtype or ours.layout is not real.layout:
        return False
    if real.is_nested:
        return len(ours.unbind()) == len(real.unbind()) and all(map(same, ours.unbind(), real.unbind()))
    if ours.layout is not torch.strided:
        ours, real = ours.to_dense(), real.to_dense()
    if ours.shape != real.shape:
        return False
    if not (real.is_floating_point() or real.is_complex()):
        return torch.equal(ours, real)
    # Not equal: accelerators add in no fixed order. On the CPU the same operations give the same bits.
    tolerance = 16 * torch.finfo(real.dtype).eps
    return torch.allclose(ours, real.detach(), rtol=tolerance, atol=tolerance, equal_nan=True)


def _check_gradients(graph: EnergyGraph, call: Call, run: Run, real: Sequence[Any]) -> None:
    """A fixed, uneven gradient of the outputs, through the run's own autograd graph and through the nodes."""
    cotangents: dict[int, tuple[Tensor, Tensor]] = {}  # an output returned twice gets one
    delivered: dict[str, Tensor] = {}
    for leaf, reference in zip(real, graph.outputs, strict=True):
        if reference.slot is not None and is_live(leaf) and id(leaf) not in cotangents and not leaf.is_nested:
            cotangents[id(leaf)] = leaf, uneven(leaf)
            delivered[reference.slot] = cotangents[id(leaf)][1]
    trainable = {name: p for name, p in call.parameters.items() if p.requires_grad}
    if not cotangents or not trainable:
        return
    outputs, directions = zip(*cotangents.values(), strict=True)
    try:
        reference_gradients = _through_the_run(run, outputs, directions, trainable)
    except RuntimeError:  # an operation without a backward: then there are no gradients to be held against
        return
    ours = reverse_sweep(call, delivered).gradients.parameters
    if wrong := differing({n: g for n, g in ours.items() if n in trainable}, reference_gradients):
        raise CaptureMismatchError(
            f"torch2ebm cannot capture {type(graph.module).__name__}",
            f"another gradient of {', '.join(wrong)}, though the outputs agree",
            "the module's own gradients",
            _written_between(graph, run)
            or "Its backward is not that of its forward's operations: make the submodule that holds it one node with "
            "nodes=[...].",
        )


def _written_between(graph: EnergyGraph, run: Run) -> str:
    """The remedy where forward has changed what it had read; empty where it has not."""
    read = [tensor for i, (tensor, _) in enumerate(run.originals) if i in run.copied]
    names = [f"buffer '{name}'" for name, buffer in graph.module.named_buffers() if is_among(buffer, read)]
    written = [*written_parameters(run.records or ()), *replaced_parameters(run.effects)]
    names += [f"parameter '{name}'" for name in dict.fromkeys(written)]
    if not names and graph.opaque:
        whole = ", ".join(repr(path) or "the whole" for path in graph.opaque)
        return (
            f"{whole} is evaluated again as a whole, and computes something else then: let it read and count in its "
            "own attributes and buffers, which are put back, and not in globals."
        )
    if not names:
        return ""
    return (
        f"Its forward writes {', '.join(names)} in place after it was read, and autograd is not told: write after the "
        "last read; of a buffer you may read a copy before (.clone())."
    )


def _through_the_run(
    run: Run, outputs: Sequence[Tensor], directions: Sequence[Tensor], trainable: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The run's own gradients; where it was cut up to some operation, piece by piece."""
    leaves = list(run.leaves.items())
    wanted = [*trainable.values(), *(leaf for _, leaf in leaves)]
    total: dict[int, Tensor] = {}

    def back(tensors: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
        found = torch.autograd.grad(tensors, wanted, cotangents, allow_unused=True, retain_graph=True)
        for each, gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                total[id(each)] = total[id(each)] + gradient if id(each) in total else gradient

    back(outputs, directions)
    for slot, leaf in reversed(leaves):
        if id(leaf) in total and run.predictions[slot].requires_grad:
            back([run.predictions[slot]], [total.pop(id(leaf))])
    return {name: total[id(p)] for name, p in trainable.items() if id(p) in total}


def uneven(output: Tensor) -> Tensor:
    # not ones: the pullback of a constant through a softmax or a layer norm is zero, which would show nothing
    return torch.linspace(-1, 1.5, output.numel(), device=output.device).reshape(output.shape).to(output.dtype)


def differing(ours: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> Sequence[str]:
    """Names of the parameters whose gradients differ by more than rounding, relative to the largest gradient.

    One that only one side has is zero on the other: a detach that was lost gives a gradient too many.
    """
    ours, real = _dense(ours), _dense(real)
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


def _dense(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: g if g.layout is torch.strided else g.to_dense() for name, g in gradients.items()}
