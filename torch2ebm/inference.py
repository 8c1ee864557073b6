"""The values of one call while they move: the gradient of the energy in them, and the local gradients at the end.

The sweep visits outputs first, then parents after children, one node at a time. Since a node's own value and those of
its parents are still the old ones when its turn comes, moving each value as soon as its gradient is complete *is* the
synchronous update, and only one node's autograd graph exists at a time.

From a feed-forward start all errors are zero until the output's error reaches them, one level a step. A node that has
not moved, and whose parents have not, has an error of exactly zero: it is not evaluated (the wave front).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch2ebm.energies import gaussian_energy_of_batch
from torch2ebm.graph import Node
from torch2ebm.state import Call, InferenceState, LocalGradients, NodePass, OutputLoss, at_least_single

LOSS = "loss"


class Inference:
    """The moving values of one call, and F's gradient in them.

    Attributes:
        values: Value of every slot that can move. Kept in at least single precision (algorithms.md, A4).
        history: For every sweep the energy of each active node, and of the loss, as tensors of no dimension.
        driving: With ``measuring``, the largest absolute gradient of each slot in the last sweep.
        evaluations: How many node functions the sweeps have run.
    """

    def __init__(self, call: Call, loss: OutputLoss, retain_call: bool = True) -> None:
        self.call, self.graph, self.loss = call, call.graph, loss
        hidden = [(node, slot) for node in self.graph.hidden_nodes for slot in node.slots]
        self.values = {slot: at_least_single(call.values[slot]) for _, slot in hidden}
        self._read_as = {slot: call.values[slot].dtype for _, slot in hidden}
        # fed by clamped inputs only: these predictions cannot change
        self._fixed = {slot: self.values[slot] for node, slot in hidden if not node.reads}
        if not retain_call:  # the feed-forward values go as soon as the values have left them
            for slot in self.values:
                del call.values[slot]
        self.moved: set[str] = set()
        self.history: list[dict[str, Tensor]] = []
        self.driving: list[Tensor] = []
        self.measuring = False
        self.evaluations = 0

    def move(self, slot: str, direction: Tensor, rate: float) -> None:
        """``value += rate * direction``; the feed-forward value itself is never written."""
        if slot in self.moved:
            self.values[slot].add_(direction, alpha=rate)
        else:
            self.values[slot] = torch.add(self.values[slot], direction, alpha=rate)
            self.moved.add(slot)

    def sweep(self) -> Iterator[tuple[str, Tensor]]:
        """dF/dv of each slot that it is not exactly zero for; the slot may be moved as soon as it is yielded."""
        self.history.append({})
        self.driving = []
        messages = self._messages_of_outputs()
        for node in reversed(self.graph.hidden_nodes):
            errors = self._errors(node, messages)
            for slot, error in zip(node.slots, errors, strict=True):
                message = messages.pop(slot, None)
                if error is not None and message is not None:
                    gradient = error - message  # dF/dv = e - sum_c J_c^T e_c; not in place: a sum passes e on as it is
                elif message is not None:
                    gradient = message.neg()
                elif error is not None:
                    gradient = error
                else:
                    continue
                if self.measuring:
                    self.driving.append(torch.linalg.vector_norm(gradient, ord=torch.inf))
                yield slot, gradient

    def residual(self) -> Tensor:
        """Largest absolute entry of dF/dv in the last measured sweep."""
        return torch.stack(self.driving).max() if self.driving else torch.zeros(())

    # one node

    def _is_active(self, node: Node) -> bool:
        return not self.moved.isdisjoint(node.slots) or not self.moved.isdisjoint(node.reads)

    def _inputs(self, node: Node, requires_grad: bool) -> list[Tensor]:
        """Leaves in the precision that the feed-forward pass read."""
        return [self.values[slot].to(self._read_as[slot]).detach().requires_grad_(requires_grad) for slot in node.reads]

    def _evaluate(self, node: Node, requires_grad: bool) -> NodePass:
        self.evaluations += 1
        with torch.enable_grad():
            return self.call.evaluate(node, self._inputs(node, requires_grad))

    def _errors(self, node: Node, messages: dict[str, Tensor]) -> list[Tensor | None]:
        """The errors of a node, after sending them to its parents. None is exactly zero."""
        if not self._is_active(node):
            return [None] * len(node.slots)
        if not node.reads:
            return list(self._record(node, self._subtract(node, [self._fixed[slot] for slot in node.slots])))
        evaluated = self._evaluate(node, requires_grad=True)
        errors = self._subtract(node, evaluated.predictions)
        self._send(evaluated, errors, messages)
        return list(self._record(node, errors))

    def _subtract(self, node: Node, predictions: Sequence[Tensor]) -> list[Tensor]:
        return [self.values[s] - prediction.detach() for s, prediction in zip(node.slots, predictions, strict=True)]

    def _record(self, node: Node, errors: list[Tensor]) -> list[Tensor]:
        energy = gaussian_energy_of_batch(errors[0])
        for error in errors[1:]:
            energy = energy + gaussian_energy_of_batch(error)
        self.history[-1][node.name] = energy
        return errors

    def _send(self, evaluated: NodePass, errors: Sequence[Tensor | None], messages: dict[str, Tensor]) -> None:
        """Add J^T e to the message of each parent."""
        for slot, message in zip(evaluated.node.reads, evaluated.pullback(errors, evaluated.inputs), strict=True):
            if message is not None:
                message = at_least_single(message)
                messages[slot] = messages[slot] + message if slot in messages else message

    # outputs: the loss acts on their predictions (O1)

    def _output_errors(self, passes: Sequence[NodePass]) -> dict[str, Tensor]:
        """e_o = -dL/dmu_o of every output slot, L being lambda times the loss summed over samples."""
        predictions = {s: p.detach() for each in passes for s, p in zip(each.node.slots, each.predictions, strict=True)}
        value, gradients = self.loss.gradients(predictions)
        self.history[-1][LOSS] = value
        return {slot: gradient.neg() for slot, gradient in gradients.items()}

    def _messages_of_outputs(self) -> dict[str, Tensor]:
        passes = [self._evaluate(node, requires_grad=True) for node in self.graph.output_nodes]
        errors = self._output_errors(passes)
        messages: dict[str, Tensor] = {}
        for evaluated in passes:
            self._send(evaluated, [errors.get(slot) for slot in evaluated.node.slots], messages)
        return messages

    # the end

    def local_gradients(self) -> LocalGradients:
        """dF/dtheta at the values as they are now, with errors of these values, in the scale of the user's loss."""
        self.history.append({})
        self._fixed.clear()
        result = _Result()
        self._collect_outputs(result)
        for node in reversed(self.graph.hidden_nodes):
            if self._is_active(node):
                self._collect_hidden(node, result)
            else:
                result.unreached.insert(0, node.name)
                result.gradients.add_zeros(self.call, node)
                result.predictions.update({slot: self.values.pop(slot) for slot in node.slots})
        state = InferenceState(
            self.graph,
            self.call.batch_size,
            result.predictions,
            result.errors,
            error_unit=-1 / self.loss.scale if self.loss.scale else 0.0,
            unreached=tuple(result.unreached),
        )
        inputs = self.call.input_gradients(result.gradients.clamped)
        return LocalGradients(result.gradients.parameters, inputs, state)

    def _collect_outputs(self, result: _Result) -> None:
        passes = [self._evaluate(node, requires_grad=False) for node in self.graph.output_nodes]
        errors = self._output_errors(passes)
        for evaluated in passes:
            self._collect(evaluated, [errors.get(slot) for slot in evaluated.node.slots], result)

    def _collect_hidden(self, node: Node, result: _Result) -> None:
        evaluated = self._evaluate(node, requires_grad=False)
        errors = self._record(node, self._subtract(node, evaluated.predictions))
        for slot in node.slots:
            del self.values[slot]  # all its readers are done
        self._collect(evaluated, errors, result)

    def _collect(self, evaluated: NodePass, errors: Sequence[Tensor | None], result: _Result) -> None:
        scaled = [None if error is None else error.mul_(-self.loss.scale) for error in errors]  # what .grad is made of
        for slot, prediction, error in zip(evaluated.node.slots, evaluated.predictions, scaled, strict=True):
            result.predictions[slot] = prediction.detach()
            if error is not None:
                result.errors[slot] = error
        result.gradients.add(self.call, evaluated, scaled)


