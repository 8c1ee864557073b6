"""The programs that are compared: one gradient of the same model each, and the check that it is the right one.

The references are written out here, by autograd on the whole energy or by formula, and share no code with the engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
from cases import Case, Loss, classification
from measure import Program
from torch import Tensor, nn
from torch.nn import functional as F

import torch2ebm
from torch2ebm.errors import CompilationWarning
from torch2ebm.inference.solver import ValueSolver
from torch2ebm.inference.value_inference import ValueInference

Gradients = list[Tensor]
STEPS, LR = 20, 0.1
REFERENCE = "backprop"
COMPILED = ", compiled"


def gradient(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss = classification, autocast: torch.dtype | None = None
) -> Program:
    """Zeroes, computes and returns ``.grad`` of all parameters."""

    def program() -> list[Tensor | None]:
        model.zero_grad()
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            value = loss(model, x, y)
        value.backward()
        return [parameter.grad for parameter in model.parameters()]

    return program


@dataclass(frozen=True)
class Contender:
    """An algorithm, eager or with ``compile=True``, and the nodes that it works on."""

    name: str
    make: Callable[..., torch2ebm.Algorithm]
    nodes: str = "auto"

    def learning(self, net: nn.Module, compiled: bool = False) -> torch2ebm.EnergyModel:
        model = torch2ebm.convert(net, nodes=self.nodes)
        algorithm = self.make(compile=True) if compiled else self.make()
        torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
        return model


def _error_descent(lr: float = LR, **options: Any) -> torch2ebm.Algorithm:
    return torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent(STEPS, lr), **options)


EXACT = Contender("ZeroDivergence", torch2ebm.ZeroDivergence)
FIXED = Contender("FixedPrediction", lambda **o: torch2ebm.FixedPrediction(STEPS, LR, **o))
FIXED_BLOCKS = Contender("FixedPrediction, blocks", FIXED.make, "children")
STRICT = Contender("PredictiveCoding", lambda **o: torch2ebm.PredictiveCoding(STEPS, LR, **o))
SLOW_STRICT = Contender("PredictiveCoding", lambda **o: torch2ebm.PredictiveCoding(STEPS, 0.01, **o))  # deep models
ERRORS = Contender("ErrorDescent", _error_descent)
SLOW_ERRORS = Contender("ErrorDescent", lambda **o: _error_descent(0.01, **o))


@dataclass(frozen=True)
class FullSweep(ValueSolver):
    """Gradient descent on the values without the wave front: every node is evaluated in every sweep."""

    steps: int = STEPS
    lr: float = LR
    tol: float = 0.0

    def with_steps(self, steps: int) -> FullSweep:
        return FullSweep(steps, self.lr)

    def start(self, inference: ValueInference) -> None:
        inference.moved.update(inference.values)

    def step(self, inference: ValueInference, state: None) -> None:
        for slot, direction in inference.sweep():
            inference.move(slot, direction, -self.lr)


FULL = Contender("PredictiveCoding, every node", lambda **o: torch2ebm.PredictiveCoding(solver=FullSweep(), **o))


# the programs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Where, and in which precision, the programs run."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None

    @property
    def tolerance(self) -> float:
        """Largest difference between two programs for one gradient: rounding, carried on over the steps.

        Far from the output an error is a small difference of large numbers: in single precision few digits are left.
        """
        if self.dtype == torch.float64:
            return 1e-9
        return 1e-2 if self.autocast is None else 0.3

    def to(self, case: Case) -> tuple[nn.Module, Tensor, Tensor]:
        """Model, inputs and targets."""
        x, y = case.batch()
        x = x.to(self.device, self.dtype if x.is_floating_point() else None)
        return case.model().to(self.device, self.dtype), x, y.to(self.device)

    def __str__(self) -> str:
        name = str(self.autocast or self.dtype).removeprefix("torch.")
        return f"{name} autocast" if self.autocast else name


CPU = Setting()


class Contest:
    """Programs for the gradient of one case, backprop first.

    Attributes:
        programs: By name; that of a compiled contender ends in ``", compiled"``.
        models: The converted model of each contender, by name, eager ones only.
        notes: By name, what a compiled program said about not being compiled.
    """

    def __init__(self, case: Case, contenders: Sequence[Contender], compiled: bool, setting: Setting = CPU) -> None:
        self.case, self.setting = case, setting
        self.net, self.x, self.y = setting.to(case)
        self.programs: dict[str, Program] = {REFERENCE: self._gradient(self.net)}
        self.models: dict[str, torch2ebm.EnergyModel] = {}
        self.notes: dict[str, str] = {}
        if compiled:
            self.programs[REFERENCE + COMPILED] = self._compiled_backprop()
        for each in contenders:
            self.models[each.name] = each.learning(self.net)
            self.programs[each.name] = self._gradient(self.models[each.name])
            if compiled:
                self.programs[each.name + COMPILED] = self._gradient(each.learning(self.net, compiled=True))

    def _gradient(self, model: nn.Module) -> Program:
        return gradient(model, self.x, self.y, self.case.loss, self.setting.autocast)

    def _compiled_backprop(self) -> Program:
        loss = torch.compile(self.case.loss, dynamic=False)
        return gradient(self.net, self.x, self.y, loss, self.setting.autocast)

    def checked(self) -> dict[str, float]:
        """How far each program is from what it has to compute. Raises :class:`DisagreementError`."""
        references = self._references()
        differences = {}
        self.warmed_up()
        for name in references:
            program = self.programs[name]
            differences[name] = relative_error(gradients_of(program), references[name]())
            if not differences[name] <= self.setting.tolerance:
                raise DisagreementError(f"{self.case.name}: {name} is off by {differences[name]:.1e}")
        return differences

    def warmed_up(self) -> None:
        """Every run is known and has been cut once, and every program recorded and compiled, where it is to be."""
        for name, program in self.programs.items():
            self._warm_up(name, program)

    def _warm_up(self, name: str, program: Program) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CompilationWarning)
            # captured at the first call, held against the nodes at the second; recorded at one, compiled at another
            for _ in range(4 if name.endswith(COMPILED) else 2):
                program()
        found = [str(each.message) for each in caught if issubclass(each.category, CompilationWarning)]
        if found:
            self.notes[name] = "; ".join(found)

    def _references(self) -> dict[str, Callable[[], Gradients]]:
        """What each program has to agree with: a compiled one with the eager one, that one with the formulas here."""
        found = {name: self._eager(name) for name in self.programs if name.endswith(COMPILED)}
        if EXACT.name in self.programs:
            found[EXACT.name] = lambda: gradients_of(self.programs[REFERENCE])
        if FULL.name in self.programs:
            found[FULL.name] = lambda: gradients_of(self.programs[STRICT.name])
        if self.setting.dtype == torch.float64 and is_chain(self.net):
            found.update(self._by_hand())
        return {name: reference for name, reference in found.items() if name in self.programs}

    def _eager(self, name: str) -> Callable[[], Gradients]:
        return lambda: gradients_of(self.programs[name.removesuffix(COMPILED)])

    def _by_hand(self) -> Mapping[str, Callable[[], Gradients]]:
        net = self.net
        assert isinstance(net, nn.Sequential)
        return {
            STRICT.name: lambda: strict_by_hand(net, self.x, self.y),
            ERRORS.name: lambda: errors_by_hand(net, self.x, self.y),
            FIXED.name: lambda: fixed_by_hand(net, self.x, self.y),
        }


class DisagreementError(Exception):
    """Two programs that are to be compared do not compute the same gradient."""


def gradients_of(program: Program) -> Gradients:
    """A copy of what the program computes."""
    return [found.clone() for found in program() if found is not None]  # type: ignore[attr-defined]


def relative_error(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest over parameters of ``|g - r| / |r|``; one without a gradient counts against the largest of all."""
    largest = max(float(r.norm()) for r in theirs)
    pairs = zip(ours, theirs, strict=True)
    return max(float((g - r).norm()) / max(float(r.norm()), 1e-3 * largest) for g, r in pairs)


