"""The energies that a user gives to nodes by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from torch2ebm.engine.energies import Energy, Gaussian, check_precision
from torch2ebm.engine.precision import Precision
from torch2ebm.errors import ConfigurationError
from torch2ebm.graph.energy_graph import EnergyGraph


class NodeEnergies(Mapping[str, Energy]):
    """Node name to energy, as a setting: immutable, and equal to another one with equal energies."""

    def __init__(self, energies: Mapping[str, Energy] | None = None) -> None:
        self._energies = dict(energies or {})

    def __getitem__(self, name: str) -> Energy:
        return self._energies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._energies)

    def __len__(self) -> int:
        return len(self._energies)

    def __eq__(self, other: object) -> bool:
        # not Mapping's own comparison: it would take the truth of a tensor
        if not isinstance(other, NodeEnergies) or self.keys() != other.keys():
            return False
        return all(_are_equal(energy, other[name]) for name, energy in self.items())

    def __hash__(self) -> int:
        return hash(frozenset(self))  # names alone: a precision may be a tensor, which is hashed by what it is

    def __repr__(self) -> str:
        return repr(self._energies)


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two settings are equal: tensors by their numbers, dataclasses field by field, others by ``==``."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        if one.requires_grad or other.requires_grad:
            return False  # what learns is one parameter or another, whatever its numbers are now
        # the device first: torch.equal raises where it differs
        return one.shape == other.shape and one.device == other.device and torch.equal(one, other)
    if dataclasses.is_dataclass(one):
        return all(_are_equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    return bool(one == other)


def node_energies(
    where: str, precisions: Mapping[str, float | Tensor | Precision], energies: Mapping[str, Energy]
) -> NodeEnergies:
    """One mapping of both. Raises :class:`ConfigurationError` for a node in both, or what is no energy."""
    for name, precision in precisions.items():
        check_precision(f"{where}(precisions={{{name!r}: ...}})", precision)
    for name, energy in energies.items():
        if not isinstance(energy, Energy):
            raise ConfigurationError(
                f"{where}(energies={{{name!r}: ...}})", repr(energy), "an energy object", "For example Gaussian(2.0)."
            )
    twice = sorted(precisions.keys() & energies.keys())
    if twice:
        raise ConfigurationError(
            f"{where}(precisions=..., energies=...)",
            f"{', '.join(twice)} in both",
            "each node in one of them",
            "Give the precision to the energy: Gaussian(precision).",
        )
    return NodeEnergies({**energies, **{name: Gaussian(precision) for name, precision in precisions.items()}})


def check_free(where: str, energies: Mapping[str, Energy], clamped: Collection[str] = ()) -> None:
    """Raise :class:`ConfigurationError` for a free node whose energy is that of data."""
    wrong = [name for name, energy in energies.items() if energy.observed and name not in clamped]
    if wrong:
        raise ConfigurationError(
            f"{where}(energies={{{wrong[0]!r}: ...}})",
            f"{energies[wrong[0]]!r}, whose value is data, for a value that moves",
            "an energy that is smallest where the value is the prediction",
            "Take the same energy without observed=True, or clamp the node.",
        )


def check_names(where: str, names: Iterable[str], graph: EnergyGraph, outputs: bool = False) -> None:
    """Raise :class:`ConfigurationError` unless each is a node with a value, or an output where that may be."""
    # an output has no energy of its own: the loss acts on its prediction (mode O1)
    hidden = [node.name for node in graph.hidden_nodes]
    wrong = [name for name in names if name not in (graph.nodes if outputs else hidden)]
    if wrong:
        without = [name for name in wrong if name in graph.nodes]
        why = "whose energy is the loss (mode O1)" if without else "that no node has"
        raise ConfigurationError(
            f"{where}(precisions=..., energies=...)",
            f"{', '.join(without or wrong)}, {why}",
            f"names among {', '.join(hidden)}",
            "Look at model.summary() for the names.",
        )
