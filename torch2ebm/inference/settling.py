"""When a relaxation with ``steps="auto"`` rests: every node near its own equilibrium, or the values on kinks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torch2ebm.common.users_code import users_level
from torch2ebm.errors import NotSettledWarning
from torch2ebm.inference.base import LOSS, Inference
from torch2ebm.inference.solver import Rest
from torch2ebm.inference.value_inference import ValueInference

CEILING = 2000  # steps, of steps="auto"
SOONEST = 32  # steps before which no energy stands still
STALLED = 0.9  # of the residual before: who falls less comes no nearer
STANDING = 0.05  # how much a node's energy changes at most where it stands still
AGAIN = 1.25  # times as many steps before the next look that costs a sweep


class Settling:
    """Looks at a relaxation after every step.

    A sample is settled where ``|dF/dx| <= tol |pi e|`` in every node. Where values move, that is not yet near: an
    error that many levels share has a small gradient in each. There the sum over levels, dF/de, has to be small too.

    A sample rests on kinks where it is not settled, its residual falls no more, and no node's energy changes. A quarter
    of the steps decides.
    """

    def __init__(self, inference: Inference, tol: float) -> None:
        self.inference, self.tol = inference, tol
        self.residuals: list[Tensor] = []
        self.next_look = 0.0

    def seen(self, rest: Rest) -> Rest:
        """The rest after a step, with shares of the samples, where they can be told apart."""
        of_samples = rest.of_samples if rest.of_samples is not None else torch.tensor([rest.residual])
        steps = len(self.inference.history)
        self.residuals.append(of_samples)
        settled = of_samples <= self.tol
        on_kinks = torch.zeros_like(settled) if bool(settled.all()) else self._on_kinks(settled, steps)
        reached = bool((settled | on_kinks).all())
        if reached and isinstance(self.inference, ValueInference):
            if steps < self.next_look:
                reached = False
            else:
                summed = self.inference.summed_residual()
                self.next_look = AGAIN * steps
                settled, of_samples = settled & (summed <= self.tol), torch.maximum(of_samples, summed.to(of_samples))
                reached = bool((settled | on_kinks).all())
        shares = [float(each.double().mean()) for each in (settled, on_kinks)]
        samples = None if rest.of_samples is None else of_samples
        return replace(
            rest,
            residual=float(of_samples.max()),
            reached=reached,
            of_samples=samples,
            settled=shares[0],
            on_kinks=shares[1],
        )

    def _on_kinks(self, settled: Tensor, steps: int) -> Tensor:
        if steps < SOONEST or steps % (SOONEST // 4) or not self._stands_still(self.inference.history):
            return torch.zeros_like(settled)
        quarter = steps // 4
        before, now = (torch.stack(p).amin(0) for p in (self.residuals[:-quarter], self.residuals[-quarter:]))
        # infinite: an error of zero that a message has just reached
        return ~settled & (now >= STALLED * before) & torch.isfinite(now)

    def _stands_still(self, history: Sequence[Mapping[str, Tensor]]) -> bool:
        first, before, now = history[0], history[-1 - len(history) // 4], history[-1]
        if before.keys() != now.keys():
            return False  # errors still reach new nodes
        of_nodes = torch.stack([part for sweep in (before, now) for name, part in sweep.items() if name != LOSS])
        old, new = of_nodes.double().reshape(2, -1)
        whole = [float(sum(sweep.values())) for sweep in (first, before, now)]
        falls = whole[1] - whole[2] > self.tol**2 * (whole[0] - whole[2])
        return not falls and bool(((new - old).abs() <= STANDING * new.abs()).all())


def tell_ceiling(solver: object, inference: Inference, rest: Rest) -> None:
    """Once a graph."""
    name = type(solver).__name__
    said = (
        f'{name}(steps="auto"): {CEILING} steps have left a residual of {rest.residual:.2g} of the error. '
        "Take ErrorConjugateGradient() or ErrorDescent, a smaller nudge, a larger tol, or a number of steps."
    )
    inference.graph.once(
        ("ceiling", type(solver)),
        lambda: warnings.warn(NotSettledWarning(said), stacklevel=users_level()) or True,
    )
