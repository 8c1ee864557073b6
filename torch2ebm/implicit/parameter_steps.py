"""The proximal objective in the changes of the layers' own parameters: other coordinates, the same objective.

In the coordinates ``s`` of :mod:`torch2ebm.implicit.objective` a layer's change ``alpha s^T A`` turns with the rows
``A`` that it reads, and so with every layer before it. Descent then follows curved valleys, the more so the more
samples there are for each of a layer's inputs. The changes themselves do not turn: Newton's method takes few steps in
them. They know no kinks, and there are as many as parameters; so they come second.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from torch2ebm.graph.energy_graph import Node
from torch2ebm.implicit.expansion import Expansion
from torch2ebm.implicit.local_terms import LocalTerm
from torch2ebm.implicit.newton import BySlot, moved
from torch2ebm.implicit.objective import ProximalObjective, ProximalPoint


class ParameterPoint(Expansion["ParameterTerm"]):
    """``L + sum |dW|^2 / (2 alpha)`` around changes ``dW`` of shape ``[fan_out, fan_in (+ 1)]``, by node."""

    def __init__(self, objective: ProximalObjective, values: BySlot) -> None:
        self.objective = objective
        super().__init__(objective.call, objective.loss, values)

    @classmethod
    def at(cls, point: ProximalPoint) -> ParameterPoint:
        """The same place, in the changes that the layers would make there."""
        return cls(point.objective, {term.node.name: _joined(term, *term.step()) for term in point.dense()})

    def under(self, objective: ProximalObjective) -> ParameterPoint:
        """The same changes, under the objective of another alpha."""
        return ParameterPoint(objective, self.values)

    def _term(self, node: Node, inputs: list[Tensor]) -> ParameterTerm:
        call, layers, alpha = self.objective.call, self.objective.layers, self.objective.alpha
        return ParameterTerm(call, layers, alpha, node, inputs, self.values.get(node.name))

    def moved(self, direction: BySlot, length: float) -> ParameterPoint:
        return ParameterPoint(self.objective, moved(self.values, direction, length))

    def freed(self) -> ParameterPoint:
        return self  # nothing is held

    @cached_property
    def residual(self) -> float:
        """Largest entry of ``grad L(theta+) + (theta+ - theta) / alpha``, which is the gradient here."""
        return max((float(part.abs().max()) for part in self.gradient.values()), default=0.0)


class ParameterTerm(LocalTerm):
    """A node's share where a dense layer's coordinates are its parameters' change, the bias in the last column."""

    def _displaced(self, own: Tensor, prediction: Tensor) -> Tensor:
        rows = torch.cat([self.rows, self.rows.new_ones(len(self.rows), 1)], 1) if self.has_bias else self.rows
        self.error = rows @ own.t()
        self.energy = own.square().sum() / (2 * self.alpha)
        return prediction + self.error

    def step(self) -> tuple[Tensor, Tensor]:
        assert self.own is not None
        change = self.own.detach()
        fan_in = self.rows.shape[1]
        return change[:, :fan_in], change[:, fan_in:].sum(1)  # a sum over no column where there is no bias

    def conditioned(self, gradient: Tensor) -> Tensor:
        return self.alpha * gradient


def _joined(term: LocalTerm, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weight, bias[:, None]], 1) if term.has_bias else weight