# what they have to compute, written out for chains --------------------------------------------------------------------


def is_chain(net: nn.Module) -> bool:
    """Whether each child is one layer, so that :func:`chain_of` is the engine's own cut."""
    layers = (nn.Linear, nn.Conv2d, nn.Tanh, nn.ReLU, nn.MaxPool2d, nn.Flatten)
    return isinstance(net, nn.Sequential) and all(isinstance(child, layers) for child in net)


def chain_of(net: nn.Sequential) -> list[nn.Sequential]:
    """The nodes of a chain: every layer that has parameters, with what follows it."""
    blocks: list[list[nn.Module]] = []
    for child in net:
        if list(child.parameters()):
            blocks.append([])
        blocks[-1].append(child)
    return [nn.Sequential(*block) for block in blocks]


def strict_by_hand(net: nn.Sequential, x: Tensor, y: Tensor, steps: int = STEPS, lr: float = LR) -> Gradients:
    """``v <- v - lr dF/dv`` with autograd on all of F at once, F = sum_l |v_l - f_l(v_{l-1})|^2 / 2 + sum_b loss_b."""
    blocks = chain_of(net)
    with torch.no_grad():
        values = list(_predictions(blocks, x))[:-1]
    for _ in range(steps):
        values = [value.detach().requires_grad_() for value in values]
        slopes = torch.autograd.grad(_energy(blocks, x, values, y), values)
        values = [value - lr * slope for value, slope in zip(values, slopes, strict=True)]
    return _local_gradients(net, blocks, x, values, y)


