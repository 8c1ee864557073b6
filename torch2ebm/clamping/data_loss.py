"""The energies of what is given: each prediction is held against its data, as an output is against a target."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch2ebm.common.nested import settings_of
from torch2ebm.engine.call import at_least_single
from torch2ebm.engine.energies import Energy, Gaussian
from torch2ebm.loss.output_loss import LossExpansion, OutputLoss
from torch2ebm.potentials.energy_parameters import tensors_of


@dataclass(frozen=True, eq=False)
class Data:
    """What one prediction is held against.

    Attributes:
        energy: phi(value, prediction).
        value: What is given, in the prediction's shape; None where another slot has it.
        mask: True where it is given; None for everywhere.
        slot: Where the value is the prediction of another slot (a tie): this one.
    """

    energy: Energy
    value: Tensor | None = None
    mask: Tensor | None = None
    slot: str = ""

    def error(self, prediction: Tensor, value: Tensor) -> Tensor:
        """Value minus prediction; zero where nothing is given."""
        error = value - prediction
        return error if self.mask is None else torch.where(self.mask, error, 0.0)


class DataLoss(OutputLoss):
    """The sum over samples of phi(data, prediction), for each prediction that is held against data.

    Args:
        data: By output slot.
        predictions: By slot, where ``delivered`` is taken; without them nothing is delivered.

    Example:
        >>> import torch, torch2ebm
        >>> from torch2ebm.clamping.data_loss import Data, DataLoss
        >>> loss = DataLoss({"output": Data(torch2ebm.Gaussian(), torch.ones(5, 3))})
        >>> value, gradients = loss.gradients({"output": torch.zeros(5, 3)})
        >>> float(value), gradients["output"].unique()
        (7.5, tensor([-1.]))
    """

    scale, unit, factor = 1.0, 1.0, 1.0

    def __init__(self, data: Mapping[str, Data], predictions: Mapping[str, Tensor] | None = None) -> None:
        self.data = data
        # which outputs it reads: a curvature is measured on these
        self.delivered: Mapping[str, Tensor] = {} if predictions is None else self.gradients(predictions)[1]

    def gradients(self, predictions: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        total, found = torch.zeros(()), dict[str, Tensor]()
        with torch.no_grad():  # the energy's own parameters may require one
            for slot, data, prediction, error in self._held(predictions):
                own, back = data.energy.gradients(error, prediction)
                total = total.to(prediction) + data.energy.of_batch(error, prediction)
                _add(found, slot, -back)
                if data.slot:
                    _add(found, data.slot, own)
        return total, found

    def expanded(self, predictions: Mapping[str, Tensor]) -> LossExpansion:
        value, gradients = self.gradients(predictions)

        def product(direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
            with torch.enable_grad():
                at = {s: at_least_single(p).requires_grad_() for s, p in predictions.items() if s in gradients}
                slopes = torch.autograd.grad(self._energy(at), list(at.values()), create_graph=True, allow_unused=True)
                along = sum(
                    (
                        (slope * direction[s].to(slope)).sum()
                        for s, slope in zip(at, slopes, strict=True)
                        if s in direction
                    ),
                    start=torch.zeros(()),
                )
                if not along.requires_grad:
                    return {s: torch.zeros_like(p) for s, p in at.items()}
                products = torch.autograd.grad(along, list(at.values()), allow_unused=True)
            pairs = zip(at.items(), products, strict=True)
            return {s: torch.zeros_like(p) if found is None else found for (s, p), found in pairs}

        return LossExpansion(value, gradients, product)

    def _energy(self, predictions: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        for _, data, prediction, error in self._held(predictions):
            total = total.to(prediction) + data.energy.of_batch(error, prediction)
        return total

    def _held(self, predictions: Mapping[str, Tensor]) -> Iterator[tuple[str, Data, Tensor, Tensor]]:
        """Each prediction by its slot, with what it is held against and its error."""
        for slot, data in self.data.items():
            prediction = at_least_single(predictions[slot], detach=False)
            value = predictions[data.slot] if data.slot else data.value
            assert value is not None
            yield slot, data, prediction, data.error(prediction, value.to(prediction))

    def program_inputs(self) -> tuple[Hashable, list[Tensor]] | None:
        kinds = tuple((slot, each.slot, settings_of(each.energy)) for slot, each in self.data.items())
        own = [tensor for each in self.data.values() for tensor in tensors_of(each.energy)]
        given = [tensor for each in self.data.values() for tensor in (each.value, each.mask)]
        return ("data", kinds), [tensor for tensor in [*given, *own] if isinstance(tensor, Tensor)]


class WithData(OutputLoss):
    """A loss, and the energies of what is given beside it.

    Args:
        loss: That of the user.
        data: In the units of the energy; it is part of the energy, and no nudge multiplies it.
    """

    def __init__(self, loss: OutputLoss, data: DataLoss) -> None:
        self.loss, self.data = loss, data
        self.delivered, self.factor = {**data.delivered, **loss.delivered}, loss.factor
        self.scale, self.unit = loss.scale, loss.unit

    def gradients(self, predictions: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        value, gradients = self.loss.gradients(predictions)
        more, beside = self.data.gradients(predictions)
        return value + more.to(value), _sum(gradients, beside)

    def expanded(self, predictions: Mapping[str, Tensor]) -> LossExpansion:
        one, other = self.loss.expanded(predictions), self.data.expanded(predictions)
        return LossExpansion(
            one.value + other.value.to(one.value),
            _sum(one.gradients, other.gradients),
            lambda direction: _sum(one.hessian_product(direction), other.hessian_product(direction)),
        )

    def program_inputs(self) -> tuple[Hashable, list[Tensor]] | None:
        one, other = self.loss.program_inputs(), self.data.program_inputs()
        return None if one is None or other is None else ((one[0], other[0]), [*one[1], *other[1]])


def _sum(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    total = dict(one)
    for slot, part in other.items():
        _add(total, slot, part)
    return total


def _add(total: dict[str, Tensor], slot: str, part: Tensor) -> None:
    total[slot] = total[slot] + part if slot in total else part


UNIT = Gaussian()  # what a node without an entry has
