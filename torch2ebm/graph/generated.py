"""From an fx graph to a Python function: text is generated and run, so no name gets into it that is not checked."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from torch import fx, nn

from torch2ebm.capture.in_place import attribute, called_by

# fx writes these as they are, or between quotes; letters beyond ASCII are other ones to Python (NFKC)
_PLAIN: Final = re.compile(r"[A-Za-z0-9_]+")


def function_of(graph: fx.Graph, module: nn.Module, name: str) -> Callable[..., Any]:
    """The graph as a function of its placeholders.

    A module may be called ``class``, and an argument ``a b``: what cannot be written is looked up by its text.

    Args:
        graph: It is changed.
        module: What its attributes are read from.
        name: For tracebacks.
    """
    for node in list(graph.nodes):
        if node.op == "get_attr" and not all(map(_can_be_written, str(node.target).split("."))):
            _replace(node, partial(attribute, module, str(node.target)), ())
        elif node.kwargs and not all(key.isidentifier() and _can_be_written(key) for key in node.kwargs):
            values = (*node.args, *node.kwargs.values())
            _replace(node, _by_names(called_by(node), len(node.args), tuple(node.kwargs)), values)
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<torch2ebm node {name!r}>", "exec"), namespace)  # text of fx's own and of plain names
    return partial(namespace["forward"], module)


def _can_be_written(word: str) -> bool:
    return _PLAIN.fullmatch(word) is not None and not keyword.iskeyword(word)


def _replace(node: fx.Node, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with node.graph.inserting_before(node):
        found = node.graph.call_function(_anonymous(target), arguments)
    node.replace_all_uses_with(found)
    node.graph.erase_node(node)


def _anonymous(target: Callable[..., Any]) -> Callable[..., Any]:
    """Of no name but this one: fx makes a name of the function's own."""

    def looked_up(*args: Any) -> Any:
        return target(*args)

    return looked_up


def _by_names(function: Callable[..., Any], count: int, names: tuple[str, ...]) -> Callable[..., Any]:
    """The function, with all arguments by position: ``count`` of them, then those that have these names."""

    def called(*values: Any) -> Any:
        return function(*values[:count], **dict(zip(names, values[count:], strict=True)))

    return called
