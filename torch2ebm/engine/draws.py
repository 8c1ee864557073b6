"""The mean of local gradients over the draws of a sampler."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from torch2ebm.engine.results import LocalGradients


class MeanGradients:
    """Adds up the gradients of draws.

    Example:
        >>> from torch2ebm.engine.draws import MeanGradients
        >>> MeanGradients().count
        0
    """

    def __init__(self) -> None:
        self.count = 0
        self._parameters: dict[str, Tensor] = {}
        self._learned: dict[str, Tensor] = {}
        self._inputs: list[Tensor | None] = []

    def add(self, found: LocalGradients) -> None:
        """One draw."""
        self.count += 1
        for total, gradients in ((self._parameters, found.parameters), (self._learned, found.learned)):
            for name, gradient in gradients.items():
                total[name] = total[name] + gradient if name in total else gradient
        sums = self._inputs or [None] * len(found.inputs)
        self._inputs = [_sum(*pair) for pair in zip(sums, found.inputs, strict=True)]

    def of(self, last: LocalGradients) -> LocalGradients:
        """The mean of all draws, with the state of the last one."""
        parameters = {name: total / self.count for name, total in self._parameters.items()}
        learned = {name: total / self.count for name, total in self._learned.items()}
        inputs = [None if total is None else total / self.count for total in self._inputs]
        return replace(last, parameters=parameters, inputs=inputs, learned=learned)


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None else total if part is None else total + part
