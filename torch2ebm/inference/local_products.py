"""The derivative of a model's outputs in its errors, and its transpose, by products that end at each node."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch2ebm.engine.call import Call, NodePass, at_least_single
from torch2ebm.engine.energies import Energy, precision_of
from torch2ebm.errors import NodeEvaluationError, NonFiniteError
from torch2ebm.graph.energy_graph import Node
from torch2ebm.isolation.forward_mode import own_level

VANISHED = 1e-15  # far below what a bias would add, and its square far above the smallest number of single precision
_WITHOUT = "nodes without forward-mode differentiation"  # a key of EnergyGraph.once


class LocalProducts:
    """J, the derivative of the outputs in the errors, around the feed-forward pass of one call.

    A value is its prediction plus its error, so an error reaches the outputs through all nodes below. One sweep from
    the inputs onward gives ``J u``, one sweep back ``J^T c``. Each node is differentiated on leaves of its own.

    Args:
        call: The call, after its feed-forward pass.
        energies: Energy of each node, by name; those without one have precision 1.
        exact: Whether ``J u`` is by forward-mode differentiation. If not, it is by a difference of the node at two
            values: a relative error of the square root of the dtype's epsilon, for a fifth of the time.

    Attributes:
        values: Feed-forward value of every slot; those that the call has given away are computed again.
        passes: An evaluation of each node that reads values, by name; its graph is kept.
        separate: Whether samples are independent: differences are then as wide as suits each.
        work: Evaluations and products of all nodes so far; a backprop is 3 (forward, and back to inputs and weights).
    """

    def __init__(self, call: Call, energies: Mapping[str, Energy], exact: bool) -> None:
        self.call, self.graph, self.exact = call, call.graph, exact
        self.values = dict(call.values)
        self.precisions = {node.name: precision_of(energies.get(node.name)) for node in self.graph.hidden_nodes}
        self.separate = False
        self._without: set[str] = self.graph.once(_WITHOUT, set)
        self.passes: dict[str, NodePass] = {}
        for node in self.graph.nodes.values():
            missing = any(slot not in self.values for slot in node.slots)  # a relaxation has taken them
            if node.reads or missing:
                self.passes[node.name] = self._evaluated(node)
            if missing:
                predictions = self.passes[node.name].predictions
                self.values.update({s: p.detach() for s, p in zip(node.slots, predictions, strict=True)})
        self.work = 1.0

    def _evaluated(self, node: Node) -> NodePass:
        with torch.enable_grad():
            return self.call.evaluate(node, [self.values[s].detach().requires_grad_() for s in node.reads])

    def covariance(self, cotangents: Mapping[str, Tensor], slots: Collection[str]) -> dict[str, Tensor]:
        """``J Pi^-1 J^T c``: how some values vary together where each error has the variance of its node.

        Args:
            cotangents: By one of these slots, in the shape of the value; a missing one is zero.
            slots: Of outputs, or of values.

        Returns:
            By one of these slots; a missing one is zero.
        """
        moved = self.moved(dict(self.errors(cotangents)))
        return {slot: moved[slot] for slot in slots if slot in moved}

    def errors(self, cotangents: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """``Pi^-1 J^T c`` by hidden slot."""
        owner = self.graph.owner
        pulled = self.pulled(cotangents)
        return [(slot, error / _like(self.precisions[owner[slot].name], error)) for slot, error in pulled]

    def pulled(self, cotangents: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """``J^T c`` by hidden slot: one reverse sweep."""
        messages = dict(cotangents)
        for node in reversed(self.graph.nodes.values()):  # type: ignore[call-overload]
            sent = [messages.get(slot) for slot in node.slots]
            if not node.reads or all(each is None for each in sent):
                continue
            _add(messages, node, self._pulled(node, sent))
        self.work += 1
        return [(s, messages[s]) for node in self.graph.hidden_nodes for s in node.slots if s in messages]

    def through_outputs(
        self, values: Mapping[str, Tensor], product: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """``V^T H V u``, ``V`` the derivatives of the output nodes in the values that they read: by hidden slot.

        Args:
            values: ``u``, by hidden slot; a missing one is zero.
            product: With ``H``, by output slot. A sweep of all nodes counts the work at its output nodes already.
        """
        moved: dict[str, Tensor] = {}
        messages: dict[str, Tensor] = {}
        for node in self.graph.output_nodes:
            tangents = [values.get(slot) for slot in node.reads]
            if any(tangent is not None for tangent in tangents):
                pairs = zip(node.slots, self._pushed(node, tangents), strict=True)
                moved.update({slot: at_least_single(tangent) for slot, tangent in pairs if tangent is not None})
        pulls = product(moved) if moved else {}
        for node in self.graph.output_nodes:
            sent = [pulls.get(slot) for slot in node.slots]
            if node.reads and any(each is not None and bool(each.any()) for each in sent):
                _add(messages, node, self._pulled(node, sent))
        return messages

    def moved(self, errors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How all values and predictions follow when errors move, by slot; a missing one stays."""
        moved: dict[str, Tensor] = {}
        for node in self.graph.nodes.values():
            tangents = [moved.get(slot) for slot in node.reads]
            idle = all(tangent is None for tangent in tangents)
            found = [None] * len(node.slots) if idle else self._pushed(node, tangents)
            for slot, tangent in zip(node.slots, found, strict=True):
                parts = [part for part in (tangent, errors.get(slot)) if part is not None]
                if parts:
                    moved[slot] = at_least_single(parts[0] if len(parts) == 1 else parts[0] + parts[1])
        self.work += 2 if self.exact else 1
        return moved

    def one_level_on(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each node's prediction makes of a change of its parents' values alone, by slot; missing is zero."""
        found: dict[str, Tensor] = {}
        for node in self.graph.nodes.values():
            tangents = [values.get(slot) for slot in node.reads]
            if any(tangent is not None for tangent in tangents):
                moved = zip(node.slots, self._pushed(node, tangents), strict=True)
                found.update({slot: at_least_single(tangent) for slot, tangent in moved if tangent is not None})
        self.work += 2 if self.exact else 1
        return found

    def one_level_back(self, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its transpose: what each node sends to its parents and no farther, by slot; missing is zero."""
        messages: dict[str, Tensor] = {}
        for node in self.graph.nodes.values():
            sent = [cotangents.get(slot) for slot in node.slots]
            if node.reads and any(each is not None for each in sent):
                _add(messages, node, self._pulled(node, sent))
        self.work += 1
        return messages

    def not_finite(self) -> NonFiniteError:
        """The error of a product that is not finite; it names a node whose own derivative is not."""
        sweep = (node for node in reversed(self.passes) if not self._is_finite(node))
        where = next((f"node '{node}', " for node in sweep), "")
        return NonFiniteError(
            f"{where}curvature",
            "a derivative that is not finite",
            "finite numbers",
            "Activations or weights are too large for the dtype; look at the initialisation. Nothing was changed.",
        )

    def _is_finite(self, name: str) -> bool:
        evaluated = self.passes[name]
        ones = [torch.ones_like(prediction) for prediction in evaluated.predictions]
        products = self._pulled(evaluated.node, ones)
        return all(bool(torch.isfinite(part).all()) for part in products if part is not None)

    def _pulled(self, node: Node, sent: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        evaluated = self.passes[node.name]
        return evaluated.pullback(sent, evaluated.inputs, retain_graph=True)

    def _pushed(self, node: Node, tangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        values = self.passes[node.name].inputs
        # halves have too few digits for a difference
        single = all(value.dtype in (torch.float32, torch.float64) for value in values)
        if (self.exact or not single) and node.name not in self._without:
            try:
                return self._by_forward_mode(node, values, tangents)
            except (NodeEvaluationError, NotImplementedError, RuntimeError):  # fused attention, LSTMs, own functions
                self._without.add(node.name)
        return self._by_difference(node, values, tangents)

    def _by_forward_mode(
        self, node: Node, values: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        with torch.no_grad(), own_level():
            make: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
            duals = [
                value if tangent is None else make(value, tangent.to(value.dtype))
                for value, tangent in zip(values, tangents, strict=True)
            ]
            predictions = self.call.evaluate(node, duals).predictions
            unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
            return [unpack(prediction).tangent for prediction in predictions]

    def _by_difference(
        self, node: Node, values: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        pairs = [(value.detach(), tangent) for value, tangent in zip(values, tangents, strict=True)]
        moving = [(value, tangent) for value, tangent in pairs if tangent is not None]
        # a loss over all samples has no row of each: one width, then
        separate = self.separate and all(self._batched(each) for each in self.passes[node.name].predictions)
        width = self._width(moving, separate and all(self._batched(t) and t.ndim > 1 for _, t in moving))

        def at(shift: Tensor) -> Sequence[Tensor]:
            moved = [v if t is None else v + (_column(shift, t) * t).to(v.dtype) for v, t in pairs]
            with torch.no_grad():
                return self.call.evaluate(node, moved).predictions

        above = at(width)
        if self.exact:  # central: where forward mode has no formula, the error is of second order
            return [(a - b) / _column(2 * width, a) for a, b in zip(above, at(-width), strict=True)]
        here = self.passes[node.name].predictions
        return [(a - b.detach()) / _column(width, a) for a, b in zip(above, here, strict=True)]

    def _batched(self, tensor: Tensor) -> bool:
        return tensor.ndim > 0 and len(tensor) == self.call.batch_size

    def _width(self, pairs: Sequence[tuple[Tensor, Tensor]], separate: bool) -> Tensor:
        """How far to go, a sample or in all: small beside the values, large beside their rounding."""
        accuracy = torch.finfo(pairs[0][0].dtype).eps ** (1 / 3 if self.exact else 1 / 2)
        of_values = torch.stack([_largest(value, separate) for value, _ in pairs]).amax(0)
        of_tangents = torch.stack([_largest(tangent, separate) for _, tangent in pairs]).amax(0)
        # what has all but vanished is no measure: a width would round to zero, or be infinite
        of_values = torch.where(of_values > VANISHED, of_values, 1.0)
        width: Tensor = accuracy * of_values / torch.where(of_tangents > VANISHED**2, of_tangents, 1.0)
        return width


def _add(messages: dict[str, Tensor], node: Node, products: Sequence[Tensor | None]) -> None:
    for slot, product in zip(node.reads, products, strict=True):
        if product is not None:
            product = at_least_single(product, detach=False)
            messages[slot] = messages[slot] + product if slot in messages else product


def _largest(tensor: Tensor, separate: bool) -> Tensor:
    return tensor.abs().flatten(1).amax(1) if separate else tensor.abs().amax()


def _column(width: Tensor, like: Tensor) -> Tensor:
    return width.reshape(-1, *[1] * (like.ndim - 1)) if width.ndim else width


def _like(precision: float | Tensor, error: Tensor) -> float | Tensor:
    return precision.to(error) if isinstance(precision, Tensor) else precision
