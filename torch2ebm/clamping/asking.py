"""From what somebody asks for, by name, to a pattern of slots; every contradiction is named before anything moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch2ebm.clamping.pattern import Pattern
from torch2ebm.clamping.places import Places
from torch2ebm.clamping.priors import Flat
from torch2ebm.engine.energies import Energy
from torch2ebm.errors import ConfigurationError, NonFiniteError
from torch2ebm.graph.energy_graph import EnergyGraph


@dataclass(frozen=True, eq=False)
class Question:
    """What is given, by name.

    Attributes:
        clamp: A tensor in the shape of the value, one without its batch dimension, a number, or the name of another
            node, whose value it then is. A tuple for a node of several values.
        mask: True where the value is given; for a name in ``clamp``, or for an input.
        free: Names that are free; nodes and outputs are, unless they are clamped.
        start: Where values begin.
    """

    clamp: Mapping[str, Any] = field(default_factory=dict)
    mask: Mapping[str, Tensor] = field(default_factory=dict)
    free: Sequence[str] = ()
    start: Mapping[str, Any] = field(default_factory=dict)
    where: str = "model.infer"

    def __post_init__(self) -> None:
        for argument in ("clamp", "mask", "start"):
            by_name(f"{self.where}({argument}=...)", getattr(self, argument))
        object.__setattr__(self, "free", (self.free,) if isinstance(self.free, str) else tuple(self.free))

    def at(self, argument: str, name: str) -> str:
        if argument == "mask" and self.where != "model.infer":  # there it stands beside the value
            return f"{self.where}(clamp={{{name!r}: (..., mask)}})"
        return f"{self.where}({argument}={{{name!r}: ...}})"

    def pattern(self, places: Places, predictions: Mapping[str, Tensor], batch_size: int) -> Pattern:
        """The slots that are given, with their values.

        Args:
            places: What the names stand for.
            predictions: Feed-forward value of every slot, for its shape.
            batch_size: The number of samples.

        Raises:
            ConfigurationError: for what contradicts itself, has another shape, or leaves nothing free.
            NonFiniteError: for given values that are not finite.
        """
        given: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        ties: dict[str, str] = {}
        said: dict[str, str] = {}
        for name, value in self.clamp.items():
            where = self.at("clamp", name)
            slots = places.slots(where, name)
            if isinstance(value, str):
                ties.update(self._tie(where, slots, places.slots(where, value), predictions))
                continue
            for slot, part in zip(slots, self._parts(where, slots, value), strict=True):
                if slot in said:
                    raise ConfigurationError(
                        where,
                        f"the value that {said[slot]!r} is clamped to already",
                        "each value clamped once",
                        "Leave one of the two out.",
                    )
                said[slot] = name
                given[slot] = self._like(where, part, predictions[slot], batch_size)
        for name, mask in self.mask.items():
            self._mask(name, mask, places, predictions, batch_size, given, masks)
        self._check_free(places, given, masks, ties)
        for slot, value in given.items():
            _check_finite(self.at("clamp", said.get(slot, slot)), value, masks.get(slot))
        ties, more = _resolved(ties, given, masks)
        given |= more
        return Pattern(given, masks, ties)

    def starts(
        self, places: Places, pattern: Pattern, predictions: Mapping[str, Tensor], batch_size: int
    ) -> dict[str, Tensor]:
        """By slot, where values begin."""
        found: dict[str, Tensor] = {}
        for name, value in self.start.items():
            where = self.at("start", name)
            slots = places.slots(where, name)
            for slot, part in zip(slots, self._parts(where, slots, value), strict=True):
                if pattern.is_whole(slot) or slot in places.graph.output_slots:
                    raise ConfigurationError(
                        where, "a value that does not move", "a free node or a free input", "Leave it out."
                    )
                found[slot] = self._like(where, part, predictions[slot], batch_size)
                _check_finite(where, found[slot], None)
        return found

    def _parts(self, where: str, slots: Sequence[str], value: Any) -> Sequence[Any]:
        parts = value if isinstance(value, (tuple, list)) and len(slots) > 1 else [value]
        if len(parts) != len(slots):
            raise ConfigurationError(where, f"{len(parts)} values", f"{len(slots)}, in a tuple", "Give one for each.")
        return parts

    def _like(self, where: str, value: Any, prediction: Tensor, batch_size: int) -> Tensor:
        """In the shape, dtype and device of the value."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.full_like(prediction, value)
        shape, got = tuple(prediction.shape), f"a {type(value).__name__}"
        if isinstance(value, Tensor):
            got = f"shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
            if tuple(value.shape) == shape or (shape[:1] == (batch_size,) and tuple(value.shape) == shape[1:]):
                found = value.detach().to(device=prediction.device, dtype=prediction.dtype)
                return found.expand(shape).clone(memory_format=torch.contiguous_format)  # the user's may change
        numbers = isinstance(value, Tensor) and not value.is_floating_point() and value.ndim == len(shape) - 1 == 1
        raise ConfigurationError(
            where,
            got,
            f"a tensor of shape {shape}, one of shape {shape[1:]} for all samples, or a number",
            f"For the numbers of classes: torch.nn.functional.one_hot(labels, {shape[-1]}).float()."
            if numbers
            else "Give the value of the node itself."
            if isinstance(value, Tensor)
            else "For example torch.as_tensor(value).",
        )

    def _tie(
        self, where: str, slots: Sequence[str], others: Sequence[str], predictions: Mapping[str, Tensor]
    ) -> dict[str, str]:
        for slot, other in zip(slots, others, strict=False):
            one, two = tuple(predictions[slot].shape), tuple(predictions[other].shape)
            if one != two or slot == other:
                raise ConfigurationError(
                    where,
                    f"values of shapes {one} and {two}" if one != two else "the node itself",
                    "another node with a value of the same shape",
                    "Tie two nodes that predict the same value.",
                )
        if len(slots) != len(others):
            raise ConfigurationError(where, f"{len(others)} values", f"{len(slots)}", "Tie nodes that are alike.")
        return dict(zip(slots, others, strict=True))

    def _mask(
        self,
        name: str,
        mask: Any,
        places: Places,
        predictions: Mapping[str, Tensor],
        batch_size: int,
        given: dict[str, Tensor],
        masks: dict[str, Tensor],
    ) -> None:
        where = self.at("mask", name)
        slots = places.slots(where, name)
        for slot, part in zip(slots, self._parts(where, slots, mask), strict=True):
            if slot not in given and name not in places.inputs:
                raise ConfigurationError(
                    where, "no value", "a value in clamp, of which the mask says what is given", "Clamp it, too."
                )
            value = predictions[slot]  # of a free input: what the call was given
            masks[slot] = _as_mask(where, part, value, batch_size)
            given.setdefault(slot, value.detach())
            given[slot] = torch.where(masks[slot], given[slot], torch.zeros((), dtype=value.dtype, device=value.device))
            if masks[slot].all():
                del masks[slot]
            elif not masks[slot].any():
                del masks[slot], given[slot]

    def _check_free(
        self, places: Places, given: Mapping[str, Tensor], masks: Mapping[str, Tensor], ties: Mapping[str, str]
    ) -> None:
        for name in self.free:
            whole = [s for s in places.slots(f"{self.where}(free=[{name!r}])", name) if s in given and s not in masks]
            if whole:
                raise ConfigurationError(
                    f"{self.where}(free=[{name!r}])",
                    f"{name!r}, which is clamped",
                    "a value that is clamped or free",
                    "Leave it out of one of the two, or give a mask for the part that is clamped.",
                )
        twice = sorted(ties.keys() & given.keys())
        if twice:
            raise ConfigurationError(
                f"{self.where}(clamp=...)",
                f"{', '.join(twice)} clamped to data and to another node",
                "each value clamped once",
                "Leave one of the two out.",
            )


