"""Independent references: explicit formulas in float64, no tracing, nothing of the package under test.

Signs and names follow the notation of predictive coding: error = value - prediction, an output without a value of
its own has error -dL/dprediction (mode O1), and every loss here is the sum over the samples of the batch.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Any, ...] | dict[str, Any]
Loss = Callable[[Any], Tensor]
Gradients = dict[str, Tensor]


# ---- whole modules


def call(module: Callable[..., Any], inputs: Inputs) -> Any:
    """The module's output; a tuple of inputs is passed by position, a dict by keyword."""
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def backprop(module: nn.Module, inputs: Inputs, loss: Loss, seed: int = 0) -> Gradients:
    """Gradient of the loss for each trainable parameter, zero where it takes no part.

    The same seed gives the same dropout masks; the module's buffers and the caller's random state stay as they were.
    """
    module = copy.deepcopy(module)  # running statistics move in a forward pass
    parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        value = loss(call(module, inputs))
    return dict(zip(parameters, _gradients(value, list(parameters.values())), strict=True))


def _gradients(output: Tensor, inputs: Sequence[Tensor], seed: Tensor | None = None) -> tuple[Tensor, ...]:
    """J^T seed for each input, zero for one that the output does not depend on."""
    if not inputs:
        return ()
    # retained: messages and gradients are taken from one graph, a frozen one at every step
    return torch.autograd.grad(output, inputs, seed, retain_graph=True, allow_unused=True, materialize_grads=True)


def output_error(prediction: Tensor, loss: Loss) -> Tensor:
    """-dL/dprediction, the error of an output that has no value of its own."""
    prediction = prediction.detach().requires_grad_()
    return -_gradients(loss(prediction), [prediction])[0]


# ---- chains: strict predictive coding


@dataclass(frozen=True)
class ChainState:
    """What strict predictive coding of a chain ends with, one entry a layer."""

    gradients: tuple[tuple[Tensor, ...], ...]  # dF/dtheta, in the order of the layer's parameters
    values: tuple[Tensor, ...]  # the last one is the output's prediction
    errors: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Pull:
    """One layer at one value of its input: the prediction and the way back."""

    prediction: Tensor
    source: Tensor
    parameters: Sequence[Tensor]

    def message(self, error: Tensor) -> Tensor:
        return _gradients(self.prediction, [self.source], error)[0]

    def gradient(self, error: Tensor) -> tuple[Tensor, ...]:
        return tuple(-part for part in _gradients(self.prediction, self.parameters, error))


def _pull(layer: Callable[[Tensor], Tensor], value: Tensor, parameters: Sequence[Tensor]) -> _Pull:
    source = value.detach().requires_grad_()
    return _Pull(layer(source.clone()), source, parameters)  # clone: an in-place layer must not overwrite the value


def strict(
    layers: Sequence[Callable[[Tensor], Tensor]],
    parameters: Sequence[Sequence[Tensor]],
    x: Tensor,
    loss_sum: Loss,
    steps: int,
    lr: float,
) -> ChainState:
    """Strict predictive coding of a chain whose layer ``l`` reads ``parameters[l]``: ``steps`` synchronous updates of
    the hidden values from the feed-forward start, then errors and gradients at the final values.
    """
    values = _feedforward(layers, x)
    for _ in range(steps):
        pulls = _pulls(layers, parameters, x, values)
        errors = _chain_errors(pulls, values, loss_sum)
        messages = [pull.message(error) for pull, error in zip(pulls[1:], errors[1:], strict=True)]
        values = [v + lr * (m - e) for v, m, e in zip(values, messages, errors[:-1], strict=True)]
    pulls = _pulls(layers, parameters, x, values)
    errors = _chain_errors(pulls, values, loss_sum)
    gradients = tuple(pull.gradient(error) for pull, error in zip(pulls, errors, strict=True))
    return ChainState(gradients, (*values, pulls[-1].prediction.detach()), tuple(errors))


