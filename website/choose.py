"""The table of settings on the page "Choose", from the committed results of ``benchmarks/learning.py``."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "learning.jsonl"
MARK = "<!-- the table of settings: website/choose.py -->"
SETTINGS = {  # as benchmarks/learning.py names them, and what you type
    "backprop": "`Backprop()`",
    "default": "`PredictiveCoding()`",
    "z-il": "`ZeroDivergence()`",
    "r=0.01": "`Relative(0.01)`",
    "r=0.1": "`Relative(0.1)`",
    "both=0.3": "both 0.3",
    "both=1.0": "both 1.0",
    "head": "last block alone",
}


def filled(markdown: str) -> str:
    return markdown.replace(MARK, table(RESULTS)) if MARK in markdown else markdown


def table(results: Path) -> str:
    """Rows are networks, columns settings: the mean score over seeds, and its seconds over those of backprop."""
    runs = defaultdict(lambda: defaultdict(list))
    for line in results.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        runs[run["row"]][run["setting"]].append(run)
    settings = [name for name in SETTINGS if any(name in of_row for of_row in runs.values())]
    lines = [
        "| network and data | " + " | ".join(SETTINGS[name] for name in settings) + " | time of the default |",
        "|---" * (len(settings) + 2) + "|",
    ]
    for row in runs:
        digits = 1 if _mean(runs[row]["backprop"], "score") > 10 else 3  # percent, or nats
        scores = [_score(runs[row].get(name, []), digits) for name in settings]
        lines.append(f"| {row} | " + " | ".join(scores) + f" | {_times(runs[row])} |")
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
