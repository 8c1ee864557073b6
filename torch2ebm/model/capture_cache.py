"""The graphs of one module, one for each sequence of operations that its runs have had, each one verified."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.capture.fingerprint import Fingerprint, swapped_parameters
from torch2ebm.capture.functions import tensors_of
from torch2ebm.capture.observation import Capture, capture
from torch2ebm.capture.recording import Place
from torch2ebm.capture.run import Cuts, Run
from torch2ebm.capture.running import Subject
from torch2ebm.clamping.free_inputs import is_current, with_free_inputs
from torch2ebm.common.users_code import users_level
from torch2ebm.engine.finite import all_finite
from torch2ebm.errors import (
    ChangingForwardWarning,
    KeptValueWarning,
    LoneNodeWarning,
    OpaqueModuleWarning,
    UncalledNodeWarning,
)
from torch2ebm.graph.build import build_graph
from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.graph.granularity import Granularity, named_leaves
from torch2ebm.graph.kept_values import DETACHED, cut_by_what_is_kept
from torch2ebm.graph.lone_node import ALONE, FINER, lone_node
from torch2ebm.isolation.module_state import BufferSnapshot, is_lazy, tensors_in_place
from torch2ebm.isolation.torch_modes import TRACING
from torch2ebm.model.arguments import Arguments
from torch2ebm.model.shards import Shards
from torch2ebm.model.verification import same_by_cuts, verify

KEPT = 32  # sequences of operations: branches may differ from batch to batch


@dataclass(frozen=True)
class Served:
    """A run of the module, the graph of its sequence, and what stood in the place of parameters."""

    run: Run
    graph: EnergyGraph
    swapped: Mapping[str, Tensor]
    arguments: Arguments


@dataclass(eq=False)
class _Entry:
    """What is known of one sequence."""

    varying: frozenset[Place] = frozenset()
    held: frozenset[int] = frozenset()
    graphs: dict[Granularity, EnergyGraph] = field(default_factory=dict)
    captured: Capture | None = None

    @property
    def made(self) -> Capture:
        assert self.captured is not None
        return self.captured


class _Holders(dict[str, tuple[nn.Module, str]]):
    """Name of a buffer to the submodule that holds it, and to its name there."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __missing__(self, name: str) -> tuple[nn.Module, str]:
        path, _, key = name.rpartition(".")
        self[name] = self.module.get_submodule(path), key
        return self[name]


