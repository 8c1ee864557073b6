"""Speed of one gradient against eager backprop of the same model in the same run.

python benchmarks/speed.py [--rounds 20] [--only a b c ResNet-18 GPT-2 50 compilation] [--torch2pc FILE] [--size 96]
python benchmarks/speed.py --device cuda       (the same in float32 and in bfloat16 autocast, and on a larger batch)

All programs of a case run in turn, in random order; a figure is the median over the rounds, divided by backprop's, with
the quartiles of the ratio. Before that they are held against each other: in double precision the eager ones against
the formulas of ``contenders.py``, here a compiled one against the eager one. "arithmetic" is the number of operations
that the wave front leaves, counted from the graph (``arithmetic.py``), over those of backprop; "counted" is what the
program really does, by torch's operation counter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from arithmetic import node_costs, strict_flops
from cases import CASES, Case, gpt2_case, residual_mlp_case, resnet18_case
from compilation import Compilation, compilations
from contenders import (
    COMPILED,
    CPU,
    ERRORS,
    EXACT,
    FIXED,
    FIXED_BLOCKS,
    FULL,
    LR,
    REFERENCE,
    SLOW_STRICT,
    STEPS,
    STRICT,
    Contender,
    Contest,
    DisagreementError,
    Setting,
)
from measure import Timing, cuda_clock, flops, interleaved
from peers import peer_programs
from reporting import arguments_of, save_json, table, this_machine
from speed_picture import draw
from torch import nn

DOUBLE = torch.float64
LIKE_BACKPROP = {"a": 1.5, "b": 1.15, "c": 1.15}
TARGETS: Mapping[str, Mapping[str, float]] = {  # multiples of backprop: at most, by program and case
    **{name + kind: LIKE_BACKPROP for name in (EXACT.name, FIXED.name) for kind in ("", COMPILED)},
    STRICT.name: {"a": 12.0, "b": 12.5, "c": 16.0},
    STRICT.name + COMPILED: {"a": 6.0, "b": 9.5, "c": 10.0},
    ERRORS.name + COMPILED: {"a": 7.5, "b": 12.5, "c": 13.5},
}


@dataclass(frozen=True)
class Part:
    """A table: the programs of one case, and what they are multiples of."""

    case: Case
    contenders: Sequence[Contender]
    compiled: bool = False
    peers: bool = False
    reference: str = REFERENCE
    targets: Mapping[str, float] = field(default_factory=dict)
    efficiency: float | None = None  # target of strict inference over its own arithmetic
    share: float = 1.0  # of the rounds, for what takes long


SMALL = tuple(
    Part(
        case,
        (EXACT, FIXED, STRICT, ERRORS),
        compiled=True,
        peers=True,
        targets={name: target[case.name] for name, target in TARGETS.items()},
    )
    for case in CASES
)
GPT = tuple(Part(gpt2_case(width), (SLOW_STRICT,), efficiency=1.15, share=0.25) for width in (256, 768))
LEVELS = Part(residual_mlp_case(), (STRICT, FULL), reference=FULL.name, targets={STRICT.name: 0.3})


def resnet_part(batch: int, size: int, efficiency: float) -> Part:
    targets = {EXACT.name: 1.3, FIXED_BLOCKS.name: 1.3}
    contenders = (EXACT, FIXED_BLOCKS, SLOW_STRICT)
    return Part(resnet18_case(batch, size), contenders, targets=targets, efficiency=efficiency, share=0.5)


def parts_of(arguments: argparse.Namespace) -> tuple[Part, ...]:
    parts = (*SMALL, resnet_part(8, arguments.size, 1.15), *GPT, LEVELS)
    return (*parts, resnet_part(256, 224, 1.1)) if arguments.device == "cuda" else parts


@dataclass(frozen=True)
class Row:
    """One program on one case.

    Attributes:
        multiple: Of ``reference``'s time, with its quartiles ``low`` and ``high``.
        counted: Operations of the eager program, as a multiple of backprop's; None for what no counter sees.
        arithmetic: The same from the graph, for strict predictive coding; ``full`` without the wave front.
        efficiency: Time over arithmetic, both in multiples of backprop.
        difference: From the gradient that it is held against, relative.
    """

    case: str
    setting: str
    program: str
    reference: str
    milliseconds: float
    multiple: float
    low: float
    high: float
    target: float | None = None
    counted: float | None = None
    arithmetic: float | None = None
    full: float | None = None
    efficiency: float | None = None
    efficiency_target: float | None = None
    difference: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the targets are met."""
        wanted = ((self.multiple, self.target), (self.efficiency, self.efficiency_target))
        found = [value <= target for value, target in wanted if value is not None and target is not None]
        return "" if not found else "met" if all(found) else "missed"


