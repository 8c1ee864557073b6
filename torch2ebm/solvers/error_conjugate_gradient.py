"""Conjugate gradients on the errors: the equilibrium without a step size, in as many steps as there are outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from torch2ebm.common.checks import check_steps, check_tolerance
from torch2ebm.common.rows import Rows
from torch2ebm.engine.energies import precision_of
from torch2ebm.inference.error_inference import ErrorInference
from torch2ebm.inference.solver import ErrorSolver, Rest

STILL = 2  # so many steps without a move, or without a fall of the energy, while the gradient stays: a kink
BACK = (1e-3, 0.5)  # how much shorter a step may become that raised the energy
JUMP = 3.0  # a line so many times as curved as the first one has crossed a kink
EXACT = 1e-4  # of an energy's change that the slopes do not explain, where it is a quadratic
BEYOND = 1.5  # how far past the point that was looked at, where the energy is no quadratic


@dataclass(frozen=True)
class Line:
    """A relaxation between two sweeps; rows are samples, or the batch in one, and columns all errors of a row.

    Errors are at ``base + length * direction``, where the next sweep looks. ``base`` is the smallest point of the line
    before, and ``gradient`` what a quadratic through the last two gradients has there.
    """

    weight: Tensor  # precisions, [rows or 1, entries or 1]
    base: Tensor
    gradient: Tensor
    direction: Tensor
    length: Tensor  # [rows, 1]
    best: Tensor  # where the energy was lowest
    best_gradient: Tensor
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
        tol: Stop once all samples are settled, or rest on kinks; 0 does all steps.
        steps: Most sweeps to do.

    Raises:
        ConfigurationError: for a negative ``tol`` or fewer than one step.

    Example:
        >>> import torch, torch2ebm
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

    def __post_init__(self) -> None:
        check_tolerance("ErrorConjugateGradient", self.tol)
        check_steps("ErrorConjugateGradient", self.steps)

    def with_steps(self, steps: int) -> ErrorConjugateGradient:
        return replace(self, steps=steps)

    def start(self, inference: ErrorInference) -> Line:
        rows = _rows(inference)
        zero = rows.pack({})
        column, none = zero.new_zeros(len(zero), 1), zero.new_zeros(len(zero), 1, dtype=torch.bool)
        # the curvatures lie between 1 and 1 + r, so no smallest point is farther than 1
        r = inference.nudge or 0.0
        return Line(
            weight=_weight(inference, rows, zero),
            base=zero,
            gradient=zero,
            direction=zero,
            length=column,
            best=zero,
            best_gradient=zero,
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
        here = rows.pack(inference.errors)
        gradient = rows.pack(dict(inference.total_sweep()))
        curve = dict(inference.history[-1])
        energy = sum(part.double() for part in curve.values())
        assert isinstance(energy, Tensor)
        quadratic = _quadratic(state, gradient, energy)
        forward = self._accepted(state, here, gradient, quadratic)
        forward = replace(forward, best_energy=energy, foreseen=forward.foreseen + energy, curve=curve)
        back = _taken_back(state, gradient, self.tol)
        # not (energy <= ...): NaN is no progress
        rounding = 8 * torch.finfo(here.dtype).eps * energy.abs()
        rose = ~(energy <= state.best_energy + rounding) | ~torch.isfinite(gradient).all()
        # on a quadratic the smallest point of the line is known, wherever the line was looked at
        after = _chosen(rose & ~quadratic, back, forward)
        after = self._at_rest(state, _with_lowest(rose, state, after), energy, ~rose)
        inference.history[-1] = after.curve
        done = (after.settled | after.on_kink).all() | after.stands | (after.left <= 0)
        # where nothing follows, rest where the energy has been looked at, or is known without
        ended = torch.where(after.known, after.base, after.best)
        rows.unpack(torch.where(done, ended, after.base + after.length * after.direction), inference.errors)
        return after

    def _at_rest(self, before: Line, after: Line, energy: Tensor, fell: Tensor) -> Line:
        """Where the energy stands still, who still moves rests on a kink, if the gradient has jumped there."""
        start = torch.where(torch.isnan(before.start), energy, before.start)
        gone = start - after.best_energy
        past = torch.cat([before.past[1:], after.best_energy[None]])
        # a residual of tol is a fall of tol^2 that is left, as long as an energy has digits to show it
        shows = self.tol**2 > torch.finfo(after.base.dtype).eps
        at_its_end = fell & (before.best_energy - after.best_energy <= self.tol**2 * gone) & shows
        jumped = after.stretch > JUMP * after.usual
        stands = at_its_end | (before.past[0] - after.best_energy <= self.tol * gone)
        on_kink = after.on_kink | (stands & jumped & ~after.settled)
        most = (after.settled | on_kink).double().mean() >= 0.5
        return replace(after, start=start, past=past, on_kink=on_kink, stands=at_its_end & most)

    def _accepted(self, state: Line, here: Tensor, gradient: Tensor, quadratic: Tensor) -> Line:
        """On from the smallest point of the line, along a direction that is conjugate to it."""
        moved = state.length > 0
        before, now = _dot(state.direction, state.gradient), _dot(state.direction, gradient)
        curvature = (now - before) / torch.where(moved, state.length, 1.0)  # d^T H d
        convex = moved & (curvature > 0)
        share = torch.where(convex, -before / torch.where(convex, curvature * state.length, 1.0), 1.0)
        share = torch.where(quadratic, share, share.clamp(0, BEYOND))
        # between two points that were looked at; beyond them a kink may come
        known = quadratic & (share <= 1).all()
        base = state.base + share * state.length * state.direction
        there = torch.lerp(state.gradient, gradient, share)
        # from here to there the slope falls to 0 in a straight line
        foreseen = (0.5 * now * (share - 1) * state.length).sum(dtype=torch.float64)
        at_rest, by_model = _residual(gradient, here, state.weight), _residual(there, base, state.weight)
        settled_here = at_rest <= self.tol
        base, there = torch.where(settled_here, here, base), torch.where(settled_here, gradient, there)
        settled = settled_here | ((by_model <= self.tol) & known)
        waits = by_model <= self.tol  # for the next sweep to look
        size = _norm(base, state.weight)
        idle = moved & (share * state.length * _norm(state.direction, state.weight) <= 0.1 * self.tol * size)
        still = torch.where(idle & ~settled, state.still + 1, 0.0)
        on_kink = (state.on_kink | (still >= STILL)) & ~settled_here
        steepest = -there / state.weight
        turned = _dot(there, there / state.weight - state.gradient / state.weight)
        old = _dot(state.gradient, state.gradient / state.weight)
        beta = torch.where(moved & (old > 0), turned / torch.where(old > 0, old, 1.0), 0.0).clamp_min(0)
        direction = steepest + beta * state.direction
        direction = torch.where(_dot(direction, there) < 0, direction, steepest)
        length = torch.where(moved, torch.where(convex, share, 2.0) * state.length, state.first.to(share))
        length = torch.where(quadratic & moved, length.clamp_min(1.0), length)  # to look beyond the smallest point
        rests = settled | waits | on_kink
        met = torch.nan_to_num(torch.where(convex, curvature / _norm(state.direction, state.weight).square(), 0.0))
        return replace(
            state,
            base=base,
            gradient=there,
            direction=torch.where(rests, 0.0, direction),
            length=torch.where(rests, 0.0, length),
            best=here,
            best_gradient=gradient,
            foreseen=foreseen,
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
        )


def _taken_back(state: Line, gradient: Tensor, tol: float) -> Line:
    """Where the energy was lowest, down the gradient, by steps as short as the slopes ask for."""
    before, now = _dot(state.direction, state.gradient), _dot(state.direction, gradient)
    # the smallest point of the line, as a share of the step
    share = torch.nan_to_num(torch.where(now > before, before / (before - now), BACK[1]), nan=BACK[0]).clamp(*BACK)
    # twice in a row: samples may depend on each other, so all steps become shorter by as much
    share = torch.where(state.again, share.amin(), share)
    settled = (state.best_residual <= tol) & ~state.on_kink
    rests = settled | state.on_kink
    return replace(
        state,
        base=state.best,
        gradient=state.best_gradient,
        direction=torch.where(rests, 0.0, -state.best_gradient / state.weight),
        length=torch.where(rests, 0.0, torch.where(state.length > 0, state.length * share, state.first)),
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


def _weight(inference: ErrorInference, rows: Rows, zero: Tensor) -> Tensor:
    owner = inference.graph.owner
    found = {slot: precision_of(inference.energies.get(owner[slot].name)) for slot in rows.like}
    if all(not isinstance(each, Tensor) and each == 1 for each in found.values()):
        return zero.new_ones(1, 1)
    return rows.pack({slot: torch.ones_like(value) * found[slot] for slot, value in rows.like.items()})


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)  # [rows, 1]


def _norm(errors: Tensor, weight: Tensor) -> Tensor:
    return (weight * errors.square()).sum(1, keepdim=True).sqrt()


def _residual(gradient: Tensor, errors: Tensor, weight: Tensor) -> Tensor:
    """|dF/de| over |pi e|, both in the metric of the precisions; a sample without a gradient is at rest."""
    size, length = (gradient.square() / weight).sum(1, keepdim=True).sqrt(), _norm(errors, weight)
    return torch.where(size > 0, size / length, 0.0)


def _quadratic(state: Line, gradient: Tensor, energy: Tensor) -> Tensor:
    """Whether the energy changed along the lines as the slopes at their ends say, by far more than its rounding."""
    before, now = _dot(state.direction, state.gradient), _dot(state.direction, gradient)
    said = (0.5 * (before + now) * state.length).sum(dtype=torch.float64)
    size = (0.5 * (before.abs() + now.abs()) * state.length).sum(dtype=torch.float64)
    rounding = 8 * torch.finfo(gradient.dtype).eps * energy.abs()
    exact: Tensor = (energy - state.foreseen - said).abs() <= EXACT * size + rounding
    return exact & (size > 100 * rounding)


def _chosen(condition: Tensor, one: Line, other: Line) -> Line:
    both = {name: (getattr(one, name), getattr(other, name)) for name in Line.__dataclass_fields__ if name != "curve"}
    return Line(**{name: torch.where(condition, a, b) for name, (a, b) in both.items()}, curve=other.curve)


def _with_lowest(rose: Tensor, before: Line, after: Line) -> Line:
    """The lowest point of before, where the energy rose; where even the first is no number, that is what to report."""
    names = ("best", "best_gradient", "best_energy", "best_residual")
    kept = {name: torch.where(rose, getattr(before, name), getattr(after, name)) for name in names}
    lowest = before.curve or after.curve
    curve = {name: torch.where(rose, lowest.get(name, torch.zeros_like(p)), p) for name, p in after.curve.items()}
    return replace(after, **kept, curve=curve)
