"""Peak memory of one gradient above eager backprop's, in copies of the model's values.

python benchmarks/memory.py [--only b c ResNet-18] [--size 96] [--compile-all]

A copy is what the values of all hidden nodes take together. A peak is the most that a program has allocated at one
time, what it keeps from one call to the next included, parameters and their gradients not (all programs share them).
ResNet-18 is compiled with ``--compile-all`` only: its step has thousands of operations, and takes minutes to compile.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cases import CASES, Case, resnet18_case
from contenders import (
    COMPILED,
    ERRORS,
    EXACT,
    REFERENCE,
    SLOW_ERRORS,
    SLOW_STRICT,
    STRICT,
    Contender,
    Contest,
)
from measure import Program, peak_bytes
from reporting import arguments_of, save_json, table, this_machine
from torch import Tensor

import torch2ebm
from torch2ebm.equilibrium.dynamics import Equilibrium
from torch2ebm.equilibrium.hopfield import HopfieldGraph
from torch2ebm.errors import NotSettledWarning
from torch2ebm.reports.figures import PALETTE, new_figure, save

if TYPE_CHECKING:
    from pathlib import Path

TARGET = 2.0  # copies
EQUILIBRIUM = Contender(
    "EquilibriumPropagation",
    lambda **o: torch2ebm.EquilibriumPropagation(torch2ebm.Symmetric(0.5), 15, 8, feedback=0.2, **o),
)

AT_MOST = (STRICT.name, SLOW_STRICT.name, EQUILIBRIUM.name)  # whose target it is


@dataclass(frozen=True)
class Part:
    """One case, and what is measured on it."""

    case: Case
    contenders: Sequence[Contender]
    compiled: bool = True


SMALL = [Part(case, (EXACT, STRICT, ERRORS, EQUILIBRIUM)) for case in CASES[1:]]


def resnet_part(size: int, compiled: bool) -> Part:
    return Part(resnet18_case(8, size), (EXACT, SLOW_STRICT, SLOW_ERRORS, EQUILIBRIUM), compiled)


@dataclass(frozen=True)
class Row:
    """One program: its peak, and how far that is above backprop's in copies of the values."""

    case: str
    program: str
    peak: int | None
    copies: float | None
    target: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.copies is None or self.target is None:
            return ""
        return "met" if self.copies <= self.target else "missed"


def rows_of(part: Part) -> list[Row]:
    """Backprop first."""
    plain = Contest(part.case, [], part.compiled)
    backprop = peak_bytes(plain.programs[REFERENCE])
    copy = bytes_of_values(plain)
    rows = [Row(part.case.name, REFERENCE, backprop, 0.0, note=f"a copy of the values is {copy / 2**20:.2f} MiB")]
    for contender in part.contenders:
        try:
            contest = Contest(part.case, [contender], part.compiled)
            contest.warmed_up()
        except torch2ebm.errors.Torch2EBMError as error:
            rows.append(Row(part.case.name, contender.name, None, None, note=f"left out: {type(error).__name__}"))
            continue
        wanted = [contender.name, *([contender.name + COMPILED] if part.compiled else [])]
        own = f"a copy of its states is {bytes_of_states(contest) / 2**20:.2f} MiB" if contender is EQUILIBRIUM else ""
        rows += [
            _row(part, name, contest.programs[name], backprop, copy, contest.notes.get(name, own)) for name in wanted
        ]
    return rows


def _row(part: Part, name: str, program: Program, backprop: int, copy: int, note: str) -> Row:
    peak = peak_bytes(program)
    target = TARGET if name.removesuffix(COMPILED) in AT_MOST else None
    return Row(part.case.name, name, peak, (peak - backprop) / copy, target, note)


def bytes_of_values(contest: Contest) -> int:
    """One copy of the values of a case."""
    call = torch2ebm.convert(contest.net).torch2ebm.new_call((contest.x,), {})
    call.feedforward(keep_graph=False)
    values: list[Tensor] = [call.values[slot] for node in call.graph.hidden_nodes for slot in node.slots]
    return sum(value.nbytes for value in values)


def bytes_of_states(contest: Contest) -> int:
    """One copy of an equilibrium's states, which stand before each pooling and not after it."""
    call = torch2ebm.convert(contest.net, "activation").torch2ebm.new_call((contest.x,), {})
    call.feedforward(keep_graph=False)
    return sum(state.nbytes for state in Equilibrium(call, HopfieldGraph(call.graph), 1.0).states.values())


def memory_table(rows: Sequence[Row]) -> str:
    header = ["case", "program", "peak, MiB", "copies of the values above backprop", "at most", "", "note"]
    lines = []
    for r in rows:
        numbers = ["" if r.peak is None else f"{r.peak / 2**20:.2f}", "" if r.copies is None else f"{r.copies:.2f}"]
        lines.append([r.case, r.program, *numbers, r.target, r.verdict, r.note])
    return table(header, lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel a case, a bar a program, the target as a line."""
    cases = list(dict.fromkeys(row.case for row in rows))
    figure = new_figure(4.6 * len(cases), 3.0)
    for case, axes in zip(cases, figure.subplots(1, len(cases), squeeze=False).flat, strict=True):
        found = [row for row in rows if row.case == case and row.copies is not None and row.program != REFERENCE]
        names = [row.program for row in found]
        for compiled, label in ((False, "torch2ebm, eager"), (True, "torch2ebm, compile=True")):
            copies = [row.copies if row.program.endswith(COMPILED) == compiled else 0.0 for row in found]
            axes.barh(names, copies, color=PALETTE[2 if compiled else 0], height=0.7, label=label)
        axes.axvline(TARGET, color=PALETTE[1], linewidth=2, label="at most (target)")
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=7)
        axes.set_title(case, fontsize=10)
        axes.set_xlabel("peak above backprop [copies of the values]", fontsize=8)
        axes.grid(alpha=0.3, axis="x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    save(figure, str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="cases, by the start of their name")
    parser.add_argument("--size", type=int, default=96, help="height and width of ResNet-18's images")
    parser.add_argument("--compile-all", action="store_true", help="ResNet-18 too")
    arguments = arguments_of(parser, threads=2)
    start = time.perf_counter()
    rows: list[Row] = []
    for part in (*SMALL, resnet_part(arguments.size, arguments.compile_all)):
        if not arguments.only or part.case.name.startswith(tuple(arguments.only)):
            print(f"{part.case.name}: {part.case.description}", flush=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotSettledWarning)  # few steps take the memory of many
                rows += rows_of(part)
    save_json(arguments.out / "memory.json", rows=rows)
    print(f"{this_machine()}; {(time.perf_counter() - start) / 60:.1f} minutes\n")
    print(memory_table(rows))
    draw(rows, arguments.out / "memory.png")


if __name__ == "__main__":
    main()
