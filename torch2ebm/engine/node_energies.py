"""The energies that a user gives to nodes by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from torch2ebm.engine.energies import Energy, Gaussian, check_precision
from torch2ebm.errors import ConfigurationError
from torch2ebm.graph.energy_graph import EnergyGraph


def node_energies(
    where: str, precisions: Mapping[str, float | Tensor], energies: Mapping[str, Energy]
) -> Mapping[str, Energy]:
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
    return {**energies, **{name: Gaussian(precision) for name, precision in precisions.items()}}


def check_names(where: str, names: Iterable[str], graph: EnergyGraph) -> None:
    """Raise :class:`ConfigurationError` unless each is a node with a value of its own."""
    hidden = [node.name for node in graph.hidden_nodes]
    wrong = [name for name in names if name not in hidden]
    if wrong:
        outputs = [name for name in wrong if name in graph.nodes]
        why = "whose energy is the loss (mode O1)" if outputs else "that no node has"
        raise ConfigurationError(
            f"{where}(precisions=..., energies=...)",
            f"{', '.join(outputs or wrong)}, {why}",
            f"names among {', '.join(hidden)}",
            "Look at model.summary() for the names.",
        )
