"""Figures that no global registry knows of, the axes that people give, and how both look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch2ebm.common.checks import require as require  # for pictures
from torch2ebm.errors import ConfigurationError
from torch2ebm.reports.paths import file_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colours, which people with any colour vision can tell apart
PALETTE: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLES: Final = {  # kind of a box -> fill, edge, line width
    "input": ("#EEEEEE", "#666666", 1.0),
    "node": ("#DCEBF5", PALETTE[0], 1.2),
    "module": ("#E3F1EA", PALETTE[2], 1.2),
    "output": ("#FBE3D0", PALETTE[1], 2.2),
}
MOST_PIXELS: Final = 60_000  # Agg refuses 2 ** 16 a side


def new_figure(width: float, height: float) -> Figure:
    """A figure of that many inches that no global registry knows of, and that a notebook shows."""
    figure: Figure = require("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")
    # pyplot teaches notebooks to show figures; without it, they ask the object itself
    vars(figure)["_repr_png_"] = partial(_png, figure)
    return figure


def _png(figure: Figure) -> bytes:
    written = BytesIO()
    figure.savefig(written, format="png", dpi=_dots(figure))
    return written.getvalue()


def _dots(figure: Figure) -> float:
    """An inch."""
    return min(150.0, MOST_PIXELS / float(max(figure.get_size_inches())))


def finished(figure: Figure, file: Path | None) -> Figure:
    """The figure, which is written to a file first where there is one."""
    if file is not None:
        save(figure, file)
    return figure


def save(figure: Figure, file: Path) -> None:
    """Write the file, in the format of its suffix: one of :func:`formats`."""
    figure.savefig(file, dpi=_dots(figure))


def picture_file(where: str, path: object) -> Path | None:
    """The file to write, None where there is no path. It is looked at before anything is drawn.

    Raises:
        ConfigurationError: for what is no path of a file, or for a suffix that is no format of matplotlib.
    """
    if path is None:
        return None
    file, known = file_of(where, path, "angles.png"), formats()
    if file.suffix[1:].lower() not in known:
        raise ConfigurationError(
            f"{where}(path=...)", repr(str(file)), f"a file ending in one of {', '.join(known)}", "Try .png."
        )
    return file


def formats() -> Mapping[str, str]:
    """The formats that matplotlib writes, by suffix."""
    found: Mapping[str, str] = require("matplotlib.backend_bases", "plot").FigureCanvasBase.get_supported_filetypes()
    return found


def given_axes(where: str, ax: object, counts: tuple[int, ...], what: str) -> list[Axes]:
    """The axes that somebody wants a picture drawn into, in their order.

    Args:
        where: The function that was called, for the error.
        ax: Axes; or an array, a mapping or any iterable of them.
        counts: How many there may be.
        what: What is drawn in them, in words.

    Raises:
        ConfigurationError: for another number, for what is no axes, or for the same axes twice.
    """
    kind = require("matplotlib.axes", "plot").Axes
    found: list[Any] = list(_flat(ax))
    strangers = [each for each in found if not isinstance(each, kind)]
    legal = not strangers and len(found) in counts and len({id(each) for each in found}) == len(found)
    if not legal:
        got = f"{strangers[0]!r:.60}, which is no axes" if strangers else f"{len(found)} axes, {_distinct(found)}"
        raise ConfigurationError(
            f"{where}(ax=...)", got, what, "For example those of matplotlib.pyplot.subplots, each given once."
        )
    return found


def _distinct(found: list[Any]) -> str:
    count = len({id(each) for each in found})
    return "all different" if count == len(found) else f"{count} different"


def _flat(ax: Any) -> Iterator[object]:
    if hasattr(ax, "ravel"):  # what subplots returns
        yield from ax.ravel()
    elif isinstance(ax, Mapping):  # what subplot_mosaic returns
        yield from _flat(ax.values())
    elif isinstance(ax, Iterable) and not isinstance(ax, (str, bytes, Set)):  # a set has no order
        for each in ax:
            yield from _flat(each)
    else:
        yield ax


def check_unshared(where: str, columns: Sequence[Sequence[Axes]]) -> None:
    """Refuse axes whose limits, scale and ticks would change others', or one another's.

    Args:
        where: The function that was called, for the error.
        columns: The axes to draw into, by column. Those of a column may have one x-axis; no two may have one y-axis.

    Raises:
        ConfigurationError: for the first that are shared otherwise.
    """
    for column in columns:
        for axes in column:
            for name, siblings, own in (
                ("x", axes.get_shared_x_axes().get_siblings(axes), column),
                ("y", axes.get_shared_y_axes().get_siblings(axes), [axes]),
            ):
                if any(all(each is not one for one in own) for each in siblings):
                    raise ConfigurationError(
                        f"{where}(ax=...)",
                        f"axes that share their {name}-axis with others",
                        "axes of which others get no limits, scale and ticks",
                        "Make them without sharex and sharey; sharex='col' is right for a column that is given whole.",
                    )


def figure_of(axes: Axes) -> Figure:
    """The whole figure, also of axes in a part of it."""
    figure: Any = axes.figure
    found: Figure = figure.figure
    return found
