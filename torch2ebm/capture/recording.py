"""From a recorded run to a graph: parameters by their path, constants and numbers as inputs, no writes in place."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch2ebm.capture.functions import draws_from_its_own
from torch2ebm.capture.in_place import stopped, without_writes
from torch2ebm.capture.run import Constant, Hot, ModuleCall, Number, Record, Run
from torch2ebm.common.nested import leaves_of, map_leaves
from torch2ebm.errors import UntraceableError
from torch2ebm.isolation.opaque_state import OpaqueState
from torch2ebm.isolation.torch_modes import Ambient

Place = tuple[int, int]  # operation, and place among its numbers


@dataclass(frozen=True, eq=False)
class Trace:
    """A graph without writes in place, over the module's own parameters.

    Attributes:
        graph: Its placeholders are the constants, then the varying numbers.
        constants: Name of each constant.
        numbers: Name of each number that another run may have otherwise, to its place.
        node_of: Number of a result to the graph's node for it; those that a rewrite has replaced are missing.
        operations: The graph's node to the operation of the run.
    """

    graph: fx.Graph
    constants: Sequence[str]
    numbers: Mapping[str, Place]
    node_of: Mapping[int, fx.Node]
    operations: Mapping[fx.Node, int]


def traced(module: nn.Module, run: Run, varying: frozenset[Place], held: Sequence[int], device: str) -> Trace:
    """The graph of a recorded run.

    Args:
        module: The module whose run it was.
        run: A run with records.
        varying: Numbers that the graph takes as inputs; objects are inputs in any case.
        held: Results that are further outputs.
        device: Type of the device.

    Raises:
        UntraceableError: where something was written in place that is no first argument.
    """
    return _Importer(module, run, varying, held, device).trace()


class _Importer:
    def __init__(
        self, module: nn.Module, run: Run, varying: frozenset[Place], held: Sequence[int], device: str
    ) -> None:
        assert run.records is not None
        self.module, self.run, self.varying, self.held, self.device = module, run, varying, held, device
        self.records: Sequence[Record] = run.records
        self.graph = fx.Graph()
        self.nodes: dict[int | str, fx.Node] = {}
        self.operations: dict[fx.Node, int] = {}
        self.viewed: dict[fx.Node, fx.Node] = {}
        self.written: dict[fx.Node, fx.Node] = {}

    def trace(self) -> Trace:
        constants = self._constants()
        numbers = self._numbers()
        for i, record in enumerate(self.records):
            self._copied(i, record)
        self._returned()
        replaced = without_writes(self.graph, self.viewed, self.written)
        _drop_unread(self.graph)
        left = set(self.graph.nodes)
        made = {n: replaced.get(node, node) for n, node in self.nodes.items() if isinstance(n, int)}
        node_of = {n: node for n, node in made.items() if node in left}
        operations = {replaced.get(node, node): i for node, i in self.operations.items()}
        return Trace(self.graph, constants, numbers, node_of, {n: i for n, i in operations.items() if n in left})

    def _constants(self) -> list[str]:
        """A placeholder for each constant, named after the argument that it is or is made of."""
        names = []
        for i, origins in enumerate(self.run.origins):
            own = self.run.names[i] or (f"of_{next(iter(origins))}" if len(origins) == 1 else "constant")
            node = self.nodes[f"constant {i}"] = self.graph.placeholder(own)
            names.append(node.name)
        return names

    def _numbers(self) -> dict[str, Place]:
        """A placeholder for each number that varies, and for each object."""
        found: dict[str, Place] = {}
        for i, numbers in enumerate(self.run.numbers):
            for j, number in enumerate(numbers):
                if (i, j) in self.varying or not isinstance(number, (int, float)) or type(number) not in (int, float):
                    kind = "number" if type(number) in (int, float) else "object"
                    node = self.nodes[f"number {i} {j}"] = self.graph.placeholder(kind)
                    found[node.name] = (i, j)
        return found

    def _copied(self, i: int, record: Record) -> None:
        """One operation, and an item for each tensor of its result where that is no tensor itself."""
        args, kwargs = self._resolved(i, record.args), self._resolved(i, record.kwargs)
        into = list(leaves_of(record.kwargs.get("out"))) if any(isinstance(w, Hot) for w in record.wrote) else []
        if into[:1] == [None]:
            into = []
        elif into:
            del kwargs["out"]
        kind, target, args = self._target(record, args)
        if draws_from_its_own(self.run.numbers[i]):
            kind, target = "call_function", _from_the_same_state(target)
        node = self.graph.create_node(kind, target, args, kwargs)
        node.meta["calls"] = dict(record.scopes)
        node.meta["place"] = record.place
        self.operations[node] = i
        if into:
            self._written_out(record, node, into)
            return
        # what an operation writes beside its result, such as running statistics, are the run's own effects: constants
        # that forward changes are copies here
        first = record.args[0] if record.args else None
        beside = all(isinstance(each, Constant) and each != first for each in record.wrote) and not record.sources
        wrote = [] if beside else [self._node(each) for each in record.wrote]
        self._check_writes(record, node, wrote)
        if isinstance(record.results, int):
            self._result(record, record.results, node)
        else:
            self._items(record, record.results, node)
        if wrote:
            self.written[node] = wrote[0]

    def _written_out(self, record: Record, node: fx.Node, into: Sequence[Hot | Constant]) -> None:
        """What ``out=`` names is written by the result of the operation without it."""
        numbers = list(leaves_of(record.results))
        for place, (target, number) in enumerate(zip(into, numbers, strict=True)):
            made = node if len(into) == 1 else self.graph.call_function(operator.getitem, (node, place))
            written = self.graph.call_function(_filled, (self._node(target), made))
            written.meta = made.meta = dict(node.meta)
            self.operations[written] = self.operations[made] = self.operations[node]
            self._result(record, number, written)
            self.written[written] = self._node(target)

    def _check_writes(self, record: Record, node: fx.Node, wrote: Sequence[fx.Node]) -> None:
        if wrote and all(each.op == "get_attr" for each in wrote):
            return  # an effect on a parameter
        if wrote and (len(wrote) > 1 or not node.args or node.args[0] is not wrote[0]):
            raise UntraceableError(
                f"torch2ebm cannot capture {type(self.module).__name__}",
                f"{node.format_node()} ({record.place}) writes in place what is not its first argument",
                "writes in place to the first argument of an operation",
                "Use the form that is not in place.",
            )

    def _result(self, record: Record, number: int, node: fx.Node) -> None:
        self.nodes[number] = node
        if number in record.sources:
            self.viewed[node] = self._node(record.sources[number])

    def _items(self, record: Record, results: Any, node: fx.Node) -> None:
        take: Any = operator.getitem
        if isinstance(results, Mapping):
            parts: Iterable[tuple[Any, Any]] = results.items()
        elif dataclasses.is_dataclass(results):  # of an opaque module
            take, parts = getattr, ((f.name, getattr(results, f.name)) for f in dataclasses.fields(results))
        else:
            parts = enumerate(results)
        for key, part in parts:
            if not any(isinstance(leaf, int) for leaf in leaves_of(part)):
                continue
            item = self.graph.call_function(take, (node, key))
            item.meta = dict(node.meta)
            self.operations[item] = self.operations[node]
            if isinstance(part, int):
                self._result(record, part, item)
            else:
                self._items(record, part, item)

    def _target(self, record: Record, args: Any) -> tuple[str, Any, Any]:
        """As torch.fx writes it: methods by their names, so that the same operation is recognised as such."""
        function = record.function
        if isinstance(function, ModuleCall):
            writes = bool(record.wrote)
            return "call_function", _module_call(self.module, function.path, writes), args
        if isinstance(function, type):
            function = _applied(function)
        name = getattr(function, "__name__", "")
        kind, target = "call_function", function
        if name == "__get__":
            kind, target, args = "call_function", getattr, (args[0], function.__self__.__name__)
        elif (method := _method_of(function)) and args and isinstance(args[0], fx.Node):
            kind, target = "call_method", method
        elif not _can_be_written(function):
            target = _renamed(function)
        if record.ambient is not None:
            operation = getattr(Tensor, target) if kind == "call_method" else target
            kind, target = "call_function", _under(record.ambient, operation, self.device)
        return kind, target, args

    def _resolved(self, i: int, structure: Any) -> Any:
        def of(leaf: Any) -> Any:
            if isinstance(leaf, (Hot, Constant)):
                return self._node(leaf)
            if isinstance(leaf, Number):
                varying = self.nodes.get(f"number {i} {leaf.place}")
                return self.run.numbers[i][leaf.place] if varying is None else varying
            return leaf

        return map_leaves(of, structure)

    def _node(self, reference: Hot | Constant) -> fx.Node:
        if isinstance(reference, Constant):
            return self.nodes[f"constant {reference.place}"]
        if reference.place not in self.nodes:
            # a parameter: where it is first read, after the placeholders
            self.nodes[reference.place] = self.graph.get_attr(str(reference.place))
        return self.nodes[reference.place]

    def _returned(self) -> None:
        """The graph's output: a node for each tensor that was computed, and None for every other leaf."""
        _, leaves = self.run.returned
        found: list[fx.Node | None] = []
        for leaf in leaves:
            if isinstance(leaf, int):
                found.append(self.nodes[~leaf])
            elif isinstance(leaf, str):
                found.append(self._node(Hot(leaf)))
            else:
                found.append(None)
        self.graph.output([*found, *(self.nodes[number] for number in self.held)])


