"""Formulas of the pages, as MathML: browsers draw it by themselves, so no script comes from elsewhere."""

from __future__ import annotations

import html as escapes
import logging
import re

from latex2mathml.converter import convert

MARKED = re.compile(r'<(?P<tag>span|div) class="arithmatex">(?P<open>\\[(\[])(?P<formula>.*?)\\[)\]]</(?P=tag)>', re.S)
SAME = {r"\arg\min": r"\mathrm{arg\,min}", r"\arg\max": r"\mathrm{arg\,max}"}  # in words that the converter knows
log = logging.getLogger("mkdocs.plugins.formulas")


def drawn(html: str) -> str:
    """The page with each formula between dollars drawn. An unknown command is a warning, which stops a strict build."""

    def one(match: re.Match[str]) -> str:
        display = "block" if match["open"] == r"\[" else "inline"
        formula = escapes.unescape(match["formula"].strip())
        for unknown, known in SAME.items():
            formula = formula.replace(unknown, known)
        found = convert(formula, display=display)
        if unknown := re.findall(r"\\[A-Za-z]+", found):
            log.warning("cannot draw %s in %s", ", ".join(unknown), formula)
        return found

    return MARKED.sub(one, html)
