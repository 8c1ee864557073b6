"""Pictures of gradients and energies: figures, which notebooks show and which can be written to files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from torch2ebm.engine.results import InferenceState, Relaxation
from torch2ebm.errors import ConfigurationError
from torch2ebm.reports.agreement import Agreement
from torch2ebm.reports.broken_axis import scale_errors
from torch2ebm.reports.curves import curves_of, name_lines
from torch2ebm.reports.figures import (
    MARKERS,
    PALETTE,
    check_unshared,
    figure_of,
    finished,
    given_axes,
    new_figure,
    picture_file,
    require,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Path = str | os.PathLike[str] | None

MOST_LABELS: Final = 32
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


def plot_comparison(comparison: Compared, path: Path = None, *, ax: Any = None) -> Figure:
    """Angle to autograd's gradient and relative error per parameter, and along the inference steps if looked at.

    Parameters are categories, and have no lines between them. The axis of the errors is logarithmic; an error of
    exactly zero lies below a break, an infinite one above a break.

    Args:
        comparison: What is drawn.
        path: Picture file, in the format of its suffix; None writes none.
        ax: Axes of yours to draw into: a pair, for the angle and for the relative error. With ``steps``, also four, in
            the order of ``subplots(2, 2)``: angle, angle along the steps, error, error along the steps. Their limits,
            scale, ticks, labels and legend are set anew, and nothing outside of them is touched. Hence none may share
            an axis with others, but for the x-axis of a column.

    Returns:
        The figure, which a notebook shows.

    Raises:
        ConfigurationError: if matplotlib is not installed, for what is no path of a picture, for another
            number of axes, or for axes that are shared with others.
    """
    file = picture_file("plot", path)
    if ax is None:
        figure, panels = _panels(comparison)
    else:
        what = "a pair of axes, for the angle and the relative error" + ", or four of them" * bool(comparison.along)
        given = given_axes("plot", ax, (2, 4) if comparison.along else (2,), what)
        figure, panels = figure_of(given[0]), [given] if len(given) == 2 else [given[0::2], given[1::2]]
        check_unshared("plot", panels)
    _draw_per_parameter(panels[0], comparison)
    if len(panels) > 1:
        _draw_along(panels[1], comparison)
    lines = panels[0][0].get_lines()[-len(comparison.algorithms) :]
    if ax is None:
        name_lines(figure, panels[0][0], lines, loc="outside upper center", ncols=3)
    else:
        name_lines(panels[0][0], panels[0][0], lines, fontsize=8)
    return finished(figure, file)


def plot_energy(curves: Mapping[str, Sequence[float]], path: Path = None, *, ax: Any = None) -> Figure:
    """Energy against inference step, one line a name; logarithmic where the energies span a decade or more.

    What is infinite or no number is left out of its line.

    Args:
        curves: Name to energies, for example ``{"PredictiveCoding": model.state.relaxation.energy}``.
        path: Picture file, in the format of its suffix; None writes none.
        ax: Axes of yours to draw into. Their ticks, labels and legend are set anew. Nothing outside of them is touched,
            but for axes that share theirs: these get the same limits, scale and ticks.

    Returns:
        The figure, which a notebook shows.

    Raises:
        ConfigurationError: if matplotlib is not installed, for what is no mapping to numbers, where there is no energy
            to draw, for what is no path of a picture, or if ``ax`` is no axes.

    Example:
        >>> import importlib.util
        >>> from torch2ebm.reports.plots import plot_energy
        >>> if importlib.util.find_spec("matplotlib") is not None:
        ...     figure = plot_energy({"PredictiveCoding": (4.0, 2.5, 2.1)})
    """
    file = picture_file("plot_energy", path)
    drawn = curves_of("plot_energy(curves=...)", curves)
    energies = [energy for curve in drawn.values() for energy in curve if math.isfinite(energy)]
    if not energies:
        raise _no_energy(curves)
    figure, axes = _panel("plot_energy", ax, 6.5, 3.6)
    for i, (name, curve) in enumerate(drawn.items()):
        _line(axes, i, name, range(len(curve)), curve)
    if min(energies) > 0 and max(energies) >= 10 * min(energies):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(require("matplotlib.ticker", "plot").MaxNLocator(integer=True))
    axes.set_xlabel("inference step")
    axes.set_ylabel("energy, summed over the batch")
    axes.grid(alpha=0.3)
    name_lines(axes, axes, axes.get_lines()[-len(drawn) :])
    return finished(figure, file)


def plot_error_map(state: InferenceState | Relaxation, path: Path = None, *, ax: Any = None) -> Figure:
    """Energy of the errors of every node at every inference step: how the error travels from the output inwards.

    An energy of exactly zero (no error has arrived yet) is grey, what is far below the largest has the darkest colour.
    An infinite energy has the brightest one and a mark, what is no number has a mark on grey.

    Args:
        state: ``model.state``, or its relaxation.
        path: Picture file, in the format of its suffix; None writes none.
        ax: Axes of yours to draw into, which share no axis with others. Their limits, ticks, labels and legend are set
            anew, and the bar of colours takes a part of their place.

    Returns:
        The figure, which a notebook shows.

    Raises:
        ConfigurationError: if matplotlib is not installed, for what is neither, if the algorithm has no history of
            energies, for what is no path of a picture, or if ``ax`` is no axes.
    """
    file = picture_file("plot_error_map", path)
    energies = _energies_of(state)
    largest = max((e for curve in energies.values() for e in curve if math.isfinite(e)), default=0.0)
    if not largest > 0.0:
        raise _nothing_to_map()
    figure, axes = _panel("plot_error_map", ax, 7.0, max(2.6, min(12.0, 1.2 + 0.26 * len(energies))))
    check_unshared("plot_error_map", [[axes]])
    image = axes.imshow(
        [[min(energy, largest) if energy > 0.0 else math.nan for energy in curve] for curve in energies.values()],
        aspect="auto", interpolation="nearest", cmap=_colours(), norm=_logarithmic(energies, largest),
    )  # fmt: skip
    _name_ticks(axes.yaxis, list(energies), rotation=0)
    axes.xaxis.set_major_locator(require("matplotlib.ticker", "plot").MaxNLocator(integer=True))
    axes.set_xlabel("inference step")
    axes.set_ylabel("node, from input to output")
    holder: Any = axes.figure  # a part of a figure has bars of colours, too
    holder.colorbar(image, ax=axes, label="energy of the error")
    patch = require("matplotlib.patches", "plot").Patch
    below = any(energy < 0.0 for curve in energies.values() for energy in curve)
    grey = patch(facecolor=NO_ERROR, edgecolor="#666666", label="0 or below" if below else "no error: exactly 0")
    handles = [grey, *_marks(axes, energies)]
    if ax is None:
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
    else:
        axes.legend(handles=handles, loc="upper left", fontsize=8)  # where errors come last, as a rule
    return finished(figure, file)


def _panel(function: str, ax: Any, width: float, height: float) -> tuple[Figure, Axes]:
    """One panel: of a new figure, or the axes that were given."""
    if ax is None:
        figure = new_figure(width, height)
        return figure, figure.subplots()
    (axes,) = given_axes(function, ax, (1,), "one axes of matplotlib")
    return figure_of(axes), axes


def _panels(comparison: Compared) -> tuple[Figure, list[list[Axes]]]:
    """A new figure, and its columns: each has the angle above the relative error."""
    columns = 2 if comparison.along else 1
    width = max(6.5, min(11.0, 2.5 + 0.3 * len(comparison.parameters)))
    height = 4.2 + 0.07 * max(map(len, comparison.parameters), default=0)  # the names stand upright
    figure = new_figure(width + 4.0 * (columns - 1), height)
    panels = figure.subplots(2, columns, sharex="col", squeeze=False, width_ratios=[1.6, 1.0][:columns])
    return figure, [list(panels[:, column]) for column in range(columns)]


def _draw_per_parameter(panels: Sequence[Axes], comparison: Compared) -> None:
    places = range(len(comparison.parameters))
    _angles(panels[0], places, _per_parameter(comparison, lambda a: a.angle), joined=False)
    _errors(panels[1], places, _per_parameter(comparison, lambda a: a.relative_error), joined=False)
    panels[0].set_ylabel("angle to\nbackprop [degrees]")
    panels[1].set_ylabel("relative error")
    for axes in panels:
        _name_ticks(axes.xaxis, comparison.parameters, rotation=90)
    panels[1].set_xlabel("parameter, from input to output")


def _draw_along(panels: Sequence[Axes], comparison: Compared) -> None:
    _angles(panels[0], comparison.steps, _per_step(comparison, lambda a: a.angle), joined=True)
    _errors(panels[1], comparison.steps, _per_step(comparison, lambda a: a.relative_error), joined=True)
    panels[0].set_ylabel("mean angle [degrees]")
    panels[1].set_ylabel("mean relative error")
    panels[1].set_xlabel("inference steps")


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


def _angles(axes: Axes, x: Sequence[int], curves: Mapping[str, Sequence[float]], joined: bool) -> None:
    for i, (name, curve) in enumerate(curves.items()):
        _line(axes, i, name, x, curve, joined)
    top = 1.08 * max((angle for curve in curves.values() for angle in curve if math.isfinite(angle)), default=0.0)
    axes.set_ylim(-0.05 * max(top, 1.0), max(top, 1.0))  # a line at 0 is inside, and rounding is not blown up
    axes.grid(alpha=0.3)


def _errors(axes: Axes, x: Sequence[int], curves: Mapping[str, Sequence[float]], joined: bool) -> None:
    for i, (name, curve) in enumerate(curves.items()):
        _line(axes, i, name, x, curve, joined)
    errors = [error for curve in curves.values() for error in curve]
    scale_errors(axes, errors)
    if missing := sum(map(math.isnan, errors)):
        text = f"not a number (NaN): {missing} of {len(errors)}"
        paper = {"facecolor": axes.get_facecolor(), "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
        axes.text(0.98, 0.95, text, transform=axes.transAxes, ha="right", va="top", fontsize=8, bbox=paper)
    axes.grid(alpha=0.3)


def _line(axes: Axes, i: int, name: str, x: Sequence[int], y: Sequence[float], joined: bool = True) -> None:
    """Points, joined by lines where their order along x means something."""
    colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
    size = max(8.0 - 1.5 * i, 4.0)  # the later the smaller: points that coincide are all seen
    style = "-" if joined else "none"
    axes.plot(
        x, y, label=name, color=colour, marker=marker, markersize=size, linestyle=style, linewidth=1.5, alpha=0.9,
    )  # fmt: skip


def _name_ticks(axis: Any, names: Sequence[str], rotation: int) -> None:
    """One label a name, or evenly spaced ones where there are too many to read."""
    every = max(1, math.ceil(len(names) / MOST_LABELS))
    axis.set_ticks(range(0, len(names), every), names[::every], rotation=rotation, fontsize=8, parse_math=False)


def _colours() -> Any:
    return require("matplotlib", "plot").colormaps["viridis"].with_extremes(bad=NO_ERROR)


def _logarithmic(energies: Mapping[str, Sequence[float]], largest: float) -> Any:
    positive = [energy for curve in energies.values() for energy in curve if energy > 0.0]
    least = max(min(positive), largest * 10.0**-DECADES)
    if least == largest:
        least = largest / 10
    return require("matplotlib.colors", "plot").LogNorm(least, largest, clip=True)


def _energies_of(state: object) -> dict[str, list[float]]:
    where = "plot_error_map(state=...)"
    relaxation = state.relaxation if isinstance(state, InferenceState) else state
    if not isinstance(relaxation, Relaxation):
        raise ConfigurationError(
            where, f"{relaxation!r:.80}", "model.state, or its relaxation", "Run a backward, then pass model.state."
        )
    energies = curves_of(where, relaxation.node_energy)
    if len(lengths := sorted({len(curve) for curve in energies.values()})) > 1:
        raise ConfigurationError(
            where, f"curves of {lengths[0]} and of {lengths[-1]} steps", "as many energies of each node", "Cut them."
        )
    return energies


def _marks(axes: Axes, energies: Mapping[str, Sequence[float]]) -> list[Any]:
    """Points over what is infinite, and what is no number; those that there are."""
    kinds: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
        ("infinite", "^", math.isinf),
        ("not a number (NaN)", "x", math.isnan),
    )
    found = []
    for name, marker, is_kind in kinds:
        rows = enumerate(energies.values())
        places = [(step, row) for row, curve in rows for step, energy in enumerate(curve) if is_kind(energy)]
        if places:
            steps, nodes = zip(*places, strict=True)
            found.append(axes.scatter(steps, nodes, marker=marker, color="#000000", s=20, label=name))
    return found


def _no_energy(curves: Mapping[str, object]) -> ConfigurationError:
    got = f"no finite energy in {', '.join(map(str, curves))}" if curves else "no curves"
    return ConfigurationError(
        "plot_energy(curves=...)", got, "at least one curve with a finite energy",
        "For example that of an algorithm that relaxes values: "
        '{"PredictiveCoding": model.state.relaxation.energy}.',
    )  # fmt: skip


def _nothing_to_map() -> ConfigurationError:
    return ConfigurationError(
        "plot_error_map(state=...)", "no finite energies above zero", "the report of a relaxation",
        "Use an algorithm that relaxes values, such as torch2ebm.PredictiveCoding, and a loss that is not zero.",
    )  # fmt: skip
