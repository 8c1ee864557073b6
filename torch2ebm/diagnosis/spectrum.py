"""The largest and the smallest curvature of the energy around the feed-forward pass, in its values or its errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch2ebm.common.rows import Rows
from torch2ebm.engine.call import Call
from torch2ebm.engine.energies import Energy
from torch2ebm.errors import NonFiniteError
from torch2ebm.inference.curvature import Product, packed
from torch2ebm.inference.local_products import LocalProducts
from torch2ebm.inference.steepness import EnergyHessian, tridiagonal
from torch2ebm.loss.output_loss import OutputLoss

MOST_NUMBERS = 50_000_000  # that the basis may hold: 200 MB in single precision
KNOWN = 0.01  # an eigenvalue that is bounded to so much of itself is known


@dataclass(frozen=True)
class Spectrum:
    """The ends of the spectrum of a Hessian.

    Attributes:
        largest: Its largest eigenvalue.
        smallest: Its smallest, or what is left of it where ``is_bound``.
        is_bound: Whether the smallest eigenvalue may be far below ``smallest``: more products would tell.
        products: Products made.
    """

    largest: float
    smallest: float
    is_bound: bool
    products: int

    @property
    def condition(self) -> float:
        """The largest over the smallest; infinite where the smallest is not above 0."""
        return self.largest / self.smallest if self.smallest > 0 else math.inf


def spectra(
    call: Call, loss: OutputLoss, energies: Mapping[str, Energy], separate: bool, products: int
) -> tuple[Spectrum, Spectrum]:
    """Of the energy's Hessian in the values, and in the errors.

    Args:
        call: The call, after its feed-forward pass.
        loss: Its loss, nudged.
        energies: Energy of each node, by name.
        separate: Whether samples are independent: then each has a spectrum of its own, which is found sooner.
        products: Most products to make for each.
    """
    hessian = EnergyHessian(LocalProducts(call, energies, exact=True), loss, energies)
    in_values, in_errors = (
        _spectrum(hessian, product, separate, products) for product in (hessian.in_values, hessian.in_errors)
    )
    return in_values, in_errors


def _spectrum(hessian: EnergyHessian, product: Product, separate: bool, products: int) -> Spectrum:
    rows = Rows(hessian.like, tuple(hessian.like), hessian.local.call.batch_size)
    if not separate:
        rows.count = 1
    size = sum(value.numel() for value in hessian.like.values())
    if not size:
        return Spectrum(0.0, 0.0, False, 0)
    generator = torch.Generator().manual_seed(0)  # the same in every run, and nothing that the user draws
    start = torch.randn(rows.count, size // rows.count, generator=generator).to(next(iter(hessian.like.values())))
    most = max(4, min(products, MOST_NUMBERS // size))
    return lanczos(packed(product, rows), start, most, hessian.local.not_finite)


def lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, most: int, not_finite: Callable[[], NonFiniteError]
) -> Spectrum:
    """Both ends of the spectrum of a symmetric matrix, or of one for each row.

    Args:
        product: From ``[rows, entries]`` to the products, in this shape.
        start: Where to begin; no eigenvector may be orthogonal to it.
        most: Most products to make.
        not_finite: The error of a product that is not finite, which is raised.
    """
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
        at_last = len(diagonal) == most or not bool(going.any())
        spectrum = _ends(diagonal, beside, at_last)
        if spectrum is not None:
            return spectrum
        vector = torch.where(going[:, None], found / length.clamp_min(torch.finfo(length.dtype).tiny)[:, None], 0.0)


def _ends(diagonal: list[Tensor], beside: list[Tensor], at_last: bool) -> Spectrum | None:
    """From the entries, ``[rows]`` each, of the tridiagonal matrices; None where an end is not known yet."""
    made, matrix = len(diagonal), tridiagonal(diagonal, beside[:-1]).cpu()
    values, vectors = torch.linalg.eigh(matrix)
    bounds = beside[-1].cpu()[:, None] * vectors[:, -1].abs()  # of each eigenvalue, [rows, made]
    top, bottom = int(values[:, -1].argmax()), int(values[:, 0].argmin())
    largest, smallest = float(values[top, -1]), float(values[bottom, 0])
    # another row's smallest one may still come down below the one that is known
    lowest = float((values[:, 0] - bounds[:, 0]).min())
    vague = smallest - lowest > KNOWN * abs(smallest)
    if not at_last and (vague or float(bounds[top, -1]) > KNOWN * abs(largest)):
        return None
    return Spectrum(largest, smallest, vague, made)
