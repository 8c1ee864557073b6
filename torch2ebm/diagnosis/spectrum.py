"""The largest and the smallest curvature of the energy around the feed-forward pass, in its values or its errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch2ebm.analysis.lanczos import MOST_NUMBERS, Ritz
from torch2ebm.analysis.lanczos import lanczos as ritz_values
from torch2ebm.common.rows import Rows
from torch2ebm.engine.call import Call
from torch2ebm.engine.energies import Energy
from torch2ebm.errors import NonFiniteError
from torch2ebm.inference.curvature import Product, packed
from torch2ebm.inference.local_products import LocalProducts
from torch2ebm.inference.steepness import EnergyHessian
from torch2ebm.loss.output_loss import OutputLoss

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
    found = ritz_values(product, start, most, lambda ritz: not _ends(ritz)[1], not_finite)
    return _ends(found)[0]


def _ends(ritz: Ritz) -> tuple[Spectrum, bool]:
    """The ends as they are known, and whether one of them is not known well."""
    (largest,), (bound,) = ritz.ends(1, "largest")
    (smallest,), _ = ritz.ends(1, "smallest")
    # another row's smallest one may still come down below the one that is known
    lowest = float((ritz.values[:, 0] - ritz.bounds[:, 0]).min())
    is_bound = float(smallest) - lowest > KNOWN * abs(float(smallest))
    vague = is_bound or float(bound) > KNOWN * abs(float(largest))
    return Spectrum(float(largest), float(smallest), is_bound, ritz.products), vague
