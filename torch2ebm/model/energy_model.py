"""``convert`` and the model that people call: the module it came from, with an energy graph and an algorithm."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.capture.signature import assumed_signature, flatten_arguments, with_signature_of
from torch2ebm.capture.symbolic import trace
from torch2ebm.common.nested import fill, map_leaves
from torch2ebm.engine.call import Call
from torch2ebm.engine.finite import check_standing
from torch2ebm.engine.results import InferenceState
from torch2ebm.errors import AttachmentError, ConfigurationError, NoStateError, NotCapturedError
from torch2ebm.graph.energy_graph import EnergyGraph, Node
from torch2ebm.graph.granularity import Granularity, named_leaves
from torch2ebm.isolation.module_state import tensors_in_place
from torch2ebm.isolation.out_of_memory import exhausted_memory_named
from torch2ebm.isolation.torch_modes import TRACING
from torch2ebm.loss.taped_tensor import put_on_new_tape
from torch2ebm.model.arguments import as_arguments, check_arguments, check_inputs, takes_any_arguments
from torch2ebm.model.backward import EnergyFunction, OpenCall
from torch2ebm.model.capture_cache import Captures
from torch2ebm.model.fingerprint import Fingerprint, swapped_parameters
from torch2ebm.model.open_forwards import OpenForwards
from torch2ebm.model.replicas import Replicas
from torch2ebm.model.shards import Shards
from torch2ebm.reports.drawing import draw_graph
from torch2ebm.reports.tables import node_table


def convert(module: nn.Module, nodes: Granularity = "auto", example_inputs: Any = None) -> EnergyModel:
    """Make an energy model of ``module``: same parameters, same outputs, value nodes inside.

    Args:
        module: Any module whose forward can be traced. It is left as it is and shares everything with the result.
        nodes: What becomes a value node. ``"auto"``: what the attached algorithm asks for, ``"layer"`` until one is;
            ``"layer"``: a parameterised operation with the activations that follow; ``"preactivation"``: cut before
            the activations; ``"activation"``: cut before and after them; ``"module"``: every leaf module; ``"op"``:
            every operation; ``"children"``: each top-level child, as Torch2PC; or a list of submodule names that
            each become one node.
        example_inputs: A tuple is positional, a dict is keywords, a tensor is one positional. Without it the graph
            is cut and verified at the first call.

    Raises:
        UntraceableError: if forward cannot be turned into a graph, with place and remedy.
        UnknownNodeError: if a name in ``nodes`` is no submodule that forward calls.
        PartitionError: if a name in ``nodes`` computes nothing that depends on a parameter.
        CaptureMismatchError: if the graph does not compute what the module computes.

    Warns:
        StaleAttributeWarning: if forward leaves tensors in plain attributes: while an algorithm runs, they stay as
            the last plain forward left them.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net, example_inputs=torch.randn(2, 4))
        >>> list(model.nodes)
        ['0', '2']
    """
    if not isinstance(module, nn.Module) or isinstance(module, EnergyModel):
        raise ConfigurationError(
            "torch2ebm.convert(module)",
            type(module).__name__,
            "a torch.nn.Module that is not converted yet",
            "Pass the network itself.",
        )
    return EnergyModel(module, nodes, example_inputs)


class EnergyModel(nn.Module):
    """A module with value nodes. Made by :func:`convert`; called, moved, saved and switched as the module it came from.

    Without an algorithm, ``loss.backward()`` is ordinary backpropagation. With one (see :class:`EnergyOptimizer`) and
    gradients enabled, the algorithm runs in training and evaluation mode alike. Under ``torch.no_grad`` the original
    module runs. Attributes that it does not have itself are those of the module.
    """

    accepts_loss_kwargs = False  # the Hugging Face Trainer then passes no num_items_in_batch

    def __init__(self, module: nn.Module, nodes: Granularity = "auto", example_inputs: Any = None) -> None:
        self._share(module)
        leaves = named_leaves(module, nodes)
        self._granularity: Granularity = nodes if isinstance(nodes, str) else tuple(nodes)
        if example_inputs is None and not takes_any_arguments(module):
            with TRACING, self.shards.gathered():
                trace(module, assumed_signature(module), leaves, all_called=nodes != "children")
        elif example_inputs is not None:
            args, kwargs = as_arguments(example_inputs)
            self._graph_for(args, kwargs)

    def _share(self, module: nn.Module) -> None:
        """Be the module: the same registries, not copies of them, so that whatever moves one moves both."""
        object.__setattr__(self, "_original", module)
        self.__class__ = _class_for(module)
        training = module.training
        super().__init__()  # sets its own mode, which is the module's
        module.training = training
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = module.__dict__[registry]
        self.shards = Shards(module)
        with self.shards.gathered():
            self._fingerprint = Fingerprint.of(module)
            self._own = dict(module.named_parameters())
        self._finite_buffers = tuple(
            name
            for name, buffer in module.named_buffers()
            if buffer.is_floating_point() and not buffer.is_meta and bool(torch.isfinite(buffer).all())
        )
        self._captures = Captures(module)
        self._captured_by: str | None = None
        self._latest: EnergyGraph | None = None
        self._state: InferenceState | None = None
        self._algorithm: Algorithm | None = None
        self._holder: weakref.ref[object] | None = None
        self.forwards, self.replicas = OpenForwards(), Replicas()

    # what people call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # it would trace the capture and the recorder, to no gain
            return torch.compiler.disable(self._answer)(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self._answer(*args, **kwargs)

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        self._state = None
        if self._algorithm is not None and self._algorithm.defines_output and not torch.is_grad_enabled():
            return self._output_alone(self._algorithm, args, kwargs)
        if self._algorithm is None or not torch.is_grad_enabled():
            if self._latest is None:
                self._graph_for(args, kwargs)
            return self._original(*args, **kwargs)
        if not self.shards.covers(self._own):
            self.replicas.forward(type(self._original).__name__)
        return self.run(self._algorithm, args, kwargs, self._keep, self.forwards)

    def _output_alone(self, algorithm: Algorithm, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The output that the algorithm defines, where no backward will follow."""
        # a relaxation differentiates, which inference mode forbids
        with self.shards.gathered(), torch.inference_mode(False), torch.no_grad():
            args, kwargs = map_leaves(_ordinary, (args, dict(kwargs)))
            tensors, graph, swapped = self._tensors_and_graph(args, kwargs, algorithm)
            check_inputs(tensors)
            call = Call(graph, [tensor.detach() for tensor in tensors], swapped)
            with tensors_in_place(self._original, swapped):
                algorithm.forward(call)
            return fill(graph.structure, graph.output(call.values, call.environment))

    def feedforward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain module's output, whatever algorithm is attached, with ordinary autograd."""
        return self._original(*args, **kwargs)

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
        tensors, graph, swapped = self._tensors_and_graph(args, kwargs, algorithm)
        check_inputs(tensors)
        changed = self._present(graph.changing_buffers)
        call = Call(graph, tensors, swapped)
        open_call = OpenCall(call, algorithm, changed, self._standing_buffers(), forwards, keep, self.shards)

        def recorded_output() -> Any:
            with exhausted_memory_named("model(...)", algorithm):
                outputs = EnergyFunction.apply(  # type: ignore[no-untyped-call]
                    open_call, *self.shards.in_place_of(open_call.parameters), *tensors
                )
                recorded = dict(zip(graph.output_slots, put_on_new_tape(open_call.tape, outputs), strict=True))
                return fill(graph.structure, graph.output(recorded, call.environment))

        return open_call.withdrawn_on_error(recorded_output)

    def _standing_buffers(self) -> dict[str, Tensor]:
        """Buffers in which NaN or infinity would be new."""
        return self._present(self._finite_buffers)

    def _present(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The buffers of these names as they are now. One walk over the module: ``get_buffer`` takes one a name."""
        buffers = dict(self._original.named_buffers(remove_duplicate=False)) if names else {}
        return {name: buffers[name] for name in names}

    def _keep(self, state: InferenceState) -> None:
        self._state = state

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """By name, as an optimizer has them: shards, where ``fully_shard`` made some."""
        return {**dict(self.named_parameters()), **self.shards.parts}

    def synchronised(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The mean over processes of gradients that no wrapper has seen."""
        return self.shards.scattered(gradients) if self.shards.parts else self.replicas.averaged(gradients)

    # what they look at

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
        """How the graph of the last call was captured: ``"fx"``, symbolic tracing, or ``"export"``, ``torch.export``.

        Raises :class:`NotCapturedError` before any input was seen.
        """
        assert self.graph is not None and self._captured_by is not None
        return self._captured_by

    @property
    def algorithm(self) -> Algorithm | None:
        """The attached algorithm, or None: ordinary backpropagation."""
        return self._algorithm

    @property
    def state(self) -> InferenceState:
        """Values, predictions, errors and energies of the last backward; released at the next forward.

        Raises :class:`NoStateError` before the first backward.
        """
        if self._state is None:
            raise NoStateError(
                "model.state",
                "no state",
                "a backward since the last forward",
                "Attach an EnergyOptimizer, then call loss.backward(); look at the state before the next forward.",
            )
        return self._state

    def summary(self) -> str:
        """A table of the nodes: name, level, function, shape of the value, parameters."""
        return node_table(self.graph, self._state)

    def draw(self, path: str) -> None:
        """Draw the graph, one row a level, to a picture file. Needs matplotlib (``pip install torch2ebm[plot]``)."""
        draw_graph(self.graph, path)

    # attaching

    @property
    def attached(self) -> bool:
        """Whether whoever attached the algorithm is still there."""
        return self._holder is not None and self._holder() is not None

    def attach(self, algorithm: Algorithm, optimizer: object | None = None) -> None:
        """Called by :class:`EnergyOptimizer`. The algorithm stays when the optimizer goes, until another is attached.

        Raises :class:`AttachmentError` if one is attached whose optimizer is still there.
        """
        if self.attached:
            gc.collect()  # a trainer that is gone keeps its optimizer until its cycles are collected
        if self.attached:
            raise AttachmentError(
                "EnergyOptimizer(model)",
                f"a model with {self._algorithm!r} attached",
                "a model without an algorithm",
                "Call detach() on the optimizer that is attached, or on the model.",
            )
        self._holder = weakref.ref(self if optimizer is None else optimizer)
        self._algorithm, self._state, self._latest = algorithm, None, None
        self.forwards, self.replicas = OpenForwards(), Replicas()

    def detach(self) -> None:
        """End the attachment: the model is ordinary backpropagation again."""
        self._algorithm, self._holder, self._state = None, None, None
        self.forwards, self.replicas = OpenForwards(), Replicas()

    # capture

    def _graph_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> EnergyGraph:
        with self.shards.gathered():
            return self._tensors_and_graph(args, kwargs, self._algorithm)[1]

    def _tensors_and_graph(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], algorithm: Algorithm | None
    ) -> tuple[list[Tensor], EnergyGraph, Mapping[str, Tensor]]:
        """The tensors among the arguments, the graph for their structure, the modes and the algorithm, and what
        stands in the place of parameters."""
        fingerprint = Fingerprint.of(self._original)
        swapped: dict[str, Tensor] = {}
        if not fingerprint.same_objects(self._fingerprint):
            swapped = swapped_parameters(self._fingerprint, fingerprint, self._own)
        granularity = self._granularity
        if granularity == "auto":
            granularity = "layer" if algorithm is None else algorithm.partition
        tensors, signature = flatten_arguments(args, kwargs)
        key = (fingerprint.modes, signature.key)
        found = self._captures.known(key, granularity, tensors)
        if found is None:
            with TRACING, tensors_in_place(self._original, {name: self._own[name] for name in swapped}):
                check_arguments(self._original, args, kwargs)
                check_inputs(tensors)  # what a capture shows of each operation must not come from bad numbers
                check_standing({**self._own, **self._standing_buffers()})
                leaves = named_leaves(self._original, self._granularity)
                all_called = self._granularity != "children"
                found = self._captures.made(key, granularity, signature, tensors, leaves, all_called)
        captured, self._latest = found
        self._captured_by = captured.captured_by
        return tensors, self._latest, swapped

    # being the module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_original":
                raise
            return getattr(self._original, name)

    @property
    def training(self) -> bool:
        mode: bool = self._original.training
        return mode

    @training.setter
    def training(self, mode: bool) -> None:
        self._original.training = mode

    def train(self, mode: bool = True) -> EnergyModel:
        self._original.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EnergyModel:
        self._original._apply(fn, recurse)
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> EnergyModel:
        self._original.apply(fn)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._original.load_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{type(self._original).__name__}, algorithm={self._algorithm!r}"

    def __getstate__(self) -> dict[str, Any]:
        """The module and the choices; captures and the state of the last backward are made again when needed."""
        return {"module": self._original, "granularity": self._granularity, "algorithm": self._algorithm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._share(state["module"])
        self._granularity, self._algorithm = state["granularity"], state["algorithm"]

    def __reduce__(self) -> tuple[Any, ...]:
        return EnergyModel.__new__, (EnergyModel,), self.__getstate__()


def _class_for(module: nn.Module) -> type[EnergyModel]:
    """The class with a forward that shows the module's arguments: it is where a trainer looks for what to pass."""
    forward = with_signature_of(module.forward, EnergyModel.forward)
    return type("EnergyModel", (EnergyModel,), {"forward": forward, "__module__": __name__})


def _ordinary(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf
