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
from torch2ebm.capture.functions import hung_on_autograd, moved_by, runs_elsewhere
from torch2ebm.capture.identities import Settings
from torch2ebm.capture.run import Cuts, Run
from torch2ebm.capture.watch import Watch
from torch2ebm.common.nested import leaves_of
from torch2ebm.errors import UntraceableError
from torch2ebm.isolation.module_state import AttributeSnapshot, BufferSnapshot, identical, is_lazy
from torch2ebm.isolation.random_numbers import Generators, RandomState


@dataclass(eq=False)
class Subject:
    """A module, and what its runs have taught.

    Attributes:
        module: The module.
        modules: id of each submodule to its path.
        opaque: Path of each module that is one operation, to the reason.
        passive: Functions that return no tensor.
        tuples: id of tuples of numbers that operations were given, which they are kept with, to their keys.
        elsewhere: Whether some submodule runs outside of Python.
        custom: Whether a run has applied a custom autograd function.
        parts: All submodules, itself among them.
        changed: Names of the buffers that runs have changed.
        effects: What else runs have changed.
    """

    module: nn.Module
    modules: Mapping[int, str]
    opaque: dict[str, str] = field(default_factory=dict)
    passive: set[Any] = field(default_factory=set)
    tuples: dict[int, Settings] = field(default_factory=dict)
    elsewhere: bool = False
    parts: Sequence[nn.Module] = ()
    custom: bool = False
    changed: dict[str, None] = field(default_factory=dict)
    effects: Effects = field(default_factory=lambda: Effects())

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
        contents: BufferSnapshot | None = None,
    ) -> Run:
        """Watch ``function``, which calls the module.

        Args:
            function: Calls the module.
            paths: id of each parameter, or of what stands in its place, to its path.
            inputs: From the id of each tensor among the arguments to its name, for a run that is recorded.
            device: Where the module computes.
            cuts: Where the run is cut if its sequence is as expected; None records it.
            others: The cuts of other sequences, for a run that takes another branch.
            contents: With cuts, the buffers that runs change, as they are now.
        """
        lazy = cuts is None and any(map(is_lazy, self.module.parameters()))
        before = None if cuts is not None else Before.now(self.module, device)
        begun = None if contents is None else self.effects.now(contents, device)
        rest: list[Before] = []  # of a run that turned out to be another: the buffers as they were there
        ended: _Ended | None = None
        for _ in range(len(self.modules) + 1):
            watch = Watch(paths, device, self.modules, inputs, cuts, others, self.opaque, self.passive,
                          self.tuples, lazy)  # fmt: skip
            watch.buffers, watch.changing = self.module.buffers, self._changing_in
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
            else:
                ended = ended or _Ended(run.output, Before.now(self.module, device), run.random)
                ended.drawn_again()
                assert begun is not None
                begun.restore()
        if ended is not None:
            self._as_ended(ended, run)
        for each in [before] if before is not None else rest:
            self.changed.update(dict.fromkeys(each.changed_buffers()))
            self.effects.learn(each)
        if run.records is not None:
            self.note_changed(run)
        return run

    def _as_ended(self, ended: _Ended, run: Run) -> None:
        """Leave what the first of two runs has left, of which nobody knew in time that it would be run again."""
        ended.left.restore()
        if not ended.same(run.output):
            raise UntraceableError(
                f"{type(self.module).__name__}, called in another way than before",
                f"{sorted(path or 'the whole' for path in run.opaque)}, met for the first time, whose inside cannot be "
                "followed, behind random draws or buffers of the same call",
                "what can be followed, or no change before it",
                "Call the model again: by now it is known to be one node.",
            )

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

    def _changing_in(self, path: str) -> list[str]:
        """The names in a submodule of the buffers that runs change."""
        start = f"{path}." if path else ""
        return [name.removeprefix(start) for name in self.changed if name.startswith(start)]

    def _deviates(self, watch: Watch, told: ExitStack, rest: list[Before], device: torch.device) -> None:
        rest.append(Before.now(self.module, device))
        told.enter_context(told_of_calls(watch, custom=True, modules=True))

    def _told(self, watch: Watch, cuts: Cuts | None) -> AbstractContextManager[None]:
        """Torch's classes are patched for what is known to be needed alone: a patch costs more than an operation."""
        modules = cuts is None or bool(self.opaque) or self.elsewhere or self._has_backward_hooks()
        custom = cuts is None or self.custom or modules
        return told_of_calls(watch, custom, modules) if custom else nullcontext()

    def _has_backward_hooks(self) -> bool:
        """Whether some submodule has a hook that torch hangs on results' autograd functions, where no mode sees it."""
        return any(hung_on_autograd(part) for part in self.parts)


@dataclass(frozen=True, eq=False)
class _Ended:
    """What a complete run has returned and left, that is run again to be recorded.

    Copies of all buffers before each call would cost more than this is worth: it happens where a known run takes
    another branch, and something in there turns out to be opaque.
    """

    output: Any
    left: Before
    drawn: Mapping[Any, RandomState]

    def drawn_again(self) -> None:
        """Wind the generators back to where the run began to draw, as far as it is known."""
        if self.drawn:
            self.drawn[min(self.drawn)].restore()

    def same(self, output: Any) -> bool:
        pairs = list(zip(leaves_of(self.output), leaves_of(output), strict=False))
        return all(_alike(a, b) for a, b in pairs if isinstance(a, Tensor))


def _alike(a: Tensor, b: Any) -> bool:
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or a.layout is not torch.strided:
        return identical(a.detach(), b.detach())
    tolerance = 16 * torch.finfo(a.dtype).eps  # an accelerator adds in no fixed order
    return torch.allclose(a.detach(), b.detach(), rtol=tolerance, atol=tolerance, equal_nan=True)


@dataclass(eq=False)
class Effects:
    """What runs of a module are known to change beside its results: a snapshot of this alone costs next to nothing."""

    modules: dict[nn.Module, None] = field(default_factory=dict)  # whose attributes change
    draws: bool = False
    draws_beside_torch: bool = False

    def learn(self, before: Before) -> None:
        """Note what a run has changed since."""
        self.modules.update(dict.fromkeys(before.attributes.changed()))
        self.draws |= before.generators.torch.advanced()
        self.draws_beside_torch |= before.generators.moved_beside_torch()

    def now(self, contents: BufferSnapshot, device: torch.device) -> Begun:
        """What of it there is, as it is.

        Args:
            contents: The buffers that runs change.
            device: Where the module computes.
        """
        generators = Generators(device) if self.draws_beside_torch else RandomState(device) if self.draws else None
        return Begun(contents, AttributeSnapshot(self.modules), generators)


@dataclass(frozen=True, eq=False)
class Begun:
    """What a followed run changes, as it was when the run began."""

    contents: BufferSnapshot
    attributes: AttributeSnapshot
    generators: Generators | RandomState | None

    def restore(self) -> None:
        self.attributes.restore()
        self.contents.restore()
        if self.generators is not None:
            self.generators.restore()


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
        return Before(module, buffers, BufferSnapshot(buffers), AttributeSnapshot(module.modules()), Generators(device))

    def restore(self) -> None:
        self.attributes.restore()
        self.contents.restore()
        self.generators.restore()

    def changed_buffers(self) -> tuple[str, ...]:
        now = dict(self.module.named_buffers())
        copies = dict(zip(self.buffers, (copy for _, copy in self.contents.copies), strict=True))
        return tuple(name for name, copy in copies.items() if name in now and not identical(now[name], copy))
