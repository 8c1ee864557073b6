"""Conjugate gradients on the errors: the equilibrium without a step size, in as many steps as there are outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from torch2ebm.common.checks import check_steps, check_tolerance
from torch2ebm.common.rows import Rows, chosen_rows, moved_rows
from torch2ebm.engine.energies import precision_of
from torch2ebm.graph.activations import may_have_kinks
from torch2ebm.inference.error_inference import ErrorInference
from torch2ebm.inference.solver import ErrorSolver, Rest
from torch2ebm.isolation.torch_modes import in_own_precision

STILL = 2  # so many steps without a move, or without a fall of the energy, while the gradient stays: a kink
BACK = (1e-3, 0.5)  # how much shorter a step may become that raised the energy
JUMP = 3.0  # a line so many times as curved as the first one has crossed a kink
EXACT = 1e-4  # of an energy's change that the slopes do not explain, where it is a quadratic
BEYOND = 1.5  # how far past the point that was looked at, where the energy is no quadratic


@dataclass(frozen=True)
class Line:
    """A relaxation between two sweeps; rows are samples, or the batch in one, and columns all errors of a row.

    The next sweep looks at ``here``, which is ``base + length * direction``. ``base`` is the smallest point of the line
    before, and ``gradient`` what a quadratic through the last two gradients has there. Products are in the metric of
    the precisions, and carried along: a pass over all errors takes as long as a part of a sweep.
    """

    weight: Tensor | None  # precisions, [rows or 1, entries]; None where all are 1
    here: Tensor
    base: Tensor
    gradient: Tensor
    direction: Tensor
    length: Tensor  # [rows, 1]
    slope: Tensor  # direction times gradient, [rows, 1]
    squared: Tensor  # gradient times gradient
    reach: Tensor  # direction times direction
    best: Tensor  # where the energy was lowest
    best_gradient: Tensor
    best_squared: Tensor  # [rows, 1]
    best_energy: Tensor  # []
    best_residual: Tensor  # [rows, 1]
    foreseen: Tensor  # energy at ``base`` by that quadratic, []
    known: Tensor  # whether it is that energy, []
    curve: dict[str, Tensor]  # the line of the history at ``best``
    start: Tensor  # energy of the first sweep, []
    past: Tensor  # the lowest energy after each of the last steps, [STILL]
    again: Tensor  # whether the last step was taken back, []
    first: Tensor  # length to begin with, []
    usual: Tensor  # curvature of the first line, in units of the precisions, [rows, 1]
    stretch: Tensor  # the largest one
    residual: Tensor  # [rows, 1]
    settled: Tensor
    on_kink: Tensor
    still: Tensor  # steps without a move, [rows, 1]
    stands: Tensor  # whether the energy is at its end, []
    left: Tensor  # steps that are left, []


@dataclass(frozen=True)
class ErrorConjugateGradient(ErrorSolver):
    """Preconditioned conjugate gradients in the errors (Hestenes and Stiefel 1952; Polak and Ribiere 1969).

    In the errors the Hessian is the precisions plus a matrix whose rank is the number of outputs of a sample. So a
    sample is at rest after at most outputs + 1 steps where the energy is quadratic, at any depth. No step size is
    needed: the smallest point of a line follows from the gradients at two of its points. Elsewhere a step that raises
    the energy is taken back and made shorter, so the energy never rises. Each sample has its own step where samples
    are independent. One sweep is one step; the first looks at the start.

    A sample is settled where ``|dF/de|`` is at most ``tol`` of ``|pi e|``. ReLU and max-pooling have kinks, where the
    gradient jumps: a sample rests there where it or the energy stands still. It counts as at rest, and apart:
    ``model.state.relaxation`` has the shares ``settled`` and ``on_kinks``, and the curvature that was met.

    Args:
        tol: Stop once all samples are settled, or rest on kinks. It also stops where most do, and a step takes no more
            than ``tol**2`` of the energy's whole fall: that is what a residual of ``tol`` leaves. 0 does all steps.
        steps: Most sweeps to do.

    Raises:
        ConfigurationError: for a negative ``tol`` or fewer than one step.

    Example:
        >>> import torch, torch2ebm
        >>> generator = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(30)])
        >>> model = torch2ebm.convert(net)
        >>> coding = torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorConjugateGradient(tol=1e-3))
        >>> optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, coding)
        >>> torch.nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 3, 0])).backward()
        >>> relaxation = model.state.relaxation
        >>> relaxation.converged, relaxation.settled, relaxation.steps < 12
        (True, 1.0, True)
    """

    tol: float = 0.01
    steps: int = 50

    remedy: ClassVar[str] = "Take a smaller nudge, for example nudging=Relative(0.1)."
    relative_residual: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_tolerance("ErrorConjugateGradient", self.tol)
        check_steps("ErrorConjugateGradient", self.steps)

    def with_steps(self, steps: int) -> ErrorConjugateGradient:
        return replace(self, steps=steps)

    def start(self, inference: ErrorInference) -> Line:
        rows = _rows(inference)
        here, zero = rows.pack(inference.errors), rows.pack({})  # errors are zero unless values begin elsewhere
        column, none = zero.new_zeros(len(zero), 1), zero.new_zeros(len(zero), 1, dtype=torch.bool)
        # the curvatures lie between 1 and 1 + r, so no smallest point is farther than 1
        r = inference.nudge or 0.0
        return Line(
            weight=_weight(inference, rows, zero),
            here=here,
            base=here,
            gradient=zero,
            direction=zero.clone(),
            length=column,
            slope=column,
            squared=column,
            reach=column,
            best=here,
            best_gradient=zero,
            best_squared=column,
            best_residual=column + math.inf,
            best_energy=zero.new_tensor(math.inf, dtype=torch.float64),
            foreseen=zero.new_tensor(0.0, dtype=torch.float64),
            known=zero.new_zeros((), dtype=torch.bool),
            curve={},
            start=zero.new_tensor(math.nan, dtype=torch.float64),
            past=zero.new_full((STILL,), math.inf, dtype=torch.float64),
            again=zero.new_zeros((), dtype=torch.bool),
            first=zero.new_tensor(1.0 if r <= 1 else 2 / (2 + r)),
            usual=column,
            stretch=column,
            residual=column + math.inf,
            settled=none,
            on_kink=none,
            still=column,
            stands=zero.new_zeros((), dtype=torch.bool),
            left=zero.new_tensor(self.steps),
        )

    def rest(self, inference: ErrorInference, state: Line) -> Rest:
        count = inference.call.batch_size
        return Rest(
            float(state.residual.max()),
            bool((state.settled | state.on_kink).all() | state.stands),
            state.residual[:, 0] if len(state.residual) == count else None,
            float(state.settled.double().mean()),
            float(state.on_kink.double().mean()),
            float(state.stretch.max()),
        )

    def step(self, inference: ErrorInference, state: Line) -> Line:
        rows = _rows(inference)
        gradient = rows.pack(dict(inference.total_sweep()))
        curve = dict(inference.history[-1])
        energy = sum(part.double() for part in curve.values())
        assert isinstance(energy, Tensor)
        now, size = _dot(state.direction, gradient), _squared(gradient, _inverse(state.weight))
        quadratic = _quadratic(state, now, energy)
        # not (energy <= ...): NaN is no progress
        rounding = 8 * torch.finfo(gradient.dtype).eps * energy.abs()
        rose = ~(energy <= state.best_energy + rounding) | ~torch.isfinite(size).all()

        def forward() -> Line:
            found = self._accepted(state, gradient, now, size, quadratic, inference.recorded)
            return replace(found, best_energy=energy, foreseen=found.foreseen + energy, curve=curve)

        def back() -> Line:
            return replace(_taken_back(state, now, self.tol), curve=curve)

        # on a quadratic the smallest point of the line is known, wherever the line was looked at
        after = _chosen(rose & ~quadratic, back, forward, inference.recorded)
        lowest = _chosen(rose, lambda: _with_lowest(state, after), lambda: after, inference.recorded)
        jumps = inference.graph.once("whether it has kinks", lambda: may_have_kinks(inference.graph))
        jumps = jumps or any(energy.has_kinks for energy in inference.energies.values())
        after = self._at_rest(state, lowest, energy, ~rose, jumps)
        inference.history[-1] = after.curve
        done = (after.settled | after.on_kink).all() | after.stands | (after.left <= 0)

        def ended() -> Line:
            # where nothing follows, rest where the energy has been looked at, or is known without
            known = replace(after, here=after.base)
            return _chosen(after.known, lambda: known, lambda: replace(after, here=after.best), inference.recorded)

        def onward() -> Line:
            return replace(after, here=moved_rows(after.base, after.direction, after.length))

        after = _chosen(done, ended, onward, inference.recorded)
        rows.unpack(after.here, inference.errors)
        return after

    def _at_rest(self, before: Line, after: Line, energy: Tensor, fell: Tensor, jumps: bool) -> Line:
        """Where the energy stands still, who still moves rests on a kink, if the gradient has jumped there."""
        start = torch.where(torch.isnan(before.start), energy, before.start)
        gone = start - after.best_energy
        past = torch.cat([before.past[1:], after.best_energy[None]])
        # a residual of tol is a fall of tol^2 that is left, as long as an energy has digits to show it
        shows = self.tol**2 > torch.finfo(after.base.dtype).eps
        at_its_end = fell & (before.best_energy - after.best_energy <= self.tol**2 * gone) & shows
        jumped = (after.stretch > JUMP * after.usual) & jumps
        stands = at_its_end | (before.past[0] - after.best_energy <= self.tol * gone)
        on_kink = after.on_kink | (stands & jumped & ~after.settled)
        most = (after.settled | on_kink).double().mean() >= 0.5
        return replace(after, start=start, past=past, on_kink=on_kink, stands=at_its_end & most)

    def _accepted(
        self, state: Line, gradient: Tensor, now: Tensor, size: Tensor, quadratic: Tensor, recorded: bool
    ) -> Line:
        """On from the smallest point of the line, along a direction that is conjugate to it."""
        here, moved = state.here, state.length > 0
        share, curvature = _smallest(state, now, quadratic)
        # between two points that were looked at; beyond them a kink may come
        known = quadratic & (share <= 1).all()
        base = moved_rows(state.base, state.direction, share * state.length)
        there = (gradient - state.gradient).mul_(share).add_(state.gradient)
        squared, covered = _squared(there, _inverse(state.weight)), _squared(base, state.weight)
        at_rest, by_model = _residual(size, _squared(here, state.weight)), _residual(squared, covered)
        settled_here, waits = at_rest <= self.tol, by_model <= self.tol  # who waits has the next sweep look
        settled = settled_here | (waits & known)
        idle = moved & (share * state.length * state.reach.sqrt() <= 0.1 * self.tol * covered.sqrt())
        still = torch.where(idle & ~settled, state.still + 1, 0.0)
        on_kink = (state.on_kink | (still >= STILL)) & ~settled_here
        rests = settled | waits | on_kink
        length = torch.where(moved, torch.where(curvature > 0, share, 2.0) * state.length, state.first.to(share))
        length = torch.where(quadratic & moved, length.clamp_min(1.0), length)  # to look beyond the smallest point
        met = torch.nan_to_num(curvature / state.reach)
        return replace(
            state,
            base=chosen_rows(settled_here, here, base, recorded),
            gradient=chosen_rows(settled_here, gradient, there, recorded),
            length=torch.where(rests, 0.0, length),
            squared=torch.where(settled_here, size, squared),
            best=here,
            best_gradient=gradient,
            best_squared=size,
            # from here to there the slope falls to 0 in a straight line
            foreseen=(0.5 * now * (share - 1) * state.length).sum(dtype=torch.float64),
            known=known,
            best_residual=at_rest,
            usual=torch.where(state.usual > 0, state.usual, met),
            stretch=torch.maximum(state.stretch, met),
            residual=torch.where(settled_here | ~known, at_rest, by_model),
            settled=settled,
            on_kink=on_kink,
            still=still,
            again=torch.zeros_like(state.again),
            left=state.left - 1,
            **_conjugate(state, there, squared, torch.lerp(state.slope, now, share), rests, recorded),
        )


def _smallest(state: Line, now: Tensor, quadratic: Tensor) -> tuple[Tensor, Tensor]:
    """Where the line is smallest, as a share of the step, and ``d^T H d``; 1 and 0 where it is not convex."""
    moved = state.length > 0
    curvature = (now - state.slope) / torch.where(moved, state.length, 1.0)
    convex = moved & (curvature > 0)
    share = torch.where(convex, -state.slope / torch.where(convex, curvature * state.length, 1.0), 1.0)
    return torch.where(quadratic, share, share.clamp(0, BEYOND)), torch.where(convex, curvature, 0.0)


def _conjugate(
    state: Line, there: Tensor, squared: Tensor, along: Tensor, rests: Tensor, recorded: bool
) -> dict[str, Any]:
    """The next direction (Polak and Ribiere 1969), with its slope and its square.

    Args:
        state: The line before.
        there: The gradient at its smallest point.
        squared: That gradient times itself.
        along: The old direction times that gradient.
        rests: Rows that go no farther.
        recorded: Whether the step is.
    """
    inverse = _inverse(state.weight)
    steepest = there if inverse is None else there * inverse
    old, moved = state.squared, state.length > 0
    turned = squared - _dot(steepest, state.gradient)
    beta = torch.where(moved & (old > 0), turned / torch.where(old > 0, old, 1.0), 0.0).clamp_min(0)
    beta = torch.where(beta * along < squared, beta, 0.0)  # else the steepest direction: the other one rises
    keep, turn = torch.where(rests, 0.0, beta), torch.where(rests, 0.0, -1.0).to(beta)
    reach = keep.square() * state.reach + 2 * keep * turn * along + turn.square() * squared
    return {
        "direction": _turned(state.direction, keep, steepest, turn, recorded),
        "slope": torch.where(rests, 0.0, beta * along - squared),
        "reach": reach.clamp_min(0),
    }


def _taken_back(state: Line, now: Tensor, tol: float) -> Line:
    """Where the energy was lowest, down the gradient, by steps as short as the slopes ask for."""
    before = state.slope
    # the smallest point of the line, as a share of the step
    share = torch.nan_to_num(torch.where(now > before, before / (before - now), BACK[1]), nan=BACK[0]).clamp(*BACK)
    # twice in a row: samples may depend on each other, so all steps become shorter by as much
    share = torch.where(state.again, share.amin(), share)
    settled = (state.best_residual <= tol) & ~state.on_kink
    rests = settled | state.on_kink
    inverse = _inverse(state.weight)
    steepest = state.best_gradient if inverse is None else state.best_gradient * inverse
    squared = torch.where(rests, 0.0, state.best_squared)
    return replace(
        state,
        base=state.best,
        gradient=state.best_gradient,
        direction=steepest * torch.where(rests, 0.0, -1.0).to(steepest),
        length=torch.where(rests, 0.0, torch.where(state.length > 0, state.length * share, state.first)),
        slope=-squared,
        squared=state.best_squared,
        reach=squared,
        foreseen=state.best_energy,
        known=torch.zeros_like(state.known),
        residual=state.best_residual,
        settled=settled,
        again=torch.ones_like(state.again),
        left=state.left - 1,
    )


def _rows(inference: ErrorInference) -> Rows:
    rows = Rows(inference.values, tuple(inference.values), inference.call.batch_size)
    if inference.call.couples_samples:
        rows.count = 1
    return rows


def _weight(inference: ErrorInference, rows: Rows, zero: Tensor) -> Tensor | None:
    owner = inference.graph.owner
    found = {slot: precision_of(inference.energies.get(owner[slot].name)) for slot in rows.like}
    if all(not isinstance(each, Tensor) and each == 1 for each in found.values()):
        return None
    return rows.pack({slot: torch.ones_like(value) * found[slot] for slot, value in rows.like.items()})


def _inverse(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.reciprocal()


def _turned(direction: Tensor, keep: Tensor, steepest: Tensor, turn: Tensor, recorded: bool) -> Tensor:
    """The next direction, in the place of the old one: nobody else has that, and new memory takes longer than sums."""
    kept = direction * keep if recorded else direction.mul_(keep)
    return kept.add_(steepest * turn) if recorded or bool((turn == 0).any()) else kept.sub_(steepest)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    with in_own_precision(a):
        return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).squeeze(2)  # [rows, 1], in one pass


def _squared(a: Tensor, weight: Tensor | None) -> Tensor:
    return _dot(a, a if weight is None else a * weight)


def _residual(size: Tensor, covered: Tensor) -> Tensor:
    """|dF/de| over |pi e|, both in the metric of the precisions; a sample without a gradient is at rest."""
    return torch.where(size > 0, (size / covered).sqrt(), 0.0)


def _quadratic(state: Line, now: Tensor, energy: Tensor) -> Tensor:
    """Whether the energy changed along the lines as the slopes at their ends say, by far more than its rounding."""
    before = state.slope
    said = (0.5 * (before + now) * state.length).sum(dtype=torch.float64)
    size = (0.5 * (before.abs() + now.abs()) * state.length).sum(dtype=torch.float64)
    rounding = 8 * torch.finfo(now.dtype).eps * energy.abs()
    exact: Tensor = (energy - state.foreseen - said).abs() <= EXACT * size + rounding
    return exact & (size > 100 * rounding)


def _chosen(condition: Tensor, one: Callable[[], Line], other: Callable[[], Line], recorded: bool) -> Line:
    """One of two; what is recorded must hold for both, and computes both."""
    if not recorded:
        return one() if bool(condition) else other()
    first, second = one(), other()
    if first is second:
        return first
    both = {name: (getattr(first, name), getattr(second, name)) for name in Line.__dataclass_fields__}
    curve, others = both.pop("curve")
    return Line(
        **{name: a if a is b else torch.where(condition, a, b) for name, (a, b) in both.items()},
        curve={n: a if a is others[n] else torch.where(condition, a, others[n]) for n, a in curve.items()},
    )


def _with_lowest(before: Line, after: Line) -> Line:
    """The lowest point of before; where even the first is no number, that is what to report."""
    names = ("best", "best_gradient", "best_squared", "best_energy", "best_residual")
    lowest = before.curve or after.curve
    curve = {name: lowest.get(name, torch.zeros_like(part)) for name, part in after.curve.items()}
    return replace(after, **{name: getattr(before, name) for name in names}, curve=curve)
