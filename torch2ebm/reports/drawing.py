"""A picture of an energy graph by matplotlib: one row a level, the inputs on top, the outputs in the last row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Final

from torch2ebm.common.text import abridged
from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.reports.figures import PALETTE, STYLES, new_figure, require
from torch2ebm.reports.outline import Outline, note, outline_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# inches
ROW: Final = 0.92
BOX_HEIGHT: Final = 0.6
LANE: Final = 0.14  # half the width of a line that passes by
SPACE: Final = 0.15  # between neighbours of a row
CHARACTER: Final = 0.075  # of the 8 point text
MARGIN: Final = 0.2
NOTE_HEIGHT: Final = 0.2
LEVEL_LABEL: Final = 0.75
NAME_LENGTH: Final = 32
SWEEPS: Final = 25  # the last one goes down


@dataclass(frozen=True)
class Item:
    """Something that takes up place in a row: a box, or a line that passes by on its way to a later row."""

    row: int
    kind: str  # a key of STYLES, or "bend"
    name: str = ""
    description: str = ""
    shapes: str = ""


@dataclass(frozen=True)
class Layout:
    """Horizontal place of every item, and the lines between items of neighbouring rows. Row 0 is on top."""

    items: Mapping[str, Item]
    lines: Sequence[tuple[str, str]]
    x: Mapping[str, float]  # centre, in inches
    box_width: float

    @property
    def boxes(self) -> Mapping[str, tuple[float, int]]:
        """Node (or input) to its centre and row."""
        return {key: (self.x[key], item.row) for key, item in self.items.items() if item.kind != "bend"}


def layered_figure(outline: Outline) -> Figure:
    """The boxes with what they compute and the shapes of their values; a line that skips rows has a lane of its own.

    Raises:
        ConfigurationError: if matplotlib is not installed.
    """
    placed = _layout(outline)
    left = min(placed.x.values()) - placed.box_width / 2 - LEVEL_LABEL
    right = max(max(placed.x.values()) + placed.box_width / 2, left + CHARACTER * len(note(outline)))
    rows = max(item.row for item in placed.items.values()) + 1
    figure = new_figure(right - left + 2 * MARGIN, rows * ROW + NOTE_HEIGHT + 2 * MARGIN)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(left - MARGIN, right + MARGIN)
    bottom = -(rows - 0.5) * ROW - NOTE_HEIGHT
    axes.set_ylim(bottom - MARGIN, 0.5 * ROW + MARGIN)
    axes.text(left, bottom, note(outline), ha="left", va="bottom", fontsize=7.5, color="#666666", parse_math=False)
    if not outline.collapsed:
        _draw_levels(axes, placed, left)
    for start, end in placed.lines:
        _draw_line(axes, placed, start, end)
    for key, item in placed.items.items():
        if item.kind != "bend":
            _draw_box(axes, placed, key)
    return figure


def layout(graph: EnergyGraph, depth: int | None = None) -> Layout:
    """Place the nodes: a parent above its children, no two items of a row over one another."""
    return _layout(outline_of(graph, depth))


def _layout(outline: Outline) -> Layout:
    items, lines = _items(outline)
    texts = [text for item in items.values() for text in (item.name, item.description, item.shapes)]
    box_width = max(1.2, CHARACTER * max(map(len, texts)) + 0.25)
    rows = _ordered(items, lines)
    half = {key: LANE if item.kind == "bend" else box_width / 2 for key, item in items.items()}
    return Layout(items, lines, _coordinates(rows, items, lines, half), box_width)


def _items(outline: Outline) -> tuple[dict[str, Item], list[tuple[str, str]]]:
    boxes = outline.boxes
    last = max(box.level for box in boxes.values())
    first = 1 if any(box.inputs and box.level == last for box in boxes.values()) else 0
    row = {key: last - box.level + first for key, box in boxes.items()}
    items = {
        key: Item(row[key], box.kind, _tail(_shown(box.name)), abridged(box.description), _tail(" ".join(box.shapes)))
        for key, box in boxes.items()
    }
    lines: list[tuple[str, str]] = []
    for key, box in boxes.items():
        if box.inputs:
            above = f"{', '.join(box.inputs)} above row {row[key]}"
            items[above] = Item(row[key] - 1, "input", _tail(_shown(", ".join(box.inputs))), "clamped input")
            lines.append((above, key))
    for key, box in boxes.items():
        _connect(key, box.children, items, lines)
    return items, lines


def _connect(parent: str, children: Iterable[str], items: dict[str, Item], lines: list[tuple[str, str]]) -> None:
    """Lines to the children; those to later rows share one lane, with one bend a row that they pass."""
    here = [parent]
    for child in sorted(children, key=lambda child: items[child].row):
        while items[parent].row + len(here) < items[child].row:
            bend = f"{parent} passes row {items[parent].row + len(here)}"
            items[bend] = Item(items[parent].row + len(here), "bend")
            lines.append((here[-1], bend))
            here.append(bend)
        lines.append((here[items[child].row - items[parent].row - 1], child))


def _tail(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else "…" + name[1 - NAME_LENGTH :]


def _shown(name: str) -> str:
    """What cannot be printed, as Python writes it."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in name)


