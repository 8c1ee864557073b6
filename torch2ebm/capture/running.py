"""Watched runs of one module, started again where something inside turns out to be opaque."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.capture.custom_functions import told_of_calls
from torch2ebm.capture.watch import Cuts, Run, Watch, hung_on_autograd, runs_elsewhere
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
    """

    module: nn.Module
    modules: Mapping[int, str]
    opaque: dict[str, str] = field(default_factory=dict)
    passive: set[Any] = field(default_factory=set)
    elsewhere: bool = False
    parts: Sequence[nn.Module] = ()
    custom: bool = False

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
    ) -> Run:
        """Watch ``function``, which calls the module.

        Args:
            function: Calls the module.
            paths: id of each parameter, or of what stands in its place, to its path.
            inputs: From the id of each tensor among the arguments to its name, for a run that is recorded.
            device: Where the module computes.
            cuts: Where the run is cut if its sequence is as expected; None records it.
        """
        lazy = cuts is None and any(map(is_lazy, self.module.parameters()))
        before = None if cuts is not None else Before.now(self.module, device)
        versions = [] if cuts is None else [*self._versions()]
        for _ in range(len(self.modules) + 1):
            watch = Watch(paths, device, self.modules, inputs, cuts, self.opaque, self.passive, lazy)
            with ExitStack() as told:
                watch.deviates = partial(told.enter_context, told_of_calls(watch, custom=True, modules=True))
                told.enter_context(self._told(watch, cuts))
                run = watch.watching(function)
            self.custom |= watch.custom
            if run.records is None or not (watch.lost or watch.blind):
                break
            # nobody has its results yet: it is as if it had not been
            self.opaque.update(watch.lost)
            cuts = None
            if before is not None:
                before.restore()
        if before is not None:
            run.changed_buffers = before.changed_buffers()
        elif run.records is not None:  # recorded from somewhere in the middle
            known = {place: (id(b), version) for place, b, version in versions}
            changed = {place for place, b, version in self._versions() if known.get(place) != (id(b), version)}
            run.changed_buffers = tuple(self._named(changed))
        return run

    def _versions(self) -> Iterator[tuple[tuple[int, str], Tensor, int]]:
        """All buffers, by their submodule and name, with their versions. No ``named_buffers``: it costs each run."""
        for i, part in enumerate(self.parts):
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    yield (i, name), buffer, 0 if buffer.is_inference() else buffer._version

    def _named(self, places: Collection[tuple[int, str]]) -> Iterator[str]:
        number = {id(part): i for i, part in enumerate(self.parts)}
        for path, part in self.module.named_modules():
            for name in part._buffers:
                if (number.get(id(part)), name) in places:
                    yield f"{path}.{name}" if path else name

    def _told(self, watch: Watch, cuts: Cuts | None) -> AbstractContextManager[None]:
        """Torch's classes are patched for what is known to be needed alone: a patch costs more than an operation."""
        modules = cuts is None or bool(cuts.opaque) or self.elsewhere or self._has_backward_hooks()
        return told_of_calls(watch, custom=cuts is None or self.custom or modules, modules=modules)

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
