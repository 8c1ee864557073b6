"""The inference of IL-prox, and its normalised weight changes (Alonso et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch2ebm.engine.call import Call, NodePass, at_least_single
from torch2ebm.engine.gradients import GradientSum
from torch2ebm.engine.results import InferenceState, LocalGradients, Relaxation
from torch2ebm.errors import ConfigurationError, DenseLayerError, LossCurvatureError
from torch2ebm.graph.energy_graph import EnergyGraph, Node
from torch2ebm.implicit.curvature import largest_curvature
from torch2ebm.implicit.dense_layers import DenseLayer, DensePass, dense_layers
from torch2ebm.inference.base import LOSS
from torch2ebm.inference.history import energies
from torch2ebm.inference.relaxation import check_energies
from torch2ebm.inference.value_inference import DisplacedValues
from torch2ebm.loss.output_loss import OutputLoss


@dataclass(frozen=True)
class ProximalRates:
    """How far inference goes, and how far the weights (Alonso et al. 2022).

    Attributes:
        alpha: Rate of learning, in the output's error alone.
        steps: Inference steps.
        feedback_rate: Step size of what the errors of a value's children send.
        error_rate: Step size of a value's own error.
        eps: Added to the squared norm of a layer's input.
        loss_reduction: ``"mean"`` or ``"sum"``.
    """

    alpha: float
    steps: int
    feedback_rate: float
    error_rate: float
    eps: float
    loss_reduction: str


@dataclass(frozen=True)
class InferencePoint:
    """All nodes evaluated at one set of values."""

    passes: Sequence[NodePass]
    norms: Mapping[str, Tensor]  # nm of the layers that it was asked of, by node, shape []
    errors: Mapping[str, Tensor]  # by slot; a missing one is zero


class ProximalInference:
    """The moving values of one call.

    All nodes are evaluated on leaves that they share, so one pass backwards gives each value the messages of all its
    children; no graph of autograd's crosses a node.
    """

    def __init__(self, rates: ProximalRates, call: Call, loss: OutputLoss, layers: Mapping[str, DenseLayer]) -> None:
        self.rates, self.call, self.loss, self.layers, self.graph = rates, call, loss, layers, call.graph
        slots = [slot for node in self.graph.hidden_nodes for slot in node.slots]
        self.places = DisplacedValues({slot: at_least_single(call.values[slot]) for slot in slots})
        self.values = self._leaves()
        self.read_as = {slot: call.values[slot].dtype for slot in slots}
        self.fixed: dict[str, tuple[NodePass, Tensor | None]] = {}  # fed by clamped inputs only: these cannot change
        self.history: list[dict[str, Tensor]] = []

    def run(self) -> LocalGradients:
        residual = 0.0
        with torch.enable_grad():
            point = self._evaluate(last=False)
            for step in range(1, self.rates.steps + 1):
                messages = self._messages(point)
                if step == self.rates.steps:
                    residual = self._residual(point, messages)
                self._move(point, messages)
                point = self._evaluate(last=step == self.rates.steps)
        return self._result(point, residual)

    # one inference step

    def _leaves(self) -> dict[str, Tensor]:
        return {slot: value.detach().requires_grad_() for slot, value in self.places.items()}

    def _evaluate(self, last: bool) -> InferencePoint:
        passes, norms = [], {}
        for node in self.graph.nodes.values():
            evaluated, norm = self._evaluate_node(node, with_norm=node.is_output or last)
            passes.append(evaluated)
            if norm is not None:
                norms[node.name] = norm
        self.history.append({})
        return InferencePoint(passes, norms, {**self._hidden_errors(passes), **self._output_errors(passes, norms)})

    def _evaluate_node(self, node: Node, with_norm: bool) -> tuple[NodePass, Tensor | None]:
        """The node at the present values, and nm of its layer if it is one and that was asked for."""
        if node.name in self.fixed:
            return self.fixed[node.name]
        inputs = [self.values[slot].to(self.read_as[slot]) for slot in node.reads]
        layer = self.layers.get(node.name)
        if layer is None or (node.reads and not with_norm):
            found: tuple[NodePass, Tensor | None] = self.call.evaluate(node, inputs), None
        else:
            evaluated = layer.evaluate(self.call, inputs)
            found = evaluated.evaluated, self._squared_norm(layer, evaluated)
        if not node.reads:
            self.fixed[node.name] = found
        return found

    def _squared_norm(self, layer: DenseLayer, evaluated: DensePass) -> Tensor:
        """nm = mean_b |a|^2 + 1 (of a bias) + eps."""
        rows = at_least_single(evaluated.rows)
        flat = rows.reshape(-1)
        return flat.dot(flat) / len(rows) + (self.rates.eps + layer.has_bias)

    @torch.no_grad()
    def _hidden_errors(self, passes: Sequence[NodePass]) -> dict[str, Tensor]:
        errors = {}
        for evaluated in passes:
            if not evaluated.node.is_output:
                for slot, prediction in zip(evaluated.node.slots, evaluated.predictions, strict=True):
                    errors[slot] = self._into_history(slot, self.places.minus(slot, prediction))
        return errors

    def _output_errors(self, passes: Sequence[NodePass], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """e_L = -(alpha nm / (1 + alpha nm)) dL/dp_L of every output that the loss depends on."""
        outputs = [evaluated for evaluated in passes if evaluated.node.is_output]
        predictions = {each.node.slots[0]: each.predictions[0].detach() for each in outputs}
        value, gradients = self.loss.gradients(predictions)
        if len(self.history) == 1:
            _check_curvature(self.loss, predictions, gradients)
        self.history[-1][LOSS] = value
        errors = {}
        for node in (each.node for each in outputs):
            if (slot := node.slots[0]) in gradients:
                norm = norms[node.name]
                shortened = norm / (-1 / self.rates.alpha - norm)
                errors[slot] = self._into_history(slot, at_least_single(gradients[slot]) * shortened)
        return errors

    def _into_history(self, slot: str, error: Tensor) -> Tensor:
        self.history[-1][slot] = torch.linalg.vector_norm(error)
        return error

    def _messages(self, point: InferencePoint) -> list[Tensor | None]:
        """sum_c J_c^T e_c of every value."""
        pairs = [
            (prediction, point.errors[slot].to(prediction.dtype))
            for evaluated in point.passes
            for slot, prediction in zip(evaluated.node.slots, evaluated.predictions, strict=True)
            if evaluated.node.reads and slot in point.errors and prediction.requires_grad
        ]
        if not pairs or not self.values:
            return [None] * len(self.values)
        predictions, errors = zip(*pairs, strict=True)
        return list(torch.autograd.grad(predictions, list(self.values.values()), errors, allow_unused=True))

    @torch.no_grad()
    def _move(self, point: InferencePoint, messages: Sequence[Tensor | None]) -> None:
        """h <- h - error_rate e + feedback_rate J^T e, all at once."""
        for slot, message in zip(self.values, messages, strict=True):
            if self.rates.error_rate:
                self.places.move(slot, point.errors[slot], -self.rates.error_rate)
            if message is not None:
                self.places.move(slot, message, self.rates.feedback_rate)
        self.values = self._leaves()

    def _residual(self, point: InferencePoint, messages: Sequence[Tensor | None]) -> float:
        """Largest absolute entry of the values' last change over ``feedback_rate``; dF/dv where the rates are equal."""
        ratio = self.rates.error_rate / self.rates.feedback_rate
        largest = 0.0
        for slot, message in zip(self.values, messages, strict=True):
            driving = ratio * point.errors[slot] if message is None else message - ratio * point.errors[slot]
            largest = max(largest, float(driving.abs().max()))
        return largest

    # the end

    def _result(self, point: InferencePoint, residual: float) -> LocalGradients:
        active = self._active(point)
        gradients = GradientSum()
        for evaluated in point.passes:
            if evaluated.node.name in active:
                self._add_changes(evaluated, point, gradients)
            else:
                gradients.add_zeros(self.call, evaluated.node)
        predictions = {
            s: p.detach() for each in point.passes for s, p in zip(each.node.slots, each.predictions, strict=True)
        }
        unreached = tuple(node.name for node in self.graph.nodes.values() if node.name not in active)
        report = _report(self.graph, self.history, self.rates.steps, residual)
        state = InferenceState(
            self.graph,
            self.call.batch_size,
            predictions,
            point.errors,
            relaxation=report,
            unreached=unreached,
            rounding={slot: self.places.rounding(slot, predictions[slot]).norm() for slot in self.places},
        )
        return LocalGradients(gradients.parameters, [None] * len(self.call.tensors), state)

    def _add_changes(self, evaluated: NodePass, point: InferencePoint, gradients: GradientSum) -> None:
        """-dW = -mean_b(e a^T) / nm, times a scaler's factor; zero where every input is zero."""
        if evaluated.node.name not in point.norms:
            return
        norm = point.norms[evaluated.node.name]
        mean = self.loss.scale if self.rates.loss_reduction == "mean" else self.loss.scale / self.call.batch_size
        factor = torch.where(norm > 0, -mean / norm, 0.0)
        own = [point.errors.get(slot) for slot in evaluated.node.slots]
        gradients.add(self.call, evaluated, [None if error is None else error * factor for error in own])

    def _active(self, point: InferencePoint) -> set[str]:
        """The nodes that an error has reached: outputs of the loss, and who moved or reads a value that did."""
        active = {node.name for node in self.graph.output_nodes if not point.errors.keys().isdisjoint(node.slots)}
        moved: set[str] = set()
        for _ in range(self.rates.steps):
            sent = {slot for node in self.graph.nodes.values() if node.name in active for slot in node.reads}
            if sent <= moved:
                break
            moved |= sent
            active |= {n.name for n in self.graph.hidden_nodes if not moved.isdisjoint((*n.slots, *n.reads))}
        return active