@dataclass
class _Result:
    """What the last pass over the nodes collects, by slot."""

    gradients: GradientSum = field(default_factory=lambda: GradientSum())
    predictions: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)  # times minus the loss's scale
    unreached: list[str] = field(default_factory=list)


class GradientSum:
    """Gradients of parameters, shared ones summed, and of clamped inputs."""

    def __init__(self) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.clamped: dict[str, Tensor] = {}

    def add(
        self,
        call: Call,
        evaluated: NodePass,
        cotangents: Sequence[Tensor | None],
        wrt: Sequence[Tensor] = (),
        retain_graph: bool = False,
    ) -> Sequence[Tensor | None]:
        """Add the node's share, and return the products with ``wrt`` from the same pass."""
        parameters = {name: p for name in evaluated.node.parameters if (p := call.parameters[name]).requires_grad}
        clamped = call.clamped_inputs(evaluated.node)
        products = evaluated.pullback(
            cotangents, [*wrt, *parameters.values(), *clamped.values()], retain_graph=retain_graph
        )
        found = iter(products[len(wrt) :])
        for name, parameter in parameters.items():
            product = next(found)
            _add(self.parameters, name, torch.zeros_like(parameter) if product is None else product)
        for name in clamped:
            product = next(found)
            if product is not None:
                _add(self.clamped, name, product)
        return products[: len(wrt)]

    def add_zeros(self, call: Call, node: Node) -> None:
        for name in node.parameters:
            parameter = call.parameters[name]
            if parameter.requires_grad and name not in self.parameters:
                self.parameters[name] = torch.zeros_like(parameter)


def _add(total: dict[str, Tensor], name: str, product: Tensor) -> None:
    total[name] = total[name] + product if name in total else product


def energies(history: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """The recorded energies as numbers, with one transfer to the host."""
    rows = [[sweep[name] for name in names if name in sweep] for sweep in history]
    flat = [entry.double().reshape(()) for row in rows for entry in row]
    numbers = iter(torch.stack(flat).tolist() if flat else ())
    return _columns([{name: next(numbers) for name in names if name in sweep} for sweep in history], names)


def _columns(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(row.get(name, 0.0) for row in rows) for name in names}
