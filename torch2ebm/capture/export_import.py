"""From an exported program back to a graph over the module's own parameters and buffers.

Export *lifts* what forward reads: parameters, buffers and constants become inputs of its graph, each under a name of
its own. What ran under ``no_grad`` or ``autocast`` becomes a nested graph (a region) that one operation calls. Both are
undone here.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.nn import functional

from torch2ebm.capture.in_place_aten import is_aliasing, is_write
from torch2ebm.capture.in_place_fx import attribute, stopped
from torch2ebm.capture.signature import TENSOR
from torch2ebm.errors import UntraceableError

# checks of sizes and metadata that export adds; they compute nothing
GUARDS = re.compile(r"aten::(_assert_\w+|sym_constrain_range\w*)$")


class _Importer:
    """Copies an exported graph, region by region, with the module's attributes in place of lifted inputs."""

    def __init__(self, module: nn.Module, program: torch.export.ExportedProgram, names: Sequence[str]) -> None:
        self.module, self.program, self.names = module, program, names
        self.module_names: dict[int, str] = {id(each): name for name, each in module.named_modules()}
        self.result = fx.Graph()
        self.constants: dict[str, Tensor] = {}

    def graph(self, marked_leaves: Sequence[Any]) -> tuple[fx.Graph, dict[str, Tensor]]:
        environment = self._inputs()
        computed = iter(self._copied(self.program.graph_module, environment, _plain))
        self.result.output([next(computed) if leaf is TENSOR else leaf for leaf in marked_leaves])
        return self.result, self.constants

    def _inputs(self) -> dict[fx.Node, Any]:
        """Placeholders of constants first, then those of the inputs, as a :class:`Trace` has them; attributes last."""
        signature = self.program.graph_signature
        targets = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        environment: dict[fx.Node, Any] = {}
        attributes = []
        for node in placeholders:
            path = _own_path(targets[node.name]) if node.name in targets else None
            # a lifted tensor is an attribute of the module again, or else a constant that forward itself has made
            if path is not None and self._stands_at(path, targets[node.name]):
                attributes.append((node, path))
            elif path is not None:
                environment[node] = self.result.placeholder(node.name)
                self.constants[node.name] = self.program.constants[targets[node.name]].detach()
        inputs = [node for node in placeholders if node.name not in targets]
        for node, name in zip(inputs, self.names, strict=True):
            environment[node] = self.result.placeholder(name)
        for node, path in attributes:
            environment[node] = self.result.get_attr(path)
        return environment

    def _stands_at(self, path: str, target: str) -> bool:
        """Whether the module has this tensor as an attribute, and not a constant that forward itself makes."""
        try:
            found = attribute(self.module, path)
        except AttributeError:
            return False
        constant = self.program.constants.get(target)
        return isinstance(found, Tensor) and (isinstance(found, nn.Parameter) or constant is None or found is constant)

    def _copied(self, region: fx.GraphModule, environment: dict[fx.Node, Any], write: Write) -> Sequence[Any]:
        """Copy the operations of ``region`` and return what its output is made of."""
        for node in region.graph.nodes:
            if node.op == "output":
                return tuple(fx.map_arg(node.args[0], environment.__getitem__))
            if node.op == "call_function" and isinstance(node.target, HigherOrderOperator):
                environment[node] = self._inlined(region, node, environment, write)
            # what an inlined region returned is a Python tuple by now, not an operation that could be indexed
            elif node.target is operator.getitem and isinstance(results := environment[node.args[0]], tuple):
                environment[node] = results[node.args[1]]
            elif node.op == "call_function" and not _is_guard(node):
                environment[node] = self._marked(node, environment, write)
            elif node.op == "call_module":
                raise _unknown_operation(self.module, node)
        return ()

    def _inlined(self, region: fx.GraphModule, node: fx.Node, environment: dict[fx.Node, Any], write: Write) -> Any:
        """The operations of a region under ``no_grad`` or ``autocast``, with that setting applied to each of them.

        A node of the energy graph may hold a part of the region only, so the region cannot stay one operation.
        """
        arguments = list(node.args)
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            enabled, body, inputs = arguments[0], arguments[1], arguments[2:]  # (enabled, body, *inputs)
            inner = write if enabled else _under_no_grad(write)
        elif node.target is torch.ops.higher_order.wrap_with_autocast:
            # (device, dtype, enabled, cache_enabled, body, *inputs)
            settings, body, inputs = tuple(arguments[:4]), arguments[4], arguments[5:]
            inner = _under_autocast(settings, write)
        else:
            raise _unknown_operation(self.module, node)
        assert isinstance(body, fx.Node)
        graph_module = getattr(region, str(body.target))
        placeholders = [each for each in graph_module.graph.nodes if each.op == "placeholder"]
        given = fx.map_arg(tuple(inputs), environment.__getitem__)
        return tuple(self._copied(graph_module, dict(zip(placeholders, given, strict=True)), inner))

    def _marked(self, node: fx.Node, environment: dict[fx.Node, Any], write: Write) -> fx.Node:
        """Copy an operation, and note on all copies from which calls of submodules it comes."""
        # ``write`` may add several nodes for one: an argument that is detached, the operation, its result detached
        before = len(self.result.nodes)
        copy = write(self.result, node, environment)
        copy.meta["val"] = node.meta.get("val")
        calls = self._calls(node)
        for written in islice(reversed(self.result.nodes), len(self.result.nodes) - before):
            stack = dict.fromkeys(calls.values())
            written.meta = {"nn_module_stack": stack, "calls": calls, "val": written.meta.get("val")}
        return copy

    def _calls(self, node: fx.Node) -> dict[str, str]:
        """From each call of a submodule around an operation to the submodule's path, the outermost first."""
        # export's stack: call -> (path, class), the path below _Flat, where the user's module stands as "module"
        stack = node.meta.get("nn_module_stack") or {}
        return {call: self._path(entry[0]) for call, entry in stack.items() if entry[0].startswith("module.")}

    def _path(self, path: str) -> str:
        """The module's one name: export knows the path of the call, and a shared module stands at several paths."""
        found = self.module.get_submodule(_own_path(path))
        return self.module_names.get(id(found), _own_path(path))