def _feedforward(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
    """Hidden values of the feed-forward pass: every layer's but the last."""
    values = []
    with torch.no_grad():
        for layer in layers[:-1]:
            x = layer(x.clone())
            values.append(x)
    return values


def _pulls(
    layers: Sequence[Callable[[Tensor], Tensor]],
    parameters: Sequence[Sequence[Tensor]],
    x: Tensor,
    values: Sequence[Tensor],
) -> list[_Pull]:
    return [_pull(*parts) for parts in zip(layers, [x, *values], parameters, strict=True)]


def _chain_errors(pulls: Sequence[_Pull], values: Sequence[Tensor], loss: Loss) -> list[Tensor]:
    hidden = [value - pull.prediction.detach() for value, pull in zip(values, pulls[:-1], strict=True)]
    return [*hidden, output_error(pulls[-1].prediction, loss)]


def strict_by_formulas(
    weights: Sequence[Tensor], biases: Sequence[Tensor], x: Tensor, loss_sum: Loss, steps: int, lr: float
) -> ChainState:
    """:func:`strict` for Linear-Tanh-Linear-Tanh-Linear, five layers, every product with a Jacobian written out."""
    w1, w2, w3 = (weight.detach() for weight in weights)
    b1, b2, b3 = (bias.detach() for bias in biases)
    v1 = x @ w1.T + b1
    v2 = v1.tanh()
    v3 = v2 @ w2.T + b2
    v4 = v3.tanh()
    for step in range(steps + 1):
        e1 = v1 - (x @ w1.T + b1)
        e2 = v2 - v1.tanh()
        e3 = v3 - (v2 @ w2.T + b2)
        e4 = v4 - v3.tanh()
        output = v4 @ w3.T + b3
        e5 = output_error(output, loss_sum)
        if step == steps:  # the last round only refreshes the errors
            break
        v1, v2, v3, v4 = (
            v1 + lr * (e2 * (1 - v1.tanh() ** 2) - e1),
            v2 + lr * (e3 @ w2 - e2),
            v3 + lr * (e4 * (1 - v3.tanh() ** 2) - e3),
            v4 + lr * (e5 @ w3 - e4),
        )
    gradients = ((-e1.T @ x, -e1.sum(0)), (), (-e3.T @ v2, -e3.sum(0)), (), (-e5.T @ v4, -e5.sum(0)))
    return ChainState(gradients, (v1, v2, v3, v4, output), (e1, e2, e3, e4, e5))


# ---- directed acyclic graphs


@dataclass(frozen=True)
class Vertex:
    """One node: its prediction is ``function(*parent values, *parameters)``."""

    name: str
    parents: tuple[str, ...]  # vertices, or inputs
    parameters: tuple[str, ...]
    function: Callable[..., Tensor]


@dataclass(frozen=True)
class Dag:
    """Vertices in topological order, the output last; every vertex has a path to the output."""

    vertices: tuple[Vertex, ...]
    parameters: dict[str, Tensor]
    inputs: dict[str, Tensor]

    @property
    def output(self) -> str:
        return self.vertices[-1].name

    @property
    def hidden(self) -> tuple[str, ...]:
        return tuple(vertex.name for vertex in self.vertices[:-1])


@dataclass(frozen=True)
class DagState:
    """Gradients by parameter; values and errors by vertex."""

    gradients: Gradients
    values: dict[str, Tensor]
    errors: dict[str, Tensor]


@dataclass(frozen=True)
class _Local:
    """One vertex at the current values of its parents."""

    vertex: Vertex
    prediction: Tensor
    parents: Sequence[Tensor]
    parameters: Sequence[Tensor]

    def messages(self, error: Tensor) -> list[tuple[str, Tensor]]:
        """J^T error for each parent; a parent read twice has two."""
        return list(zip(self.vertex.parents, _gradients(self.prediction, self.parents, error), strict=True))

    def gradient(self, error: Tensor) -> list[tuple[str, Tensor]]:
        """-(dmu/dtheta)^T error for each parameter."""
        parts = _gradients(self.prediction, self.parameters, error)
        return [(name, -part) for name, part in zip(self.vertex.parameters, parts, strict=True)]


def levels(dag: Dag) -> dict[str, int]:
    """Longest path, in edges, from each vertex to the output."""
    level = {dag.output: 0}
    for vertex in reversed(dag.vertices):
        for parent in vertex.parents:
            if parent not in dag.inputs:
                level[parent] = max(level.get(parent, 0), level[vertex.name] + 1)
    return level


def with_identities(dag: Dag) -> Dag:
    """The same function with k - 1 identity vertices on each edge that spans k levels; edges from inputs stay."""
    level = levels(dag)
    vertices: list[Vertex] = []
    for vertex in dag.vertices:
        parents = []
        for position, parent in enumerate(vertex.parents):
            span = 1 if parent in dag.inputs else level[parent] - level[vertex.name]
            for hop in range(1, span):
                name = f"{vertex.name}[{position}].{hop}"
                vertices.append(Vertex(name, (parent,), (), torch.clone))
                parent = name
            parents.append(parent)
        vertices.append(Vertex(vertex.name, tuple(parents), vertex.parameters, vertex.function))
    return Dag(tuple(vertices), dag.parameters, dag.inputs)


def dag_feedforward(dag: Dag) -> dict[str, Tensor]:
    """Value of each vertex in one forward pass, differentiable."""
    values = dict(dag.inputs)
    for vertex in dag.vertices:
        arguments = [values[name] for name in vertex.parents] + [dag.parameters[name] for name in vertex.parameters]
        values[vertex.name] = vertex.function(*arguments)
    return {vertex.name: values[vertex.name] for vertex in dag.vertices}


def dag_backprop(dag: Dag, loss: Loss) -> DagState:
    """The chain rule, by autograd through the whole graph; the errors are -dL/dvalue."""
    names = list(dag.parameters)
    trainable = _trainable(dag)
    values = dag_feedforward(trainable)
    wanted = [trainable.parameters[name] for name in names] + list(values.values())
    parts = _gradients(loss(values[dag.output]), wanted)
    errors = {name: -part for name, part in zip(values, parts[len(names) :], strict=True)}
    return DagState(dict(zip(names, parts, strict=False)), _detached(values), errors)


def dag_zero_divergence(dag: Dag, loss: Loss, levelled: bool, gamma: float = 1.0) -> DagState:
    """The literal schedule of zero-divergence inference learning: at time t the vertices of level t take their
    gradient, then all values move at once. Exact for a levelled graph and ``gamma`` 1; ``levelled=False`` is the
    faulty twin.
    """
    graph = with_identities(dag) if levelled else dag
    level = levels(graph)
    values = _detached(dag_feedforward(graph))
    gradients = {name: torch.zeros_like(value) for name, value in graph.parameters.items()}
    for time in range(max(level.values()) + 1):
        local = _locals(graph, values)
        errors = _dag_errors(graph, local, values, loss)
        due = [vertex.name for vertex in graph.vertices if level[vertex.name] == time]
        _add(gradients, (part for name in due for part in local[name].gradient(errors[name])))
        values = _moved(graph, local, values, errors, gamma)
    return DagState(gradients, values, errors)


def dag_strict(dag: Dag, loss: Loss, steps: int, lr: float) -> DagState:
    """Strict predictive coding: predictions and Jacobians anew in each update, fresh errors at the end."""
    values = _detached(dag_feedforward(dag))
    for _ in range(steps):
        local = _locals(dag, values)
        values = _moved(dag, local, values, _dag_errors(dag, local, values, loss), lr)
    local = _locals(dag, values)
    errors = _dag_errors(dag, local, values, loss)
    values[dag.output] = local[dag.output].prediction.detach()
    return DagState(_collected(dag, local, errors), values, errors)


def dag_fixed_prediction(dag: Dag, loss: Loss, steps: int, lr: float) -> DagState:
    """Predictive coding with predictions and Jacobians frozen at the feed-forward pass, ``steps`` updates of the
    errors.
    """
    values = _detached(dag_feedforward(dag))
    local = _locals(dag, values)
    errors = _dag_errors(dag, local, values, loss)
    for _ in range(steps):
        messages = _messages(dag, local, errors)
        moved = {name: (1 - lr) * errors[name] + lr * messages[name] for name in dag.hidden}
        errors = {**moved, dag.output: errors[dag.output]}
    return DagState(_collected(dag, local, errors), values, errors)


def path_length_contributions(dag: Dag, loss: Loss) -> dict[str, dict[int, Tensor]]:
    """The part of dL/dvalue that comes along the paths of each length, in edges, from a vertex to the output."""
    values = _detached(dag_feedforward(dag))
    local = _locals(dag, values)
    parts: dict[str, dict[int, Tensor]] = {vertex.name: {} for vertex in dag.vertices}
    parts[dag.output][0] = -output_error(values[dag.output], loss)
    for vertex in reversed(dag.vertices):
        for length, part in parts[vertex.name].items():
            for parent, message in local[vertex.name].messages(part):
                if parent not in dag.inputs:
                    parts[parent][length + 1] = parts[parent].get(length + 1, torch.zeros_like(message)) + message
    return parts


def _trainable(dag: Dag) -> Dag:
    parameters = {name: value.detach().requires_grad_() for name, value in dag.parameters.items()}
    return Dag(dag.vertices, parameters, dag.inputs)


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}


