"""The captures of one module: by symbolic tracing first, by ``torch.export`` where that fails, each one verified."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.capture.export import export, failing_parts
from torch2ebm.capture.observation import Capture, capture
from torch2ebm.capture.problems import Problem, problems_in_a_run
from torch2ebm.capture.real_run import run_once
from torch2ebm.capture.signature import Signature
from torch2ebm.capture.symbolic import trace
from torch2ebm.capture.trace import still_hold
from torch2ebm.errors import CaptureMismatchError, NodeEvaluationError, Torch2EBMError, UntraceableError
from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.graph.granularity import Granularity
from torch2ebm.model.verification import holds_for, verified

EXPORTS_KEPT = 8  # of one signature, one for each shape that no other serves
KEPT = 32  # in all: an attribute, or a number among the arguments, may change with every batch


@dataclass(eq=False)
class _Entry:
    key: Any
    capture: Capture
    served: list[Any]  # what an exported graph was held against: shapes, dtypes, devices
    graphs: list[tuple[Granularity, EnergyGraph]] = field(default_factory=list)

    def graph(self, granularity: Granularity) -> EnergyGraph:
        """Cut the capture in nodes, and hold their composition against the real run: outputs and buffers."""
        for known, graph in self.graphs:
            if known == granularity:
                return graph
        graph = verified(self.capture, granularity)
        self.graphs.append((granularity, graph))
        return graph


class Captures:
    """What a module was captured for: its modes, the structure of its arguments and, exported, their shapes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.entries: list[_Entry] = []

    def known(
        self, key: Any, granularity: Granularity, tensors: Sequence[Tensor]
    ) -> tuple[Capture, EnergyGraph] | None:
        """A capture and graph that serve this call as they are."""
        for entry in self._of(key):
            if entry.capture.captured_by == "fx" or _specialised(self.module, tensors) in entry.served:
                graph = next((graph for known, graph in entry.graphs if known == granularity), None)
                return None if graph is None else (entry.capture, graph)
        return None

    def made(
        self,
        key: Any,
        granularity: Granularity,
        signature: Signature,
        tensors: Sequence[Tensor],
        leaves: frozenset[str] = frozenset(),
        all_called: bool = True,
    ) -> tuple[Capture, EnergyGraph]:
        """A new capture, or a known one that turns out to serve this call too."""
        entry = self._served_by_known(key, tensors)
        if entry is None:
            entry = self._captured(key, granularity, signature, tensors, leaves, all_called)
            self.entries.append(entry)
            del self.entries[:-KEPT]
        return entry.capture, entry.graph(granularity)

    def _of(self, key: Any) -> Iterable[_Entry]:
        return (entry for entry in self.entries if entry.key == key and still_hold(entry.capture.settings))

    def _served_by_known(self, key: Any, tensors: Sequence[Tensor]) -> _Entry | None:
        """Export keeps dimensions dynamic as far as it can; a real run at other shapes tells whether it could."""
        specialised = _specialised(self.module, tensors)
        for entry in self._of(key):
            if entry.capture.captured_by == "fx" or specialised in entry.served:
                return entry
            same_kind = any(_without_shapes(served) == _without_shapes(specialised) for served in entry.served)
            if same_kind and holds_for(entry.capture, entry.graphs[0][1], tensors):
                entry.served.append(specialised)
                return entry
        return None

    def _captured(
        self,
        key: Any,
        granularity: Granularity,
        signature: Signature,
        tensors: Sequence[Tensor],
        leaves: frozenset[str],
        all_called: bool,
    ) -> _Entry:
        module, known = self.module, _specialised(self.module, tensors)
        exports = [entry for entry in self._of(key) if entry.capture.captured_by == "export"]
        try:
            if not exports:
                entry = _Entry(
                    key, capture(module, trace(module, signature, leaves, all_called), signature, tensors), []
                )
                entry.graph(granularity)
                return entry
            failure: Torch2EBMError | None = None
        except (UntraceableError, CaptureMismatchError, NodeEvaluationError) as error:
            failure = error
        run_once(module, signature, tensors)  # an input that the module itself refuses is no failure of export
        try:
            entry = _Entry(
                key, capture(module, export(module, signature, tensors, leaves), signature, tensors), [known]
            )
            entry.graph(granularity)
        except (UntraceableError, CaptureMismatchError) as error:
            raise _both(module, signature, tensors, leaves, failure, error) from (failure or error)
        self._make_room(exports)
        return entry

    def _make_room(self, exports: list[_Entry]) -> None:
        if len(exports) < EXPORTS_KEPT:
            return
        warnings.warn(
            f"torch2ebm has exported {type(self.module).__name__} for {EXPORTS_KEPT} shapes of its inputs, and forgets "
            "the oldest for a new one. Pad the inputs to few shapes, since every export takes seconds.",
            stacklevel=2,
        )
        self.entries.remove(exports[0])


def _specialised(module: nn.Module, tensors: Sequence[Tensor]) -> Any:
    """What an exported graph may have written down as constants."""
    own = {(p.dtype, p.device) for p in module.parameters()}
    autocast = tuple((kind, torch.is_autocast_enabled(kind)) for kind in {t.device.type for t in tensors})
    return [(t.shape, t.dtype, t.device) for t in tensors], own, autocast


def _without_shapes(specialised: Any) -> Any:
    tensors, *rest = specialised
    return [(len(shape), dtype, device) for shape, dtype, device in tensors], rest


def _both(
    module: nn.Module,
    signature: Signature,
    tensors: Sequence[Tensor],
    leaves: frozenset[str],
    symbolic: Torch2EBMError | None,
    exported: Torch2EBMError,
) -> Torch2EBMError:
    """One error for the two ways that failed, with every problem that could be found."""
    if symbolic is None or isinstance(symbolic, CaptureMismatchError):
        return symbolic or exported
    problems = _problems(module, signature, tensors, leaves)
    listed = [str(problem) for problem in problems] or [exported.got]
    scopes = sorted({*leaves, *(problem.scope for problem in problems if problem.scope)})
    scopes = [scope for scope in scopes if not _inside(scope, scopes)]
    named = f"make one node of each with nodes={scopes}" if scopes else "make the submodule concerned one node"
    return UntraceableError(
        f"torch2ebm cannot capture {type(module).__name__}",
        "\n  ".join(["", *listed, f"(symbolic tracing stopped at {symbolic.got})"]),
        "operations on tensors that do not need a tensor's value while the graph is made",
        f"Three ways out: {named}; rewrite a branch with torch.where, and .item() or numpy with operations of torch; "
        "or leave that part out of the converted module and convert what comes before or after it. "
        "Of a branch only the side that this input takes was looked at.",
    )


def _problems(
    module: nn.Module, signature: Signature, tensors: Sequence[Tensor], leaves: frozenset[str]
) -> list[Problem]:
    """All that a real run shows, then what export finds in a submodule at another place."""
    seen = problems_in_a_run(module, signature, tensors, leaves)
    known = {(problem.scope, problem.place) for problem in seen}
    more = failing_parts(module, signature, tensors)
    return [*seen, *(p for p in more if (p.scope, p.place) not in known and not _inside(p.scope, leaves, itself=True))]


def _inside(name: str, others: Iterable[str], itself: bool = False) -> bool:
    """Whether a submodule is part of one of the others."""
    return any(name.startswith(f"{other}.") or (itself and name == other) for other in others)
