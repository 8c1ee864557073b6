"""What a relative nudge is divided by: the curvature of a call, measured on it or carried from the calls before."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch2ebm.common.users_code import users_level
from torch2ebm.engine.call import Call, at_least_single
from torch2ebm.engine.nudging import Relative
from torch2ebm.errors import CurvatureWarning
from torch2ebm.inference.curvature import BACKPROP, Curvature, measured_curvature
from torch2ebm.inference.local_products import LocalProducts
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.potentials.node_energies import NodeEnergies

PRODUCTS = 3  # within a few percent on chains and residual nets of 20 to 200 layers
NOT_CONVEX = 1e-3  # what rounding and differences leave of an eigenvalue of zero, beside the largest


@dataclass(frozen=True)
class NudgeUnit:
    """What ``r`` is divided by.

    Attributes:
        scale: The larger one of the curvature and of what keeps errors short beside the values.
        sigma_squared: The curvature, or what stands for it where there is none.
        backprops: What this call has spent on it.
    """

    scale: float
    sigma_squared: float
    backprops: float = 0.0


class Carried:
    """The unit of the last measurement on one graph, and how many calls ago it was."""

    def __init__(self) -> None:
        self.calls = 0
        self.last: NudgeUnit | None = None
        self._told: set[str] = set()

    def unit(self, call: Call, loss: OutputLoss, energies: NodeEnergies, nudging: Relative) -> NudgeUnit:
        """Measured on this call, or the last one."""
        due = self.calls % nudging.every == 0  # calls that one loss joins are measured side by side
        self.calls += 1
        if self.last is not None and not due:
            return replace(self.last, backprops=0.0)
        found = measured_curvature(call, loss, energies, PRODUCTS, exact=False)
        if found.radius == 0.0 and not _longest(call, loss, energies, beside_values=False):
            # no value has a say in the loss, as before a head of zeros: any nudge will do, until the next call
            return NudgeUnit(1.0, 0.0, found.backprops)
        sigma_squared = self._scale(call, loss, energies, found)
        self.last = NudgeUnit(sigma_squared, sigma_squared, found.backprops)
        if nudging.largest_error is not None:
            # beta |e| <= largest_error |v|, where e are the errors of a nudge of 1
            bound = nudging.r / nudging.largest_error * _longest(call, loss, energies, beside_values=True)
            self.last = replace(self.last, scale=max(sigma_squared, bound), backprops=found.backprops + 2 / BACKPROP)
        return self.last

    def _scale(self, call: Call, loss: OutputLoss, energies: NodeEnergies, found: Curvature) -> float:
        if found.radius == 0.0:
            said = "has no curvature in the errors"
            self._tell_once(said, f"{said}; the nudge makes errors of length r in the steepest sample")
            return _longest(call, loss, energies, beside_values=False) or 1.0
        if -found.lowest > NOT_CONVEX * found.sigma_squared:
            said, between = "is not convex in the errors", f"from {found.lowest:.3g} to {found.sigma_squared:.3g}"
            self._tell_once(said, f"{said} (eigenvalues {between}); the nudge is r over the largest absolute one")
        return found.radius

    def _tell_once(self, kind: str, said: str) -> None:
        """A measurement comes every few calls, and says the same of each."""
        if kind not in self._told:
            self._told.add(kind)
            message = f"PredictiveCoding(nudging=Relative(r)): the loss {said}."
            warnings.warn(CurvatureWarning(message), stacklevel=users_level())


def carried(call: Call, energies: NodeEnergies, loss_reduction: str, nudging: Relative) -> Carried:
    """The one of this graph under these settings."""
    bound = None if nudging.largest_error is None else nudging.largest_error / nudging.r
    settings = ("relative nudge", energies, loss_reduction, call.frozen_statistics, bound)
    return call.graph.once(settings, Carried)


def _longest(call: Call, loss: OutputLoss, energies: NodeEnergies, beside_values: bool) -> float:
    """The longest error that a nudge of 1 makes in any sample, |Pi^-1 J^T dL|, or its share of that sample's values."""
    predictions = {slot: call.values[slot].detach() for slot in call.graph.output_slots}
    local = LocalProducts(call, energies, exact=True)
    errors = local.errors(loss.gradients(predictions)[1])
    squares = _of_samples([error for _, error in errors], call.batch_size)
    if beside_values:
        values = _of_samples([call.values[slot].detach() for slot, _ in errors], call.batch_size)
        squares = torch.where(values > 0, squares / values, 0.0)
    return float(squares.max().sqrt())


def _of_samples(parts: Sequence[Tensor], batch_size: int) -> Tensor:
    """The sum of squares of each sample; what has no row for each counts in all."""
    total = torch.zeros(batch_size)
    for part in parts:
        squares = at_least_single(part).square()
        batched = squares.ndim > 1 and len(squares) == batch_size
        total = total + (squares.flatten(1).sum(1) if batched else squares.sum()).to(total)
    return total
