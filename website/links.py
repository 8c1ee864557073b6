"""Links between files of the repository, as links between pages of the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s]+)(?P<after>\))")
UNTESTED = re.compile(r"^([ \t]*(?:`{3,}|~{3,})python) no-run[ \t]*$", re.M)
CODE = re.compile(r"(^[ \t]*(`{3,}|~{3,}).*?^[ \t]*\2[ \t]*$|`[^`\n]+`)", re.M | re.S)


def shown(markdown: str) -> str:
    """Blocks that no test runs open as all others: Markdown takes no word behind the language."""
    return UNTESTED.sub(r"\1", markdown)


def led(markdown: str, source: str, page: str, places: Mapping[str, str], repository: str) -> str:
    """The page with its relative links changed.

    Args:
        markdown: The text.
        source: Where its file stands, from the root of the repository.
        page: Where the site has it.
        places: For files of the repository, where the site has them.
        repository: The address of the sources, for files that the site has not.
    """

    def changed(match: re.Match[str]) -> str:
        target, hash_, anchor = match["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in places:
            found = posixpath.relpath(places[path], posixpath.dirname(page) or ".")
        elif not path.startswith("..") and (ROOT / path).exists():
            found = f"{repository}/blob/main/{path}"
        else:
            return match[0]  # which the strict build reports
        return f"{match['before']}{found}{hash_}{anchor}{match['after']}"

    parts = CODE.split(markdown)
    # split puts the text at 0, 3, 6, ..., each code at the next place, and its fence behind that
    kept = [LINK.sub(changed, part or "") if number % 3 == 0 else part or "" for number, part in enumerate(parts)]
    return "".join(part for number, part in enumerate(kept) if number % 3 != 2)
