"""The objective of implicit SGD for one call, as inference on the values sees it (paper D; algorithms.md, D3).

A dense layer whose value ``h`` is off its prediction by ``e`` reaches it by the smallest change of its parameters,
``dW = e^T K^-1 A``, with ``A`` the rows that it reads and ``K = A A^T (+ 1)`` their Gram matrix, ``[batch, batch]``.
Half the squared size of that change over alpha is the node's energy, ``tr(e^T K^-1 e) / (2 alpha)``.

The coordinates here are ``s = K^-1 e / alpha``, one row a sample: ``e = alpha K s``, ``dW = alpha s^T A``, the energy
is ``alpha/2 tr(s^T K s)``. Nothing is inverted, so the batch may be larger than the fan-in; at the minimum ``s`` is
minus the gradient of the loss in ``h``, whatever the alpha, so no digits are lost where alpha is small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from torch2ebm.affine import DenseLayer
from torch2ebm.errors import UnsupportedError
from torch2ebm.graph import Node
from torch2ebm.inference import LOSS
from torch2ebm.solvers.newton import Point, Vector
from torch2ebm.state import Call, OutputLoss, at_least_single


class ProximalObjective:
    """G = loss + sum over dense layers of the energy of their errors, as a function of ``s``.

    Values of nodes without trainable parameters are their predictions; every other value is free.
    """

    def __init__(self, call: Call, loss: OutputLoss, layers: Mapping[str, DenseLayer], alpha: float) -> None:
        self.call, self.loss, self.layers, self.alpha = call, loss, layers, alpha

    def start(self) -> Vector:
        """The feed-forward pass: no error anywhere. Shapes ``[batch, fan_out]``, by node."""
        return {name: self._zeros(layer) for name, layer in self.layers.items()}

    def _zeros(self, layer: DenseLayer) -> Tensor:
        value = at_least_single(self.call.values[layer.node.slots[0]])
        return torch.zeros_like(value).reshape(self.call.batch_size, layer.fan_out)

    def at(self, values: Vector) -> ProximalPoint:
        return ProximalPoint(self, values)


class ProximalPoint(Point):
    """G around one ``s``. Autograd graphs end at the borders of nodes; what crosses them are sweeps."""

    def __init__(self, objective: ProximalObjective, values: Vector) -> None:
        self.call, self.values = objective.call, values
        self.terms: list[LocalTerm] = []
        of_slot: dict[str, Tensor] = {}
        for node in self.call.graph.nodes.values():
            inputs = [of_slot[slot].to(self.call.values[slot].dtype).requires_grad_() for slot in node.reads]
            term = LocalTerm(objective, node, inputs, values.get(node.name))
            self.terms.append(term)
            of_slot.update({s: value.detach() for s, value in zip(node.slots, term.values, strict=True)})
        self.expansion = objective.loss.expanded(
            {slot: of_slot[slot].to(self.call.values[slot].dtype) for slot in self.call.graph.output_slots}
        )
        energies = [self.expansion.value, *[t.energy.detach() for t in self._dense()]]
        names = [LOSS, *[term.node.name for term in self._dense()]]
        self.parts = dict(zip(names, torch.stack([e.double() for e in energies]).tolist(), strict=True))

    def _dense(self) -> Iterator[LocalTerm]:
        return (term for term in self.terms if term.own is not None)

    @cached_property
    def gradient(self) -> Vector:
        """One sweep against the arrows. Leaves every node's share twice differentiable."""
        messages = {slot: at_least_single(gradient) for slot, gradient in self.expansion.gradients.items()}
        found: dict[str, Tensor] = {}
        for term in reversed(self.terms):
            own, sent = term.differentiated([messages.get(slot) for slot in term.node.slots])
            if own is not None:
                found[term.node.name] = own
            _deliver(messages, term.node, sent)
        return found

    def hessian_product(self, direction: Vector) -> Vector:
        """How the gradient changes: one sweep along the arrows for the values, one against them for the messages."""
        assert self.gradient is not None  # the shares are differentiated
        tangents: dict[str, Tensor] = {}
        curved: dict[str, Sequence[Tensor | None]] = {}
        for term in self.terms:
            along = [tangents.get(slot) for slot in term.node.reads]
            moved, curved[term.node.name] = term.pushed(direction.get(term.node.name), along)
            tangents.update({s: t for s, t in zip(term.node.slots, moved, strict=True) if t is not None})
        with _twice_differentiable("the loss"):
            messages = {s: at_least_single(m) for s, m in self.expansion.hessian_product(tangents).items()}
        found: dict[str, Tensor] = {}
        for term in reversed(self.terms):
            back = term.pulled([messages.get(slot) for slot in term.node.slots])
            own, *sent = [_sum(a, b) for a, b in zip(curved[term.node.name], back, strict=True)]
            if term.own is not None:
                found[term.node.name] = torch.zeros_like(term.own) if own is None else own
            _deliver(messages, term.node, sent)
        return found

    def precondition(self, gradient: Vector) -> Vector:
        """By the layers' own energies alone, whose Hessian is ``alpha K``."""
        return {name: self._inverses[name] @ of_node for name, of_node in gradient.items()}

    @cached_property
    def _inverses(self) -> dict[str, Tensor]:
        return {term.node.name: term.inverse() for term in self._dense()}

    @cached_property
    def residual(self) -> float:
        """Largest entry of the proximal objective's gradient in the parameters, at the parameters of the step.

        That is ``grad L(theta+) + (theta+ - theta) / alpha``, by a sweep through the layers as they will be.
        """
        messages = {slot: at_least_single(gradient) for slot, gradient in self.expansion.gradients.items()}
        largest = [torch.zeros((), device=self.call.device)]
        for term in reversed(self.terms):
            cotangents = [messages.get(slot) for slot in term.node.slots]
            if term.own is not None:
                largest += [part.abs().max() for part in term.parameter_gradients(cotangents[0])]
            _deliver(messages, term.node, term.pulled_after_the_step(cotangents))
        return float(torch.stack([entry.double() for entry in largest]).max())


