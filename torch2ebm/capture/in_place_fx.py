"""Rewrites of an ``fx.Graph`` that keep its meaning: no writes in place, no tuples between operations.

Both serve the cut into nodes. A write in place would change a value that belongs to another node, and a node hands on
tensors, each under a name of its own.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from torch2ebm.common.nested import map_leaves

FactType = TypeVar("FactType")
# for a forward that calls these functions itself: the statement x += y fx traces as operator.add (torch 2.13)
_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}


def stopped(value: Any) -> Any:
    """What an operation under ``torch.no_grad`` returns: fx records the operation, and loses the ``no_grad``."""
    return map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, value)


def copied(value: Any) -> Any:
    """A copy of a tensor; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def attribute(module: nn.Module, path: str) -> object:
    """The attribute of ``module`` at a dotted path."""
    found: object = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """``tensor`` with ``tensor[index] = value`` done to a copy."""
    copy = tensor.clone()
    copy[index] = value
    return copy


def on_a_copy(method: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a method that exists in place only (``zero_``, ``copy_``, ``normal_``) makes of a copy."""
    copy = tensor.clone()
    getattr(copy, method)(*args, **kwargs)
    return copy


def graph_without_writes(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Turn writes in place into new tensors for all later readers. Writes to attributes stay: they are effects.

    Views are not followed, as no name shows them here: a real run finds who reads what was written by another name
    (:meth:`_Observer.check_writes`).

    Returns:
        Each operation that was turned, to the one whose result it had written.
    """
    writes: dict[fx.Node, fx.Node] = {}
    position = {node: i for i, node in enumerate(graph.nodes)}
    attributes = {node for node in graph.nodes if node.op == "get_attr"}
    for node in list(graph.nodes):
        written = _written_argument(node)
        if written in attributes:
            attributes.add(node)  # returns the attribute itself, which may be written again
        if written is None or written in attributes:
            continue
        _write_to_copy(node)
        writes[node] = written
        # earlier readers keep the tensor as it was; chained writes work because each is a reader of the one before
        for user in list(written.users):
            if user is not node and position[user] > position[node]:
                user.replace_input_with(written, node)
    return writes


def _written_argument(node: fx.Node) -> fx.Node | None:
    """The tensor that ``node`` writes in place, if it does."""
    writes = False
    if node.op == "call_method":
        writes = _is_in_place_name(str(node.target)) or node.target == "__setitem__"
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        writes = (
            node.target in _OPERATORS
            or node.target is operator.setitem
            # an underscore alone says little of a user's own function
            or (_is_in_place_name(name) and _out_of_place(node.target) is not None)
            or _in_place_argument(node) is not None
        )
    target = node.args[0] if node.args else node.kwargs.get("input")
    return target if writes and isinstance(target, fx.Node) else None


def writes_in_place(node: fx.Node) -> bool:
    return _written_argument(node) is not None


def _is_in_place_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"


def _out_of_place(function: Any) -> Callable[..., Any] | None:
    name = function.__name__[:-1]
    # from the namespace that the function itself is from, as a name may mean another function in the next
    for namespace in (functional, torch, Tensor):
        if getattr(namespace, function.__name__, None) is function and hasattr(namespace, name):
            return getattr(namespace, name)  # type: ignore[no-any-return]
    return getattr(functional, name, None) or getattr(torch, name, None)


def _in_place_argument(node: fx.Node) -> Mapping[str, Any] | None:
    """The call's arguments by name if it is made with ``inplace=True``."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # the name of a method is no callable; functions in C have no signature
        return node.kwargs if node.kwargs.get("inplace") is True else None
    return bound.arguments if bound.arguments.get("inplace") is True else None


def _write_to_copy(node: fx.Node) -> None:
    if node.op == "call_method" and node.target != "__setitem__":
        if hasattr(Tensor, str(node.target)[:-1]):
            node.target = str(node.target)[:-1]
        else:
            method = str(node.target)
            node.op, node.target, node.args = "call_function", on_a_copy, (method, *node.args)
    elif node.op == "call_method" or node.target is operator.setitem:
        node.op, node.target = "call_function", set_item
    elif node.target in _OPERATORS:
        node.target = _OPERATORS[node.target]
    elif (arguments := _in_place_argument(node)) is not None:
        node.args, node.kwargs = (), {**arguments, "inplace": False}
    else:
        replacement = _out_of_place(node.target)
        assert replacement is not None
        node.target = replacement


def expand_tuples(
    graph: fx.Graph,
    outputs: Mapping[fx.Node, Any],
    facts: MutableMapping[fx.Node, FactType],
    fact_of: Callable[[Any], FactType],
) -> None:
    """Let readers of a whole tuple, list or dict of tensors read each of its parts.

    Args:
        graph: Is rewritten.
        outputs: Operation to what it returned in a real run, for those that returned no tensor.
        facts: Gets an entry for each part that is taken.
        fact_of: From a part's value to its entry.
    """
    for node, value in outputs.items():
        if not _has_tensors(value):
            continue
        for user in list(node.users):
            if user.target is getattr and isinstance(value, dict) and user.args[1] not in value:
                # a field that an output class of transformers leaves empty: an attribute (None), and no key
                _read_by_all(graph, user, getattr(value, str(user.args[1])))
                continue
            if user.target is getattr and user.args[0] is node:  # result.values, output.logits: an item like others
                user.target, user.args = operator.getitem, (node, _place(value, str(user.args[1])))
            if not (user.target is operator.getitem and user.args[0] is node):
                with graph.inserting_before(user):
                    parts = _parts(graph, node, value, facts, fact_of)
                user.args = _replaced(user.args, node, parts)
                user.kwargs = _replaced(user.kwargs, node, parts)


def _read_by_all(graph: fx.Graph, node: fx.Node, literal: Any) -> None:
    """Let readers of ``node`` have a value that is no result of an operation."""
    for user in list(node.users):
        user.args = _replaced(user.args, node, literal)
        user.kwargs = _replaced(user.kwargs, node, literal)
    graph.erase_node(node)


def _place(value: Any, name: str) -> Any:
    """Where the field ``name`` of a named result (``max``, ``topk``, a named tuple) stands; its key in a dict."""
    if isinstance(value, dict):
        return name
    field = getattr(value, name)  # by identity: serves named tuples, and torch's result types without _fields
    return next(i for i, part in enumerate(value) if part is field)


def _has_tensors(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(isinstance(part, Tensor) or _has_tensors(part) for part in value)
    return isinstance(value, dict) and any(isinstance(part, Tensor) or _has_tensors(part) for part in value.values())


def _parts(
    graph: fx.Graph,
    node: fx.Node,
    value: Any,
    facts: MutableMapping[fx.Node, FactType],
    fact_of: Callable[[Any], FactType],
) -> Any:
    def part(key: Any, content: Any) -> Any:
        item = graph.call_function(operator.getitem, (node, key))
        facts[item] = fact_of(content)
        return _parts(graph, item, content, facts, fact_of) if _has_tensors(content) else item

    if isinstance(value, dict):
        return {key: part(key, content) for key, content in value.items()}
    parts = [part(i, content) for i, content in enumerate(value)]
    return parts if isinstance(value, list) else tuple(parts)


def _replaced(arguments: Any, node: fx.Node, parts: Any) -> Any:
    """``arguments`` with the structure ``parts`` where ``node`` stood."""
    if arguments is node:
        return parts
    if isinstance(arguments, (tuple, list)):
        content = [_replaced(argument, node, parts) for argument in arguments]
        return content if isinstance(arguments, list) else _like(arguments, content)
    if isinstance(arguments, dict):
        return {key: _replaced(argument, node, parts) for key, argument in arguments.items()}
    if isinstance(arguments, slice):
        return slice(*(_replaced(a, node, parts) for a in (arguments.start, arguments.stop, arguments.step)))
    return arguments


def _like(original: Any, content: list[Any]) -> Any:
    return type(original)(*content) if hasattr(original, "_fields") else tuple(content)
