"""What a relaxation leaves: energies of every step, how large the terms are that drive it, and the last pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch2ebm.engine.energies import Energy
from torch2ebm.engine.gradients import GradientSum
from torch2ebm.potentials.energy_parameters import gradients_of_energy


def energies(history: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """The energies of the history as numbers, with one transfer to the host."""
    rows = [[sweep[name] for name in names if name in sweep] for sweep in history]
    numbers = iter(_on_host([entry for row in rows for entry in row]))
    return _columns([{name: next(numbers) for name in names if name in sweep} for sweep in history], names)


@dataclass
class Collected:
    """What the last pass over the nodes collects, by slot."""

    gradients: GradientSum = field(default_factory=GradientSum)
    predictions: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)  # times minus the loss's scale
    unreached: list[str] = field(default_factory=list)
    rounding: dict[str, Tensor] = field(default_factory=dict)  # the length of what it leaves in the error
    of_energies: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by node, then by name of the tensor

    def add_energy(
        self,
        name: str,
        energy: Energy | None,
        errors: Sequence[Tensor],
        predictions: Sequence[Tensor],
        scale: float | Tensor,
    ) -> None:
        """What the parameters of a node's energy learn, before its errors are used up."""
        found = {} if energy is None else gradients_of_energy(energy, *paired(errors, predictions), scale)
        if found:
            self.of_energies[name] = found


def paired(errors: Sequence[Tensor], predictions: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Errors, and predictions in their dtype, as energies take them."""
    return list(errors), [mu.detach().to(error.dtype) for error, mu in zip(errors, predictions, strict=True)]


def largest_entry(gradient: Tensor, batch_size: int) -> Tensor:
    """Largest absolute entry of each sample, shape ``[batch]``; of all where there is no batch dimension."""
    return _by_sample(gradient, batch_size).abs().amax(1).reshape(_shape(gradient, batch_size))


def relative_length(gradient: Tensor, own: Tensor | None, rounding: Tensor | None, batch_size: int) -> Tensor:
    """``|dF/dx| / |pi e|`` of each sample; 0 where the gradient is no longer than ``rounding``, which moves nothing.

    An error of zero with a gradient is as far from rest as can be: infinity. ``own`` is pi e, and None for zero.
    """
    length, size, still = (
        gradient.new_zeros(()) if each is None else _by_sample(each, batch_size).norm(dim=1)
        for each in (gradient, own, rounding)
    )
    # not (length > still): NaN is not at rest
    return torch.where(length <= still, 0.0, length / size).reshape(_shape(gradient, batch_size))


def _by_sample(tensor: Tensor, batch_size: int) -> Tensor:
    batched = tensor.ndim and tensor.shape[0] == batch_size
    return tensor.reshape(batch_size if batched else 1, -1)


def _shape(tensor: Tensor, batch_size: int) -> tuple[int, ...]:
    return (batch_size,) if tensor.ndim and tensor.shape[0] == batch_size else ()


def _on_host(entries: Sequence[Tensor]) -> list[float]:
    if not entries:
        return []
    alike = all(entry.ndim == 0 and entry.dtype == entries[0].dtype for entry in entries)
    stacked = torch.stack(list(entries) if alike else [entry.double().reshape(()) for entry in entries])
    numbers: list[float] = stacked.double().tolist()
    return numbers


def _columns(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(row.get(name, 0.0) for row in rows) for name in names}
