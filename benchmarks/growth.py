"""How the time of one gradient grows with width, depth, batch and steps: slopes on doubly logarithmic axes.

python benchmarks/growth.py [--rounds 7]

Tanh MLPs. One of the four numbers varies, the others stay. A slope of 1 is proportional growth; backprop's own is the
one to compare with, since small sizes are bound by calls and not by arithmetic.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cases import Case, mlp
from contenders import LR, REFERENCE, Contender, Contest
from measure import Program, interleaved
from reporting import arguments_of, save_json, table, this_machine
from torch import nn

import torch2ebm
from torch2ebm.reports.figures import MARKERS, PALETTE, new_figure, save


@dataclass(frozen=True)
class Size:
    """A chain of ``depth`` layers of one width, a batch, and the number of inference steps."""

    width: int = 256
    depth: int = 8
    batch: int = 64
    steps: int = 20

    def contest(self) -> Contest:
        widths = (self.width,) * self.depth
        case = Case(repr(self), "", lambda: mlp((*widths, 10), nn.Tanh), (self.batch, self.width))
        return Contest(case, self.contenders(), compiled=False)

    def contenders(self) -> list[Contender]:
        strict, errors = torch2ebm.GradientDescent(self.steps, LR), torch2ebm.ErrorDescent(self.steps, LR)
        return [
            Contender("ZeroDivergence", torch2ebm.ZeroDivergence),
            Contender("FixedPrediction", lambda: torch2ebm.FixedPrediction(self.steps, LR)),
            Contender("PredictiveCoding", lambda: torch2ebm.PredictiveCoding(solver=strict)),
            Contender("ErrorDescent", lambda: torch2ebm.PredictiveCoding(solver=errors)),
        ]


AXES: Mapping[str, tuple[int, ...]] = {
    "width": (128, 256, 512, 1024),
    "depth": (4, 8, 16, 32),
    "batch": (32, 64, 128, 256),
    "steps": (5, 10, 20, 40),
}
SMALL: Mapping[str, tuple[int, ...]] = {name: values[:2] for name, values in AXES.items()}


@dataclass(frozen=True)
class Growth:
    """Milliseconds of one program over one axis, and the slope of their logarithms."""

    axis: str
    program: str
    sizes: tuple[int, ...]
    milliseconds: tuple[float, ...]
    slope: float


def growth_of(axis: str, sizes: Sequence[int], rounds: int, base: Size | None = None) -> list[Growth]:
    """All programs at all sizes of one axis, in turn."""
    programs: dict[str, Program] = {}
    for size in sizes:
        contest = replace(base or Size(), **{axis: size}).contest()
        programs |= {f"{name} {size}": program for name, program in contest.programs.items()}
    timings = interleaved(programs, f"{REFERENCE} {sizes[0]}", rounds)
    found = []
    for name in dict.fromkeys(each.rsplit(" ", 1)[0] for each in programs):
        times = tuple(timings[f"{name} {size}"].milliseconds for size in sizes)
        found.append(Growth(axis, name, tuple(sizes), times, slope(sizes, times)))
    return found


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Of the straight line through the logarithms, by least squares."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(t) for t in times]).slope


def growth_table(found: Sequence[Growth]) -> str:
    axes = list(dict.fromkeys(each.axis for each in found))
    by_place = {(each.program, each.axis): each for each in found}
    lines = []
    for program in dict.fromkeys(each.program for each in found):
        cells = []
        for axis in axes:
            each = by_place[program, axis]
            cells.append(f"{each.slope:.2f} ({each.milliseconds[0]:.1f} to {each.milliseconds[-1]:.1f} ms)")
        lines.append([program, *cells])
    sizes = {each.axis: each.sizes for each in found}
    return table(["slope", *[f"{axis} {sizes[axis][0]} to {sizes[axis][-1]}" for axis in axes]], lines)


def draw(found: Sequence[Growth], path: Path) -> None:
    """A panel an axis."""
    axes_names = list(dict.fromkeys(each.axis for each in found))
    figure = new_figure(3.2 * len(axes_names), 4.4)
    panels = figure.subplots(1, len(axes_names), sharey=True, squeeze=False).flat
    for name, axes in zip(axes_names, panels, strict=True):
        for i, each in enumerate([each for each in found if each.axis == name]):
            style = {"color": PALETTE[i], "marker": MARKERS[i], "markersize": 5}
            axes.plot(each.sizes, each.milliseconds, label=f"{each.program}: {each.slope:.2f}", **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(each.sizes, [str(size) for size in each.sizes])
        axes.minorticks_off()
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, title="slope", title_fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.axes[0].set_ylabel("time of a gradient [ms]")
    save(figure, str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = arguments_of(parser, threads=2)
    start = time.perf_counter()
    found: list[Growth] = []
    for axis, sizes in (SMALL if arguments.quick else AXES).items():
        print(f"{axis}: {', '.join(map(str, sizes))}", flush=True)
        found += growth_of(axis, sizes, 2 if arguments.quick else arguments.rounds)
    save_json(arguments.out / "growth.json", rounds=arguments.rounds, base=Size(), growth=found)
    print(f"{this_machine()}; {Size()}; {(time.perf_counter() - start) / 60:.1f} minutes\n")
    print(growth_table(found))
    draw(found, arguments.out / "growth.png")


if __name__ == "__main__":
    main()
