"""The updates of an equilibrium algorithm's states: synchronous, damped, sequential, Anderson mixing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from torch2ebm.common.nested import attributes_of, fill, leaves_of, settings_of
from torch2ebm.common.rows import Rows, least_squares
from torch2ebm.common.setting_names import NamedSettings
from torch2ebm.equilibrium.dynamics import Equilibrium, Influence, States
from torch2ebm.errors import ConfigurationError
from torch2ebm.isolation.torch_modes import in_own_precision
from torch2ebm.programs.cache import Chain, Programs
from torch2ebm.programs.surroundings import fixed_tensors, surroundings


@dataclass(frozen=True, eq=False)
class Step:
    """One step of an equilibrium algorithm's states.

    Attributes:
        start: Where it was made from, by slot.
        states: Where it led, by slot, in the same shapes.
        drives: What each activation was applied to, by slot.

    Example:
        >>> import torch
        >>> from torch2ebm.extend import Step
        >>> states = {"h": torch.zeros(5, 8)}
        >>> Step(start=states, states=states, drives=states).states["h"].shape
        torch.Size([5, 8])
    """

    start: States
    states: States
    drives: States


@dataclass
class UpdateHistory:
    """What an update may remember of one phase: points and what a step made of them, a sample a row, newest last.

    Attributes:
        points: Each of shape ``[rows, entries]``.
        images: Each of the same shape.

    Example:
        The example of the method goes on from this one.

        >>> import torch
        >>> from torch2ebm.extend import UpdateHistory
        >>> past = UpdateHistory()
        >>> past.points
        []
    """

    points: list[Tensor] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)

    def add(self, point: Tensor, image: Tensor, most: int) -> None:
        """Remember a pair, and forget the oldest.

        Args:
            point: Where a step began, shape ``[rows, entries]``.
            image: Where it led, in the same shape.
            most: How many pairs are kept.

        Example:
            >>> for number in range(4):
            ...     past.add(torch.full((1, 2), number), torch.zeros(1, 2), most=3)
            >>> len(past.points)
            3
        """
        self.points, self.images = [*self.points, point][-most:], [*self.images, image][-most:]


class Update(NamedSettings, ABC):
    """How one step moves the states of an equilibrium algorithm: ``EquilibriumPropagation(update=...)``.

    Write a subclass as a frozen dataclass. Where its free phase has not settled, a damped and a sequential update are
    tried, too.

    Attributes:
        name: As it stands in the report, ``model.state.relaxation.update``.
        share: The part that it takes of the way to where an undamped step leads: changes are measured by it.

    Example:
        Half of every step. The example of the method goes on from this one.

        >>> from dataclasses import dataclass
        >>> import torch, torch2ebm
        >>> from torch2ebm.extend import Step, Update, synchronous_step
        >>> @dataclass(frozen=True)
        ... class Half(Update):
        ...     name: str = "half"
        ...     share: float = 0.5
        ...     def step(self, equilibrium, states, influence, past=None):
        ...         whole = synchronous_step(equilibrium, states, influence)
        ...         moved = {slot: 0.5 * (states[slot] + state) for slot, state in whole.states.items()}
        ...         return Step(states, moved, whole.drives)
        >>> algorithm = torch2ebm.EquilibriumPropagation(free_steps=60, feedback=0.3, update=Half())
    """

    name: str
    share: float

    @abstractmethod
    def step(
        self, equilibrium: Equilibrium, states: States, influence: Influence, past: UpdateHistory | None = None
    ) -> Step:
        """One step from ``states``, or from another point that the ``past`` of the phase suggests.

        Args:
            equilibrium: The dynamics of the call; :func:`synchronous_step` takes it as it is.
            states: By slot, for example ``[batch, features]``. They are read, and not written.
            influence: What the loss does to the states in this phase.
            past: What earlier steps of the phase have left here; None for nothing.

        Returns:
            Where the step began, where it led, and what the activations were applied to.

        Example:
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
            >>> model = torch2ebm.convert(net)
            >>> optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
            >>> model(torch.randn(5, 4)).square().mean().backward()
            >>> model.state.phases[0].update
            'half'
        """


@dataclass(frozen=True)
class Synchronous(Update):
    """All states at once, from the states before."""

    name: str = field(default="synchronous", init=False, repr=False)
    share: float = field(default=1.0, init=False, repr=False)

    def step(
        self, equilibrium: Equilibrium, states: States, influence: Influence, past: UpdateHistory | None = None
    ) -> Step:
        return synchronous_step(equilibrium, states, influence)


@dataclass(frozen=True)
class Damped(Update):
    """The synchronous step, of which ``damping`` is taken back: s <- damping s + (1 - damping) f(s)."""

    damping: float
    name: str = field(default="damped", init=False, repr=False)

    @property
    def share(self) -> float:  # type: ignore[override]
        return 1 - self.damping

    def step(
        self, equilibrium: Equilibrium, states: States, influence: Influence, past: UpdateHistory | None = None
    ) -> Step:
        whole = synchronous_step(equilibrium, states, influence)
        # (1 - damping) f(s) + damping s
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

    def step(
        self, equilibrium: Equilibrium, states: States, influence: Influence, past: UpdateHistory | None = None
    ) -> Step:
        current, all_drives = dict(states), dict[str, Tensor]()
        for colour in equilibrium.hopfield.colours:
            # no state of a colour reads another: together is as good as one by one
            drives = equilibrium.drive(current, colour)
            influence.nudge(equilibrium, current, drives)
            moved = equilibrium.activate(drives)
            influence.hold(moved)
            current.update(moved)
            all_drives.update(drives)
        return Step(states, current, all_drives)


@dataclass(frozen=True)
class AndersonMixing(Update):
    """Anderson mixing of the synchronous step (Anderson 1965; Walker and Ni 2011), each sample on its own.

    Each step starts from that affine combination of the last ``memory`` + 1 steps' ends whose step is shortest, as far
    as a linear net can tell: modes that make the plain update slow, or cycle, are solved for. It does best near one
    equilibrium, with smooth activations; of several it may find another. Where it has not settled, a damped and a
    sequential update are tried.

    Args:
        memory: How many differences of steps are combined. It holds that many copies of all states, twice.

    Raises:
        ConfigurationError: for a ``memory`` that is no whole number above 0.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.EquilibriumPropagation(free_steps=15, update=torch2ebm.AndersonMixing(memory=3))
        EquilibriumPropagation(Symmetric(beta=0.5), nudged_steps=10, free_steps=15, update=AndersonMixing(memory=3))
    """

    memory: int = 5
    name: str = field(default="anderson", init=False, repr=False)
    share: float = field(default=1.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.memory, int) or isinstance(self.memory, bool) or self.memory < 1:
            got = repr(self.memory)
            raise ConfigurationError("AndersonMixing(memory=...)", got, "a whole number above 0", "Choose another.")

    def step(
        self, equilibrium: Equilibrium, states: States, influence: Influence, past: UpdateHistory | None = None
    ) -> Step:
        past = UpdateHistory() if past is None else past
        # complex states as pairs of reals: the weights of the mixture stay real
        rows = Rows({slot: _real(s) for slot, s in states.items()}, tuple(states), equilibrium.call.batch_size)
        # one difference needs two points
        start = states if len(past.points) < 2 else self._suggested(past, rows, states)
        made = synchronous_step(equilibrium, start, influence)
        point, image = ({slot: _real(state) for slot, state in each.items()} for each in (start, made.states))
        past.add(rows.pack(point), rows.pack(image), self.memory + 1)
        return made

    def _suggested(self, past: UpdateHistory, rows: Rows, states: States) -> States:
        """f_k - dF w with the w of the shortest g_k - dG w, g = f(s) - s, d the differences of neighbours."""
        steps = [image - point for point, image in zip(past.points, past.images, strict=True)]
        # w = argmin |g_k - dG w|; the next point is f_k - dF w (Walker and Ni 2011)
        with in_own_precision(steps[-1]):
            weights = least_squares(_differences(steps), steps[-1])  # [rows, memory, 1]
            mixed = past.images[-1] - (_differences(past.images) @ weights).squeeze(2)
        found = dict[str, Tensor]()
        rows.unpack(mixed, found)
        return {slot: _as(found[slot], state) for slot, state in states.items()}


def _differences(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([after - before for before, after in pairwise(rows)], 2)  # [rows, entries, memory]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    return torch.view_as_complex(tensor.contiguous()) if like.is_complex() else tensor


def synchronous_step(equilibrium: Equilibrium, states: States, influence: Influence) -> Step:
    """f(s) of all states at once, from the states before.

    Args:
        equilibrium: The dynamics of the call.
        states: By slot.
        influence: What the loss does to the states in this phase.

    Returns:
        The step, whose drives are what the activations were applied to.

    Example:
        >>> from torch2ebm.extend import Update, synchronous_step
        >>> class Plain(Update):
        ...     name, share = "plain", 1.0
        ...     def step(self, equilibrium, states, influence, past=None):
        ...         return synchronous_step(equilibrium, states, influence)
    """
    drives = equilibrium.drive(states)
    influence.nudge(equilibrium, states, drives)
    moved = equilibrium.activate(drives)
    # after the step: a held state has a drive too, which the report shows
    influence.hold(moved)
    return Step(states, moved, drives)


class ProgramUpdate(Update):
    """Another update, in one phase of one call; where it cannot be recorded, that one itself."""

    def __init__(self, programs: Programs, update: Update, equilibrium: Equilibrium, influence: Influence) -> None:
        self.name, self.share, self._update = update.name, update.share, update
        self._chain = _chain(programs, update, equilibrium, influence)

    def step(
        self, equilibrium: Equilibrium, states: States, influence: Influence, past: UpdateHistory | None = None
    ) -> Step:
        past = UpdateHistory() if past is None else past
        if self._chain is None or self._chain.is_broken:
            return self._update.step(equilibrium, states, influence, past)
        moving = (dict(states), past.points, past.images)
        tensors = list(leaves_of(moving))
        role = f"a {self.name} step"
        known = self._chain.next(role, tensors, lambda: moving)
        if known is not None:
            return _taken(fill(known.program.result, self._chain.leaves(known, tensors)), past)

        def function() -> object:
            made = self._update.step(equilibrium, states, influence, past)
            return made.start, made.states, made.drives, past.points, past.images

        found = self._chain.record(role, tensors, moving, function)
        if found is None:
            # a recording that failed may have run the step, and changed the past
            past.points, past.images = moving[1:]
            return self._update.step(equilibrium, states, influence, past)
        return _taken(found[1], past)


def _taken(result: tuple[States, States, States, list[Tensor], list[Tensor]], past: UpdateHistory) -> Step:
    start, states, drives, past.points, past.images = result
    return Step(start, states, drives)


def _chain(programs: Programs, update: Update, equilibrium: Equilibrium, influence: Influence) -> Chain | None:
    found = fixed_tensors(programs, equilibrium.call, influence.loss)
    if found is None:
        return None
    on_loss, tensors = found
    readouts = tuple(node.name for node in equilibrium.hopfield.readouts)
    phase = (influence.beta, tuple(influence.held))
    key = (settings_of(update), equilibrium.feedback, readouts, phase, on_loss, surroundings(equilibrium.call))
    own = [leaf for leaf in leaves_of(attributes_of(update)) if isinstance(leaf, Tensor)]
    fixed = [*tensors, *own, *equilibrium.fixed.values(), *influence.held.values()]
    return Chain(programs, equilibrium.call.graph, key, fixed)