def nothing_is_empty(given: Any) -> Any:
    """An argument that was left out, as an empty mapping."""
    return {} if given is None else given


def by_name(where: str, given: Any) -> Mapping[str, Any]:
    """Raises :class:`ConfigurationError` for what is no mapping."""
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        got = f"a {kind} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {kind}"
        argument = where.rpartition("(")[2].removesuffix("=...)")
        raise ConfigurationError(where, got, "a dict by name", f'For example {argument}={{"output": ...}}.')
    return given


def check_parts(where: str, pattern: Pattern, graph: EnergyGraph, energies: Mapping[str, Energy]) -> None:
    """Raises :class:`ConfigurationError` for a value that is given in part and whose energy joins its entries."""
    for slot in pattern.masks:
        name = graph.owner[slot].name
        energy = energies.get(name)
        if energy is not None and not energy.entrywise:
            raise ConfigurationError(
                f"{where}, a part of {name!r}",
                f"{energy!r}, which joins the entries of a value",
                "an energy that is a sum over entries, for example Gaussian(precision)",
                "Give the whole value, or another energy; one of your own may set entrywise = True.",
            )


def check_something_moves(where: str, pattern: Pattern, places: Places) -> None:
    """Raises :class:`ConfigurationError` where every value and every output is given."""
    graph = places.graph
    outputs = [slot for slot in graph.output_slots if not pattern.is_whole(slot)]
    hidden = [slot for node in graph.hidden_nodes for slot in node.slots if not pattern.is_whole(slot)]
    if not outputs and not hidden:
        raise ConfigurationError(
            where, "nothing free", "a node, an input or an output that is not clamped", "Leave a value free."
        )


