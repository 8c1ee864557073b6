"""Energies of a node, one short function each."""

from __future__ import annotations

from torch import Tensor


def gaussian_energy(error: Tensor) -> Tensor:
    """Half the squared error of each sample, shape ``[batch]`` (paper A, eq. for I)."""
    return 0.5 * error.square().flatten(1).sum(1) if error.ndim > 1 else 0.5 * error.square()


def gaussian_energy_of_batch(error: Tensor) -> Tensor:
    """Half the squared error summed over samples, shape ``[]``, in one pass over the data."""
    flat = error.reshape(-1)
    return 0.5 * flat.dot(flat)
