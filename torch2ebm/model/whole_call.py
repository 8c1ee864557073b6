"""A whole call held against the plain module: ``EnergyOptimizer(..., check_every=n)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.capture.running import Before
from torch2ebm.common.nested import leaves_of
from torch2ebm.errors import CaptureMismatchError
from torch2ebm.isolation.module_state import hooks_suspended
from torch2ebm.model.arguments import Arguments
from torch2ebm.model.capture_cache import Served
from torch2ebm.model.verification import differing, same, swept, uneven


@dataclass(frozen=True, eq=False)
class PlainCall:
    """What the module itself makes of a call: run before the model runs it, and then as if it had not been.

    Attributes:
        outputs: The leaves of its output.
        buffers: What it has left in them.
        gradients: Of its parameters, for an uneven gradient of each output; None where torch gives none.
    """

    outputs: list[Any]
    buffers: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] | None

    @staticmethod
    def of(module: nn.Module, given: Any, call: Callable[[], Any]) -> PlainCall | None:
        """Run it, and leave module, generators and inputs as they are; None where what is given can be read once.

        Args:
            module: The module.
            given: The arguments that ``call`` calls it with.
            call: Calls it.
        """
        leaves = list(leaves_of(given))
        if any(isinstance(leaf, Iterator) for leaf in leaves):
            return None
        before = Before.now(module, Arguments.of(module, (given,), {}).device)
        drawing = [(g, g.get_state()) for g in leaves if isinstance(g, torch.Generator)]
        given = [t for t in leaves if isinstance(t, Tensor) and not t.is_inference()]
        inputs = [(t, t._version, t.detach().clone()) for t in given]
        try:
            with hooks_suspended(module.parameters()):
                outputs = list(leaves_of(call()))
                buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
                return PlainCall(
                    [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in outputs],
                    buffers,
                    _gradients(module, outputs),
                )
        finally:
            before.restore()
            for generator, state in drawing:
                generator.set_state(state)
            for tensor, version, copy in inputs:
                if tensor._version != version:
                    tensor.data.copy_(copy)

    def check(self, served: Served) -> None:
        """Hold a call against it.

        Raises:
            CaptureMismatchError: where outputs, buffers or gradients differ.
        """
        module, ours = served.graph.module, list(leaves_of(served.run.output))
        pairs = [(a, b) for a, b in zip(ours, self.outputs, strict=True) if isinstance(b, Tensor)]
        wrong = [f"output {i}" for i, (a, b) in enumerate(pairs) if not same(a, b)]
        now = dict(module.named_buffers())
        wrong += [f"buffer '{name}'" for name, buffer in self.buffers.items() if not same(now[name], buffer)]
        wrong += [f"the gradient of '{name}'" for name in self._wrong_gradients(served)]
        if wrong:
            raise CaptureMismatchError(
                f"EnergyModel({type(module).__name__}), a call that check_every holds against the module",
                f"another result in {', '.join(wrong)}",
                "what the module itself gives from the same state",
                "Please report this with the module; until then make the submodule concerned one node: nodes=[...].",
            )

    def _wrong_gradients(self, served: Served) -> list[str]:
        if served.swapped or not self.gradients:
            return []
        delivered: dict[str, Tensor] = {}
        for leaf, reference in zip(leaves_of(served.run.output), served.graph.outputs, strict=False):
            if (slot := reference.slot) is not None and _is_differentiable(leaf):
                # one that is returned twice gets both
                delivered[slot] = delivered[slot] + uneven(leaf) if slot in delivered else uneven(leaf)
        gradients, _ = swept(served.graph, served.run, served.arguments.device, served.swapped, delivered)
        real = {name: g for name, g in self.gradients.items() if name in served.graph.parameters}
        return list(differing(gradients, real))


def _gradients(module: nn.Module, outputs: list[Any]) -> dict[str, Tensor] | None:
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    reached = [leaf for leaf in outputs if _is_differentiable(leaf)]
    if not trainable or not reached:
        return None
    try:
        found = torch.autograd.grad(reached, list(trainable.values()), list(map(uneven, reached)), allow_unused=True)
    except RuntimeError:  # a checkpoint that is reentrant, or an operation without a backward
        return None
    return {name: g for name, g in zip(trainable, found, strict=True) if g is not None}


def _is_differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point() and not leaf.is_nested
