"""Named submodules in an exported graph, which has no modules: the operations of each call make one node.

A call's operations follow one another in the order of the module's own run, so no other node can stand between them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from torch2ebm.capture.observation import Capture
from torch2ebm.errors import PartitionError, UnknownNodeError


@dataclass(frozen=True)
class CallSite:
    """One call of a submodule."""

    name: str  # the submodule's path
    call: str  # the path by which it was called, with the number of the call


def call_sites(capture: Capture) -> dict[fx.Node, CallSite]:
    """To each operation the outermost call of a named submodule that it is part of."""
    found: dict[fx.Node, CallSite] = {}
    for node in capture.graph.nodes:
        for call, name in node.meta.get("calls", {}).items():
            if name in capture.leaves:
                found[node] = CallSite(name, call)
                break
    return found


def check_apart(module: nn.Module, names: Collection[str], sites: Mapping[fx.Node, CallSite]) -> None:
    """Raise :class:`UnknownNodeError` where a named submodule was called inside of another one that is named, alone."""
    missing = set(names) - called(sites)
    if inside := sorted(name for name in missing if any(name.startswith(f"{other}.") for other in names)):
        raise UnknownNodeError(
            "convert(nodes=[...])",
            f"{inside}, never called by {type(module).__name__}.forward but inside of another one that is named",
            "submodules that do not hold one another",
            "Name the submodules that they contain, or the one that contains them.",
        )


def called(sites: Mapping[fx.Node, CallSite]) -> set[str]:
    """The named submodules that have operations of their own in a run."""
    return {site.name for site in sites.values()}


def check_learnable(names: Collection[str], sites: Mapping[fx.Node, CallSite], live: Iterable[fx.Node]) -> None:
    """Raise :class:`PartitionError` where nothing that a named submodule computes could be a value."""
    if idle := sorted(called(sites).intersection(names) - {sites[node].name for node in live if node in sites}):
        raise PartitionError(
            "convert(nodes=[...])",
            f"{idle}, whose results depend on no parameter",
            "submodules whose results depend on their own parameters or on those before them",
            "Leave them out: what depends on the inputs alone is computed once and is no value.",
        )


def check_order(
    producers: Sequence[fx.Node], readers: Mapping[fx.Node, Sequence[fx.Node]], sites: Mapping[fx.Node, CallSite]
) -> None:
    """Raise :class:`PartitionError` where a call reads what is computed from its own results."""
    position = {producer: i for i, producer in enumerate(producers)}
    for producer in producers:
        for reader in readers[producer]:
            if position[reader] < position[producer]:
                raise interleaved({sites[node].name for node in (reader, producer) if node in sites})


def interleaved(names: Iterable[str]) -> PartitionError:
    return PartitionError(
        "convert(nodes=[...])",
        f"{sorted(names)}, which read what other operations make of their own results",
        "submodules that are finished before anything reads them",
        "Name the submodule around them, or the ones inside of them.",
    )
