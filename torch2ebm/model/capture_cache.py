"""The captures of one module: by symbolic tracing first, by ``torch.export`` where that fails, each one verified."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.capture.export import export, failing_parts
from torch2ebm.capture.observation import Capture, capture
from torch2ebm.capture.problems import Problem, problems_in_a_run
from torch2ebm.capture.real_run import run_once
from torch2ebm.capture.signature import Signature, assumed_signature, flatten_arguments
from torch2ebm.capture.symbolic import trace
from torch2ebm.capture.trace import Trace, still_hold
from torch2ebm.engine.finite import check_standing
from torch2ebm.errors import CaptureMismatchError, NodeEvaluationError, Torch2EBMError, UntraceableError
from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.graph.granularity import Granularity, named_leaves
from torch2ebm.isolation.module_state import tensors_in_place
from torch2ebm.isolation.torch_modes import TRACING
from torch2ebm.model.arguments import check_arguments, check_inputs
from torch2ebm.model.fingerprint import Fingerprint, swapped_parameters
from torch2ebm.model.verification import holds_for, verified

EXPORTS_KEPT = 8  # of one signature, one for each shape that no other serves
KEPT = 32  # in all: an attribute, or a number among the arguments, may change with every batch


@dataclass(frozen=True)
class Served:
    """The graph that serves one call, the call's tensors, and what stands in the place of parameters."""

    tensors: list[Tensor]
    graph: EnergyGraph
    captured_by: str
    swapped: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Request:
    """One call: what a capture has to be for, and how it is cut."""

    key: Any  # modes, patched forwards, and the structure of the arguments
    granularity: Granularity
    signature: Signature
    tensors: list[Tensor]


@dataclass(eq=False)
class _Entry:
    key: Any
    capture: Capture
    served: list[Any]  # what an exported graph was held against: shapes, dtypes, devices
    graphs: list[tuple[Granularity, EnergyGraph]] = field(default_factory=list)

    def known_graph(self, granularity: Granularity) -> EnergyGraph | None:
        return next((graph for known, graph in self.graphs if known == granularity), None)

    def graph(self, granularity: Granularity) -> EnergyGraph:
        """Cut the capture in nodes, and hold their composition against the real run: outputs and buffers."""
        graph = self.known_graph(granularity)
        if graph is None:
            graph = verified(self.capture, granularity)
            self.graphs.append((granularity, graph))
        return graph


