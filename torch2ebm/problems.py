"""The places in a user's forward that cannot be captured."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Problem:
    """One place in the user's code that export cannot follow."""

    scope: str
    place: str
    line: str
    reason: str

    def __str__(self) -> str:
        return f"{self.scope or 'forward'} ({self.place}) `{self.line}`: {self.reason}"


def problem_of(module: nn.Module, error: BaseException) -> Problem:
    """The innermost place of the user's code on the way to ``error``, and the submodule that it belongs to."""
    names = {id(each): name for name, each in module.named_modules()}
    scope, place, line = "", "unknown place", ""
    frames = list(traceback.walk_tb(error.__traceback__))
    for (frame, _), summary in zip(frames, traceback.extract_tb(error.__traceback__), strict=True):
        if re.search(r"[/\\]torch(2ebm)?[/\\]", summary.filename):
            continue
        place, line = f"{summary.filename}:{summary.lineno}", summary.line or ""
        scope = names.get(id(frame.f_locals.get("self")), scope)
    return Problem(scope, place, line, _reason(error))


def _reason(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "DataDependent" in type(error).__name__ or "data-dependent" in first:
        return "needs the value of a tensor (a branch on it, an index, .item() or a size made of it)"
    if "numpy" in first:
        return f"leaves torch for numpy ({first})"
    return first
