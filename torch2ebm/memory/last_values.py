"""Where the values of one model have come to rest, for a batch that begins there: a sequence's next frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

FEEDFORWARD: Final = "feedforward"
LAST: Final = "last"
AVERAGE: Final = "average"
STARTS: Final = (FEEDFORWARD, LAST, AVERAGE)

Values = Mapping[str, Tensor]  # by slot


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean over samples of all batches: by slot, in the shape of one sample's value."""

    samples: int
    values: Values

    def with_batch(self, values: Values, batch_size: int) -> Mean:
        """The mean over one batch more. A value without a row for each sample has none."""
        rows = {slot: value.mean(0) for slot, value in values.items() if value.shape[:1] == (batch_size,)}
        total = self.samples + batch_size
        found = {}
        for slot, row in rows.items():
            before = self.values.get(slot)
            same = before is not None and before.shape == row.shape and before.device == row.device
            # not in place: a checkpoint may hold the mean of before
            found[slot] = torch.lerp(before.to(row), row, batch_size / total) if same and before is not None else row
        return Mean(total, found)


class LastValues:
    """The values at which the relaxations of one model have ended, by phase and slot; detached, and without inputs."""

    def __init__(self) -> None:
        self.last: dict[str, Values] = {}
        self.average: dict[str, Mean] = {}
        self.asked: set[str] = set()  # the phases that somebody wants to begin at, which checkpoints keep

    def forget(self) -> None:
        """The next batch begins at the feed-forward pass, as the first did."""
        self.last, self.average, self.asked = {}, {}, set()

    def state(self) -> dict[str, Any]:
        """For a checkpoint: dictionaries, numbers and tensors alone; empty where nothing is kept."""
        last = {phase: dict(values) for phase, values in self.last.items() if phase in self.asked}
        average = {phase: {"samples": m.samples, "values": dict(m.values)} for phase, m in self.average.items()}
        return {name: part for name, part in ((LAST, last), (AVERAGE, average)) if part}

    def load(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state` gave, and :func:`is_state` has looked at, copied."""
        self.forget()
        self.last = {phase: _copied(values) for phase, values in state.get(LAST, {}).items()}
        self.asked = set(self.last)
        means = state.get(AVERAGE, {}).items()
        self.average = {phase: Mean(mean["samples"], _copied(mean["values"])) for phase, mean in means}


def is_state(state: object) -> bool:
    """Whether it may be what :meth:`LastValues.state` has given."""
    if not isinstance(state, Mapping) or not set(state) <= {LAST, AVERAGE}:
        return False
    parts = [*_parts(state.get(LAST, {})), *_parts(state.get(AVERAGE, {}), inside="values")]
    return all(_is_values(part) for part in parts)


def _parts(phases: object, inside: str = "") -> list[object]:
    if not isinstance(phases, Mapping):
        return [None]
    found: list[object] = []
    for part in phases.values():
        if inside:
            count = part.get("samples") if isinstance(part, Mapping) else None
            counted = isinstance(count, int) and not isinstance(count, bool) and count > 0
            found.append(part.get(inside) if isinstance(part, Mapping) and counted else None)
        else:
            found.append(part)
    return found


def _is_values(part: object) -> bool:
    return isinstance(part, Mapping) and all(
        isinstance(slot, str) and isinstance(value, Tensor) and value.is_floating_point()
        for slot, value in part.items()
    )


def _copied(values: Values) -> Values:
    return {slot: value.detach().clone() for slot, value in values.items()}


class CallMemory:
    """What one call reads of its model's memory, and what it leaves there once its backward has gone well.

    Args:
        store: The model's; None for a call that neither reads nor leaves anything.
    """

    def __init__(self, store: LastValues | None = None) -> None:
        self.store = store
        self._found: list[tuple[str, str, Values, int, bool]] = []

    def start(self, kind: str, phases: tuple[str, ...], shapes: Mapping[str, torch.Size]) -> Values:
        """Where values begin; empty for the feed-forward pass, or where a shape is another.

        Args:
            kind: One of ``STARTS``.
            phases: The first of these that is there.
            shapes: Of the values of this call, by slot.
        """
        if self.store is None or kind == FEEDFORWARD:
            return {}
        if kind == LAST:
            kept = next((self.store.last[phase] for phase in phases if phase in self.store.last), {})
            found = {slot: value for slot, value in kept.items() if slot in shapes}
        else:
            mean = next((self.store.average[phase] for phase in phases if phase in self.store.average), Mean(0, {}))
            of_one = {slot: value for slot, value in mean.values.items() if slot in shapes}
            found = {s: v.expand(shapes[s]) for s, v in of_one.items() if v.shape == shapes[s][1:]}
            if len(found) < len(of_one):
                return {}
        # all or none: values of two batches would be no state of either
        return found if all(value.shape == shapes[slot] for slot, value in found.items()) else {}

    def offer(self, kind: str, phase: str, values: Values, batch_size: int, asked: bool = True) -> None:
        """What a phase has found; :meth:`commit` keeps it. Nobody has ``asked``: no checkpoint holds it."""
        if self.store is not None and kind != FEEDFORWARD:
            self._found.append((kind, phase, values, batch_size, asked))

    def commit(self) -> None:
        """The call has gone well."""
        found, self._found = self._found, []
        for kind, phase, values, batch_size, asked in found if self.store is not None else ():
            assert self.store is not None
            if asked:
                self.store.asked.add(phase)
            if kind == AVERAGE:
                mean = self.store.average.get(phase, Mean(0, {}))
                self.store.average[phase] = mean.with_batch(values, batch_size)
            else:
                self.store.last[phase] = values
