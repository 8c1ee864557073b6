"""The values of one call while they move: the gradient of the energy in them, and the local gradients at the end.

The sweep visits outputs first, then parents after children, one node at a time. When a node's turn comes, its own value
and those of its parents are still the old ones. So moving each value as soon as its gradient is complete *is* the
synchronous update, and only one node's autograd graph exists at a time.

From a feed-forward start all errors are zero until the output's error reaches them, one level a step. A node that has
not moved, and whose parents have not, has an error of exactly zero: it is not evaluated (the wave front).

A value is kept as its origin, where it began, plus its displacement. In single precision v - mu of stored values loses
all that is below 1e-7 of v, and errors of first layers are far below. (origin - mu) + displacement keeps it: as long as
the parents' bits are those of the feed-forward pass, mu is the origin, and the error is the displacement, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch2ebm.engine.call import Call, NodePass
from torch2ebm.engine.energies import Energy, precision_of
from torch2ebm.graph.energy_graph import Node
from torch2ebm.inference.base import UNIT_GAUSSIAN, Inference
from torch2ebm.inference.error_inference import difference, passed_on
from torch2ebm.inference.history import Collected, relative_length
from torch2ebm.loss.output_loss import OutputLoss


class DisplacedValues(MutableMapping[str, Tensor]):
    """By slot, origin plus displacement. A value that is taken out is a copy: writing to it moves nothing."""

    def __init__(self, origins: Mapping[str, Tensor], displacements: Mapping[str, Tensor] | None = None) -> None:
        self.origins, self.displacements = dict(origins), dict(displacements or {})

    def __getitem__(self, slot: str) -> Tensor:
        return self.read(slot) if slot in self.displacements else self.origins[slot].clone()

    def __setitem__(self, slot: str, value: Tensor) -> None:
        self.displacements.pop(slot, None)
        self.origins[slot] = value

    def __delitem__(self, slot: str) -> None:
        self.displacements.pop(slot, None)
        del self.origins[slot]

    def __repr__(self) -> str:
        return f"DisplacedValues({dict(self)!r})"

    def __contains__(self, slot: object) -> bool:
        return slot in self.origins  # the mixin would add the two up

    def __iter__(self) -> Iterator[str]:
        return iter(self.origins)

    def __len__(self) -> int:
        return len(self.origins)

    def read(self, slot: str) -> Tensor:
        """The value, for those who write nothing into it: one that has not moved is the origin itself."""
        displacement = self.displacements.get(slot)
        return self.origins[slot] if displacement is None else self.origins[slot] + displacement

    def move(self, slot: str, direction: Tensor, rate: float) -> None:
        """``value += rate * direction``; the origin is never written."""
        if slot not in self.displacements:
            self.displacements[slot] = torch.zeros_like(self.origins[slot])
        self.displacements[slot].add_(direction, alpha=rate)

    def displace(self, slot: str, displacement: Tensor) -> None:
        """Put the value at so much from its origin."""
        self.displacements[slot] = displacement.to(self.origins[slot].dtype)

    def minus(self, slot: str, prediction: Tensor) -> Tensor:
        """The value minus a prediction, a new tensor with the digits of the displacement."""
        difference = self.origins[slot] - prediction
        return difference.add_(self.displacements[slot]) if slot in self.displacements else difference

    def rounding(self, slot: str, prediction: Tensor) -> Tensor:
        """About what rounding brings into each entry of :meth:`minus`: none where it has all bits of the origin."""
        prediction = prediction.detach()
        return (self.origins[slot] * (prediction != self.origins[slot])).mul_(torch.finfo(prediction.dtype).eps)


class ValueInference(Inference):
    """The moving values of one call, and F's gradient in them. Arguments and words are those of ``Inference``.

    Attributes:
        values: Value of every slot that can move, in its shape, for example ``[batch, features]``. What you read is a
            copy: :meth:`move` it, or put another value there.
        moved: Slots that have left their feed-forward value.

    Example:
        The examples of the methods go on from this one.

        >>> import torch
        >>> from torch2ebm.extend import ValueInference, call_and_loss
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
        >>> inference = ValueInference(call, loss)
        >>> node = inference.graph.nodes["0"]
        >>> [slot] = list(inference.values)
        >>> inference.values[slot].shape
        torch.Size([5, 8])
    """

    values: DisplacedValues

    def __init__(
        self,
        call: Call,
        loss: OutputLoss,
        energies: Mapping[str, Energy] = UNIT_GAUSSIAN,
        retain_call: bool = True,
    ) -> None:
        super().__init__(call, loss, energies, retain_call)
        self.values = DisplacedValues(self.values)
        self.moved: set[str] = set()
        self._roundings: dict[str, Tensor] = {}  # of the node that a measuring sweep is at
        # fed by clamped inputs only: these predictions cannot change
        first = [slot for node in self.graph.hidden_nodes if not node.reads for slot in node.slots]
        self._fixed = {slot: self.values.read(slot) for slot in first}

    def moving(self) -> dict[str, Any]:
        """Values, which of them have moved, and predictions that cannot change; ``compile=True`` asks.

        Returns:
            By what they are, then by slot.

        Example:
            >>> list(inference.moving())
            ['origins', 'displacements', 'moved', 'fixed']
        """
        tensors = {"origins": dict(self.values.origins), "displacements": dict(self.values.displacements)}
        return {**tensors, "moved": frozenset(self.moved), "fixed": dict(self._fixed)}

    def restore(self, moving: Mapping[str, Any]) -> None:
        """Be as when :meth:`moving` gave this.

        Args:
            moving: What it gave.

        Example:
            >>> inference.restore(inference.moving())
        """
        self.values = DisplacedValues(moving["origins"], moving["displacements"])
        self.moved, self._fixed = set(moving["moved"]), dict(moving["fixed"])

    def move(self, slot: str, direction: Tensor, rate: float) -> None:
        """``value += rate * direction``; the feed-forward value itself is never written.

        Args:
            slot: Which value.
            direction: In its shape, for example the gradient that :meth:`sweep` yields.
            rate: A number, minus the step size for descent.

        Example:
            >>> before = inference.values[slot]
            >>> inference.move(slot, torch.ones(5, 8), rate=-0.5)
            >>> torch.allclose(inference.values[slot], before - 0.5), slot in inference.moved
            (True, True)
        """
        self.values.move(slot, direction, rate)
        self.moved.add(slot)

    def sweep(self) -> Iterator[tuple[str, Tensor]]:
        """dF/dv of each slot that it is not exactly zero for, children first (Rosenbaum 2022).

        A slot may be moved as soon as it is yielded: the sweep has read its value, so that this is the synchronous
        update. Read a value before you move it.

        Yields:
            The slot, and dF/dv of F summed over samples, in the shape of the value.

        Example:
            >>> for name, gradient in inference.sweep():
            ...     inference.move(name, gradient, rate=-0.1)
            >>> name == slot, gradient.shape
            (True, torch.Size([5, 8]))
        """
        self.begin_sweep()
        messages = self._messages_of_outputs()
        for node in reversed(self.graph.hidden_nodes):
            own = self._own_gradients(node, messages)
            yield from self.completed(node, own, messages)

    def completed(
        self, node: Node, own: Sequence[Tensor | None], messages: dict[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """dF/dv = dphi/dv - sum_c J_c^T e_c of each slot of a node, for a solver with an order of its own.

        Args:
            node: A node with a value.
            own: dphi/dv of each slot; None is zero.
            messages: By slot, what all children have sent. Those of the node are taken out.

        Yields:
            As :meth:`sweep`; a slot with neither is left out.

        Example:
            >>> [(_, gradient)] = inference.completed(node, [torch.ones(5, 8)], {slot: torch.ones(5, 8)})
            >>> gradient.abs().max()
            tensor(0.)
        """
        for slot, pull in zip(node.slots, own, strict=True):
            message, gradient = messages.pop(slot, None), pull
            if pull is not None and message is not None:
                gradient = pull - message  # not in place: a sum passes e on as it is
            elif message is not None:
                gradient = message.neg()
            if gradient is not None:
                self._measure(slot, gradient, pull)
                yield slot, gradient

    # one node

    def is_active(self, node: Node) -> bool:
        """Whether its error may be other than zero: it has moved, or one of its parents has.

        Args:
            node: A node with a value.

        Returns:
            False before the error of a child has reached it.

        Example:
            >>> inference.is_active(node)
            False
        """
        return not self.moved.isdisjoint(node.slots) or not self.moved.isdisjoint(node.reads)

    def _own_gradients(self, node: Node, messages: dict[str, Tensor]) -> Sequence[Tensor | None]:
        """dphi/dv of a node, after sending its error to its parents. None is exactly zero."""
        if not self.is_active(node):
            return [None] * len(node.slots)
        if not node.reads:
            predictions: Sequence[Tensor] = [self._fixed[slot] for slot in node.slots]
            return self.pulls_into_history(node, self.subtract(node, predictions), predictions)[0]
        evaluated = self.evaluate(node, requires_grad=True)
        self._note_rounding(node, evaluated.predictions)
        own, cotangents = self.pulls_into_history(
            node, self.subtract(node, evaluated.predictions), evaluated.predictions
        )
        self.send(evaluated, cotangents, messages)
        return own

    def _note_rounding(self, node: Node, predictions: Sequence[Tensor]) -> None:
        if self.measuring and self.still_below:
            self._roundings = {s: self.values.rounding(s, p) for s, p in zip(node.slots, predictions, strict=True)}

    def _all_rounding(self, slot: str, prediction: Tensor) -> Tensor:
        """That of all steps. Those of a compiled program round in their own way, at every entry."""
        if self.recorded:
            return self.values.origins[slot] * torch.finfo(prediction.dtype).eps
        return self.values.rounding(slot, prediction)

    def _rounding(self, slot: str) -> Tensor | None:
        found = self._roundings.pop(slot, None)
        precision = precision_of(self.energies.get(self.graph.owner[slot].name))
        return None if found is None else found * ((self.still_below or 0.0) * precision)

    def _value(self, slot: str) -> Tensor:
        return self.values.read(slot)

    def _at(self, node: Node) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None], NodePass | None]:
        """dphi/dv and -dphi/dprediction of a node at the values as they are, and its pass; None is exactly zero."""
        if not node.reads:
            predictions: Sequence[Tensor] = [self._fixed[slot] for slot in node.slots]
            return (*self.pulls(node, self.subtract(node, predictions), predictions), None)
        evaluated = self.evaluate(node, requires_grad=True)
        if not self.is_active(node):
            return [None] * len(node.slots), [None] * len(node.slots), evaluated
        self._note_rounding(node, evaluated.predictions)
        return (*self.pulls(node, self.subtract(node, evaluated.predictions), evaluated.predictions), evaluated)

    def summed_residual(self) -> Tensor:
        """``|dF/de| / |pi e|`` of each sample at the values as they are, the largest of all nodes, after a sweep.

        With v = mu + e the gradient in an error sums those of all values below: dF/de_n = dF/dv_n + sum_c J_c^T
        dF/de_c.

        Returns:
            ``[batch]``, or ``[1]`` where samples cannot be told apart.

        Example:
            >>> gradients = dict(inference.sweep())
            >>> float(inference.summed_residual().max()) > 0  # values have not come to rest
            True
        """
        line = dict(self.history[-1])
        messages = self._messages_of_outputs()
        self.history[-1] = line  # the energy of a step is that of its start
        found: list[Tensor] = []
        for node in reversed(self.graph.hidden_nodes):
            received = [messages.pop(slot, None) for slot in node.slots]
            own, cotangents, looked_at = self._at(node)
            sent = [passed_on(*each) for each in zip(own, cotangents, received, strict=True)]
            if looked_at is not None and any(each is not None for each in sent):
                self.send(looked_at, sent, messages)
            for slot, pull, message in zip(node.slots, own, received, strict=True):
                gradient = None if message is None else difference(pull, message)
                if gradient is not None:
                    found.append(relative_length(gradient, pull, self._rounding(slot), self.call.batch_size))
        size = max((each.numel() for each in found), default=1)
        return torch.stack([each.expand(size) for each in found]).amax(0) if found else torch.zeros(size)

    def subtract(self, node: Node, predictions: Sequence[Tensor]) -> list[Tensor]:
        """The errors of a node: value minus prediction.

        Args:
            node: A node with a value.
            predictions: One for each slot.

        Returns:
            One for each slot, in its shape.

        Example:
            >>> (error,) = inference.subtract(node, [inference.values[slot] - 1])
            >>> torch.allclose(error, torch.ones(5, 8))
            True
        """
        pairs = zip(node.slots, predictions, strict=True)
        return [self.values.minus(slot, prediction.detach()) for slot, prediction in pairs]

    def _messages_of_outputs(self) -> dict[str, Tensor]:
        passes = [self.evaluate(node, requires_grad=True) for node in self.graph.output_nodes]
        errors = self.output_errors(passes)
        messages: dict[str, Tensor] = {}
        for evaluated in passes:
            self.send(evaluated, [errors.get(slot) for slot in evaluated.node.slots], messages)
        return messages

    # the end

    def _collect_all(self, result: Collected) -> None:
        self._collect_outputs([self.evaluate(node, requires_grad=False) for node in self.graph.output_nodes], result)
        for node in reversed(self.graph.hidden_nodes):
            if self.is_active(node):
                self._collect_hidden(node, result)
            else:
                self._collect_unreached(node, result)

    def _collect_hidden(self, node: Node, result: Collected) -> None:
        evaluated = self.evaluate(node, requires_grad=False)
        # a compiled program may compute the same prediction with other last digits
        predictions = evaluated.predictions if node.reads else [self._fixed.pop(slot) for slot in node.slots]
        errors = self.subtract(node, predictions)
        _, cotangents = self.pulls_into_history(node, errors, predictions)
        result.add_energy(node.name, self.energies.get(node.name), errors, predictions, self.scale)
        for slot, prediction in zip(node.slots, predictions, strict=True):
            result.rounding[slot] = self._all_rounding(slot, prediction).norm()
            del self.values[slot]  # all its readers are done
        self._collect(evaluated, errors, cotangents, result)
