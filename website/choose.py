"""The table of settings on the page "Choose", from the committed results of ``benchmarks/learning.py``."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "learning.jsonl"
MARK = "<!-- the table of settings: website/choose.py -->"
SETTINGS = {  # as benchmarks/learning.py names them, and as the page explains them; what is not here is not shown
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


def filled(markdown: str) -> str:
    return markdown.replace(MARK, table(RESULTS)) if MARK in markdown else markdown


def table(results: Path) -> str:
    """Rows are networks, columns settings: the mean score over seeds, and its seconds over those of backprop."""
    runs = defaultdict(lambda: defaultdict(list))
    for line in results.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        runs[run["row"]][run["setting"]].append(run)
    others = [name for name in SETTINGS if any(name in of_row for of_row in runs.values())][2:]
    titles = ["network and data", "backprop", "default", "time", *(SETTINGS[name] for name in others)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row, of_row in runs.items():
        digits = 1 if _mean(of_row["backprop"], "score") > 10 else 3  # percent, or nats
        first, second, *rest = (_score(of_row.get(name, []), digits) for name in ("backprop", "default", *others))
        lines.append(f"| {' | '.join([row, first, second, _times(of_row), *rest])} |")
    return "\n".join(lines)


def _mean(runs: list[dict], what: str) -> float:
    return statistics.fmean(run[what] for run in runs)


def _score(runs: list[dict], digits: int) -> str:
    if not runs:
        return ""
    seeds = f" ({len(runs)})" if len(runs) != 3 else ""
    return f"{_mean(runs, 'score'):.{digits}f}{seeds}"


def _times(of_row: dict[str, list[dict]]) -> str:
    return f"{_mean(of_row['default'], 'seconds') / _mean(of_row['backprop'], 'seconds'):.1f}"
