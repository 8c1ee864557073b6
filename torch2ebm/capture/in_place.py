"""Writes in place in a recorded graph become new tensors.

A node's value belongs to the node: an operation elsewhere that wrote into it would change it while values move. A write
to a view changes its base, and every other view of that base. So the write makes a new base, and all views that are
read later are taken again::

    v = x[0]; v.add_(1); y = x * 2    ->    x2 = write_through(x, x[0], add_, 1); v2 = x2[0]; y = x2 * 2
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from torch2ebm.common.nested import map_leaves


def stopped(value: Any) -> Any:
    """What an operation under ``torch.no_grad`` returns: no gradient passes."""
    return map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, value)


def attribute(module: nn.Module, path: str) -> object:
    """The attribute of ``module`` at a dotted path."""
    found: object = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def without_writes(
    graph: fx.Graph, viewed: Mapping[fx.Node, fx.Node], written: Mapping[fx.Node, fx.Node]
) -> Mapping[fx.Node, fx.Node]:
    """Let later readers of a tensor, and of views of it, read what a write in place made.

    Writes to parameters are effects of forward, which the module's own run has had: they go.

    Args:
        graph: Is rewritten.
        viewed: An operation whose result shares memory with a source, to this source.
        written: An operation that has written in place, to what it wrote: its first argument.

    Returns:
        Each operation that is gone, to the one that has its result.
    """
    rewrite = _Functional(graph, viewed, written)
    rewrite.run()
    return rewrite.replaced


class _Functional:
    def __init__(self, graph: fx.Graph, viewed: Mapping[fx.Node, fx.Node], written: Mapping[fx.Node, fx.Node]) -> None:
        self.graph, self.viewed, self.written = graph, dict(viewed), written
        # new nodes get the position of the write that they stand for
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.now: dict[fx.Node, fx.Node] = {}  # a target that was replaced by a copy -> the copy
        self.replaced: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node not in self.written:
                continue
            target = self.written[node]
            while target in self.now and self.position[self.now[target]] < self.position[node]:
                target = self.now[target]
            if self._base(target).op == "get_attr":
                node.replace_all_uses_with(target)
                self.graph.erase_node(node)
                self.replaced[node] = target
                self.viewed.pop(node, None)
                for view, source in list(self.viewed.items()):
                    if source is node:
                        self.viewed[view] = target
            else:
                self._replace(node, target)

    def _base(self, node: fx.Node) -> fx.Node:
        while node in self.viewed:
            node = self.viewed[node]
        return node

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        """The views from the base to ``node``."""
        chain = []
        while node in self.viewed:
            chain.append(node)
            node = self.viewed[node]
        return chain[::-1]

    def _replace(self, node: fx.Node, target: fx.Node) -> None:
        base, chain = self._base(target), self._chain(target)
        self.viewed.pop(node, None)  # by now it is no view of what it wrote
        with self.graph.inserting_before(node):
            written = self._written(node, base, chain)
            copies = {base: written}
            # the written view itself, those on the way to it, and any other that somebody reads after the write
            for view in [v for v in self.viewed if self._base(v) is base and self.position[v] < self.position[node]]:
                if view is target or view in chain or self._later(view, node):
                    self._copied_view(view, copies, node)
        for old, new in copies.items():
            self.now[old] = new
            for user in self._later(old, node):
                if user not in copies.values():
                    user.replace_input_with(old, new)
            for view, source in list(self.viewed.items()):
                if source is old and view not in copies.values() and self.position[view] > self.position[node]:
                    self.viewed[view] = new
        node.replace_all_uses_with(copies[target])
        for view, source in list(self.viewed.items()):
            if source is node:
                self.viewed[view] = copies[target]
        self.now[node] = self.replaced[node] = copies[target]
        self.graph.erase_node(node)

    def _later(self, node: fx.Node, write: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user is not write and self.position[user] > self.position[write]]

    def _written(self, node: fx.Node, base: fx.Node, chain: Sequence[fx.Node]) -> fx.Node:
        if not chain and (form := _on_copy(node)) is not None:
            written = self.graph.create_node(*form)
        else:
            operation = called_by(node)
            function = _write_through([called_by(view) for view in chain], operation)
            rests = [(view.args[1:], dict(view.kwargs)) for view in chain]
            arguments: Any = (base, rests, node.args[1:], dict(node.kwargs))
            written = self.graph.call_function(function, arguments)
        written.meta = dict(node.meta)
        self.position[written] = self.position[node]
        return written

    def _copied_view(self, view: fx.Node, copies: dict[fx.Node, fx.Node], write: fx.Node) -> None:
        """The view again, of what was written; its own source first."""
        if view in copies:
            return
        source = self.viewed[view]
        self._copied_view(source, copies, write)
        copy = copies[view] = self.graph.node_copy(view, lambda n: copies[n] if n is source else n)
        copy.meta = {**write.meta, "taken_again": True}  # it belongs to where it is taken
        self.position[copy] = self.position[write]
        self.viewed[copy] = copies[source]


def called_by(node: fx.Node) -> Callable[..., Any]:
    """What an operation calls: a function, or a tensor's method as one."""
    if node.op == "call_method":
        method: Callable[..., Any] = getattr(Tensor, str(node.target))
        return method
    assert callable(node.target)
    return node.target


