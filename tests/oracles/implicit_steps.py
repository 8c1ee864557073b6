"""Implicit SGD without the engine: Newton's method with a dense Hessian, in float64, on formulas written out.

Alonso et al. 2022. Nothing here imports torch2ebm.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Minimum:
    point: Tensor
    value: float
    gradient: float  # largest entry


def minimum(objective: Callable[[Tensor], Tensor], start: Tensor, tol: float = 1e-13, steps: int = 200) -> Minimum:
    """Newton's method with |H|, the Hessian with its eigenvalues made positive, and halved steps.

    It descends from ``start``; near a minimum H is positive and every step is Newton's own.
    """
    point = start.detach().clone()
    for _ in range(steps):
        gradient = torch.func.grad(objective)(point)
        if float(gradient.abs().max()) <= tol:
            break
        eigenvalues, vectors = torch.linalg.eigh(torch.func.hessian(objective)(point))
        direction = -vectors @ ((vectors.t() @ gradient) / eigenvalues.abs().clamp_min(1e-10))
        point = _halved(objective, point, direction, float(gradient @ direction))
    gradient = torch.func.grad(objective)(point)
    return Minimum(point, float(objective(point)), float(gradient.abs().max()))


def _halved(objective: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor, slope: float) -> Tensor:
    before = float(objective(point))
    for halvings in range(40):
        length = 0.5**halvings
        after = float(objective(point + length * direction))
        if after <= before + 1e-4 * length * slope + 4e-16 * abs(before):
            return point + length * direction
    return point


# Implicit SGD on the parameters ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImplicitStep:
    parameters: dict[str, Tensor]  # theta+
    objective: float  # L(theta+) + |theta+ - theta|^2 / (2 alpha)
    gradient: float  # largest entry of that objective's gradient


def flat(parameters: Parameters) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters.values()])


def named(vector: Tensor, like: Parameters) -> dict[str, Tensor]:
    parts = vector.split([parameter.numel() for parameter in like.values()])
    return {name: part.reshape(like[name].shape) for name, part in zip(like, parts, strict=True)}


def proximal_objective(loss: Callable[[Parameters], Tensor], parameters: Parameters, alpha: float):
    """L(theta') + |theta' - theta|^2 / (2 alpha) as a function of the flattened theta'."""
    here = flat(parameters)
    return lambda vector: loss(named(vector, parameters)) + (vector - here).square().sum() / (2 * alpha)


def implicit_step(loss: Callable[[Parameters], Tensor], parameters: Parameters, alpha: float) -> ImplicitStep:
    """argmin over theta' of the proximal objective, by descent from theta."""
    found = minimum(proximal_objective(loss, parameters, alpha), flat(parameters))
    return ImplicitStep(named(found.point, parameters), found.value, found.gradient)


def proximal_gradient(
    loss: Callable[[Parameters], Tensor], parameters: Parameters, alpha: float, at: Parameters
) -> float:
    """Largest entry of the proximal objective's gradient at ``at``."""
    objective = proximal_objective(loss, parameters, alpha)
    return float(torch.func.grad(objective)(flat(at)).abs().max())


# A net of dense layers ------------------------------------------------------------------------------------------------


def feedforward(
    parameters: Parameters, x: Tensor, activation: Callable[[Tensor], Tensor], layers: Sequence[str]
) -> Tensor:
    """Dense layers by name, the activation between them; a layer without "name.bias" has none."""
    h = x
    for i, name in enumerate(layers):
        h = h if i == 0 else activation(h)
        h = h @ parameters[f"{name}.weight"].t() + parameters.get(f"{name}.bias", torch.zeros(()).double())
    return h


# The same step by inference on the activities, with a choice of normalisers -------------------------------------------


def gram(a: Tensor, has_bias: bool) -> Tensor:
    """K = A A^T + 1: the right one."""
    return a @ a.t() + float(has_bias)


def gram_without_bias(a: Tensor, has_bias: bool) -> Tensor:
    return a @ a.t()


def mean_norm(a: Tensor, has_bias: bool) -> Tensor:
    """The batch's mean squared norm in place of the Gram matrix, scaled so that batch 1 is right."""
    return (a.square().sum(1).mean() + float(has_bias)) * torch.eye(len(a), dtype=a.dtype)


def one(a: Tensor, has_bias: bool) -> Tensor:
    """Inference without a normaliser."""
    return torch.eye(len(a), dtype=a.dtype)


@dataclass(frozen=True)
class ActivityStep:
    parameters: dict[str, Tensor]
    activities: list[Tensor]
    objective: float


def activity_step(
    parameters: Parameters,
    layers: Sequence[str],
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    alpha: float,
    activation: Callable[[Tensor], Tensor],
    normaliser: Callable[[Tensor, bool], Tensor] = gram,
) -> ActivityStep:
    """min over h of L(h_L) + sum_l tr(E_l^T K_l^-1 E_l) / (2 alpha); then W += E^T K^-1 A with the true K = Gram."""
    biased = [f"{name}.bias" in parameters for name in layers]
    sizes = [parameters[f"{name}.weight"].shape[0] for name in layers]

    def rows(activities: Sequence[Tensor]) -> list[Tensor]:
        return [x, *[activation(h) for h in activities[:-1]]]

    def errors(activities: Sequence[Tensor]) -> list[Tensor]:
        return [
            h - feedforward(parameters, a, activation, [name])
            for h, a, name in zip(activities, rows(activities), layers, strict=True)
        ]

    def split(vector: Tensor) -> list[Tensor]:
        return [part.reshape(len(x), -1) for part in vector.split([len(x) * size for size in sizes])]

    def objective(vector: Tensor) -> Tensor:
        h = split(vector)
        total = loss(h[-1])
        for e, a, has_bias in zip(errors(h), rows(h), biased, strict=True):
            total = total + (e * torch.linalg.solve(normaliser(a, has_bias), e)).sum() / (2 * alpha)
        return total

    start = [feedforward(parameters, x, activation, layers[: i + 1]) for i in range(len(layers))]
    found = minimum(objective, torch.cat([h.reshape(-1) for h in start]))
    h = split(found.point)
    after = dict(parameters)
    for e, a, has_bias, name in zip(errors(h), rows(h), biased, layers, strict=True):
        solved = torch.linalg.solve(gram(a, has_bias), e)
        after[f"{name}.weight"] = parameters[f"{name}.weight"] + solved.t() @ a
        if has_bias:
            after[f"{name}.bias"] = parameters[f"{name}.bias"] + solved.sum(0)
    return ActivityStep(after, h, found.value)