Write = Callable[[fx.Graph, fx.Node, Mapping[fx.Node, Any]], fx.Node]


def _plain(graph: fx.Graph, node: fx.Node, environment: Mapping[fx.Node, Any]) -> fx.Node:
    # Back to the function, since that is what statistics are kept and frozen for. ATen's order of arguments is another,
    # and its last one, cudnn_enabled, the function does not take.
    if node.target is torch.ops.aten.batch_norm.default:
        batch, weight, bias, mean, variance, *rest = node.args
        arguments = (batch, mean, variance, weight, bias, *rest[:3])
        given = fx.map_arg(arguments, environment.__getitem__)
        return graph.call_function(functional.batch_norm, given)
    return graph.node_copy(node, environment.__getitem__)


def _under_no_grad(write: Write) -> Write:
    def stopping(graph: fx.Graph, node: fx.Node, environment: Mapping[fx.Node, Any]) -> fx.Node:
        if is_write(node):  # into a detached alias: under no_grad a write changes the content, and no gradient
            target = graph.call_function(stopped, (environment[node.args[0]],))  # type: ignore[index]
            target.meta = {"val": node.args[0].meta.get("val")}  # type: ignore[union-attr]
            environment = {**environment, node.args[0]: target}  # type: ignore[dict-item]
        written = write(graph, node, environment)
        if not isinstance(node.meta.get("val"), Tensor) and not isinstance(node.meta.get("val"), (tuple, list)):
            return written  # a size: there is nothing to detach
        written.meta = {"val": node.meta.get("val")}
        return graph.call_function(stopped, (written,))

    return stopping


def in_autocast(settings: Any, operation: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """One operation of a region under ``torch.autocast``."""
    device, dtype, enabled, cached = settings
    with torch.autocast(device, dtype, enabled, cached):
        return operation(*args, **kwargs)


def _under_autocast(settings: Any, write: Write) -> Write:
    def casting(graph: fx.Graph, node: fx.Node, environment: Mapping[fx.Node, Any]) -> fx.Node:
        written = write(graph, node, environment)
        # autocast casts no writes and no views, and as operations of their own these have to stay recognisable
        if isinstance(node.target, OpOverload) and not is_write(node) and not is_aliasing(node.target):
            written.args = (settings, written.target, written.args, written.kwargs)  # type: ignore[assignment]
            written.target, written.kwargs = in_autocast, {}
        return written

    return casting


def _own_path(path: str) -> str:
    """The path in the module, from one in :class:`_Flat`. Some versions of torch number repeated calls: ``layer@1``."""
    return re.sub(r"@\d+", "", path.removeprefix("module").removeprefix("."))


def _is_guard(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and bool(GUARDS.match(node.target._schema.name))


def _unknown_operation(module: nn.Module, node: fx.Node) -> UntraceableError:
    stack = node.meta.get("stack_trace") or ""
    lines = stack.strip().splitlines()
    return UntraceableError(
        f"torch2ebm cannot capture {type(module).__name__}",
        f"the operation {node.target}" + (f" at {lines[-2].strip()} `{lines[-1].strip()}`" if len(lines) > 1 else ""),
        "operations without regions of their own",
        "Make the submodule concerned one node with nodes=[...], or write it with plain operations (torch.where).",
    )
