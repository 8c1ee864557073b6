"""A whole call held against the plain module: ``EnergyOptimizer(..., check_every=n)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch2ebm.capture.running import Before
from torch2ebm.common.nested import leaves_of
from torch2ebm.errors import CaptureMismatchError
from torch2ebm.isolation.module_state import hooks_suspended
from torch2ebm.model.capture_cache import Served
from torch2ebm.model.verification import differing, same, swept, uneven


def check_whole_call(served: Served, before: Before, plain: Callable[[], Any]) -> None:
    """Run the module once more from the same state, and compare outputs, buffers and gradients.

    Raises:
        CaptureMismatchError: where one of them differs.
    """
    module = served.graph.module
    after = Before.now(module, served.arguments.device)
    ours = [leaf for leaf in leaves_of(served.run.output) if isinstance(leaf, Tensor)]
    buffers = {name: buffer.detach().clone() for name, buffer in after.buffers.items()}
    before.restore()
    try:
        with hooks_suspended(module.parameters()):
            theirs = [leaf for leaf in leaves_of(plain()) if isinstance(leaf, Tensor)]
            wrong = [f"output {i}" for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not same(a, b)]
            now = dict(module.named_buffers())
            wrong += [f"buffer '{name}'" for name, buffer in buffers.items() if not same(buffer, now[name])]
            wrong += [f"the gradient of '{name}'" for name in _wrong_gradients(served, ours, theirs)]
    finally:
        after.restore()
    if wrong:
        raise CaptureMismatchError(
            f"EnergyModel({type(module).__name__}), a call that check_every holds against the module",
            f"another result in {', '.join(wrong)}",
            "what the module itself gives from the same state",
            "Please report this with the module; until then make the submodule concerned one node with nodes=[...].",
        )


def _wrong_gradients(served: Served, ours: list[Tensor], theirs: list[Tensor]) -> list[str]:
    trainable = {name: p for name, p in served.graph.parameters.items() if p.requires_grad}
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b.requires_grad and b.is_floating_point()]
    if served.swapped or not trainable or not pairs:
        return []
    directions = [uneven(b) for _, b in pairs]
    try:
        found = torch.autograd.grad([b for _, b in pairs], list(trainable.values()), directions, allow_unused=True)
    except (
        RuntimeError
    ):  # a checkpoint that is reentrant, or an operation without a backward: nothing to be held against
        return []
    real = {name: g for name, g in zip(trainable, found, strict=True) if g is not None}
    cotangents = {id(a): direction for (a, _), direction in zip(pairs, directions, strict=True)}
    delivered = {
        reference.slot: cotangents[id(leaf)]
        for leaf, reference in zip(leaves_of(served.run.output), served.graph.outputs, strict=False)
        if reference.slot is not None and id(leaf) in cotangents
    }
    gradients, _ = swept(served.graph, served.run, served.arguments.device, served.swapped, delivered)
    return list(differing(gradients, real))
