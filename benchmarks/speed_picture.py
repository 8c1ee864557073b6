"""The picture of ``speed.py``: a panel a case, a bar a program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contenders import COMPILED, REFERENCE

from torch2ebm.reports.figures import PALETTE, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
BACKPROP, EAGER, FUSED, PEER = "backprop", "torch2ebm, eager", "torch2ebm, compile=True", "another library"
COLOURS = {BACKPROP: PALETTE[6], EAGER: PALETTE[0], FUSED: PALETTE[2], PEER: PALETTE[4]}
PEERS = ("PCX", "Torch2PC")


def draw(rows: Sequence[Any], path: Path) -> None:
    """Times in multiples of the reference, with quartiles; targets and the counted arithmetic as marks."""
    titles = list(dict.fromkeys((row.case, row.setting) for row in rows))
    lines = -(-len(titles) // COLUMNS)
    figure = new_figure(4.6 * min(COLUMNS, len(titles)), 3.2 * lines + 0.5)
    panels = list(figure.subplots(lines, min(COLUMNS, len(titles)), squeeze=False).flat)
    handles: dict[str, Any] = {}
    for (case, setting), axes in zip(titles, panels, strict=False):
        _panel(axes, [row for row in rows if (row.case, row.setting) == (case, setting)], handles)
        axes.set_title(f"{case}, {setting}" if len({row.setting for row in rows}) > 1 else case, fontsize=10)
    for axes in panels[len(titles) :]:
        axes.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), fontsize=8)
    save(figure, str(path))


def kind_of(program: str) -> str:
    if program.startswith(REFERENCE):
        return BACKPROP
    if program.startswith(PEERS):
        return PEER
    return FUSED if program.endswith(COMPILED) else EAGER


def _panel(axes: Axes, rows: Sequence[Any], handles: dict[str, Any]) -> None:
    for i, row in enumerate(rows):
        kind = kind_of(row.program)
        spread = [[max(0.0, row.multiple - row.low)], [max(0.0, row.high - row.multiple)]]
        bar = axes.barh(i, row.multiple, color=COLOURS[kind], xerr=spread, height=0.7, ecolor="0.3")
        handles.setdefault(kind, bar)
        _mark(axes, i, row.target, "at most (target)", PALETTE[1], "|", handles)
        if row.reference == REFERENCE:  # what the arithmetic is a multiple of
            _mark(axes, i, row.arithmetic, "counted arithmetic", PALETTE[3], "D", handles)
    axes.set_yticks(range(len(rows)), [row.program for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel(f"time [multiples of {rows[0].reference}]", fontsize=8)
    axes.grid(alpha=0.3, axis="x")


def _mark(
    axes: Axes, row: int, value: float | None, label: str, colour: str, marker: str, handles: dict[str, Any]
) -> None:
    if value is not None:
        size = 14 if marker == "|" else 4
        (line,) = axes.plot(value, row, marker, color=colour, markersize=size, markeredgewidth=2, linestyle="none")
        handles.setdefault(label, line)
