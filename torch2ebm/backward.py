"""What ``loss.backward()`` runs: an autograd function whose inputs are the parameters, and the loss of a call."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.errors import (
    GraphFreedError,
    HigherOrderGradientError,
    InputGradientError,
    LossNotRecordedError,
    LossReductionError,
    LossReplayError,
    NonFiniteError,
    OutOfMemoryError,
)
from torch2ebm.freezing import BufferHistory, BufferSnapshot, hooks_suspended, tensors_in_place
from torch2ebm.recorder import Scalar, Tape
from torch2ebm.state import Call, InferenceState, LocalGradients, LossExpansion, OutputLoss, pull_back


class OpenForwards:
    """The forwards of a model that no backward has answered yet, and what they did to its buffers."""

    def __init__(self) -> None:
        self.histories: deque[BufferHistory] = deque(maxlen=16)  # of forwards that are never answered the latest
        self.opened_since_step = self.answered_since_step = False
        self.later: deque[Iterator[LocalGradients]] = deque(maxlen=16)  # of algorithms whose weights move with values

    @property
    def unanswered(self) -> bool:
        """Whether there was a forward since the last step, and no backward."""
        return self.opened_since_step and not self.answered_since_step

    def stepped(self) -> None:
        self.opened_since_step = self.answered_since_step = False
        self.later.clear()

    def later_gradients(self) -> Iterator[dict[str, Tensor]]:
        """By name, summed over the backwards since the last step; each once the weights have moved on the one before.

        Raises :class:`NonFiniteError` where one is not finite.
        """
        for together in zip(*self.later, strict=False):
            total: dict[str, Tensor] = {}
            for gradients in together:
                check_gradients(gradients.parameters)
                for name, gradient in gradients.parameters.items():
                    total[name] = total[name] + gradient if name in total else gradient
            yield total

    def opened(self, history: BufferHistory) -> None:
        self.histories.append(history)
        self.opened_since_step = True

    def closed(self, history: BufferHistory) -> None:
        """A backward has answered this forward; it and those before it stay as they are."""
        while history in self.histories:
            self.histories.popleft()
        self.answered_since_step = True

    @contextmanager
    def without_a_trace(self) -> Iterator[None]:
        """What fails inside is as if it, and the forwards that it was to answer, had not been."""
        histories, later, answered = list(self.histories), list(self.later), self.answered_since_step
        try:
            yield
        except BaseException:
            self.histories.clear()
            self.histories.extend(histories)
            self.later.clear()
            self.later.extend(later)
            self.undo()
            self.answered_since_step = answered
            raise

    def undo(self) -> None:
        """A step is refused: give the buffers what they held before these forwards."""
        while self.histories:
            self.histories.pop().undo()


class OpenCall:
    """One forward call and all that its backward needs; what a second backward may not find is released.

    ``buffers`` are those that the forward changes, ``finite`` those in which NaN or infinity would be new.
    """

    def __init__(
        self,
        call: Call,
        algorithm: Algorithm,
        buffers: Mapping[str, Tensor],
        finite: Mapping[str, Tensor],
        forwards: OpenForwards,
        keep: Callable[[InferenceState], None],
    ) -> None:
        self.call: Call | None = call
        self.algorithm, self.buffers, self.forwards, self.keep = algorithm, buffers, forwards, keep
        self.finite = {**call.parameters, **finite}
        self.history = BufferHistory(buffers)
        self.tape = Tape(len(call.graph.output_slots), call.device, forwards.undo)
        self.parameters = {name: p for name, p in call.parameters.items() if p.requires_grad}
        self.autocast = (
            torch.is_autocast_enabled(call.device.type),
            torch.get_autocast_dtype(call.device.type),
            torch.is_autocast_cache_enabled(),
        )

    @contextmanager
    def withdrawn_on_error(self) -> Iterator[None]:
        """An exception before the caller has its output: as if there had been no forward."""
        opened = self.forwards.opened_since_step
        try:
            yield
        except BaseException:
            self.history.before.restore()
            if self.history in self.forwards.histories:
                self.forwards.histories.remove(self.history)
            self.forwards.opened_since_step = opened
            raise

    def run(self) -> list[Tensor]:
        """The forward pass: recordable outputs, in the order of the graph's output slots."""
        assert self.call is not None
        self.algorithm.forward(self.call)
        check_standing(self.finite)  # a clamp can hide it from the prediction
        _check_prediction(self.call)
        self.history.forward_ended()
        self.forwards.opened(self.history)
        # copies: what the user writes on the output is no value of the call
        return [self.call.values[slot].detach().clone() for slot in self.call.graph.output_slots]

    def gradients(self, delivered: Sequence[Tensor | None], retain_graph: bool) -> LocalGradients:
        """What the algorithm makes of the delivered gradients, checked."""
        call = self._opened()
        by_slot = {s: g for s, g in zip(call.graph.output_slots, delivered, strict=True) if g is not None}
        if _has_overflowed(self.tape, by_slot):
            return self._overflowed(call)
        loss = make_loss(self.algorithm, call, self.tape, by_slot)
        with self._as_in_forward(call):
            gradients = self.algorithm.backward(call, loss, retain_graph)
        _check_gradients(gradients, loss)
        self._check_inputs(call, gradients)
        self.keep(gradients.state)
        self.forwards.closed(self.history)
        if gradients.later is not None:
            self.forwards.later.append(self._later(call, gradients.later))
        if not retain_graph:
            self.call = None
        return gradients

    def _later(self, call: Call, gradients: Iterator[LocalGradients]) -> Iterator[LocalGradients]:
        while True:
            with self._as_in_forward(call):
                found = next(gradients, None)
            if found is None:
                return
            self.keep(found.state)
            yield found

    @contextmanager
    def _as_in_forward(self, call: Call) -> Iterator[None]:
        """Autocast and swapped parameters as the forward had them; what a pass changes is put back, hooks stay out."""
        with ExitStack() as stack:
            if self.buffers:
                stack.enter_context(BufferSnapshot(self.buffers).preserved())
            if any(parameter._backward_hooks for parameter in self.parameters.values()):
                stack.enter_context(hooks_suspended(self.parameters.values()))
            if call.swapped:
                stack.enter_context(tensors_in_place(call.graph.module, call.swapped))
            enabled, dtype, cache = self.autocast
            if enabled:
                stack.enter_context(torch.autocast(call.device.type, dtype=dtype, cache_enabled=cache))
            yield

    def _opened(self) -> Call:
        if self.call is None:
            raise GraphFreedError(
                "loss.backward()",
                "a second backward through one forward call",
                "one, unless retain_graph=True",
                "Call backward(retain_graph=True) the first time, or run the model again.",
            )
        return self.call

    def _overflowed(self, call: Call) -> LocalGradients:
        """The outer factor (a gradient scaler's) overflowed: say so in every gradient, so that the scaler skips."""
        self.forwards.closed(self.history)
        self.call = None
        nothing = InferenceState(call.graph, call.batch_size, {}, {})
        return LocalGradients(
            {name: torch.full_like(parameter, torch.nan) for name, parameter in self.parameters.items()},
            [torch.full_like(t, torch.nan) if t.requires_grad else None for t in call.tensors],
            nothing,
        )

    def _check_inputs(self, call: Call, gradients: LocalGradients) -> None:
        wanted = any(tensor.requires_grad for tensor in call.tensors)
        if wanted and not self.algorithm.has_input_gradients:
            raise InputGradientError(
                f"{self.algorithm!r}",
                "inputs that require a gradient",
                "none, or an algorithm that has one",
                "Detach the input, or use ZeroDivergence.",
            )


