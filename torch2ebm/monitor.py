"""A function that is told how each step went."""

from __future__ import annotations

from typing import Any, Protocol


class Monitor(Protocol):
    """A function of your own that is told how each step went: ``EnergyOptimizer(..., monitor=...)``.

    ``SummaryWriter.add_scalar`` of TensorBoard fits as it is. What it raises comes out of ``optimizer.step()``, after
    the step has been made.

    Example:
        >>> import torch, torch2ebm
        >>> seen = {}
        >>> def monitor(name, value, step):
        ...     seen[name] = value
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model, sgd = torch2ebm.convert(net), torch.optim.SGD(net.parameters(), lr=0.1)
        >>> optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.PredictiveCoding(), monitor=monitor)
        >>> model(torch.randn(5, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> list(seen)
        ['energy/0', 'energy', 'loss', 'relaxation/steps', 'relaxation/residual']
    """

    def __call__(self, name: str, value: float, step: int, /) -> Any:
        """Called for each number, in every ``optimizer.step()``.

        Args:
            name: ``energy/<node>``, ``energy``, ``loss``, ``relaxation/steps`` or ``relaxation/residual``.
            value: Energies and the loss are summed over samples, in units of lambda times the loss.
            step: How many steps of the optimizer have been made before.
        """
