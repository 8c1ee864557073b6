"""The tables of settings on the page "Choose", from the committed results of ``benchmarks/learning.py``."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "learning.jsonl"
MARK = "<!-- the table of settings: website/choose.py -->"
EVERY = "<!-- every setting: website/choose.py -->"
SETTINGS = {  # of the first table, as benchmarks/learning.py names them, and as the page explains them
    "backprop": "backprop",
    "default": "default",
    "head": "last block",
    "z-il": "Z-IL",
    "strict-.1": "strict",
    "r=0.01": "r 0.01",
    "r=0.1": "r 0.1",
    "both=0.3": "both 0.3",
    "both=1.0": "both 1",
}
SEEDS = 3  # of a number that says nothing of them

Run = dict  # a line of the results
Runs = dict[str, dict[str, list[Run]]]  # by network and setting


def filled(markdown: str) -> str:
    if MARK not in markdown:
        return markdown
    # a table that unfolds: its lines are indented
    unfolded = "".join(f"    {line}\n" for line in every(RESULTS).splitlines())
    markdown = markdown.replace(EVERY, f'??? note "Every setting that was measured"\n\n{unfolded}')
    return markdown.replace(MARK, table(RESULTS))


def table(results: Path) -> str:
    """Rows are networks, columns settings: the mean score over seeds, and its seconds over those of backprop."""
    runs = _read(results)
    there = {name for of_row in runs.values() for name in of_row} - {"backprop", "default"}
    others = [name for name in SETTINGS if name in there]
    lines = _head(["network and data", "backprop", "default", "time", *(SETTINGS[name] for name in others)])
    for row, of_row in runs.items():
        first, second, *rest = (_score(of_row, name) for name in ("backprop", "default", *others))
        lines.append(f"| {' | '.join([row, first, second, _times(of_row), *rest])} |")
    return "\n".join(lines)


def every(results: Path) -> str:
    """Rows are settings by their names in ``benchmarks/learning.py``, all of the results; columns are networks."""
    runs = _read(results)
    names = dict.fromkeys([*SETTINGS, *(name for of_row in runs.values() for name in of_row)])
    lines = _head(["setting", *(row.split(",")[0] for row in runs)])
    for name in names:
        if any(name in of_row for of_row in runs.values()):
            scores = [_score(of_row, name) for of_row in runs.values()]
            lines.append(f"| {' | '.join([f'`{name}`', *scores])} |")
    return "\n".join(lines)


def _read(results: Path) -> Runs:
    """A seed that was run again counts once, as it was run last."""
    runs: dict[str, dict[str, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    for number, line in enumerate(results.read_text(encoding="utf-8").splitlines()):
        run = json.loads(line)
        runs[run["row"]][run["setting"]][run.get("seed", number)] = run
    return {
        row: {setting: [*seeds.values()] for setting, seeds in of_row.items()}
        for row, of_row in runs.items()
        if "backprop" in of_row
    }


def _head(titles: Iterable[str]) -> list[str]:
    titles = list(titles)
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]


def _score(of_row: dict[str, list[Run]], setting: str) -> str:
    scores = [run["score"] for run in of_row.get(setting, [])]
    finite = [score for score in scores if not math.isnan(score)]
    diverged = len(scores) - len(finite)
    if not finite:
        return "diverged" if diverged else ""
    digits = 1 if statistics.fmean(run["score"] for run in of_row["backprop"]) > 10 else 3  # percent, or nats
    seeds = f" ({len(finite)})" if len(finite) != SEEDS else ""
    return f"{statistics.fmean(finite):.{digits}f}{seeds}" + (f", {diverged} diverged" if diverged else "")


def _times(of_row: dict[str, list[Run]]) -> str:
    if "default" not in of_row:
        return ""
    of_default, of_backprop = (
        statistics.fmean(run["seconds"] for run in of_row[name]) for name in ("default", "backprop")
    )
    return f"{of_default / of_backprop:.1f}"
