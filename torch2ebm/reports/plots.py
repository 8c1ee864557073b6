"""Pictures of gradients and energies. Each function writes one file, in the format of its suffix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from torch2ebm.engine.results import InferenceState, Relaxation
from torch2ebm.errors import ConfigurationError
from torch2ebm.reports.agreement import Agreement
from torch2ebm.reports.figures import MARKERS, PALETTE, new_figure, require, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MOST_LABELS: Final = 32
ROUNDING: Final = 1e-16  # of float64
NO_ERROR: Final = "#D9D9D9"
DECADES: Final = 12  # that the colours of the error map span at most


class Compared(Protocol):
    """What is drawn of a :class:`torch2ebm.GradientComparison`."""

    @property
    def algorithms(self) -> tuple[str, ...]: ...

    @property
    def parameters(self) -> tuple[str, ...]: ...

    @property
    def steps(self) -> tuple[int, ...]: ...

    @property
    def agreement(self) -> Mapping[str, Mapping[str, Agreement]]: ...

    @property
    def along(self) -> Mapping[str, Mapping[int, Mapping[str, Agreement]]]: ...


def plot_comparison(comparison: Compared, path: str) -> None:
    """Angle to autograd's gradient and relative error per parameter, and along the inference steps if looked at.

    Raises:
        ConfigurationError: if matplotlib is not installed.
    """
    columns = 2 if comparison.along else 1
    width = max(6.5, min(11.0, 2.5 + 0.3 * len(comparison.parameters)))
    height = 4.2 + 0.07 * max(map(len, comparison.parameters), default=0)  # the names stand upright
    figure = new_figure(width + 4.0 * (columns - 1), height)
    panels = figure.subplots(2, columns, sharex="col", squeeze=False, width_ratios=[1.6, 1.0][:columns])
    _angles(panels[0, 0], range(len(comparison.parameters)), _per_parameter(comparison, lambda a: a.angle))
    _errors(panels[1, 0], range(len(comparison.parameters)), _per_parameter(comparison, lambda a: a.relative_error))
    panels[0, 0].set_ylabel("angle to\nbackprop [degrees]")
    panels[1, 0].set_ylabel("relative error")
    _name_ticks(panels[1, 0].xaxis, comparison.parameters, rotation=90)
    panels[1, 0].set_xlabel("parameter, from input to output")
    if comparison.along:
        _angles(panels[0, 1], comparison.steps, _per_step(comparison, lambda a: a.angle))
        _errors(panels[1, 1], comparison.steps, _per_step(comparison, lambda a: a.relative_error))
        panels[0, 1].set_ylabel("mean angle [degrees]")
        panels[1, 1].set_ylabel("mean relative error")
        panels[1, 1].set_xlabel("inference steps")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save(figure, path)


def plot_energy(curves: Mapping[str, Sequence[float]], path: str) -> None:
    """Energy against inference step, one line a name; logarithmic where the energies span a decade or more.

    Raises:
        ConfigurationError: if matplotlib is not installed, or there is no energy to draw.
    """
    energies = [energy for curve in curves.values() for energy in curve]
    if not energies:
        raise _nothing("plot_energy")
    figure = new_figure(6.5, 3.6)
    axes = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        _line(axes, i, name, range(len(curve)), curve)
    if min(energies) > 0 and max(energies) >= 10 * min(energies):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(require("matplotlib.ticker", "plot").MaxNLocator(integer=True))
    axes.set_xlabel("inference step")
    axes.set_ylabel("energy, summed over the batch")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def plot_error_map(state: InferenceState | Relaxation, path: str) -> None:
    """Energy of the errors of every node at every inference step: how the error travels from the output inwards.

    An energy of exactly zero (no error has arrived yet) is grey, what is far below the largest has the darkest colour.

    Raises:
        ConfigurationError: if matplotlib is not installed, or the algorithm has no history of energies.
    """
    relaxation = state.relaxation if isinstance(state, InferenceState) else state
    energies = relaxation.node_energy
    largest = max((energy for curve in energies.values() for energy in curve), default=0.0)
    if largest <= 0.0:
        raise _nothing("plot_error_map")
    figure = new_figure(7.0, max(2.6, min(12.0, 1.2 + 0.26 * len(energies))))
    axes = figure.subplots()
    image = axes.imshow(
        [[energy if energy > 0.0 else math.nan for energy in curve] for curve in energies.values()],
        aspect="auto", interpolation="nearest", cmap=_colours(), norm=_logarithmic(energies, largest),
    )  # fmt: skip
    _name_ticks(axes.yaxis, list(energies), rotation=0)
    axes.xaxis.set_major_locator(require("matplotlib.ticker", "plot").MaxNLocator(integer=True))
    axes.set_xlabel("inference step")
    axes.set_ylabel("node, from input to output")
    figure.colorbar(image, label="energy of the error")
    patch = require("matplotlib.patches", "plot").Patch
    unreached = patch(facecolor=NO_ERROR, edgecolor="#666666", label="no error: exactly 0")
    figure.legend(handles=[unreached], loc="outside upper left", frameon=False)
    save(figure, path)


def _per_parameter(comparison: Compared, measure: Callable[[Agreement], float]) -> dict[str, list[float]]:
    return {
        name: [measure(comparison.agreement[name][parameter]) for parameter in comparison.parameters]
        for name in comparison.algorithms
    }


def _per_step(comparison: Compared, measure: Callable[[Agreement], float]) -> dict[str, list[float]]:
    """Means over the parameters."""
    return {
        name: [_mean([measure(a) for a in comparison.along[name][step].values()]) for step in comparison.steps]
        for name in comparison.algorithms
    }


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan


def _angles(axes: Axes, x: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
    for i, (name, curve) in enumerate(curves.items()):
        _line(axes, i, name, x, curve)
    top = 1.08 * max((angle for curve in curves.values() for angle in curve if math.isfinite(angle)), default=0.0)
    axes.set_ylim(-0.05 * max(top, 1.0), max(top, 1.0))  # a line at 0 is inside, and rounding is not blown up
    axes.grid(alpha=0.3)


def _errors(axes: Axes, x: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
    """A logarithmic panel; errors of exactly zero lie in a grey band of their own below all others."""
    errors = [error for curve in curves.values() for error in curve]
    zero = min((error for error in errors if error > 0.0), default=ROUNDING) / 100
    for i, (name, curve) in enumerate(curves.items()):
        _line(axes, i, name, x, [max(error, zero) for error in curve])
    axes.set_yscale("log")
    if 0.0 in errors:
        axes.set_ylim(bottom=zero / 4)
        axes.axhspan(zero / 4, zero * 4, color=NO_ERROR, alpha=0.6, zorder=0)
        axes.text(0.5, zero * 5, "exactly 0", transform=axes.get_yaxis_transform(), ha="center", fontsize=8)
    axes.grid(alpha=0.3)


def _line(axes: Axes, i: int, name: str, x: Sequence[int], y: Sequence[float]) -> None:
    colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
    size = max(8.0 - 1.5 * i, 4.0)  # the later the smaller: lines that coincide are all seen
    axes.plot(x, y, label=name, color=colour, marker=marker, markersize=size, linewidth=1.5, alpha=0.9)


def _name_ticks(axis: Any, names: Sequence[str], rotation: int) -> None:
    """One label a name, or evenly spaced ones where there are too many to read."""
    every = math.ceil(len(names) / MOST_LABELS)
    axis.set_ticks(range(0, len(names), every), names[::every], rotation=rotation, fontsize=8)


def _colours() -> Any:
    return require("matplotlib", "plot").colormaps["viridis"].with_extremes(bad=NO_ERROR)


def _logarithmic(energies: Mapping[str, Sequence[float]], largest: float) -> Any:
    positive = [energy for curve in energies.values() for energy in curve if energy > 0.0]
    least = max(min(positive), largest * 10.0**-DECADES)
    if least == largest:
        least = largest / 10
    return require("matplotlib.colors", "plot").LogNorm(least, largest, clip=True)


def _nothing(function: str) -> ConfigurationError:
    return ConfigurationError(
        f"torch2ebm.plots.{function}", "no energies above zero", "the report of a relaxation",
        "Use an algorithm that relaxes values, such as torch2ebm.PredictiveCoding, and a loss that is not zero.",
    )  # fmt: skip
