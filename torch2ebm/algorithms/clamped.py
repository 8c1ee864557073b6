"""The gradient of contrastive Hebbian and coupled learning: a phase with clamped outputs, against the free one."""

from __future__ import annotations

import torch
from torch import Tensor

from torch2ebm.engine.call import Call
from torch2ebm.engine.gradients import GradientSum
from torch2ebm.engine.results import LocalGradients
from torch2ebm.equilibrium.dynamics import Influence, pulled_through
from torch2ebm.equilibrium.hopfield import Term
from torch2ebm.equilibrium.settling import Free, Settled, settle
from torch2ebm.equilibrium.settling_checks import check_drift, check_finite, check_nudged
from torch2ebm.loss.output_loss import OutputLoss


def contrast_with_clamped(
    call: Call, free: Free, loss: OutputLoss, amount: float, steps: int, tol: float
) -> LocalGradients:
    """-[dPhi/dtheta(clamped) - dPhi/dtheta(free)] / (amount c_o), the outputs held at s_o - amount dC/ds_o."""
    # amount 1 is contrastive learning, a small one coupled learning (Scellier et al. 2023)
    phase = _clamped_phase(free, loss, amount, steps, tol)
    result, scale = GradientSum(), loss.scale / (amount * free.equilibrium.output_weight)
    free.equilibrium.contrast([(phase.states, -scale), (free.settled.states, scale)], result)
    # inputs are clamped: their gradient is that of Phi, as for a parameter
    inputs = call.input_gradients(result.clamped)
    return LocalGradients(result.parameters, inputs, free.report_of([phase]))


def _clamped_phase(free: Free, loss: OutputLoss, amount: float, steps: int, tol: float) -> Settled:
    equilibrium, states = free.equilibrium, free.settled.states
    gradients = {slot: each * loss.unit for slot, each in loss.delivered.items()}  # dC/d(output), C summed over samples
    # outputs that are no states, a softmax for example: their gradient has to be pulled back to the states
    with torch.enable_grad():
        passes = [equilibrium.evaluate(Term(node, ()), states) for node in equilibrium.hopfield.readouts]
    held: dict[str, Tensor] = {}
    for slot, gradient in pulled_through(equilibrium, passes, gradients, None, 1.0).items():
        # outputs of other depths than the deepest: the part of c_o that their own weight is
        held[slot] = states[slot].sub(gradient, alpha=amount * equilibrium.output_weight / equilibrium.weight[slot])
    # Held from the start: a step computes its feedback from the states before it,
    # so the first step would otherwise feed back the free outputs.
    start = {**states, **held}
    phase = settle(equilibrium, start, steps, free.update, Influence(held=held), tol, amount)
    check_finite(equilibrium, phase, "clamped phase", loss.delivered)
    check_nudged(free, phase, "clamped phase")
    # a contrast with the free states counts what would have moved anyway
    check_drift(free, [phase], "clamped phase")
    return phase