def _ordered(items: Mapping[str, Item], lines: Sequence[tuple[str, str]]) -> list[list[str]]:
    """The items of each row from left to right: by the mean place of their neighbours, with the fewest crossings."""
    rows: list[list[str]] = [[] for _ in range(max(item.row for item in items.values()) + 1)]
    for key in sorted(items, key=lambda key: items[key].kind == "bend"):  # a lane goes to the right of the boxes
        rows[items[key].row].append(key)
    best, fewest = [list(row) for row in rows], _crossings(rows, lines)
    place = {key: i for row in rows for key, i in _places(row).items()}
    for sweep in range(SWEEPS):
        near = _neighbours(lines, downward=sweep % 2 == 0)
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = {key: _mean([place[n] for n in near.get(key, ())], place[key]) for key in row}
            row.sort(key=wanted.__getitem__)
            place.update(_places(row))
        crossings = _crossings(rows, lines)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _places(row: Sequence[str]) -> dict[str, float]:
    return {key: i - (len(row) - 1) / 2 for i, key in enumerate(row)}


def _crossings(rows: Sequence[Sequence[str]], lines: Sequence[tuple[str, str]]) -> int:
    place = {key: (number, i) for number, row in enumerate(rows) for i, key in enumerate(row)}
    gaps: dict[int, list[tuple[int, int]]] = {}
    for start, end in lines:
        gaps.setdefault(place[start][0], []).append((place[start][1], place[end][1]))
    return sum((a - c) * (b - d) < 0 for gap in gaps.values() for i, (a, b) in enumerate(gap) for c, d in gap[:i])


def _neighbours(lines: Iterable[tuple[str, str]], downward: bool) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for start, end in lines:
        found.setdefault(*(end, []) if downward else (start, [])).append(start if downward else end)
    return found


def _coordinates(
    rows: Sequence[Sequence[str]],
    items: Mapping[str, Item],
    lines: Sequence[tuple[str, str]],
    half: Mapping[str, float],
) -> dict[str, float]:
    """Below and above one's neighbours, as far as the others of the row leave place."""
    offsets = {row[0]: _offsets([half[key] for key in row]) for row in rows}
    weight = _weights(items, lines)
    x = {key: offset for row in rows for key, offset in zip(row, offsets[row[0]], strict=True)}
    for sweep in range(SWEEPS):
        near = _neighbours(lines, downward=sweep % 2 == 0)
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = [_pull(key, near.get(key, ()), x, weight) for key in row]
            x.update(zip(row, _spread(wanted, offsets[row[0]], [weight[key] for key in row]), strict=True))
    return x


