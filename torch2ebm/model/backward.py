"""What ``loss.backward()`` runs: an autograd function whose inputs are the parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.engine.batch import Batch
from torch2ebm.engine.call import Call
from torch2ebm.engine.finite import (
    check_delivered,
    check_gradients,
    check_predictions,
    first_bad,
)
from torch2ebm.engine.results import InferenceState, LocalGradients
from torch2ebm.engine.standing import Standing
from torch2ebm.errors import (
    ConfigurationError,
    DenseLayerError,
    GraphFreedError,
    HigherOrderGradientError,
    InputGradientError,
    NonFiniteError,
)
from torch2ebm.isolation.interrupts import Result, undone_by, within
from torch2ebm.isolation.module_state import BufferHistory, BufferSnapshot, hooks_suspended, tensors_in_place
from torch2ebm.isolation.out_of_memory import exhausted_memory_named
from torch2ebm.isolation.torch_modes import Autocast, Modes
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.loss.replayed_loss import ReplayedLoss
from torch2ebm.loss.tape import Tape
from torch2ebm.loss.together import relaxed_together
from torch2ebm.model.arguments import Arguments, check_finite_inputs
from torch2ebm.model.open_forwards import OpenForwards
from torch2ebm.model.replicas import Replicas
from torch2ebm.model.shards import Shards
from torch2ebm.model.unchanged import Unchanged
from torch2ebm.model.verification import check_opaque


class OpenCall:
    """One forward call and all that its backward needs; what a second backward may not find is released.

    ``history`` is that of the buffers that the forward changes, ``finite`` are those in which NaN or infinity would be
    new.
    """

    def __init__(
        self,
        call: Call,
        algorithm: Algorithm,
        history: BufferHistory,
        finite: Mapping[str, Tensor],
        forwards: OpenForwards,
        keep: Callable[[InferenceState], None],
        shards: Shards,
        arguments: Arguments,
        batch: Batch,
        standing: Standing,
        forget: Callable[[], None],
        replicas: Replicas,
    ) -> None:
        self.call: Call | None = call
        self.kept: Any = None  # what the algorithm's forward returned
        self.algorithm, self.history, self.forwards = algorithm, history, forwards
        self.keep, self.shards, self.arguments, self.standing = keep, shards, arguments, standing
        self.batch, self.forget, self.replicas = batch, forget, replicas
        self.finite = {**call.parameters, **finite}
        self.tape = Tape(len(call.graph.output_slots), call.device, forwards.undo)
        self.tape.calls.append(weakref.ref(self))
        self.relaxed: tuple[int, LocalGradients] | None = None  # by a backward that reached another call first
        self.parameters = {name: p for name, p in call.parameters.items() if p.requires_grad}
        self.learned = dict(algorithm.learned)
        self.device = call.device
        self.autocast = Autocast.now(self.device.type)

    def run(self) -> list[Tensor]:
        """The forward pass: recordable outputs, in the order of the graph's output slots."""
        assert self.call is not None
        self.kept = self.algorithm.forward(self.call)
        if self.call.graph.opaque and not self.algorithm.defines_output:
            check_opaque(self.call)
        with self._blamed_on_inputs():
            self.standing.check(self.finite)  # a clamp can hide it from the prediction
            check_predictions(self.call, of_outputs=False)
        self.unchanged = Unchanged(self.call, self.algorithm.reevaluates_loss, self.history.buffers)
        self.history.forward_ended()
        self.forwards.opened(self.history)
        outputs = [self.call.values[slot].detach() for slot in self.call.graph.output_slots]
        self.tape.values = dict(zip(self.tape.outputs, outputs, strict=True))
        return [output.clone() for output in outputs]  # what the user writes on them is no value of the call

    @contextmanager
    def _blamed_on_inputs(self) -> Iterator[None]:
        """Where something is not finite because an input is not, name the input; a parameter is no consequence."""
        try:
            yield
        except (NonFiniteError, DenseLayerError):  # numbers tell a dense layer, too
            self.forget()
            if first_bad(self.parameters) is None:
                check_finite_inputs(self.arguments.tensors)
            raise

    def answer(self, delivered: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients of what :class:`EnergyFunction` was applied to."""
        modes = Modes.now(self.device.type)
        with exhausted_memory_named("loss.backward()", self.algorithm):
            with self.shards.gathered():
                gradients = undone_by(modes.restore, lambda: self.gradients(delivered, _retains_graph()))
            synchronised = self.shards.scattered(gradients.parameters)
            of_parameters = [synchronised.get(name) for name in self.parameters]
            learned = self._among_replicas(gradients.learned)
            of_energies = [learned.get(name) for name in self.learned]
            return (None, *of_parameters, *of_energies, *gradients.inputs)

    def _among_replicas(self, learned: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The mean over processes: no wrapper of the model sees these parameters."""
        if not self.learned or self.replicas.wrapper is None:
            return learned
        # a batch that gives no gradient here still has to answer the other processes
        return self.replicas.averaged({n: learned.get(n, torch.zeros_like(t)) for n, t in self.learned.items()})

    def gradients(self, delivered: Sequence[Tensor | None], retain_graph: bool) -> LocalGradients:
        """What the algorithm makes of the delivered gradients, checked."""
        call = self._opened()
        by_slot = {s: g for s, g in zip(call.graph.output_slots, delivered, strict=True) if g is not None}
        loss = self._loss(call, by_slot)
        if not self._delivered_finite(call, loss):
            return self._overflowed(call)
        self.unchanged.check(call)
        if self.algorithm.reevaluates_loss:
            if loss.is_mean:
                self.batch.check(loss.target_rows)
            loss.check()
        with self._blamed_on_inputs():
            gradients = self._relaxed(call, loss, retain_graph)
            self._check_returned(gradients)
            self._check_inputs(call, gradients)
            self._check_parameters(gradients, loss)
        self._keep(gradients.state, loss)
        call.memory.commit()
        self.forwards.closed(self.history)
        if gradients.later is not None:
            self.forwards.later.append(self._later(call, gradients.later, loss))
        if not retain_graph:
            self._released()
        return gradients

    def _loss(self, call: Call, delivered: Mapping[str, Tensor]) -> ReplayedLoss:
        reduction, name = self.algorithm.loss_reduction, type(self.algorithm).__name__
        return ReplayedLoss(call, self.tape, delivered, reduction, name, self.forwards.accumulation)

    def _relaxed(self, call: Call, loss: ReplayedLoss, retain_graph: bool) -> LocalGradients:
        """What the algorithm makes of the loss, together with the other calls that the loss joins to this one."""
        task = torch._C._current_graph_task_id()
        before, self.relaxed = self.relaxed, None
        if before is not None and before[0] == task:
            return before[1]
        others = self._beside(loss) if self.algorithm.reevaluates_loss else []
        if not others:
            return self._as_in_forward(call, lambda: self._backward(loss, retain_graph))
        calls = [self, *others]
        losses = [loss, *(other._loss(other._opened(), other._delivered()) for other in others)]
        for other in others:
            other.unchanged.check(other._opened())
        backwards = [partial(each._backward, retain_graph=retain_graph) for each in calls]
        together: Callable[[], list[LocalGradients]] = lambda: relaxed_together(losses, backwards, self.device)  # noqa: E731
        for each in {id(each.forwards): each for each in calls}.values():  # once for each model
            together = partial(each._as_in_forward, each._opened(), together)
        own, *found = together()
        for other, gradients in zip(others, found, strict=True):
            other.relaxed = task, gradients
        return own

    def _backward(self, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        return self.algorithm.backward(self._opened(), self.kept, loss, retain_graph)

    def _beside(self, loss: ReplayedLoss) -> list[OpenCall]:
        """The other calls that the loss joins to this one and whose algorithms evaluate it again."""
        mixed = loss.mixed_with
        if not mixed:
            return []
        calls = [call for reference in self.tape.whole().calls if (call := reference()) is not None]
        return [
            each
            for each in calls
            if each is not self
            and each.call is not None
            and not each.call.swapped
            and each.algorithm.reevaluates_loss
            and not mixed.isdisjoint(each.tape.outputs)
        ]

    def _delivered(self) -> dict[str, Tensor]:
        """A place for each output: what autograd has not delivered yet is computed by the replay."""
        return {slot: self._opened().values[slot] for slot in self._opened().graph.output_slots}

    def _keep(self, state: InferenceState, loss: ReplayedLoss) -> None:
        self.keep(replace(state, loss_weight=loss.loss_weight, loss_terms=loss.loss_terms))

    def _later(self, call: Call, gradients: Iterator[LocalGradients], loss: ReplayedLoss) -> Iterator[LocalGradients]:
        while True:
            with self.shards.gathered():
                found = self._as_in_forward(call, lambda: next(gradients, None))
            if found is None:
                return
            self._keep(found.state, loss)
            yield found

    def _as_in_forward(self, call: Call, function: Callable[[], Result]) -> Result:
        """Autocast and swapped parameters as the forward had them; what a pass changes is put back, hooks stay out."""
        changes = []
        if self.history.buffers:
            changes.append(BufferSnapshot(self.history.buffers).preserved())
        if any(parameter._backward_hooks for parameter in self.parameters.values()):
            changes.append(hooks_suspended(self.parameters.values()))
        if call.swapped:
            changes.append(tensors_in_place(call.graph.module, call.swapped))
        if self.autocast.enabled:
            changes.append(self.autocast.entered())
        return within(changes, function)

    def _released(self) -> None:
        """No backward will follow: the values go at once, and with them what forward has kept."""
        self.call = self.kept = None

    def _opened(self) -> Call:
        if self.call is None:
            raise GraphFreedError(
                "loss.backward()",
                "a second backward through one forward call",
                "one, unless retain_graph=True",
                "Call backward(retain_graph=True) the first time, or run the model again.",
            )
        return self.call

    def _delivered_finite(self, call: Call, loss: ReplayedLoss) -> bool:
        """Whether there is anything to learn from; raises where no outer factor is to blame."""
        if first_bad(loss.delivered) is None:
            return True
        if not (loss.magnified and loss.finite):
            with self._blamed_on_inputs():
                check_predictions(call)
            check_delivered(loss.delivered)
        self.forwards.overflowed.append(self.history)
        return False

    def _overflowed(self, call: Call) -> LocalGradients:
        """The outer factor (a gradient scaler's) overflowed: say so in every gradient, so that the scaler skips."""
        self.forwards.closed(self.history)
        self._released()
        nothing = InferenceState(call.graph, call.batch_size, {}, {})
        return LocalGradients(
            {name: torch.full_like(parameter, torch.nan) for name, parameter in self.parameters.items()},
            [torch.full_like(t, torch.nan) for t in call.tensors],
            nothing,
            learned={name: torch.full_like(tensor, torch.nan) for name, tensor in self.learned.items()},
        )

    def _check_parameters(self, gradients: LocalGradients, loss: ReplayedLoss) -> None:
        """Gradients are linear in the outer factor: up to a factor of one what is not finite is not its doing.

        A larger one may be a scaler's, which skips the step and comes down; ``optimizer.step()`` looks whether it did.
        """
        if not loss.magnified:
            check_gradients({**gradients.parameters, **gradients.learned})
        elif first_bad({**gradients.parameters, **gradients.learned}) is not None:
            self.forwards.overflowed.append(self.history)

    def _check_returned(self, gradients: object) -> None:
        """Anybody may write an algorithm, and forget its return."""
        if not isinstance(gradients, LocalGradients):
            raise ConfigurationError(
                f"{type(self.algorithm).__name__}.backward(call, kept, loss, retain_graph)",
                f"a result of type {type(gradients).__name__}",
                "LocalGradients",
                "Return LocalGradients(parameters, inputs, state), from torch2ebm.extend.",
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
        return open_call.forwards.without_a_trace(lambda: open_call.answer(delivered))


def _retains_graph() -> bool:
    """Whether this backward was asked to keep its graph; where torch does not tell, assume that it was."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(ask()) if ask is not None else True
