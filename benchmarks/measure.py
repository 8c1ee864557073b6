"""Times of programs run in turn, in random order, and the memory that one of them takes at its peak."""

from __future__ import annotations

import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Program = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds, and the ratio to the reference program round by round, with its quartiles."""

    milliseconds: float
    ratio: float
    low: float
    high: float


def interleaved(
    programs: Mapping[str, Program], reference: str, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Every round runs every program once, in random order: a slow moment of the machine touches all of them.

    With ``clock=time.process_time``, and one thread, what other processes do counts little.
    """
    order = list(programs)
    shuffle = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for name in order:  # warm up
        programs[name]()
        programs[name]()
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            start = clock()
            programs[name]()
            seconds[name].append(clock() - start)
    return {name: _timing(times, seconds[reference]) for name, times in seconds.items()}


def _timing(times: list[float], reference: list[float]) -> Timing:
    ratios = [mine / theirs for mine, theirs in zip(times, reference, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Timing(1000 * statistics.median(times), statistics.median(times) / statistics.median(reference), low, high)


def cuda_clock() -> float:
    """The time once the device has done all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


class _FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up torch's own formulas.

    ``FlopCounterMode`` itself also follows modules, by hooks that autograd refuses inside of a backward.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def flops(program: Program) -> int:
    """Floating-point operations of matrix products and convolutions, by ``torch.utils.flop_counter``'s formulas.

    Of an eager program: compiled code does not show what it does.
    """
    with _FlopCount() as count:
        program()
    return int(count.total)


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


def page_faults(program: Program, repetitions: int = 9) -> int:
    """Pages that the system has to hand out anew in one run (median), since the allocator gave them back before."""
    counts = []
    for _ in range(repetitions):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        program()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return int(statistics.median(counts))


def keep_the_heap() -> None:
    """Start this script again with an allocator (glibc's) that gives no memory back, for all programs alike.

    By default glibc returns the top of the heap to the system whenever more is free than twice the largest block that
    it has seen. Whether a program crosses that line depends on its sizes, and on what else ran in the process.
    """
    settings = dict.fromkeys(("MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**30))
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})