def _weights(items: Mapping[str, Item], lines: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Boxes of the longest path stay where they are, other boxes give way to them, lanes to all."""
    through = dict.fromkeys(items, 0)
    for downward in (True, False):
        boxes = _longest(items, _neighbours(lines, downward), downward)
        through = {key: count + boxes[key] for key, count in through.items()}
    spine = max(through.values())
    return {key: 1e-4 if item.kind == "bend" else 1e4 if through[key] == spine else 1.0 for key, item in items.items()}


def _longest(items: Mapping[str, Item], near: Mapping[str, Sequence[str]], downward: bool) -> dict[str, int]:
    """Boxes on the longest path that ends at each item."""
    found: dict[str, int] = {}
    for key in sorted(items, key=lambda key: items[key].row, reverse=not downward):
        found[key] = max((found[n] for n in near.get(key, ())), default=0) + (items[key].kind != "bend")
    return found


def _pull(key: str, neighbours: Sequence[str], x: Mapping[str, float], weight: Mapping[str, float]) -> float:
    """Where an item wants to be: under its like, else its heaviest neighbours: chains and lanes are straight."""
    alike = [n for n in neighbours if weight[n] == weight[key]]
    heaviest = max((weight[n] for n in neighbours), default=0.0)
    return _mean([x[n] for n in alike or neighbours if alike or weight[n] == heaviest], x[key])


def _offsets(half: Sequence[float]) -> list[float]:
    """Least distances from the first item of the row."""
    return list(accumulate((a + SPACE + b for a, b in pairwise(half)), initial=0.0))


def _spread(wanted: Sequence[float], offsets: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Nearest places, in weighted least squares, that keep the distances: isotonic regression of wanted - offset."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, number of items
    for target, offset, weight in zip(wanted, offsets, weights, strict=True):
        block = (target - offset, weight, 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, other, count = blocks.pop()
            total = other + block[1]
            block = ((mean * other + block[0] * block[1]) / total, total, count + block[2])
        blocks.append(block)
    levels = [mean for mean, _, count in blocks for _ in range(count)]
    return [level + offset for level, offset in zip(levels, offsets, strict=True)]


def _mean(numbers: Sequence[float], otherwise: float) -> float:
    return sum(numbers) / len(numbers) if numbers else otherwise


def _draw_box(axes: Axes, placed: Layout, key: str) -> None:
    patches = require("matplotlib.patches", "plot")
    item, x, y = placed.items[key], placed.x[key], -placed.items[key].row * ROW
    fill, edge, width = STYLES[item.kind]
    style = "round,pad=0,rounding_size=0.2" if item.kind == "input" else "round,pad=0,rounding_size=0.05"
    corner = x - placed.box_width / 2, y - BOX_HEIGHT / 2
    axes.add_patch(
        patches.FancyBboxPatch(
            corner, placed.box_width, BOX_HEIGHT, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=width
        )
    )
    style_of_text: dict[str, Any] = {"ha": "center", "va": "center", "parse_math": False}
    below = 0.1 if item.shapes else 0.0
    axes.text(x, y + 0.08 + below, item.name, fontsize=8, fontweight="bold", color="black", **style_of_text)
    axes.text(x, y - 0.1 + below, item.description, fontsize=7.5, color="#333333", **style_of_text)
    if item.shapes:
        axes.text(x, y - 0.17, item.shapes, fontsize=7, color="#666666", **style_of_text)


def _draw_line(axes: Axes, placed: Layout, start: str, end: str) -> None:
    """An S from row to row: it bends only between the rows, where no box is; past a row it runs straight down."""
    patches, paths = require("matplotlib.patches", "plot"), require("matplotlib.path", "plot")
    x0, y0 = placed.x[start], -placed.items[start].row * ROW - BOX_HEIGHT / 2
    x1, y1 = placed.x[end], -placed.items[end].row * ROW + BOX_HEIGHT / 2
    middle = (y0 + y1) / 2
    points, codes = [(x0, y0), (x0, middle), (x1, middle), (x1, y1)], [1, 4, 4, 4]
    passing = placed.items[end].kind == "bend"
    if passing:
        points, codes = [*points, (x1, y1 - BOX_HEIGHT)], [*codes, 2]
    skips = passing or placed.items[start].kind == "bend"
    arrow = patches.FancyArrowPatch(
        path=paths.Path(points, codes), arrowstyle="-" if passing else "-|>", mutation_scale=9, capstyle="round"
    )
    arrow.set(linewidth=1.1, color=PALETTE[2] if skips else "#444444")
    axes.add_patch(arrow)


def _draw_levels(axes: Axes, placed: Layout, left: float) -> None:
    nodes = [item for item in placed.items.values() if item.kind not in ("input", "bend")]
    lowest = max(item.row for item in nodes)
    for row in sorted({item.row for item in nodes}):
        label = f"level {lowest - row}" if row < lowest else "level 0:\noutput"
        axes.text(left, -row * ROW, label, ha="left", va="center", fontsize=7.5, color="#666666")
