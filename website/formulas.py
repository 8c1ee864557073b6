"""Formulas of the pages, as MathML: browsers draw it by themselves, so no script comes from elsewhere."""

from __future__ import annotations

import html as escapes
import re

from latex2mathml.converter import convert

MARKED = re.compile(r'<(?P<tag>span|div) class="arithmatex">(?P<open>\\[(\[])(?P<formula>.*?)\\[)\]]</(?P=tag)>', re.S)


def drawn(html: str) -> str:
    """The page with each formula between dollars drawn. An unknown command stops the build."""

    def one(match: re.Match[str]) -> str:
        display = "block" if match["open"] == r"\[" else "inline"
        return convert(escapes.unescape(match["formula"].strip()), display=display)

    return MARKED.sub(one, html)
