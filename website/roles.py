"""The roles of docstrings, such as :class:`Node`, as links to the reference where it has the name."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

PACKAGE = Path(__file__).parents[1] / "torch2ebm"
ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`~?([\w.]+)`")
EXAMPLE = re.compile(r"^Example:$", re.M)  # griffe shows a session as code under the plural alone


def _names(path: Path) -> set[str]:
    """What a module lists in ``__all__``, or else the classes that it defines."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for statement in body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return set(ast.literal_eval(statement.value))
    return {statement.name for statement in body if isinstance(statement, ast.ClassDef)}


PUBLIC = _names(PACKAGE / "__init__.py")
ERRORS = _names(PACKAGE / "errors.py")
EXTEND = _names(PACKAGE / "extend.py") - PUBLIC


def linked(match: re.Match[str]) -> str:
    """A link where the reference has the name, and otherwise code."""
    name = match[1].removeprefix("torch2ebm.")
    first, _, member = name.partition(".")
    for module, names in (("", PUBLIC), ("errors.", ERRORS), ("extend.", EXTEND)):
        if first in names and not member:
            return f"[`{name}`][torch2ebm.{module}{name}]"
    return f"`{name}`"


class Roles(griffe.Extension):
    """Called for every object whose docstring has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = ROLE.sub(linked, text)
