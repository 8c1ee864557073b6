"""The relaxation of one call: what moving values and moving errors have in common.

Each node is evaluated on leaves, so an autograd graph covers one node and never crosses to another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from torch2ebm.engine.call import Call, NodePass, at_least_single
from torch2ebm.engine.energies import Energy, gaussian_energy_of_batch
from torch2ebm.engine.results import InferenceState, LocalGradients, StepSize
from torch2ebm.graph.energy_graph import Node
from torch2ebm.inference.history import Collected, largest_entry, paired, relative_length
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.potentials.energy_parameters import as_they_are, by_parameter

LOSS = "loss"
UNIT_GAUSSIAN: Mapping[str, Energy] = MappingProxyType({})  # what nodes without an entry have


class Inference(ABC):
    """What moves in one call, and F's gradient in it.

    F is the sum over nodes and samples of phi(value, prediction), plus L, which is lambda times the loss summed over
    samples. Everything is by *slot*: the name of one value of a node (most nodes have one). An *error* is a value minus
    its prediction; a *message* is what a child sends to its parent, J^T of -dphi/dprediction.

    Args:
        call: The call, after its feed-forward pass.
        loss: Its loss, or :class:`NudgedLoss` of it.
        energies: Energy of each node, by name; a node without one has a Gaussian of precision 1.
        retain_call: Whether the call keeps its values, for another relaxation from the same start.

    Attributes:
        call: As given, with its ``graph`` and ``loss`` beside it.
        values: Value of every slot that can move, in its shape. Kept in at least single precision.
        read_as: By slot, the precision in which nodes read the value: half under autocast, for example.
        energies: Energy of each node, by name; a node without one has a Gaussian of precision 1.
        history: For every sweep the energy of each active node, and of the loss, as tensors of no dimension.
        measuring: Whether the next sweep keeps the largest entries of its gradients.
        driving: With ``measuring``, the largest absolute gradient by slot in the last sweep, a sample or in all;
            with ``still_below`` its length over that of ``pi e``.
        still_below: A gradient below so many epsilons of its value is rounding, and counts as zero.
        evaluations: How many node functions have run.
        step_size: What :meth:`Solver.start` has measured; ``carried_under`` these settings from call to call.
        nudge: The nudge in units of the curvature, r of :class:`Relative`; None where that is not known.
        scale: Factor from dF/dtheta to ``.grad``: that of the loss.

    Example:
        The examples of the methods go on from this one.

        >>> import torch
        >>> from torch2ebm.extend import ValueInference, call_and_loss
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
        >>> inference = ValueInference(call, loss)
        >>> inference.measuring = True
        >>> for slot, gradient in inference.sweep():
        ...     inference.move(slot, gradient, rate=-0.1)
        >>> inference.values[slot].shape, inference.evaluations
        (torch.Size([5, 8]), 1)
    """

    def __init__(
        self,
        call: Call,
        loss: OutputLoss,
        energies: Mapping[str, Energy] = UNIT_GAUSSIAN,
        retain_call: bool = True,
    ) -> None:
        self.call, self.graph, self.loss, self.energies = call, call.graph, loss, energies
        hidden = [slot for node in self.graph.hidden_nodes for slot in node.slots]
        self.values: MutableMapping[str, Tensor] = {slot: at_least_single(call.values[slot]) for slot in hidden}
        self.read_as = {slot: call.values[slot].dtype for slot in hidden}
        if not retain_call:  # what is no part of the values any more goes at once
            for slot in self.values:
                del call.values[slot]
        self.history: list[dict[str, Tensor]] = []
        self.measuring = False
        self.recorded = False
        self.driving: dict[str, Tensor] = {}
        self.evaluations = 0
        self.nudge: float | None = None
        self.step_size: StepSize | None = None
        self.carried_under: Hashable = None
        self.still_below: float | None = None
        self.scale: float | Tensor = loss.scale  # a tensor in a recorded program, where a number would be a constant

    # what moves, for a solver's step that is recorded and run again

    @abstractmethod
    def moving(self) -> dict[str, Any]:
        """All that a sweep or a move changes, and all tensors of this call that they read; ``compile=True`` asks."""

    @abstractmethod
    def restore(self, moving: Mapping[str, Any]) -> None:
        """Be as when :meth:`moving` gave this."""

    # the driving term

    def begin_sweep(self) -> None:
        """Begin a line of the history. The sweeps do so; a solver that evaluates nodes one by one does it itself.

        Example:
            >>> inference.begin_sweep()
            >>> inference.history[-1]
            {}
        """
        self.history.append({})
        self.driving = {}

    def _measure(self, slot: str, gradient: Tensor, own: Tensor | None) -> None:
        if self.measuring and self.still_below is None:
            self.driving[slot] = largest_entry(gradient, self.call.batch_size)
        elif self.measuring:
            self.driving[slot] = relative_length(gradient, own, self._rounding(slot), self.call.batch_size)

    def _rounding(self, slot: str) -> Tensor | None:
        """A gradient that is no longer than this is rounding, and moves nothing; None where errors are stored."""
        return None

    def _value(self, slot: str) -> Tensor:
        """The value, for those who write nothing into it."""
        return self.values[slot]

    def residual(self) -> Tensor:
        """Largest absolute entry of the gradient in the last measured sweep.

        Returns:
            A tensor of no dimension; 0 where nothing was measured.

        Example:
            >>> inference.residual() == inference.residual_of_samples().max()
            tensor(True)
        """
        return torch.stack([each.max() for each in self.driving.values()]).max() if self.driving else torch.zeros(())

    def residual_of_samples(self) -> Tensor | None:
        """The same for each sample.

        Returns:
            Shape ``[batch]``; None where a value has no batch dimension.

        Example:
            >>> inference.residual_of_samples().shape
            torch.Size([5])
        """
        if not self.driving or any(each.ndim == 0 for each in self.driving.values()):
            return None
        return torch.stack(list(self.driving.values())).amax(0)

    # one node

    def _inputs(self, node: Node, requires_grad: bool) -> list[Tensor]:
        """Leaves in the precision that the feed-forward pass read."""
        found = []
        for slot in node.reads:
            value, dtype = self._value(slot), self.read_as[slot]
            found.append((value if value.dtype == dtype else value.to(dtype)).detach().requires_grad_(requires_grad))
        return found

    def evaluate(self, node: Node, requires_grad: bool) -> NodePass:
        """A node at the values as they are.

        Args:
            node: One of ``graph.nodes``.
            requires_grad: Whether messages to its parents are wanted.

        Returns:
            The pass, whose inputs are detached from everything else.

        Raises:
            NodeEvaluationError: where its function fails.

        Example:
            >>> inference.evaluate(inference.graph.nodes["2"], requires_grad=True).predictions[0].shape
            torch.Size([5, 3])
        """
        self.evaluations += 1
        with torch.enable_grad():
            return self.call.evaluate(node, self._inputs(node, requires_grad))

    def pulls_into_history(
        self, node: Node, errors: Sequence[Tensor], predictions: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """:meth:`pulls`, and the node's energy summed over samples goes to the history.

        Args:
            node: A node with a value.
            errors: One for each slot.
            predictions: One for each slot.

        Returns:
            As :meth:`pulls`.

        Example:
            >>> node, prediction = inference.graph.nodes["0"], torch.zeros(5, 8)
            >>> own, back = inference.pulls_into_history(node, [torch.ones(5, 8)], [prediction])
            >>> inference.history[-1]["0"]  # half of 40 squares
            tensor(20.)
        """
        energy = self.energies.get(node.name)
        if energy is None:
            parts = [gaussian_energy_of_batch(error) for error in errors]
        else:
            with torch.no_grad():  # its own parameters may require one
                parts = [energy.of_batch(*pair) for pair in zip(*paired(errors, predictions), strict=True)]
        self.history[-1][node.name] = sum(parts[1:], start=parts[0])
        return self.pulls(node, errors, predictions)

    def pulls(
        self, node: Node, errors: Sequence[Tensor], predictions: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the node's energy does to its value, and to its prediction.

        Args:
            node: A node with a value.
            errors: One for each slot.
            predictions: One for each slot.

        Returns:
            dphi/dvalue and -dphi/dprediction of each slot, in its shape. For a Gaussian of precision 1 both are errors.

        Example:
            >>> own, back = inference.pulls(inference.graph.nodes["0"], [torch.ones(5, 8)], [torch.zeros(5, 8)])
            >>> torch.equal(own[0], torch.ones(5, 8)) and torch.equal(back[0], own[0])
            True
        """
        energy = self.energies.get(node.name)
        if energy is None:
            # phi = 1/2 |e|^2: dphi/dv = -dphi/dmu = e. The very same tensors, by which callers know a unit Gaussian.
            return list(errors), list(errors)
        with torch.no_grad():
            pulls = [energy.gradients(*pair) for pair in zip(*paired(errors, predictions), strict=True)]
        return [own for own, _ in pulls], [backward for _, backward in pulls]

    def send(self, evaluated: NodePass, cotangents: Sequence[Tensor | None], messages: dict[str, Tensor]) -> None:
        """Add J^T of the cotangents to the message of each parent.

        Args:
            evaluated: A pass of the child, with ``requires_grad``; its graph is used up.
            cotangents: -dphi/dprediction of each slot of the child; None is zero.
            messages: By slot of a parent, added to.

        Example:
            >>> messages = {}
            >>> evaluated = inference.evaluate(inference.graph.nodes["2"], requires_grad=True)
            >>> inference.send(evaluated, [torch.ones(5, 3)], messages)
            >>> messages[slot].shape
            torch.Size([5, 8])
        """
        self.add_messages(evaluated, evaluated.pullback(cotangents, evaluated.inputs), messages)

    def add_messages(self, evaluated: NodePass, products: Sequence[Tensor | None], messages: dict[str, Tensor]) -> None:
        """The same with products that are known, for example from :meth:`GradientSum.add`.

        Args:
            evaluated: A pass of the child.
            products: One for each slot that it reads; None is zero.
            messages: By slot of a parent, added to.

        Example:
            >>> messages = {}
            >>> evaluated = inference.evaluate(inference.graph.nodes["2"], requires_grad=True)
            >>> inference.add_messages(evaluated, [torch.ones(5, 8)], messages)
            >>> list(messages) == [slot]
            True
        """
        for slot, message in zip(evaluated.node.reads, products, strict=True):
            if message is not None:
                # sum_c J_c^T e_c in single precision at least; not in place, since J^T of a sum returns e itself
                message = at_least_single(message, detach=False)
                messages[slot] = messages[slot] + message if slot in messages else message

    # outputs: the loss acts on their predictions (O1)

    def output_errors(self, passes: Sequence[NodePass]) -> dict[str, Tensor]:
        """e_o = -dL/dmu_o of every output slot; L goes to the history.

        Args:
            passes: One of each output node.

        Returns:
            By slot, in the shape of the prediction; a slot that the loss does not depend on is missing.

        Example:
            >>> passes = [inference.evaluate(node, requires_grad=False) for node in inference.graph.output_nodes]
            >>> errors = inference.output_errors(passes)
            >>> [error.shape for error in errors.values()]
            [torch.Size([5, 3])]
        """
        predictions = {s: p.detach() for each in passes for s, p in zip(each.node.slots, each.predictions, strict=True)}
        # one evaluation for all outputs: the loss may join them
        value, gradients = self.loss.gradients(predictions)
        self.history[-1][LOSS] = value
        return {slot: gradient.neg() for slot, gradient in gradients.items()}

    # the end

    def local_gradients(self) -> LocalGradients:
        """dF/dtheta where the relaxation ended, in the scale of the user's loss. The values are used up.

        Returns:
            Gradients of parameters and inputs, and the state that the model shows.

        Example:
            >>> gradients = inference.local_gradients()
            >>> gradients.parameters["0.weight"].shape, gradients.state.value["0"].shape
            (torch.Size([8, 4]), torch.Size([5, 8]))
        """
        return self.finished(self.collected())

    def collected(self) -> Collected:
        """The last pass over all nodes, the first half of :meth:`local_gradients`.

        Returns:
            Errors, predictions and gradients of parameters, by slot and by name.

        Example:
            >>> list(inference.collected().gradients.parameters)
            ['2.weight', '2.bias', '0.weight', '0.bias']
        """
        self.history.append({})
        # the energy at the end comes from this pass, as that of a step comes from its sweep
        result = Collected()
        self._collect_all(result)
        return result

    def finished(self, result: Collected) -> LocalGradients:
        """The second half of :meth:`local_gradients`.

        Args:
            result: Of :meth:`collected`.

        Returns:
            As :meth:`local_gradients`.

        Example:
            >>> inference.finished(inference.collected()).state.unreached
            ()
        """
        state = InferenceState(
            self.graph,
            self.call.batch_size,
            result.predictions,
            result.errors,
            # _collect has multiplied by -scale; a loss times 0 has none
            error_unit=-1 / self.loss.scale if self.loss.scale else 0.0,
            unreached=tuple(result.unreached),
            energies=as_they_are(self.energies),
            rounding=result.rounding,
        )
        inputs = self.call.input_gradients(result.gradients.clamped)
        learned = by_parameter(self.energies, result.of_energies)
        return LocalGradients(result.gradients.parameters, inputs, state, learned=learned)

    @abstractmethod
    def _collect_all(self, result: Collected) -> None:
        """The last pass over all nodes: errors, predictions and gradients of parameters."""

    def _collect_outputs(self, passes: Sequence[NodePass], result: Collected) -> None:
        errors = self.output_errors(passes)
        for evaluated in passes:
            own = [errors.get(slot) for slot in evaluated.node.slots]
            self._collect(evaluated, own, own, result)

    def _collect(
        self,
        evaluated: NodePass,
        errors: Sequence[Tensor | None],
        cotangents: Sequence[Tensor | None],
        result: Collected,
    ) -> None:
        """The gradient of a node's parameters, -J^T of the cotangents, scaled as ``.grad`` is."""
        # .grad = dF/dtheta * scale, dF/dtheta = -(dmu/dtheta)^T pi e. In place: nothing reads these errors any more.
        scaled = [None if error is None else error.mul_(-self.scale) for error in errors]
        for slot, prediction, error in zip(evaluated.node.slots, evaluated.predictions, scaled, strict=True):
            result.predictions[slot] = prediction.detach()
            if error is not None:
                result.errors[slot] = error
        pulled = [
            # the same tensor is scaled already: twice would square the factor
            own if cotangent is error or cotangent is None else cotangent * -self.scale
            for own, error, cotangent in zip(scaled, errors, cotangents, strict=True)
        ]
        result.gradients.add(self.call, evaluated, pulled)

    def _collect_unreached(self, node: Node, result: Collected) -> None:
        """No error has reached the node: its gradients are exactly zero, its predictions its values."""
        result.unreached.insert(0, node.name)  # nodes come in reverse; the report has the graph's order
        result.gradients.add_zeros(self.call, node)
        values = [self.values.pop(slot) for slot in node.slots]
        if energy := self.energies.get(node.name):
            result.add_energy(node.name, energy, [torch.zeros_like(value) for value in values], values, self.scale)
        result.predictions.update(zip(node.slots, values, strict=True))
