"""The proximal objective around a point, by sweeps: values along the arrows, gradients against them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

from torch2ebm.engine.call import Call, at_least_single
from torch2ebm.graph.energy_graph import Node
from torch2ebm.implicit.local_terms import LocalTerm, added, deliver, twice_differentiable
from torch2ebm.implicit.newton import BySlot, Point
from torch2ebm.inference.base import LOSS
from torch2ebm.loss.output_loss import OutputLoss

Term = TypeVar("Term", bound=LocalTerm)


class Expansion(Point, Generic[Term]):
    """The objective around one point. Autograd graphs end at the borders of nodes; what crosses them are sweeps.

    Attributes:
        terms: Every node's share, in the order of the graph.
    """

    def __init__(self, call: Call, loss: OutputLoss, values: BySlot) -> None:
        self.call, self.values = call, values
        self.terms: list[Term] = []
        of_slot: dict[str, Tensor] = {}
        for node in call.graph.nodes.values():
            term = self._term(node, self._leaves(node, of_slot))
            self.terms.append(term)
            of_slot.update({s: value.detach() for s, value in zip(node.slots, term.values, strict=True)})
        self._of_slot = of_slot
        outputs = {slot: of_slot[slot].to(call.values[slot].dtype) for slot in call.graph.output_slots}
        self.expansion = loss.expanded(outputs)
        energies = [self.expansion.value, *[t.energy.detach() for t in self.dense()]]
        names = [LOSS, *[term.node.name for term in self.dense()]]
        self.parts = dict(zip(names, torch.stack([e.double() for e in energies]).tolist(), strict=True))

    @abstractmethod
    def _term(self, node: Node, inputs: list[Tensor]) -> Term:
        """The node's share at these inputs."""

    def _leaves(self, node: Node, of_slot: Mapping[str, Tensor]) -> list[Tensor]:
        return [of_slot[slot].to(self.call.values[slot].dtype).detach().requires_grad_() for slot in node.reads]

    def dense(self) -> Iterator[Term]:
        return (term for term in self.terms if term.own is not None)

    def precondition(self, gradient: BySlot) -> BySlot:
        """By the layers' own energies alone."""
        return {term.node.name: term.conditioned(gradient[term.node.name]) for term in self.dense()}

    @cached_property
    def gradient(self) -> BySlot:
        """One sweep against the arrows. Leaves every node's share twice differentiable."""
        messages = {slot: at_least_single(gradient) for slot, gradient in self.expansion.gradients.items()}
        found: dict[str, Tensor] = {}
        for term in reversed(self.terms):
            own, sent = term.differentiated([messages.get(slot) for slot in term.node.slots])
            if own is not None:
                found[term.node.name] = own
            deliver(messages, term.node, sent)
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
        with twice_differentiable("the loss"):
            messages = {s: at_least_single(m) for s, m in self.expansion.hessian_product(tangents).items()}
        found: dict[str, Tensor] = {}
        for term in reversed(self.terms):
            back = term.pulled([messages.get(slot) for slot in term.node.slots])
            own, *sent = [added(a, b) for a, b in zip(curved[term.node.name], back, strict=True)]
            if term.own is not None:
                found[term.node.name] = torch.zeros_like(term.own) if own is None else own
            deliver(messages, term.node, sent)
        return found
