"""Which slots of a graph are given, wholly or in part, and which carry the value of another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pattern:
    """What is given, by slot.

    Attributes:
        given: The value of a clamped slot, in its shape. Where a mask is False it is not read.
        masks: For a slot that is clamped in part: True where the value is given, in its shape.
        ties: For a slot whose value is that of another slot: this one. Both predictions then pull on one value.
        carried: Slots of outputs that get a value of their own, which may leave the prediction.

    Example:
        >>> import torch
        >>> from torch2ebm.clamping.pattern import Pattern
        >>> Pattern(given={"linear": torch.zeros(5, 3)}).kind
        ('clamped: linear',)
    """

    given: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    carried: frozenset[str] = frozenset()

    @property
    def kind(self) -> tuple[str, ...]:
        """What a rewritten graph depends on: no numbers."""
        return (
            *(f"clamped: {slot}" for slot in sorted(self.given) if slot not in self.masks),
            *(f"in part: {slot}" for slot in sorted(self.masks)),
            *(f"tied: {slot} = {other}" for slot, other in sorted(self.ties.items())),
            *(f"carried: {slot}" for slot in sorted(self.carried)),
        )

    def is_whole(self, slot: str) -> bool:
        """Whether nothing of the slot's value is left to move."""
        return (slot in self.given and slot not in self.masks) or slot in self.ties

    def is_data(self, slot: str) -> bool:
        """Whether the slot's prediction is held against something that is given."""
        return slot in self.given or slot in self.ties


def given_name(slot: str) -> str:
    """What the given value of a slot is called among the constants of a call."""
    return f"{slot}|given"


def mask_name(slot: str) -> str:
    return f"{slot}|mask"


def data_name(name: str) -> str:
    """What a node or a slot is called where its prediction is held against what is given."""
    return f"{name}|data"


def value_name(slot: str) -> str:
    """What the value of a tied slot is called where both predictions meet."""
    return f"{slot}|value"
