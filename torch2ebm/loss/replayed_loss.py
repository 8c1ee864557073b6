"""The loss of one backward, replayed from its tape at other predictions."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from torch2ebm.engine.call import Call, pull_back
from torch2ebm.errors import LossNotRecordedError, LossReductionError, LossReplayError
from torch2ebm.loss.output_loss import LossExpansion, OutputLoss
from torch2ebm.loss.tape import Scalar, Tape


def make_loss(
    call: Call, tape: Tape, delivered: Mapping[str, Tensor], reduction: str | None, asked_by: str
) -> ReplayedLoss:
    """The loss of this backward, not checked yet. It consumes the outer factors that the tape has seen."""
    # a scalar that a later loss has read counts in that loss
    scalars = [(scalar, _sum(scalar.factors)) for scalar in tape.scalars if scalar.factors and not scalar.absorbed]
    # a second backward through the same call brings its own factors
    for scalar in tape.scalars:
        scalar.factors = []
    return ReplayedLoss(call, tape, delivered, scalars, reduction, asked_by)


class ReplayedLoss(OutputLoss):
    """The scalars of one backward, with their outer factors, replayed at other predictions.

    Args:
        call: The call whose outputs the loss was computed from.
        tape: What was done to them.
        delivered: Gradient of the loss in each output slot, as autograd delivered it.
        scalars: The losses, each with the factor that it entered the backward with.
        reduction: ``"mean"``, ``"sum"``, or None: as the loss itself was reduced.
        asked_by: Name of the algorithm, for errors.
    """

    def __init__(
        self,
        call: Call,
        tape: Tape,
        delivered: Mapping[str, Tensor],
        scalars: Sequence[tuple[Scalar, float]],
        reduction: str | None,
        asked_by: str,
    ) -> None:
        self.call, self.tape, self.delivered = call, tape, delivered
        self.reduction, self.asked_by = reduction, asked_by
        self.scalars = [scalar for scalar, _ in scalars]
        factors = [factor for _, factor in scalars]
        outer = max(map(abs, factors), default=1.0)
        # a common factor scales gradients; its sign, and the ratios between several scalars, enter the energy
        self.relative = [factor / outer if outer else 0.0 for factor in factors]
        self.multiplier = self._multiplier()
        self.factor = outer
        # .grad = outer dF/dtheta / B for a mean, since the energy holds sum_b loss_b = B L
        self.scale = outer / self.multiplier
        # a loss times 0 delivers zeros, which no unit can undo
        self.unit = self.multiplier / outer if outer else 0.0
        self._weights: list[Tensor] | None = None

    @property
    def magnified(self) -> bool:
        """Whether an outer factor above one, as a gradient scaler's, stands before a loss."""
        return not self.factor <= 1  # not ... <=: NaN is magnified

    @property
    def finite(self) -> bool:
        return all(math.isfinite(scalar.value) for scalar in self.scalars)

    def _multiplier(self) -> int:
        reduction = self.reduction
        if reduction is None:  # an algorithm that needs no loss: errors in the units of the loss that was seen
            reduction = "sum" if any(scalar.summed for scalar in self.scalars) else "mean"
        return self.call.batch_size if reduction == "mean" else 1

    def gradients(self, predictions: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        values, leaves = self._replayed(predictions)
        found = pull_back(values, self._weights_of(values), list(leaves.values()))
        if any(value.is_complex() for value in values):  # torch gives the conjugate of a holomorphic derivative
            found = [None if each is None else each.conj() for each in found]
        return self._total([value.detach() for value in values]), _present(leaves, found)

    def expanded(self, predictions: Mapping[str, Tensor]) -> LossExpansion:
        values, leaves = self._replayed(predictions)
        with torch.enable_grad():
            total = self._total(values)
        # differentiable once more, for products with the Hessian
        found = torch.autograd.grad(total, list(leaves.values()), create_graph=True, allow_unused=True)
        curved = _present(leaves, found)

        def hessian_product(direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
            pairs = [(g, direction[slot]) for slot, g in curved.items() if g.requires_grad and slot in direction]
            if not pairs:
                return {}
            gradients, along = zip(*pairs, strict=True)
            wrt = list(leaves.values())
            return _present(leaves, torch.autograd.grad(gradients, wrt, along, retain_graph=True, allow_unused=True))

        return LossExpansion(total.detach(), {slot: g.detach() for slot, g in curved.items()}, hessian_product)

    def program_inputs(self) -> tuple[Hashable, list[Tensor]] | None:
        on_tape = self.tape.program_inputs([scalar.index for scalar in self.scalars])
        if on_tape is None:
            return None
        settings, tensors = on_tape
        return (self.multiplier, tuple(self.delivered), settings), [
            *tensors,
            *(self._weights or []),  # there since the loss was checked
        ]

    def _total(self, values: Sequence[Tensor]) -> Tensor:
        parts = [value * weight for value, weight in zip(values, self._weights_of(values), strict=True)]
        return parts[0] if len(parts) == 1 else torch.stack([part.reshape(()) for part in parts]).sum()

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
            values = self.tape.replay(leaves, [scalar.index for scalar in self.scalars])
        return values, {slot: leaf for slot, leaf in zip(slots, leaves, strict=True) if leaf.requires_grad}

    def check(self) -> None:
        """Raise unless the replayed loss has autograd's gradient at the feed-forward prediction."""
        if not self.scalars:
            raise LossNotRecordedError(
                "loss.backward()",
                self.tape.obstacle or "no loss of no dimension computed from the model's output",
                f"one, since {self.asked_by} evaluates the loss again while predictions move",
                "Reduce the loss to one number, or wrap the loss function: torch2ebm.EnergyLoss(loss_fn).",
            )
        self._check_reduction()
        predictions = {slot: self.call.values[slot] for slot in self.call.graph.output_slots}
        try:
            _, gradients = self.gradients(predictions)
        except (RuntimeError, TypeError, ValueError) as error:
            raise self._refusal(f"an error when evaluated again: {error}") from error
        for slot, expected in self.delivered.items():
            ours = gradients.get(slot)
            ours = torch.zeros_like(expected) if ours is None else ours * self.scale
            if not _agree(ours, expected):
                worst = float((ours - expected).abs().max())
                raise self._refusal(f"a gradient in output '{slot}' that differs by up to {worst:.3g}")

    def _check_reduction(self) -> None:
        summed = any(scalar.summed for scalar in self.scalars)  # of one sample a sum is the mean, too
        if summed and self.call.batch_size > 1 and self.reduction == "mean":
            raise LossReductionError(
                "loss.backward()",
                f"a loss made by a sum, over a batch of {self.call.batch_size}",
                "a mean over the batch (loss_reduction='mean')",
                f"Give {self.asked_by}(..., loss_reduction='sum'), or take the mean.",
            )

    def _refusal(self, got: str) -> LossReplayError:
        return LossReplayError(
            "loss.backward()",
            got,
            "the gradient that autograd delivered",
            "The loss uses the model's output through something that is not on the tape, or draws random numbers; "
            "wrap the loss function: torch2ebm.EnergyLoss(loss_fn).",
        )


def _present(slots: Iterable[str], found: Iterable[Tensor | None]) -> dict[str, Tensor]:
    return {slot: gradient for slot, gradient in zip(slots, found, strict=True) if gradient is not None}


def _sum(factors: Iterable[Tensor]) -> float:
    return sum(float(factor) for factor in factors)


def _agree(ours: Tensor, expected: Tensor) -> bool:
    tolerance = torch.finfo(expected.dtype).eps ** 0.5  # far above rounding, far below any real difference
    difference = (ours.double() - expected.double()).abs().max() if expected.numel() else torch.zeros(())
    scale = expected.double().abs().max() if expected.numel() else torch.zeros(())
    # zeros agree with zeros; infinite gradients are for the finite checks, or a gradient scaler, to handle
    return bool((difference <= tolerance * scale + 1e-300) | ~torch.isfinite(scale))
