"""One self-contained HTML page: its skeleton, style and script. Nothing of it is loaded from elsewhere."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from torch2ebm.reports.paths import file_of

LINES = 6  # that have a colour of their own
DIGITS = 6  # of a number in the page's data

# a browser refuses whatever a name might smuggle in to load, and a page that is served asks for no icon
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
"""


@dataclass(frozen=True)
class Panel:
    """One part of a page.

    Attributes:
        title: Its heading, plain text.
        says: What is to be seen, in a sentence for somebody who sees such a thing for the first time; plain text.
        body: HTML.
    """

    title: str
    says: str
    body: str


@dataclass(frozen=True)
class Bar:
    """A number of a table with a bar beside it: a share of the longest, past which it has another colour."""

    value: float
    text: str
    share: float


Cell = str | float | Bar


def page(title: str, lead: str, panels: Iterable[Panel], data: Mapping[str, Any]) -> str:
    """The page as text. Title and lead are plain text; ``data`` is what the script draws from."""
    from torch2ebm.common.version import version  # which reads a file: not where the package is imported

    sections = "\n".join(_section(number, panel) for number, panel in enumerate(panels))
    return (
        f"{_HEAD}<title>{html.escape(title)}</title>\n<style>\n{_resource('page.css')}</style>\n</head>\n<body>\n"
        f"<header><h1>{html.escape(title)}</h1>\n<p>{html.escape(lead)}</p></header>\n"
        '<noscript><p class="noscript">Colours, curves and the slider need JavaScript.</p></noscript>\n'
        f"<main>\n{sections}\n</main>\n<footer>torch2ebm {html.escape(version())}</footer>\n"
        f'<script type="application/json" id="data">{as_json(data)}</script>\n'
        f"<script>\n{_resource('page.js')}</script>\n</body>\n</html>\n"
    )


def written(text: str, path: str | os.PathLike[str] | None) -> str:
    """The text, written to the file where a path is given. Raises :class:`ConfigurationError` for what is none."""
    if path is not None:
        # a name may hold half of a surrogate pair, which no encoding has
        file_of("to_html", path, "run.html").write_text(
            text, encoding="utf-8", errors="xmlcharrefreplace", newline="\n"
        )
    return text


def framed(text: str, height: int = 720) -> str:
    """The page inside a notebook's, where neither sees the other's style and names."""
    style = f"width:100%;height:{height}px;border:0"
    return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{html.escape(text)}"></iframe>'


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]], text_columns: int = 1) -> str:
    """A table that is sorted by a click on a header. Names are the user's, and stay text."""
    heads = "".join(
        f'<th scope="col"{_kind(i < text_columns)}><button type="button">{html.escape(name)}</button></th>'
        for i, name in enumerate(header)
    )
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        '<div class="scroll table" tabindex="0" role="region" aria-label="table">'
        f'<table class="sortable"><thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def facts(rows: Iterable[tuple[str, str, str]]) -> str:
    """Name, what it was, and what that means, each plain text."""
    lines = (
        f"<dt>{html.escape(name)}</dt><dd><code>{html.escape(was)}</code>"
        f"{f' <small>{html.escape(means)}</small>' if means else ''}</dd>"
        for name, was, means in rows
    )
    return f'<dl class="facts">{"".join(lines)}</dl>'


def chart(key: str, caption: str, names: Sequence[str]) -> str:
    """The place of ``data["charts"][key]``, with a key of its lines."""
    keys = "".join(
        f'<span class="key"><i class="line" style="border-color: var(--line-{i % LINES})"></i>'
        f"<span>{_breakable(name)}</span></span>"
        for i, name in enumerate(names)
    )
    return f'<h3>{html.escape(caption)}</h3>{keys}<figure class="chart" data-chart="{html.escape(key)}"></figure>'


def curves(
    x: Sequence[int],
    lines: Mapping[str, Sequence[float]],
    horizontal: str,
    vertical: str,
    logarithmic: bool = False,
    follows: bool = False,
    least: float = 0.0,
) -> dict[str, Any]:
    """What the script draws of some curves; a mark ``follows`` the slider."""
    return {
        "x": list(x),
        "lines": [{"name": name, "y": list(y)} for name, y in lines.items()],
        "horizontal": horizontal,
        "vertical": vertical,
        "logarithmic": logarithmic,
        "follows": follows,
        "least": least,
    }


def spans_a_decade(numbers: Iterable[float]) -> bool:
    """Whether a logarithmic axis shows more of them."""
    positive = [number for number in numbers if number > 0 and math.isfinite(number)]
    return bool(positive) and max(positive) >= 10 * min(positive)


def as_json(data: Any) -> str:
    """JSON that no name can end: ``</script>`` is text of it. What is no finite number is null."""
    text = json.dumps(_numbers(data), allow_nan=False, separators=(",", ":"))  # other than ASCII is escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _numbers(data: Any) -> Any:
    if isinstance(data, float):
        return float(f"{data:.{DIGITS}g}") if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _numbers(value) for key, value in data.items()}
    return [_numbers(value) for value in data] if isinstance(data, (list, tuple)) else data


def _section(number: int, panel: Panel) -> str:
    return (
        f'<section aria-labelledby="panel-{number}"><h2 id="panel-{number}">{html.escape(panel.title)}</h2>\n'
        f'<p class="says">{html.escape(panel.says)}</p>\n{panel.body}\n</section>'
    )


def _kind(is_text: bool) -> str:
    return ' class="text"' if is_text else ""


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return f'<td class="text">{_breakable(cell)}</td>'
    if not isinstance(cell, Bar):
        return f'<td data-value="{_value(cell)}">{cell:.4g}</td>'
    share = min(max(cell.share, 0.0), 1.0) if math.isfinite(cell.share) else 0.0
    past = " past" if cell.share > 1 else ""
    bar = f'<span class="bar{past}"><i style="width: {100 * share:.1f}%"></i></span>'
    return f'<td data-value="{_value(cell.value)}">{bar}<span class="beside">{html.escape(cell.text)}</span></td>'


def _breakable(name: str) -> str:
    """A name that goes on in the next line where its parts end, and not inside of a word."""
    return "<wbr>".join(html.escape(part) for part in re.split(r"(?<=[,(=_/])|(?<=\.)(?=\D)", name))


def _value(number: float) -> str:
    """As JavaScript reads it."""
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return repr(float(number))


@cache
def _resource(name: str) -> str:
    return files("torch2ebm.pages").joinpath(name).read_text(encoding="utf-8")
