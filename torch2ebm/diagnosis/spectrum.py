"""The largest and the smallest curvature of the energy around the feed-forward pass, in its values or its errors.

Both are by Lanczos on products that end at each node. In values the Hessian is (I - W)^T Pi (I - W) + beta J_o^T H J_o:
W holds the derivatives of predictions in values, one edge each, J_o those of the outputs in the values that they read,
and H is the loss's Hessian in the outputs. In errors it is Pi + beta J^T H J. Errors are zero at the feed-forward pass.
Where output nodes are not linear, as where the loss is an output, they bend, too (see :class:`OutputCurvature`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch2ebm.common.rows import Rows
from torch2ebm.engine.call import Call, at_least_single
from torch2ebm.engine.energies import Energy
from torch2ebm.errors import NonFiniteError
from torch2ebm.inference.curvature import OutputCurvature
from torch2ebm.inference.local_products import LocalProducts
from torch2ebm.loss.node_curvature import summed
from torch2ebm.loss.output_loss import OutputLoss

MOST_NUMBERS = 50_000_000  # that the basis may hold: 200 MB in single precision
KNOWN = 0.01  # an eigenvalue that is bounded to so much of itself is known

Product = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


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


class EnergyHessian:
    """The Hessian of F, summed over samples, around the feed-forward pass of one call, as products with it.

    Args:
        call: The call, after its feed-forward pass.
        loss: Its loss, not nudged.
        energies: Energy of each node, by name; one that is not Gaussian counts as precision 1.
        separate: Whether samples are independent: then each has a spectrum of its own, which is found sooner.

    Attributes:
        beta: The nudge.
    """

    def __init__(self, call: Call, loss: OutputLoss, energies: Mapping[str, Energy], separate: bool) -> None:
        self.beta, self.separate = 1.0, separate
        self.local = LocalProducts(call, energies, exact=True)
        self.ends = OutputCurvature(self.local, loss)
        self.like = {s: at_least_single(call.values[s]) for node in call.graph.hidden_nodes for s in node.slots}
        self.precisions = {slot: self.local.precisions[call.graph.owner[slot].name] for slot in self.like}
        self.batch_size = call.batch_size

    def of_values(self, products: int) -> Spectrum:
        """In value coordinates."""

        def product(direction: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            moved = self.local.differences(direction)
            hidden = {s: self._weighted(s, moved[s]) for s in self.like if s in moved}
            if self.ends.bends:  # it is in the values already
                return summed(self.local.differences_back(hidden), self._pulls(direction))
            return self.local.differences_back({**hidden, **self._pulls(moved)})

        return self._spectrum(product, products)

    def of_errors(self, products: int) -> Spectrum:
        """In error coordinates."""

        def product(direction: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            of_loss = dict(self.local.pulled(self._pulls(self.local.moved(direction))))
            return summed({s: self._weighted(s, u) for s, u in direction.items()}, of_loss)

        return self._spectrum(product, products)

    def _weighted(self, slot: str, error: Tensor) -> Tensor:
        precision = self.precisions[slot]
        return error * (precision.to(error) if isinstance(precision, Tensor) else precision)

    def _pulls(self, moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """beta H of how the outputs, or what bent output nodes read, have moved."""
        return {s: self.beta * pull for s, pull in self.ends.product(moved).items()}

    def _spectrum(self, product: Product, products: int) -> Spectrum:
        rows = Rows(self.like, tuple(self.like), self.batch_size)
        if not self.separate:
            rows.count = 1
        size = sum(value.numel() for value in self.like.values())
        if not size:
            return Spectrum(0.0, 0.0, False, 0)

        def of_rows(vector: Tensor) -> Tensor:
            by_slot: dict[str, Tensor] = {}
            rows.unpack(vector, by_slot)
            return rows.pack(product(by_slot))

        generator = torch.Generator().manual_seed(0)  # the same in every run, and nothing that the user draws
        start = torch.randn(rows.count, size // rows.count, generator=generator)
        some = next(iter(self.like.values()))
        return lanczos(of_rows, start.to(some), max(4, min(products, MOST_NUMBERS // size)))


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, most: int) -> Spectrum:
    """Both ends of the spectrum of a symmetric matrix, or of one for each row.

    Args:
        product: From ``[rows, entries]`` to the products, in this shape.
        start: Where to begin; no eigenvector may be orthogonal to it.
        most: Most products to make.

    Raises:
        NonFiniteError: where a product is not finite.
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
            raise _not_finite(len(diagonal) + 1)
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
        spectrum = _ends(torch.stack(diagonal), torch.stack(beside), at_last)
        if spectrum is not None:
            return spectrum
        vector = torch.where(going[:, None], found / length.clamp_min(torch.finfo(length.dtype).tiny)[:, None], 0.0)


def _ends(diagonal: Tensor, beside: Tensor, at_last: bool) -> Spectrum | None:
    """From the entries ``[made, rows]`` of the tridiagonal matrices; None where an end is not known yet."""
    made = len(diagonal)
    matrix = torch.diag_embed(diagonal.T.cpu())
    if made > 1:
        off = torch.diag_embed(beside[:-1].T.cpu(), offset=1)
        matrix = matrix + off + off.mT
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


def _not_finite(product: int) -> NonFiniteError:
    return NonFiniteError(
        f"the energy's Hessian, product {product}",
        "a product that is not finite",
        "finite numbers",
        "Activations or weights are too large for the dtype; look at the initialisation. Nothing was changed.",
    )
