"""One step of an equilibrium algorithm's states, in the orders and mixtures that there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor

from torch2ebm.equilibrium import Equilibrium, Influence, States


@dataclass(frozen=True, eq=False)
class Step:
    """One step.

    Attributes:
        start: Where it was made from.
        states: Where it led.
        drives: What each activation was applied to.
    """

    start: States
    states: States
    drives: States


@dataclass
class Past:
    """What an update may remember of one phase; the newest last."""

    points: list[Tensor] = field(default_factory=list)  # [rows, entries]
    images: list[Tensor] = field(default_factory=list)  # [rows, entries]


class Update(ABC):
    """How one step moves the states.

    Attributes:
        name: As it stands in the report.
        share: The part that it takes of the way to where an undamped step leads.
    """

    name: str
    share: float

    @abstractmethod
    def step(self, equilibrium: Equilibrium, states: States, influence: Influence, past: Past | None = None) -> Step:
        """One step from ``states``, or from another point that the ``past`` of the phase suggests."""


@dataclass(frozen=True)
class Synchronous(Update):
    """All states at once, from the states before."""

    name: str = field(default="synchronous", init=False, repr=False)
    share: float = field(default=1.0, init=False, repr=False)

    def step(self, equilibrium: Equilibrium, states: States, influence: Influence, past: Past | None = None) -> Step:
        return synchronous_step(equilibrium, states, influence)


@dataclass(frozen=True)
class Damped(Update):
    """The synchronous step, of which ``damping`` is taken back: s <- damping s + (1 - damping) f(s)."""

    damping: float
    name: str = field(default="damped", init=False, repr=False)

    @property
    def share(self) -> float:  # type: ignore[override]
        return 1 - self.damping

    def step(self, equilibrium: Equilibrium, states: States, influence: Influence, past: Past | None = None) -> Step:
        whole = synchronous_step(equilibrium, states, influence)
        part = {slot: moved.lerp(states[slot], self.damping) for slot, moved in whole.states.items()}
        return Step(states, part, whole.drives)


@dataclass(frozen=True)
class GaussSeidel(Update):
    """One colour of the state graph after another, each from the states as they then are. No state reads another of its
    colour, so that each step of a colour lowers the energy where the activations are monotone.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.EquilibriumPropagation(update=torch2ebm.GaussSeidel())
        EquilibriumPropagation(Symmetric(beta=0.5), nudged_steps=10, free_steps=20, update=GaussSeidel())
    """

    name: str = field(default="sequential", init=False, repr=False)
    share: float = field(default=1.0, init=False, repr=False)

    def step(self, equilibrium: Equilibrium, states: States, influence: Influence, past: Past | None = None) -> Step:
        current, all_drives = dict(states), dict[str, Tensor]()
        for colour in equilibrium.hopfield.colours:
            drives = equilibrium.drive(current, colour)
            influence.nudge(equilibrium, current, drives)
            moved = equilibrium.activate(drives)
            influence.hold(moved)
            current.update(moved)
            all_drives.update(drives)
        return Step(states, current, all_drives)


def synchronous_step(equilibrium: Equilibrium, states: States, influence: Influence) -> Step:
    """f(s) of all states."""
    drives = equilibrium.drive(states)
    influence.nudge(equilibrium, states, drives)
    moved = equilibrium.activate(drives)
    influence.hold(moved)
    return Step(states, moved, drives)
