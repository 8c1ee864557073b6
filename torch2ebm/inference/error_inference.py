"""The errors of one call while they move; a value is its prediction plus its error (Goemaere et al. 2025).

A sweep computes all values from the inputs onward, keeps one autograd graph a node, and sends messages back. The
error of a node may be moved as soon as its gradient is yielded: the values of this sweep are computed already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch2ebm.engine.call import Call, NodePass, at_least_single
from torch2ebm.engine.energies import Energy
from torch2ebm.graph.energy_graph import Node
from torch2ebm.inference.base import UNIT_GAUSSIAN, Inference
from torch2ebm.inference.history import Collected
from torch2ebm.loss.output_loss import OutputLoss


class ErrorInference(Inference):
    """The moving errors of one call. Arguments and words are those of ``Inference``.

    Attributes:
        errors: Error of every slot that has one, in the shape of its value; a missing one is exactly zero.
        values: Value of every slot that can move, as of the last sweep.

    Example:
        The examples of the methods go on from this one.

        >>> import torch
        >>> from torch2ebm.extend import ErrorInference, call_and_loss
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
        >>> inference = ErrorInference(call, loss)
        >>> [slot] = list(inference.values)
        >>> inference.errors
        {}
    """

    def __init__(
        self,
        call: Call,
        loss: OutputLoss,
        energies: Mapping[str, Energy] = UNIT_GAUSSIAN,
        retain_call: bool = True,
    ) -> None:
        super().__init__(call, loss, energies, retain_call)
        self.errors: dict[str, Tensor] = {}
        self._predictions: dict[str, Tensor] = dict(self.values)
        self._changed: set[str] = set()  # slots that have left their feed-forward value

    def moving(self) -> dict[str, Any]:
        """Values, errors, predictions, and which have changed; ``compile=True`` asks.

        Returns:
            By what they are, then by slot.

        Example:
            >>> list(inference.moving())
            ['values', 'errors', 'predictions', 'changed']
        """
        tensors = {"values": dict(self.values), "errors": dict(self.errors), "predictions": dict(self._predictions)}
        return {**tensors, "changed": frozenset(self._changed)}

    def restore(self, moving: Mapping[str, Any]) -> None:
        """Be as when :meth:`moving` gave this.

        Args:
            moving: What it gave.

        Example:
            >>> inference.restore(inference.moving())
        """
        self.values, self.errors = dict(moving["values"]), dict(moving["errors"])
        self._predictions, self._changed = dict(moving["predictions"]), set(moving["changed"])

    def move(self, slot: str, direction: Tensor, rate: float) -> None:
        """``error += rate * direction``.

        Args:
            slot: Whose error.
            direction: In the shape of its value.
            rate: A number, minus the step size for descent.

        Example:
            >>> inference.move(slot, torch.ones(5, 8), rate=-0.5)
            >>> inference.errors[slot].unique()
            tensor([-0.5000])
        """
        # never in place: a sum passes an error on as its message, as it is
        error = self.errors.get(slot)
        self.errors[slot] = direction * rate if error is None else torch.add(error, direction, alpha=rate)

    def total_sweep(self) -> Iterator[tuple[str, Tensor]]:
        """dF/de of each slot, children first (Goemaere et al. 2025).

        It is the exact gradient, since a message carries what all descendants say. A slot may be moved as soon as it is
        yielded.

        Yields:
            The slot, and dF/de of F summed over samples, in the shape of the value. Where it is zero, none.

        Example:
            >>> for name, gradient in inference.total_sweep():
            ...     inference.move(name, gradient, rate=-0.1)
            >>> torch.allclose(inference.errors[slot], -0.1 * gradient)
            True
        """
        yield from self._sweep(total=True)

    def local_sweep(self) -> Iterator[tuple[str, Tensor]]:
        """``pi e - sum_c J_c^T pi_c e_c`` of each slot: zero where dF/de is, yet no gradient of F.

        Yields:
            The slot, and the difference, in the shape of the value.

        Example:
            >>> [(name, difference)] = inference.local_sweep()
            >>> difference.shape
            torch.Size([5, 8])
        """
        yield from self._sweep(total=False)

    def _sweep(self, total: bool) -> Iterator[tuple[str, Tensor]]:
        self.begin_sweep()
        passes = self._forward()
        messages = self._messages_of_outputs(passes)
        for node in reversed(self.graph.hidden_nodes):
            received = [messages.pop(slot, None) for slot in node.slots]
            own, cotangents = self._own(node)
            sent = [passed_on(*each) for each in zip(own, cotangents, received, strict=True)] if total else cotangents
            if node.reads and any(each is not None for each in sent):
                evaluated = passes.pop(node.name, None) or self.evaluate(node, requires_grad=True)
                self.send(evaluated, sent, messages)
            for slot, gradient, message in zip(node.slots, own, received, strict=True):
                found = difference(gradient, message)
                if found is not None:
                    self._measure(slot, found, gradient)
                    yield slot, found

    def _own(self, node: Node) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """dphi/dvalue and -dphi/dprediction at the errors; None is exactly zero."""
        if all(slot not in self.errors for slot in node.slots):
            return [None] * len(node.slots), [None] * len(node.slots)
        return self.pulls_into_history(node, self._errors_of(node), [self._predictions[slot] for slot in node.slots])

    def _errors_of(self, node: Node) -> list[Tensor]:
        return [
            self.errors[slot] if slot in self.errors else torch.zeros_like(self.values[slot]) for slot in node.slots
        ]

    # from the inputs onward

    def _forward(self) -> dict[str, NodePass]:
        """All values at the errors as they are. Where nothing above has changed, a prediction is what it was."""
        passes: dict[str, NodePass] = {}
        for node in self.graph.nodes.values():
            if not node.is_output and self._changed.isdisjoint(node.reads):
                self._set_values(node, [self._predictions[slot] for slot in node.slots])
                continue
            evaluated = self.evaluate(node, requires_grad=True)
            passes[node.name] = evaluated
            if not node.is_output:
                self._set_values(node, [at_least_single(prediction) for prediction in evaluated.predictions])
                self._changed.update(node.slots)
        return passes

    def _set_values(self, node: Node, predictions: Sequence[Tensor]) -> None:
        for slot, prediction in zip(node.slots, predictions, strict=True):
            self._predictions[slot] = prediction
            if slot in self.errors:
                self.values[slot] = prediction + self.errors[slot]
                self._changed.add(slot)
            else:
                self.values[slot] = prediction

    def _messages_of_outputs(self, passes: dict[str, NodePass]) -> dict[str, Tensor]:
        outputs = [passes.pop(node.name) for node in self.graph.output_nodes]
        errors = self.output_errors(outputs)
        messages: dict[str, Tensor] = {}
        for evaluated in outputs:
            self.send(evaluated, [errors.get(slot) for slot in evaluated.node.slots], messages)
        return messages

    # the end

    def _collect_all(self, result: Collected) -> None:
        passes = self._forward()
        self._collect_outputs([passes.pop(node.name) for node in self.graph.output_nodes], result)
        for node in reversed(self.graph.hidden_nodes):
            if any(slot in self.errors for slot in node.slots):
                evaluated = passes.pop(node.name, None) or self.evaluate(node, requires_grad=False)
                errors = self._errors_of(node)
                predictions = [self._predictions[slot] for slot in node.slots]
                _, cotangents = self.pulls_into_history(node, errors, predictions)
                result.add_energy(node.name, self.energies.get(node.name), errors, predictions, self.scale)
                self._collect(evaluated, errors, cotangents, result)
            else:
                self._collect_unreached(node, result)


def difference(own: Tensor | None, message: Tensor | None) -> Tensor | None:
    if message is None:
        return own
    return message.neg() if own is None else own - message


def passed_on(own: Tensor | None, cotangent: Tensor | None, message: Tensor | None) -> Tensor | None:
    """-dF/dprediction with the error held fixed: the message, and where phi is no function of the error alone more."""
    if own is cotangent:
        return message
    assert own is not None and cotangent is not None
    return cotangent - own if message is None else message + (cotangent - own)
