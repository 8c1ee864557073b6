"""The text that Graphviz draws a graph from, and its program ``dot``."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from typing import Final

from torch2ebm.common.text import abridged
from torch2ebm.reports.figures import STYLES
from torch2ebm.reports.outline import Box, Outline, note

SECONDS: Final = 10.0  # that dot may take for a picture: notebooks ask for it wherever a model is shown
MANY_LINES: Final = 300  # of which dot takes minutes to untangle all
HASTY: Final = ("-Gmclimit=0.1", "-Gnslimit=1", "-Gnslimit1=1", "-Gsplines=polyline")
WINDOWS: Final = ("x11", "xlib", "gtk")  # formats of dot that are none: they open a window and wait
FRAME: Final = 'labelloc=t; labeljust=l; style=rounded; color="#999999"; fontcolor="#555555";'
FONT: Final = 'fontname="Helvetica,Arial,sans-serif"'


def dot_text(outline: Outline) -> str:
    """A digraph: one cluster a module, one box a node or collapsed module, one line from what is read to its reader."""
    keys = {key: f"n{i}" for i, key in enumerate(outline.boxes)}
    inputs = {name: f"i{i}" for i, name in enumerate(_inputs(outline))}
    lines = [
        f"digraph {_quoted(outline.title)} {{",
        f"  graph [label={_quoted(note(outline))}, labelloc=b, {FONT}, fontsize=10, nodesep=0.3, ranksep=0.4];",
        f'  node [shape=box, style="filled,rounded", {FONT}, fontsize=10, margin="0.12,0.06"];',
        '  edge [color="#444444", arrowsize=0.7];',
        *(f"  {key} [label={_quoted(name, 'clamped input')}, {_style('input')}];" for name, key in inputs.items()),
        *_within(outline, keys, ()),
    ]
    for key, box in outline.boxes.items():
        lines += [f"  {inputs[name]} -> {keys[key]};" for name in box.inputs]
        lines += [f"  {keys[key]} -> {keys[child]};" for child in box.children]
    return "\n".join([*lines, "}", ""])


def _inputs(outline: Outline) -> dict[str, None]:
    return dict.fromkeys(name for box in outline.boxes.values() for name in box.inputs)


def _within(outline: Outline, keys: Mapping[str, str], module: tuple[str, ...]) -> Iterator[str]:
    """What stands in a module and in no module inside of it; then these modules, one cluster each."""
    indent = "  " * (len(module) + 1)
    for key, box in outline.boxes.items():
        if box.module == module:
            tip = _quoted(f"{box.name}: {box.description}")
            yield f"{indent}{keys[key]} [label={_label(box)}, tooltip={tip}, {_style(box.kind)}];"
    for i, path in enumerate(outline.classes):
        if path[:-1] == module:
            yield f"{indent}subgraph cluster_{i} {{"
            title = _quoted(f"{'.'.join(path)}: {outline.classes[path]}")
            yield f"{indent}  label={title}; {FRAME}"
            yield from _within(outline, keys, path)
            yield f"{indent}}}"


def _label(box: Box) -> str:
    return _quoted(box.name, abridged(box.description), *box.shapes)


def _style(kind: str) -> str:
    fill, edge, width = STYLES[kind]
    peripheries = ", peripheries=2" if kind == "module" else ""
    return f'fillcolor="{fill}", color="{edge}", penwidth={width}{peripheries}'


def _quoted(*lines: str) -> str:
    """A string of DOT, whose text is shown as it is, whatever it is."""
    return '"' + "\\n".join(map(_escaped, lines)) + '"'


def _escaped(text: str) -> str:
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
    return shown.replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;")


def has_dot() -> bool:
    """Whether Graphviz is there."""
    return shutil.which("dot") is not None


def rendered(text: str, suffix: str) -> bytes | None:
    """The picture in a format of ``dot``; None where it is missing, has no such format, or takes too long."""
    program = shutil.which("dot")
    if program is None or suffix in WINDOWS or not suffix.isalnum():
        return None
    command = [program, f"-T{suffix}", *(["-Gdpi=150"] if suffix in ("png", "jpg", "jpeg", "gif", "webp") else [])]
    command += HASTY if text.count(" -> ") > MANY_LINES else ()
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 and done.stdout else None
