"""Parameters and buffers that hold a NaN or an infinity, noticed before they are hidden by a clamp or a tanh."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

from torch import Tensor

from torch2ebm.engine.finite import check_standing

OFTEN = 16  # steps of the optimizer from one look at all parameters to the next


class Standing:
    """Whether parameters and buffers are finite, looked at when somebody has written them.

    One look reads every parameter, which takes as long as a layer of a small batch. So the optimizer's own steps, which
    check the gradients, are followed by a look after the 1st, 2nd, 4th, ... and then after every sixteenth.
    """

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.versions: list[int] = []
        self.steps = 0

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise :class:`NonFiniteError` with the name of the first that is not finite."""
        now = list(tensors.values())
        versions = versions_of(now)
        if versions == self.versions and all(map(operator.is_, now, self.seen)):
            return
        check_standing(tensors)
        self.seen, self.versions = now, versions

    def stepped(self) -> None:
        """The optimizer has made a step."""
        self.steps += 1
        if self.steps % OFTEN and self.steps & (self.steps - 1):
            self.versions = versions_of(self.seen)


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """How often each tensor was written in place; those of inference mode do not count, and stand at -1."""
    tensors = list(tensors)
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
