"""A logarithmic axis on which zero is zero, and infinity infinite: each in a strip of its own behind a break."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Numbers = npt.NDArray[np.float64]

GAP: Final = 0.05  # of the height of the decades
STRIP: Final = 0.12
MARGIN: Final = 0.08  # on both ends of the decades, for points that lie there
MOST_DECADES: Final = 7  # with a label
SMALLEST, LARGEST = -250.0, 200.0  # exponents of ten, which leave place for a strip in the range of float64
STROKE: Final = [(-5, -3), (5, 3)]  # of a break


@dataclass(frozen=True)
class BrokenLog:
    """From numbers to heights: the logarithm of those in between, and two strips for zero and infinity.

    Attributes:
        lowest: Exponent of ten at which the decades begin, below the smallest number.
        highest: Exponent of ten at which they end; ``lowest`` where no number is finite and above zero.
        zero: Whether there is a strip for zero, below.
        infinite: Whether there is one for infinity, above.
    """

    lowest: float
    highest: float
    zero: bool
    infinite: bool

    @property
    def gap(self) -> float:
        """Height of a break."""
        return GAP * max(1.0, self.highest - self.lowest)

    @property
    def strip(self) -> float:
        """Height of a strip."""
        return STRIP * max(1.0, self.highest - self.lowest)

    @property
    def bottom(self) -> float:
        """The number at the lower end of the axis: it is below zero, to have zero inside of its strip."""
        return -self.strip / 2 if self.zero else 10.0**self.lowest

    @property
    def top(self) -> float:
        """The number at the upper end of the axis."""
        return float(10.0 ** (self.highest + (self.gap + self.strip) * self.infinite))

    @property
    def breaks(self) -> list[tuple[float, float]]:
        """The numbers at the lower and upper end of each break."""
        if self.lowest == self.highest:
            return [(10.0 ** (self.lowest - self.gap), 10.0 ** (self.highest + self.gap))]
        below = [(10.0 ** (self.lowest - self.gap), 10.0**self.lowest)] * self.zero
        return below + [(10.0**self.highest, 10.0 ** (self.highest + self.gap))] * self.infinite

    def height(self, numbers: npt.ArrayLike) -> Numbers:
        """Of each number. It grows with the number; NaN has none."""
        given = np.asarray(numbers, dtype=np.float64)
        floor = self.lowest - self.gap
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.maximum(np.log10(np.where(given > 0, given, 1.0)), floor)
        found = np.where(given > 0, found, floor - self.strip / 2 + given)  # which is 0 or a limit just below it
        return np.where(np.isposinf(given), self.highest + self.gap + self.strip / 2, found)

    def number(self, heights: npt.ArrayLike) -> Numbers:
        """The number at each height: the inverse of :meth:`height`, and zero or infinity all over their strips."""
        given = np.asarray(heights, dtype=np.float64)
        floor, ceiling = self.lowest - self.gap, self.highest + self.gap
        between = 10.0 ** np.clip(given, floor, ceiling)
        below = np.minimum(given - (floor - self.strip / 2), 0.0)
        return np.where(given < floor, below, np.where(given > ceiling, math.inf, between))


def scale_errors(axes: Axes, numbers: Iterable[float]) -> None:
    """Make the y-axis of what has been drawn logarithmic, with a break before zero and infinity where these occur.

    Args:
        axes: Nothing outside of it is touched, and no further axes are made.
        numbers: All that is drawn, none below zero; NaN counts for nothing.
    """
    seen = list(numbers)
    decades = [math.log10(number) for number in seen if 0 < number < math.inf]
    zero, infinite = 0.0 in seen, math.inf in seen
    if not zero and not infinite:
        axes.set_yscale("log")
        return
    if not decades and not infinite:
        axes.set_ylim(-1.0, 1.0)
        axes.set_yticks([0.0], ["0"])
        return
    scale = _scale_of(decades, zero, infinite)
    axes.set_yscale("function", functions=(scale.height, scale.number))
    _name_ticks(axes, scale)
    _break(axes, scale)
    axes.set_ylim(scale.bottom, scale.top)  # the last: ticks stretch an axis


def _scale_of(decades: Sequence[float], zero: bool, infinite: bool) -> BrokenLog:
    if not decades:
        return BrokenLog(0.0, 0.0, True, True)
    first, last = math.floor(min(decades)), math.ceil(max(decades))
    last = max(last, first + 1)
    margin = MARGIN * (last - first)
    return BrokenLog(max(SMALLEST, first - margin), min(LARGEST, last + margin), zero, infinite)


def _name_ticks(axes: Axes, scale: BrokenLog) -> None:
    first, last = math.ceil(scale.lowest), math.floor(scale.highest)
    exponents = range(first, last + 1, math.ceil((last - first + 1) / MOST_DECADES))
    if scale.lowest == scale.highest:
        exponents = range(0)
    places = [0.0] * scale.zero + [10.0**exponent for exponent in exponents] + [math.inf] * scale.infinite
    names = ["0"] * scale.zero + [f"$10^{{{e}}}$" for e in exponents] + [r"$\infty$"] * scale.infinite
    axes.set_yticks(places, names)


def _break(axes: Axes, scale: BrokenLog) -> None:
    """Lines end at a break, as do the spines on both sides, and there are slanted strokes."""
    across = axes.get_yaxis_transform()  # x from 0 to 1
    ends = [scale.bottom, *(end for each in scale.breaks for end in each), scale.top]
    sides = [(x, axes.spines[side]) for x, side in ((0.0, "left"), (1.0, "right")) if axes.spines[side].get_visible()]
    for lower, upper in scale.breaks:
        axes.axhspan(lower, upper, facecolor=_paper(axes), linewidth=0, zorder=2.4, label="_break")
        for x in [x for x, _ in sides] or [0.0]:
            axes.scatter(
                [x, x], [lower, upper], s=50, marker=STROKE, transform=across, clip_on=False, zorder=2.6,
                color=axes.yaxis.label.get_color(), linewidths=1.0,  # spines may have the colour of the paper
            )  # fmt: skip
    parts = list(zip(ends[0::2], ends[1::2], strict=True))
    decades = parts.pop(int(scale.zero))
    for x, spine in sides:
        spine.set_bounds(*decades)
        for lower, upper in parts:
            axes.vlines(
                x, lower, upper, transform=across, clip_on=False, zorder=2.5, color=spine.get_edgecolor(),
                linewidth=spine.get_linewidth(),
            )  # fmt: skip


def _paper(axes: Axes) -> Any:
    """The colour of the figure, which shows where the axis is broken."""
    colour: Any = axes.figure.get_facecolor()
    return colour if colour[3] > 0 else axes.get_facecolor()
