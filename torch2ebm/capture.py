"""From a module to one functional ``fx.Graph``, and what a real run shows of each of its operations.

Knows nothing of energies. The module is left exactly as it was: attributes, buffers and generators are restored.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
import operator
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointFunction

from torch2ebm.errors import (
    CaptureMismatchError,
    ConfigurationError,
    NodeEvaluationError,
    Torch2EBMError,
    UnknownNodeError,
    UntraceableError,
)
from torch2ebm.freezing import BufferSnapshot, RandomState, Statistics, hooks_suspended, recording_statistics
from torch2ebm.functional_graph import expand_tuples, make_functional, writes_in_place
from torch2ebm.structure import fill, leaves_of, map_leaves, template_of


class _TensorLeaf:
    """Stands for a tensor among the leaves of a call's arguments."""

    def __repr__(self) -> str:
        return "<tensor>"


TENSOR = _TensorLeaf()


@dataclass(frozen=True)
class Signature:
    """What a capture is specialised to: the structure of the arguments and every argument that is no tensor."""

    leaves: tuple[Any, ...]
    structure: Any  # a template of (args, kwargs)

    @property
    def key(self) -> tuple[Any, ...]:
        """1, True and 1.0 are equal, and are not the same argument."""
        return self.structure, tuple((type(leaf), leaf) for leaf in self.leaves)

    def unflatten(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        remaining = iter(tensors)
        args, kwargs = fill(self.structure, [next(remaining) if leaf is TENSOR else leaf for leaf in self.leaves])
        return args, kwargs

    def names(self, module: nn.Module) -> Iterator[str]:
        """A name for each tensor, after the argument that holds it."""
        args, kwargs = self.structure
        parameters = inspect.signature(module.forward).parameters.values()
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        positional += [f"input_{i}" for i in range(len(positional), len(args))]
        for name, argument in [*zip(positional, args, strict=False), *kwargs.items()]:
            places = list(leaves_of(argument))
            for i, place in enumerate(places):
                if self.leaves[place] is TENSOR:
                    yield re.sub(r"\W", "_", name if len(places) == 1 else f"{name}_{i}")


def flatten_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], Signature]:
    """The tensors of a call in order, and the signature that puts them back."""
    structure = (args, dict(kwargs))
    leaves = list(leaves_of(structure))
    markers = tuple(TENSOR if isinstance(leaf, Tensor) else _checked(leaf) for leaf in leaves)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], Signature(markers, template_of(structure))


PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, slice, type(Ellipsis))
PLAIN_OF_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)


def _checked(leaf: Any) -> Any:
    """An argument that is no tensor is part of the graph, so it has to be comparable by value."""
    if not isinstance(leaf, (*PLAIN, *PLAIN_OF_TORCH)):
        raise ConfigurationError(
            "model(...)",
            f"an argument of type {type(leaf).__name__}",
            "tensors, numbers, strings, None, and tuples, lists or dicts of them",
            "Pass its tensors as a tuple or dict; turn arrays into tensors.",
        )
    return leaf


