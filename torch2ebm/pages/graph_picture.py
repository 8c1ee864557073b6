"""The energy graph inside a page: boxes that a script colours, in SVG. The loss is a box below the outputs."""

from __future__ import annotations

import html
from collections.abc import Mapping

from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.reports.drawing import Item, Layout, layout

# pixels
INCH = 96
ROW = 96
BOX = 62
LABEL = 64
MARGIN = 12
LOSS_WIDTH = 130


def graph_picture(graph: EnergyGraph, columns: Mapping[str, int], loss_column: int | None) -> str:
    """SVG of the graph.

    Args:
        graph: What is drawn, one row a level, data above and outputs below.
        columns: Node to the column of the page's data that has its energies; others are drawn without one.
        loss_column: The column of the loss; None draws no box for it.
    """
    placed = layout(graph)
    left = min(placed.x.values()) - placed.box_width / 2
    width = (max(placed.x.values()) + placed.box_width / 2 - left) * INCH + LABEL + 2 * MARGIN
    rows = max(item.row for item in placed.items.values()) + 1 + (loss_column is not None)
    height = (rows - 1) * ROW + BOX + 2 * MARGIN
    across = {key: (x - left) * INCH + LABEL + MARGIN for key, x in placed.x.items()}
    outputs = [key for key, item in placed.items.items() if item.kind == "output"]
    parts = [_level(row, level) for row, level in _levels(placed).items()]
    parts += [_wire(placed, across, start, end) for start, end in placed.lines]
    if loss_column is not None:
        middle = sum(across[key] for key in outputs) / len(outputs)
        parts += [_path(across[key], _y(placed.items[key].row), middle, _y(rows - 1)) for key in outputs]
        box = Item(rows - 1, "loss", "loss", "distance to the target")
        parts.append(_box(box, middle, LOSS_WIDTH, loss_column, "the loss, in the units of the energy"))
    full = {**dict.fromkeys(placed.items, ""), **{name: node.description for name, node in graph.nodes.items()}}
    parts += [
        _box(item, across[key], placed.box_width * INCH, columns.get(key), f"{key}: {full[key]}")
        for key, item in placed.items.items()
        if item.kind != "bend"
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="graph of the nodes">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0L8,4L0,8z" fill="context-stroke"></path></marker></defs>'
        f"{''.join(parts)}</svg>"
    )


def _y(row: int) -> float:
    return MARGIN + BOX / 2 + row * ROW


def _levels(placed: Layout) -> dict[int, int]:
    """Row to level, of the rows that have nodes."""
    rows = {item.row for item in placed.items.values() if item.kind in ("node", "output")}
    return {row: max(rows) - row for row in sorted(rows)}


def _level(row: int, level: int) -> str:
    return f'<text class="level" x="{MARGIN}" y="{_y(row) + 4:.0f}">level {level}</text>'


def _box(item: Item, x: float, width: float, column: int | None, title: str) -> str:
    kept = "" if column is None else f' data-column="{column}"'
    y = _y(item.row)
    corner = 14 if item.kind == "input" else 5
    number = "" if column is None else f'<text class="number" x="{x:.1f}" y="{y + 24:.1f}"></text>'
    return (
        f'<g class="box {item.kind}" data-kind="{item.kind}"{kept}><title>{html.escape(title)}</title>'
        f'<rect x="{x - width / 2:.1f}" y="{y - BOX / 2:.1f}" width="{width:.1f}" height="{BOX}" rx="{corner}"></rect>'
        f'<text class="name" x="{x:.1f}" y="{y - 12:.1f}">{html.escape(item.name)}</text>'
        f'<text x="{x:.1f}" y="{y + 5:.1f}">{html.escape(item.description)}</text>{number}</g>'
    )


def _wire(placed: Layout, across: Mapping[str, float], start: str, end: str) -> str:
    first, last = placed.items[start], placed.items[end]
    passing = last.kind == "bend"
    return _path(across[start], _y(first.row), across[end], _y(last.row), passing)


def _path(x0: float, row0: float, x1: float, row1: float, passing: bool = False) -> str:
    """An S from row to row, which bends between the rows; past a row it runs straight down."""
    y0, y1 = row0 + BOX / 2, row1 - BOX / 2
    middle = (y0 + y1) / 2
    curve = f"M{x0:.1f},{y0:.1f}C{x0:.1f},{middle:.1f} {x1:.1f},{middle:.1f} {x1:.1f},{y1:.1f}"
    if passing:
        return f'<path class="wire" d="{curve}V{y1 + BOX:.1f}"></path>'
    return f'<path class="wire" d="{curve}" marker-end="url(#tip)"></path>'
