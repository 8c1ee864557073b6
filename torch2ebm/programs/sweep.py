"""The feed-forward pass and one sweep over its graph by two recorded programs: before the loss, and after it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch2ebm.common.nested import fill, signature
from torch2ebm.engine.call import Call
from torch2ebm.engine.gradients import Swept
from torch2ebm.errors import NodeEvaluationError
from torch2ebm.isolation.interrupts import within
from torch2ebm.isolation.module_state import BufferSnapshot, hooks_suspended
from torch2ebm.isolation.random_numbers import RandomState
from torch2ebm.programs.cache import Family, Programs
from torch2ebm.programs.program import Program
from torch2ebm.programs.record import NotRecordableError, alias_pattern, record_two_programs
from torch2ebm.programs.surroundings import surroundings

Sweep = Callable[[Call, Mapping[str, Tensor], bool], Swept]  # the last says whether the call may be asked again


@dataclass(frozen=True)
class _Halves:
    before: Program
    after: Program


@dataclass(frozen=True)
class PendingSweep:
    """A call whose backward is the second program."""

    after: Program
    tensors: list[Tensor]
    versions: list[tuple[Tensor, int]]  # of those that it reads, some of them views of parameters

    def check(self) -> None:
        if any(tensor._version != version for tensor, version in self.versions):
            raise NodeEvaluationError(
                "loss.backward()",
                "an input or parameter that was changed in place since model(...)",
                "what the forward saw, which the gradient needs",
                "Call backward before optimizer.step().",
            )


class ProgramSweep:
    """A sweep, recorded at the second batch of its kind; without programs, or where that fails, it runs as it is.

    Args:
        programs: Where programs are kept; None records none.
        settings: Of the algorithm, all that the sweep depends on beside the call: another sweep has other programs.
        sweep: From a call, the delivered gradients and whether the call may be asked again to gradients.
    """

    def __init__(self, programs: Programs | None, settings: Hashable, sweep: Sweep) -> None:
        self._programs, self._settings, self._sweep = programs, settings, sweep

    def forward(self, call: Call) -> PendingSweep | None:
        """Evaluate the call; returns the second program where the first one has done so."""
        if self._programs is None:
            call.feedforward(keep_graph=True)
            return None
        early = [*call.tensors, *call.parameters.values(), *call.graph.module.buffers()]
        family = self._family(self._programs, call, early)
        if family is None:
            call.feedforward(keep_graph=True)
        elif "halves" in family:
            return self._run(call, family["halves"], early)
        elif "late" in family:
            self._record(call, family, early)
        else:
            call.feedforward(keep_graph=True)
            family["late"] = [call.values[slot].detach() for slot in call.graph.output_slots]
        return None

    def backward(
        self, call: Call, pending: PendingSweep | None, delivered: Mapping[str, Tensor], retain_graph: bool
    ) -> Swept:
        if pending is None:
            return self._sweep(call, delivered, retain_graph)
        pending.check()
        late = [_given(delivered.get(slot), call.values[slot]) for slot in call.graph.output_slots]
        return pending.after([*pending.tensors, *late])  # type: ignore[no-any-return]

    def _family(self, programs: Programs, call: Call, early: list[Tensor]) -> Family | None:
        if any(tensor.requires_grad for tensor in call.tensors):
            programs.warn("an input requires a gradient")
            return None
        return programs.family(call.graph, self._kind(call, early))

    def _kind(self, call: Call, early: list[Tensor]) -> Hashable:
        return self._settings, signature(early), alias_pattern(early), surroundings(call)

    def _run(self, call: Call, halves: _Halves, early: list[Tensor]) -> PendingSweep:
        for program in (halves.before, halves.after):
            program.compile()
        leaves = halves.before.leaves(early)
        call.values, call.environment = fill(halves.before.result, leaves)
        saved = leaves[halves.before.size :]
        tensors = [*early, *saved]
        buffers = set(map(id, call.graph.module.buffers()))  # another forward may move them
        read = [each for each in halves.after.read(tensors) if id(each) not in buffers and not each.is_inference()]
        return PendingSweep(halves.after, tensors, [(each, each._version) for each in read])

    def _record(self, call: Call, family: Family, early: list[Tensor]) -> None:
        """The feed-forward pass of this call, whose own backward is the eager sweep."""
        assert self._programs is not None
        late = [torch.zeros_like(each, memory_format=torch.contiguous_format) for each in family.pop("late")]
        delivered = dict(zip(call.graph.output_slots, late, strict=True))

        def function() -> Any:
            call.feedforward(keep_graph=True)
            values = {slot: value.detach() for slot, value in call.values.items()}
            hooks = hooks_suspended(call.parameters.values())  # they run in every backward
            return (values, dict(call.environment)), within([hooks], lambda: self._sweep(call, delivered, True))

        buffers, generators = BufferSnapshot(dict(call.graph.module.named_buffers())), RandomState(call.device)
        try:
            before, after = record_two_programs(function, early, late)
        except NotRecordableError as error:
            self._programs.refuse(call.graph, self._kind(call, early), f"the sweep cannot be recorded: {error}")
            buffers.restore()
            generators.restore()
            call.feedforward(keep_graph=True)
        else:
            family["halves"] = _Halves(before, after)


def _given(delivered: Tensor | None, value: Tensor) -> Tensor:
    found = torch.zeros_like(value) if delivered is None else delivered
    return found.contiguous()  # as when recording: how a gradient lies in memory is up to the loss
