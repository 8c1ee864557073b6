"""Tables as text, as HTML and as data frames, and lists that stay short."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from torch2ebm.common.checks import require

if TYPE_CHECKING:
    from pandas import DataFrame

MOST_ROWS: Final = 10  # of what is shown in a console unasked
MOST_CHARACTERS: Final = 32  # of what a node does, in a picture


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns padded to their widest entry; the first ``left`` columns aligned left, the others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def short_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, total: int | None = None
) -> str:
    """A line and the first rows of a table, for ``repr``; ``total`` where not all rows were made."""
    left_out = (len(rows) if total is None else total) - MOST_ROWS
    more = [f"... and {left_out} more"] if left_out > 0 else []
    return "\n".join([title, *([aligned(header, rows[:MOST_ROWS], left)] if rows else []), *more])


def html_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same for a notebook. Names are the user's, and stay text."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<p>{html.escape(title)}</p><table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"


def data_frame(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> DataFrame:
    """A table of pandas. Whole numbers that may be missing stay whole: the column ``step``.

    Raises:
        ConfigurationError: if pandas is not installed.
    """
    frame: DataFrame = require("pandas", "pandas").DataFrame(list(rows), columns=list(columns))
    return frame.astype({"step": "Int64"}) if "step" in columns else frame


def html_text(text: str) -> str:
    """Text for a notebook, its lines as they are."""
    return f"<pre>{html.escape(text)}</pre>"


def listed(names: Sequence[str], most: int = 20) -> str:
    """The names, or the first of them and how many follow."""
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[:most])}, ... and {len(names) - most} more"


def abridged(description: str) -> str:
    """First operations and the last one: ``Linear > chunk > … > reshape``."""
    operations = description.split(" > ")
    kept = operations
    while len(" > ".join(kept)) > MOST_CHARACTERS and len(operations) > 2:
        operations = [*operations[:-2], operations[-1]]
        kept = [*operations[:-1], "…", operations[-1]]
    return " > ".join(kept)
