"""Writes in place in an exported graph become new tensors.

A node's value belongs to the node: an operation elsewhere that wrote into it would change it while values move. A write
to a view changes its base, and every other view of that base. So the write makes a new base, and all views that are
read later are taken again::

    v = x[0]; v.add_(1); y = x * 2    ->    x2 = write_through(x, (x[0],), add_, 1); v2 = x2[0]; y = x2 * 2
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from torch2ebm.capture.in_place_fx import stopped
from torch2ebm.common.nested import leaves_of

# by name: fx prints a tuple of arguments with repr, and that of a plain function ("<built-in function ...>") is no code
_VIEWS: dict[Any, Any] = {"getitem": operator.getitem, "stopped": stopped}


def write_through(
    base: Tensor, views: Sequence[tuple[Any, Any, Any]], operation: Callable[..., Any], args: Any, kwargs: Any
) -> Tensor:
    """A copy of ``base`` in which ``operation`` has written a view in place; ``views`` lead from the base to it."""
    copy = view = base.clone()
    for make, rest, keywords in views:
        view = _VIEWS.get(make, make)(view, *rest, **keywords)
    operation(view, *args, **kwargs)
    return copy


def aten_without_writes(graph: fx.Graph) -> None:
    """Let later readers of a tensor, and of views of it, read what a write in place made.

    Writes to attributes of the module stay: they are effects that forward is meant to have (running statistics).
    """
    _Functional(graph).run()


class _Functional:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        # new nodes get the position of the write that they stand for
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.viewed: dict[fx.Node, fx.Node] = {}  # a view -> what it is taken from

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if _is_view(node):
                self.viewed[node] = node.args[0]
            elif is_write(node):
                if self._base(node.args[0]).op == "get_attr":
                    self.viewed[node] = node.args[0]  # an effect, whose result is the attribute itself
                else:
                    self._replace(node)

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

    def _replace(self, node: fx.Node) -> None:
        target = node.args[0]
        assert isinstance(target, fx.Node)
        base, chain = self._base(target), self._chain(target)
        with self.graph.inserting_before(node):
            written = self._written(node, base, chain)
            copies = {base: written}
            # the written view itself, those on the way to it, and any other that somebody reads after the write
            for view in [v for v in self.viewed if self._base(v) is base]:
                if view is target or view in chain or self._later(view, node):
                    self._copied_view(view, copies, node)
        for old, new in copies.items():
            for user in self._later(old, node):
                user.replace_input_with(old, new)
        node.replace_all_uses_with(copies[target])
        self.graph.erase_node(node)

    def _later(self, node: fx.Node, write: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user is not write and self.position[user] > self.position[write]]

    def _written(self, node: fx.Node, base: fx.Node, chain: Sequence[fx.Node]) -> fx.Node:
        functional_form = None if chain else _functional_form(node.target)
        if functional_form is not None:
            written = self.graph.call_function(functional_form, node.args, node.kwargs)
        else:
            names = {function: name for name, function in _VIEWS.items()}
            views = tuple((names.get(view.target, view.target), view.args[1:], view.kwargs) for view in chain)
            arguments = (base, views, node.target, node.args[1:], node.kwargs)
            written = self.graph.call_function(write_through, arguments)  # type: ignore[arg-type]
        written.meta = {**node.meta, "val": base.meta.get("val")}
        self.position[written] = self.position[node]
        return written

    def _copied_view(self, view: fx.Node, copies: dict[fx.Node, fx.Node], write: fx.Node) -> None:
        """The view again, of what was written; its own source first."""
        if view in copies:
            return
        source = self.viewed[view]
        self._copied_view(source, copies, write)
        copy = copies[view] = self.graph.node_copy(view, lambda n: copies[n] if n is source else n)
        copy.meta = {**write.meta, "val": view.meta.get("val")}  # it belongs to where it is taken
        self.position[copy] = self.position[write]
        self.viewed[copy] = copies[source]


def _functional_form(target: Any) -> Any:
    """``aten.relu`` for ``aten.relu_``; None where there is no such form, and for random draws.

    A draw's functional form is another operation (``bernoulli`` takes its probabilities from the tensor).
    """
    namespace, name = target._schema.name.split("::")
    if torch.Tag.nondeterministic_seeded in target.tags:
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    return getattr(packet, target._overloadname, None)


def is_write(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload) or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    alias = node.target._schema.arguments[0].alias_info
    return alias is not None and bool(alias.is_write)


def is_aliasing(target: OpOverload) -> bool:
    arguments = target._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None and not arguments[0].alias_info.is_write


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    # an item of a tuple is a view where the tuple's maker is one: split, chunk, unbind
    if node.target is stopped or node.target is operator.getitem:
        return node.target is stopped or _is_view(node.args[0])
    return (
        isinstance(node.target, OpOverload)
        and is_aliasing(node.target)
        and _share_memory(node.args[0].meta.get("val"), node.meta.get("val"))
    )


def _share_memory(source: Any, result: Any) -> bool:
    """Whether this result is a view: by their schemas ``reshape`` and ``to`` always are, in fact they may copy."""
    first = next((leaf for leaf in leaves_of(result) if isinstance(leaf, Tensor)), None)
    if first is None or not isinstance(source, Tensor):
        return True  # nothing to tell by: the schema's word counts
    # by the storage object: the exported values are fake tensors, which have no address
    return bool(first.untyped_storage()._cdata == source.untyped_storage()._cdata)


def effects_as_methods(graph: fx.Graph) -> None:
    """Give writes to attributes of the module the form that they have after symbolic tracing: method calls."""
    for node in graph.nodes:
        if is_write(node):
            name = node.target._schema.name.split("::")[1]
            if hasattr(Tensor, name):
                node.op, node.target = "call_method", name
