"""What the energy of a call consists of: the share of each node and of the loss, for each sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch2ebm.analysis.energy_function import (
    ByNode,
    CallEnergy,
    Point,
    by_slot,
    check_known_nodes,
    detached,
    still,
)
from torch2ebm.common.checks import check_finite
from torch2ebm.common.nested import leaves_of, map_leaves
from torch2ebm.common.text import data_frame
from torch2ebm.engine.call import Call
from torch2ebm.engine.energies import Energy
from torch2ebm.engine.precision import Precision
from torch2ebm.errors import BatchDimensionError, ConfigurationError, LossNotRecordedError
from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.potentials.node_energies import node_energies

if TYPE_CHECKING:
    from pandas import DataFrame

LossFunction = Callable[..., Tensor]
_WHERE = "model.energy(loss_fn=...)"


@dataclass(frozen=True, eq=False)
class EnergyTerms:
    """The energy of one call at given values, by :meth:`EnergyModel.energy`.

    Every tensor has its autograd graph back to the values that were given.

    Attributes:
        total: F of each sample, shape ``[batch]``: the sum of what follows.
        nodes: Node name to the energy of each sample, shape ``[batch]``, of the nodes whose values were given.
        loss: ``beta`` times the loss of each sample, shape ``[batch]``; None without a loss.
        value: Node name to value, given or predicted, a tuple for a node of several slots.
        prediction: Node name to prediction, in the same shapes.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> terms = torch2ebm.convert(net).energy({"0": torch.zeros(5, 8)}, torch.randn(5, 4))
        >>> torch.equal(terms.nodes["0"], 0.5 * terms.prediction["0"].square().sum(1))
        True
    """

    total: Tensor
    nodes: Mapping[str, Tensor]
    loss: Tensor | None
    value: Mapping[str, Any]
    prediction: Mapping[str, Any]

    def detached(self) -> EnergyTerms:
        """The same numbers without their graph.

        Example:
            >>> terms.detached().total.requires_grad
            False
        """
        found: EnergyTerms = map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, self)
        return found

    def to_dataframe(self) -> DataFrame:
        """A table, one row a sample and node: ``sample``, ``node`` and ``energy``; the node ``(loss)`` is the loss.

        Raises:
            ConfigurationError: if pandas is not installed (``pip install torch2ebm[pandas]``).
        """
        terms = {**self.nodes, **({} if self.loss is None else {"(loss)": self.loss})}
        columns = {name: energy.detach().tolist() for name, energy in terms.items()}
        samples = range(len(self.total))
        rows = ((sample, name, column[sample]) for sample in samples for name, column in columns.items())
        return data_frame(("sample", "node", "energy"), rows)


def energy_terms(
    call: Call,
    values: ByNode,
    *,
    loss_fn: LossFunction | None = None,
    target: Any = None,
    beta: float = 1.0,
    precisions: Mapping[str, float | Tensor | Precision] | None = None,
    energies: Mapping[str, Energy] | None = None,
    parameters: bool = False,
) -> EnergyTerms:
    """The terms at some values, of a call after its feed-forward pass; see :meth:`EnergyModel.energy`."""
    check_finite("model.energy", beta=beta)
    if target is not None and loss_fn is None:
        raise ConfigurationError("model.energy(target=...)", "no loss_fn", "a loss beside its target", "Give both.")
    named = node_energies("model.energy", precisions or {}, energies or {})
    graph = call.graph
    check_known_nodes("model.energy", named, graph)
    function = CallEnergy(call, named, {})
    if not parameters:
        function = CallEnergy(call, still(named), detached(call.parameters))
    point = function.at(by_slot("model.energy(values=...)", values, graph, call.values))
    nodes: dict[str, Tensor] = {}
    for slot in point.errors:
        name, energy = graph.owner[slot].name, function.of_samples(slot, point)
        nodes[name] = nodes[name] + energy if name in nodes else energy
    loss = None
    if loss_fn is not None:
        before = filled_as_it_was(function)
        loss = beta * losses_of_samples(loss_fn, function.output(point), target, before, call.batch_size)
    parts = [*nodes.values(), *([] if loss is None else [loss])]
    like = next(iter(point.predictions.values()))
    total = sum(parts[1:], start=parts[0]) if parts else like.new_zeros(call.batch_size)
    return EnergyTerms(total, nodes, loss, by_node(graph, point.values), by_node(graph, point.predictions))


def by_node(graph: EnergyGraph, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """From slots to node names, a tuple for a node of several slots."""
    found = {name: tuple(tensors[slot] for slot in node.slots) for name, node in graph.nodes.items()}
    return {name: parts[0] if len(parts) == 1 else parts for name, parts in found.items()}


def filled_as_it_was(function: CallEnergy) -> Any:
    """The output of the feed-forward pass, which no transformation of torch.func has a hand in."""
    values = {slot: value.detach() for slot, value in function.call.values.items()}
    return function.output(Point(values, values, {}))


def losses_of_samples(loss_fn: LossFunction, output: Any, target: Any, before: Any, batch_size: int) -> Tensor:
    """The loss of each sample, shape ``[batch]``, of a loss that gives this, or one number for all.

    Args:
        loss_fn: What the user has written.
        output: What the module returns.
        target: For the loss, or None.
        before: The same output in the feed-forward pass, at which the loss is looked at.
        batch_size: Samples of the call.
    """
    of: LossFunction = (lambda out, aim: loss_fn(out)) if target is None else loss_fn
    whole = of(before, target)
    if isinstance(whole, Tensor) and whole.shape == (batch_size,):
        return of(output, target)
    if not isinstance(whole, Tensor) or whole.ndim:
        got = f"shape {tuple(whole.shape)}" if isinstance(whole, Tensor) else f"a {type(whole).__name__}"
        raise LossNotRecordedError(
            _WHERE, got, f"one number, or a loss for each sample, [{batch_size}]", "Sum over all but the samples."
        )

    def parts(out: Any) -> Tensor:
        return torch.stack([of(*_sample((out, target), i, batch_size)) for i in range(batch_size)])

    if batch_size == 1:
        return of(output, target)[None]
    _check_batched(before, batch_size)
    seen = parts(before)
    if not any(torch.allclose(whole.double(), all_.double(), rtol=1e-4) for all_ in (seen.mean(), seen.sum())):
        raise ConfigurationError(
            _WHERE,
            f"{float(whole):.6g} for the batch, and {float(seen.mean()):.6g} as the mean of its samples",
            "a loss that is a mean or a sum over samples",
            'Return the loss of each sample, shape [batch], for example by reduction="none".',
        )
    return parts(output)


def _sample(structure: Any, index: int, batch_size: int) -> Any:
    def of(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == batch_size
        return leaf.narrow(0, index, 1) if batched else leaf

    return map_leaves(of, structure)


def _check_batched(output: Any, batch_size: int) -> None:
    shapes = [tuple(leaf.shape) for leaf in leaves_of(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not any(shape and shape[0] == batch_size for shape in shapes):
        raise BatchDimensionError(
            _WHERE,
            f"outputs of shapes {shapes}",
            f"a leading batch dimension of {batch_size}",
            "Return the loss of each sample, shape [batch].",
        )
