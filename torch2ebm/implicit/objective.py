"""The objective of implicit SGD for one call, as inference on the values sees it (Alonso et al. 2022).

A dense layer whose value ``h`` is off its prediction by ``e`` reaches it by the smallest change of its parameters,
``dW = e^T K^-1 A``, with ``A`` the rows that it reads and ``K = A A^T (+ 1)`` their Gram matrix, ``[batch, batch]``.
Half the squared size of that change over alpha is the node's energy, ``tr(e^T K^-1 e) / (2 alpha)``.

The coordinates here are ``s = K^-1 e / alpha``, one row a sample: ``e = alpha K s``, ``dW = alpha s^T A``, the energy
is ``alpha/2 tr(s^T K s)``. Nothing is inverted, so the batch may be larger than the fan-in; at the minimum ``s`` is
minus the gradient of the loss in ``h``, whatever the alpha, so no digits are lost where alpha is small.

Rectifiers have a kink where ``h`` is 0, and minima lie on it as a rule: below 0 a value has no gradient that would keep
it there. So every such ``h`` has a *side*, +1 or -1, and a value that would cross 0 is held there (side 0): its ``s``
follows from ``h = 0``, and it is at rest as long as the one-sided derivatives both lead up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from torch2ebm.engine.call import Call, at_least_single
from torch2ebm.errors import UnsupportedError
from torch2ebm.graph.energy_graph import Node
from torch2ebm.implicit.dense_layers import DenseLayer
from torch2ebm.implicit.newton import BySlot, Point, moved
from torch2ebm.inference.base import LOSS
from torch2ebm.loss.output_loss import OutputLoss


class ProximalObjective:
    """G = loss + sum over dense layers of the energy of their errors, as a function of ``s``.

    Values of nodes without trainable parameters are their predictions; every other value is free.
    """

    def __init__(self, call: Call, loss: OutputLoss, layers: Mapping[str, DenseLayer], alpha: float) -> None:
        self.call, self.loss, self.layers, self.alpha = call, loss, layers, alpha

    def start(self) -> ProximalPoint:
        """The feed-forward pass: no error anywhere. Shapes ``[batch, fan_out]``, by node."""
        values = {name: self._zeros(layer) for name, layer in self.layers.items()}
        kinked = [name for name, layer in self.layers.items() if self._has_kink(layer.node.slots[0])]
        of_slot = {name: self.call.values[self.layers[name].node.slots[0]] for name in kinked}
        sides = {name: torch.where(of_slot[name] > 0, 1.0, -1.0).reshape(values[name].shape) for name in kinked}
        return ProximalPoint(self, values, sides, holds=True)

    def start_from(self, other: ProximalPoint, ratio: float) -> ProximalPoint:
        """The errors of another alpha's point: s = K^-1 e / alpha, ``ratio`` the other alpha over this one."""
        values = {name: value * ratio for name, value in other.values.items()}
        return ProximalPoint(self, values, other.sides, holds=True)

    def _has_kink(self, slot: str) -> bool:
        """Whether derivatives of the readers jump where this value passes 0."""
        readers = [node for node in self.call.graph.nodes.values() if slot in node.reads]
        return any(not torch.equal(self._derivative(r, slot, 1.0), self._derivative(r, slot, -1.0)) for r in readers)

    def _derivative(self, node: Node, slot: str, side: float) -> Tensor:
        """Of the node's predictions, in some direction, where the value at ``slot`` is 0 but for its sign."""
        value = self.call.values[slot].detach()
        tiny = torch.full_like(value, side * torch.finfo(value.dtype).tiny).requires_grad_()
        inputs = [tiny if read == slot else self.call.values[read].detach() for read in node.reads]
        with torch.enable_grad():
            predictions = self.call.evaluate(node, inputs).predictions
        numbers = [torch.arange(1.0, p.numel() + 1, device=p.device).mul(1.7).sin() for p in predictions]
        directions = [n.to(p.dtype).reshape(p.shape) for n, p in zip(numbers, predictions, strict=True)]
        (found,) = _pulled(predictions, directions, [tiny])
        return torch.zeros_like(value) if found is None else found

    def _zeros(self, layer: DenseLayer) -> Tensor:
        value = at_least_single(self.call.values[layer.node.slots[0]])
        return torch.zeros_like(value).reshape(self.call.batch_size, layer.fan_out)


