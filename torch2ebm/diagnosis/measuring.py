"""What is measured of one call, around its feed-forward pass, before anything relaxes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.diagnosis.loss_scale import LossScale, half_and_terms, output_curvature
from torch2ebm.diagnosis.reach import Reach, reach_of, steps_to_reach_all
from torch2ebm.diagnosis.settings import nudge_of
from torch2ebm.diagnosis.spectrum import Spectrum, spectra
from torch2ebm.engine.call import Call
from torch2ebm.errors import Torch2EBMError
from torch2ebm.inference.curvature import measured_curvature
from torch2ebm.loss.output_loss import NudgedLoss, OutputLoss

PRODUCTS = 60  # for each end of a spectrum
SURE = 1e-4  # of sigma squared: to how much of itself it is measured


@dataclass(frozen=True, eq=False)
class Measured:
    """What is measured of the call, whatever the algorithm relaxes.

    Attributes:
        scale: Of the loss.
        sigma_squared: Largest curvature of the loss in the errors.
        lowest: The smallest one, where it is below 0; else 0.
        reach: Of errors.
        levels: Longest path from a value to the output.
        steps: Longest of the shortest paths.
        beta: The nudge.
        values: The energy's Hessian in the values; None without any.
        errors: The same in the errors.
    """

    scale: LossScale
    sigma_squared: float
    lowest: float
    reach: Reach
    levels: int
    steps: int
    beta: float | None
    values: Spectrum | None
    errors: Spectrum | None


def measured_of(
    call: Call, loss: OutputLoss, algorithm: Algorithm, scale: LossScale, beta: float | None = None
) -> Measured:
    """All of it.

    Args:
        call: The call, after a feed-forward pass that has kept its graph.
        loss: Its loss, not nudged.
        algorithm: Whose energies and nudge count.
        scale: What is known of the loss.
        beta: The nudge, where a relaxation has shown it.
    """
    energies = getattr(algorithm, "energies", {})
    curvature = measured_curvature(call, loss, energies, PRODUCTS, SURE)
    values = errors = None
    if call.graph.hidden_nodes:
        beta = nudge_of(algorithm, curvature.radius) if beta is None else beta
        nudged = loss if beta is None else NudgedLoss(loss, beta)
        values, errors = spectra(call, nudged, energies, curvature.of_samples is not None, PRODUCTS)
    return Measured(
        _of_terms(scale, call, loss),
        curvature.sigma_squared,
        curvature.lowest,
        reach_of(call, loss),
        call.graph.depth,
        steps_to_reach_all(call.graph, loss.delivered),
        beta,
        values,
        errors,
    )


def is_an_output(call: Call, loss: OutputLoss) -> bool:
    return all(not call.values[slot].ndim for slot in call.graph.output_slots if slot in loss.delivered)


def _of_terms(scale: LossScale, call: Call, loss: OutputLoss) -> LossScale:
    """With its curvature in the outputs, its terms and its one half."""
    terms = float(getattr(loss, "loss_terms", 1.0))
    if is_an_output(call, loss):  # and has no curvature there
        return replace(scale, terms=terms)
    try:
        found = output_curvature(call, loss)
    except Torch2EBMError:
        return replace(scale, terms=terms)
    half = None
    shapes = [call.values[slot].shape for slot in call.graph.output_slots if slot in loss.delivered]
    if found.quadratic is not None and len(shapes) == 1:
        sizes = list(shapes[0])
        if call.batch_size in sizes:
            sizes.remove(call.batch_size)
        half, terms = half_and_terms(found.quadratic, terms, sizes)
    return replace(scale, terms=terms, curvature=found.largest, one_half=half)