def rows_of(part: Part, rounds: int, setting: Setting = CPU, torch2pc: Path | None = None) -> list[Row]:
    """Check, then measure."""
    differences = _differences_in_double(part, setting)
    contest = Contest(part.case, part.contenders, part.compiled, setting)
    differences |= contest.checked()
    programs = dict(contest.programs)
    if part.peers and setting == CPU:
        assert isinstance(contest.net, nn.Sequential)
        for name, peer in peer_programs(contest.net, contest.x, contest.y, STEPS, LR, torch2pc).items():
            differences[name] = peer.disagreement()
            if not differences[name] <= setting.tolerance:
                raise DisagreementError(f"{part.case.name}: {name} is off by {differences[name]:.1e}")
            programs[name] = peer.run
    clock = cuda_clock if setting.device == "cuda" else time.perf_counter
    timings = interleaved(programs, part.reference, rounds, clock)
    operations = Operations.of(contest)
    return [_row(part, contest, name, timings, operations, differences) for name in programs]


def _differences_in_double(part: Part, setting: Setting) -> dict[str, float]:
    """From the formulas: in single precision rounding would hide whether a program is the right one."""
    return Contest(part.case, part.contenders, False, Setting(setting.device, DOUBLE)).checked() if part.peers else {}


@dataclass(frozen=True)
class Operations:
    """Floating-point operations as multiples of backprop's: of each eager program, and of strict inference."""

    counted: Mapping[str, float]
    arithmetic: float
    full: float

    @staticmethod
    def of(contest: Contest) -> Operations:
        counted = {REFERENCE: contest.programs[REFERENCE]} | {name: contest.programs[name] for name in contest.models}
        numbers = {name: flops(program) for name, program in counted.items()}
        backprop = numbers[REFERENCE]
        model = contest.models[next(name for name in contest.models if name != FIXED_BLOCKS.name)]
        graph, costs = model.graph, node_costs(model, contest.x)
        arithmetic, full = (strict_flops(graph, costs, STEPS, wave_front) / backprop for wave_front in (True, False))
        return Operations({name: number / backprop for name, number in numbers.items()}, arithmetic, full)


def _row(
    part: Part,
    contest: Contest,
    name: str,
    timings: Mapping[str, Timing],
    operations: Operations,
    differences: Mapping[str, float],
) -> Row:
    timing = timings[name]
    strict = name.removesuffix(COMPILED) == STRICT.name
    of_backprop = timing.milliseconds / timings[REFERENCE].milliseconds
    return Row(
        part.case.name,
        str(contest.setting),
        name,
        part.reference,
        timing.milliseconds,
        timing.ratio,
        timing.low,
        timing.high,
        target=part.targets.get(name),
        counted=operations.counted.get(name.removesuffix(COMPILED)),
        arithmetic=operations.arithmetic if strict else None,
        full=operations.full if strict else None,
        efficiency=of_backprop / operations.arithmetic if strict else None,
        efficiency_target=part.efficiency if strict else None,
        difference=differences.get(name),
        note=contest.notes.get(name, ""),
    )


# what is printed ------------------------------------------------------------------------------------------------------