class ProximalPoint(Point):
    """G around one ``s``. Autograd graphs end at the borders of nodes; what crosses them are sweeps.

    Attributes:
        sides: For each dense layer whose readers have a kink at 0, and each entry of its value: +1, -1, or 0 for held.
    """

    def __init__(self, objective: ProximalObjective, values: BySlot, sides: Mapping[str, Tensor], holds: bool) -> None:
        self.objective, self.call, self.values = objective, objective.call, values
        self.terms: list[LocalTerm] = []
        of_slot: dict[str, Tensor] = {}
        for node in self.call.graph.nodes.values():
            inputs = self._leaves(node, of_slot)
            term = LocalTerm(objective, node, inputs, values.get(node.name), sides.get(node.name), holds)
            self.terms.append(term)
            of_slot.update({s: value.detach() for s, value in zip(node.slots, term.values, strict=True)})
        self.sides = {term.node.name: term.sides for term in self._dense() if term.sides is not None}
        self._of_slot = of_slot
        self.expansion = objective.loss.expanded(
            {slot: of_slot[slot].to(self.call.values[slot].dtype) for slot in self.call.graph.output_slots}
        )
        energies = [self.expansion.value, *[t.energy.detach() for t in self._dense()]]
        names = [LOSS, *[term.node.name for term in self._dense()]]
        self.parts = dict(zip(names, torch.stack([e.double() for e in energies]).tolist(), strict=True))

    def _leaves(self, node: Node, of_slot: Mapping[str, Tensor]) -> list[Tensor]:
        return [of_slot[slot].to(self.call.values[slot].dtype).detach().requires_grad_() for slot in node.reads]

    def moved(self, direction: BySlot, length: float) -> ProximalPoint:
        return ProximalPoint(self.objective, moved(self.values, direction, length), self.sides, holds=True)

    def freed(self) -> ProximalPoint:
        """Held entries leave to the side where G falls, if that is not slight beside what else drives the values."""
        largest = max((float(z.abs().max()) for z in self._driving.values()), default=0.0)
        sides = dict(self.sides)
        for name, side in self.sides.items():
            z = self._driving[name]
            leaving = (side == 0) & (z.abs() > 0.1 * largest)
            sides[name] = torch.where(leaving, -z.sign().to(side.dtype), side)
        if all(torch.equal(sides[name], side) for name, side in self.sides.items()):
            return self
        values = {term.node.name: term.full.detach() for term in self._dense()}
        return ProximalPoint(self.objective, values, sides, holds=False)

    def _dense(self) -> Iterator[LocalTerm]:
        return (term for term in self.terms if term.own is not None)

    @cached_property
    def gradient(self) -> BySlot:
        """One sweep against the arrows. Leaves every node's share twice differentiable."""
        messages = {slot: at_least_single(gradient) for slot, gradient in self.expansion.gradients.items()}
        found: dict[str, Tensor] = {}
        for term in reversed(self.terms):
            own, sent = term.differentiated([messages.get(slot) for slot in term.node.slots])
            if own is not None:
                found[term.node.name] = own
            _deliver(messages, term.node, sent)
        return found

    def hessian_product(self, direction: BySlot) -> BySlot:
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

    def precondition(self, gradient: BySlot) -> BySlot:
        """By the layers' own energies alone, whose Hessian is ``alpha K``."""
        return {term.node.name: term.conditioned(gradient[term.node.name]) for term in self._dense()}

    @cached_property
    def residual(self) -> float:
        """Largest entry of the proximal objective's gradient in the parameters, at the parameters of the step.

        That is ``grad L(theta+) + (theta+ - theta) / alpha``; of the gradients on both sides of a kink the nearest to
        zero between them.
        """
        largest = [torch.zeros((), device=self.call.device)]
        for term in self._dense():
            largest += [part.abs().max() for part in term.parameter_gradients(self._driving[term.node.name])]
        return float(torch.stack([entry.double() for entry in largest]).max())

    @cached_property
    def _driving(self) -> dict[str, Tensor]:
        """``s + dL/dh`` by node, the loss's gradient taken through the layers as they will be."""
        left = {slot: at_least_single(gradient) for slot, gradient in self.expansion.gradients.items()}
        right: dict[str, Tensor] = {}  # where some entry is held: the gradient with these on the upper side
        found: dict[str, Tensor] = {}
        for term in reversed(self.terms):
            cotangents: list[Tensor | None] = [left.get(slot) for slot in term.node.slots]
            if term.own is not None:
                slot = term.node.slots[0]
                found[term.node.name], cotangents[0] = term.driving(left.get(slot), right.get(slot))
            _deliver(left, term.node, term.pulled_after_the_step(cotangents))
            if any(self._is_held(slot) for slot in term.node.reads):
                _deliver(right, term.node, self._above(term).pulled_after_the_step(cotangents))
        return found

    def _is_held(self, slot: str) -> bool:
        sides = self.sides.get(self.call.graph.owner[slot].name)
        return sides is not None and bool((sides == 0).any())

    def _above(self, term: LocalTerm) -> LocalTerm:
        """The same node where all held values that it reads are just above 0."""
        of_slot = {slot: self._of_slot[slot] for slot in term.node.reads}
        for slot in term.node.reads:
            if self._is_held(slot):
                value = of_slot[slot]
                held = (self.sides[self.call.graph.owner[slot].name] == 0).reshape(value.shape)
                of_slot[slot] = value.masked_fill(held, torch.finfo(self.call.values[slot].dtype).tiny)
        inputs = self._leaves(term.node, of_slot)
        return LocalTerm(self.objective, term.node, inputs, self.values.get(term.node.name), term.sides, holds=False)


