"""F of one call, written as a function that autograd differentiates whole: of values, or of errors.

A value that is not given is its prediction, so its node costs nothing. An output counts by its loss; one whose value is
given has an energy, too, and the loss then acts on this value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch2ebm.common.known_names import unknown_name
from torch2ebm.engine.call import Call, at_least_single
from torch2ebm.engine.energies import Energy, gaussian_energy
from torch2ebm.errors import BatchDimensionError, ConfigurationError
from torch2ebm.graph.energy_graph import EnergyGraph, filled
from torch2ebm.isolation.interrupts import within
from torch2ebm.isolation.module_state import tensors_in_place
from torch2ebm.potentials.energy_parameters import as_they_are, learned_of

ByNode = Mapping[str, Any]  # a tensor, or a tuple of them for a node of several slots


@dataclass(frozen=True, eq=False)
class Point:
    """All values of a call, by slot, with the autograd graph that made them.

    Attributes:
        values: What the children read, or the loss.
        predictions: What the parents' values predict.
        errors: Value minus prediction; a slot that was not given has none.
    """

    values: Mapping[str, Tensor]
    predictions: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]


class EnergyFunction:
    """F of one call.

    Args:
        call: The call, after its feed-forward pass.
        energies: Energy of each node, by name; a node without one has a Gaussian of precision 1.
        parameters: What stands for the module's parameters, by name; none for their own.
    """

    def __init__(self, call: Call, energies: Mapping[str, Energy], parameters: Mapping[str, Tensor]) -> None:
        self.call, self.graph, self.energies = call, call.graph, energies
        self._parameters = {**call.swapped, **parameters}

    def at(self, given: Mapping[str, Tensor], coordinates: str = "values") -> Point:
        """All values where some are given, by slot, as values or as errors."""
        return within(
            [tensors_in_place(self.graph.module, self._parameters)], lambda: self._at(given, coordinates == "errors")
        )

    def _at(self, given: Mapping[str, Tensor], are_errors: bool) -> Point:
        values: dict[str, Tensor] = {}
        predictions: dict[str, Tensor] = {}
        errors: dict[str, Tensor] = {}
        for node in self.graph.nodes.values():
            inputs = [values[slot].to(self.call.values[slot].dtype) for slot in node.reads]
            for slot, predicted in zip(node.slots, self.call.evaluate(node, inputs).predictions, strict=True):
                prediction = predictions[slot] = values[slot] = at_least_single(predicted, detach=False)
                if slot in given:
                    errors[slot] = given[slot] if are_errors else given[slot] - prediction
                    values[slot] = prediction + given[slot] if are_errors else given[slot]
        return Point(values, predictions, errors)

    def of_slot(self, slot: str, point: Point) -> Tensor:
        """The energy of each entry of the first dimension, shape ``[batch]``; a number for a value without one."""
        energy = self.energies.get(self.graph.owner[slot].name)
        error = point.errors[slot]
        if energy is None:
            return gaussian_energy(error)
        return energy.of_samples(error, point.predictions[slot])

    def of_nodes(self, point: Point) -> Tensor:
        """The energy of all nodes and samples, of no dimension."""
        parts = [self.of_slot(slot, point).sum() for slot in point.errors]
        return torch.stack(parts).sum() if parts else torch.zeros((), device=self.call.device)

    def of_samples(self, slot: str, point: Point) -> Tensor:
        """The energy of each sample, shape ``[batch]``."""
        error = point.errors[slot]
        if error.ndim == 0 or len(error) != self.call.batch_size:
            raise BatchDimensionError(
                f"model.energy(...), node '{self.graph.owner[slot].name}'",
                f"a value of shape {tuple(error.shape)}",
                f"a leading batch dimension of {self.call.batch_size}",
                "Make it part of a larger node: torch2ebm.convert(net, nodes=[...]).",
            )
        return self.of_slot(slot, point)

    def output(self, point: Point) -> Any:
        """What the module returns, with these values of the outputs in it."""
        leaves = self.graph.output(point.values, self.call.environment)
        return filled(self.call.run.output, leaves, self.graph.outputs)


def by_slot(where: str, given: ByNode, graph: EnergyGraph, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From node names to slots. Raises :class:`ConfigurationError` for an unknown name, or a tensor that does not fit.

    Args:
        where: For errors.
        given: A tensor for each node, or a tuple of them for a node of several slots, None being left out.
        graph: Whose nodes they are.
        shapes: A value of every slot.
    """
    found: dict[str, Tensor] = {}
    for name, value in given.items():
        if name not in graph.nodes:
            raise unknown_name(where, name, graph.nodes)
        slots = graph.nodes[name].slots
        parts: Sequence[Any] = value if isinstance(value, (tuple, list)) else (value,)
        if len(parts) != len(slots):
            raise ConfigurationError(
                f"{where}, node '{name}'", f"{len(parts)} tensors", f"one for each of its {len(slots)} slots", _REMEDY
            )
        for slot, part in zip(slots, parts, strict=True):
            if part is None and len(slots) > 1:
                continue
            found[slot] = _fitting(f"{where}, node '{name}'", part, shapes[slot])
    return found


_REMEDY = "model.state.value, after a backward, has values of the right shapes."


def _fitting(where: str, given: Any, like: Tensor) -> Tensor:
    described = f"a {type(given).__name__}"
    if isinstance(given, Tensor):
        described = f"shape {tuple(given.shape)}, {str(given.dtype).removeprefix('torch.')} on {given.device}"
        if given.shape == like.shape and given.is_floating_point() and given.device == like.device:
            return given if given.dtype == like.dtype else given.to(at_least_single(like).dtype)
    expected = f"a floating point tensor of shape {tuple(like.shape)} on {like.device}"
    raise ConfigurationError(where, described, expected, _REMEDY)


def check_known_nodes(where: str, names: Iterable[str], graph: EnergyGraph) -> None:
    """Raise :class:`UnknownNameError` for a name that no node has; an output may have an energy here."""
    for name in names:
        if name not in graph.nodes:
            raise unknown_name(f"{where}(precisions=..., energies=...)", name, graph.nodes)


def detached(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the place of parameters that no gradient shall reach."""
    return {name: parameter.detach() for name, parameter in parameters.items()}


def still(energies: Mapping[str, Energy]) -> Mapping[str, Energy]:
    """Energies whose own parameters no gradient reaches, and which stay as they are while those learn on."""
    found = as_they_are(energies)
    for name, energy in found.items():
        if energy is not energies[name]:
            for tensor in learned_of(energy).values():
                tensor.requires_grad_(False)
    return found
