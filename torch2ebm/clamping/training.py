"""Values that are given while a model trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from torch2ebm.clamping.asking import Question, check_parts
from torch2ebm.clamping.places import INPUT, Places
from torch2ebm.clamping.relaxing import Clamped
from torch2ebm.engine.call import Call, at_least_single
from torch2ebm.engine.energies import Energy
from torch2ebm.engine.nudging import Nudging, OneSided
from torch2ebm.engine.results import LocalGradients
from torch2ebm.errors import ConfigurationError
from torch2ebm.potentials.energy_parameters import by_parameter, gradients_of_energy, learned_of


def check_nudging_of_data(where: str, clamp: Mapping[str, Any], nudging: Nudging) -> None:
    """Raises :class:`ConfigurationError` for a nudge beside clamps: gradients are divided by it, and data has none."""
    if clamp and nudging != OneSided():
        raise ConfigurationError(
            f"{where}(clamp=..., nudging=...)",
            repr(nudging),
            "OneSided(1): the energy of what is given counts whole",
            "Leave nudging out; precisions= weighs what is given.",
        )


def clamped_call(where: str, call: Call, clamp: Mapping[str, Any], energies: Mapping[str, Energy]) -> Clamped | None:
    """The call of one batch under what is given for it; None where nothing is.

    Raises:
        ConfigurationError: for what contradicts itself, or has another shape.
        NonFiniteError: for given values that are not finite.
    """
    given: dict[str, Any] = {}
    masks: dict[str, Tensor] = {}
    for name, value in clamp.items():
        found = value() if callable(value) else value
        if found is None:
            continue
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Tensor):
            found, masks[name] = found
        given[name] = found
    if not given:
        return None
    question = Question(given, masks, where=where)
    inputs = {name: name for name in call.graph.nodes}
    places = Places.of(call.graph, call.run.output, inputs, frozenset({INPUT} - inputs.keys()))
    pattern = question.pattern(places, call.values, call.batch_size)
    outputs = [name for name in given if not set(places.slots(where, name)).isdisjoint(call.graph.output_slots)]
    if outputs:
        raise ConfigurationError(
            question.at("clamp", outputs[0]),
            "an output",
            "a node with a value of its own",
            "The loss says what the output is to be; a part of it, where the loss takes a part.",
        )
    check_parts(where, pattern, call.graph, energies)
    for slot in pattern.masks:
        name = call.graph.owner[slot].name
        if name in energies and learned_of(energies[name]):
            raise ConfigurationError(
                question.at("clamp", name),
                "a value that is given in part, of a node whose precision learns",
                "one of the two",
                "Give the whole value, or a precision that is a number.",
            )
    return Clamped.of(call, pattern, energies, {})


def with_energies_of_data(found: LocalGradients, kept: Clamped, scale: float) -> LocalGradients:
    """The gradients of energies' own parameters, with those of the nodes whose values are given."""
    of_nodes: dict[str, dict[str, Tensor]] = {}
    for node in kept.original.nodes.values():
        given = [slot for slot in node.slots if kept.pattern.is_whole(slot) and slot in kept.pattern.given]
        if node.name in kept.energies and given and learned_of(kept.energies[node.name]):
            predictions = [at_least_single(found.state.predictions[kept.place(slot)]) for slot in given]
            pairs = zip(given, predictions, strict=True)
            errors = [kept.pattern.given[slot].to(prediction) - prediction for slot, prediction in pairs]
            of_nodes[node.name] = gradients_of_energy(kept.energies[node.name], errors, predictions, scale)
    if not of_nodes:
        return found
    more = by_parameter(kept.energies, of_nodes)
    learned = {**found.learned, **{n: found.learned[n] + g if n in found.learned else g for n, g in more.items()}}
    return replace(found, learned=learned)
