"""An equilibrium's step by recorded programs."""

from __future__ import annotations

from torch import Tensor

from torch2ebm.equilibrium import Equilibrium, Influence, States
from torch2ebm.fused import Chain, Programs, fixed_tensors, surroundings
from torch2ebm.structure import fill, leaves_of
from torch2ebm.updates import Past, Step, Update


class RecordedUpdate(Update):
    """Another update, in one phase of one call; where it cannot be recorded, that one itself."""

    def __init__(self, programs: Programs, update: Update, equilibrium: Equilibrium, influence: Influence) -> None:
        self.name, self.share, self._update = update.name, update.share, update
        self._chain = _chain(programs, update, equilibrium, influence)

    def step(self, equilibrium: Equilibrium, states: States, influence: Influence, past: Past | None = None) -> Step:
        past = Past() if past is None else past
        if self._chain is None or self._chain.is_broken:
            return self._update.step(equilibrium, states, influence, past)
        moving = (dict(states), past.points, past.images)
        tensors = list(leaves_of(moving))
        role = f"a {self.name} step"
        recorded = self._chain.next(role, tensors, lambda: moving)
        if recorded is not None:
            return _taken(fill(recorded.program.result, self._chain.leaves(recorded, tensors)), past)

        def function() -> object:
            made = self._update.step(equilibrium, states, influence, past)
            return made.start, made.states, made.drives, past.points, past.images

        found = self._chain.record(role, tensors, moving, function)
        if found is None:
            past.points, past.images = moving[1:]
            return self._update.step(equilibrium, states, influence, past)
        return _taken(found[1], past)


def _taken(result: tuple[States, States, States, list[Tensor], list[Tensor]], past: Past) -> Step:
    start, states, drives, past.points, past.images = result
    return Step(start, states, drives)


def _chain(programs: Programs, update: Update, equilibrium: Equilibrium, influence: Influence) -> Chain | None:
    found = fixed_tensors(programs, equilibrium.call, influence.loss)
    if found is None:
        return None
    on_loss, tensors = found
    readouts = tuple(node.name for node in equilibrium.hopfield.readouts)
    phase = (influence.beta, tuple(influence.held))
    key = (update, equilibrium.feedback, readouts, phase, on_loss, surroundings(equilibrium.call))
    fixed = [*tensors, *equilibrium.fixed.values(), *influence.held.values()]
    return Chain(programs, equilibrium.call.graph, key, fixed)
