"""The energies that a relaxation has left, step by step, as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def energies(history: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """The energies of the history as numbers, with one transfer to the host."""
    rows = [[sweep[name] for name in names if name in sweep] for sweep in history]
    numbers = iter(_on_host([entry for row in rows for entry in row]))
    return _columns([{name: next(numbers) for name in names if name in sweep} for sweep in history], names)


def _on_host(entries: Sequence[Tensor]) -> list[float]:
    if not entries:
        return []
    alike = all(entry.ndim == 0 and entry.dtype == entries[0].dtype for entry in entries)
    stacked = torch.stack(list(entries) if alike else [entry.double().reshape(()) for entry in entries])
    numbers: list[float] = stacked.double().tolist()
    return numbers


def _columns(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(row.get(name, 0.0) for row in rows) for name in names}
