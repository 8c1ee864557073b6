"""The picture of an energy graph that ``model.draw`` gives: by Graphviz where it is installed, else by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Final

from torch2ebm.errors import ConfigurationError
from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.reports.dot import dot_text, has_dot, rendered
from torch2ebm.reports.drawing import layered_figure
from torch2ebm.reports.figures import formats, save
from torch2ebm.reports.outline import Outline, check_depth, outline_of
from torch2ebm.reports.paths import file_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT: Final = ("dot", "gv")  # suffixes of the text itself
COMMON: Final = ("svg", "png", "pdf", "jpg", "jpeg", "gif", "webp", "eps", "ps", "svgz", "tif", "tiff", "json")


@dataclass(frozen=True)
class GraphPicture:
    """The picture of an energy graph. A notebook shows it.

    Attributes:
        outline: What is in it.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> picture = torch2ebm.convert(net, example_inputs=torch.randn(5, 4)).draw()
        >>> '"2\\\\nLinear\\\\n(5, 3)"' in picture.dot
        True
    """

    outline: Outline

    @property
    def dot(self) -> str:
        """The text that Graphviz reads; it needs nothing that is installed."""
        return dot_text(self.outline)

    def __repr__(self) -> str:
        return f"GraphPicture({self.outline.title}, {len(self.outline.boxes)} boxes)"

    def _repr_svg_(self) -> str:
        picture = rendered(self.dot, "svg")
        if picture is not None:
            return picture.decode()
        written = BytesIO()
        _figure("model.draw()", self.outline).savefig(written, format="svg")
        return written.getvalue().decode()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a picture file in the format of its suffix: one of Graphviz, or one of matplotlib where it is missing.

        ``.dot`` writes the text, and needs neither.

        Raises:
            ConfigurationError: for another suffix, where neither is installed, or for what is no path of a file.
        """
        file = file_of("model.draw", path, "graph.svg")
        suffix, place = file.suffix[1:].lower(), f"model.draw({os.fspath(path)!r})"
        if suffix in TEXT:
            file.write_text(self.dot, encoding="utf-8")
            return
        picture = rendered(self.dot, suffix)
        if picture is not None:
            file.write_bytes(picture)
            return
        if suffix not in (known := _formats()):
            remedy = "Try .svg." if has_dot() else "Try .svg, or install Graphviz, which has more formats."
            raise ConfigurationError(place, f"the suffix {suffix!r}", f"one of {', '.join((*TEXT, *known))}", remedy)
        save(_figure(place, self.outline), file)


def _formats() -> tuple[str, ...]:
    """Those of matplotlib; where it is missing, the common ones of both programs."""
    try:
        return tuple(formats())
    except ConfigurationError:
        return COMMON


def _figure(place: str, outline: Outline) -> Figure:
    make: Callable[[Outline], Figure] = layered_figure
    try:
        return make(outline)
    except ConfigurationError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        got = "a program dot that fails or takes too long, and no" if has_dot() else "neither the program dot nor"
        raise ConfigurationError(
            place,
            f"{got} matplotlib",
            "one of them, to draw",
            "Install Graphviz, or run pip install torch2ebm[plot].",
        ) from error


def draw_graph(
    graph: EnergyGraph, path: str | os.PathLike[str] | None = None, depth: int | None = None
) -> GraphPicture:
    """The picture, which is written where there is a path; see :meth:`EnergyModel.draw`."""
    check_depth("model.draw", depth)
    picture = GraphPicture(outline_of(graph, depth))
    if path is not None:
        picture.save(path)
    return picture
