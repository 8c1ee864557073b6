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

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from torch2ebm.engine.call import Call, at_least_single
from torch2ebm.graph.energy_graph import Node
from torch2ebm.implicit.dense_layers import DenseLayer
from torch2ebm.implicit.expansion import Expansion
from torch2ebm.implicit.local_terms import LocalTerm, deliver, pulled
from torch2ebm.implicit.newton import BySlot, moved
from torch2ebm.isolation.torch_modes import in_own_precision
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
        (found,) = pulled(predictions, directions, [tiny])
        return torch.zeros_like(value) if found is None else found

    def _zeros(self, layer: DenseLayer) -> Tensor:
        value = at_least_single(self.call.values[layer.node.slots[0]])
        return torch.zeros_like(value).reshape(self.call.batch_size, layer.fan_out)


class ProximalPoint(Expansion["SampleTerm"]):
    """G around one ``s``.

    Attributes:
        sides: For each dense layer whose readers have a kink at 0, and each entry of its value: +1, -1, or 0 for held.
    """

    def __init__(self, objective: ProximalObjective, values: BySlot, sides: Mapping[str, Tensor], holds: bool) -> None:
        self.objective, self._given, self._holds = objective, sides, holds
        super().__init__(objective.call, objective.loss, values)
        self.sides = {term.node.name: term.sides for term in self.dense() if term.sides is not None}

    def _term(self, node: Node, inputs: list[Tensor]) -> SampleTerm:
        own = self.values.get(node.name)
        return SampleTerm(self.objective, node, inputs, own, self._given.get(node.name), self._holds)

    @property
    def is_smooth(self) -> bool:
        """Whether no value has a kink at 0."""
        return not self.sides

    def under(self, objective: ProximalObjective) -> ProximalPoint:
        """The same errors, under the objective of another alpha: ``s = K^-1 e / alpha``."""
        ratio = self.objective.alpha / objective.alpha
        return ProximalPoint(
            objective, {name: value * ratio for name, value in self.values.items()}, self.sides, holds=True
        )

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
        values = {term.node.name: term.full.detach() for term in self.dense()}
        return ProximalPoint(self.objective, values, sides, holds=False)

    @cached_property
    def residual(self) -> float:
        """Largest entry of the proximal objective's gradient in the parameters, at the parameters of the step.

        That is ``grad L(theta+) + (theta+ - theta) / alpha``; of the gradients on both sides of a kink the nearest to
        zero between them.
        """
        largest = [torch.zeros((), device=self.call.device)]
        for term in self.dense():
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
            deliver(left, term.node, term.pulled_after_the_step(cotangents))
            if any(self._is_held(slot) for slot in term.node.reads):
                deliver(right, term.node, self._above(term).pulled_after_the_step(cotangents))
        return found

    def _is_held(self, slot: str) -> bool:
        sides = self.sides.get(self.call.graph.owner[slot].name)
        return sides is not None and bool((sides == 0).any())

    def _above(self, term: SampleTerm) -> SampleTerm:
        """The same node where all held values that it reads are just above 0."""
        of_slot = {slot: self._of_slot[slot] for slot in term.node.reads}
        for slot in term.node.reads:
            if self._is_held(slot):
                value = of_slot[slot]
                held = (self.sides[self.call.graph.owner[slot].name] == 0).reshape(value.shape)
                of_slot[slot] = value.masked_fill(held, torch.finfo(self.call.values[slot].dtype).tiny)
        inputs = self._leaves(term.node, of_slot)
        return SampleTerm(self.objective, term.node, inputs, self.values.get(term.node.name), term.sides, holds=False)


