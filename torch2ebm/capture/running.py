"""Watched runs of one module, started again where something inside turns out to be opaque."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch2ebm.capture.custom_functions import told_of_calls
from torch2ebm.capture.watch import Cuts, Run, Watch, runs_elsewhere
from torch2ebm.isolation.module_state import AttributeSnapshot, BufferSnapshot
from torch2ebm.isolation.random_numbers import RandomState


@dataclass(eq=False)
class Subject:
    """A module, and what its runs have taught.

    Attributes:
        module: The module.
        modules: id of each submodule to its path.
        opaque: Path of each module that is one operation, to the reason.
        passive: Functions that return no tensor.
    """

    module: nn.Module
    modules: Mapping[int, str]
    opaque: dict[str, str] = field(default_factory=dict)
    passive: set[Any] = field(default_factory=set)
    elsewhere: bool = False

    @staticmethod
    def of(module: nn.Module) -> Subject:
        modules = {id(part): path for path, part in module.named_modules()}
        return Subject(module, modules, elsewhere=any(runs_elsewhere(part) for part in module.modules()))

    def run(
        self,
        function: Callable[[], Any],
        paths: Mapping[int, str],
        inputs: Mapping[int, str],
        device: torch.device,
        cuts: Cuts | None = None,
    ) -> Run:
        """Watch ``function``, which calls the module.

        Args:
            function: Calls the module.
            paths: id of each parameter, or of what stands in its place, to its path.
            inputs: id of each tensor among the arguments to its name.
            device: Where the module computes.
            cuts: Where the run is cut if its sequence is as expected; None records it.
        """
        before = None if cuts is not None else _Before.now(self.module, device)
        for _ in range(len(self.modules) + 1):
            watch = Watch(paths, device, self.modules, inputs, cuts, self.opaque, self.passive)
            with told_of_calls(watch, cuts is None or bool(cuts.opaque) or self.elsewhere):
                run = watch.watching(function)
            if run.records is None or not watch.lost:
                break
            # nobody has its results yet: it is as if it had not been
            self.opaque.update(watch.lost)
            cuts = None
            if before is not None:
                before.restore()
        if before is not None:
            run.changed_buffers = before.changed_buffers()
        else:
            run.changed_buffers = ()
        return run


@dataclass(frozen=True, eq=False)
class _Before:
    """What a run changes beside its results."""

    module: nn.Module
    buffers: Mapping[str, Tensor]
    contents: BufferSnapshot
    attributes: AttributeSnapshot
    generators: RandomState
    python: Any
    numpy: Any

    @staticmethod
    def now(module: nn.Module, device: torch.device) -> _Before:
        buffers = {name: b for name, b in module.named_buffers() if not b.is_meta and not _is_lazy(b)}
        state = random.getstate(), np.random.get_state()
        return _Before(module, buffers, BufferSnapshot(buffers), AttributeSnapshot(module), RandomState(device), *state)

    def restore(self) -> None:
        self.attributes.restore()
        self.contents.restore()
        self.generators.restore()
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def changed_buffers(self) -> tuple[str, ...]:
        now = dict(self.module.named_buffers())
        copies = dict(zip(self.buffers, (copy for _, copy in self.contents.copies), strict=True))
        return tuple(name for name, copy in copies.items() if name in now and not _identical(now[name], copy))


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.parameter.UninitializedTensorMixin)


def _identical(a: Tensor, b: Tensor) -> bool:
    # not torch.equal: a NaN that was there before has not changed
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