def _report(graph: EnergyGraph, history: Sequence[Mapping[str, Tensor]], steps: int, residual: float) -> Relaxation:
    """Half the squared norms of the errors, a node the sum of its slots."""
    norms = energies(history, [*graph.owner, LOSS])
    loss = norms.pop(LOSS)
    table = {
        node.name: tuple(
            0.5 * sum(n * n for n in column) for column in zip(*(norms[slot] for slot in node.slots), strict=True)
        )
        for node in graph.nodes.values()
    }
    total = tuple(sum(column) for column in zip(*table.values(), strict=True))
    with_loss = tuple(energy + cost for energy, cost in zip(total, loss, strict=True))
    remedy = "Take a smaller feedback_rate and error_rate, or fewer steps."
    check_energies(with_loss, {**table, "the loss": loss}, remedy)
    return Relaxation(steps, None, residual, total, table, loss)


def dense_layers_of(call: Call) -> dict[str, DenseLayer]:
    """The dense layers; every output has to be one."""
    try:
        layers = dense_layers(call)
    except DenseLayerError as error:
        raise DenseLayerError(
            f"ProximalInferenceLearning, {error.where}",
            error.got,
            error.expected,
            f"Leave out nodes=... or take nodes='preactivation', which cuts before the activations. {error.remedy}",
        ) from None
    for node in call.graph.output_nodes:
        if node.name not in layers:
            raise DenseLayerError(
                f"ProximalInferenceLearning, output node '{node.name}' ({node.description})",
                "an output that is not a trainable layer's",
                "one dense layer with nothing after it, cut by nodes='preactivation'",
                "Move what follows the last layer (an activation, a softmax, a reshape, a sum) to the loss, and let "
                "its weight be trained; or take PredictiveCoding.",
            )
    return layers


def _check_curvature(loss: OutputLoss, predictions: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    """Refuse a loss whose Hessian exceeds the identity where inference starts."""
    if not gradients:
        return
    curvature, accuracy = largest_curvature(loss, predictions, gradients)
    if curvature > 1 + 4 * accuracy:
        raise LossCurvatureError(
            "ProximalInferenceLearning, loss.backward()",
            f"a loss with a curvature of at least {curvature:.3g} in a sample's prediction",
            "at most 1, as of cross-entropy or half the squared error",
            f"Divide the loss by {math.ceil(curvature)} and multiply alpha by it, or take ImplicitSGD or "
            "PredictiveCoding.",
        )


def check_not_negative(where: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not (isinstance(number, (int, float)) and math.isfinite(number) and number >= 0):
            raise ConfigurationError(
                f"{where}({name}=...)", repr(number), "a finite number, 0 or more", "Choose another."
            )
