"""All slots of a sample in one row, for solvers that look at the whole state at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Rows:
    """From tensors by slot to one row a sample, and back. Without a batch dimension everywhere, one row in all."""

    def __init__(self, like: Mapping[str, Tensor], slots: Sequence[str], batch_size: int) -> None:
        self.like = {slot: like[slot] for slot in slots}
        batched = all(value.ndim and value.shape[0] == batch_size for value in self.like.values())
        self.count = batch_size if batched else 1

    def pack(self, by_slot: Mapping[str, Tensor]) -> Tensor:
        """``[batch, entries]``; a missing slot is zero."""
        return torch.cat([self._row(by_slot.get(slot), value) for slot, value in self.like.items()], 1)

    def unpack(self, rows: Tensor, into: dict[str, Tensor]) -> None:
        """Write the rows to ``into``, by slot."""
        widths = [value.numel() // self.count for value in self.like.values()]
        for (slot, value), part in zip(self.like.items(), torch.split(rows, widths, 1), strict=True):
            into[slot] = part.reshape(value.shape)

    def _row(self, tensor: Tensor | None, value: Tensor) -> Tensor:
        return (torch.zeros_like(value) if tensor is None else tensor).reshape(self.count, -1)


def least_squares(changes: Tensor, target: Tensor) -> Tensor:
    """Weights ``[rows, memory, 1]`` of the smallest |target - changes w|, by normal equations with a trace of a ridge.

    ``changes`` is ``[rows, entries, memory]``, each row scaled by its largest change; one that no longer changes has
    weights of zero.
    """
    gram = changes.mT @ changes
    largest = gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    scale = torch.where(largest > 0, largest, 1.0)
    ridge = 10 * torch.finfo(gram.dtype).eps * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    weights: Tensor = torch.linalg.solve(gram / scale + ridge, changes.mT @ target.unsqueeze(2) / scale)
    return weights
