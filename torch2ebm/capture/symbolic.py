"""The first way to a :class:`Trace`: symbolic tracing by ``torch.fx``.

Forward runs once with proxies in place of tensors, and every operation on a proxy becomes a node of the graph. Shapes
stay symbolic, so one graph serves all batch sizes. A branch on a tensor's value cannot be followed; then
:mod:`torch2ebm.capture.export` is next. Plain ``fx`` misses much of what real modules do; :class:`EnergyTracer` adds
it. The module is left as it was: attributes and buffers are restored.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointFunction

from torch2ebm.capture.in_place_fx import copied, graph_without_writes, stopped, writes_in_place
from torch2ebm.capture.signature import Signature
from torch2ebm.capture.trace import Trace, settings_read_by, untraceable
from torch2ebm.common.nested import leaves_of
from torch2ebm.errors import Torch2EBMError, UnknownNodeError
from torch2ebm.isolation.module_state import attributes_restored

# functions that fx does not see in every form: torch.zeros(x.size(0), 3) fails, torch.zeros((x.size(0), 3)) does not
_FACTORIES = (
    *("zeros", "ones", "empty", "full", "eye", "arange", "linspace", "logspace", "tril_indices", "triu_indices"),
    *("rand", "randn", "randint", "randperm", "zeros_like", "ones_like", "full_like", "empty_like"),
)


class WritableProxy(fx.Proxy):
    """A proxy that can be written by index: ``x[i] = y`` is traced as ``operator.setitem``; fx's own refuses it."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class EnergyTracer(fx.Tracer):
    """Symbolic tracing with modules of ``torch.nn`` and the modules that the user names as leaves."""

    # else forward gets the buffer itself: self.counter.add_(1) would write it, and leave no trace in the graph
    proxy_buffer_attributes = True

    def __init__(self, signature: Signature, leaves: frozenset[str]) -> None:
        super().__init__(autowrap_modules=(math,))
        self.signature = signature
        self.leaves = leaves
        self.failed_in = ""
        self.entered: list[nn.Module] = []  # modules whose forward is part of the trace
        self.thread = threading.get_ident()  # fx patches nn.Module, so what other threads call comes here too

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves:
            return True
        if getattr(m, "inplace", False) is True:
            return False  # traced into its functional, whose inplace=True the graph can then drop
        return super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        # One placeholder for each tensor, wherever it stands among the arguments. fx makes one for each argument of
        # forward, which may be a list or dict of tensors.
        placeholders = [self.create_proxy("placeholder", n, (), {}) for n in self.signature.names(self.root)]
        args, kwargs = self.signature.unflatten(placeholders)
        self.entered.append(self.root)

        def forward(root: nn.Module) -> Any:
            return root.forward(*args, **kwargs)

        return forward, [self.root]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        try:
            path = self.path_of_module(m)
            if not self.is_leaf_module(m, path):
                self.entered.append(m)
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or self.path_of_module(m)  # the innermost is left first
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return WritableProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        # no_grad is in force while forward runs here, but would not be when the graph does: each result is detached
        if kind.startswith("call") and not torch.is_grad_enabled() and target is not stopped:
            if writes_in_place(proxy.node):
                # it changes the content and keeps the gradient, which no operation on a copy does
                raise TypeError(f"{proxy.node.target} writes a tensor in place under torch.no_grad")
            proxy = super().create_proxy("call_function", stopped, (proxy,), {})
        return proxy

    def create_arg(self, a: Any) -> Any:
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)  # fx refuses NumPy's scalars

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Patch torch while this traces: custom autograd functions stay whole, and assigning a buffer becomes a write.

        fx would trace through a custom function's forward and lose its backward. An assignment ``self.buffer = y``
        would put a proxy into the module and leave no trace in the graph.
        """
        # from __dict__: getattr would bind the classmethod to Function, and the subclass would be lost
        apply, setattr_ = torch.autograd.Function.__dict__["apply"], nn.Module.__setattr__
        factories = {name: getattr(torch, name) for name in _FACTORIES}

        def traced_apply(function: Any, *args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, fx.Proxy) for leaf in leaves_of((args, kwargs))):
                # apply(run_function, preserve_rng_state, *args): what it runs is traced, without the recomputation
                if function is CheckpointFunction:
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
        """The factory as an operation of the graph, if a size or a dtype among its arguments is a proxy."""

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


def trace(
    module: nn.Module, signature: Signature, leaves: frozenset[str] = frozenset(), all_called: bool = True
) -> Trace:
    """Trace ``module``. Raises :class:`UntraceableError` or :class:`UnknownNodeError`; alters nothing."""
    _check_names(module, leaves)
    tracer = EnergyTracer(signature, leaves)
    with attributes_restored(module):
        try:
            with torch.enable_grad(), tracer.patched():
                graph = tracer.trace(module)
        except Torch2EBMError:
            raise
        except Exception as error:
            raise untraceable(module, tracer.failed_in, error) from error
        constants = _lift_constants(module, graph)
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    if all_called and (missing := sorted(leaves - called)):
        raise UnknownNodeError(
            "convert(nodes=[...])",
            f"{missing}, never called by {type(module).__name__}.forward",
            "submodules that forward calls",
            "Name the submodules that they contain, or the one that contains them.",
        )
    writes = graph_without_writes(graph)
    _open_records(graph)
    _protect_inputs(module, graph, leaves)
    return Trace(graph, constants, leaves, settings_read_by(tracer.entered), writes)


def _open_records(graph: fx.Graph) -> None:
    """A dataclass that forward makes for its output becomes a dict of its fields: the output is made of its leaves."""
    # fx records the call of the class as an operation, whose result is no tensor that a node could have
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (_fields_in_order(output.args[0]),)
    # these calls alone: by its own rule fx would also drop a write to a buffer, whose result nobody reads
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
    """Whether a module may write its input: those of ``torch.nn`` say so by ``inplace``; of others nothing is known."""
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


def _lift_constants(module: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    """Tensors that forward made while tracing become placeholders.

    fx puts them on the module as ``_tensor_constant0`` and so on, and the restored module does not have them.
    """
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
