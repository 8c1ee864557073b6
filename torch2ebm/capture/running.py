"""Watched runs of one module, started again where something inside turns out to be opaque."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.capture.custom_functions import told_of_calls
from torch2ebm.capture.watch import Cuts, Run, Watch, hung_on_autograd, moved_by, runs_elsewhere
from torch2ebm.isolation.module_state import AttributeSnapshot, BufferSnapshot, identical, is_lazy
from torch2ebm.isolation.random_numbers import Generators


@dataclass(eq=False)
class Subject:
    """A module, and what its runs have taught.

    Attributes:
        module: The module.
        modules: id of each submodule to its path.
        opaque: Path of each module that is one operation, to the reason.
        passive: Functions that return no tensor.
        elsewhere: Whether some submodule runs outside of Python.
        custom: Whether a run has applied a custom autograd function.
        parts: All submodules, itself among them.
        changed: Names of the buffers that runs have changed.
    """

    module: nn.Module
    modules: Mapping[int, str]
    opaque: dict[str, str] = field(default_factory=dict)
    passive: set[Any] = field(default_factory=set)
    elsewhere: bool = False
    parts: Sequence[nn.Module] = ()
    custom: bool = False
    changed: dict[str, None] = field(default_factory=dict)

    @staticmethod
    def of(module: nn.Module) -> Subject:
        parts = list(module.modules())
        modules = {id(part): path for path, part in module.named_modules()}
        return Subject(module, modules, elsewhere=any(map(runs_elsewhere, parts)), parts=parts)

    def run(
        self,
        function: Callable[[], Any],
        paths: Mapping[int, str],
        inputs: Callable[[], Mapping[int, str]],
        device: torch.device,
        cuts: Cuts | None = None,
        others: Sequence[Cuts] = (),
    ) -> Run:
        """Watch ``function``, which calls the module.

        Args:
            function: Calls the module.
            paths: id of each parameter, or of what stands in its place, to its path.
            inputs: From the id of each tensor among the arguments to its name, for a run that is recorded.
            device: Where the module computes.
            cuts: Where the run is cut if its sequence is as expected; None records it.
            others: The cuts of other sequences, for a run that takes another branch.
        """
        lazy = cuts is None and any(map(is_lazy, self.module.parameters()))
        before = None if cuts is not None else Before.now(self.module, device)
        rest: list[Before] = []  # of a run that turned out to be another: the buffers as they were there
        for _ in range(len(self.modules) + 1):
            watch = Watch(paths, device, self.modules, inputs, cuts, others, self.opaque, self.passive, lazy)
            with ExitStack() as told:
                watch.deviates = partial(self._deviates, watch, told, rest, device)
                told.enter_context(self._told(watch, cuts))
                try:
                    run = watch.watching(function)
                finally:
                    watch.deviates = bool  # a cycle, which would keep all tensors of the run until it is collected
            self.custom |= watch.custom
            if run.records is None or not (watch.lost or watch.blind):
                break
            # nobody has its results yet: it is as if it had not been
            self.opaque.update(watch.lost)
            cuts = None
            if before is not None:
                before.restore()
        for each in [before] if before is not None else rest:
            self.changed.update(dict.fromkeys(each.changed_buffers()))
        if run.records is not None:
            self.note_changed(run)
        return run

    def note_changed(self, run: Run) -> None:
        """Note the buffers that a recorded run has changed, as far as nothing was compared that it has read."""
        names = {id(buffer): name for name, buffer in self.module.named_buffers()}
        assert run.records is not None
        read = [i for i, (tensor, _) in enumerate(run.originals) if id(tensor) in names]
        moved = {each.place for record in run.records for each in moved_by(record)}
        for i in read:
            if i in run.copied or i in moved:
                self.changed[names[id(run.originals[i][0])]] = None
        run.changed_buffers = tuple(self.changed)

    def _deviates(self, watch: Watch, told: ExitStack, rest: list[Before], device: torch.device) -> None:
        rest.append(Before.now(self.module, device))
        told.enter_context(told_of_calls(watch, custom=True, modules=True))

    def _told(self, watch: Watch, cuts: Cuts | None) -> AbstractContextManager[None]:
        """Torch's classes are patched for what is known to be needed alone: a patch costs more than an operation."""
        modules = cuts is None or bool(cuts.opaque) or self.elsewhere or self._has_backward_hooks()
        custom = cuts is None or self.custom or modules
        return told_of_calls(watch, custom, modules) if custom else nullcontext()

    def _has_backward_hooks(self) -> bool:
        """Whether some submodule has a hook that torch hangs on results' autograd functions, where no mode sees it."""
        return any(hung_on_autograd(part) for part in self.parts)


@dataclass(frozen=True, eq=False)
class Before:
    """What a run changes beside its results."""

    module: nn.Module
    buffers: Mapping[str, Tensor]
    contents: BufferSnapshot
    attributes: AttributeSnapshot
    generators: Generators

    @staticmethod
    def now(module: nn.Module, device: torch.device) -> Before:
        buffers = {name: b for name, b in module.named_buffers() if not b.is_meta and not is_lazy(b)}
        return Before(module, buffers, BufferSnapshot(buffers), AttributeSnapshot(module), Generators(device))

    def restore(self) -> None:
        self.attributes.restore()
        self.contents.restore()
        self.generators.restore()

    def changed_buffers(self) -> tuple[str, ...]:
        now = dict(self.module.named_buffers())
        copies = dict(zip(self.buffers, (copy for _, copy in self.contents.copies), strict=True))
        return tuple(name for name, copy in copies.items() if name in now and not identical(now[name], copy))
