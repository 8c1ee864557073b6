"""Coupled learning: the output is clamped a small step down the loss from its free value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.algorithms.clamped import contrast_with_clamped
from torch2ebm.common.checks import check_steps
from torch2ebm.engine.call import Call
from torch2ebm.engine.nudging import check_beta
from torch2ebm.engine.results import LocalGradients
from torch2ebm.equilibrium.free_phase import FreePhase
from torch2ebm.equilibrium.settling import Free
from torch2ebm.equilibrium.updates import Update
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.memory.last_values import FEEDFORWARD


@dataclass(frozen=True, repr=False)
class CoupledLearning(Algorithm):
    """Coupled learning (Stern et al. 2021; Scellier et al. 2023) on any graph and loss.

    The output is held at s_o - beta dL/ds_o, and the gradient is the difference of dE/dtheta between that phase and the
    free one, over beta. It is no estimate of the loss's gradient, even as ``beta`` goes to 0: a direction that lowers
    the loss. With ``beta=1`` it is contrastive learning.

    A constant factor of the loss, as in ``0.5 * (error**2).sum(1).mean()``, counts like ``beta``: it moves the held
    output as far as it says. What is no part of the loss (accumulation, a gradient scaler) only scales the gradient.
    Cross-entropy drives the outputs, and so what they send back, without bound, while its pull
    fades: with full feedback the free phase then stops settling in time, which is refused; take ``feedback=0.1``.

    Args:
        beta: How far the output is moved, in gradients of the loss summed over samples.
        free_steps: Steps of the free phase.
        clamped_steps: Steps of the clamped phase.
        feedback: Strength of the feedback per depth; towards 0 this becomes contrastive Hebbian learning.
        damping: Part of each step that is taken back.
        tol: Largest change of a state at which a phase ends early; 0 takes all steps.
        update: How the states move where not all at once: ``AndersonMixing(memory)`` for nets that settle slowly, or
            ``GaussSeidel()``.
        start: Where the free phase starts in training: at the feed-forward pass, or, with ``"last"``, where that of the
            batch before has settled, as persistent particles do; with ``"average"`` at the mean over batches.

    Raises:
        ConfigurationError: for an illegal setting.
        NotSettledError: where the free phase still moves by more than holding the output moves the states.
        NoEquilibriumError: at the first call, for a module with layer norm, batch statistics, dropout or recurrence.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Hardsigmoid(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.CoupledLearning(beta=0.25))
        >>> torch.nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
        >>> model.state.relaxation.beta
        0.25
    """

    partition = "activation"
    defines_output = True
    reevaluates_loss = False  # the loss is needed at the free output alone, where autograd has its gradient

    beta: float = 0.25  # of the comparative study (Scellier et al. 2023)
    free_steps: int = 20
    clamped_steps: int = 10
    feedback: float = field(default=1.0, kw_only=True)
    damping: float = field(default=0.0, kw_only=True)
    tol: float = field(default=0.0, kw_only=True)
    update: Update | None = field(default=None, kw_only=True)
    start: str = field(default=FEEDFORWARD, kw_only=True)
    free_phase: FreePhase = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_beta("CoupledLearning", self.beta)
        check_steps("CoupledLearning", self.clamped_steps)
        object.__setattr__(self, "free_phase", FreePhase.of(self))

    def __repr__(self) -> str:
        return f"CoupledLearning({self.beta:g}, {self.free_phase.settings()}, clamped_steps={self.clamped_steps})"

    def forward(self, call: Call) -> Free:
        return self.free_phase.run(call)

    def backward(self, call: Call, kept: Free, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        return contrast_with_clamped(call, kept, loss, self.beta, self.clamped_steps, self.free_phase.tol)

    def with_steps(self, steps: int) -> CoupledLearning:
        """The same with another number of steps in both phases."""
        return replace(self, free_steps=steps, clamped_steps=steps)

    @classmethod
    def _settings_of_0_1(cls, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**state, **state["free_phase"].as_settings()}
