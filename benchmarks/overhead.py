"""What the library adds to one forward and one gradient of a network, and how long a conversion takes.

python benchmarks/overhead.py [--rounds 20] [--size 96] [--keep-heap] [--cpu-time] [--json overhead.json]

A forward is the module's own, watched and cut at the nodes. ``Backprop()`` attached is autograd through the graph of
nodes: what it costs above the plain module is that the nodes are evaluated once more, and the wrapper's own share.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case, gpt2, gpt2_case, resnet18, resnet50
from contenders import gradient
from measure import interleaved, keep_the_heap, page_faults
from torch import Tensor, nn

import torch2ebm

ALGORITHMS = {
    "Backprop": torch2ebm.Backprop(),
    "ZeroDivergence": torch2ebm.ZeroDivergence(),
    "FixedPrediction": torch2ebm.FixedPrediction(20, 0.1),
}
TARGETS = {
    "convert ResNet-18": "",
    "convert ResNet-50": "below 5 s",
    "convert GPT-2, 12 layers": "below 20 s",
}
FORWARD = {"a": "below 1.15"}  # of the plain forward; below 1.05 for all else
GRADIENT = {"a": "below 1.3"}  # of backprop, with ZeroDivergence


CONVERSIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "convert ResNet-18": (resnet18, lambda: torch.randn(2, 3, 96, 96)),
    "convert ResNet-50": (resnet50, lambda: torch.randn(2, 3, 96, 96)),
    "convert GPT-2, 12 layers": (gpt2, lambda: {"input_ids": torch.randint(0, 1000, (2, 32))}),
}


def conversions(repetitions: int, clock: Callable[[], float]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, (build, example) in CONVERSIONS.items():
        row: dict[str, object] = {"program": name, "target": TARGETS[name]}
        try:
            module = build()
        except ImportError as error:
            rows.append({**row, "left out": str(error)})
            continue
        seconds = []
        for _ in range(repetitions):
            inputs, start = example(), clock()
            model = torch2ebm.convert(module, example_inputs=inputs)
            seconds.append(clock() - start)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        rows.append({**row, "s": round(statistics.median(seconds), 2), "spread": spread, "nodes": len(model.nodes)})
    return rows


def forwards(case: Case, rounds: int, clock: Callable[[], float]) -> list[dict[str, object]]:
    """One forward with an algorithm attached, as a multiple of the plain module's in the same run."""
    net = case.build()
    x, _ = case.batch()
    programs: dict[str, Callable[[], object]] = {"plain forward": lambda: net(x)}
    for name, algorithm in {**ALGORITHMS, "PredictiveCoding": torch2ebm.PredictiveCoding()}.items():
        if name == "Backprop":
            continue
        model = torch2ebm.convert(case.build())
        net_of_model = model.torch2ebm.module
        sgd = torch.optim.SGD(net_of_model.parameters(), lr=0.1)
        kept = torch2ebm.EnergyOptimizer(sgd, model, algorithm)
        for _ in range(3):  # captured, cut for the first time and held against the nodes, then as ever
            model(x)
        programs[f"forward, {name}"] = lambda model=model, kept=kept: model(x)
    return [
        {
            "program": name,
            "case": case.name,
            "ms": round(timing.milliseconds, 3),
            "multiple": round(timing.ratio, 3),
            "quartiles": (round(timing.low, 3), round(timing.high, 3)),
            "target": "" if name == "plain forward" else FORWARD.get(case.name, "below 1.05"),
        }
        for name, timing in interleaved(programs, "plain forward", rounds, clock).items()
    ]


def steps(case: Case, rounds: int, clock: Callable[[], float]) -> list[dict[str, object]]:
    """One gradient with each algorithm, as a multiple of the plain module's in the same run."""
    net = case.build()
    x, y = case.batch()
    programs = {"plain module": gradient(net, x, y, case.loss)}
    nodes = 0
    for name, algorithm in ALGORITHMS.items():
        model = torch2ebm.convert(net)
        torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
        model(x)
        programs[name] = gradient(model, x, y, case.loss)
        nodes = len(model.nodes)
    _check(net, programs["plain module"], programs["ZeroDivergence"])
    timings = interleaved(programs, "plain module", rounds, clock)
    return [
        {
            "program": name,
            "case": case.name,
            "nodes": nodes,
            "ms": round(timing.milliseconds, 2),
            "multiple": round(timing.ratio, 3),
            "quartiles": (round(timing.low, 3), round(timing.high, 3)),
            "page faults": page_faults(programs[name]),
            "target": GRADIENT.get(case.name, "below 1.05") if name == "ZeroDivergence" else "",
        }
        for name, timing in timings.items()
    ]


def _check(net: nn.Module, plain: Callable[[], object], exact: Callable[[], object]) -> None:
    """The compared programs compute the same gradient."""

    def found(program: Callable[[], object]) -> list[Tensor]:
        program()
        return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]

    for ours, theirs in zip(found(exact), found(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def table(rows: Sequence[dict[str, object]]) -> str:
    header = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in header) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", type=int, default=96, help="height and width of the images")
    parser.add_argument("--conversions", type=int, default=3, help="conversions of each model; 0 for none")
    parser.add_argument("--keep-heap", action="store_true", help="an allocator that gives no memory back")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread, where others use the machine")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if arguments.keep_heap:
        keep_the_heap()
    threads = 1 if arguments.cpu_time else 2
    torch.set_num_threads(threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    heap = "kept" if arguments.keep_heap else "as glibc likes"
    print(f"torch {torch.__version__}, {platform.machine()}, {threads} threads, float32, {clock.__name__}, heap {heap}")
    size = arguments.size
    cases = [CASES[0], Case(f"ResNet-18, 8x3x{size}x{size}", "", resnet18, (8, 3, size, size)), gpt2_case()]
    results = []
    if arguments.conversions:
        results = conversions(arguments.conversions, clock)
        print(table(results) + "\n")
    for case in cases:
        rounds = arguments.rounds * (10 if case is CASES[0] else 1)
        try:
            found = [forwards(case, rounds, clock), steps(case, rounds, clock)]
        except ImportError as error:
            print(f"{case.name} is left out: {error}")
            continue
        for rows in found:
            print(table(rows) + "\n")
            results += rows
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