class Captures:
    """The graphs of one module as it was when this was made.

    Raises :class:`ConfigurationError` where ``granularity`` is nothing that a module can be cut by.
    """

    def __init__(self, module: nn.Module, granularity: Granularity, beside: frozenset[str] = frozenset()) -> None:
        self.module, self.leaves = module, named_leaves(module, granularity) | beside
        self.granularity: Granularity = granularity if isinstance(granularity, str) else tuple(granularity)
        self.parameters = dict(module.named_parameters())
        self.subject = Subject.of(module)
        self.entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._latest: dict[tuple[Granularity, bool], Cuts] = {}
        self.inputs: dict[str, Tensor] = {}  # of the call captured last, without any rows, for the other dimensions
        self._behind: dict[tuple[tuple[str, str], ...], Captures] = {}
        self._paths = {id(parameter): name for name, parameter in self.parameters.items()}
        self._fingerprint = Fingerprint.of(module)
        self._told_of: set[str | type[Warning]] = set()  # paths of opaque modules, and warnings that are given once
        self._cut_before: weakref.WeakSet[EnergyGraph] = weakref.WeakSet()
        self._finite_buffers: tuple[str, ...] | None = None
        self._holders = _Holders(module)

    def know_the_module(self) -> bool:
        """Whether its layers and parameters are those that they were."""
        return Fingerprint.of(self.module).same_objects(self._fingerprint)

    def behind(self, free: Mapping[str, str]) -> Captures:
        """Those of the module behind free inputs, argument to node, which are values of their own there."""
        if not free:
            return self
        key, names = tuple(free.items()), list(free.values())
        found = self._behind.get(key)
        if found is None or not is_current(found.module, self.module, names):
            view = with_free_inputs(self.module, free)
            found = self._behind[key] = Captures(view, self.granularity, frozenset(names))
        found.module.training = self.module.training
        return found

    def see(self, arguments: Arguments) -> None:
        """Remember the shapes of the inputs."""
        names = arguments.names()
        self.inputs = {names[id(t)]: t.new_empty((0, *t.shape[1:])) for t in arguments.tensors if id(t) in names}

    def changing_buffers(self) -> dict[str, Tensor]:
        """The buffers that forward may change; all of them before anything is known of it."""
        known = [graph for entry in self.entries.values() for graph in entry.graphs.values()]
        if not known:
            return {name: buffer for name, buffer in self.module.named_buffers() if not is_lazy(buffer)}
        return self._buffers(tuple(dict.fromkeys(name for graph in known for name in graph.changing_buffers)))

    def _buffers(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Those of these names that there are. Not by ``named_buffers``, which walks over the whole module."""
        found = {}
        for name in names:
            part, key = self._holders[name]
            if key in part._buffers and (buffer := part._buffers[key]) is not None:  # a scripted module's has no get
                found[name] = buffer
        return found

    def standing_buffers(self) -> dict[str, Tensor]:
        """Buffers in which NaN or infinity would be new."""
        if self._finite_buffers is None:
            self._finite_buffers = tuple(
                name
                for name, buffer in self.module.named_buffers()
                if buffer.is_floating_point() and not buffer.is_meta and not is_lazy(buffer) and all_finite(buffer)
            )
        return self._buffers(self._finite_buffers)

    def run(
        self,
        arguments: Arguments,
        call: Callable[[], Any],
        algorithm: Algorithm | None,
        keep_cuts: bool = True,
        contents: BufferSnapshot | None = None,
    ) -> Served:
        """Run the module; the graph for its sequence of operations is a known one, or a new one.

        Args:
            arguments: What the module is called with.
            call: Calls it.
            algorithm: The one whose nodes are wanted.
            keep_cuts: Whether the run may be cut at the nodes that are expected.
            contents: The buffers that forward may change, as they are now, where somebody has them.

        Raises:
            ModuleChangedError: where layers or parameters were replaced.
        """
        now, swapped = Fingerprint.of(self.module), dict[str, Tensor]()
        paths = self._paths
        if not now.same_objects(self._fingerprint):
            swapped = swapped_parameters(self._fingerprint, now, self.parameters)
            paths = {id(swapped.get(name, p)): name for name, p in self.parameters.items()}
        granularity, graded = self._granularity_for(algorithm), torch.is_grad_enabled()
        known = self._known(granularity, graded) if keep_cuts and not torch.is_inference_mode_enabled() else {}
        cuts = list(known)
        first = cuts[0] if cuts else None
        if cuts and contents is None:
            contents = BufferSnapshot(self.changing_buffers())
        run = self.subject.run(call, paths, arguments.names, arguments.device, first, cuts[1:], contents)
        if run.matched and run.cuts is not None:
            entry, graph = known[run.cuts]
            if self._same_numbers(run, entry, run.cuts):
                self._latest[granularity, graded] = run.cuts
                if run.followed and graph not in self._cut_before:
                    self._check_cuts(graph, run, arguments, swapped)
                return Served(run, graph, swapped, arguments)
        self.see(arguments)
        with TRACING:
            graph = self._graph_for(run, granularity, graded, arguments.device, swapped)
        served = Served(run, graph, swapped, arguments)
        # an equilibrium of one node is the module's own, and its states are at activations
        relaxes = algorithm is not None and algorithm.reevaluates_loss and not algorithm.defines_output
        if relaxes and all(map(all_finite, tensors_of(run.output))):  # NaN show nothing of what depends on what
            self._tell_of_lone_node(graph)
            self._tell_of_kept(served, graded, granularity)
        self._latest[granularity, graded] = _cuts_of(graph)
        return served

    def _known(self, granularity: Granularity, graded: bool) -> dict[Cuts, tuple[_Entry, EnergyGraph]]:
        """The graphs that a run may turn out to have, that of the last call first."""
        found = {
            _cuts_of(entry.graphs[granularity]): (entry, entry.graphs[granularity])
            for (of_graded, *_), entry in reversed(self.entries.items())
            if of_graded == graded and granularity in entry.graphs
        }
        latest = self._latest.get((granularity, graded))
        return {latest: found[latest], **found} if latest is not None and latest in found else found

    def _check_cuts(self, graph: EnergyGraph, run: Run, arguments: Arguments, swapped: Mapping[str, Tensor]) -> None:
        """Hold the first run that was cut against the composition of the nodes; where they differ, compose for ever."""
        self._cut_before.add(graph)
        if not same_by_cuts(graph, run, arguments.device, swapped):
            graph.cuts, run.followed = _cuts_of(graph).to_follow(), False
            self._latest.clear()

    def _granularity_for(self, algorithm: Algorithm | None) -> Granularity:
        if self.granularity != "auto":
            return self.granularity
        return "layer" if algorithm is None else algorithm.partition

    def _same_numbers(self, run: Run, entry: _Entry, cuts: Cuts | None) -> bool:
        pairs = zip(run.numbers, () if cuts is None else cuts.numbers, strict=cuts is not None)
        return (cuts is not None and all(a is b or _equal(a, b) for a, b in pairs)) or not self._others(run, entry)

    def _others(self, run: Run, entry: _Entry) -> frozenset[Place]:
        """Numbers that the entry takes for granted, and that this run has otherwise."""
        known, inputs = entry.made.run.numbers, set(entry.made.trace.numbers.values())
        return frozenset(
            (i, j)
            for i, (ours, theirs) in enumerate(zip(run.numbers, known, strict=True))
            if not _equal(ours, theirs)
            for j, (a, b) in enumerate(zip(ours, theirs, strict=True))
            if (i, j) not in inputs and not (type(a) is type(b) and a == b)
        )

    def _graph_for(
        self,
        run: Run,
        granularity: Granularity,
        graded: bool,
        device: torch.device,
        swapped: Mapping[str, Tensor],
    ) -> EnergyGraph:
        if run.records is None:  # followed, with numbers that were taken for granted until now
            run.as_recorded(len(run.constants))
            self.subject.note_changed(run)
        run.followed = False
        if torch.is_inference_mode_enabled():  # what was made there may not be saved for a backward
            with torch.inference_mode(False):
                run.constants = [c.clone() if c.is_inference() else c for c in run.constants]
        # a graph is of the module's own parameters
        with tensors_in_place(self.module, {name: self.parameters[name] for name in swapped}):
            entry = self._entry_for(run, graded, device)
            known = entry.graphs.get(granularity)
            graph = build_graph(entry.made, granularity) if known is None else known
        if known is None:
            verify(graph, run, device, swapped)
            entry.graphs[granularity] = graph
            self._tell(graph, run)
        return graph

    def _entry_for(self, run: Run, graded: bool, device: torch.device) -> _Entry:
        key = (graded, tuple(run.sequence), run.returned)
        entry = self.entries.get(key)
        if entry is None:
            entry = self._new_entry(key, run, device)
        elif (others := self._others(run, entry)) or not run.kept.keys() <= entry.held:
            entry.varying |= others
            entry.held |= run.kept.keys()
            entry.captured = self._captured(run, entry, device)
            entry.graphs.clear()
        self.entries.move_to_end(key)
        return entry

    def forget(self, graph: EnergyGraph) -> None:
        """Its run had numbers that were not finite: what they showed of operations says nothing of good ones."""
        for key, entry in list(self.entries.items()):
            if any(graph is known for known in entry.graphs.values()):
                del self.entries[key]
        self._latest = {key: latest for key, latest in self._latest.items() if latest is not graph.cuts}

    def _new_entry(self, key: Any, run: Run, device: torch.device) -> _Entry:
        entry = _Entry(held=frozenset(run.kept))
        entry.captured = self._captured(run, entry, device)
        self.entries[key] = entry
        if len(self.entries) > KEPT:
            self.entries.popitem(last=False)
            self._tell_of_changing()
        return entry

    def _captured(self, run: Run, entry: _Entry, device: torch.device) -> Capture:
        return capture(self.module, run, self.leaves, entry.varying, entry.held, device)

    def _tell(self, graph: EnergyGraph, run: Run) -> None:
        """Say once what a graph cannot show, and what cannot learn by inference."""
        name = type(self.module).__name__
        for path, reason in run.opaque.items():
            if path not in self._told_of:
                self._told_of.add(path)
                warnings.warn(
                    f"{f'{name}.{path}' if path else name} {reason}. It is one node: its values do not relax, and its "
                    "gradients are backpropagation's. torch2ebm.check(module, example_inputs) lists all of it.",
                    OpaqueModuleWarning,
                    stacklevel=users_level(),
                )

        self._tell_of_uncalled()

    def _tell_of_uncalled(self) -> None:
        """Say once which named submodules are no node: data may decide, and another call may have them."""
        if isinstance(self.granularity, str) or UncalledNodeWarning in self._told_of:
            return
        runs = [entry.made.run.records or () for entry in self.entries.values()]
        found = {path for records in runs for record in records for _, path in record.scopes}
        if uncalled := sorted(self.leaves - found):
            self._told_of.add(UncalledNodeWarning)
            warnings.warn(
                f"convert({type(self.module).__name__}, nodes=[...]): {uncalled} of these names were called in no run "
                "so far, or on data alone, and are no nodes. If data decides it, a later call has them; otherwise "
                "leave them out.",
                UncalledNodeWarning,
                stacklevel=users_level(),
            )

    def _tell_of_lone_node(self, graph: EnergyGraph) -> None:
        if (lone := lone_node(graph)) and LoneNodeWarning not in self._told_of:
            self._told_of.add(LoneNodeWarning)
            name = type(self.module).__name__
            warnings.warn(f"{name}, node '{lone}': {ALONE} {FINER}", LoneNodeWarning, stacklevel=users_level())

    def _tell_of_kept(self, served: Served, graded: bool, granularity: Granularity) -> None:
        if not served.graph.held or KeptValueWarning in self._told_of:
            return
        run, device = served.run, served.arguments.device
        varying = self.entries[graded, tuple(run.sequence), run.returned].varying
        with TRACING, tensors_in_place(self.module, {name: self.parameters[name] for name in served.swapped}):
            whole = build_graph(capture(self.module, run, self.leaves, varying, frozenset(), device), granularity)
        if cut := cut_by_what_is_kept(served.graph, whole):
            self._told_of.add(KeptValueWarning)
            warnings.warn(
                f"{type(self.module).__name__}, nodes {', '.join(map(repr, cut))}: a hook or an attribute keeps a "
                f"tensor from inside of a node, which is cut there, since your loss may use it. {DETACHED}",
                KeptValueWarning,
                stacklevel=users_level(),
            )

    def _tell_of_changing(self) -> None:
        if ChangingForwardWarning not in self._told_of:
            self._told_of.add(ChangingForwardWarning)
            warnings.warn(
                f"{type(self.module).__name__}.forward has run another sequence of operations in more than {KEPT} "
                "calls, and every new one is captured anew, which takes as long as several forwards. Numbers may "
                "differ freely; branches on data, random branches and loops of another length make a new sequence.",
                ChangingForwardWarning,
                stacklevel=users_level(),
            )


def _cuts_of(graph: EnergyGraph) -> Cuts:
    assert graph.cuts is not None  # of a graph that a run was cut for
    return graph.cuts


def _equal(ours: Any, theirs: Any) -> bool:
    return len(ours) == len(theirs) and all(
        a is b or (type(a) is type(b) and type(a) in (int, float) and a == b) for a, b in zip(ours, theirs, strict=True)
    )


def seen(module: nn.Module, granularity: Granularity) -> tuple[Shards, Captures]:
    """The parameters of a module that are spread over processes, and its captures, with nothing in them yet."""
    shards = Shards(module)
    with shards.gathered():
        return shards, Captures(module, granularity)
