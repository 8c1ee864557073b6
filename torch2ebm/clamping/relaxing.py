"""One relaxation of a call in which some values are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torch2ebm.clamping.data_loss import UNIT, Data, DataLoss
from torch2ebm.clamping.inferred import Found
from torch2ebm.clamping.pattern import Pattern, given_name, mask_name, value_name
from torch2ebm.clamping.rewriting import clamped_graph, is_prediction, place_of_data
from torch2ebm.clamping.sampling import sampled
from torch2ebm.clamping.start import INFERRED, NUDGED, begin_at, ended_at, kept_start
from torch2ebm.engine.call import Call, at_least_single
from torch2ebm.engine.energies import Energy
from torch2ebm.engine.results import InferenceState, Relaxation
from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.inference.base import Inference
from torch2ebm.inference.relaxation import InferenceStep, OnStep, is_wanted, relax, tell_end
from torch2ebm.inference.solver import Solver
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.memory.last_values import AVERAGE, FEEDFORWARD, LAST
from torch2ebm.programs.cache import Programs


@dataclass(frozen=True, eq=False)
class Answer:
    """By slot of the graph as it was captured: what was found, and the draws of what was sampled."""

    found: Mapping[str, Found]
    relaxation: Relaxation
    samples: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class FreeSteps:
    """Shows the steps of a rewritten graph, of its nodes those that stand in the captured one as they are."""

    on_step: OnStep
    free: frozenset[str]

    def wants(self, step: int, last: bool) -> bool:
        return is_wanted(self.on_step, step, last)

    def closed(self) -> None:
        tell_end(self.on_step)

    def __call__(self, step: InferenceStep) -> None:
        value, error, energy = (
            {name: each for name, each in found.items() if name in self.free}
            for found in (step.value, step.error, step.node_energy)
        )
        rest = step.energy - sum(energy.values())
        self.on_step(replace(step, value=value, error=error, node_energy=energy, loss=rest))


@dataclass(frozen=True, eq=False)
class Clamped:
    """A call under a pattern, before its relaxation.

    Attributes:
        original: The graph as it was captured.
        pattern: What is given.
        call: That of the rewritten graph, after its feed-forward pass.
        energies: By node.
        starts: By slot, where a value begins.
        kept: ``"last"`` or ``"average"``: where the other values begin, and that this is kept for the next one.
    """

    original: EnergyGraph
    pattern: Pattern
    call: Call
    energies: Mapping[str, Energy] = field(default_factory=dict)
    starts: Mapping[str, Tensor] = field(default_factory=dict)
    kept: str = FEEDFORWARD

    @staticmethod
    def of(
        call: Call,
        pattern: Pattern,
        energies: Mapping[str, Energy],
        starts: Mapping[str, Tensor],
        kept: str = FEEDFORWARD,
        keep_draws: bool = False,
    ) -> Clamped:
        """The call under the pattern, from one that no algorithm has filled."""
        given = {given_name(slot): value for slot, value in pattern.given.items()}
        given |= {mask_name(slot): mask for slot, mask in pattern.masks.items()}
        graph = clamped_graph(call.graph, pattern)
        under = Call(graph, call.run, call.device, call.batch_size, call.swapped, given, call.memory)
        under.feedforward(keep_graph=False, keep_draws=keep_draws)
        return Clamped(call.graph, pattern, under, energies, starts, kept)

    @property
    def whole(self) -> list[str]:
        """The nodes of which nothing is left to move."""
        nodes = self.original.nodes.values()
        return [node.name for node in nodes if all(map(self.pattern.is_whole, node.slots))]

    def place(self, slot: str) -> str:
        """The slot of the rewritten graph whose prediction is held against what is given for a slot."""
        return place_of_data(self.original, self.pattern, slot)

    @property
    def loss(self) -> DataLoss:
        """The energies of what is given."""
        found: dict[str, Data] = {}
        for slot in [*self.pattern.given, *self.pattern.ties]:
            node = self.original.owner[slot]
            found[self.place(slot)] = Data(
                self.energies.get(node.name, UNIT),
                self.pattern.given.get(slot),
                self.pattern.masks.get(slot),
                value_name(slot) if slot in self.pattern.ties else "",
            )
        return DataLoss(found, self.call.values)

    def inference(self, solver: Solver[Any], loss: OutputLoss | None = None) -> Inference:
        """What the solver moves, at its start."""
        inference: Inference = solver.inference(self.call, loss or self.loss, self.energies, True)
        begin_at(inference, {**kept_start(inference, self.kept, INFERRED, NUDGED), **self.starts})
        return inference

    def relaxed(self, solver: Solver[Any], programs: Programs | None = None, on_step: OnStep | None = None) -> Answer:
        """What the solver has found; with programs its steps are recorded. ``on_step`` sees what is wholly free."""
        if not self.call.graph.hidden_nodes:
            values = {slot: at_least_single(value) for slot, value in self.call.values.items()}
            total, _ = self.loss.gradients(values)
            return Answer(self._found(values, {}), Relaxation(converged=True, energy=(float(total),)))
        inference = self.inference(solver)
        draws: dict[str, list[Tensor]] = {}
        shown = None if on_step is None else FreeSteps(on_step, self._free())
        if solver.samples:
            found = sampled(solver, inference, draws, shown)
        else:
            found = relax(solver, inference, 1.0, programs, shown)
        state = found.state
        self._keep(state)
        errors = {slot: error * state.error_unit for slot, error in state.errors.items()}
        # r and its regime are of a nudge, and nothing is nudged here
        relaxation = replace(state.relaxation, sigma_squared=None)
        return Answer(self._found(state.predictions, errors), relaxation, self._samples(draws))

    def _free(self) -> frozenset[str]:
        """The nodes of which nothing is given: they are the same in the rewritten graph."""
        held = self.pattern.given.keys() | self.pattern.ties.keys()
        return frozenset(name for name, node in self.original.nodes.items() if held.isdisjoint(node.slots))

    def _keep(self, state: InferenceState) -> None:
        memory, values, size = self.call.memory, ended_at(state), self.call.batch_size
        memory.offer(LAST, INFERRED, values, size, asked=self.kept != FEEDFORWARD)  # the next call may ask for it
        if self.kept == AVERAGE:
            memory.offer(AVERAGE, INFERRED, values, size)
        memory.commit()

    def state_of(self, state: InferenceState) -> InferenceState:
        """A state of the rewritten graph, by the names of the graph as it was captured."""
        nodes, slots, errors = self.original.nodes, self.original.owner, {}
        for slot, error in state.errors.items():
            errors[slot] = error * state.error_unit
        found = {s: each for s, each in self._found(state.predictions, errors).items() if self.pattern.is_data(s)}
        predictions = {s: found[s].prediction if s in found else p for s, p in state.predictions.items() if s in slots}
        own = {slot: error for slot, error in errors.items() if slot in slots}
        return replace(
            state,
            graph=self.original,
            predictions=predictions,
            errors={**own, **{slot: each.error for slot, each in found.items()}},
            error_unit=1.0,
            unreached=tuple(name for name in state.unreached if name in nodes),
        )

    def _samples(self, draws: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        """The draws of what is free, by slot of the original graph, shape ``[draws, *value]``."""
        found: dict[str, Tensor] = {}
        for slot, each in draws.items():
            if slot in self.original.owner and not self.pattern.is_whole(slot):
                together, mask = torch.stack(each), self.pattern.masks.get(slot)
                found[slot] = together if mask is None else torch.where(mask, self.pattern.given[slot], together)
        return found

    def _found(self, predictions: Mapping[str, Tensor], errors: Mapping[str, Tensor]) -> dict[str, Found]:
        pattern = self.pattern
        slots = [slot for node in self.original.nodes.values() for slot in node.slots]
        found = {s: self._of_slot(s, predictions, errors) for s in slots if s not in pattern.ties}
        for slot, other in pattern.ties.items():
            prediction = at_least_single(predictions[self.place(slot)])
            value = found[other].value.to(prediction)
            found[slot] = self._part(slot, prediction, value - prediction, "tied", value)
        return found

    def _of_slot(self, slot: str, predictions: Mapping[str, Tensor], errors: Mapping[str, Tensor]) -> Found:
        pattern, node = self.pattern, self.original.owner[slot]
        place = self.place(slot) if slot in pattern.given else slot
        prediction = at_least_single(predictions[place])
        moves = not is_prediction(self.original, pattern, node) and not pattern.is_whole(slot)
        error = errors[slot].to(prediction) if moves and slot in errors else torch.zeros_like(prediction)
        if slot not in pattern.given:
            return self._part(slot, prediction, error, "free" if moves else "predicted")
        mask, data = pattern.masks.get(slot), pattern.given[slot].to(prediction)
        if mask is None:
            return self._part(slot, prediction, data - prediction, "given", data)
        value = torch.where(mask, data, prediction + error)
        return self._part(slot, prediction, torch.where(mask, data - prediction, error), "in part", value)

    def _part(self, slot: str, prediction: Tensor, error: Tensor, kind: str, value: Tensor | None = None) -> Found:
        energy = self.energies.get(self.original.owner[slot].name, UNIT)
        batched = error.ndim > 0 and error.shape[0] == self.call.batch_size
        phi = energy.of_samples(error, prediction).detach() if batched else None
        value = prediction + error if value is None else value  # what was given has no rounding
        return Found(value.detach(), prediction.detach(), error.detach(), phi, kind)