def speed_table(rows: Sequence[Row]) -> str:
    header = ["case", "program", "ms", "times", "of", "quartiles", "at most", "counted operations", "arithmetic"]
    header += ["without the wave front", "time / arithmetic", "at most", "", "difference", "note"]
    lines = []
    for r in rows:
        quartiles = f"{r.low:.2f} to {r.high:.2f}"
        numbers = (r.counted, r.arithmetic, r.full, r.efficiency)
        operations = ["" if number is None else f"{number:.2f}" for number in numbers]
        difference = "" if r.difference is None else f"{r.difference:.0e}"
        times = [f"{r.milliseconds:.2f}", f"{r.multiple:.2f}", r.reference, quartiles, r.target]
        lines.append([r.case, r.program, *times, *operations, r.efficiency_target, r.verdict, difference, r.note])
    return table(header, lines)


def readme_table(rows: Sequence[Row]) -> str:
    """The rows of the README: eager and compiled, with quartiles, by case."""
    names = [EXACT.name, FIXED.name, STRICT.name, ERRORS.name]
    header = ["", EXACT.name, "FixedPrediction, any steps", "PredictiveCoding, 20 steps", "ErrorDescent, 20 steps"]
    lines = []
    for case in CASES:
        by_name = {row.program: row for row in rows if row.case == case.name}
        if by_name:
            cells = [_readme_cell(by_name, name) for name in names]
            arithmetic = f"{by_name[STRICT.name].arithmetic:.1f}"
            lines.append([f"({case.name}) {case.description}", *cells, arithmetic])
    return table([*header, "arithmetic of PredictiveCoding"], lines)


def _readme_cell(by_name: Mapping[str, Row], name: str) -> str:
    kinds = [by_name[name], by_name[name + COMPILED]]
    return " / ".join(f"{row.multiple:.2f} ({row.low:.2f} to {row.high:.2f})" for row in kinds)


def compilation_table(found: Sequence[Compilation]) -> str:
    header = ["program", "s until compiled", "at most", "", "slowest call, s", "a call after that, ms", "note"]
    rows = [
        [c.program, f"{c.seconds:.1f}", c.target, c.verdict, f"{c.slowest:.1f}", f"{1000 * c.steady:.1f}", c.note]
        for c in found
    ]
    return table(header, rows)


def measured(arguments: argparse.Namespace) -> tuple[list[Row], list[Compilation]]:
    rows: list[Row] = []
    on_cuda = arguments.device == "cuda"
    settings = [Setting("cuda"), Setting("cuda", autocast=torch.bfloat16)] if on_cuda else [CPU]
    for part in parts_of(arguments):
        if arguments.only and not part.case.name.startswith(tuple(arguments.only)):
            continue
        for setting in settings:
            print(f"{part.case.name}: {part.case.description}, {setting}", flush=True)
            rounds = max(3, round(part.share * arguments.rounds))
            rows += rows_of(part, rounds, setting, arguments.torch2pc)
    wanted = not on_cuda and (not arguments.only or "compilation" in arguments.only)
    return rows, compilations(arguments.threads) if wanted else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[], help="cases, by the start of their name; compilation")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", type=int, default=96, help="height and width of ResNet-18's images")
    parser.add_argument("--torch2pc", type=Path, help="Torch2PC's file, TorchSeq2PC.py")
    arguments = arguments_of(parser, threads=2)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing measured on CUDA")
        return
    if arguments.quick:
        arguments.rounds = 3
    start = time.perf_counter()
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    rows, compiled = measured(arguments)
    name = "speed" if arguments.device == "cpu" else "speed_cuda"
    save_json(arguments.out / f"{name}.json", device=device, rounds=arguments.rounds, rows=rows, compilations=compiled)
    print(f"{this_machine()}, {device}; {arguments.rounds} rounds, {(time.perf_counter() - start) / 60:.1f} minutes\n")
    print(speed_table(rows) + "\n")
    if compiled:
        print(compilation_table(compiled) + "\n")
    if any(row.case in {case.name for case in CASES} for row in rows) and arguments.device == "cpu":
        print("For the README (eager / compiled):\n\n" + readme_table(rows) + "\n")
    if rows:
        draw(rows, arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
