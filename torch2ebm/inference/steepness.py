"""How curved F is in what a solver moves: the largest eigenvalue of its Hessian, by Lanczos on node-local products.

At the feed-forward pass all errors are zero, so the second derivatives of hidden nodes do not count in the values; in
the errors they are left out (Gauss and Newton). With W the local derivatives among values, V those of the outputs, C
the curvature of the nodes' energies (Pi for Gaussians), H that of the loss in the outputs, and J = V (I - W)^-1, the
Hessians are

    in the errors   C + J^T H J
    in the values   (I - W)^T C (I - W) + V^T H V

Where output nodes are not linear, V^T H V has their own second derivatives, too (see :class:`OutputCurvature`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch2ebm.common.rows import Rows
from torch2ebm.engine.call import Call, at_least_single
from torch2ebm.engine.energies import Energy, Gaussian
from torch2ebm.errors import NonFiniteError
from torch2ebm.inference.curvature import BACKPROP, OutputCurvature, independent, measured_curvature, packed
from torch2ebm.inference.local_products import LocalProducts
from torch2ebm.loss.node_curvature import summed
from torch2ebm.loss.output_loss import OutputLoss


@dataclass(frozen=True)
class Stability:
    """What decides on the steps that a solver may take at the feed-forward pass, and what it took to find it.

    Attributes:
        steepest: The largest eigenvalue of F's Hessian, over all samples; of the nodes' energies alone where messages
            go one level a step.
        r: Then the nudge in units of the curvature, ``beta * sigma_squared``.
        bound: Some eigenvalue is within so much of it.
        products: Products with the matrix.
        backprops: What the measurement cost, in evaluations of all nodes, a backprop being three.
    """

    steepest: float
    r: float = 0.0
    bound: float = 0.0
    products: int = 0
    backprops: float = 0.0


def measured_stability(
    call: Call,
    loss: OutputLoss,
    energies: Mapping[str, Energy],
    coordinates: str,
    products: int,
    tol: float = 0.0,
    exact: bool = True,
) -> Stability:
    """Measure how steep F is in what a solver of a call moves.

    Args:
        call: The call, after its feed-forward pass; its values may be gone.
        loss: Its loss, nudged.
        energies: Energy of each node, by name.
        coordinates: ``"values"``, ``"errors"``, or ``"local errors"``.
        products: Most products to make.
        tol: Stop once the bound is at most so much of the eigenvalue.
        exact: Whether products are exact, or by differences that cost less (see :class:`LocalProducts`).

    Raises:
        NonFiniteError: where a product is not finite.
    """
    if not all(bool(torch.isfinite(call.values[slot]).all()) for slot in call.graph.output_slots):
        return Stability(math.nan)  # the energy of the first step says where; nothing is learnt of this graph here
    local = LocalProducts(call, energies, exact)
    hessian = EnergyHessian(local, loss, energies)
    rows = Rows(hessian.like, tuple(hessian.like), call.batch_size)
    local.separate = hessian.samples_are_independent()
    if not local.separate:
        rows.count = 1
    products_of = {"values": hessian.in_values, "errors": hessian.in_errors, "local errors": hessian.of_nodes}
    product = packed(products_of[coordinates], rows)
    largest, bound, made = largest_eigenvalue(
        product, rows.pack(_start(hessian.like, call.batch_size)), products, tol, local.not_finite
    )
    if coordinates != "local errors":
        return Stability(largest, 0.0, bound, made, local.work / BACKPROP)
    curvature = measured_curvature(call, loss, energies, products, tol, exact)  # of the nudged loss: beta is in it
    return Stability(largest, curvature.radius, curvature.bound, curvature.products, curvature.backprops)


def _start(like: Mapping[str, Tensor], batch_size: int) -> dict[str, Tensor]:
    """The same for every sample but for its values, so that the order of the batch changes nothing."""
    generator = torch.Generator().manual_seed(0)  # the same in every run, and nothing that the user draws
    found: dict[str, Tensor] = {}
    for slot, value in like.items():
        batched = value.ndim > 0 and len(value) == batch_size
        noise = torch.randn(value.shape[1:] if batched else value.shape, generator=generator).to(value)
        size = value.abs().mean()
        found[slot] = noise * (1 + value / torch.where(size > 0, size, 1.0))
    return found


class EnergyHessian:
    """The Hessian of F, summed over samples, around the feed-forward pass of one call, as products with it.

    Args:
        local: Products of the call.
        loss: Its loss, nudged.
        energies: Energy of each node, by name.

    Attributes:
        like: The values that it acts on, by slot.
    """

    def __init__(self, local: LocalProducts, loss: OutputLoss, energies: Mapping[str, Energy]) -> None:
        self.local, self.graph, self.energies = local, local.graph, energies
        self.like = {s: at_least_single(local.values[s]) for n in self.graph.hidden_nodes for s in n.slots}
        self.ends = OutputCurvature(local, loss)

    def samples_are_independent(self) -> bool:
        if not self.ends.like:
            return not self.local.call.couples_samples
        return independent(self.ends, Rows(self.ends.like, tuple(self.ends.like), self.local.call.batch_size))

    def in_errors(self, errors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        of_loss = self.local.pulled(self.ends.product(self.local.moved(errors)))
        return summed(self.of_nodes(errors), dict(of_loss))

    def in_values(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        moved = self.local.one_level_on(values)
        own = self.of_nodes({s: value - moved[s] if s in moved else value for s, value in values.items()})
        of_loss = self.ends.product(values if self.ends.bends else moved)
        sent = {slot: -weighted for slot, weighted in own.items()}
        if self.ends.bends:  # it is in the values already
            return summed(summed(own, of_loss), self.local.one_level_back(sent))
        return summed(own, self.local.one_level_back({**sent, **of_loss}))

    def of_nodes(self, errors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        owner = self.graph.owner
        return {s: _curved(self.energies.get(owner[s].name), error, self.like[s]) for s, error in errors.items()}


def _curved(energy: Energy | None, error: Tensor, prediction: Tensor) -> Tensor:
    """The second derivative of a node's energy where the value is the prediction, times a vector."""
    if energy is None or isinstance(energy, Gaussian):
        return error if energy is None else energy.gradients(error, prediction)[0].detach()
    size = float(error.abs().max())
    if size == 0.0:
        return error
    width = torch.finfo(error.dtype).eps ** (1 / 3) / size
    with torch.no_grad():
        above, below = (energy.gradients(sign * width * error, prediction)[0] for sign in (1, -1))
    product: Tensor = (above - below) / (2 * width)
    return product


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    products: int,
    tol: float,
    not_finite: Callable[[], NonFiniteError],
) -> tuple[float, float, int]:
    """Lanczos, each row on its own; without reorthogonalisation, which would only find eigenvalues twice.

    Returns:
        The largest eigenvalue over rows, its bound (Paige 1972), and how many products were made.
    """
    zero = torch.zeros(len(start), dtype=torch.float64)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    vector, before, length = start / start.norm(dim=1, keepdim=True).clamp_min(1e-30), torch.zeros_like(start), zero
    largest = bound = zero
    for _ in range(products):
        turned = product(vector) - length.to(vector)[:, None] * before
        along = _dot(vector, turned)
        turned = turned - along.to(vector)[:, None] * vector
        length = _dot(turned, turned).sqrt()
        if not bool((torch.isfinite(along) & torch.isfinite(length)).all()):
            raise not_finite()
        diagonal.append(along)
        beside.append(length)
        values, vectors = torch.linalg.eigh(tridiagonal(diagonal, beside[:-1]))
        largest, bound = values[:, -1], length * vectors[:, -1, -1].abs()
        # what is left of an exhausted row is rounding
        alive = length > 10 * torch.finfo(vector.dtype).eps * largest.abs()
        length = torch.where(alive, length, 0.0)
        if float((largest + bound).max()) <= (1 + tol) * float(largest.max()) or not bool(alive.any()):
            break
        scale = torch.where(alive, 1 / length, 0.0).to(vector)[:, None]
        before, vector = vector, turned * scale
    return float(largest.max()), float(bound[largest.argmax()]), len(diagonal)


def tridiagonal(diagonal: list[Tensor], beside: list[Tensor]) -> Tensor:
    """Of a matrix for each row, ``[rows, made, made]``, from lists of ``[rows]``."""
    matrix: Tensor = torch.diag_embed(torch.stack(diagonal, 1))
    if beside:
        matrix = matrix + torch.diag_embed(torch.stack(beside, 1), 1) + torch.diag_embed(torch.stack(beside, 1), -1)
    return matrix


def _dot(a: Tensor, b: Tensor) -> Tensor:
    products: Tensor = (a.double() * b.double()).sum(1).cpu()
    return products
