"""Recurrent backpropagation: the exact gradient at the free equilibrium, by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.engine.call import Call
from torch2ebm.engine.gradients import GradientSum
from torch2ebm.engine.results import InferenceState, LocalGradients, Relaxation
from torch2ebm.equilibrium.dynamics import pulled_through
from torch2ebm.equilibrium.free_phase import FreePhase
from torch2ebm.equilibrium.hopfield import Term
from torch2ebm.equilibrium.linear_solvers import LinearSolver, Neumann, Solution, Vector
from torch2ebm.equilibrium.linearised import LinearisedStep
from torch2ebm.equilibrium.settling import Free
from torch2ebm.equilibrium.updates import Update
from torch2ebm.errors import ConfigurationError
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.memory.last_values import FEEDFORWARD


@dataclass(frozen=True, repr=False)
class RecurrentBackprop(Algorithm):
    """Recurrent backpropagation (Almeida 1987; Pineda 1987) at the equilibrium of the energy that
    :class:`EquilibriumPropagation` uses, whose estimate tends to this gradient (Scellier and Bengio 2019).

    dL/dtheta = (df/dtheta)^T z with (I - J^T) z = dL/ds, f the step and J its Jacobian at the free equilibrium.
    ``state.error`` is -z, ``state.phases`` the free phase and the solution of the system.

    Args:
        solver: ``Neumann(terms)``, ``FixedPointSolve()`` or ``ConjugateGradient()``.
        free_steps: Steps of the free phase.
        tol: Largest change of a state at which the free phase ends early; 0 takes all steps.
        feedback: Strength of the feedback per depth.
        damping: Part of each step that is taken back.
        readout: The outputs are read out of the states and have none.
        update: How the states move where not all at once: ``AndersonMixing(memory)`` for nets that settle slowly, or
            ``GaussSeidel()``.
        start: Where the free phase starts in training: at the feed-forward pass, or, with ``"last"``, where that of the
            batch before has settled, as persistent particles do; with ``"average"`` at the mean over batches.

    Raises:
        ConfigurationError: for an illegal setting.
        NoEquilibriumError: at the first call, for a module with layer norm, batch statistics, dropout or recurrence.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Hardsigmoid(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> algorithm = torch2ebm.RecurrentBackprop(torch2ebm.Neumann(terms=10))
        >>> optimizer = torch2ebm.EnergyOptimizer(sgd, model, algorithm)
        >>> torch.nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
        >>> model.state.relaxation.steps
        10
    """

    partition = "activation"
    defines_output = True
    reevaluates_loss = False  # dL/ds is needed at the free equilibrium alone, where autograd has it

    solver: LinearSolver = field(default_factory=Neumann)
    free_steps: int = 20
    tol: float = 0.0
    feedback: float = field(default=1.0, kw_only=True)
    damping: float = field(default=0.0, kw_only=True)
    readout: bool = field(default=False, kw_only=True)
    update: Update | None = field(default=None, kw_only=True)
    start: str = field(default=FEEDFORWARD, kw_only=True)
    free_phase: FreePhase = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.solver is not None and not isinstance(self.solver, LinearSolver):
            expected, remedy = "Neumann, FixedPointSolve or ConjugateGradient", "For example Neumann(terms=20)."
            raise ConfigurationError("RecurrentBackprop(solver=...)", repr(self.solver), expected, remedy)
        object.__setattr__(self, "solver", Neumann() if self.solver is None else self.solver)
        object.__setattr__(self, "free_phase", FreePhase.of(self))

    def __repr__(self) -> str:
        return f"RecurrentBackprop({self.solver!r}, {self.free_phase.settings()})"

    def forward(self, call: Call) -> Free:
        return self.free_phase.run(call)

    def backward(self, call: Call, free: Free, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        step, result = LinearisedStep(free.equilibrium, free.settled.states), GradientSum()
        cost = _cost(free, loss, result)
        # dL/ds; zero where the loss reads no state
        b = {slot: cost.get(slot, torch.zeros_like(value)) for slot, value in free.settled.states.items()}
        # (I - J^T) z = dL/ds, then dL/dtheta = (df/dtheta)^T z (Almeida 1987; Pineda 1987)
        solution = self.solver.solve(step, b)
        step.collect(solution.z, loss.scale, result)
        state = self._report(free, step, solution)
        return LocalGradients(result.parameters, call.input_gradients(result.clamped), state)

    def _report(self, free: Free, step: LinearisedStep, solution: Solution) -> InferenceState:
        errors = {slot: -each for slot, each in solution.z.items()}  # e = -delta, as everywhere
        tol = self.solver.tol
        converged = solution.residual <= tol if tol > 0 else None  # Neumann has none to meet
        relaxation = Relaxation(solution.steps, converged, solution.residual, tol=tol, beta=0.0)  # no nudge
        # a pre-activation's error: through the activation's slope
        state = free.report(errors, step.at_drives(errors), relaxation)
        return replace(state, phases=(free.settled.relaxation, relaxation))

    def with_steps(self, steps: int) -> RecurrentBackprop:
        """The same with another number of free steps."""
        return replace(self, free_steps=steps)

    @classmethod
    def _settings_of_0_1(cls, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**state, **state["free_phase"].as_settings()}


def _cost(free: Free, loss: OutputLoss, result: GradientSum) -> Vector:
    """dL/ds of the loss summed over samples, from what autograd delivered; read-outs add their parameters' share."""
    equilibrium = free.equilibrium
    # delivered is of the loss as reduced; the system is solved for the sum over samples
    gradients: dict[str, Tensor] = {slot: each * loss.unit for slot, each in loss.delivered.items()}
    with torch.enable_grad():
        passes = [equilibrium.evaluate(Term(node, ()), free.settled.states) for node in equilibrium.hopfield.readouts]
    return pulled_through(equilibrium, passes, gradients, result, loss.scale)
