"""A mapping by names that answers an unknown one with those near by."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch2ebm.common.text import listed
from torch2ebm.errors import UnknownNameError

Value = TypeVar("Value")


class KnownNames(dict[str, Value]):
    """A dictionary that says which names it has.

    Args:
        entries: By name.
        also: Further names, to those among ``entries`` that they stand for.
    """

    def __init__(self, entries: Mapping[str, Value], also: Mapping[str, str] | None = None) -> None:
        super().__init__(entries)
        self.also = dict(also or {})

    def __missing__(self, name: str) -> Value:
        if self.also.get(name) in self:
            return self[self.also[name]]
        raise unknown_name("model.nodes[...]", name, [*self, *self.also])


def unknown_name(where: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """The error for a name that is none of the known ones."""
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(str(name), names, 3)
    return UnknownNameError(
        where,
        repr(name),
        f"the name of a node: {listed(names)}",
        f"Did you mean {' or '.join(map(repr, near))}?" if near else "Take it from list(model.nodes).",
    )
