"""How one gradient agrees with another."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """How one gradient g agrees with autograd's r.

    Attributes:
        cosine: <g, r> / (|g| |r|); NaN where one of them is zero.
        angle: In degrees, exact near 0 where the cosine is not; 90 where exactly one of them is zero.
        relative_error: |g - r| / |r|.
        norm_ratio: |g| / |r|.
        sign_agreement: Share of the entries whose signs agree.
    """

    cosine: float
    angle: float
    relative_error: float
    norm_ratio: float
    sign_agreement: float


def agreement(ours: Tensor, reference: Tensor) -> Agreement:
    """The measures of one pair of gradients, in double precision."""
    g, r = ours.detach().double().flatten(), reference.detach().double().flatten()
    norm_g, norm_r = float(g.norm()), float(r.norm())
    if norm_g == 0.0 or norm_r == 0.0:
        both = norm_g == norm_r
        cosine, angle = (1.0, 0.0) if both else (math.nan, 90.0)
        relative, ratio = (
            (0.0, 1.0) if both else (math.inf if norm_r == 0.0 else 1.0, math.inf if norm_r == 0.0 else 0.0)
        )
    else:
        u, v = g / norm_g, r / norm_r
        cosine = max(-1.0, min(1.0, float(u @ v)))
        angle = math.degrees(2 * math.atan2(float((u - v).norm()), float((u + v).norm())))
        relative, ratio = float((g - r).norm()) / norm_r, norm_g / norm_r
    return Agreement(cosine, angle, relative, ratio, float((g.sign() == r.sign()).double().mean()))
