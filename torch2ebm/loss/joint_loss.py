"""One loss on the outputs of several calls that relax side by side: evaluated at the predictions of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch2ebm.engine.call import pull_back
from torch2ebm.loss.output_loss import LossExpansion, OutputLoss
from torch2ebm.loss.replayed_loss import ReplayedLoss, expansion_of, present

Predictions = Mapping[str, Tensor]  # by output slot of one call
Evaluated = tuple[Tensor, dict[str, Tensor]]


class JointLoss(OutputLoss):
    """What one of the calls sees of the loss.

    F of all calls is the sum of their errors' energies, plus B times the loss where it is a mean. B is the batch of a
    call, so a loss that is a sum of one mean loss for each call gives each call what it would have alone.

    Args:
        loss: The loss of this call, with the others standing still.
        delivered: Gradient of the loss in each output slot of this call.
        ask: From what shall be evaluated, ``gradients`` or ``expanded``, and this call's predictions to the result.
    """

    def __init__(self, loss: ReplayedLoss, delivered: Predictions, ask: Callable[[tuple[str, Predictions]], Any]):
        self.delivered, self.factor, self.scale, self.unit = delivered, loss.factor, loss.scale, loss.unit
        self._ask = ask

    def gradients(self, predictions: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self._ask(("gradients", predictions))  # type: ignore[no-any-return]

    def expanded(self, predictions: Mapping[str, Tensor]) -> LossExpansion:
        return self._ask(("expanded", predictions))  # type: ignore[no-any-return]


class Joined:
    """The predictions of several calls, as far as they have moved, and the loss there.

    Args:
        losses: That of each call, with the others standing still: all from one tape, with the same scalars.
    """

    def __init__(self, losses: Sequence[ReplayedLoss]) -> None:
        self.losses = losses
        self._predictions: list[Predictions] = [
            {slot: loss.call.values[slot] for slot in loss.call.graph.output_slots} for loss in losses
        ]
        self.delivered = [
            {slot: gradient * loss.scale for slot, gradient in gradients.items()}
            for loss, (_, gradients) in zip(losses, self._gradients(), strict=True)
        ]

    def answers(self, asked: Mapping[int, tuple[str, Predictions]]) -> dict[int, Any]:
        """What :class:`JointLoss` asks for, by the number of the call; those that ask no more stand still."""
        for number, (_, predictions) in asked.items():
            self._predictions[number] = predictions
        found = self._gradients() if any(what == "gradients" for what, _ in asked.values()) else []
        return {n: found[n] if what == "gradients" else self._expanded(n) for n, (what, _) in asked.items()}

    def _gradients(self) -> list[Evaluated]:
        leaves = self._leaves(range(len(self.losses)))
        values = self._values(leaves)
        weights = self._weights(values)
        everything = [leaf for of_call in leaves for leaf in of_call.values() if leaf.requires_grad]
        gradients = dict(zip(map(id, everything), pull_back(values, weights, everything), strict=True))
        total = _total([value.detach() for value in values], weights)
        results = []
        for loss, of_call in zip(self.losses, leaves, strict=True):
            found = [gradients.get(id(leaf)) for leaf in of_call.values()]
            if any(value.is_complex() for value in values):  # torch gives the conjugate of a holomorphic derivative
                found = [None if each is None else each.conj() for each in found]
            scaled = [None if each is None else each * loss.multiplier for each in found]
            results.append((total * loss.multiplier, present(of_call, scaled)))
        return results

    def _expanded(self, number: int) -> LossExpansion:
        """Around the predictions of one call; those of the others stand still."""
        leaves = self._leaves([number])
        values = self._values(leaves)
        with torch.enable_grad():
            total = _total(values, self._weights(values)) * self.losses[number].multiplier
        return expansion_of(total, {slot: leaf for slot, leaf in leaves[number].items() if leaf.requires_grad})

    def _leaves(self, moving: Sequence[int] | range) -> list[dict[str, Tensor]]:
        return [
            {
                slot: each.detach().requires_grad_(number in moving and (each.is_floating_point() or each.is_complex()))
                for slot, each in predictions.items()
            }
            for number, predictions in enumerate(self._predictions)
        ]

    def _values(self, leaves: Sequence[Predictions]) -> list[Tensor]:
        first = self.losses[0]
        own = [place for loss in self.losses for place in loss.own]
        with torch.enable_grad():
            return first.tape.replay(own, [leaf for of_call in leaves for leaf in of_call.values()], first.places)

    def _weights(self, values: Sequence[Tensor]) -> list[Tensor]:
        relative = self.losses[0].relative
        return [torch.full_like(value.detach(), each) for each, value in zip(relative, values, strict=True)]


def _total(values: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    parts = [(value * weight).reshape(()) for value, weight in zip(values, weights, strict=True)]
    return torch.stack(parts).sum()