def _has_overflowed(tape: Tape, delivered: Mapping[str, Tensor]) -> bool:
    """A finite loss whose gradient is not: the outer factor is too large for the precision."""
    used = [scalar for scalar in tape.scalars if scalar.factors]
    if not used or all(all_finite(gradient) for gradient in delivered.values()):
        return False
    overflowed = all(math.isfinite(scalar.value) for scalar in used)
    if overflowed:
        for scalar in used:
            scalar.factors = []
    return overflowed


class EnergyFunction(torch.autograd.Function):
    """From parameters and inputs to outputs; backwards the algorithm's local gradients."""

    @staticmethod
    def forward(ctx: Any, open_call: OpenCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.open_call = open_call
        ctx.set_materialize_grads(False)
        return tuple(open_call.run())

    @staticmethod
    def backward(ctx: FunctionCtx, *delivered: Tensor | None) -> tuple[Tensor | None, ...]:
        open_call: OpenCall = ctx.open_call  # type: ignore[attr-defined]
        if torch.is_grad_enabled():
            open_call.forwards.undo()
            raise HigherOrderGradientError(
                "loss.backward(create_graph=True)",
                "a request for gradients of local gradients",
                "create_graph=False",
                "Use model.feedforward(x), or the module itself, for a higher-order term.",
            )
        with open_call.forwards.without_a_trace(), exhausted_memory_named("loss.backward()", open_call.algorithm):
            gradients = open_call.gradients(delivered, _retains_graph())
            of_parameters = [gradients.parameters.get(name) for name in open_call.parameters]
            return (None, *of_parameters, *gradients.inputs)


def _retains_graph() -> bool:
    """Whether this backward was asked to keep its graph; where torch does not tell, assume that it was."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(ask()) if ask is not None else True


# The loss -------------------------------------------------------------------------------------------------------------


def make_loss(algorithm: Algorithm, call: Call, tape: Tape, delivered: Mapping[str, Tensor]) -> OutputLoss:
    """The loss of this backward; the factors that the tape has seen are consumed."""
    scalars = [(scalar, _sum(scalar.factors)) for scalar in tape.scalars if scalar.factors and not scalar.absorbed]
    for scalar in tape.scalars:
        scalar.factors = []
    loss = RecordedLoss(algorithm, call, tape, delivered, scalars)
    if algorithm.reevaluates_loss:
        loss.check()
    return loss


class RecordedLoss(OutputLoss):
    """The scalars of one backward, with their outer factors, replayed at other predictions."""

    def __init__(
        self,
        algorithm: Algorithm,
        call: Call,
        tape: Tape,
        delivered: Mapping[str, Tensor],
        scalars: Sequence[tuple[Scalar, float]],
    ) -> None:
        self.algorithm, self.call, self.tape, self.delivered = algorithm, call, tape, delivered
        self.scalars = [scalar for scalar, _ in scalars]
        factors = [factor for _, factor in scalars]
        outer = max(map(abs, factors), default=1.0)
        # a common factor scales gradients; its sign, and the ratios between several scalars, enter the energy
        self.relative = [factor / outer if outer else 0.0 for factor in factors]
        self.multiplier = self._multiplier()
        self.factor = outer
        self.scale = outer / self.multiplier
        self.unit = self.multiplier / outer if outer else 0.0
        self._weights: list[Tensor] | None = None

    def _multiplier(self) -> int:
        reduction = self.algorithm.loss_reduction
        if reduction is None:  # an algorithm that needs no loss: errors in the units of the loss that was seen
            reduction = "sum" if any(scalar.summed for scalar in self.scalars) else "mean"
        return self.call.batch_size if reduction == "mean" else 1

    def gradients(self, predictions: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        values, leaves = self._replayed(predictions)
        if self._weights is None:
            self._weights = [
                torch.full_like(v, self.multiplier * f) for f, v in zip(self.relative, values, strict=True)
            ]
        found = pull_back(values, self._weights, list(leaves.values()))
        if any(value.is_complex() for value in values):  # torch gives the conjugate of a holomorphic derivative
            found = [None if each is None else each.conj() for each in found]
        return self._total([value.detach() for value in values]), _present(leaves, found)

    def expanded(self, predictions: Mapping[str, Tensor]) -> LossExpansion:
        values, leaves = self._replayed(predictions)
        with torch.enable_grad():
            total = self._total(values)
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

    def _total(self, values: Sequence[Tensor]) -> Tensor:
        parts = [value * (self.multiplier * factor) for factor, value in zip(self.relative, values, strict=True)]
        return parts[0] if len(parts) == 1 else torch.stack([part.reshape(()) for part in parts]).sum()

    def _replayed(self, predictions: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The scalars at other predictions, and the leaves that a gradient is wanted for, by slot."""
        slots = self.call.graph.output_slots
        leaves = [predictions[slot].detach().requires_grad_(slot in self.delivered) for slot in slots]
        with torch.enable_grad():
            values = self.tape.replay(leaves, [scalar.index for scalar in self.scalars])
        return values, {slot: leaf for slot, leaf in zip(slots, leaves, strict=True) if leaf.requires_grad}

    def check(self) -> None:
        """Raise unless the recorded loss, at the feed-forward prediction, has the gradient that autograd delivered."""
        if not self.scalars:
            raise LossNotRecordedError(
                "loss.backward()",
                self.tape.obstacle or "no loss of no dimension computed from the model's output",
                f"one, since {type(self.algorithm).__name__} evaluates the loss again while predictions move",
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
        summed = any(scalar.summed for scalar in self.scalars)
        if summed and self.call.batch_size > 1 and self.algorithm.loss_reduction == "mean":
            raise LossReductionError(
                "loss.backward()",
                f"a loss made by a sum, over a batch of {self.call.batch_size}",
                "a mean over the batch (loss_reduction='mean')",
                f"Give {type(self.algorithm).__name__}(..., loss_reduction='sum'), or take the mean.",
            )

    def _refusal(self, got: str) -> LossReplayError:
        return LossReplayError(
            "loss.backward()",
            got,
            "the gradient that autograd delivered",
            "The loss uses the model's output through something that was not recorded, or draws random numbers; "
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
    return bool((difference <= tolerance * scale + 1e-300) | ~torch.isfinite(scale))


# Memory ---------------------------------------------------------------------------------------------------------------

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # torch on the CPU has no class for it


@contextmanager
def exhausted_memory_named(where: str, algorithm: Algorithm) -> Iterator[None]:
    """Say what to do where torch or Python finds no memory."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise OutOfMemoryError(
            f"{where}, {algorithm!r}",
            first.removesuffix("."),
            "memory for the values, predictions and errors of every node",
            "Take a smaller batch (with gradients accumulated, the result is the same), fewer inference steps, or "
            "coarser nodes (nodes='children'); nothing was changed.",
        ) from error


# Checks ---------------------------------------------------------------------------------------------------------------


def all_finite(tensor: Tensor) -> bool:
    """One pass over the data; the sum may overflow where no entry is infinite, hence the second look."""
    return math.isfinite(tensor.detach().sum()) or bool(torch.isfinite(tensor).all())


def _sum_is_finite(tensors: Iterable[Tensor]) -> bool:
    """Never true where an entry is NaN or infinite; one number a device goes to the host."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor.detach().sum(dtype=_wide(tensor.dtype)))
    return all(math.isfinite(torch.stack(sums).sum()) for sums in by_device.values())


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    """Half precisions would overflow in a sum, and tensors of one precision can be stacked."""
    return None if dtype == torch.float64 else torch.float32


def count_bad(tensor: Tensor) -> str:
    bad = int((~torch.isfinite(tensor)).sum())
    return f"{bad} of {tensor.numel()} elements NaN or infinite"


def check_standing(tensors: Mapping[str, Tensor]) -> None:
    """Parameters and buffers are finite; one pass over the data where they are."""
    if _sum_is_finite(tensors.values()):
        return
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise _non_finite(f"{kind} '{name}', feed-forward pass", tensor)


def _check_prediction(call: Call) -> None:
    if all(all_finite(call.values[slot]) for slot in call.graph.output_slots):
        return
    for node in call.graph.nodes.values():
        for slot in node.slots:
            if not all_finite(call.values[slot]):
                raise _non_finite(f"prediction of node '{node.name}', feed-forward pass", call.values[slot])


def _check_gradients(gradients: LocalGradients, loss: OutputLoss) -> None:
    if _sum_is_finite(gradients.parameters.values()):
        return
    for delivered in loss.delivered.values():
        if not all_finite(delivered):
            raise _non_finite("the loss, backward", delivered)
    check_gradients(gradients.parameters)


def check_gradients(gradients: Mapping[str, Tensor]) -> None:
    """One pass over the data; a sum that merely overflows is looked at again, one by one."""
    if _sum_is_finite(gradients.values()):
        return
    for name, gradient in gradients.items():
        if not all_finite(gradient):
            raise _non_finite(f"gradient of parameter '{name}', backward", gradient)


def _non_finite(where: str, tensor: Tensor) -> NonFiniteError:
    return NonFiniteError(
        where,
        count_bad(tensor),
        "finite numbers",
        "Look at the input, the target, the learning rate and the parameters; nothing was changed.",
    )