def check_determined(
    where: str, pattern: Pattern, places: Places, energies: Mapping[str, Energy], sizes: Mapping[str, Tensor]
) -> None:
    """Whether a free input without a prior has a lowest energy of its own, in every sample.

    Raises:
        ConfigurationError: where it has more entries than there are data that could decide them.
    """
    for node in places.graph.hidden_nodes:
        if not isinstance(energies.get(node.name), Flat):
            continue
        rows = len(sizes[node.slots[0]]) if sizes[node.slots[0]].ndim else 1
        free = sum((_free(pattern, sizes[slot], slot, rows) for slot in node.slots), start=torch.zeros(rows))
        others = [slot for slot in pattern.given if slot not in node.slots]
        known = sum((_given(pattern, slot, rows) for slot in others), start=torch.zeros(rows))
        lacking = torch.nonzero(free > known).flatten().tolist()
        if lacking:
            in_samples = "" if len(lacking) == rows else f" in {len(lacking)} of {rows} samples ({lacking[0]}, ...)"
            raise ConfigurationError(
                f"{where}(free=[{node.name!r}])",
                f"{int(free[lacking[0]])} free entries a sample without a prior, and {int(known[lacking[0]])} given "
                f"ones that could decide them{in_samples}",
                "an energy with one lowest point",
                f"Give a prior, for example prior={{{node.name!r}: torch2ebm.Gaussian()}}, or say by start= near which "
                "point to look.",
            )


def _free(pattern: Pattern, value: Tensor, slot: str, rows: int) -> Tensor:
    """How many entries of each sample are free."""
    if pattern.is_whole(slot):
        return torch.zeros(rows)
    return _in_rows(~pattern.masks.get(slot, torch.zeros(value.shape, dtype=torch.bool)), rows)


def _given(pattern: Pattern, slot: str, rows: int) -> Tensor:
    """How many entries of each sample are given."""
    return _in_rows(pattern.masks.get(slot, torch.ones(pattern.given[slot].shape, dtype=torch.bool)), rows)


def _in_rows(which: Tensor, rows: int) -> Tensor:
    batched = which.ndim > 0 and len(which) == rows
    counts = which.reshape(rows, -1).sum(1) if batched else which.sum().expand(rows)
    return counts.to(device="cpu", dtype=torch.float32)


def _as_mask(where: str, mask: Any, value: Tensor, batch_size: int) -> Tensor:
    shape = tuple(value.shape)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        short = shape[:1] == (batch_size,) and tuple(mask.shape) == shape[1:]
        if short or tuple(mask.shape) == shape:
            return mask.to(value.device).expand(shape)
    got = f"shape {tuple(mask.shape)}, {mask.dtype!s}" if isinstance(mask, Tensor) else type(mask).__name__
    rows = isinstance(mask, Tensor) and tuple(mask.shape) == shape[:1]
    raise ConfigurationError(
        where,
        got,
        f"a bool tensor of shape {shape}, or of shape {shape[1:]} for all samples",
        f"One for each sample is mask.reshape({', '.join(['-1', *['1'] * (len(shape) - 1)])}).expand{shape}."
        if rows
        else "True is given.",
    )


def _check_finite(where: str, value: Tensor, mask: Tensor | None) -> None:
    known = value if mask is None else value[mask]
    if not torch.isfinite(known).all():
        bad = int((~torch.isfinite(known)).sum())
        raise NonFiniteError(where, f"{bad} of {known.numel()} not finite", "finite numbers", "Mask what is missing.")


def _resolved(
    ties: Mapping[str, str], given: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Ties to what is given are given, and ties to what is tied go on to where that leads."""
    found: dict[str, str] = {}
    more: dict[str, Tensor] = {}
    for slot, other in ties.items():
        seen = {slot}
        while other in ties and other not in seen:
            seen.add(other)
            other = ties[other]
        if other in seen:
            raise ConfigurationError(
                "clamp={node: the name of another node}",
                f"a ring of ties through {other}",
                "one value",
                "Cut the ring.",
            )
        if other in masks:
            raise ConfigurationError(
                f"clamp={{...: {other!r}}}",
                "a node that is clamped in part",
                "one that is free or clamped",
                "Tie another.",
            )
        if other in given:
            more[slot] = given[other]
        else:
            found[slot] = other
    return found, more