def _locals(dag: Dag, values: Mapping[str, Tensor]) -> dict[str, _Local]:
    return {vertex.name: _local(vertex, dag, {**dag.inputs, **values}) for vertex in dag.vertices}


def _local(vertex: Vertex, dag: Dag, values: Mapping[str, Tensor]) -> _Local:
    parents = [values[name].detach().requires_grad_() for name in vertex.parents]
    parameters = [dag.parameters[name].detach().requires_grad_() for name in vertex.parameters]
    return _Local(vertex, vertex.function(*parents, *parameters), parents, parameters)


def _dag_errors(dag: Dag, local: Mapping[str, _Local], values: Mapping[str, Tensor], loss: Loss) -> dict[str, Tensor]:
    errors = {name: values[name] - local[name].prediction.detach() for name in dag.hidden}
    return {**errors, dag.output: output_error(local[dag.output].prediction, loss)}


def _messages(dag: Dag, local: Mapping[str, _Local], errors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum over the children of J^T error, for each hidden vertex."""
    total = {name: torch.zeros_like(errors[name]) for name in dag.hidden}
    sent = (message for vertex in dag.vertices for message in local[vertex.name].messages(errors[vertex.name]))
    _add(total, ((name, part) for name, part in sent if name not in dag.inputs))
    return total


def _moved(
    dag: Dag, local: Mapping[str, _Local], values: Mapping[str, Tensor], errors: Mapping[str, Tensor], lr: float
) -> dict[str, Tensor]:
    messages = _messages(dag, local, errors)
    moved = {name: values[name] + lr * (messages[name] - errors[name]) for name in dag.hidden}
    return {**moved, dag.output: values[dag.output]}


def _collected(dag: Dag, local: Mapping[str, _Local], errors: Mapping[str, Tensor]) -> Gradients:
    gradients = {name: torch.zeros_like(value) for name, value in dag.parameters.items()}
    _add(gradients, (part for name, error in errors.items() for part in local[name].gradient(error)))
    return gradients


def _add(total: dict[str, Tensor], parts: Iterable[tuple[str, Tensor]]) -> None:
    for name, part in parts:
        total[name] = total[name] + part


# ---- the graph that the exactness claims are tested on, twice


def skip_dag(batch: int = 4) -> Dag:
    """Residual edge, multiplicative gate, one weight shared by two levels, skips of up to 5 levels.

    Parameters are named as in :class:`SkipDag`, which computes the same function.
    """
    vertices = (
        Vertex("stem", ("x",), ("stem.0.weight", "stem.0.bias"), _tanh_affine),
        Vertex("first", ("stem",), ("first.0.weight", "first.0.bias"), _tanh_affine),
        Vertex("second", ("first",), ("second.0.weight", "second.0.bias"), _tanh_affine),
        Vertex("residual", ("second", "stem"), ("residual.linear.weight",), lambda v, skip, w: v @ w.T + skip),
        Vertex("gate", ("first", "x"), ("gate.inner.weight", "gate.outer.weight"), _sigmoid_of_two),
        Vertex("gated", ("residual", "gate"), (), torch.mul),
        Vertex("third", ("gated",), ("first.0.weight", "third.0.bias"), _tanh_affine),
        Vertex("mixture", ("third", "first"), (), lambda v, skip: v + 0.5 * skip),
        Vertex("output", ("mixture", "second"), ("output.wide.weight", "output.wide.bias"), _affine_of_concatenation),
    )
    return Dag(vertices, _skip_parameters(), {"x": _normal((batch, 5), seed=11)})


def _tanh_affine(value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (value @ weight.T + bias).tanh()


def _sigmoid_of_two(value: Tensor, x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    return (value @ inner.T + x @ outer.T).sigmoid()


def _affine_of_concatenation(left: Tensor, right: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    width = left.shape[1]
    return left @ weight[:, :width].T + right @ weight[:, width:].T + bias


def _skip_parameters() -> dict[str, Tensor]:
    wide, classes, inputs = 6, 3, 5
    shapes: dict[str, tuple[int, ...]] = {
        "stem.0.weight": (wide, inputs),
        "stem.0.bias": (wide,),
        "first.0.weight": (wide, wide),
        "first.0.bias": (wide,),
        "second.0.weight": (wide, wide),
        "second.0.bias": (wide,),
        "residual.linear.weight": (wide, wide),
        "gate.inner.weight": (wide, wide),
        "gate.outer.weight": (wide, inputs),
        "third.0.bias": (wide,),
        "output.wide.weight": (classes, 2 * wide),
        "output.wide.bias": (classes,),
    }
    gain = 0.6  # at 1 the faulty, unlevelled schedule is not merely wrong, it blows up
    return {
        name: gain * _normal(shape, seed=100 + index) / math.sqrt(shape[-1])
        for index, (name, shape) in enumerate(shapes.items())
    }


def _normal(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, value: Tensor, skip: Tensor) -> Tensor:
        return self.linear(value) + skip


class _Gate(nn.Module):
    def __init__(self, width: int, inputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)
        self.outer = nn.Linear(inputs, width, bias=False)

    def forward(self, value: Tensor, x: Tensor) -> Tensor:
        return torch.sigmoid(self.inner(value) + self.outer(x))


class _Product(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left * right


class _Mixture(nn.Module):
    def forward(self, value: Tensor, skip: Tensor) -> Tensor:
        return value + skip / 2


class _Output(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.wide = nn.Linear(2 * width, classes)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.wide(torch.cat([left, right], dim=1))


class SkipDag(nn.Module):
    """:func:`skip_dag` as ordinary forward code on the same parameter tensors, one submodule a vertex."""

    def __init__(self, parameters: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        parameters = _skip_parameters() if parameters is None else parameters
        width, inputs = parameters["stem.0.weight"].shape
        self.stem = _tanh_layer(inputs, width)
        self.first = _tanh_layer(width, width)
        self.second = _tanh_layer(width, width)
        self.residual = _Residual(width)
        self.gate = _Gate(width, inputs)
        self.gated = _Product()
        self.third = _tanh_layer(width, width)
        self.mixture = _Mixture()
        self.output = _Output(width, parameters["output.wide.weight"].shape[0])
        for name, value in parameters.items():
            owner, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(owner), attribute, nn.Parameter(value))
        self.third[0].weight = self.first[0].weight

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        first = self.first(stem)
        second = self.second(first)
        gated = self.gated(self.residual(second, stem), self.gate(first, x))
        mixture = self.mixture(self.third(gated), first)
        return self.output(mixture, second)


def _tanh_layer(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh())


def half_squared_error(output: Tensor) -> Tensor:
    """Summed over the samples, with seeded targets."""
    return 0.5 * (output - _normal(output.shape, seed=12)).square().sum()


def cross_entropy(output: Tensor) -> Tensor:
    """Summed over the samples, with seeded labels."""
    labels = torch.arange(output.shape[0]) % output.shape[1]
    return nn.functional.cross_entropy(output, labels, reduction="sum")


# ---- closed forms


def binomial_tail(steps: int, lr: float, distance: int) -> float:
    """P(Binomial(steps, lr) >= distance): the share of an error that has arrived after ``steps`` updates."""
    terms = (math.comb(steps, k) * lr**k * (1 - lr) ** (steps - k) for k in range(distance, steps + 1))
    return math.fsum(terms)


@dataclass(frozen=True)
class DeepLinearEquilibrium:
    energy: Tensor  # [batch]
    output_error: Tensor  # [batch, out]


def deep_linear_energy(weights: Sequence[Tensor], x: Tensor, y: Tensor) -> DeepLinearEquilibrium:
    """Equilibrium of predictive coding in x -> W_1 x -> W_2 W_1 x ..., the output clamped to ``y``.

    F* = 1/2 r^T S^-1 r and e_L = S^-1 r, with r the residual of the feed-forward pass and
    S = I + sum over l >= 2 of W_{L:l} W_{L:l}^T.
    """
    product = torch.eye(y.shape[1], dtype=y.dtype)
    spread = torch.eye(y.shape[1], dtype=y.dtype)
    for weight in reversed(weights[1:]):
        product = product @ weight
        spread = spread + product @ product.T
    residual = y - x @ (product @ weights[0]).T
    error = torch.linalg.solve(spread, residual.T).T
    return DeepLinearEquilibrium(0.5 * (residual * error).sum(1), error)