class Captures:
    """The graphs of one module as it was when this was made: for its modes, the structure of its arguments and,
    exported, their shapes.

    Raises :class:`ConfigurationError` where ``granularity`` is nothing that a module can be cut by.
    """

    def __init__(self, module: nn.Module, granularity: Granularity) -> None:
        self.module, self.leaves = module, named_leaves(module, granularity)
        self.granularity: Granularity = granularity if isinstance(granularity, str) else tuple(granularity)
        self.parameters = dict(module.named_parameters())
        self.entries: list[_Entry] = []
        self._fingerprint = Fingerprint.of(module)
        self._finite_buffers = tuple(
            name
            for name, buffer in module.named_buffers()
            if buffer.is_floating_point() and not buffer.is_meta and bool(torch.isfinite(buffer).all())
        )

    def know_the_module(self) -> bool:
        """Whether its layers and parameters are those that they were."""
        return Fingerprint.of(self.module).same_objects(self._fingerprint)

    def forget(self) -> None:
        """The module is about to compute something else; its layers and parameters are the same."""
        self.entries.clear()

    def serving(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], algorithm: Algorithm | None) -> Served:
        """The graph for the structure of the arguments, the modes and the algorithm: a known one, or a new one.

        Raises :class:`ModuleChangedError` where layers or parameters were replaced.
        """
        now, swapped = Fingerprint.of(self.module), dict[str, Tensor]()
        if not now.same_objects(self._fingerprint):
            swapped = swapped_parameters(self._fingerprint, now, self.parameters)
        tensors, signature = flatten_arguments(args, kwargs)
        key = (now.modes, now.forwards, signature.key)
        request = _Request(key, self._granularity_for(algorithm), signature, tensors)
        found = self._known(request)
        if found is None:
            with TRACING, tensors_in_place(self.module, {name: self.parameters[name] for name in swapped}):
                check_arguments(self.module, args, kwargs)
                check_inputs(tensors)  # what a capture shows of each operation must not come from bad numbers
                check_standing({**self.parameters, **self.standing_buffers()})
                found = self._made(request)
        captured, graph = found
        return Served(tensors, graph, captured.captured_by, swapped)

    def trace(self) -> None:
        """Trace the module before there are inputs, for the errors that this raises."""
        with TRACING:
            trace(self.module, assumed_signature(self.module), self.leaves, self._all_called)

    def standing_buffers(self) -> dict[str, Tensor]:
        """Buffers in which NaN or infinity would be new."""
        return self.buffers(self._finite_buffers)

    def buffers(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Those of these names that there are. One walk over the module: ``get_buffer`` takes one a name."""
        buffers = dict(self.module.named_buffers(remove_duplicate=False)) if names else {}
        return {name: buffers[name] for name in names if name in buffers}

    def _granularity_for(self, algorithm: Algorithm | None) -> Granularity:
        if self.granularity != "auto":
            return self.granularity
        return "layer" if algorithm is None else algorithm.partition

    @property
    def _all_called(self) -> bool:
        """Whether it is a mistake if forward does not call one of the modules that are kept whole."""
        return self.granularity != "children"

    def _known(self, request: _Request) -> tuple[Capture, EnergyGraph] | None:
        """A capture and graph that serve this call as they are."""
        for entry in self._of(request.key):
            if entry.capture.captured_by == "fx" or _specialised(self.module, request.tensors) in entry.served:
                graph = entry.known_graph(request.granularity)
                return None if graph is None else (entry.capture, graph)
        return None

    def _made(self, request: _Request) -> tuple[Capture, EnergyGraph]:
        """A new capture, or a known one that turns out to serve this call too."""
        entry = self._served_by_known(request)
        if entry is None:
            entry = self._captured(request)
            self.entries.append(entry)
            del self.entries[:-KEPT]
        return entry.capture, entry.graph(request.granularity)

    def _of(self, key: Any) -> Iterable[_Entry]:
        return (entry for entry in self.entries if entry.key == key and still_hold(entry.capture.settings))

    def _served_by_known(self, request: _Request) -> _Entry | None:
        """Export keeps dimensions dynamic as far as it can; a real run at other shapes tells whether it could."""
        specialised = _specialised(self.module, request.tensors)
        for entry in self._of(request.key):
            if entry.capture.captured_by == "fx" or specialised in entry.served:
                return entry
            same_kind = any(_without_shapes(served) == _without_shapes(specialised) for served in entry.served)
            if same_kind and holds_for(entry.capture, entry.graphs[0][1], request.tensors):
                entry.served.append(specialised)
                return entry
        return None

    def _captured(self, request: _Request) -> _Entry:
        exports = [entry for entry in self._of(request.key) if entry.capture.captured_by == "export"]
        failure: Torch2EBMError | None = None
        if not exports:
            try:
                return self._traced(request)
            except (UntraceableError, CaptureMismatchError, NodeEvaluationError) as error:
                failure = error
        run_once(self.module, request.signature, request.tensors)  # what the module refuses is no failure of export
        try:
            entry = self._exported(request)
        except (UntraceableError, CaptureMismatchError) as error:
            raise self._both(request, failure, error) from (failure or error)
        self._make_room(exports)
        return entry

    def _traced(self, request: _Request) -> _Entry:
        traced = trace(self.module, request.signature, self.leaves, self._all_called)
        return self._entry(request, traced, [])

    def _exported(self, request: _Request) -> _Entry:
        exported = export(self.module, request.signature, request.tensors, self.leaves)
        return self._entry(request, exported, [_specialised(self.module, request.tensors)])

    def _entry(self, request: _Request, traced: Trace, served: list[Any]) -> _Entry:
        entry = _Entry(request.key, capture(self.module, traced, request.signature, request.tensors), served)
        entry.graph(request.granularity)
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

    def _both(self, request: _Request, symbolic: Torch2EBMError | None, exported: Torch2EBMError) -> Torch2EBMError:
        """One error for the two ways that failed, with every problem that could be found."""
        if symbolic is None or isinstance(symbolic, CaptureMismatchError):
            return symbolic or exported
        problems = self._problems(request)
        listed = [str(problem) for problem in problems] or [exported.got]
        scopes = sorted({*self.leaves, *(problem.scope for problem in problems if problem.scope)})
        scopes = [scope for scope in scopes if not _inside(scope, scopes)]
        named = f"make one node of each with nodes={scopes}" if scopes else "make the submodule concerned one node"
        return UntraceableError(
            f"torch2ebm cannot capture {type(self.module).__name__}",
            "\n  ".join(["", *listed, f"(symbolic tracing stopped at {symbolic.got})"]),
            "operations on tensors that do not need a tensor's value while the graph is made",
            f"Three ways out: {named}; rewrite a branch with torch.where, and .item() or numpy with operations of "
            "torch; or leave that part out of the converted module and convert what comes before or after it. "
            "Of a branch only the side that this input takes was looked at.",
        )

    def _problems(self, request: _Request) -> list[Problem]:
        """All that a real run shows, then what export finds in a submodule at another place."""
        seen = problems_in_a_run(self.module, request.signature, request.tensors, self.leaves)
        known = {(problem.scope, problem.place) for problem in seen}
        more = failing_parts(self.module, request.signature, request.tensors)
        return [
            *seen,
            *(p for p in more if (p.scope, p.place) not in known and not _inside(p.scope, self.leaves, itself=True)),
        ]


def _specialised(module: nn.Module, tensors: Sequence[Tensor]) -> Any:
    """What an exported graph may have written down as constants."""
    own = {(p.dtype, p.device) for p in module.parameters()}
    autocast = tuple((kind, torch.is_autocast_enabled(kind)) for kind in {t.device.type for t in tensors})
    return [(t.shape, t.dtype, t.device) for t in tensors], own, autocast


def _without_shapes(specialised: Any) -> Any:
    tensors, *rest = specialised
    return [(len(shape), dtype, device) for shape, dtype, device in tensors], rest


def _inside(name: str, others: Iterable[str], itself: bool = False) -> bool:
    """Whether a submodule is part of one of the others."""
    return any(name.startswith(f"{other}.") or (itself and name == other) for other in others)
