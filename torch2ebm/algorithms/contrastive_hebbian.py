"""Contrastive Hebbian learning: a free phase, a clamped phase, and weak feedback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.algorithms.clamped import contrast_with_clamped
from torch2ebm.common.checks import check_steps
from torch2ebm.engine.call import Call
from torch2ebm.engine.results import LocalGradients
from torch2ebm.equilibrium.free_phase import FreePhase
from torch2ebm.equilibrium.settling import Free
from torch2ebm.equilibrium.settling_checks import check_signal
from torch2ebm.equilibrium.updates import Update
from torch2ebm.errors import PartitionError
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.memory.last_values import FEEDFORWARD

FLOOR = 1e3  # times the precision: below it rounding is more than about a hundredth of the signal


@dataclass(frozen=True, repr=False)
class ContrastiveHebbian(Algorithm):
    """Contrastive Hebbian learning (Xie and Seung 2003) on any graph and loss.

    The output is held at its free value less the gradient of the loss, which for half a squared error is the target.
    The difference of the two phases, weighted by feedback^(depth n - depth of the output), tends to backprop's gradient
    with an error of first order in ``feedback``. ``model(x)`` is the output at the free equilibrium.

    A constant factor of the loss, as in ``0.5 * (error**2).sum(1).mean()``, moves the held output as far as it says.
    What is no part of the loss (accumulation, a gradient scaler) only scales the gradient, and the output is held where
    the loss without it says.

    Args:
        feedback: gamma, the strength of the feedback per depth.
        free_steps: Steps of the free phase.
        clamped_steps: Steps of the clamped phase.
        damping: Part of each step that is taken back.
        tol: Largest change of a state at which a phase ends early; 0 takes all steps.
        update: How the states move where not all at once: ``AndersonMixing(memory)`` for nets that settle slowly, or
            ``GaussSeidel()``.
        start: Where the free phase starts in training: at the feed-forward pass, or, with ``"last"``, where that of the
            batch before has settled, as persistent particles do; with ``"average"`` at the mean over batches.

    Raises:
        ConfigurationError: for an illegal setting, and at the first call where gamma^depth, the signal that reaches
            the first states, is near the precision of the numbers.
        NotSettledError: where the free phase still moves by more than holding the output moves the states.
        PartitionError: at the first call, where an output ends in an activation.
        NoEquilibriumError: at the first call, for a module with layer norm, batch statistics, dropout or recurrence.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.ContrastiveHebbian(feedback=0.05))
        >>> torch.nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
        >>> len(model.state.phases)
        2
    """

    partition = "activation"
    defines_output = True
    reevaluates_loss = False  # the loss is needed at the free output alone, where autograd has its gradient

    feedback: float = 0.1
    free_steps: int = 20
    clamped_steps: int = 20
    damping: float = field(default=0.0, kw_only=True)
    tol: float = field(default=0.0, kw_only=True)
    update: Update | None = field(default=None, kw_only=True)
    start: str = field(default=FEEDFORWARD, kw_only=True)
    free_phase: FreePhase = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_steps("ContrastiveHebbian", self.clamped_steps)
        object.__setattr__(self, "free_phase", FreePhase.of(self))

    def __repr__(self) -> str:
        return f"ContrastiveHebbian({self.free_phase.settings()}, clamped_steps={self.clamped_steps})"

    def forward(self, call: Call) -> Free:
        free = self.free_phase.run(call)
        _check_outputs(free)
        # in forward already: gamma^depth does not depend on the loss, which need not be computed first
        check_signal(f"ContrastiveHebbian(feedback={self.free_phase.feedback:g})", free, 1.0, FLOOR)
        return free

    def backward(self, call: Call, kept: Free, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        # amount 1: of half a squared error, s_o - dC/ds_o is the target (Xie and Seung 2003)
        return contrast_with_clamped(call, kept, loss, 1.0, self.clamped_steps, self.free_phase.tol)

    def with_steps(self, steps: int) -> ContrastiveHebbian:
        """The same with another number of steps in both phases."""
        return replace(self, free_steps=steps, clamped_steps=steps)

    @classmethod
    def _settings_of_0_1(cls, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**state, **state["free_phase"].as_settings()}


def _check_outputs(free: Free) -> None:
    for slot in free.equilibrium.nudged:
        state = free.equilibrium.hopfield.states[slot]
        # s_o^clamped - s_o^free = -dC/ds_o is the error of the pre-activation for the identity alone
        if state.activation is not None:
            raise PartitionError(
                f"ContrastiveHebbian, output '{state.name}'",
                f"an output that ends in an activation ({state.kind})",
                "a linear output, which is held at its value less the gradient of the loss",
                "Leave the last activation to the loss (cross_entropy, binary_cross_entropy_with_logits).",
            )