class SampleTerm(LocalTerm):
    """A node's share where a dense layer's coordinates are ``s``, one row a sample."""

    def __init__(
        self,
        objective: ProximalObjective,
        node: Node,
        inputs: list[Tensor],
        own: Tensor | None,
        sides: Tensor | None,
        holds: bool,
    ) -> None:
        self.sides, self._holds = sides, holds
        super().__init__(objective.call, objective.layers, objective.alpha, node, inputs, own)

    def _displaced(self, own: Tensor, prediction: Tensor) -> Tensor:
        """Values from predictions: ``h = p + alpha K s``; with ``holds``, those that crossed 0 are held there."""
        self.gram = self.rows @ self.rows.t() + float(self.has_bias)  # [batch, batch]
        value = self._valued(own, prediction)
        if self.sides is not None and self._holds:
            crossed = (value.detach() * self.sides < 0) & (self.gram.detach().diagonal() > 0).unsqueeze(1)
            if crossed.any():
                self.sides = self.sides.masked_fill(crossed, 0.0)
                value = self._valued(own, prediction)
        elif self.sides is not None:  # just freed: on its side, by as little as there is
            fresh = (value.detach() * self.sides <= 0) & (self.sides != 0)
            value = torch.where(fresh, value - value.detach() + self.sides * torch.finfo(value.dtype).tiny, value)
        return value

    def _valued(self, own: Tensor, prediction: Tensor) -> Tensor:
        held = None if self.sides is None else self.sides == 0
        self.held = held if held is not None and held.any() else None
        self.full = own if self.held is None else self._completed(own, prediction, self.held)
        weighted = self.gram @ self.full  # [batch, fan_out]
        self.error = self.alpha * weighted
        self.energy = 0.5 * self.alpha * (self.full * weighted).sum()
        value = prediction + self.error
        return value if self.held is None else value.masked_fill(self.held, 0.0)

    def _completed(self, own: Tensor, prediction: Tensor, held: Tensor) -> Tensor:
        """``s`` with the entries that hold ``h`` at 0, where ``alpha K s = -p``; the free ones as given."""
        wanted = torch.where(held, -prediction / self.alpha, own)
        if len(own) == 1:
            return torch.where(held, wanted / self.gram, own)
        unit = torch.eye(len(own), dtype=own.dtype, device=own.device)
        # samples that are alike make K singular: the ridge shares the error among them
        ridge = 10 * torch.finfo(own.dtype).eps * self.gram.detach().diagonal().amax()
        systems = torch.where(held.t().unsqueeze(2), self.gram + ridge * unit, unit)  # [fan_out, batch, batch]
        solved: Tensor = torch.linalg.solve_ex(systems, wanted.t())[0]
        return solved.t()

    def pulled_after_the_step(self, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The same to the values read, through the layer with its new, fixed parameters."""
        if self.own is None or not self.inputs:
            return pulled(self.predictions, cotangents, self.inputs)
        change, _ = self.step()
        with torch.enable_grad(), in_own_precision(change):
            moved = self.predictions[0] + (self.rows @ change.t()).reshape(self.predictions[0].shape)
        return pulled([moved], cotangents, self.inputs)

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
        with in_own_precision(driving):
            return driving.t() @ self.rows.detach(), driving.sum(0) * float(self.has_bias)

    def step(self) -> tuple[Tensor, Tensor]:
        """The change of weight and bias: ``alpha s^T A`` and ``alpha`` times the sum of ``s`` over samples."""
        full = self.full.detach()
        with in_own_precision(full):
            return self.alpha * full.t() @ self.rows.detach(), self.alpha * full.sum(0)

    def conditioned(self, gradient: Tensor) -> Tensor:
        with in_own_precision(gradient):
            found = self._inverse @ gradient
        return found if self.held is None else found.masked_fill(self.held, 0.0)

    @cached_property
    def _inverse(self) -> Tensor:
        gram = self.gram.detach()
        if len(gram) == 1:
            return (self.alpha * gram).reciprocal().where(gram > 0, torch.zeros_like(gram))
        inverse: Tensor = torch.linalg.pinv(gram, hermitian=True)
        return inverse / self.alpha