class LocalTerm:
    """One node's share of G: ``<u, value> + energy``, ``u`` what its readers send.

    A node without trainable parameters has no energy, and its prediction for a value.
    """

    def __init__(self, objective: ProximalObjective, node: Node, inputs: list[Tensor], own: Tensor | None) -> None:
        self.node, self.inputs, self.alpha = node, inputs, objective.alpha
        self.own = None if own is None else own.detach().requires_grad_()
        if self.own is None:
            with torch.enable_grad():
                evaluated = objective.call.evaluate(node, inputs, freeze_statistics=False)
                self.predictions = self.values = tuple(map(_widened, evaluated.predictions))
        else:
            self._displace(objective.call, objective.layers[node.name], self.own)

    def _displace(self, call: Call, layer: DenseLayer, own: Tensor) -> None:
        """Values from predictions: ``h = p + alpha K s``."""
        found = layer.evaluate(call, self.inputs, freeze_statistics=False)
        with torch.enable_grad():
            self.predictions = tuple(map(_widened, found.evaluated.predictions))
            self.rows, self.has_bias = found.rows.to(own.dtype), layer.has_bias
            self.gram = self.rows @ self.rows.t() + float(layer.has_bias)  # [batch, batch]
            pulled = self.gram @ own  # [batch, fan_out]
            self.energy = 0.5 * self.alpha * (own * pulled).sum()
            self.error = self.alpha * pulled
            self.values = (self.predictions[0] + self.error.reshape(self.predictions[0].shape),)

    def _wrt(self) -> list[Tensor]:
        return self.inputs if self.own is None else [self.own, *self.inputs]

    def differentiated(self, cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """The gradient in ``s``, and in each value read."""
        pairs = zip(cotangents, self.values, strict=True)
        self.received = [torch.zeros_like(v) if c is None else c.detach() for c, v in pairs]
        self.received = [received.reshape(v.shape) for received, v in zip(self.received, self.values, strict=True)]
        self.received = [received.requires_grad_() for received in self.received]
        with torch.enable_grad():
            share = sum((u * value).sum() for u, value in zip(self.received, self.values, strict=True))
            share = share if self.own is None else share + self.energy
        self.gradients: Sequence[Tensor | None] = [None] * len(self._wrt())
        if self._wrt() and isinstance(share, Tensor):
            self.gradients = torch.autograd.grad(share, self._wrt(), create_graph=True, allow_unused=True)
        found = [None if g is None else g.detach() for g in self.gradients]
        return (None, found) if self.own is None else (found[0], found[1:])

    def pushed(
        self, direction: Tensor | None, along: Sequence[Tensor | None]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """How the values move, and the share's own second derivative (in ``s``, then in each value read)."""
        directions = [*along] if self.own is None else [direction, *along]
        pairs = [
            (gradient, towards.to(gradient.dtype))
            for gradient, towards in zip(self.gradients, directions, strict=True)
            if gradient is not None and gradient.requires_grad and towards is not None
        ]
        wrt = [*self.received, *self._wrt()]
        found: Sequence[Tensor | None] = [None] * len(wrt)
        if pairs:
            gradients, towards = zip(*pairs, strict=True)
            with _twice_differentiable(f"node '{self.node.name}' ({self.node.description})"):
                found = torch.autograd.grad(gradients, wrt, towards, retain_graph=True, allow_unused=True)
        count = len(self.received)
        return found[:count], self._aligned(found[count:])

    def pulled(self, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Cotangents of the values to ``s`` (None where there is none) and to the values read."""
        return self._aligned(_pulled(self.values, cotangents, self._wrt()))

    def _aligned(self, found: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        return [None, *found] if self.own is None else found

    # after the step

    def pulled_after_the_step(self, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The same to the values read, through the layer with its new, fixed parameters."""
        if self.own is None or not self.inputs:
            return _pulled(self.predictions, cotangents, self.inputs)
        change, _ = self.step()
        with torch.enable_grad():
            moved = self.predictions[0] + (self.rows @ change.t()).reshape(self.predictions[0].shape)
        return _pulled([moved], cotangents, self.inputs)

    def parameter_gradients(self, cotangent: Tensor | None) -> tuple[Tensor, Tensor]:
        """``grad L + (theta+ - theta) / alpha`` of weight and bias, shapes ``[fan_out, fan_in]`` and ``[fan_out]``."""
        assert self.own is not None
        total = self.own.detach() if cotangent is None else self.own.detach() + cotangent.reshape(self.own.shape)
        return total.t() @ self.rows.detach(), total.sum(0) * float(self.has_bias)

    def step(self) -> tuple[Tensor, Tensor]:
        """The change of weight and bias: ``alpha s^T A`` and ``alpha`` times the sum of ``s`` over samples."""
        assert self.own is not None
        own = self.own.detach()
        return self.alpha * own.t() @ self.rows.detach(), self.alpha * own.sum(0)

    def inverse(self) -> Tensor:
        gram = self.gram.detach()
        if len(gram) == 1:
            return (self.alpha * gram).reciprocal().where(gram > 0, torch.zeros_like(gram))
        inverse: Tensor = torch.linalg.pinv(gram, hermitian=True)
        return inverse / self.alpha


def _widened(prediction: Tensor) -> Tensor:
    """In the precision that values are kept in, on the same autograd graph."""
    return prediction.float() if prediction.dtype in (torch.float16, torch.bfloat16) else prediction


def _pulled(
    values: Sequence[Tensor], cotangents: Sequence[Tensor | None], wrt: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    pairs = [(v, c) for v, c in zip(values, cotangents, strict=True) if c is not None and v.requires_grad]
    if not pairs or not wrt:
        return [None] * len(wrt)
    outputs, directions = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, wrt, directions, retain_graph=True, allow_unused=True)


def _deliver(messages: dict[str, Tensor], node: Node, sent: Sequence[Tensor | None]) -> None:
    for slot, message in zip(node.reads, sent, strict=True):
        if message is not None:
            message = at_least_single(message)
            messages[slot] = messages[slot] + message if slot in messages else message


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


@contextmanager
def _twice_differentiable(where: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not any(hint in str(error) for hint in ("not implemented", "once_differentiable", "marked with @once")):
            raise
        raise UnsupportedError(
            where,
            f"an operation without a second derivative: {str(error).strip().splitlines()[0]}",
            "one that can be differentiated twice, which Newton's method needs",
            "Write it with differentiable operations, or use PredictiveCoding.",
        ) from error
