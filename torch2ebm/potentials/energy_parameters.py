"""Parameters of energies that a user's optimizer moves: which they are, whether they are legal, and their gradients."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from torch2ebm.common.nested import attributes_of, leaves_of
from torch2ebm.engine.call import Call, at_least_single
from torch2ebm.engine.energies import Energy, Gaussian, check_precision
from torch2ebm.errors import ConfigurationError
from torch2ebm.isolation.torch_modes import in_own_precision


def tensors_of(thing: object) -> list[Tensor]:
    """All tensors among the attributes of an energy or a solver, those of modules in it too."""
    return [tensor for _, tensor in _named_tensors(thing)]


def learned_of(energy: Energy) -> dict[str, Tensor]:
    """The tensors that require a gradient, by name; each once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in _named_tensors(energy):
        if tensor.requires_grad:
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def learned_by(energies: Mapping[str, Energy]) -> dict[str, Tensor]:
    """Those of all nodes, by ``node.name``; what several nodes share has the name of the first."""
    found: dict[int, tuple[str, Tensor]] = {}
    for node, energy in energies.items():
        for name, tensor in learned_of(energy).items():
            found.setdefault(id(tensor), (f"{node}.{name}", tensor))
    return dict(found.values())


def check_at_forward(where: str, energies: Mapping[str, Energy], call: Call) -> None:
    """What is looked at before anything moves: precisions that have been trained, and energies on a graph's first call.

    Raises:
        ConfigurationError: naming the node.
    """
    check_learned(where, energies)
    if energies:
        call.graph.once(("energies", where, energies), lambda: _check_on(energies, call))


def _check_on(energies: Mapping[str, Energy], call: Call) -> bool:
    with torch.no_grad():
        for name, energy in energies.items():
            for slot in call.graph.nodes[name].slots:
                energy.check(f"the energy of node '{name}'", at_least_single(call.values[slot]))
    return True


def check_learned(where: str, energies: Mapping[str, Energy]) -> None:
    """Raise :class:`ConfigurationError` for a precision that training has made negative, zero or not finite."""
    for node, energy in energies.items():
        for name, tensor in learned_of(energy).items():
            if not tensor.is_leaf:
                raise ConfigurationError(
                    f"{where}, the energy of node '{node}', its {name}",
                    "a tensor computed from others that require a gradient, whose graph is of another moment",
                    "a parameter, or a tensor without a gradient",
                    "Keep the parameter in the energy, and compute what follows from it in the energy's methods.",
                )
        if isinstance(energy, Gaussian) and learned_of(energy):
            check_precision(f"{where}, the precision of node '{node}'", energy.precision, trained=True)


def gradients_of_energy(
    energy: Energy, errors: Sequence[Tensor], predictions: Sequence[Tensor], scale: float | Tensor
) -> dict[str, Tensor]:
    """dphi/dtheta of an energy's own parameters, summed over samples, times ``scale``.

    Args:
        energy: Of one node.
        errors: One for each slot of the node.
        predictions: One for each slot, in the dtype of its error.
        scale: From the energy to ``.grad``.

    Returns:
        By name, as :func:`learned_of`.
    """
    learned = learned_of(energy)
    if not learned:
        return {}
    with torch.enable_grad(), in_own_precision(errors[0]):
        pairs = zip(errors, predictions, strict=True)
        total = sum(energy.of_parameters(error.detach(), prediction.detach()) for error, prediction in pairs)
        if not (isinstance(total, Tensor) and total.requires_grad):
            return {name: torch.zeros_like(tensor) for name, tensor in learned.items()}
        found = torch.autograd.grad(total, list(learned.values()), allow_unused=True)
    pairs_of = zip(learned.items(), found, strict=True)
    return {name: torch.zeros_like(tensor) if part is None else part * scale for (name, tensor), part in pairs_of}


def by_parameter(energies: Mapping[str, Energy], found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients by node and name as :func:`learned_by` names them, those of a shared tensor summed."""
    names = {id(tensor): name for name, tensor in learned_by(energies).items()}
    total: dict[str, Tensor] = {}
    for node, gradients in found.items():
        tensors = learned_of(energies[node])
        for name, gradient in gradients.items():
            whole = names[id(tensors[name])]
            total[whole] = total[whole] + gradient if whole in total else gradient
    return total


def as_they_are(energies: Mapping[str, Energy]) -> Mapping[str, Energy]:
    """For a result, which stays as it is while its energies' parameters learn on."""
    if not any(learned_of(energy) for energy in energies.values()):
        return energies
    return {name: copy.deepcopy(energy) if learned_of(energy) else energy for name, energy in energies.items()}


def _named_tensors(thing: object) -> Iterator[tuple[str, Tensor]]:
    for name, part in _settings(thing).items():
        for leaf in leaves_of(part):
            if isinstance(leaf, Tensor):
                yield name, leaf
            elif isinstance(leaf, nn.Module):
                for inner, tensor in [*leaf.named_parameters(), *leaf.named_buffers()]:
                    yield f"{name}.{inner}", tensor


def _settings(thing: object) -> Mapping[str, object]:
    if dataclasses.is_dataclass(thing):
        return {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
    attributes = attributes_of(thing)
    return attributes if isinstance(attributes, Mapping) else {}