def _write_through(views: Sequence[Callable[..., Any]], operation: Callable[..., Any]) -> Callable[..., Tensor]:
    def write_through(base: Tensor, rests: Sequence[Any], args: Any, kwargs: Any) -> Tensor:
        """A copy of ``base`` in which ``operation`` has written a view in place."""
        copy = view = base.clone()
        for take, (rest, keywords) in zip(views, rests, strict=True):
            view = take(view, *rest, **keywords)
        operation(view, *args, **kwargs)
        return copy

    return write_through


# operators that Python's statements call: x += y
_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "__iadd__": operator.add,
    "__isub__": operator.sub,
    "__imul__": operator.mul,
    "__itruediv__": operator.truediv,
    "__ifloordiv__": operator.floordiv,
    "__imod__": operator.mod,
    "__ipow__": operator.pow,
    "__iand__": operator.and_,
    "__ior__": operator.or_,
    "__ixor__": operator.xor,
}
# of these the name without the underscore is another operation, or draws from other probabilities
_IN_PLACE_ONLY = frozenset(
    [
        *("zero_", "copy_", "fill_", "normal_", "uniform_", "random_", "exponential_", "bernoulli_", "geometric_"),
        *("cauchy_", "log_normal_", "set_", "resize_", "resize_as_", "fill_diagonal_", "__setitem__"),
    ]
)


def _on_copy(node: fx.Node) -> tuple[Any, ...] | None:
    """The operation without its write, as arguments of ``create_node``; None where there is no such form."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op == "call_method":
        if name in _OPERATORS and len(node.args) == 2:
            return "call_function", _OPERATORS[name], node.args, node.kwargs
        if _in_place_name(name) and name not in _IN_PLACE_ONLY and hasattr(Tensor, name[:-1]):
            return "call_method", name[:-1], node.args, node.kwargs
        return None
    bound = _in_place_argument(node)
    if bound is not None:
        return "call_function", node.target, (), {**bound, "inplace": False}
    if _in_place_name(name) and name not in _IN_PLACE_ONLY:
        for namespace in (functional, torch):
            if getattr(namespace, name, None) is node.target and hasattr(namespace, name[:-1]):
                return "call_function", getattr(namespace, name[:-1]), node.args, node.kwargs
    return None


def _in_place_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _in_place_argument(node: fx.Node) -> Mapping[str, Any] | None:
    """The call's arguments by name if it is made with ``inplace=True``."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # functions in C have no signature
        return node.kwargs if node.kwargs.get("inplace") is True else None
    return bound.arguments if bound.arguments.get("inplace") is True else None
