"""What torch2ebm holds of one converted module: its captures, its algorithm, and the state of the last backward."""

from __future__ import annotations

import gc
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.algorithms.base import Algorithm, check_algorithm
from torch2ebm.algorithms.given import curvature_of
from torch2ebm.analysis.energy_function import ByNode
from torch2ebm.analysis.energy_terms import EnergyTerms, energy_terms
from torch2ebm.analysis.hessian import Hessian, hessian_of
from torch2ebm.capture.fingerprint import inside_functional_call
from torch2ebm.clamping.answering import How, answered, question_settings
from torch2ebm.clamping.asking import Question
from torch2ebm.clamping.inferred import Inferred
from torch2ebm.clamping.inputs import Asked, nodes_of_inputs
from torch2ebm.clamping.start import INFERRED, ended_at
from torch2ebm.common.nested import leaves_of
from torch2ebm.common.plain_loop import PlainLoop
from torch2ebm.common.users_code import users_level
from torch2ebm.engine.batch import GUESSED, Batch, BatchDimension
from torch2ebm.engine.call import Call
from torch2ebm.engine.results import InferenceState
from torch2ebm.engine.standing import Standing
from torch2ebm.errors import AttachmentError, NoStateError, NotCapturedError
from torch2ebm.graph.energy_graph import EnergyGraph, Node, filled
from torch2ebm.graph.granularity import Granularity
from torch2ebm.inference.curvature import Curvature
from torch2ebm.inference.relaxation import OnStep
from torch2ebm.isolation.forward_mode import without_transforms
from torch2ebm.isolation.module_state import BufferHistory, BufferSnapshot, plain_autograd, tensors_in_place, untouched
from torch2ebm.isolation.out_of_memory import exhausted_memory_named
from torch2ebm.isolation.torch_modes import exporting
from torch2ebm.loss.taped_tensor import put_on_new_tape, stand_for, taken_off
from torch2ebm.memory.last_values import FEEDFORWARD, LAST, CallMemory, LastValues
from torch2ebm.model.arguments import (
    Arguments,
    as_arguments,
    batch_dimension_of,
    called,
    check_inputs,
    of_batch,
    ordinary,
)
from torch2ebm.model.backward import EnergyFunction, OpenCall
from torch2ebm.model.capture_cache import Captures, Served, seen
from torch2ebm.model.open_forwards import OpenForwards, nothing_attached
from torch2ebm.model.replicas import Replicas
from torch2ebm.model.whole_call import PlainCall
from torch2ebm.programs.cache import Programs
from torch2ebm.reports.picture import GraphPicture, draw_graph
from torch2ebm.reports.tables import node_table


