"""The MQ optimizer: a matrix-wise learning rate for local learning rules, one number a parameter tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch2ebm.common.checks import check_positive
from torch2ebm.errors import ConfigurationError

LARGEST_MEMORY = 0.9999


class MQ(Optimizer):
    """One adaptive learning rate a parameter tensor, never below a minimum (Alonso 2023).

    ``W <- W + (lr / (v + r) + minimum_rate) G`` with ``G = -W.grad``, then ``v <- rho v + (1 - rho) mean|G|`` with
    ``rho = min(N / (N + 1), 0.9999)`` in the N-th step; ``v`` starts at ``lr``. It can be wrapped by
    :class:`EnergyOptimizer` and step any algorithm's gradients.

    Args:
        params: Parameters or parameter groups, as in every torch optimizer.
        lr: The rate alpha, in the units of a mean absolute change of the parameters: where ``v`` has come to the
            mean of \\|G\\|, a step moves the entries of W by about ``lr`` on average.
        r: Keeps the division from zero.
        minimum_rate: The rate that a large ``v`` leaves.

    Raises:
        ConfigurationError: for a rate that is not positive and finite, or a sparse gradient.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net)
        >>> mq = torch2ebm.MQ(net.parameters(), lr=1e-4)
        >>> optimizer = torch2ebm.EnergyOptimizer(mq, model, torch2ebm.PredictiveCoding(steps=3))
        >>> torch.nn.functional.cross_entropy(model(torch.randn(1, 4)), torch.tensor([2])).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float,
        *,
        r: float = 1e-6,
        minimum_rate: float = 0.001,
    ) -> None:
        check_positive("MQ", lr=lr, r=r, minimum_rate=minimum_rate)
        super().__init__(params, {"lr": lr, "r": r, "minimum_rate": minimum_rate})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        rates = {name: param_group[name] for name in self.defaults if name in param_group}
        check_positive("MQ, parameter group", **rates)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what ``closure``, run first and with gradients enabled, returns."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        pending = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, parameter in pending:
            _check_dense(parameter)
        for group, parameter in pending:
            self._update(parameter, group["lr"], group["r"], group["minimum_rate"])
        return result

    def _update(self, parameter: Tensor, lr: float, r: float, minimum_rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 1  # N
            state["magnitude"] = torch.full((), lr, dtype=parameter.dtype, device=parameter.device)  # v
        gradient, magnitude = parameter.grad, state["magnitude"]
        assert gradient is not None
        parameter.sub_((lr / (magnitude + r) + minimum_rate) * gradient)
        memory = min(state["step"] / (state["step"] + 1), LARGEST_MEMORY)  # rho
        magnitude.lerp_(gradient.abs().mean(), 1 - memory)
        state["step"] += 1


def _check_dense(parameter: Tensor) -> None:
    if parameter.grad is not None and parameter.grad.layout is not torch.strided:
        raise ConfigurationError(
            "MQ.step()",
            f"a gradient of layout {parameter.grad.layout} for a parameter of shape {tuple(parameter.shape)}",
            "dense gradients, since the mean over the whole tensor is needed",
            "Build the embedding with sparse=False.",
        )
