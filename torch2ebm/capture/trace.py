"""What symbolic tracing and export hand on: a graph without writes in place, and the settings it was made under."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
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


Settings = tuple[tuple[nn.Module, str, Any], ...]


def settings_read_by(modules: Sequence[nn.Module]) -> Settings:
    """Plain attributes of the modules that tracing went through.

    Tracing reads ``self.scale`` as the number that it is now, so a change of it needs a new trace.
    """
    return tuple(
        (module, name, value)
        for module in dict.fromkeys(modules)
        for name, value in module.__dict__.items()
        # the mode is compared on its own; other types cannot be compared by value, or say nothing of the graph
        if name != "training" and type(value) in (int, float, bool, str)
    )


def still_hold(settings: Settings) -> bool:
    return all(module.__dict__.get(name) == value for module, name, value in settings)


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
