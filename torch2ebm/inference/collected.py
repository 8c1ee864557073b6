"""What the last pass over the nodes collects."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from torch2ebm.engine.gradients import GradientSum


@dataclass
class Collected:
    """What the last pass over the nodes collects, by slot."""

    gradients: GradientSum = field(default_factory=GradientSum)
    predictions: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)  # times minus the loss's scale
    unreached: list[str] = field(default_factory=list)
