"""How curved the loss is in the errors of one call: the largest eigenvalue, by Lanczos on node-local products.

In error coordinates the Hessian of F around the feed-forward pass is Pi + beta J^T H J: Pi the precisions, J the
derivative of the outputs in the errors, H that of the loss in the outputs. sigma^2 is the largest eigenvalue of
Pi^-1/2 J^T H J Pi^-1/2. Every vector of its Krylov space is Pi^-1/2 J^T c for some c in the space of the outputs.
So the iteration runs there, on H K with K = J Pi^-1 J^T, in the inner product of K.

Output nodes that are not linear in the values they read have a second derivative of their own, as where the last node
computes the loss. J is then the derivative of these values in the errors, and H = V^T H_L V + S: V that of the outputs
in these values, H_L the loss's, S the second derivative of <dL/dmu, mu>. Hidden nodes count by first derivatives: in
the values that is exact where errors are zero, in the errors it is the approximation of Gauss and Newton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch2ebm.common.checks import check_reduction, check_steps, check_tolerance
from torch2ebm.common.rows import Rows
from torch2ebm.engine.call import Call, at_least_single
from torch2ebm.engine.energies import Energy
from torch2ebm.inference.local_products import LocalProducts
from torch2ebm.loss.node_curvature import NodeCurvature, summed
from torch2ebm.loss.output_loss import OutputLoss

_SEPARATE = "whether samples are independent"  # a key of EnergyGraph.once
BACKPROP = 3.0  # a forward, and the products with inputs and with parameters


@dataclass(frozen=True)
class Curvature:
    """The curvature of a loss in the errors of one call (sigma squared), and what it took to find it.

    A nudge ``beta`` is weak where ``beta * sigma_squared`` is far below 1: the gradient is then backprop's. It clamps
    the outputs where that is far above 1. ``float(curvature)`` is ``sigma_squared``.

    Attributes:
        sigma_squared: The largest eigenvalue of Pi^-1/2 J^T H J Pi^-1/2, over samples; 0 for a loss without curvature.
        lowest: The smallest one, below 0 where the loss is not convex in the errors; else 0.
        bound: Some eigenvalue is within so much of ``sigma_squared``.
        products: Products with the matrix.
        backprops: What the measurement cost, in evaluations of all nodes, a backprop being three.
        of_samples: The largest eigenvalue of each sample, shape ``[batch]``; None where samples depend on each other.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> curvature = torch2ebm.convert(net).curvature(torch.nn.functional.cross_entropy, batch)
        >>> float(curvature) == float(curvature.of_samples.max())
        True
    """

    sigma_squared: float
    lowest: float = 0.0
    bound: float = 0.0
    products: int = 0
    backprops: float = 0.0
    of_samples: Tensor | None = field(default=None, compare=False)

    def __float__(self) -> float:
        return self.sigma_squared

    @property
    def radius(self) -> float:
        """The largest absolute eigenvalue: with ``beta = r / radius`` and r below 1 no nudge loses the minimum."""
        return max(self.sigma_squared, -self.lowest)


def check_measurement(loss_reduction: str, products: int, tol: float) -> None:
    check_reduction("model.curvature", loss_reduction)
    check_steps("model.curvature", products, "products")
    check_tolerance("model.curvature", tol)


def measured_curvature(
    call: Call,
    loss: OutputLoss,
    energies: Mapping[str, Energy],
    products: int,
    tol: float = 0.0,
    exact: bool = True,
) -> Curvature:
    """Measure the curvature of a call around its feed-forward pass.

    Args:
        call: The call, after its feed-forward pass.
        loss: Its loss, not nudged.
        energies: Energy of each node, by name.
        products: Most products to make.
        tol: Stop once the bound is at most so much of the eigenvalue.
        exact: Whether products are exact, or by differences that cost less (see :class:`LocalProducts`).

    Raises:
        NonFiniteError: where a product is not finite.
    """
    if not any(slot in loss.delivered for slot in call.graph.output_slots):
        return Curvature(0.0)
    local = LocalProducts(call, energies, exact)
    ends = OutputCurvature(local, loss)
    rows = Rows(ends.like, tuple(ends.like), call.batch_size)
    local.separate = independent(ends, rows)
    if not local.separate:
        rows.count = 1
    lanczos = _Lanczos(ends, rows)
    lanczos.run(products, tol)
    return lanczos.result(call.batch_size)


class OutputCurvature:
    """H, and the space that it acts on: the outputs, or the values that output nodes read where these bend.

    Args:
        local: Products of the call, after its feed-forward pass.
        loss: Its loss, nudged or not.

    Attributes:
        bends: Whether some output node has a second derivative of its own.
        like: The outputs or the values, by slot.
    """

    def __init__(self, local: LocalProducts, loss: OutputLoss) -> None:
        self.local, self._hessian = local, output_hessian(local.call, loss)
        self._of_nodes = NodeCurvature(local.call, loss, local.passes)
        reads = self._of_nodes.reads
        self.bends = any(bool(part.any()) for part in self._of_nodes.product(noise(reads)).values())
        self._outputs = [slot for slot in local.graph.output_slots if slot in loss.delivered]
        self.like = reads if self.bends else {slot: at_least_single(local.values[slot]) for slot in self._outputs}

    def product(self, direction: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``H u``; other slots of ``u`` do not count, and a missing one is zero."""
        if not self.bends:
            return self._of_loss(direction)
        direction = {slot: direction[slot] for slot in self.like if slot in direction}
        return summed(self.local.through_outputs(direction, self._of_loss), self._of_nodes.product(direction))

    def covariance(self, cotangents: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``K c``."""
        return self.local.covariance(cotangents, self.like)

    def _of_loss(self, moved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        given = {slot: moved[slot] for slot in self._outputs if slot in moved}
        return self._hessian(given) if given else {}


class _Lanczos:
    """Full reorthogonalisation, every sample in a row of its own; sums are in double precision."""

    def __init__(self, ends: OutputCurvature, rows: Rows) -> None:
        self.local, self.rows = ends.local, rows
        self.hessian, self.covariance = packed(ends.product, rows), packed(ends.covariance, rows)
        self.basis: list[tuple[Tensor, Tensor]] = []  # c and K c, each [rows, outputs], K-orthonormal
        self.matrix = torch.zeros(rows.count, 0, 0, dtype=torch.float64)
        self.made = 0
        self.highest = torch.zeros(rows.count, dtype=torch.float64)
        self.bound = torch.full_like(self.highest, math.inf)

    def run(self, products: int, tol: float) -> None:
        vector = self.hessian(self.rows.pack(noise(self.rows.like)))
        vector = vector / vector.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vector.dtype).tiny)
        while self.made < products:
            vector, ended = self._advanced(vector)
            # the bound is that of the step before: it needs the length of the next vector
            if ended or float((self.highest + self.bound).max()) <= (1 + tol) * float(self.highest.max()):
                break

    def _advanced(self, vector: Tensor) -> tuple[Tensor, bool]:
        varied = self.covariance(vector)
        self.made += 1
        squared = _dot(vector, varied).cpu()
        if not bool(torch.isfinite(squared).all()):
            raise self.local.not_finite()
        length = squared.clamp_min(0).sqrt()
        alive = length > math.sqrt(torch.finfo(vector.dtype).eps) * self.highest.abs()
        self._bounded(torch.where(alive, length, 0.0))
        scale = torch.where(alive, 1 / length, 0.0).to(vector)[:, None]  # an exhausted row is zero from here on
        self.basis.append((vector * scale, varied * scale))
        product = self.hessian(varied * scale)
        column = [_dot(y, product) for _, y in self.basis]
        self._grown(column)
        size = product.norm(dim=1, keepdim=True)
        for _ in range(2):  # once more: what is left after the first time is rounding
            for c, y in self.basis:
                product = product - _dot(y, product).to(product)[:, None] * c
        # where the outputs have no direction left, nothing but rounding is
        left = product.norm(dim=1, keepdim=True) > 1e3 * torch.finfo(product.dtype).eps * size
        return torch.where(left, product, 0.0), not bool(alive.any())

    def _grown(self, column: list[Tensor]) -> None:
        size = len(column)
        matrix = self.matrix.new_zeros(self.rows.count, size, size)
        matrix[:, :-1, :-1] = self.matrix
        matrix[:, :, -1] = matrix[:, -1, :] = torch.stack(column, 1).to(matrix)
        self.matrix = matrix

    def _bounded(self, length: Tensor) -> None:
        """|T's next entry| times the last entry of the top vector bounds the error of the step before."""
        if len(self.matrix[0]):
            values, vectors = torch.linalg.eigh(self.matrix)
            self.highest, self.bound = values[:, -1], length * vectors[:, -1, -1].abs()

    def result(self, batch_size: int) -> Curvature:
        values = torch.linalg.eigvalsh(self.matrix)
        highest = values[:, -1].clamp_min(0)
        return Curvature(
            float(highest.max()),
            min(float(values.min()), 0.0),
            float(self.bound.max()),
            self.made,
            self.local.work / BACKPROP,
            highest if self.rows.count == batch_size else None,
        )


Product = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def packed(product: Product, rows: Rows) -> Callable[[Tensor], Tensor]:
    """The same product on rows."""

    def of_rows(vector: Tensor) -> Tensor:
        by_slot: dict[str, Tensor] = {}
        rows.unpack(vector, by_slot)
        return rows.pack(product(by_slot))

    return of_rows


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(1)


def noise(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in every run, and nothing that the user draws."""
    generator = torch.Generator().manual_seed(0)
    return {slot: torch.randn(value.shape, generator=generator).to(value) for slot, value in like.items()}


def commutes(product: Product, rows: Rows, within: float = 1e-2) -> bool:
    """Whether signs of samples pass through a product, but for a share that is put down to rounding and differences."""
    some = rows.pack(noise(rows.like))
    signs = torch.ones(rows.count, 1).to(some)
    signs[1::2] = -1
    by_slot, signed = dict(rows.like), dict(rows.like)
    rows.unpack(some, by_slot)
    rows.unpack(some * signs, signed)
    plain, other = rows.pack(product(by_slot)) * signs, rows.pack(product(signed))
    # far above rounding and differences, far below a sample that has a say in another
    return float((plain - other).norm()) <= within * float(plain.norm())


def independent(ends: OutputCurvature, rows: Rows) -> bool:
    """Whether no sample's product depends on another sample: signs of samples then pass through every product."""
    local, call = ends.local, ends.local.call
    if rows.count == 1:
        return call.batch_size == 1

    def of_graph() -> bool:
        if call.couples_samples:
            return False
        exact, local.exact = local.exact, True  # differences add up over hundreds of nodes
        separate = commutes(ends.covariance, rows)
        local.exact = exact
        return separate

    return commutes(ends.product, rows) and call.graph.once(
        (_SEPARATE, call.batch_size, call.frozen_statistics), of_graph
    )


def output_hessian(call: Call, loss: OutputLoss) -> Product:
    """Products with the loss's Hessian in the outputs: by differentiating twice, or by differences."""
    predictions = {slot: call.values[slot].detach() for slot in call.graph.output_slots}
    try:
        twice: Product | None = loss.expanded(predictions).hessian_product
    except RuntimeError:  # a loss that cannot be differentiated twice
        twice = None

    def product(direction: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        nonlocal twice
        given = {slot: part.to(predictions[slot].dtype) for slot, part in direction.items()}
        if twice is not None:
            try:
                found = twice(given)
            except RuntimeError:
                found = {}
            if any(bool(part.any()) for part in found.values()):
                return {slot: at_least_single(part) for slot, part in found.items()}
        found = _by_difference(loss, predictions, given)
        if any(bool(part.any()) for part in found.values()):
            twice = None  # its second derivative was cut off somewhere
        return found

    return product


def _by_difference(
    loss: OutputLoss, predictions: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    size = max(float(part.abs().max()) for part in direction.values())
    if size == 0.0:
        return {}
    widest = max(float(predictions[slot].abs().max()) for slot in direction)
    width = torch.finfo(predictions[next(iter(direction))].dtype).eps ** (1 / 3) * max(widest, 1.0) / size

    def at(shift: float) -> Mapping[str, Tensor]:
        moved = {s: p + shift * direction[s] if s in direction else p for s, p in predictions.items()}
        return loss.gradients(moved)[1]

    above, below = at(width), at(-width)
    return {slot: (at_least_single(above[slot]) - at_least_single(below[slot])) / (2 * width) for slot in above}
