"""F of a graph as one explicit formula that autograd differentiates whole, and inference as plain loops on it.

Nothing of the package under test. Values and errors are dictionaries by vertex; the loss is summed over samples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from oracles.graphs import ChainState, Dag, Gradients, Loss, dag_feedforward, output_error
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

Values = dict[str, Tensor]


@dataclass(frozen=True)
class EnergyProblem:
    """F = sum_n phi_n(v_n, mu_n) + beta * loss(mu_o)."""

    dag: Dag
    loss: Loss
    beta: float = 1.0
    precisions: Mapping[str, float | Tensor] = field(default_factory=dict)
    categorical: tuple[str, ...] = ()

    def feedforward(self) -> Values:
        values = dag_feedforward(self.dag)
        return {name: values[name].detach() for name in self.dag.hidden}

    def node_energy(self, name: str, value: Tensor, prediction: Tensor) -> Tensor:
        if name in self.categorical:
            return kl_divergence(Categorical(logits=value), Categorical(logits=prediction)).sum()
        return 0.5 * (self.precisions.get(name, 1.0) * (value - prediction).square()).sum()

    def of_values(self, values: Values, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        known = {**self.dag.inputs, **values}
        for name, prediction in self._predictions(known, parameters):
            if name == self.dag.output:
                total = total + self.beta * self.loss(prediction)
            else:
                total = total + self.node_energy(name, values[name], prediction)
        return total

    def of_errors(self, errors: Values) -> Tensor:
        """The same with v = mu + e, all later predictions following."""
        values = self.values_of(errors)
        return self.of_values(values)

    def values_of(self, errors: Values) -> Values:
        known = dict(self.dag.inputs)
        for vertex in self.dag.vertices[:-1]:
            arguments = [known[name] for name in vertex.parents] + [self.dag.parameters[n] for n in vertex.parameters]
            known[vertex.name] = vertex.function(*arguments) + errors[vertex.name]
        return {name: known[name] for name in self.dag.hidden}

    def _predictions(self, known, parameters=None):
        parameters = self.dag.parameters if parameters is None else parameters
        for vertex in self.dag.vertices:
            arguments = [known[name] for name in vertex.parents] + [parameters[n] for n in vertex.parameters]
            yield vertex.name, vertex.function(*arguments)

    def predictions(self, values: Values) -> Values:
        return dict(self._predictions({**self.dag.inputs, **values}))

    def parameter_gradients(self, values: Values) -> Gradients:
        """dF/dtheta at fixed values, over beta."""
        parameters = {name: value.detach().requires_grad_() for name, value in self.dag.parameters.items()}
        grads = torch.autograd.grad(self.of_values(values, parameters), list(parameters.values()))
        return {name: grad / self.beta for name, grad in zip(parameters, grads, strict=True)}


def gradient(energy: Callable[[Values], Tensor], at: Values) -> Values:
    leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
    grads = torch.autograd.grad(energy(leaves), list(leaves.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(leaves, grads, strict=True))


def by_optimizer(problem: EnergyProblem, steps: int, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Values:
    """Values moved by one of torch's own optimizers."""
    values = {name: value.clone().requires_grad_() for name, value in problem.feedforward().items()}
    optimizer = make(list(values.values()))
    for _ in range(steps):
        optimizer.zero_grad()
        problem.of_values(values).backward()
        optimizer.step()
    return {name: value.detach() for name, value in values.items()}


def by_error_descent(problem: EnergyProblem, steps: int, lr: float) -> Values:
    """Gradient descent in the errors, the gradient by autograd through the whole graph."""
    errors = {name: torch.zeros_like(value) for name, value in problem.feedforward().items()}
    for _ in range(steps):
        slope = gradient(problem.of_errors, errors)
        errors = {name: error - lr * slope[name] for name, error in errors.items()}
    return problem.values_of(errors)


def by_local_errors(problem: EnergyProblem, steps: int, lr: float) -> Values:
    """e <- e - lr (dF/dv at v = mu + e): the same term as descent on values takes, applied to the errors (A4)."""
    errors = {name: torch.zeros_like(value) for name, value in problem.feedforward().items()}
    for _ in range(steps):
        slope = gradient(problem.of_values, problem.values_of(errors))
        errors = {name: error - lr * slope[name] for name, error in errors.items()}
    return problem.values_of(errors)


def by_sequential_descent(problem: EnergyProblem, steps: int, lr: float) -> Values:
    """One vertex after another from the output back, each on the gradient at the values as they then are."""
    values = problem.feedforward()
    for step in range(steps):
        for name in reversed(problem.dag.hidden):
            slope = gradient(problem.of_values, values)[name]
            values = {**values, name: values[name] - lr / (1 + step) * slope}
    return values


def chain_error_descent(
    layers: Sequence[Callable[[Tensor], Tensor]],
    parameters: Sequence[Sequence[Tensor]],
    x: Tensor,
    loss: Loss,
    steps: int,
    lr: float,
    beta: float,
) -> ChainState:
    """Error descent on a chain, autograd through the whole of it; the gradients are over beta."""

    def run(errors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        values, value = [], x
        for layer, error in zip(layers, [*errors, 0.0], strict=True):
            value = layer(value) + error
            values.append(value)
        return values, sum((0.5 * error.square().sum() for error in errors), beta * loss(value))

    with torch.no_grad():
        value, errors = x, []
        for layer in layers[:-1]:
            value = layer(value)
            errors.append(torch.zeros_like(value))
    for _ in range(steps):
        leaves = [error.detach().requires_grad_() for error in errors]
        slopes = torch.autograd.grad(run(leaves)[1], leaves)
        errors = [error - lr * slope for error, slope in zip(errors, slopes, strict=True)]
    values = [value.detach() for value in run(errors)[0]]
    errors.append(beta * output_error(values[-1], loss))
    gradients = []
    for layer, own, value, error in zip(layers, parameters, [x, *values[:-1]], errors, strict=True):
        wanted = {"allow_unused": True, "materialize_grads": True}
        gradients.append(torch.autograd.grad(layer(value), own, -error / beta, **wanted) if own else ())
    return ChainState(tuple(gradients), tuple(values), tuple(errors))
