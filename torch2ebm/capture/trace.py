"""What symbolic tracing and export hand on: a graph without writes in place, and the settings it was made under."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from torch2ebm.capture.problems import is_users
from torch2ebm.errors import UntraceableError, first_line


@dataclass(frozen=True)
class Trace:
    """A graph without writes in place, over the module's own attributes.

    Its placeholders are the constants (tensors that forward made while it was traced), then the input tensors.
    """

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    leaves: frozenset[str]  # submodules kept whole: the graph calls each as one operation
    settings: Settings
    writes: Mapping[fx.Node, fx.Node]  # an operation that wrote in place -> what it wrote
    captured_by: str = "fx"


LONGEST = 64  # every call compares them; a vocabulary is no setting

Settings = tuple[tuple[nn.Module, str, Any], ...]


def settings_read_by(modules: Sequence[nn.Module]) -> Settings:
    """Plain attributes of the modules that tracing went through, as they are now: they are part of the graph."""
    of_torch = vars(nn.Module()).keys()
    return tuple(
        (module, name, copy.deepcopy(value))
        for module in dict.fromkeys(modules)
        for name, value in module.__dict__.items()
        if name not in of_torch and is_setting(value)
    )


def still_hold(settings: Settings) -> bool:
    # most are the same object: every call looks at all of them
    return all(module.__dict__.get(name) is value or holds(module, name, value) for module, name, value in settings)


def holds(module: nn.Module, name: str, value: Any) -> bool:
    now = module.__dict__.get(name)
    return now is value or (is_setting(now) and bool(now == value))  # of what is no setting, == may give a tensor


def is_setting(value: Any) -> bool:
    """Whether it is plain: a number, a flag, a string or None, or a short list, tuple or dict of these."""
    return is_scalar(value) or value is None or (_is_short(value) and all(map(is_setting, _items(value))))


def is_scalar(value: Any) -> bool:
    return type(value) in (int, float, bool, str)


def _is_short(value: Any) -> bool:
    return type(value) in (list, tuple, dict) and len(value) <= LONGEST


def _items(collection: Any) -> Iterable[Any]:
    return (*collection, *collection.values()) if isinstance(collection, dict) else collection


def untraceable(module: nn.Module, scope: str, error: Exception) -> UntraceableError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown place"
    line = f" `{frames[-1].line}`" if frames else ""
    named = (
        f"make '{scope}' one node with nodes=['{scope}']"
        if scope
        else "make the submodule concerned one node with nodes=[...]"
    )
    reason = first_line(error)
    return UntraceableError(
        f"torch2ebm cannot capture {type(module).__name__}",
        f"{scope or 'forward'} ({place}){line}: {reason}",
        "operations on tensors that do not branch on a tensor's value",
        f"Options: {named}, rewrite the branch with torch.where, or pass example_inputs: an argument that is no tensor "
        "is then known, torch.export is tried where symbolic tracing fails, and an error lists all problems.",
    )
