"""Eigenvalues of a symmetric matrix of which only products are known, or of one such matrix for each row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch2ebm.errors import NonFiniteError
from torch2ebm.inference.steepness import tridiagonal

MOST_NUMBERS = 50_000_000  # that the basis may hold: 200 MB in single precision


@dataclass(frozen=True, eq=False)
class Ritz:
    """What so many products say of the eigenvalues.

    Attributes:
        values: Ascending, ``[rows, products]``, in double precision on the CPU.
        bounds: An eigenvalue is within so much of each, in this shape.
        products: Products made.
        at_last: Whether there are no more to make.
    """

    values: Tensor
    bounds: Tensor
    products: int
    at_last: bool

    def ends(self, count: int, end: str) -> tuple[Tensor, Tensor]:
        """The largest or the smallest values of all rows together, from the end inwards, with their bounds."""
        values, bounds = self.values.flatten(), self.bounds.flatten()
        order = values.argsort(descending=end == "largest")[:count]
        return values[order], bounds[order]


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    most: int,
    known: Callable[[Ritz], bool],
    not_finite: Callable[[], NonFiniteError],
) -> Ritz:
    """Lanczos with full reorthogonalisation, until enough is known, or all rows are exhausted.

    Args:
        product: From ``[rows, entries]`` to the products, in this shape.
        start: Where to begin; no eigenvector may be orthogonal to it.
        most: Most products to make.
        known: Whether this is enough.
        not_finite: The error of a product that is not finite, which is raised.
    """
    most = min(most, start.shape[1])
    vector = start / start.norm(dim=1, keepdim=True)
    basis = start.new_zeros(start.shape[0], most, start.shape[1])
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    tiny = math.sqrt(torch.finfo(start.dtype).eps)
    while True:
        basis[:, len(diagonal)] = vector
        found = product(vector)
        along = (vector.double() * found.double()).sum(1)
        if not bool(torch.isfinite(found).all()):
            raise not_finite()
        # a row whose space is exhausted repeats an entry that it has: a number inside of its spectrum
        alive = vector.norm(dim=1) > 0
        diagonal.append(torch.where(alive, along, diagonal[0] if diagonal else along))
        made = basis[:, : len(diagonal)]
        for _ in range(2):  # once more: what is left after the first time is rounding
            found = found - ((made @ found[:, :, None]).mT @ made)[:, 0]
        length = found.norm(dim=1)
        going = alive & (length > tiny * torch.stack(diagonal).abs().amax(0).to(length))
        beside.append(torch.where(going, length, 0.0).double())
        ritz = _ritz(diagonal, beside, len(diagonal) == most or not bool(going.any()))
        if ritz.at_last or known(ritz):
            return ritz
        vector = torch.where(going[:, None], found / length.clamp_min(torch.finfo(length.dtype).tiny)[:, None], 0.0)


def _ritz(diagonal: list[Tensor], beside: list[Tensor], at_last: bool) -> Ritz:
    """From the entries, ``[rows]`` each, of the tridiagonal matrices."""
    values, vectors = torch.linalg.eigh(tridiagonal(diagonal, beside[:-1]).cpu())
    return Ritz(values, beside[-1].cpu()[:, None] * vectors[:, -1].abs(), len(diagonal), at_last)
