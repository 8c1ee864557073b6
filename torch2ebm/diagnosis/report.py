"""What ``diagnose`` has found, and how it reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.common.text import html_text, listed
from torch2ebm.diagnosis.loss_scale import LossScale
from torch2ebm.diagnosis.reach import Reach
from torch2ebm.diagnosis.spectrum import Spectrum
from torch2ebm.reports.agreement import Agreement
from torch2ebm.reports.findings import Finding, findings_frame

if TYPE_CHECKING:
    from pandas import DataFrame

WEAK, STRONG = 0.1, 10.0  # r below and above which a nudge is called infinitesimal, and clamped


@dataclass(frozen=True)
class Advice:
    """What to take, tried out on the batch.

    Attributes:
        take: As you write it, for example ``"lr=0.031"``.
        why: What it cures.
        algorithm: The settings that were judged with this one changed, and with the advice before it; without the
            fault on this batch. None for advice that is no setting of an algorithm.
    """

    take: str
    why: str
    algorithm: Algorithm | None = None

    def __str__(self) -> str:
        return f"{self.take}: {self.why}"


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What :func:`torch2ebm.diagnose` has found. ``print`` it.

    Numbers that could not be had are None, for example all of a loss that is NaN.

    Attributes:
        model: The class of the module.
        algorithm: The settings that were judged.
        batch: Which dimension counts samples, and how that is known.
        batch_size: How many there are.
        loss: What the loss is made of.
        levels: Levels with a value: the longest path, in edges, from a value to the output.
        steps_to_reach: Steps of descent on values until an error has come to every node.
        sigma_squared: The largest eigenvalue of the loss's Hessian in the errors.
        lowest: The smallest one, below 0 where the loss is not convex in the errors.
        beta: The nudge at these settings; None for algorithms without one.
        r: ``beta * sigma_squared``.
        regime: What this ``r`` means, in words.
        values: The energy's Hessian in the values, around the feed-forward pass.
        errors: The same in the errors.
        share: By node, the share of its way to equilibrium that its error has gone at these settings; empty for
            algorithms that go all the way, or do not relax.
        agreement: The gradient of these settings against backprop's, all parameters as one vector.
        exact: Whether that is backprop's up to rounding.
        reach: Dead nodes, and those without an error.
        without_gradient: Parameters whose gradient by backprop is missing or exactly zero.
        without_signal: Nodes whose errors at these settings are rounding more than anything else.
        levels_not_reached: Nodes that no error reaches at these settings.
        energy_rise: The largest rise of the energy in one step, over the energy at the start.
        batch_norms: Paths of the modules that normalise by the statistics of the batch, in their mode.
        problems: What keeps these settings from learning, each with its remedy. Kinds: ``"loss"``, ``"batch"``,
            ``"not finite"``, ``"no error"``, ``"not convex"``, ``"dead"``, ``"no gradient"``, ``"levels"``,
            ``"signal"``, ``"step size"`` and ``"refused"``.
        notes: What is good to know.
        advice: What to take, and why.
    """

    model: str
    algorithm: Algorithm
    batch: str
    batch_size: int
    loss: LossScale
    levels: int = 0
    steps_to_reach: int = 0
    sigma_squared: float | None = None
    lowest: float | None = None
    beta: float | None = None
    r: float | None = None
    regime: str = ""
    values: Spectrum | None = None
    errors: Spectrum | None = None
    share: Mapping[str, float] = field(default_factory=dict)
    agreement: Agreement | None = None
    exact: bool | None = None
    reach: Reach = field(default_factory=Reach)
    without_gradient: tuple[str, ...] = ()
    without_signal: tuple[str, ...] = ()
    levels_not_reached: tuple[str, ...] = ()
    energy_rise: float = 0.0
    batch_norms: tuple[str, ...] = ()
    problems: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()
    advice: tuple[Advice, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing keeps these settings from learning on this batch."""
        return not self.problems

    @property
    def value_step(self) -> float | None:
        """A step size for descent on values that no direction overshoots: one over the largest eigenvalue."""
        return _over(1.0, self.values)

    @property
    def stable_value_step(self) -> float | None:
        """The step size from which on descent on values runs away: two over the largest eigenvalue."""
        return _over(2.0, self.values)

    @property
    def error_step(self) -> float | None:
        """As :attr:`value_step`, for descent on errors."""
        return _over(1.0, self.errors)

    @property
    def stable_error_step(self) -> float | None:
        """As :attr:`stable_value_step`, for descent on errors."""
        return _over(2.0, self.errors)

    @property
    def condition(self) -> float | None:
        """Condition number of the energy in the values; at least so much where ``values.is_bound``."""
        return None if self.values is None else self.values.condition

    @property
    def dead(self) -> tuple[str, ...]:
        """Nodes that pass nothing on, for example a ReLU that is zero for every sample."""
        return self.reach.dead

    def of_kind(self, kind: str) -> tuple[Finding, ...]:
        """The problems and notes of one kind, for example ``"step size"``."""
        return tuple(finding for finding in (*self.problems, *self.notes) if finding.kind == kind)

    def to_dataframe(self) -> DataFrame:
        """The problems, then the notes, as a table: ``kind``, ``place``, ``text``, ``remedy`` and ``is_problem``.

        Raises:
            ConfigurationError: if pandas is not installed (``pip install torch2ebm[pandas]``).
        """
        frame = findings_frame((*self.problems, *self.notes))
        return frame.assign(is_problem=[True] * len(self.problems) + [False] * len(self.notes))

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(finding.kind for finding in self.problems)) or "nothing wrong"
        return f"Diagnosis({self.model}, {self.algorithm!r}: {kinds}); print it to see all"

    def _repr_html_(self) -> str:
        return html_text(str(self))

    def __str__(self) -> str:
        head = [f"{self.model} under {self.algorithm!r}", *(f"  {name:15} {text}" for name, text in self._rows())]
        return "\n".join([
            *head,
            *_section("Wrong", self.problems, "nothing"),
            *_section("Good to know", self.notes),
            *_section("Take", self.advice),
        ])  # fmt: skip

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("batch", f"{self.batch_size} samples, {self.batch.removeprefix('batch: ')}"), ("loss", str(self.loss))]
        if self.sigma_squared is not None:
            rows.append(("sigma squared", f"{self.sigma_squared:.4g}, the loss's largest curvature in the errors"))
        if self.regime:
            rows.append(("regime", self.regime))
        if self.values is not None:
            bound = "at least " * self.values.is_bound
            rows.append(("steps of values", _steps(self.values) + f"; condition number {bound}{self.condition:.3g}"))
        if self.errors is not None:
            rows.append(("steps of errors", _steps(self.errors)))
        if self.levels:
            reach = f"{self.levels}; descent on values takes at least {self.steps_to_reach} steps to reach all nodes"
            rows.append(("levels", reach))
        if self.share:
            least = min(self.share, key=lambda name: self.share[name])
            middle = sorted(self.share.values())[len(self.share) // 2]
            text = f"{_percent(self.share[least])} in node '{least}', {_percent(middle)} in the median"
            rows.append(("of the way", text))
        if self.agreement is not None:
            a = self.agreement
            text = "backprop's" if self.exact else f"{a.angle:.3g} degrees from backprop's, {a.norm_ratio:.3g} its norm"
            rows.append(("gradient", text))
        if self.batch_norms:
            rows.append(("batch norm", listed(self.batch_norms, 4)))
        return rows


def _over(number: float, spectrum: Spectrum | None) -> float | None:
    return None if spectrum is None or spectrum.largest <= 0 else number / spectrum.largest


def _steps(spectrum: Spectrum) -> str:
    if spectrum.largest <= 0:
        return "no value can move"
    return f"lr at most {1 / spectrum.largest:.3g}; from {2 / spectrum.largest:.3g} on the energy rises"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _section(title: str, entries: tuple[object, ...], empty: str = "") -> list[str]:
    if not entries and not empty:
        return []
    return [f"{title}:", *(f"  {entry}" for entry in entries or (empty,))]


def regime_of(r: float | None, beta: float | None, exact: bool | None) -> str:
    """What a nudge in units of the curvature means."""
    if beta is None:
        return "no nudge of the values: " + ("the gradient is backprop's" if exact else "not in these units")
    if r is None or not math.isfinite(r):
        return ""
    if r < WEAK * (1 - 1e-6):
        said = "infinitesimal: at equilibrium the errors of a sample are nearly backprop's"
    elif r <= STRONG:
        said = "predictive: the energy of the values has a say in the errors"
    else:
        said = "clamped: the output is all but held at what the loss wants"
    return f"r = beta * sigma^2 = {r:.3g} (beta {beta:.3g}), {said}"