def _drop_unread(graph: fx.Graph) -> None:
    """What nobody reads: forward's own run has had its effects."""
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)


def _method_of(function: Any) -> str | None:
    """The name under which a tensor has this function: ``__pow__`` says of itself that it is ``pow``."""
    own = getattr(function, "__name__", "")
    if getattr(Tensor, own, None) is function:
        return own
    return next((name for name, each in _methods_named_otherwise() if each is function), None)


@functools.cache
def _methods_named_otherwise() -> list[tuple[str, Any]]:
    found = ((name, getattr(Tensor, name)) for name in dir(Tensor) if name != "__class__")
    return [(name, each) for name, each in found if getattr(Tensor, getattr(each, "__name__", name), None) is not each]


def _can_be_written(function: Any) -> bool:
    """Whether the name that fx writes for a function of torch is this function's."""
    if not str(getattr(function, "__module__", "")).startswith("torch"):
        return True
    try:
        path = fx.node._get_qualified_name(function).split(".")
    except (RuntimeError, AttributeError):
        return False
    if path[0] != "torch":
        return len(path) == 1
    found: Any = torch
    for name in path[1:]:
        found = getattr(found, name, None)
    return found is function


def _named(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
    """As torch.fx and :func:`described` call it."""
    operation.__name__ = operation.__qualname__ = name
    return operation


def _renamed(function: Callable[..., Any]) -> Callable[..., Any]:
    return _named(getattr(function, "__name__", "operation"), lambda *args, **kwargs: function(*args, **kwargs))


def _applied(function: Any) -> Callable[..., Any]:
    return _named(function.__name__, lambda *args, **kwargs: function.apply(*args, **kwargs))


def _module_call(module: nn.Module, path: str, writes: bool) -> Callable[..., Any]:
    part = module.get_submodule(path)

    def operation(state: OpaqueState, *args: Any, **kwargs: Any) -> Any:
        if writes:
            args, kwargs = map_leaves(_copy, (args, kwargs))
        return state.again(part, args, kwargs)

    operation.opaque_module, operation.opaque_path = part, path  # type: ignore[attr-defined]
    return _named(type(part).__name__, operation)


def _from_the_same_state(target: Any) -> Callable[..., Any]:
    """The operation with a generator of the caller's, which no evaluation moves on."""
    draw = getattr(Tensor, target) if isinstance(target, str) else target

    def of(leaf: Any) -> Any:
        return leaf.clone_state() if isinstance(leaf, torch.Generator) else leaf

    def operation(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_leaves(of, (args, kwargs))
        return draw(*args, **kwargs)

    return _named(draw.__name__, operation)


def _filled(out: Tensor, made: Tensor) -> Tensor:
    return (out if out.shape == made.shape else out.resize_(made.shape)).copy_(made)


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _under(ambient: Ambient, operation: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The operation in the modes in which forward ran it."""

    def function(*args: Any, **kwargs: Any) -> Any:
        # where nobody wants a gradient now, none is taken
        modes = replace(ambient, grad=ambient.grad and torch.is_grad_enabled())
        result = modes.run(device, operation, args, kwargs)
        return result if ambient.grad else stopped(result)

    return _named(getattr(operation, "__name__", "operation"), function)
