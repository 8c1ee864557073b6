"""What a relative nudge is divided by: the curvature of a call, measured on it or carried from the calls before."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from torch2ebm.common.users_code import users_level
from torch2ebm.engine.call import Call, at_least_single
from torch2ebm.engine.node_energies import NodeEnergies
from torch2ebm.errors import CurvatureWarning
from torch2ebm.inference.curvature import Curvature, measured_curvature
from torch2ebm.inference.local_products import LocalProducts
from torch2ebm.loss.output_loss import OutputLoss

PRODUCTS = 3  # within a few percent on chains and residual nets of 20 to 200 layers
NOT_CONVEX = 1e-3  # what rounding and differences leave of an eigenvalue of zero, beside the largest


@dataclass(frozen=True)
class NudgeUnit:
    """What ``r`` is divided by.

    Attributes:
        scale: The curvature, or what stands for it where there is none.
        backprops: What this call has spent on it.
    """

    scale: float
    backprops: float = 0.0


class Carried:
    """The unit of the last measurement on one graph, and how many calls ago it was."""

    def __init__(self) -> None:
        self.scale, self.calls = 0.0, 0
        self._told: set[str] = set()

    def unit(self, call: Call, loss: OutputLoss, energies: NodeEnergies, every: int) -> NudgeUnit:
        """Measured on this call, or the last one."""
        due = self.calls % every == 0 or not self.scale  # calls that one loss joins are measured side by side
        self.calls += 1
        if not due:
            return NudgeUnit(self.scale)
        found = measured_curvature(call, loss, energies, PRODUCTS, exact=False)
        self.scale = self._scale(call, loss, energies, found)
        return NudgeUnit(self.scale, found.backprops)

    def _scale(self, call: Call, loss: OutputLoss, energies: NodeEnergies, found: Curvature) -> float:
        if found.radius == 0.0:
            said = "has no curvature in the errors"
            self._tell_once(said, f"{said}; the nudge makes errors of length r in the steepest sample")
            return _steepest(call, loss, energies) or 1.0
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


def carried(call: Call, energies: NodeEnergies, loss_reduction: str) -> Carried:
    """The one of this graph under these settings."""
    settings = ("relative nudge", energies, loss_reduction, call.frozen_statistics)
    return call.graph.once(settings, Carried)


def _steepest(call: Call, loss: OutputLoss, energies: NodeEnergies) -> float:
    """The longest error that a nudge of 1 makes in any sample: |Pi^-1 J^T dL|."""
    predictions = {slot: call.values[slot].detach() for slot in call.graph.output_slots}
    local = LocalProducts(call, energies, exact=True)
    squares = [
        _of_samples(error.square(), call.batch_size) for _, error in local.errors(loss.gradients(predictions)[1])
    ]
    longest = sum(squares, torch.zeros(())).max()  # rows of samples; a value without them counts in each
    return float(longest.sqrt())


def _of_samples(squares: Tensor, batch_size: int) -> Tensor:
    squares = at_least_single(squares)
    return squares.flatten(1).sum(1) if squares.ndim > 1 and len(squares) == batch_size else squares.sum()
