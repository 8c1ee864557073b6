"""The Hessian of F in the errors, written out as a matrix by autograd over the whole model at once.

Nothing of the package under test. Errors are one long vector; a value is its prediction plus its error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from oracles.energy import EnergyProblem
from oracles.graphs import Loss
from torch import Tensor

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ErrorProblem:
    """From a vector of all errors to the output; ``precisions`` has one number for each error."""

    output: Callable[[Tensor], Tensor]
    precisions: Tensor
    loss: Loss  # summed over samples

    def gauss_newton(self, with_loss: bool = True, with_precisions: bool = True) -> Tensor:
        """Pi^-1/2 J^T H J Pi^-1/2 around errors of zero."""
        zero = torch.zeros_like(self.precisions)
        of_output = torch.autograd.functional.jacobian(self.output, zero)
        size = of_output[..., 0].numel()
        jacobian = of_output.reshape(size, -1)
        hessian = torch.eye(size, dtype=zero.dtype)
        if with_loss:
            hessian = torch.autograd.functional.hessian(self.loss, self.output(zero).detach()).reshape(size, size)
        if with_precisions:
            jacobian = jacobian / self.precisions.sqrt()
        return jacobian.T @ hessian @ jacobian

    def sigma_squared(self, **without: bool) -> float:
        return float(torch.linalg.eigvalsh(self.gauss_newton(**without))[-1])

    def energy(self, errors: Tensor, beta: float) -> Tensor:
        return 0.5 * (self.precisions * errors.square()).sum() + beta * self.loss(self.output(errors))


def of_chain(layers: Sequence[Layer], x: Tensor, loss: Loss, precisions: Sequence[float] = ()) -> ErrorProblem:
    """Each layer but the last has a value."""
    shapes, value = [], x
    for layer in layers[:-1]:
        value = layer(value).detach()
        shapes.append(value.shape)
    sizes = [shape.numel() for shape in shapes]

    def output(errors: Tensor) -> Tensor:
        value = x
        for layer, error, shape in zip(layers, errors.split(sizes), shapes, strict=False):
            value = layer(value) + error.reshape(shape)
        return layers[-1](value)

    given = precisions or [1.0] * len(sizes)
    parts = [torch.full((size,), float(p), dtype=x.dtype) for size, p in zip(sizes, given, strict=True)]
    return ErrorProblem(output, torch.cat(parts), loss)


def of_dag(problem: EnergyProblem) -> ErrorProblem:
    start = problem.feedforward()
    sizes = [start[name].numel() for name in problem.dag.hidden]

    def output(errors: Tensor) -> Tensor:
        parts = zip(problem.dag.hidden, errors.split(sizes), strict=True)
        values = problem.values_of({name: part.reshape(start[name].shape) for name, part in parts})
        return problem.predictions(values)[problem.dag.output]

    return ErrorProblem(output, torch.cat(_of_entries(problem.precisions, start)), problem.loss)


def _of_entries(precisions: Mapping[str, float | Tensor], start: Mapping[str, Tensor]) -> list[Tensor]:
    return [(torch.ones_like(value) * precisions.get(name, 1.0)).flatten() for name, value in start.items()]
