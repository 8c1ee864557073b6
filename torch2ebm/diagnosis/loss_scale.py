"""What a loss is made of: a mean or a sum over samples, how many terms of a sample it averages, and its one half."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch2ebm.common.nested import map_leaves
from torch2ebm.engine.call import Call
from torch2ebm.inference.curvature import output_hessian
from torch2ebm.loss.output_loss import OutputLoss

ALIKE = 1e-2  # how far two gradients may differ that rounding and kernels for other sizes have made different
SAME = 1e-3  # of a Hessian's product: what single precision leaves of equality


@dataclass(frozen=True)
class LossScale:
    """What was found of a loss.

    Attributes:
        value: The loss on the batch.
        reduction: ``"mean"`` or ``"sum"`` over samples, found by repeating the batch; ``""`` for neither of them, None
            where it was not looked at.
        terms: How many terms (features, tokens, pixels) it averages for each sample; 1 for none.
        curvature: The largest eigenvalue of its Hessian in the outputs of a sample; None where it could not be had.
        one_half: Whether a quadratic loss has its factor of one half; None where it is not quadratic, or not told.
    """

    value: float
    reduction: str | None = None
    terms: float = 1.0
    curvature: float | None = None
    one_half: bool | None = None

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return f"{self.value:.4g}, which is no number to learn from"
        over = f"a {self.reduction} over samples" if self.reduction else "neither a mean nor a sum over samples"
        parts = [f"{self.value:.4g}", *([] if self.reduction is None else [over])]
        if self.curvature is not None:
            parts.append(f"curvature {self.curvature:.3g} in the outputs")
        parts += [f"a mean over {self.terms:g} terms of each"] * (self.terms > 1)
        parts += [f"{'with' if self.one_half else 'without'} its one half"] * (self.one_half is not None)
        return ", ".join(parts)


def reduction_of(gradient_of: Callable[[int], Tensor | None]) -> str | None:
    """How the gradient grows with the number of copies of the batch: not at all for a mean, evenly for a sum.

    Args:
        gradient_of: From the number of copies to the gradient in all parameters, or None where that fails.

    Returns:
        ``"mean"``, ``"sum"``, ``""`` for neither; None where repeating the batch fails.
    """
    found = [gradient_of(copies) for copies in (1, 2, 3)]
    once, twice, thrice = found
    if once is None or twice is None or thrice is None:
        return None
    size = float(once.norm())
    if not size or not math.isfinite(size):
        return None
    first, second = twice - once, thrice - twice
    if float(first.norm()) <= ALIKE * size:
        return "mean"
    # a penalty on weights does not grow with the batch, and stays in the first gradient alone
    return "sum" if float((first - second).norm()) <= ALIKE * float(first.norm()) else ""


def repeated(structure: Any, copies: int, dim: int, size: int) -> Any:
    """All tensors that have a dimension of the batch's size, so many times along it; the others as they are."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or size not in leaf.shape:
            return leaf
        own = dim if leaf.ndim > dim and leaf.shape[dim] == size else list(leaf.shape).index(size)
        return torch.cat([leaf] * copies, own)

    return map_leaves(of, structure)


@dataclass(frozen=True)
class OutputCurvature:
    """The loss's Hessian in the outputs.

    Attributes:
        largest: Its largest eigenvalue, by power iterations.
        quadratic: The number that it is a multiple of the identity by, wherever the outputs are; None for another one.
    """

    largest: float
    quadratic: float | None


def output_curvature(call: Call, loss: OutputLoss, products: int = 20) -> OutputCurvature:
    """How curved the loss, summed over samples, is in the outputs of a sample."""
    here = {slot: call.values[slot].detach() for slot in call.graph.output_slots}
    generator = torch.Generator().manual_seed(0)
    noise = {s: torch.randn(here[s].shape, generator=generator).to(here[s]) for s in here if s in loss.delivered}
    product = output_hessian(call, loss)
    first = product(noise)
    size = _size(noise)
    found = {slot: torch.zeros_like(u) for slot, u in noise.items()} | dict(first)
    factor = sum(float((found[s].double() * noise[s].double()).sum()) for s in noise) / max(size, 1e-300) ** 2
    identity = _size({s: found[s] - factor * noise[s] for s in noise}) <= SAME * abs(factor) * size
    if factor and identity and _stays(call, loss, here, noise, factor):
        return OutputCurvature(factor, factor)
    largest, vector = 0.0, found
    for _ in range(products):
        length = _size(vector)
        if not length:
            break
        vector = {slot: part / length for slot, part in vector.items()}
        again = product(vector)
        largest = max(largest, _size(again), key=abs)
        vector = {slot: again[slot] for slot in vector if slot in again}
    return OutputCurvature(largest, None)


def _stays(
    call: Call, loss: OutputLoss, here: Mapping[str, Tensor], noise: Mapping[str, Tensor], factor: float
) -> bool:
    """Whether the Hessian is the same multiple of the identity at other outputs."""
    away = {s: each + noise[s] * (1 + each.abs().mean()) if s in noise else each for s, each in here.items()}
    try:
        found = loss.expanded(away).hessian_product(noise)
    except RuntimeError:  # cannot be differentiated twice: gradients of a quadratic differ by the factor alone
        above, below = loss.gradients(away)[1], loss.gradients(here)[1]
        found = {s: above[s] - below[s] for s in above if s in below}
        noise = {s: away[s] - here[s] for s in noise}
    return all(s in found for s in noise) and (
        _size({s: found[s] - factor * noise[s] for s in noise}) <= SAME * abs(factor) * _size(noise)
    )


def _size(by_slot: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.detach().double().square().sum()) for part in by_slot.values()))


def half_and_terms(quadratic: float, terms: float, sizes: Sequence[int]) -> tuple[bool | None, float]:
    """Whether half the squared error is there, and how many terms are averaged: 1/n with it, 2/n without.

    Args:
        quadratic: The factor that the Hessian in the outputs of a sample is of the identity.
        terms: How many terms a mean is known to take of each sample, 1 for not known.
        sizes: Of an output's dimensions beside the batch.
    """
    products = {math.prod(some) for n in range(len(sizes) + 1) for some in itertools.combinations(sizes, n)}
    for count in [terms] if terms > 1 else sorted(products):
        for half, factor in ((True, 1.0), (False, 2.0)):
            if math.isclose(quadratic * count, factor, rel_tol=SAME):
                return half, float(count)
    return None, terms