class LocalTerm:
    """One node's share of G: ``<u, value> + energy``, ``u`` what its readers send.

    A node without trainable parameters has no energy, and its prediction for a value.
    """

    def __init__(
        self,
        objective: ProximalObjective,
        node: Node,
        inputs: list[Tensor],
        own: Tensor | None,
        sides: Tensor | None,
        holds: bool,
    ) -> None:
        self.node, self.inputs, self.alpha, self.sides = node, inputs, objective.alpha, sides
        self.own = None if own is None else own.detach().requires_grad_()
        if self.own is None:
            with torch.enable_grad():
                evaluated = objective.call.evaluate(node, inputs)
                self.predictions = self.values = tuple(map(_widened, evaluated.predictions))
            return
        found = objective.layers[node.name].evaluate(objective.call, inputs)
        self.has_bias = objective.layers[node.name].has_bias
        with torch.enable_grad():
            self.predictions = tuple(map(_widened, found.evaluated.predictions))
            self.rows = found.rows.to(self.own.dtype)
            self.gram = self.rows @ self.rows.t() + float(self.has_bias)  # [batch, batch]
            self._displace(self.own, self.predictions[0].reshape(self.own.shape), holds)

    def _displace(self, own: Tensor, prediction: Tensor, holds: bool) -> None:
        """Values from predictions: ``h = p + alpha K s``; with ``holds``, those that crossed 0 are held there."""
        value = self._valued(own, prediction)
        if self.sides is not None and holds:
            crossed = (value.detach() * self.sides < 0) & (self.gram.detach().diagonal() > 0).unsqueeze(1)
            if crossed.any():
                self.sides = self.sides.masked_fill(crossed, 0.0)
                value = self._valued(own, prediction)
        elif self.sides is not None:  # just freed: on its side, by as little as there is
            fresh = (value.detach() * self.sides <= 0) & (self.sides != 0)
            value = torch.where(fresh, value - value.detach() + self.sides * torch.finfo(value.dtype).tiny, value)
        self.values = (value.reshape(self.predictions[0].shape),)

    def _valued(self, own: Tensor, prediction: Tensor) -> Tensor:
        held = None if self.sides is None else self.sides == 0
        self.held = held if held is not None and held.any() else None
        self.full = own if self.held is None else self._completed(own, prediction, self.held)
        pulled = self.gram @ self.full  # [batch, fan_out]
        self.error = self.alpha * pulled
        self.energy = 0.5 * self.alpha * (self.full * pulled).sum()
        value = prediction + self.error
        return value if self.held is None else value.masked_fill(self.held, 0.0)

    def _completed(self, own: Tensor, prediction: Tensor, held: Tensor) -> Tensor:
        """``s`` with the entries that hold ``h`` at 0, where ``alpha K s = -p``; the free ones as given."""
        wanted = torch.where(held, -prediction / self.alpha, own)
        if len(own) == 1:
            return torch.where(held, wanted / self.gram, own)
        unit = torch.eye(len(own), dtype=own.dtype, device=own.device)
        systems = torch.where(held.t().unsqueeze(2), self.gram, unit)  # [fan_out, batch, batch]
        solved: Tensor = torch.linalg.solve_ex(systems, wanted.t())[0]
        return solved.t()

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

    def driving(self, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor]:
        """``s + dL/dh``, and the ``dL/dh`` in it; for a held entry the one that comes nearest to zero."""
        own = self.full.detach()
        below = own if left is None else own + left.reshape(own.shape)
        if self.held is None:
            return below, (below - own).reshape(self.predictions[0].shape)
        above = own if right is None else own + right.reshape(own.shape)
        # at rest: below 0 G falls towards it (below <= 0), above 0 too (above >= 0)
        at_kink = torch.where(below > 0, below, above.clamp_max(0.0))
        total = torch.where(self.held, at_kink, below)
        return total, (total - own).reshape(self.predictions[0].shape)

    def parameter_gradients(self, driving: Tensor) -> tuple[Tensor, Tensor]:
        """``grad L + (theta+ - theta) / alpha`` of weight and bias, shapes ``[fan_out, fan_in]`` and ``[fan_out]``."""
        return driving.t() @ self.rows.detach(), driving.sum(0) * float(self.has_bias)

    def step(self) -> tuple[Tensor, Tensor]:
        """The change of weight and bias: ``alpha s^T A`` and ``alpha`` times the sum of ``s`` over samples."""
        full = self.full.detach()
        return self.alpha * full.t() @ self.rows.detach(), self.alpha * full.sum(0)

    def conditioned(self, gradient: Tensor) -> Tensor:
        found = self._inverse @ gradient
        return found if self.held is None else found.masked_fill(self.held, 0.0)

    @cached_property
    def _inverse(self) -> Tensor:
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
