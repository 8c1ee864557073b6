"""Whether accelerated errors rest in a minimum of the energy, or in a saddle, by a few products with its Hessian.

An acceleration looks for where the gradient is zero, and a saddle is such a place too. Descent leaves it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from torch2ebm.common.rows import Rows
from torch2ebm.common.text import listed
from torch2ebm.common.users_code import users_level
from torch2ebm.errors import NotAMinimumWarning
from torch2ebm.inference.curvature import noise
from torch2ebm.inference.error_inference import ErrorInference
from torch2ebm.inference.steepness import tridiagonal

PRODUCTS = 10  # each takes two sweeps
SELDOM = 10  # the next look comes after so many times as many relaxations
RESTS = 1e-2  # of the error's length: a gradient below it
NEGATIVE = 1e-4  # of the largest curvature, and more in single precision: what differences leave of zero


class SaddleCheck:
    """Looks at the first relaxation of a graph, then more and more seldom; at all whose energy has risen."""

    def __init__(self) -> None:
        self.relaxations, self.next_look, self.told = 0, 1, False

    @classmethod
    def of(cls, inference: ErrorInference) -> SaddleCheck:
        return inference.graph.once("error descent at a minimum", cls)

    def look(self, inference: ErrorInference, solver: object) -> Tensor | None:
        """Which samples are in no saddle, shape ``[batch]``, or ``[1]`` where they cannot be told apart.

        Args:
            inference: Where the relaxation has come to; it is left as it was.
            solver: Whose name a warning has. Only the first saddle is told.

        Returns:
            None where nobody has looked. A sample that moves still counts as in none.
        """
        if any(dtype.itemsize < 4 for dtype in inference.read_as.values()):
            return None  # half precision: differences of its gradients are rounding
        self.relaxations += 1
        due = self.relaxations >= self.next_look
        if self.told or not (due or _has_risen(inference)):
            return None
        if due:
            self.next_look *= SELDOM
        saddles = in_saddles(inference)
        if bool(saddles.any()):
            self.told = True
            _warn(torch.nonzero(saddles).flatten().tolist(), len(saddles), solver)
        return ~saddles


def _has_risen(inference: ErrorInference) -> bool:
    first, last = (float(sum(inference.history[place].values())) for place in (0, -1))
    return last > first


def in_saddles(inference: ErrorInference, products: int = PRODUCTS) -> Tensor:
    """Which samples rest where the energy curves downwards, by Lanczos on differences of its gradient, a sample each.

    A downward curvature that so many products do not show counts as none; one that they show is there.
    """
    rows = Rows(inference.values, tuple(inference.values), inference.call.batch_size)
    if inference.call.couples_samples:
        rows.count = 1
    with _left_as_it_was(inference):
        here = rows.pack(inference.errors)
        length = here.norm(dim=1, keepdim=True)
        rests = _gradient(inference, rows, here).norm(dim=1) <= RESTS * length[:, 0]
        if not bool(rests.any()):
            return torch.zeros_like(rests)
        fine = torch.finfo(here.dtype).eps ** (1 / 3)
        width = fine * (1 + length)

        def product(vector: Tensor) -> Tensor:
            above, below = (_gradient(inference, rows, here + sign * width * vector) for sign in (1, -1))
            difference: Tensor = (above - below) / (2 * width)
            return difference

        start = rows.pack(noise(inference.values))
        curvatures = _ritz_values(product, start, products)
    lowest, largest = curvatures[:, 0], curvatures.abs().amax(1)
    found: Tensor = rests & (lowest < -max(NEGATIVE, 2 * fine) * largest).to(rests.device)
    return found


def _ritz_values(product: Callable[[Tensor], Tensor], start: Tensor, products: int) -> Tensor:
    vector, before = start / start.norm(dim=1, keepdim=True), torch.zeros_like(start)
    beside = [start.new_zeros(len(start), 1)]
    diagonal: list[Tensor] = []
    for _ in range(products):
        turned = product(vector) - beside[-1] * before
        along = (vector * turned).sum(1, keepdim=True)
        turned = turned - along * vector
        size = turned.norm(dim=1, keepdim=True)
        diagonal.append(along)
        # what is left of an exhausted row is the error of differences
        alive = size > 1e-3 * torch.stack(diagonal).abs().amax(0)
        beside.append(torch.where(alive, size, 0.0))
        before, vector = vector, torch.where(alive, turned / size, 0.0)
    matrix = tridiagonal(
        [each[:, 0].double().cpu() for each in diagonal], [each[:, 0].double().cpu() for each in beside[1:-1]]
    )
    finite = torch.isfinite(matrix).all(-1).all(-1)  # numbers that are none are told by whoever meets them
    values: Tensor = torch.linalg.eigvalsh(torch.where(finite[:, None, None], matrix, 0.0))
    return values


def _gradient(inference: ErrorInference, rows: Rows, errors: Tensor) -> Tensor:
    rows.unpack(errors, inference.errors)
    return rows.pack(dict(inference.total_sweep()))


@contextmanager
def _left_as_it_was(inference: ErrorInference) -> Iterator[None]:
    moving, driving, sweeps = inference.moving(), inference.driving, len(inference.history)
    measuring, inference.measuring = inference.measuring, False
    try:
        yield
    finally:
        inference.restore(moving)
        inference.driving, inference.measuring = driving, measuring
        del inference.history[sweeps:]


def _warn(saddles: list[int], samples: int, solver: object) -> None:
    named = listed([str(sample) for sample in saddles])
    warnings.warn(
        NotAMinimumWarning(
            f"{solver!r} has come to rest in a saddle of the energy, where a small push leads down, in {len(saddles)} "
            f"of {samples} samples ({named}). Gradients there are not those of the minimum that descent reaches. Take "
            "ErrorConjugateGradient(), whose energy never rises, or ErrorDescent(), or a smaller nudge. "
            "state.relaxation.at_minimum names the samples of the batches that are looked at."
        ),
        stacklevel=users_level(),
    )
