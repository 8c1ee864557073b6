"""How far each node has come to rest, from the errors and the driving terms that a relaxation has left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torch2ebm.engine.energies import Energy, precision_of
from torch2ebm.graph.energy_graph import EnergyGraph


class Residuals(Protocol):
    """What :class:`Relaxation` knows of a residual."""

    @property
    def residual(self) -> float: ...
    @property
    def sample_residual(self) -> Tensor | None: ...
    @property
    def is_relative(self) -> bool: ...
    @property
    def slot_residual(self) -> Mapping[str, Tensor]: ...


def progress_of(
    graph: EnergyGraph,
    error_of: Callable[[str], Tensor],
    residuals: Residuals,
    energies: Mapping[str, Energy],
    batch_size: int,
) -> dict[str, float]:
    """``|pi e| / (|pi e| + |dF/dv|)`` of each hidden node, in the median sample; empty where nothing was measured.

    Args:
        graph: The graph of the call.
        error_of: The error of a slot.
        residuals: Of the relaxation. A relative one is ``|dF/dv| / |pi e|``, of each slot or of all together.
        energies: By node.
        batch_size: Samples of the call.
    """
    names = {node.name: node.slots for node in graph.hidden_nodes}
    known = residuals.slot_residual
    if not known and residuals.is_relative and math.isfinite(residuals.residual):
        of_all = residuals.sample_residual
        whole = torch.tensor([residuals.residual]) if of_all is None else of_all
        return dict.fromkeys(names, _median([1 / (1 + whole)]))
    if not known:
        return {}

    def of_slot(name: str, slot: str) -> Tensor:
        if slot not in known:
            return torch.zeros(1)  # no message has reached it
        residual = known[slot].double()
        if residuals.is_relative:
            return 1 / (1 + residual)
        size = (error_of(slot) * precision_of(energies.get(name))).double().abs()
        size = size.reshape(batch_size, -1).amax(1) if residual.ndim else size.amax()
        # at rest where there is neither an error nor anything that asks for one
        return torch.where(residual == 0, 1.0, size / (size + residual))

    return {name: _median([of_slot(name, slot) for slot in slots]) for name, slots in names.items()}


def _median(parts: Sequence[Any]) -> float:
    return min(float(part.median()) for part in parts)
