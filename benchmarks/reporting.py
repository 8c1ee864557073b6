"""What the programs here have in common: where results go, in which form, and on which machine they were measured."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
MNIST = Path(__file__).resolve().parents[2] / "shared" / "mnist_10k.npz"


@dataclass(frozen=True)
class Machine:
    """Where a figure was measured."""

    processor: str
    threads: int
    torch: str
    python: str

    def __str__(self) -> str:
        return f"{self.processor}, {self.threads} thread(s), torch {self.torch}, Python {self.python}"


def this_machine() -> Machine:
    return Machine(_processor(), torch.get_num_threads(), torch.__version__, platform.python_version())


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def arguments_of(parser: argparse.ArgumentParser, threads: int = 1) -> argparse.Namespace:
    """With the options that every program has; the number of threads is set."""
    parser.add_argument("--quick", action="store_true", help="a small part, to see that it runs")
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file and the picture")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.out /= "quick"  # beside what was measured in earnest
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


def save_json(path: Path, **parts: Any) -> None:
    """Dataclasses by field, with the machine on top."""
    everything = {"machine": this_machine(), **parts}
    path.write_text(json.dumps(everything, indent=1, default=asdict) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
