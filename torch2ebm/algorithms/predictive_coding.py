"""Predictive coding: relax all values on the energy, then one local gradient a parameter (Torch2PC's Strict)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.common.checks import check_reduction
from torch2ebm.engine.call import Call
from torch2ebm.engine.energies import Energy
from torch2ebm.engine.node_energies import check_names, node_energies
from torch2ebm.engine.nudging import Nudging, OneSided
from torch2ebm.engine.results import LocalGradients
from torch2ebm.errors import ConfigurationError, DivergenceError
from torch2ebm.inference.divergence import check_on_divergence, check_phases, no_gradients, of_phase
from torch2ebm.inference.relaxation import relax
from torch2ebm.loss.output_loss import NudgedLoss, OutputLoss
from torch2ebm.programs.cache import Programs
from torch2ebm.solvers import GradientDescent, Solver


class PredictiveCoding(Algorithm):
    """Strict predictive coding (Rosenbaum 2022; Whittington and Bogacz 2017) on any graph and loss.

    The values start at the feed-forward pass and descend the energy: that of the prediction errors plus ``beta``
    times the loss. The gradient of a parameter is then local to its node, with errors taken at the final values, and
    divided by ``beta``. It tends to backprop's as ``beta`` goes to 0 (Millidge et al. 2022). The loss acts on the
    prediction of the output.

    Args:
        steps: Inference steps, each one vector-Jacobian product a node.
        lr: Step size of the values.
        solver: How the values relax, instead of ``GradientDescent(steps, lr)``.
        nudging: How strongly the loss enters the energy: ``OneSided(beta)`` or ``Symmetric(beta)``, which relaxes
            twice. The free phase needs no relaxation: it is the feed-forward pass.
        precisions: Node name to precision, a number or a tensor that broadcasts against the node's value; 1 elsewhere.
        energies: Node name to energy, for example :class:`Categorical`; Gaussian elsewhere.
        loss_reduction: ``"mean"`` for a loss that is a mean over the batch, ``"sum"`` to take it as it is written.
        on_divergence: What a relaxation that runs away does: ``"raise"`` :class:`DivergenceError`, ``"warn"`` with a
            ``DivergenceWarning`` or ``"skip"``; with these two the batch gives no gradient (``.grad`` stays as it is).
        compile: Record a step once as a list of ATen calls and run that from then on; the step that repeats goes to
            ``torch.compile``. The same numbers to rounding. What cannot be recorded runs as it is, with a
            ``CompilationWarning``; hooks of submodules run while recording only.

    Raises:
        ConfigurationError: for an illegal step size, number of steps, precision, energy, node name or reduction.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.PredictiveCoding(steps=20, lr=0.1))
        >>> torch.nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
        >>> model.state.error["0"].shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        steps: int = 20,
        lr: float = 0.1,
        *,
        solver: Solver[Any] | None = None,
        nudging: Nudging | None = None,
        precisions: Mapping[str, float | Tensor] | None = None,
        energies: Mapping[str, Energy] | None = None,
        loss_reduction: str = "mean",
        on_divergence: str = "raise",
        compile: bool = False,
    ) -> None:
        check_reduction("PredictiveCoding", loss_reduction)
        check_on_divergence("PredictiveCoding", on_divergence)
        _check_kind("solver", solver, Solver, "For example GradientDescent(steps=50).")
        _check_kind("nudging", nudging, Nudging, "For example Symmetric(beta=0.1).")
        self.solver = GradientDescent(steps, lr) if solver is None else solver
        self.nudging = OneSided() if nudging is None else nudging
        self.energies = node_energies("PredictiveCoding", precisions or {}, energies or {})
        self.loss_reduction: str = loss_reduction
        self.on_divergence = on_divergence
        self.programs = Programs() if compile else None

    def __repr__(self) -> str:
        parts = [f"solver={self.solver!r}", f"loss_reduction={self.loss_reduction!r}"]
        parts += [f"nudging={self.nudging!r}"] * (self.nudging != OneSided())
        parts += [f"energies={dict(self.energies)!r}"] * bool(self.energies)
        parts += ["compile=True"] * (self.programs is not None)
        parts += [f"on_divergence={self.on_divergence!r}"] * (self.on_divergence != "raise")
        return f"PredictiveCoding({', '.join(parts)})"

    def forward(self, call: Call) -> None:
        check_names("PredictiveCoding", self.energies, call.graph)
        call.feedforward(keep_graph=False, keep_draws=self.programs is not None)

    def backward(self, call: Call, kept: None, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        try:
            *others, last = self.nudging.betas
            phases = [self._phase(call, loss, beta, retain_call=True) for beta in others]
            phases.append(self._phase(call, loss, last, retain_call=retain_graph))
            check_phases([phase.state.relaxation for phase in phases])
        except DivergenceError as error:
            return no_gradients(self.on_divergence, error, call)
        return mean_of(phases)

    def with_steps(self, steps: int) -> PredictiveCoding:
        return PredictiveCoding(
            solver=self.solver.with_steps(steps),
            nudging=self.nudging,
            energies=self.energies,
            loss_reduction=self.loss_reduction,
            on_divergence=self.on_divergence,
            compile=self.programs is not None,
        )

    def _phase(self, call: Call, loss: OutputLoss, beta: float, retain_call: bool) -> LocalGradients:
        nudged = loss if beta == 1.0 else NudgedLoss(loss, beta)
        try:
            return relax(
                self.solver, self.solver.inference(call, nudged, self.energies, retain_call), beta, self.programs
            )
        except DivergenceError as error:
            raise of_phase(error, beta) from error


def mean_of(phases: list[LocalGradients]) -> LocalGradients:
    """The estimate of several nudged phases; values and errors are those of the first."""
    first, *others = phases
    if not others:
        return first
    parameters = dict(first.parameters)
    for name in parameters:
        for other in others:
            parameters[name] = parameters[name] + other.parameters[name]
        parameters[name] = parameters[name] / len(phases)
    inputs = [_mean([phase.inputs[i] for phase in phases]) for i in range(len(first.inputs))]
    relaxations = tuple(phase.state.relaxation for phase in phases)
    return LocalGradients(parameters, inputs, replace(first.state, phases=relaxations))


def _mean(parts: list[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return sum(found[1:], start=found[0]) / len(parts) if found else None


def _check_kind(name: str, value: object, kind: type, example: str) -> None:
    if value is not None and not isinstance(value, kind):
        got, expected = repr(value), f"a {kind.__name__.lower()} object"
        raise ConfigurationError(f"PredictiveCoding({name}=...)", got, expected, example)
