"""What a free input costs by itself: nothing, or an energy around a mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch2ebm.engine.energies import Energy
from torch2ebm.errors import ConfigurationError


@dataclass(frozen=True)
class Flat(Energy):
    """No cost at all: a free input without a prior.

    Example:
        >>> import torch
        >>> from torch2ebm.clamping.priors import Flat
        >>> Flat().of_samples(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([0., 0.])
    """

    def of_samples(self, error: Tensor, prediction: Tensor) -> Tensor:
        return error.new_zeros(len(error))

    def of_batch(self, error: Tensor, prediction: Tensor) -> Tensor:
        return error.new_zeros(())

    def gradients(self, error: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        none = torch.zeros_like(error)
        return none, none


@dataclass(frozen=True, eq=False)
class Prior:
    """The energy of a free input around its mean; no mean is zero."""

    energy: Energy
    mean: Tensor | float | None = None

    @staticmethod
    def of(name: str, given: Any) -> Prior:
        """From an energy, or a pair of an energy and a mean. Raises :class:`ConfigurationError` for anything else."""
        energy, mean = given if isinstance(given, Sequence) and len(given) == 2 else (given, None)
        if not isinstance(energy, Energy) or not (mean is None or isinstance(mean, (Tensor, int, float))):
            raise ConfigurationError(
                f"model.infer(prior={{{name!r}: ...}})",
                repr(given),
                "an energy, whose prediction is then zero, or a pair of an energy and its prediction",
                "For example torch2ebm.Gaussian(), or (torch2ebm.Gaussian(), mean).",
            )
        return Prior(energy, mean)