def assumed_signature(module: nn.Module) -> Signature:
    """Every argument without a default a tensor, every other left out: what ``convert`` traces before any example."""
    required = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    positional = [p.name for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = {p.name: p.name for p in required if p.kind is p.KEYWORD_ONLY}
    structure = (tuple(positional), keywords)
    return Signature((TENSOR,) * len(list(leaves_of(structure))), template_of(structure))


# Tracing --------------------------------------------------------------------------------------------------------------


class WritableProxy(fx.Proxy):
    """A proxy that can be written by index: ``x[i] = y`` is traced as ``operator.setitem``."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def stopped(value: Any) -> Any:
    """What an operation under ``torch.no_grad`` returns."""
    return map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, value)


def copied(value: Any) -> Any:
    """A copy of a tensor; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


class EnergyTracer(fx.Tracer):
    """Symbolic tracing with modules of ``torch.nn`` and the modules that the user names as leaves."""

    proxy_buffer_attributes = True  # else tracing would really write the buffers that forward writes

    def __init__(self, signature: Signature, leaves: frozenset[str]) -> None:
        super().__init__(autowrap_modules=(math,))
        self.signature = signature
        self.leaves = leaves
        self.failed_in = ""
        self.entered: list[nn.Module] = []  # modules whose forward is part of the trace

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves:
            return True
        if getattr(m, "inplace", False) is True:
            return False  # traced into its functional, whose inplace=True the graph can then drop
        return super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        placeholders = [self.create_proxy("placeholder", n, (), {}) for n in self.signature.names(self.root)]
        args, kwargs = self.signature.unflatten(placeholders)
        self.entered.append(self.root)

        def forward(root: nn.Module) -> Any:
            return root.forward(*args, **kwargs)

        return forward, [self.root]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            path = self.path_of_module(m)
            if not self.is_leaf_module(m, path):
                self.entered.append(m)
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or self.path_of_module(m)
            raise

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return WritableProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind.startswith("call") and not torch.is_grad_enabled() and target is not stopped:
            if writes_in_place(proxy.node):
                raise TypeError(f"{proxy.node.target} writes a tensor in place under torch.no_grad")
            proxy = super().create_proxy("call_function", stopped, (proxy,), {})
        return proxy

    def create_arg(self, a: Any) -> Any:
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Custom autograd functions stay whole, and an assignment to a buffer becomes a write, while this traces."""
        apply, setattr_ = torch.autograd.Function.__dict__["apply"], nn.Module.__setattr__
        factories = {name: getattr(torch, name) for name in ("zeros", "ones", "empty", "rand", "randn", "full")}

        def traced_apply(function: Any, *args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, fx.Proxy) for leaf in leaves_of((args, kwargs))):
                if function is CheckpointFunction:  # recomputation is the business of a node's own backward
                    return args[0](*args[2:])
                return self.create_proxy("call_function", _as_operation(function), args, kwargs)
            return apply.__func__(function, *args, **kwargs)

        def traced_setattr(module: nn.Module, name: str, value: Any) -> None:
            if isinstance(value, fx.Proxy) and isinstance(module.__dict__.get("_buffers", {}).get(name), Tensor):
                self.create_proxy("call_method", "copy_", (getattr(module, name), value), {})
            else:
                setattr_(module, name, value)

        for name, factory in factories.items():
            setattr(torch, name, self._traced_factory(factory))
        torch.autograd.Function.apply = classmethod(traced_apply)  # type: ignore[assignment, method-assign]
        nn.Module.__setattr__ = traced_setattr  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            for name, factory in factories.items():
                setattr(torch, name, factory)
            torch.autograd.Function.apply = apply  # type: ignore[method-assign]
            nn.Module.__setattr__ = setattr_  # type: ignore[method-assign]

    def _traced_factory(self, factory: Callable[..., Any]) -> Callable[..., Any]:
        """fx sees ``torch.zeros(n, 3)`` only where the whole shape is one argument."""

        def traced(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, fx.Proxy) for leaf in leaves_of((args, kwargs))):
                return self.create_proxy("call_function", factory, args, kwargs)
            return factory(*args, **kwargs)

        return traced


def _as_operation(function: Any) -> Callable[..., Any]:
    def operation(*args: Any, **kwargs: Any) -> Any:
        return function.apply(*args, **kwargs)

    operation.__name__ = operation.__qualname__ = function.__name__
    return operation


@dataclass(frozen=True)
class Trace:
    """A functional graph whose targets are attributes of the module; tensors made while tracing come as constants."""

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    leaves: frozenset[str]
    settings: Settings
    writes: Mapping[fx.Node, fx.Node]  # an operation that wrote in place -> what it wrote
    captured_by: str = "fx"


Settings = tuple[tuple[nn.Module, str, Any], ...]


def settings_of(modules: Sequence[nn.Module]) -> Settings:
    """Plain attributes of the modules that tracing went through: their values are part of the graph."""
    return tuple(
        (module, name, value)
        for module in dict.fromkeys(modules)
        for name, value in module.__dict__.items()
        if name != "training" and type(value) in (int, float, bool, str)
    )


def still_hold(settings: Settings) -> bool:
    return all(module.__dict__.get(name) == value for module, name, value in settings)


def trace(
    module: nn.Module, signature: Signature, leaves: frozenset[str] = frozenset(), all_called: bool = True
) -> Trace:
    """Trace ``module``. Raises :class:`UntraceableError` or :class:`UnknownNodeError`; alters nothing."""
    _check_names(module, leaves)
    tracer = EnergyTracer(signature, leaves)
    with _attributes_restored(module):
        try:
            with torch.enable_grad(), tracer.patched():
                graph = tracer.trace(module)
        except Torch2EBMError:
            raise
        except Exception as error:
            raise _untraceable(module, tracer.failed_in, error) from error
        constants = _lift_constants(module, graph)
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    if all_called and (missing := sorted(leaves - called)):
        raise UnknownNodeError(
            "convert(nodes=[...])",
            f"{missing}, never called by {type(module).__name__}.forward",
            "submodules that forward calls",
            "Name the submodules that they contain, or the one that contains them.",
        )
    writes = make_functional(graph)
    _open_records(graph)
    _protect_inputs(module, graph, leaves)
    return Trace(graph, constants, leaves, settings_of(tracer.entered), writes)


def _open_records(graph: fx.Graph) -> None:
    """A dataclass that forward makes for its output becomes a dict of its fields: the output is made of its leaves."""
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (_fields_in_order(output.args[0]),)
    graph.eliminate_dead_code(lambda node: not dataclasses.is_dataclass(node.target))


def _fields_in_order(structure: Any) -> Any:
    if isinstance(structure, fx.Node) and dataclasses.is_dataclass(structure.target):
        return {f.name: _fields_in_order(structure.kwargs[f.name]) for f in dataclasses.fields(structure.target)}
    if isinstance(structure, (tuple, list)):
        return [_fields_in_order(part) for part in structure]
    if isinstance(structure, dict):
        return {key: _fields_in_order(part) for key, part in structure.items()}
    return structure


def _protect_inputs(module: nn.Module, graph: fx.Graph, leaves: frozenset[str]) -> None:
    """A module kept whole may write its input in place, which is another node's value: give it a copy."""
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in leaves and _may_write(module.get_submodule(str(node.target))):
            for source in node.all_input_nodes:
                with graph.inserting_before(node):
                    copy = graph.call_function(copied, (source,))
                node.replace_input_with(source, copy)


def _may_write(module: nn.Module) -> bool:
    """Known modules say so; of others only a real run could tell, and a copy costs little."""
    parts = list(module.modules())
    known = all(part.__class__.__module__.startswith("torch.nn") for part in parts)
    return not known or any(getattr(part, "inplace", False) is True for part in parts)


def _check_names(module: nn.Module, leaves: frozenset[str]) -> None:
    known = {name for name, _ in module.named_modules()} - {""}
    if unknown := sorted(leaves - known):
        some = ", ".join(sorted(known)[:12])
        raise UnknownNodeError(
            "convert(nodes=[...])",
            f"{unknown}",
            f"names of submodules of {type(module).__name__} ({some}, ...)",
            "Take them from module.named_modules().",
        )


def _untraceable(module: nn.Module, scope: str, error: Exception) -> UntraceableError:
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not re.search(r"[/\\]torch(2ebm)?[/\\]", f.filename)
    ]
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown place"
    line = f" `{frames[-1].line}`" if frames else ""
    named = (
        f"make '{scope}' one node with nodes=['{scope}']"
        if scope
        else "make the submodule concerned one node with nodes=[...]"
    )
    reason = _first_line(error)
    return UntraceableError(
        f"torch2ebm cannot capture {type(module).__name__}",
        f"{scope or 'forward'} ({place}){line}: {reason}",
        "operations on tensors that do not branch on a tensor's value",
        f"Options: {named}, rewrite the branch with torch.where, or pass example_inputs: an argument that is no tensor "
        "is then known, and torch.export is tried where symbolic tracing fails.",
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _attributes_restored(module: nn.Module) -> Iterator[None]:
    """Tracing runs forward with proxies, and forward may assign them to attributes and buffers."""
    registries = ("_parameters", "_buffers", "_modules")
    before = [(m, dict(m.__dict__), [dict(m.__dict__[r]) for r in registries]) for m in module.modules()]
    try:
        yield
    finally:
        for m, attributes, contents in before:
            m.__dict__.clear()
            m.__dict__.update(attributes)
            for registry, content in zip(registries, contents, strict=True):
                if _identities(m.__dict__[registry]) != _identities(content):
                    m.__dict__[registry].clear()
                    m.__dict__[registry].update(content)


def _identities(registry: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(name, id(value)) for name, value in registry.items()]


def _lift_constants(module: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    """Tensors that tracing itself made become placeholders, since the restored module does not have them."""
    constants: dict[str, Tensor] = {}
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.op != "get_attr" or not str(node.target).startswith("_tensor_constant"):
            continue
        name = str(node.target).lstrip("_")
        if name not in constants:
            constants[name] = getattr(module, str(node.target))
            with graph.inserting_before(first):
                placeholder = graph.placeholder(name)
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
    return constants


# What a real run shows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """What a real run showed of one operation."""

    live: bool  # floating point, and differentiable with respect to parameters or to a node that the user named
    tensor: bool
    random: bool = False
    batch_statistics: bool = False
    finite: bool = True
    shape: tuple[int, ...] = ()
    data: bool = False  # tensors, or a tuple of them (a chunk of an input): not a shape


class _Observer(fx.Interpreter):
    def __init__(self, module: nn.Module, traced: Trace, device: torch.device) -> None:
        super().__init__(module, garbage_collect_values=False, graph=traced.graph)  # storages must not be used again
        self.device, self.leaves = device, traced.leaves
        self.facts: dict[fx.Node, Fact] = {}
        self.outputs: dict[fx.Node, Any] = {}  # of operations with several outputs
        self.storages: dict[fx.Node, set[int]] = {}
        self.wrote: set[fx.Node] = set()  # modules kept whole that wrote their input

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            value = super().run_node(n)
            self.facts[n] = Fact(live=False, tensor=isinstance(value, Tensor), data=_has_data(value))
            return value
        random_before, statistics = RandomState(self.device), Statistics()
        versions = [tensor._version for tensor in self._read(n)]
        with recording_statistics(statistics):
            value = super().run_node(n)
        if n.op == "call_module" and versions != [tensor._version for tensor in self._read(n)]:
            self.wrote.add(n)
        if n.op == "call_module" and n.target in self.leaves:
            value = map_leaves(_made_live, value)
        self.facts[n] = Fact(
            live=any(_is_live(leaf) for leaf in leaves_of(value)),
            tensor=isinstance(value, Tensor),
            random=random_before.advanced(),
            batch_statistics=bool(statistics),
            finite=not (isinstance(value, Tensor) and value.is_floating_point()) or bool(torch.isfinite(value).all()),
            shape=tuple(value.shape) if isinstance(value, Tensor) else (),
            data=_has_data(value),
        )
        if not isinstance(value, Tensor):
            self.outputs[n] = value
        return value

    def _read(self, n: fx.Node) -> list[Tensor]:
        return [value for source in n.all_input_nodes if isinstance(value := self.env.get(source), Tensor)]

    def check_writes(self, writes: Mapping[fx.Node, fx.Node]) -> None:
        """Raise where what was written in place is read later under another name: a view, its base, the input."""
        position = {node: i for i, node in enumerate(self.facts)}
        storage = {node: _storages(value) for node, value in self.env.items() if node in position}
        for write, written in [*writes.items(), *((n, n.all_input_nodes[0]) for n in self.wrote)]:
            original = written.all_input_nodes[0] if written.target is copied else written
            shared = storage.get(original, set())
            for other in position:
                if position[other] >= position[write] or not shared & storage.get(other, set()):
                    continue
                readers = [user for user in other.users if position.get(user, -1) > position[write]]
                if readers and (other is not original or write in self.wrote):
                    raise _aliased(self.module, write, other)


def _storages(value: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in leaves_of(value) if isinstance(leaf, Tensor)} - {0}


def _aliased(module: Any, write: fx.Node, other: fx.Node) -> UntraceableError:
    return UntraceableError(
        f"torch2ebm cannot capture {type(module).__name__}",
        f"{write.format_node()} writes in place what '{other.name}' is read as afterwards",
        "writes in place whose result is read through the tensor that was written",
        "Write to a copy (x = x.clone()), use the form that is not in place, or make the submodule around both one "
        "node with nodes=[...].",
    )


def _has_data(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in leaves_of(value))


def _is_live(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and (value.is_floating_point() or value.is_complex())


def _made_live(value: Any) -> Any:
    """A node that the user named has a value of its own even where no parameter feeds it."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_()
    return value


@dataclass(frozen=True, eq=False)
class Capture:
    """A verified-to-be graph of one module in one mode for one signature."""

    module: nn.Module
    graph: fx.Graph
    constants: Mapping[str, Tensor]
    leaves: frozenset[str]
    signature: Signature
    facts: Mapping[fx.Node, Fact]
    reference: Reference
    settings: Settings
    captured_by: str


@dataclass(frozen=True)
class Reference:
    """One real run of the module: what every composition of its parts has to give, bit for bit."""

    tensors: tuple[Tensor, ...]
    outputs: list[Any]
    structure: Any  # a template of the output
    changed_buffers: Mapping[str, Tensor]  # name -> contents after the run
    cotangents: Sequence[Tensor | None] = ()  # one an output: an arbitrary gradient of those that have one
    gradients: Mapping[str, Tensor] | None = None  # of the parameters for these; None where the module has no backward

    def check(self, module: nn.Module, outputs: Sequence[Any]) -> None:
        """Raise :class:`CaptureMismatchError` where ``outputs`` or the module's buffers now differ."""
        buffers = dict(module.named_buffers())
        if len(outputs) != len(self.outputs):
            raise _mismatch(module, [f"{len(outputs)} outputs where the module has {len(self.outputs)}"])
        differences = [
            f"output {i}"
            for i, (ours, real) in enumerate(zip(outputs, self.outputs, strict=True))
            if not _same(ours, real)
        ] + [f"buffer {name}" for name, after in self.changed_buffers.items() if not _same(buffers[name], after)]
        if differences:
            raise _mismatch(module, differences)


def _mismatch(module: nn.Module, differences: Sequence[str]) -> CaptureMismatchError:
    return CaptureMismatchError(
        f"torch2ebm cannot capture {type(module).__name__}",
        f"another result in {', '.join(differences)}",
        "the module's own outputs and buffers",
        "Its forward depends on something that tracing does not see (a value, a counter, a view written in "
        "place, the order of random draws): make that submodule one node with nodes=[...].",
    )


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _same(ours: Any, real: Any) -> bool:
    if not isinstance(real, Tensor):
        return not isinstance(ours, Tensor) and bool(ours == real)
    if not isinstance(ours, Tensor) or ours.shape != real.shape or ours.dtype != real.dtype:
        return False
    if not (real.is_floating_point() or real.is_complex()):
        return torch.equal(ours, real)
    tolerance = 16 * torch.finfo(real.dtype).eps  # accelerators add in no fixed order; on the CPU it is the same bits
    return torch.allclose(ours, real, rtol=tolerance, atol=tolerance, equal_nan=True)


def capture(module: nn.Module, traced: Trace, signature: Signature, tensors: Sequence[Tensor]) -> Capture:
    """Run the module and its trace once on ``tensors``; generators and buffers are restored afterwards."""
    device = tensors[0].device if tensors else torch.device("cpu")
    with plain_autograd(), untouched(module, device):
        tensors = [tensor.detach().clone() for tensor in tensors]
        reference = real_run(module, signature, tensors)
        _check_settings(traced.settings)
    with plain_autograd(), untouched(module, device):
        observer = _Observer(module, traced, device)
        with _all_parameters_trainable(module):
            try:
                observer.run(*[constant.to(device) for constant in traced.constants.values()], *tensors)
            except Exception as error:
                raise _untraceable(module, "", error) from error
    observer.check_writes(traced.writes)
    expand_tuples(traced.graph, observer.outputs, observer.facts, _fact_of_part)
    return Capture(
        module,
        traced.graph,
        traced.constants,
        traced.leaves,
        signature,
        observer.facts,
        reference,
        traced.settings,
        traced.captured_by,
    )


def run_once(module: nn.Module, signature: Signature, tensors: Sequence[Tensor]) -> Reference:
    """What the module itself makes of ``tensors``. Raises :class:`NodeEvaluationError` where it refuses them."""
    device = tensors[0].device if tensors else torch.device("cpu")
    with plain_autograd(), untouched(module, device):
        return real_run(module, signature, [tensor.detach().clone() for tensor in tensors])


def holds_for(captured: Capture, tensors: Sequence[Tensor]) -> bool:
    """Whether the graph gives the module's own outputs and buffers for inputs of other shapes, too."""
    module, tensors = captured.module, [tensor.detach().clone() for tensor in tensors]
    reference = run_once(module, captured.signature, tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    constants = [constant.to(device) for constant in captured.constants.values()]
    with plain_autograd(), untouched(module, device):
        try:
            outputs = fx.Interpreter(module, graph=captured.graph).run(*constants, *tensors)
            reference.check(module, list(leaves_of(outputs)))
        except (CaptureMismatchError, RuntimeError, ValueError, IndexError, TypeError):
            return False
    return bool(reference.structure == captured.reference.structure)


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Gradients on, whatever the caller has switched: inference mode, no_grad, or the hooks of a checkpoint."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged),
    ):
        yield


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _check_settings(settings: Settings) -> None:
    for module, name, value in settings:
        if module.__dict__.get(name) != value:
            raise CaptureMismatchError(
                f"{type(module).__name__}.forward",
                f"a forward that changes its attribute '{name}'",
                "a forward that changes nothing but buffers",
                "Make the attribute a buffer (register_buffer), or make that submodule one node with nodes=[...].",
            )


def _fact_of_part(value: Any) -> Fact:
    tensor = isinstance(value, Tensor)
    return Fact(live=_is_live(value), tensor=tensor, shape=tuple(value.shape) if tensor else (), data=_has_data(value))


def real_run(module: nn.Module, signature: Signature, tensors: Sequence[Tensor]) -> Reference:
    before = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    args, kwargs = signature.unflatten([tensor.clone() for tensor in tensors])
    try:
        output = module(*args, **kwargs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise NodeEvaluationError(
            f"{type(module).__name__}.forward",
            ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors),
            "inputs that the module takes",
            f"The module said: {_first_line(error)}. Check shape, dtype and device of the input.",
        ) from error
    leaves = list(leaves_of(output))
    cotangents, gradients = _real_backward(module, leaves)
    outputs = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    changed = {
        name: buffer.detach().clone()
        for name, buffer in module.named_buffers()
        if name in before and not _identical(buffer, before[name])
    }
    return Reference(tuple(tensors), outputs, template_of(output), changed, cotangents, gradients)


def _real_backward(module: nn.Module, leaves: Sequence[Any]) -> tuple[list[Tensor | None], dict[str, Tensor] | None]:
    """Gradients of the parameters for a fixed, uneven gradient of the outputs."""
    cotangents = [_uneven(leaf) if _is_live(leaf) else None for leaf in leaves]
    live = {id(leaf): (leaf, c) for leaf, c in zip(leaves, cotangents, strict=True) if c is not None}
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not live or not trainable:
        return cotangents, None
    outputs, directions = zip(*live.values(), strict=True)
    once = [c if c is None or live[id(leaf)][1] is c else None for leaf, c in zip(leaves, cotangents, strict=True)]
    try:
        found = torch.autograd.grad(outputs, list(trainable.values()), directions, allow_unused=True)
    except RuntimeError:
        return once, None
    return once, {name: g for name, g in zip(trainable, found, strict=True) if g is not None}


def _uneven(output: Tensor) -> Tensor:
    return torch.linspace(-1, 1.5, output.numel(), device=output.device).reshape(output.shape).to(output.dtype)


@contextmanager
def untouched(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore generators, buffers and attributes at the end; no hook of a parameter runs inside."""
    random = RandomState(device)
    buffers = BufferSnapshot(dict(module.named_buffers()))
    with ExitStack() as stack:
        stack.callback(random.restore)
        stack.callback(buffers.restore)
        stack.enter_context(_attributes_restored(module))
        stack.enter_context(hooks_suspended(module.parameters()))
        yield


@contextmanager
def _all_parameters_trainable(module: nn.Module) -> Iterator[None]:
    """Whether an operation is differentiable must not depend on what is frozen today."""
    frozen = [p for p in module.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