class Conversion:
    """The energy side of a converted model, at ``model.torch2ebm``; it knows the module, and not the model.

    Every public name of :class:`EnergyModel` is here too, for modules with an attribute of the same name.

    Attributes:
        module: The module that was given to :func:`convert`.
        algorithm: The attached algorithm, or None: ordinary backpropagation.
        captures: The graphs of the module, one for each kind of call.
        shards: Which parameters ``fully_shard`` has spread over processes.
        forwards: The forwards that no backward has answered yet.
        replicas: The wrapper that synchronises gradients among processes.
    """

    check_every_by_default: int | None = None  # what EnergyOptimizer(check_every=) is where nothing is given

    def __init__(
        self,
        module: nn.Module,
        granularity: Granularity,
        algorithm: Algorithm | None = None,
        batch: BatchDimension = GUESSED,
    ) -> None:
        self.module, self.algorithm = module, algorithm
        self.shards, self.captures = seen(module, granularity)
        self.forwards, self.replicas = OpenForwards(), Replicas()
        self.standing = Standing()
        self._seen: Mapping[str, Tensor] = {}
        self.batch = batch
        self._runs: Callable[..., Any] = module
        self.check_every: int | None = None
        self._calls = 0
        self._holders: list[weakref.ref[Any]] = []
        self._plain = PlainLoop()
        self._latest: EnergyGraph | None = None
        self._state: InferenceState | None = None
        self.memory, self._programs = LastValues(), Programs()

    # calls

    def answer(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What ``model(*args, **kwargs)`` returns."""
        self._state = None
        if exporting():
            return self.module(*args, **kwargs)
        if self.algorithm is not None and self.algorithm.defines_output and not torch.is_grad_enabled():
            return self._output_alone(self.algorithm, args, kwargs)
        if self.algorithm is None or not torch.is_grad_enabled():
            if self._latest is None and self.shards.modules:
                self.capture(args, kwargs)  # a run of its own: its graph is of parameters that are released again
            elif self._latest is None:
                return self._watched(self._captured_run(args, kwargs).run.output)
            return self._watched(self.module(*args, **kwargs))
        if not self.shards.covers(self.captures.parameters):
            self.replicas.forward(type(self.module).__name__, self.algorithm)
        return self.run(self.algorithm, args, kwargs, self._keep, self.forwards)

    def answer_by(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], run: Callable[..., Any]) -> Any:
        """What ``model(*args, **kwargs)`` returns, with another way to run the module."""
        before, self._runs = self._runs, run
        try:
            return self.answer(args, kwargs)
        finally:
            self._runs = before

    def _watched(self, output: Any) -> Any:
        """An output without an algorithm: tell once where a loop trains on such ones, and nobody has attached any."""
        if torch.is_grad_enabled() and self.algorithm is None:
            module = self.module
            if self._plain.trains(module.parameters()):
                warnings.warn(nothing_attached(type(module).__name__), stacklevel=users_level())
            self._plain.watch(leaves_of(output), lambda: list(module.parameters()))
        return output

    def _output_alone(self, algorithm: Algorithm, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The output that the algorithm defines, where no backward will follow."""
        # a relaxation differentiates, which inference mode forbids
        with self.shards.gathered(), torch.inference_mode(False), torch.no_grad():
            args, kwargs = ordinary((args, dict(kwargs)))
            served = self._served(args, kwargs, algorithm)
            call = self._call(served)
            with tensors_in_place(self.module, served.swapped):
                algorithm.forward(call)
            return filled(served.run.output, call.output(), call.graph.outputs)

    def feedforward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain module's output, whatever algorithm is attached, with ordinary autograd."""
        return self.module(*args, **kwargs)

    def run(
        self,
        algorithm: Algorithm,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        keep: Callable[[InferenceState], None] = lambda state: None,
        forwards: OpenForwards | None = None,
    ) -> Any:
        """The output whose backward is that of ``algorithm``, attached or not; ``keep`` gets the resulting state."""
        forwards = forwards or OpenForwards()
        if not self.shards.modules:  # no with: a signal at its end would come after the forward, and still inside
            return self._run(algorithm, args, kwargs, keep, forwards)
        with self.shards.gathered():
            return self._run(algorithm, args, kwargs, keep, forwards)

    def _run(
        self,
        algorithm: Algorithm,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        keep: Callable[[InferenceState], None],
        forwards: OpenForwards,
    ) -> Any:
        history = BufferHistory(self.captures.changing_buffers())
        (args, kwargs), given_from = taken_off((args, kwargs))
        checked = self._is_checked()

        def taped_output() -> Any:
            with exhausted_memory_named("model(...)", algorithm):
                run = partial(called, self._runs, self.module, args, kwargs)
                plain = PlainCall.of(self.module, (args, kwargs), run) if checked else None
                served = self._served(args, kwargs, algorithm, history.before)
                if plain is not None:
                    plain.check(served)
                call = self._call(served, self.memory if forwards is self.forwards else None)
                open_call = OpenCall(
                    call,
                    algorithm,
                    history,
                    self.captures.standing_buffers(),
                    forwards,
                    keep,
                    self.shards,
                    served.arguments,
                    self._batch(served),
                    self.standing,
                    partial(self.captures.forget, served.graph),
                    self.replicas if forwards is self.forwards else Replicas(),  # a comparison is of one process
                )
                for tape in given_from:
                    tape.fed.append(weakref.ref(open_call.tape))
                outputs = EnergyFunction.apply(  # type: ignore[no-untyped-call]
                    open_call,
                    *self.shards.in_place_of(open_call.parameters),
                    *open_call.learned.values(),
                    *served.run.external.values(),
                )
                taped = dict(zip(call.graph.output_slots, put_on_new_tape(open_call.tape, outputs), strict=True))
                leaves = call.graph.output(taped, call.environment)
                for number, ours in zip(call.graph.held, leaves[len(leaves) - len(call.graph.held) :], strict=True):
                    if number in served.run.kept:
                        stand_for(served.run.kept[number], ours)
                return filled(served.run.output, leaves, call.graph.outputs)

        return forwards.withdrawn_on_error(history, taped_output)

    def curvature(self, loss_fn: Callable[..., Tensor], batch: Any, **settings: Any) -> Curvature:
        """How curved the loss is in the errors of one batch; see :meth:`EnergyModel.curvature` for the settings."""
        args, kwargs, loss_of = of_batch("model.curvature", batch, loss_fn)
        with plain_autograd(), untouched(self.module, Arguments.of(self.module, args, kwargs).device):
            trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
            return curvature_of(lambda given: loss_of(self.run(given, args, kwargs)), trained, **settings)

    def infer(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        question: Question,
        prior: Mapping[str, Any],
        start: str = FEEDFORWARD,
        compile: bool = False,
        on_step: OnStep | None = None,
        **how: Any,
    ) -> Inferred:
        """Values of any node, others given; see :meth:`EnergyModel.infer` for the settings."""
        self._see_again()
        self._seen = self.captures.inputs or self._seen
        settings = How(*question_settings(**how), start, self._programs if compile else None, on_step)
        with self.shards.gathered(), torch.inference_mode(False):
            inputs = Asked(self.module, args, kwargs, question, prior, self._seen).inputs()
            captures = self.captures.behind(inputs.nodes)
            if start == LAST and self._state is not None:
                self.memory.last.setdefault(INFERRED, ended_at(self._state))
            found = answered(partial(self.looked_at, captures=captures, memory=self.memory), inputs, settings)
        # a free input may be missing from now on
        tensors = {n: each for n, each in inputs.bound.arguments.items() if isinstance(each, Tensor) and each.ndim}
        self._seen = {**self._seen, **{n: each.new_empty((0, *each.shape[1:])) for n, each in tensors.items()}}
        return found

    def energy(self, values: ByNode, *inputs: Any, **settings: Any) -> EnergyTerms:
        """The energy at given values; see :meth:`EnergyModel.energy` for the settings."""
        named = len(inputs) == 1 and isinstance(inputs[0], Mapping)
        with self._at_rest(*as_arguments(inputs[0] if named else inputs)) as call:
            found = energy_terms(call, values, **settings)
        return found if torch.is_grad_enabled() else found.detached()

    def hessian(self, loss_fn: Callable[..., Tensor], batch: Any, **settings: Any) -> Hessian:
        """The Hessian of the energy; see :meth:`EnergyModel.hessian` for the settings."""
        args, kwargs, loss_of = of_batch("model.hessian", batch, loss_fn)
        with self._at_rest(args, kwargs) as call:
            return hessian_of(call, loss_of, **settings)

    @contextmanager
    def _at_rest(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Call]:
        """A call after its feed-forward pass; the module is as before, inside and at the end."""
        arguments = Arguments.of(self.module, args, kwargs)
        with self.shards.gathered(), plain_autograd(), untouched(self.module, arguments.device):
            with without_transforms(arguments.tensors):
                call = self._call(self._served(args, kwargs, self.algorithm))
                for place, tensor in call.run.external.items():  # gradients go on into the inputs
                    call.run.constants[place] = tensor
                call.feedforward(keep_graph=False)
            yield call

    def new_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """A run of the module, as a call that no algorithm has filled."""
        return self._call(self._captured_run(args, kwargs))

    def _is_checked(self) -> bool:
        self._calls += 1
        return self.check_every is not None and self._calls % self.check_every == 0

    def _call(self, served: Served, memory: LastValues | None = None) -> Call:
        device, size = served.arguments.device, self._batch(served).size
        return Call(served.graph, served.run, device, size, served.swapped, memory=CallMemory(memory))

    def _batch(self, served: Served) -> Batch:
        return self.batch.of(served.arguments.tensors, served.arguments.names, served.run.output)

    def _keep(self, state: InferenceState) -> None:
        self._state = state

    # captures

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Have a graph for calls as this one, and leave the module as it was; returns what it has computed."""
        device = Arguments.of(self.module, args, kwargs).device
        with self.shards.gathered(), plain_autograd(), untouched(self.module, device):
            return self._served(args, kwargs, self.algorithm).run.output

    def find_batch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Look which dimension counts samples, if need be by runs on fewer; the module is left as it was."""
        with self.shards.gathered():
            self.batch = batch_dimension_of(self.module, args, kwargs, output)

    def looked_at(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        captures: Captures | None = None,
        memory: LastValues | None = None,
    ) -> Call:
        """A recorded run of the module, or of a view of it, which is left as it was."""
        captures = captures or self.captures
        module = captures.module
        runs = self._runs if captures is self.captures else module
        arguments = Arguments.of(module, args, kwargs)
        check_inputs(module, arguments.tensors)
        with self.shards.gathered(), plain_autograd(), untouched(module, arguments.device):
            call = lambda: called(runs, module, args, kwargs)  # noqa: E731
            looked = self._call(captures.run(arguments, call, self.algorithm, keep_cuts=False), memory)
        if captures is self.captures and self._latest is None:
            self._latest = looked.graph
        return looked

    def _captured_run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Served:
        with self.shards.gathered():
            return self._served(args, kwargs, self.algorithm)

    def _served(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        algorithm: Algorithm | None,
        contents: BufferSnapshot | None = None,
    ) -> Served:
        if self.algorithm is None:
            self._see_again()
        captures, runs = self._with_free(args, kwargs, () if algorithm is None else algorithm.free_inputs)
        arguments = Arguments.of(captures.module, args, kwargs)
        check_inputs(self.module, arguments.tensors)
        call = lambda: called(runs, captures.module, args, kwargs)  # noqa: E731
        served = captures.run(arguments, call, algorithm, contents=contents)
        self._latest = served.graph
        return served

    def _with_free(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], free: tuple[str, ...]
    ) -> tuple[Captures, Callable[..., Any]]:
        """The graphs that a call needs, and what runs it: a view of the module where inputs are values."""
        if not free:
            return self.captures, self._runs
        captures = self.captures.behind(nodes_of_inputs("PredictiveCoding", self.module, args, kwargs, free))
        if not self.captures.inputs:
            self.captures.see(Arguments.of(self.module, args, kwargs))
        return captures, captures.module

    def _see_again(self) -> None:
        """Layers and parameters that were replaced while no optimizer held the old ones are the module's now."""
        with self.shards.gathered():
            known = self.captures.know_the_module()
        if not known and not inside_functional_call():
            self.shards, self.captures = seen(self.module, self.captures.granularity)
            self._latest = None

    # results

    @property
    def granularity(self) -> Granularity:
        """What ``nodes`` was given to :func:`convert`."""
        return self.captures.granularity

    @property
    def graph(self) -> EnergyGraph:
        """The energy graph of the last call. Raises :class:`NotCapturedError` before any input was seen."""
        if self._latest is None:
            raise NotCapturedError(
                "model.graph",
                "no graph yet",
                "an example input",
                "Call the model once, or pass example_inputs to torch2ebm.convert.",
            )
        return self._latest

    @property
    def nodes(self) -> Mapping[str, Node]:
        """Name to :class:`Node`, parents before children."""
        return self.graph.nodes

    @property
    def captured_by(self) -> str:
        """``"run"``: by a run of the module. Raises :class:`NotCapturedError` before any input was seen."""
        return "run" if self.graph else ""  # an error where there is no graph yet

    @property
    def state(self) -> InferenceState:
        """Of the last backward. Raises :class:`NoStateError` before the first, and after the next forward."""
        if self._state is None:
            raise NoStateError(
                "model.state",
                "no state",
                "a backward since the last forward",
                "Attach an EnergyOptimizer, then call loss.backward(); look at the state before the next forward.",
            )
        return self._state

    def forget(self) -> None:
        """What ``start="last"`` and ``start="average"`` begin at goes: a new sequence begins."""
        self.memory.forget()

    def summary(self) -> str:
        """A table of the nodes."""
        return f"{node_table(self.graph, self._state)}\n{self.batch}"

    def draw(self, path: str | os.PathLike[str] | None = None, *, depth: int | None = None) -> GraphPicture:
        """The picture of the graph, written to a file where there is a path."""
        return draw_graph(self.graph, path, depth)

    # attaching

    @property
    def attached(self) -> bool:
        """Whether whoever attached the algorithm is still there."""
        return bool(self.holders)

    @property
    def holders(self) -> list[Any]:
        """Who attached the algorithm: the optimizers, those that are still there."""
        return [holder for each in self._holders if (holder := each()) is not None]

    def attach(self, algorithm: Algorithm, optimizer: object | None = None) -> None:
        """Raises :class:`AttachmentError` if an algorithm is attached whose optimizer is still there."""
        check_algorithm("model.attach(algorithm)", algorithm, AttachmentError)
        if self.attached:
            gc.collect()  # a trainer that is gone keeps its optimizer until its cycles are collected
        if self.attached:
            raise AttachmentError(
                "EnergyOptimizer(model)",
                f"a model with {self.algorithm!r} attached",
                "a model without an algorithm",
                "Call detach() on the optimizer that is attached, or on the model.",
            )
        self._see_again()
        self._holders = [weakref.ref(self if optimizer is None else optimizer)]
        self._plain.end()
        self.algorithm, self._state, self._latest = algorithm, None, None
        self.forwards, self.replicas, self.memory = OpenForwards(), Replicas(), LastValues()
        self._calls, self.check_every = 0, type(self).check_every_by_default

    def attach_beside(self, optimizer: object) -> None:
        """Another optimizer, of other parameters, for the algorithm that is attached."""
        self._holders.append(weakref.ref(optimizer))

    def detach_from(self, optimizer: object) -> None:
        """One optimizer goes; the algorithm goes with the last of them. Nothing for one that has gone already."""
        others = [holder for holder in self.holders if holder is not optimizer]
        if len(others) < len(self.holders):
            self._holders = [weakref.ref(each) for each in others]
            if not others:
                self.detach()

    def detach(self) -> None:
        """End the attachment."""
        self.algorithm, self._holders, self._state = None, [], None
        self.forwards, self.replicas, self.memory = OpenForwards(), Replicas(), LastValues()

    # what the optimizer asks

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """By name, as an optimizer has them: shards, where ``fully_shard`` made some; the algorithm's own, too."""
        learned = {} if self.algorithm is None else self.algorithm.learned
        return {**dict(self.module.named_parameters()), **self.shards.parts, **learned}

    def synchronised(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The mean over processes of gradients that no wrapper has seen."""
        return self.shards.scattered(gradients) if self.shards.parts else self.replicas.averaged(gradients)
