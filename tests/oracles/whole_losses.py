"""F of one or several calls of a chain as one explicit formula, which autograd differentiates whole.

F = sum over calls k of 1/2 |v_k - f(x_k)|^2 + B L(mu_1, ..., mu_K), with mu_k = g(v_k). Nothing of the package.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]
Loss = Callable[..., Tensor]  # of the predictions of all calls


@dataclass(frozen=True)
class TwoLayers:
    """A net of two parts, whose hidden values move: ``net[:split]`` and ``net[split:]``."""

    net: nn.Sequential
    split: int
    inputs: Sequence[Tensor]
    loss: Loss
    weight: float  # of the loss in F: the batch size of a call for a mean, 1 for a loss that is taken as it is written

    def energy(self, values: Sequence[Tensor]) -> Tensor:
        below, above = self.net[: self.split], self.net[self.split :]
        errors = [value - below(x) for value, x in zip(values, self.inputs, strict=True)]
        own = sum((0.5 * error.square().sum() for error in errors), torch.zeros((), dtype=torch.float64))
        return own + self.weight * self.loss(*[above(value) for value in values])

    def relaxed(self, steps: int, lr: float) -> list[Tensor]:
        values = [self.net[: self.split](x).detach() for x in self.inputs]
        for _ in range(steps):
            leaves = [value.requires_grad_() for value in values]
            slopes = torch.autograd.grad(self.energy(leaves), leaves)
            values = [(value - lr * slope).detach() for value, slope in zip(leaves, slopes, strict=True)]
        return values

    def gradients(self, steps: int, lr: float) -> Gradients:
        """dF/dtheta at the end, over the weight of the loss: in the scale of the loss."""
        parameters = dict(self.net.named_parameters())
        total = self.energy(self.relaxed(steps, lr))
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        return {n: g / self.weight for n, g in zip(parameters, found, strict=True) if g is not None}


def linear_minimum(first: Tensor, second: Tensor, x: Tensor, y: Tensor, weight: float = 1.0) -> float:
    """min over v of 1/2 |v - W1 x|^2 + weight/2 |y - W2 v|^2, summed over samples, of a net without biases.

    The residual r = y - W2 W1 x leaves 1/2 r^T (1/weight + W2 W2^T)^-1 r.
    """
    residual = y - x @ first.T @ second.T
    covariance = torch.eye(len(second), dtype=x.dtype) / weight + second @ second.T
    return float(0.5 * (residual * torch.linalg.solve(covariance, residual.T).T).sum())
