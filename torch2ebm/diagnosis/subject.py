"""The model and the batch that are looked at: gradients and dry runs of algorithms that leave nothing behind."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.algorithms.given import given_to
from torch2ebm.common.nested import leaves_of
from torch2ebm.diagnosis.loss_scale import repeated
from torch2ebm.engine.call import Call
from torch2ebm.engine.results import InferenceState
from torch2ebm.errors import Torch2EBMError
from torch2ebm.isolation.module_state import plain_autograd, untouched
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.model.arguments import Arguments, of_batch
from torch2ebm.model.energy_model import EnergyModel

RISE = 100  # in units of the dtype's epsilon times the energy: what sums over a batch round to
WHERE = "torch2ebm.diagnose"


@dataclass(frozen=True, eq=False)
class Trial:
    """One backward of an algorithm on the batch.

    Attributes:
        algorithm: Which.
        gradients: By name, where there are any.
        state: What ``model.state`` would be; None where the algorithm was refused or ran away.
        error: Why, then.
    """

    algorithm: Algorithm
    gradients: Mapping[str, Tensor]
    state: InferenceState | None = None
    error: Torch2EBMError | None = None

    @property
    def rise(self) -> float:
        """The largest rise of the energy in a step, over the energy that the relaxation began with; 0 for none."""
        if self.state is None:
            return 0.0
        worst = 0.0
        for phase in self.state.phases or (self.state.relaxation,):
            for before, after in itertools.pairwise(phase.energy):
                worst = max(worst, (after - before) / (abs(phase.energy[0]) + 1e-300))
        return worst if worst > RISE * torch.finfo(self._dtype).eps else 0.0

    @property
    def _dtype(self) -> torch.dtype:
        predictions = {} if self.state is None else self.state.predictions
        return next((p.dtype for p in predictions.values() if p.is_floating_point()), torch.float32)


@dataclass(frozen=True)
class Subject:
    """A model of its own for the module that is looked at, and the batch."""

    model: EnergyModel
    batch: Any
    loss_fn: Callable[..., Tensor]

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.model.torch2ebm.module
        return module

    @property
    def batch_size(self) -> int:
        """Samples in the batch."""
        args, kwargs, _ = of_batch(WHERE, self.batch, self.loss_fn)
        return self.model.torch2ebm.looked_at(args, kwargs).batch_size

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """Gradients on, and at the end module and loss as they were; the same random numbers in each."""
        args, kwargs, _ = of_batch(WHERE, self.batch, self.loss_fn)
        device = Arguments.of(self.module, args, kwargs).device
        with ExitStack() as stack:
            stack.enter_context(plain_autograd())
            stack.enter_context(untouched(self.module, device))
            if isinstance(self.loss_fn, nn.Module):
                stack.enter_context(untouched(self.loss_fn, device))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # what they say is in the diagnosis
            yield

    def plain(self) -> tuple[Tensor, bool, dict[str, Tensor | None]]:
        """The loss, whether the output is finite, and backprop's gradients; None where no gradient comes."""
        args, kwargs, loss_of = of_batch(WHERE, self.batch, self.loss_fn)
        with self.left_alone():
            output = self.module(*args, **kwargs)
            loss = loss_of(output)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                return loss, _finite(output), dict.fromkeys(self.trained)
            found = torch.autograd.grad(loss, list(self.trained.values()), allow_unused=True)
        return loss.detach(), _finite(output), dict(zip(self.trained, found, strict=True))

    def of_copies(self, copies: int, dim: int, size: int) -> Tensor | None:
        """Backprop's gradient in one vector for so many copies of the batch, in evaluation mode; None if it fails."""
        if isinstance(self.batch, Mapping):
            batch: Any = repeated(dict(self.batch), copies, dim, size)
        else:
            batch = (repeated(self.batch[0], copies, dim, size), repeated(self.batch[1], copies, dim, size))
        with self.left_alone():
            try:
                self.module.eval()  # without dropout, and without the statistics of the batch
                args, kwargs, loss_of = of_batch(WHERE, batch, self.loss_fn)
                loss = loss_of(self.module(*args, **kwargs))
                found = torch.autograd.grad(loss, list(self.trained.values()), allow_unused=True)
            except Exception:  # whatever a loss makes of a batch that it was not written for
                return None
        return joined({n: g for n, g in zip(self.trained, found, strict=True) if g is not None})

    def call_and_loss(self, loss_reduction: str) -> tuple[Call, OutputLoss]:
        """The call and the loss that an algorithm's backward would get."""
        args, kwargs, loss_of = of_batch(WHERE, self.batch, self.loss_fn)
        lossy = lambda given: loss_of(self.model.torch2ebm.run(given, args, kwargs))  # noqa: E731
        return given_to(lossy, list(self.trained.values()), loss_reduction)

    def tried(self, algorithm: Algorithm) -> Trial:
        """One backward of an algorithm; what torch2ebm has against it is kept, errors of the user's are raised."""
        if is_dataclass(algorithm) and any(field.name == "on_divergence" for field in fields(algorithm)):
            algorithm = replace(algorithm, on_divergence="raise")
        args, kwargs, loss_of = of_batch(WHERE, self.batch, self.loss_fn)
        states: list[InferenceState] = []
        with self.left_alone():
            try:
                loss = loss_of(self.model.torch2ebm.run(algorithm, args, kwargs, states.append))
                found = torch.autograd.grad(loss, list(self.trained.values()), allow_unused=True)
            except Torch2EBMError as error:
                return Trial(algorithm, {}, error=error)
        gradients = {name: g for name, g in zip(self.trained, found, strict=True) if g is not None}
        return Trial(algorithm, gradients, states[-1] if states else None)


def joined(gradients: Mapping[str, Tensor]) -> Tensor:
    """All of them as one vector, in double precision."""
    parts = [gradient.detach().double().flatten() for gradient in gradients.values()]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _finite(output: Any) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in leaves_of(output) if isinstance(leaf, Tensor))
