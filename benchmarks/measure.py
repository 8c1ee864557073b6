"""Times of programs run in turn, in random order, and the memory that one of them takes at its peak."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Program = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds, and the ratio to the reference program round by round, with its quartiles."""

    milliseconds: float
    ratio: float
    low: float
    high: float


def interleaved(programs: Mapping[str, Program], reference: str, rounds: int) -> dict[str, Timing]:
    """Every round runs every program once, so that a slow moment of the machine touches all of them."""
    order = list(programs)
    shuffle = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for name in order:  # warm up
        programs[name]()
        programs[name]()
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            start = time.perf_counter()
            programs[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: _timing(times, seconds[reference]) for name, times in seconds.items()}


def _timing(times: list[float], reference: list[float]) -> Timing:
    ratios = [mine / theirs for mine, theirs in zip(times, reference, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Timing(1000 * statistics.median(times), statistics.median(times) / statistics.median(reference), low, high)


def peak_bytes(program: Program) -> int:
    """The most that ``program`` has allocated at one time, what it leaves behind from one call to the next included."""
    program()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(3):  # from the second call on everything freed was also seen to be allocated
            program()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
