"""All values of one sample in one row, for solvers that look at the whole state at once.

A *slot* is the name of one value tensor: most nodes have one, a node that returns several tensors has one for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Rows:
    """From tensors by slot to one row for each sample, and back.

    If some tensor has no batch dimension, samples cannot be told apart: then everything is one row.
    """

    def __init__(self, like: Mapping[str, Tensor], slots: Sequence[str], batch_size: int) -> None:
        self.like = {slot: like[slot] for slot in slots}
        batched = all(value.ndim and value.shape[0] == batch_size for value in self.like.values())
        self.count = batch_size if batched else 1

    def pack(self, by_slot: Mapping[str, Tensor]) -> Tensor:
        """``[batch, entries]``; a missing slot is zero."""
        if not self.like:
            return torch.zeros(self.count, 0)
        return torch.cat([self._row(by_slot.get(slot), value) for slot, value in self.like.items()], 1)

    def unpack(self, rows: Tensor, into: dict[str, Tensor]) -> None:
        """Write the rows to ``into``, by slot."""
        widths = [value.numel() // self.count for value in self.like.values()]
        for (slot, value), part in zip(self.like.items(), torch.split(rows, widths, 1), strict=True):
            into[slot] = part.reshape(value.shape)

    def _row(self, tensor: Tensor | None, value: Tensor) -> Tensor:
        return (torch.zeros_like(value) if tensor is None else tensor).reshape(self.count, -1)


def moved_rows(start: Tensor, direction: Tensor, length: Tensor) -> Tensor:
    """``start + length * direction``, ``length`` ``[rows, 1]``."""
    # not torch.addcmul or torch.lerp, which are slow where a length a row is broadcast
    return (direction * length).add_(start)


def chosen_rows(condition: Tensor, one: Tensor, other: Tensor, recorded: bool) -> Tensor:
    """Rows of one, where the condition holds, and else of the other, itself where it holds in none.

    Args:
        condition: ``[rows, 1]``.
        one: ``[rows, entries]``.
        other: The same.
        recorded: Whether a program is recorded, which cannot ask what the condition is.
    """
    return torch.where(condition, one, other) if recorded or bool(condition.any()) else other


def least_squares(changes: Tensor, target: Tensor) -> Tensor:
    """Weights ``w`` of the smallest ``|target - changes w|`` for each row, by normal equations with a small ridge.

    Shapes: ``changes`` is ``[rows, entries, memory]``, ``target`` is ``[rows, entries]``, the weights are
    ``[rows, memory, 1]``. A row whose changes are all zero has weights of zero.
    """
    # Near a solution the changes become collinear, so the problem is rank deficient. torch.linalg.lstsq cannot solve
    # that on CUDA, where its only driver ('gels') takes full-rank matrices; normal equations with a ridge can.
    gram = changes.mT @ changes  # [rows, memory, memory]
    largest = gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    scale = torch.where(largest > 0, largest, 1.0)  # a row at rest: 0 / 1, not 0 / 0
    # the largest diagonal entry is 1 by now: 10 eps is just above what rounding leaves of an eigenvalue of zero
    ridge = 10 * torch.finfo(gram.dtype).eps * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    weights: Tensor = torch.linalg.solve(gram / scale + ridge, changes.mT @ target.unsqueeze(2) / scale)
    return weights
