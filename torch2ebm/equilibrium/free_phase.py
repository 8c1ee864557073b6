"""The free phase of equilibrium algorithms: it defines ``model(x)``, and tries other updates where it cycles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torch2ebm.common.checks import check_choice, check_steps, check_tolerance
from torch2ebm.engine.call import Call
from torch2ebm.engine.results import Relaxation
from torch2ebm.equilibrium.dynamics import Equilibrium, Influence, States
from torch2ebm.equilibrium.hopfield import HopfieldGraph
from torch2ebm.equilibrium.minimum import MinimumCheck
from torch2ebm.equilibrium.settling import Free, Settled, settle
from torch2ebm.equilibrium.settling_checks import are_finite, warn_if_unsettled
from torch2ebm.equilibrium.updates import Damped, GaussSeidel, Synchronous, Update
from torch2ebm.errors import ConfigurationError
from torch2ebm.memory.last_values import FEEDFORWARD, STARTS
from torch2ebm.programs.cache import Programs

FREE = "free"  # the phase under which the states are kept


@dataclass(frozen=True)
class FreePhase:
    """How an algorithm relaxes without a loss; the settings that all equilibrium algorithms share.

    Args:
        steps: Steps of all states.
        feedback: Strength of the feedback per depth.
        damping: The part of a step that is taken back.
        tol: Largest change at which the phase ends early; 0 takes all steps.
        readout: Whether the outputs are read out of the states, and have none.
        update: How a step moves the states; None for all at once.
        start: Where the states begin: ``"feedforward"``, or where those of the batch before have settled.
        programs: Where recorded steps are kept; None records none.
    """

    steps: int
    feedback: float = 1.0
    damping: float = 0.0
    tol: float = 0.0
    readout: bool = False
    update: Update | None = None
    start: str = FEEDFORWARD
    programs: Programs | None = field(default=None, compare=False)

    @classmethod
    def of(cls, algorithm: Any) -> FreePhase:
        """From an algorithm's own settings, checked. What it does not have is as it stands here.

        Raises :class:`ConfigurationError` for an illegal setting.
        """
        phase = cls(
            algorithm.free_steps,
            algorithm.feedback,
            algorithm.damping,
            algorithm.tol,
            getattr(algorithm, "readout", False),
            algorithm.update,
            algorithm.start,
            Programs() if getattr(algorithm, "compile", False) else None,
        )
        phase.check(type(algorithm).__name__)
        return phase

    def as_settings(self) -> dict[str, Any]:
        """As the algorithms name them; the reverse of :meth:`of`."""
        names = ("feedback", "damping", "tol", "readout", "update", "start")
        found = {name: getattr(self, name) for name in names}
        return {**found, "free_steps": self.steps, "compile": self.programs is not None}

    def check(self, where: str) -> None:
        """Raise :class:`ConfigurationError` for an illegal setting of the algorithm ``where``."""
        check_steps(where, self.steps)
        check_tolerance(where, self.tol)
        check_choice(where, "start", self.start, STARTS)
        _check_between(where, "feedback", self.feedback, 0 < self.feedback <= 1 if _number(self.feedback) else False)
        _check_between(where, "damping", self.damping, 0 <= self.damping < 1 if _number(self.damping) else False)
        if self.update is not None and not isinstance(self.update, Update):
            remedy = "For example AndersonMixing()."
            raise ConfigurationError(f"{where}(update=...)", repr(self.update), "AndersonMixing or GaussSeidel", remedy)
        if self.update is not None and self.damping:
            got = f"damping={self.damping:g} and update={self.update!r}"
            raise ConfigurationError(where, got, "one of them", "Damping belongs to the update of all states at once.")

    def settings(self) -> str:
        """Those that are not the default, as they stand in an algorithm's ``repr``."""
        parts = [f"free_steps={self.steps}"]
        parts += [f"feedback={self.feedback:g}"] * (self.feedback != 1)
        parts += [f"damping={self.damping:g}"] * (self.damping != 0)
        parts += [f"tol={self.tol:g}"] * (self.tol != 0) + ["readout=True"] * self.readout
        parts += [f"update={self.update!r}"] * (self.update is not None)
        parts += [f"start={self.start!r}"] * (self.start != FEEDFORWARD)
        parts += ["compile=True"] * (self.programs is not None)
        return ", ".join(parts)

    def run(self, call: Call) -> Free:
        """Feed-forward, then relax from there, or from ``start``; the call's values become the equilibrium's.

        Raises :class:`DivergenceError` where the states run away, :class:`NoEquilibriumError` and
        :class:`PartitionError` where the graph has no energy.
        """
        key = ("Hopfield", self.readout)
        # the energy follows from the graph and `readout` alone: built, or refused, once
        hopfield = call.graph.once(key, lambda: HopfieldGraph(call.graph, self.readout))
        call.feedforward(keep_graph=False)
        equilibrium = Equilibrium(call, hopfield, self.feedback)
        # before the relaxation: call.values will be those of the equilibrium
        feedforward = {slot: call.values[slot].detach() for slot in call.graph.output_slots}
        shapes = {slot: state.shape for slot, state in equilibrium.states.items()}
        for slot, state in call.memory.start(self.start, (FREE,), shapes).items():
            equilibrium.states[slot] = state.to(equilibrium.states[slot])
        update, settled = self._settled(equilibrium)
        if not settled.unsettled:  # NaN is unsettled
            minima = MinimumCheck.of(call).look(equilibrium, settled.states, update)
            settled = replace(settled, relaxation=replace(settled.relaxation, at_minimum=minima))
        outputs = equilibrium.outputs(settled.states)
        for slot, value in outputs.items():
            outputs[slot] = value.to(call.values[slot].dtype)  # model(x) has the dtype that the module gives
        if math.isfinite(settled.relaxation.residual):  # else the feed-forward values say where it began
            self._leave(call, equilibrium, settled)
            self._offer(call, settled)
        call.values.update(outputs)
        return Free(equilibrium, settled, update, _distance(outputs, feedforward))

    def _offer(self, call: Call, settled: Settled) -> None:
        if self.start != FEEDFORWARD:  # copies: the state that the model shows is the user's
            states = {slot: state.detach().clone() for slot, state in settled.states.items()}
            call.memory.offer(self.start, FREE, states, call.batch_size)

    def _leave(self, call: Call, equilibrium: Equilibrium, settled: Settled) -> None:
        """The feed-forward values go: where the states have settled is what the call is about."""
        # the pre-activation first: where it has no activation, its slot is that of the state, which stands
        for slot, state in equilibrium.hopfield.states.items():
            call.values[state.source], call.values[slot] = settled.drives[slot], settled.states[slot]
        equilibrium.states = dict(settled.states)

    def settled(
        self,
        equilibrium: Equilibrium,
        start: States,
        steps: int,
        update: Update,
        influence: Influence,
        beta: float = 0.0,
        angle: float = 0.0,
    ) -> Settled:
        """Where ``steps`` lead from ``start``, by these settings; a nudged phase too."""
        return settle(equilibrium, start, steps, update, influence, self.tol, beta, angle, self.programs)

    def _settled(self, equilibrium: Equilibrium) -> tuple[Update, Settled]:
        """The first update, or another where states cycle or run away; where one was asked for, unless it settles."""
        tried: list[tuple[Update, Settled]] = []
        for update in self._updates():
            settled = self.settled(equilibrium, equilibrium.states, self.steps, update, Influence())
            tried.append((update, settled))
            if math.isfinite(settled.relaxation.residual):
                if not settled.unsettled or not (settled.cycling or self.update is not None):
                    break
            elif not are_finite(equilibrium.states):  # bad numbers came in: who checks these says which
                break
        # the least residual of all that were tried, also where none has settled
        best = min(tried, key=lambda pair: _badness(pair[1].relaxation))
        warn_if_unsettled(equilibrium, best[1])
        return best

    def _updates(self) -> Sequence[Update]:
        plain = Damped(self.damping) if self.damping else Synchronous()
        first = plain if self.update is None else self.update
        # Half damping turns a cycle of length two (an eigenvalue of -1) into rest; a sequential step lowers the energy.
        # dict.fromkeys: without repeating the one that was asked for.
        return tuple(dict.fromkeys([first, Damped(max(self.damping, 0.5)), GaussSeidel()]))


def _badness(relaxation: Relaxation) -> float:
    return relaxation.residual if math.isfinite(relaxation.residual) else math.inf


def _distance(outputs: States, feedforward: States) -> Tensor:
    difference = torch.stack([(outputs[slot] - value).square().sum() for slot, value in feedforward.items()]).sum()
    size = torch.stack([value.square().sum() for value in feedforward.values()]).sum()
    return (difference / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt()  # all-zero outputs


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_between(where: str, name: str, value: object, legal: bool) -> None:
    if not legal:
        expected = "a number above 0, at most 1" if name == "feedback" else "a number from 0 to below 1"
        raise ConfigurationError(f"{where}({name}=...)", repr(value), expected, "Choose another.")
