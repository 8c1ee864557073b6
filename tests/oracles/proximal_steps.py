"""IL-prox by explicit formulas (Alonso et al. 2022), in float64, without autograd and without the package under test.

Values stand before the activation. Layer ``l`` reads ``a_l``, the sum of the activated values of its sources (a plain
net has one; two are a skip connection), and predicts ``p_l = W_l a_l + b_l``. Value 0 is the input as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Pair = tuple[Function, Function]  # a function and its derivative

RELU: Pair = (lambda h: h.clamp_min(0.0), lambda h: (h > 0).to(h))
TANH: Pair = (torch.tanh, lambda h: 1 - torch.tanh(h) ** 2)


@dataclass(frozen=True)
class Dense:
    """One layer: weight [out, in], bias [out] or none, and the numbers of the values that it reads."""

    weight: Tensor
    bias: Tensor | None
    reads: tuple[int, ...]

    def predict(self, a: Tensor) -> Tensor:
        p = a @ self.weight.T
        return p if self.bias is None else p + self.bias

    def norm(self, a: Tensor) -> Tensor:
        """mean_b |a|^2, and one more for the bias."""
        return (a**2).sum(1).mean() + (0.0 if self.bias is None else 1.0)


@dataclass(frozen=True)
class ProximalStep:
    """The end of one inference, one entry a layer; the last value is the output's target ``p_L + e_L``."""

    values: list[Tensor]
    predictions: list[Tensor]
    errors: list[Tensor]
    weight_changes: list[Tensor]
    bias_changes: list[Tensor | None]
    energies: list[list[float]]  # 1/2 |e|^2 of every layer, at the start of every step and at the end


@dataclass(frozen=True)
class Proximal:
    """One step of IL-prox; ``output_gradient`` is dL_b/dp of each sample, [batch, classes]."""

    layers: Sequence[Dense]
    activation: Pair
    output_gradient: Function
    alpha: float = 1.0
    steps: int = 25
    feedback_rate: float = 0.015
    error_rate: float = 0.015
    eps: float = 0.0
    lagged: bool = False  # the output's target from the prediction before the last move, as the authors have it

    def inputs(self, h: Sequence[Tensor]) -> list[Tensor]:
        """a_l of every layer; h[0] is the input."""
        act = self.activation[0]
        return [torch.stack([h[i] if i == 0 else act(h[i]) for i in layer.reads]).sum(0) for layer in self.layers]

    def feedforward(self, x: Tensor) -> list[Tensor]:
        h = [x]
        for layer in self.layers:
            a = torch.stack([h[i] if i == 0 else self.activation[0](h[i]) for i in layer.reads]).sum(0)
            h.append(layer.predict(a))
        return h

    def output_error(self, a: Tensor, p: Tensor) -> Tensor:
        product = self.alpha * (self.layers[-1].norm(a) + self.eps)
        return -(product / (1 + product)) * self.output_gradient(p)

    def errors(self, h: Sequence[Tensor], before: Sequence[Tensor] | None = None) -> list[Tensor]:
        """e_1 .. e_L; with ``before`` the output's is aimed at the target of those values."""
        inputs = self.inputs(h)
        hidden = [
            value - layer.predict(a) for value, layer, a in zip(h[1:-1], self.layers[:-1], inputs[:-1], strict=True)
        ]
        p = self.layers[-1].predict(inputs[-1])
        if before is None or not self.lagged:
            return [*hidden, self.output_error(inputs[-1], p)]
        a_before = self.inputs(before)[-1]
        p_before = self.layers[-1].predict(a_before)
        # for half the squared error softmax(p) reads p, and the target is a point in the space of predictions
        return [*hidden, p_before + self.output_error(a_before, p_before) - p]

    def moved(self, h: Sequence[Tensor], errors: Sequence[Tensor]) -> list[Tensor]:
        """All hidden values at once: h_i += -error_rate e_i + feedback_rate sum_l (W_l^T e_l) act'(h_i)."""
        new = list(h)
        for i in range(1, len(self.layers)):
            message = sum(
                e @ layer.weight
                for layer, e in zip(self.layers, errors, strict=True)
                for read in layer.reads
                if read == i
            )
            new[i] = h[i] - self.error_rate * errors[i - 1] + self.feedback_rate * message * self.activation[1](h[i])
        return new

    def run(self, x: Tensor) -> ProximalStep:
        h, before = self.feedforward(x), None
        errors = self.errors(h)
        energies = [[0.5 * float((e**2).sum()) for e in errors]]
        for _ in range(self.steps):
            before, h = h, self.moved(h, errors)
            errors = self.errors(h, before)
            energies.append([0.5 * float((e**2).sum()) for e in errors])
        inputs = self.inputs(h)
        predictions = [layer.predict(a) for layer, a in zip(self.layers, inputs, strict=True)]
        norms = [layer.norm(a) + self.eps for layer, a in zip(self.layers, inputs, strict=True)]
        batch = len(x)
        return ProximalStep(
            values=[*h[1:-1], predictions[-1] + errors[-1]],
            predictions=predictions,
            errors=errors,
            weight_changes=[e.T @ a / batch / norm for e, a, norm in zip(errors, inputs, norms, strict=True)],
            bias_changes=[
                None if layer.bias is None else e.mean(0) / norm
                for layer, e, norm in zip(self.layers, errors, norms, strict=True)
            ],
            energies=energies,
        )


def cross_entropy_gradient(labels: Tensor) -> Function:
    return lambda p: torch.softmax(p, 1) - torch.nn.functional.one_hot(labels, p.shape[1]).to(p)


def half_squared_error_gradient(target: Tensor) -> Function:
    return lambda p: p - target


def applied(layers: Sequence[Dense], step: ProximalStep, norm: Callable[[Dense, int], float]) -> list[Dense]:
    """The layers after W += change * norm(layer, l): 1 is the rule itself, any other number a wrong normaliser."""
    return [
        Dense(
            layer.weight + norm(layer, i) * step.weight_changes[i],
            None if (change := step.bias_changes[i]) is None else layer.bias + norm(layer, i) * change,
            layer.reads,
        )
        for i, layer in enumerate(layers)
    ]
