"""Draws of the values of one call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from torch2ebm.clamping.pattern import Pattern
from torch2ebm.engine.results import LocalGradients
from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.inference.base import Inference
from torch2ebm.inference.relaxation import OnStep, heat_of, is_wanted, report, shown_to, step_of
from torch2ebm.inference.solver import Rest, Solver


def in_chains(leaf: Any, batch_size: int, chains: int) -> Any:
    """A tensor with a row for each sample, once for each chain; anything else as it is."""
    rows = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == batch_size
    return leaf.repeat(chains, *[1] * (leaf.ndim - 1)) if rows and chains > 1 else leaf


def repeated(
    pattern: Pattern, starts: Mapping[str, Tensor], batch_size: int, chains: int
) -> tuple[Pattern, dict[str, Tensor]]:
    """A pattern, and where values begin, for several chains beside each other in the batch."""

    def of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {slot: in_chains(tensor, batch_size, chains) for slot, tensor in tensors.items()}

    return replace(pattern, given=of(pattern.given), masks=of(pattern.masks)), of(starts)


def carried(graph: EnergyGraph, pattern: Pattern) -> frozenset[str]:
    """The outputs that get a value, since they are drawn, too: those of which something is free."""
    free = (slot for slot in graph.output_slots if not pattern.is_whole(slot))
    return frozenset(slot for slot in free if graph.owner[slot].operations)  # another only shows a value


def sampled(
    solver: Solver[Any], inference: Inference, draws: dict[str, list[Tensor]], on_step: OnStep | None = None
) -> LocalGradients:
    """Run a solver that samples; each draw is added to ``draws``, by slot.

    Returns:
        Values and energies at the last step; ``relaxation.converged`` is None, since samples do not come to rest.

    Raises:
        DivergenceError: where an energy is no number, or has risen a thousandfold.
    """
    heat, state = heat_of(solver, inference), solver.start(inference)
    with shown_to(on_step):
        for step in range(1, int(solver.steps) + 1):
            state = solver.step(inference, state)
            if solver.is_draw(step):
                for slot, value in inference.values.items():
                    draws.setdefault(slot, []).append(value.clone())
            if on_step and is_wanted(on_step, step, step == solver.steps):
                on_step(step_of(inference, step, 1.0, last=step == solver.steps))
    found = inference.local_gradients()
    relaxation = report(inference, int(solver.steps), Rest(math.nan, False), 0.0, remedy=solver.remedy, heat=heat)
    return replace(found, state=replace(found.state, relaxation=relaxation, phases=(relaxation,)))
