"""Equilibrium propagation: the gradient is the local difference between a free and a nudged equilibrium."""

from __future__ import annotations

import cmath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.common.checks import check_reduction, check_steps
from torch2ebm.engine.call import Call
from torch2ebm.engine.gradients import GradientSum
from torch2ebm.engine.nudging import Holomorphic, Nudging, Symmetric
from torch2ebm.engine.results import LocalGradients
from torch2ebm.equilibrium.dynamics import Influence, States, cost_gradients
from torch2ebm.equilibrium.free_phase import FreePhase
from torch2ebm.equilibrium.holomorphic import HolomorphicOperations, check_holomorphic
from torch2ebm.equilibrium.settling import Free, Settled
from torch2ebm.equilibrium.settling_checks import check_drift, check_finite, check_nudged, check_signal
from torch2ebm.equilibrium.updates import Update
from torch2ebm.errors import ConfigurationError, DivergenceError
from torch2ebm.inference.divergence import of_phase
from torch2ebm.isolation.torch_modes import entered
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.memory.last_values import FEEDFORWARD

FLOOR = 1.0  # times the precision: below it nothing of the nudge is left at the first states


@dataclass(frozen=True, repr=False)
class EquilibriumPropagation(Algorithm):
    """Equilibrium propagation (Scellier and Bengio 2017; symmetric: Laborieux et al. 2021) on any graph and loss.

    The states are the module's activations. They settle on the Hopfield-type energy that shares the module's weights,
    ``model(x)`` being the output at that free equilibrium, in evaluation too (``model.feedforward(x)`` is the plain
    output). Backward nudges them by ``beta`` times the loss. The gradient of a parameter is the difference, over beta,
    of the energy's derivative at the nudged and the free equilibrium: it tends to that of the loss at the free
    equilibrium as ``beta`` goes to 0, and to backprop's of the module as ``feedback`` does.

    ``state.prediction`` is the free equilibrium, ``state.error`` what the first nudge changed, ``state.phases[0]`` the
    free phase, and ``state.feedforward_distance`` how far the equilibrium's output is from the feed-forward one.

    Args:
        nudging: ``Symmetric(beta)``, ``OneSided(beta)``, ``RandomSign(beta)`` or ``Holomorphic(beta, points)``.
        free_steps: Steps of the free phase, each one pass and one vector-Jacobian product of all nodes.
        nudged_steps: Steps of each nudged phase.
        feedback: Strength of the feedback per depth: below 1 deep nets settle, towards 0 it becomes backprop.
        damping: Part of each step that is taken back. Where the states cycle, damping of one half is tried, then a
            sequential update; ``state.relaxation.update`` says which one was used.
        tol: Largest change of a state at which a phase ends early; 0 takes all steps.
        readout: The outputs are read out of the states and have none, as suits cross-entropy (Laborieux et al. 2021).
        loss_reduction: ``"mean"`` for a loss that is a mean over the batch, ``"sum"`` to take it as it is written.
        update: How the states move where not all at once: ``AndersonMixing(memory)`` for nets that settle slowly, or
            ``GaussSeidel()``.
        start: Where the free phase starts in training: at the feed-forward pass, or, with ``"last"``, where that of the
            batch before has settled, as persistent particles do; with ``"average"`` at the mean over batches.
        compile: Record a step once as a list of ATen calls and run that from then on, through ``torch.compile``.

    Raises:
        ConfigurationError: for an illegal setting, and in backward where beta * feedback^depth, what reaches the first
            states, is below the precision of the numbers.
        NoEquilibriumError: at the first call, for a module with layer norm, batch statistics, dropout or recurrence.
        NotSettledError: where a one-sided nudge would measure that the free phase still moves, and not the loss.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Hardsigmoid(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.EquilibriumPropagation())
        >>> torch.nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
        >>> [phase.beta for phase in model.state.phases]
        [0.0, 0.5, -0.5]
    """

    partition = "activation"
    defines_output = True

    nudging: Nudging = None  # type: ignore[assignment]  # Symmetric(0.5)
    free_steps: int = 20
    nudged_steps: int = 10
    feedback: float = field(default=1.0, kw_only=True)
    damping: float = field(default=0.0, kw_only=True)
    tol: float = field(default=0.0, kw_only=True)
    readout: bool = field(default=False, kw_only=True)
    loss_reduction: str = field(default="mean", kw_only=True)
    update: Update | None = field(default=None, kw_only=True)
    start: str = field(default=FEEDFORWARD, kw_only=True)
    compile: bool = field(default=False, kw_only=True)
    free_phase: FreePhase = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_reduction("EquilibriumPropagation", self.loss_reduction)
        check_steps("EquilibriumPropagation", self.nudged_steps)
        if isinstance(self.nudging, Nudging) and self.nudging.is_relative:
            got, expected = repr(self.nudging), "a nudging in units of the loss: an equilibrium has another curvature"
            raise ConfigurationError(
                "EquilibriumPropagation(nudging=...)", got, expected, "For example Symmetric(0.5)."
            )
        if self.nudging is not None and not isinstance(self.nudging, Nudging):
            got, remedy = repr(self.nudging), "For example Symmetric(beta=0.5)."
            raise ConfigurationError("EquilibriumPropagation(nudging=...)", got, "a nudging object", remedy)
        object.__setattr__(self, "nudging", Symmetric(0.5) if self.nudging is None else self.nudging)
        object.__setattr__(self, "free_phase", FreePhase.of(self))

    def __repr__(self) -> str:
        parts = [f"{self.nudging!r}", f"nudged_steps={self.nudged_steps}", self.free_phase.settings()]
        parts += [f"loss_reduction={self.loss_reduction!r}"] * (self.loss_reduction != "mean")
        return f"EquilibriumPropagation({', '.join(parts)})"

    def forward(self, call: Call) -> Free:
        # relaxes real states even for Holomorphic: complex ones start from these
        free = self.free_phase.run(call)
        if isinstance(self.nudging, Holomorphic):
            check_holomorphic(free.equilibrium.hopfield)
        return free

    def backward(self, call: Call, free: Free, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        betas = self.nudging.drawn()  # once: a random sign is drawn
        check_signal("EquilibriumPropagation", free, abs(betas[0]), FLOOR)  # all nudges have one size
        if isinstance(self.nudging, Holomorphic):
            # the estimate too: it evaluates nodes at complex states
            with entered(HolomorphicOperations()):
                return self._estimate(call, free, loss, self._circle(free, loss, self.nudging), self.nudging.weights)
        nudges = [beta.real for beta in betas]
        phases = [self._phase(free, loss, beta) for beta in nudges]
        # w_k = 1 / (K beta_k): of beta and -beta, [F(beta) - F(-beta)] / (2 beta) (Laborieux et al. 2021)
        return self._estimate(call, free, loss, phases, [1 / (len(nudges) * beta) for beta in nudges])

    def _estimate(
        self, call: Call, free: Free, loss: OutputLoss, phases: Sequence[Settled], weights: Sequence[complex]
    ) -> LocalGradients:
        """-sum_k w_k [dPhi/dtheta(s_k) - dPhi/dtheta(s_0)] / c_o; s_0 cancels where the weights sum to 0."""
        equilibrium, result = free.equilibrium, GradientSum()
        pairs = list(zip([phase.states for phase in phases], weights, strict=True))
        rest = -sum(weight.real for weight in weights)
        if abs(rest) > 1e-9 * abs(weights[0]):  # above the rounding of cos and sin, on a circle of nudges
            # symmetric nudges drift alike, so that their difference does not
            check_drift(free, phases, "one-sided nudge")
            pairs.append((free.settled.states, rest))
        scale = -loss.scale / equilibrium.output_weight
        equilibrium.contrast([(states, weight * scale) for states, weight in pairs], result)
        if equilibrium.hopfield.readouts:
            for phase, weight in zip(phases, weights, strict=True):
                # A read-out's parameters stand in beta C alone, and not in Phi (Laborieux et al. 2021):
                # w_k beta_k dC/dtheta, without c_o.
                share = (weight * cmath.rect(phase.relaxation.beta, phase.relaxation.angle)).real
                cost_gradients(equilibrium, phase.states, loss, result, share * loss.scale)
        inputs = call.input_gradients(result.clamped)
        return LocalGradients(result.parameters, inputs, free.report_of(phases))

    def _circle(self, free: Free, loss: OutputLoss, nudging: Holomorphic) -> list[Settled]:
        # the free equilibrium, whose imaginary part is zero
        start = {slot: torch.complex(s, torch.zeros_like(s)) for slot, s in free.settled.states.items()}
        return [
            self._settled(free, start, Influence(loss, beta), nudging.beta, angle)
            for beta, angle in zip(nudging.betas, nudging.angles, strict=True)
        ]

    # Every phase starts from the free states, not from the phase before (Scellier and Bengio 2017).
    def _phase(self, free: Free, loss: OutputLoss, beta: float) -> Settled:
        return self._settled(free, free.settled.states, Influence(loss, beta), beta)

    def _settled(self, free: Free, start: States, influence: Influence, beta: float, angle: float = 0.0) -> Settled:
        given = influence.loss.delivered if influence.loss is not None else {}
        steps, update = self.nudged_steps, free.update
        phase = self.free_phase.settled(free.equilibrium, start, steps, update, influence, beta, angle)
        try:
            check_finite(free.equilibrium, phase, f"nudged phase {beta:g}", given)
        except DivergenceError as error:
            raise of_phase(error, beta) from error
        check_nudged(free, phase, f"nudged phase {beta:g}")
        return phase

    def with_steps(self, steps: int) -> EquilibriumPropagation:
        """The same with other numbers of steps, of the free phase and of the nudged ones."""
        return replace(self, free_steps=steps, nudged_steps=steps)

    @classmethod
    def _settings_of_0_1(cls, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**state, **state["free_phase"].as_settings()}