def errors_by_hand(net: nn.Sequential, x: Tensor, y: Tensor, steps: int = STEPS, lr: float = LR) -> Gradients:
    """``e <- e - lr dF/de``, F = sum_l |e_l|^2 / 2 + sum_b loss_b, where v_l = f_l(v_{l-1}) + e_l."""
    blocks = chain_of(net)
    with torch.no_grad():
        errors = [torch.zeros_like(value) for value in _predictions(blocks, x)][:-1]
    for _ in range(steps):
        errors = [error.detach().requires_grad_() for error in errors]
        *_, output = _predictions(blocks, x, errors)
        energy = F.cross_entropy(output, y, reduction="sum") + sum(0.5 * error.square().sum() for error in errors)
        slopes = torch.autograd.grad(energy, errors)
        errors = [error - lr * slope for error, slope in zip(errors, slopes, strict=True)]
    return _local_gradients(net, blocks, x, list(_predictions(blocks, x, errors))[:-1], y)


def fixed_by_hand(net: nn.Sequential, x: Tensor, y: Tensor, steps: int = STEPS, lr: float = LR) -> Gradients:
    """Backprop's gradient times P(Binomial(steps, lr) >= k) for a node that is k levels above the output."""
    blocks = chain_of(net)
    exact = iter(torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters())))
    found = []
    for level, block in zip(reversed(range(len(blocks))), blocks, strict=True):
        weight = sum(comb(steps, k) * lr**k * (1 - lr) ** (steps - k) for k in range(level, steps + 1))
        found += [weight * next(exact) for _ in block.parameters()]
    return found


def _predictions(blocks: Sequence[nn.Module], x: Tensor, errors: Sequence[Tensor] = ()) -> Iterator[Tensor]:
    """Of every layer, with its error added where there is one."""
    for i, block in enumerate(blocks):
        x = block(x) + errors[i] if i < len(errors) else block(x)
        yield x


def _energy(blocks: Sequence[nn.Module], x: Tensor, values: Sequence[Tensor], y: Tensor) -> Tensor:
    energy = F.cross_entropy(blocks[-1](values[-1]), y, reduction="sum")
    for block, below, value in zip(blocks, [x, *values], values, strict=False):
        energy = energy + 0.5 * (value - block(below)).square().sum()
    return energy


def _local_gradients(
    net: nn.Module, blocks: Sequence[nn.Module], x: Tensor, values: Sequence[Tensor], y: Tensor
) -> Gradients:
    """dF/dtheta at these values, a mean over the batch as the loss is."""
    energy = _energy(blocks, x, [value.detach() for value in values], y)
    return [found / len(x) for found in torch.autograd.grad(energy, list(net.parameters()))]
