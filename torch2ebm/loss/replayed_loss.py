"""The loss of one backward, replayed from its tape at other predictions."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from torch2ebm.engine.call import Call, pull_back
from torch2ebm.errors import LossNotRecordedError, LossReductionError, LossReplayError
from torch2ebm.loss.opened import opened
from torch2ebm.loss.output_loss import LossExpansion, OutputLoss
from torch2ebm.loss.reduction import (
    is_sum_over_calls,
    made_by_sum,
    of_rows,
    rows_of_targets,
    terms_of_a_sample,
)
from torch2ebm.loss.tape import Place, Scalar, Tape, TapeEntry


class ReplayedLoss(OutputLoss):
    """The scalars that backward was called on, replayed at other predictions.

    The energy takes them whole. Factors that are no part of a loss (a gradient scaler's, a trainer's division for
    accumulation, the gradient that ``backward(gradient)`` is given) scale gradients alone.

    Args:
        call: The call whose outputs the loss was computed from.
        tape: What was done to them.
        delivered: Gradient of the loss in each output slot, as autograd delivered it.
        reduction: ``"mean"``, ``"sum"``, or None: as the loss itself was reduced.
        asked_by: Name of the algorithm, for errors.
        accumulation: What the user's own loop divides the loss by, and which is no part of it.
    """

    def __init__(
        self,
        call: Call,
        tape: Tape,
        delivered: Mapping[str, Tensor],
        reduction: str | None,
        asked_by: str,
        accumulation: int = 1,
    ) -> None:
        self.call, self.own, self.tape, self.delivered = call, tape.outputs, tape.whole(), delivered
        self.reduction, self.asked_by = reduction, asked_by
        task = torch._C._current_graph_task_id()
        self.scalars = self.tape.roots(task)
        self.places = [scalar.place for scalar in self.scalars]
        self._entries = self.tape.leading_to(self.places)
        self.summed = made_by_sum(self._entries, self.places, call.batch_size)
        # losses of samples that backward was called on as a vector: each enters the energy of its sample as it is
        self._of_rows = of_rows(self._entries, self.places)
        self.multiplier = self._multiplier()
        outside = factors_outside(self._entries, self.scalars)
        self._followed = self.tape.followed_by(task)
        common = max([*outside, *factors_after(self._followed, task)], default=1.0)
        # a common factor scales gradients; its sign, and the ratios between several scalars, enter the energy
        self.relative = [
            accumulation * math.copysign(_share(factor, common), scalar.given or 1.0)
            for scalar, factor in zip(self.scalars, outside, strict=True)
        ]
        self.factor = common / accumulation
        # .grad = factor dF/dtheta / B for a mean, since the energy holds sum_b loss_b = B L
        self.scale = self.factor / self.multiplier
        # a loss times 0 delivers zeros, which no unit can undo
        self.unit = self.multiplier / self.factor if self.factor else 0.0
        self._weights: list[Tensor] | None = None
        self._pulls: dict[str, Tensor] = {}  # by slot: what later calls send back, in the units of the energy

    @property
    def magnified(self) -> bool:
        """Whether a factor above one, as a gradient scaler's, stands before the loss."""
        return not self.factor <= 1  # not ... <=: NaN is magnified

    @property
    def finite(self) -> bool:
        """Whether the loss is a number, as it was before a gradient scaler multiplied it."""
        scaled = {entry.results[0]: entry.reads[0] for entry in self._entries if entry.operation.factor is not None}
        values = {scalar.place: scalar.value for scalar in self.tape.scalars}
        places = list(self.places)
        while any(place in scaled for place in places):
            places = [scaled.get(place, place) for place in places]
        return all(bool(values[place].isfinite().all()) for place in places if place in values)

    @property
    def mixed_with(self) -> set[Place]:
        """Outputs of other calls that the loss joins with those of this one, and is no sum of a part for each."""
        if self._followed:  # what was given to another call relaxes after it
            return set()
        others = self.tape.moving(self.places) & (self.tape.values.keys() - set(self.own))
        return others if others and not is_sum_over_calls(self._entries, self.own, others) else set()

    @property
    def is_mean(self) -> bool:
        """Whether it is taken for a mean over the batch, so that the batch size weighs it."""
        return self.reduction == "mean" and not self._of_rows

    @property
    def target_rows(self) -> list[int]:
        """How many rows the targets of torch's losses have in it."""
        return rows_of_targets(self._entries)

    @property
    def loss_weight(self) -> float:
        """lambda: the weight of a sample's own loss in the energy."""
        return self.multiplier / (1 if self.summed or self._of_rows else self.call.batch_size)

    @property
    def loss_terms(self) -> float:
        """How many terms the loss averages for each sample."""
        return terms_of_a_sample(self._entries, self.call.batch_size)

    def _multiplier(self) -> int:
        reduction = self.reduction
        if reduction is None:  # an algorithm that needs no loss: errors in the units of the loss that was seen
            reduction = "sum" if self.summed else "mean"
        return self.call.batch_size if reduction == "mean" and not self._of_rows else 1

    def gradients(self, predictions: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        values, leaves = self._replayed(predictions)
        found = pull_back(values, self._weights_of(values), list(leaves.values()))
        if any(value.is_complex() for value in values):  # torch gives the conjugate of a holomorphic derivative
            found = [None if each is None else each.conj() for each in found]
        return self._pulled(self._total([value.detach() for value in values]), present(leaves, found), predictions)

    def expanded(self, predictions: Mapping[str, Tensor]) -> LossExpansion:
        values, leaves = self._replayed(predictions)
        with torch.enable_grad():
            total = self._total(values)
        around = expansion_of(total, leaves)
        value, gradients = self._pulled(around.value, dict(around.gradients), predictions)
        return LossExpansion(value, gradients, around.hessian_product)

    def _pulled(
        self, value: Tensor, gradients: dict[str, Tensor], predictions: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """With what the calls send back that were given this one's outputs: a pull that stands still."""
        for slot, pull in self._pulls.items():
            value = value + (pull * predictions[slot].detach()).sum()
            gradients[slot] = gradients[slot] + pull if slot in gradients else pull
        return value, gradients

    def program_inputs(self) -> tuple[Hashable, list[Tensor]] | None:
        if not self._opened():
            return None
        on_tape = self.tape.program_inputs(self.own, self.places)
        if on_tape is None:
            return None
        settings, tensors = on_tape
        return (self.multiplier, tuple(self.delivered), tuple(self._pulls), settings), [
            *tensors,
            *(self._weights or []),  # there since the loss was checked
            *self._pulls.values(),
        ]

    def _opened(self) -> bool:
        """Whether what replays is torch's own, if need be with the inside of an EnergyLoss in its place."""
        closed, found = self.tape.replay_of(self.own, self.places), opened(self.tape, self.own, self.places)
        if found is None or found.writes:
            return False
        if found is closed:
            return True
        self.tape.take(self.own, found)
        predictions = {slot: self.call.values[slot] for slot in self.call.graph.output_slots}
        _, gradients = self.gradients(predictions)
        ours = {slot: gradients.get(slot, torch.zeros_like(each)) for slot, each in self.delivered.items()}
        if all(_agree(ours[slot] * self.scale, each) for slot, each in self.delivered.items()):
            return True
        self.tape.take(self.own, closed)  # it does more than the tape has seen
        return False

    def _total(self, values: Sequence[Tensor]) -> Tensor:
        if not values:  # no loss but what later calls send back
            return torch.zeros((), device=self.call.device)
        parts = [value * weight for value, weight in zip(values, self._weights_of(values), strict=True)]
        return parts[0].reshape(()) if len(parts) == 1 else torch.stack([part.reshape(()) for part in parts]).sum()

    def _weights_of(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Tensors, so that coefficients which change from batch to batch are no settings of a program."""
        if self._weights is None:
            self._weights = [
                torch.full_like(value.detach(), self.multiplier * factor)
                for factor, value in zip(self.relative, values, strict=True)
            ]
        return self._weights

    def _replayed(self, predictions: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The scalars at other predictions, and the leaves that a gradient is wanted for, by slot."""
        slots = self.call.graph.output_slots
        # no leaf for an output that the loss does not read: autograd delivered nothing for it
        leaves = [predictions[slot].detach().requires_grad_(slot in self.delivered) for slot in slots]
        with torch.enable_grad():
            values = self.tape.replay(self.own, leaves, self.places)
        return values, {slot: leaf for slot, leaf in zip(slots, leaves, strict=True) if leaf.requires_grad}

    def check(self) -> None:
        """Raise unless the replayed loss has autograd's gradient at the feed-forward prediction."""
        self._check_followed()
        self._check_reduction()
        predictions = {slot: self.call.values[slot] for slot in self.call.graph.output_slots}
        try:
            _, gradients = self.gradients(predictions)
        except (RuntimeError, TypeError, ValueError) as error:
            raise self._refusal(f"an error when evaluated again: {error}") from error
        for slot, expected in self.delivered.items():
            ours = gradients.get(slot)
            ours = torch.zeros_like(expected) if ours is None else ours * self.scale
            if _agree(ours, expected):
                continue
            if self._followed:
                self._pulls[slot] = (expected - ours) * self.unit
            elif not self._agree_but_for_rounding(slot, ours, expected, predictions):
                worst = float((ours - expected).abs().max())
                raise self._refusal(f"a gradient in output '{slot}' that differs by up to {worst:.3g}")

    def _agree_but_for_rounding(
        self, slot: str, ours: Tensor, expected: Tensor, predictions: Mapping[str, Tensor]
    ) -> bool:
        """Whether the two differ by what rounding makes of a gradient that is zero, as that of a KL to a copy.

        Predictions that differ in their last digits tell how much that is.
        """
        _, again = self.gradients(predictions)
        _, gradients = self.gradients({name: _perturbed(each) for name, each in predictions.items()})
        if slot not in gradients or not torch.equal(again[slot] * self.scale, ours):  # as of one that draws numbers
            return False
        rounding = (gradients[slot] * self.scale - ours).abs().max()
        return bool((ours - expected).abs().max() <= 100 * rounding)

    def _check_followed(self) -> None:
        """Raise unless backward was called on scalars on the tape."""
        if not self.scalars and not self._followed:
            raise self._not_recorded("no loss of one number that was computed from the model's output")
        for scalar in self.scalars:
            if scalar.unexplained is not None:
                raise self._refusal(f"a loss with a factor of {scalar.unexplained:.3g} that is not on the tape")

    def _not_recorded(self, got: str) -> LossNotRecordedError:
        return LossNotRecordedError(
            "loss.backward()",
            got,
            f"one, since {self.asked_by} evaluates the loss again while predictions move",
            "Reduce the loss to one number, or wrap the loss function: torch2ebm.EnergyLoss(loss_fn).",
        )

    def _check_reduction(self) -> None:
        # of one sample a sum is the mean, too
        if self.summed and self.call.batch_size > 1 and self.reduction == "mean":
            raise LossReductionError(
                "loss.backward()",
                f"a loss made by a sum, over a batch of {self.call.batch_size}",
                "a mean over the batch (loss_reduction='mean')",
                f"Give {self.asked_by}(..., loss_reduction='sum'), take the mean, or divide by len(x).",
            )

    def _refusal(self, got: str) -> LossReplayError:
        return LossReplayError(
            "loss.backward()",
            got,
            "the gradient that autograd delivered",
            "The loss uses the model's output through something that is not on the tape, or draws random numbers; "
            "wrap the loss function: torch2ebm.EnergyLoss(loss_fn).",
        )


def expansion_of(total: Tensor, leaves: Mapping[str, Tensor]) -> LossExpansion:
    """Of a loss whose graph is still there, around the leaves that it was computed from."""
    # differentiable once more, for products with the Hessian
    found = torch.autograd.grad(total, list(leaves.values()), create_graph=True, allow_unused=True)
    curved = present(leaves, found)

    def hessian_product(direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pairs = [(g, direction[slot]) for slot, g in curved.items() if g.requires_grad and slot in direction]
        if not pairs:
            return {}
        gradients, along = zip(*pairs, strict=True)
        wrt = list(leaves.values())
        return present(leaves, torch.autograd.grad(gradients, wrt, along, retain_graph=True, allow_unused=True))

    return LossExpansion(total.detach(), {slot: g.detach() for slot, g in curved.items()}, hessian_product)


def present(slots: Iterable[str], found: Iterable[Tensor | None]) -> dict[str, Tensor]:
    return {slot: gradient for slot, gradient in zip(slots, found, strict=True) if gradient is not None}


def factors_outside(entries: Sequence[TapeEntry], scalars: Sequence[Scalar]) -> list[float]:
    """What stands before each scalar and is no part of the loss."""
    factors: dict[Place, float] = {}
    for entry in entries:
        factor = next((factors[place] for place in entry.reads if place in factors), 1.0)
        if entry.operation.factor is not None:
            factor *= float(entry.operation.factor)
        if factor != 1.0:
            factors.update((place, factor) for place in entry.results if place is not None)
    given = [1.0 if scalar.given is None else abs(scalar.given) for scalar in scalars]
    return [factors.get(scalar.place, 1.0) * each for scalar, each in zip(scalars, given, strict=True)]


def factors_after(tapes: Iterable[Tape], task: int) -> list[float]:
    """What stands before the scalars of these tapes, and of those after them, and is no part of the loss."""
    found = []
    for tape in tapes:
        roots = tape.roots(task)
        found += factors_outside(tape.leading_to([root.place for root in roots]), roots)
        found += factors_after(tape.followed_by(task), task)
    return found


def _share(factor: float, common: float) -> float:
    if factor == common:  # of infinite and zero ones, too
        return 1.0
    return factor / common if common else 0.0


def _perturbed(prediction: Tensor) -> Tensor:
    """By a few of the last digits, up and down in turn: what is homogeneous in the prediction shall not hide it."""
    if not prediction.is_floating_point():
        return prediction
    turns = torch.arange(prediction.numel(), device=prediction.device) % 2 * 2 - 1
    return prediction * (1 + 8 * torch.finfo(prediction.dtype).eps * turns.reshape(prediction.shape).to(prediction))


def _agree(ours: Tensor, expected: Tensor) -> bool:
    tolerance = torch.finfo(expected.dtype).eps ** 0.5  # far above rounding, far below any real difference
    difference = (ours.double() - expected.double()).abs().max() if expected.numel() else torch.zeros(())
    scale = expected.double().abs().max() if expected.numel() else torch.zeros(())
    # zeros agree with zeros; infinite gradients are for the finite checks, or a gradient scaler, to handle
    return bool((difference <= tolerance * scale + 1e-300) | ~torch.isfinite(scale))
