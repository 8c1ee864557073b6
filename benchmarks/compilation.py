"""What ``compile=True`` costs before it pays: the first calls on case (c), each program in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cases import CASES
from contenders import COMPILED, ERRORS, EXACT, FIXED, REFERENCE, STRICT, Contest

CASE = CASES[2]
CONTENDERS = (EXACT, FIXED, STRICT, ERRORS)
FIRST, AFTER = 4, 5  # calls within which all is compiled, and calls that show what one costs from then on
TARGET = 30.0  # seconds


@dataclass(frozen=True)
class Compilation:
    """The first calls of a compiled program.

    Attributes:
        seconds: What the first calls took longer than as many later ones.
        slowest: Seconds of the slowest of them.
        steady: Seconds of a later call.
    """

    program: str
    seconds: float
    slowest: float
    steady: float
    target: float | None = TARGET
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "met" if self.seconds <= self.target else "missed"


def compilations(threads: int) -> list[Compilation]:
    """One process for each program, one after the other."""
    return [_in_a_process(name, threads) for name in (REFERENCE, *(each.name for each in CONTENDERS))]


def _in_a_process(name: str, threads: int) -> Compilation:
    print(f"first calls of {name}{COMPILED}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        command = [sys.executable, str(Path(__file__).resolve()), name, "--threads", str(threads)]
        printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Compilation(**json.loads(printed.splitlines()[-1]))


def first_calls(name: str) -> Compilation:
    """In this process, whose caches have to be empty."""
    contest = Contest(CASE, [each for each in CONTENDERS if each.name == name], compiled=True)
    program = contest.programs[name + COMPILED]
    seconds = []
    for _ in range(FIRST + AFTER):
        start = time.perf_counter()
        program()
        seconds.append(time.perf_counter() - start)
    steady = sorted(seconds[FIRST:])[AFTER // 2]
    more = sum(seconds[:FIRST]) - FIRST * steady
    return Compilation(name, more, max(seconds[:FIRST]), steady, None if name == REFERENCE else TARGET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(asdict(first_calls(arguments.program))))


if __name__ == "__main__":
    main()
