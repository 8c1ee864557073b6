"""Predictive coding: relax all values on the energy, then one local gradient a parameter (Torch2PC's Strict)."""

from __future__ import annotations

from torch2ebm.algorithms.base import Algorithm, check_reduction
from torch2ebm.errors import ConfigurationError
from torch2ebm.inference import Inference
from torch2ebm.solvers import GradientDescent, Solver
from torch2ebm.solvers.base import relax
from torch2ebm.state import Call, LocalGradients, OutputLoss


class PredictiveCoding(Algorithm):
    """Strict predictive coding (Rosenbaum 2022; Whittington and Bogacz 2017) on any graph and loss.

    The values start at the feed-forward pass and descend the energy: half the squared prediction errors plus the
    loss. The gradient of a parameter is then local to its node, with errors taken at the final values. The loss acts
    on the prediction of the output (mode O1 of algorithms.md, section 0).

    Args:
        steps: Inference steps, each one vector-Jacobian product a node.
        lr: Step size of the values.
        solver: How the values relax, instead of ``GradientDescent(steps, lr)``.
        loss_reduction: ``"mean"`` for a loss that is a mean over the batch, ``"sum"`` to take it as it is written.

    Raises:
        ConfigurationError: for an illegal step size, number of steps or reduction.

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
        self, steps: int = 20, lr: float = 0.1, *, solver: Solver | None = None, loss_reduction: str = "mean"
    ) -> None:
        check_reduction("PredictiveCoding", loss_reduction)
        if solver is not None and not isinstance(solver, Solver):
            raise ConfigurationError(
                "PredictiveCoding(solver=...)",
                repr(solver),
                "a solver object",
                "For example GradientDescent(steps=50).",
            )
        self.solver = GradientDescent(steps, lr) if solver is None else solver
        self.loss_reduction: str = loss_reduction

    def __repr__(self) -> str:
        return f"PredictiveCoding(solver={self.solver!r}, loss_reduction={self.loss_reduction!r})"

    def forward(self, call: Call) -> None:
        call.feedforward(keep_graph=False)

    def backward(self, call: Call, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        return relax(self.solver, Inference(call, loss, retain_call=retain_graph))

    def with_steps(self, steps: int) -> PredictiveCoding:
        return PredictiveCoding(solver=self.solver.with_steps(steps), loss_reduction=self.loss_reduction)
