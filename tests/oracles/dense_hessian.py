"""The Hessian of F in errors and in values, written out as a matrix by autograd over the whole model at once.

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

    def hessian(self, beta: float) -> Tensor:
        """Pi + beta J^T H J."""
        root = self.precisions.sqrt()
        return torch.diag(self.precisions) + beta * root[:, None] * self.gauss_newton() * root

    def energy(self, errors: Tensor, beta: float) -> Tensor:
        return 0.5 * (self.precisions * errors.square()).sum() + beta * self.loss(self.output(errors))


@dataclass(frozen=True)
class ValueProblem:
    """From a vector of all values to the errors and the output; ``start`` has the feed-forward values."""

    errors: Callable[[Tensor], Tensor]
    output: Callable[[Tensor], Tensor]
    start: Tensor
    precisions: Tensor
    loss: Loss

    def local_derivatives(self) -> Tensor:
        """I - W."""
        return torch.autograd.functional.jacobian(self.errors, self.start)

    def hessian(self, beta: float, curvature: Tensor | None = None) -> Tensor:
        """(I - W)^T C (I - W) + beta V^T H V, C the precisions or what is given."""
        local = self.local_derivatives()
        weight = torch.diag(self.precisions) if curvature is None else curvature
        return local.T @ weight @ local + beta * self.of_loss()

    def of_loss(self) -> Tensor:
        predicted = self.output(self.start).detach()
        size = predicted.numel()
        of_output = torch.autograd.functional.jacobian(self.output, self.start).reshape(size, -1)
        hessian = torch.autograd.functional.hessian(self.loss, predicted).reshape(size, size)
        return of_output.T @ hessian @ of_output

    def local_update(self, beta: float) -> Tensor:
        """d(e_n - sum_c J_c^T e_c)/de where values follow the errors: the matrix of local error descent."""
        return self.hessian(beta) @ torch.linalg.inv(self.local_derivatives())

    def energy(self, values: Tensor, beta: float) -> Tensor:
        return 0.5 * (self.precisions * self.errors(values).square()).sum() + beta * self.loss(self.output(values))


def values_of_chain(layers: Sequence[Layer], x: Tensor, loss: Loss, precisions: Sequence[float] = ()) -> ValueProblem:
    start, value = [], x
    for layer in layers[:-1]:
        value = layer(value).detach()
        start.append(value)

    def split(values: Tensor) -> list[Tensor]:
        parts = values.split([each.numel() for each in start])
        return [part.reshape(each.shape) for part, each in zip(parts, start, strict=True)]

    def errors(values: Tensor) -> Tensor:
        parts = split(values)
        read = [x, *parts[:-1]]
        return torch.cat([(v - f(u)).flatten() for f, u, v in zip(layers, read, parts, strict=False)])

    given = precisions or [1.0] * len(start)
    weights = [torch.full((each.numel(),), float(p), dtype=x.dtype) for each, p in zip(start, given, strict=True)]
    together = torch.cat([each.flatten() for each in start])
    return ValueProblem(errors, lambda values: layers[-1](split(values)[-1]), together, torch.cat(weights), loss)


def values_of_dag(problem: EnergyProblem) -> ValueProblem:
    start = problem.feedforward()
    sizes = [value.numel() for value in start.values()]

    def predictions(values: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parts = zip(start, values.split(sizes), strict=True)
        by_name = {name: part.reshape(start[name].shape) for name, part in parts}
        return by_name, problem.predictions(by_name)

    def errors(values: Tensor) -> Tensor:
        by_name, predicted = predictions(values)
        return torch.cat([(value - predicted[name]).flatten() for name, value in by_name.items()])

    return ValueProblem(
        errors,
        lambda values: predictions(values)[1][problem.dag.output],
        torch.cat([value.flatten() for value in start.values()]),
        torch.cat(_of_entries(problem.precisions, start)),
        problem.loss,
    )


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
