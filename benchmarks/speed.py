"""Speed and memory of one gradient against eager backprop of the same model in the same run.

python benchmarks/speed.py [--rounds 30] [--cases a b c]
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import CASES, Case
from measure import Program, interleaved, peak_bytes
from torch import Tensor, nn
from torch.nn import functional as F

import torch2ebm
from torch2ebm.state import Call

STEPS = 20
TARGETS = {  # multiples of backprop: at most, by case
    "ZeroDivergence": {"a": 1.5, "b": 1.15, "c": 1.15},
    "FixedPrediction": {"a": 1.5, "b": 1.15, "c": 1.15},
    "one inference step": {"b": 0.85, "c": 0.85},
}
ALGORITHMS = {
    "ZeroDivergence": torch2ebm.ZeroDivergence(),
    "FixedPrediction": torch2ebm.FixedPrediction(STEPS, 0.1),
    "PredictiveCoding": torch2ebm.PredictiveCoding(STEPS, 0.1),
}


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Program:
    def program() -> list[Tensor | None]:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        return [parameter.grad for parameter in model.parameters()]

    return program


def programs(case: Case) -> dict[str, Program]:
    """The same model in each: the module itself, and one converted model an algorithm."""
    net = case.build()
    x, y = case.batch()
    found: dict[str, Program] = {"backprop": gradient(net, x, y)}
    for name, algorithm in ALGORITHMS.items():
        model = torch2ebm.convert(net)
        torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
        found[name] = gradient(model, x, y)
    return found


def value_bytes(case: Case) -> int:
    """One copy of the values of a case."""
    x, _ = case.batch()
    graph = torch2ebm.convert(case.build(), example_inputs=x).graph
    call = Call(graph, [x])
    call.feedforward(keep_graph=False)
    return sum(call.values[slot].nbytes for node in graph.hidden_nodes for slot in node.slots)


def check(found: dict[str, Program]) -> None:
    """The compared programs do the work that they are compared for."""
    reference = [g.clone() for g in found["backprop"]() if g is not None]  # type: ignore[union-attr]
    exact = [g.clone() for g in found["ZeroDivergence"]() if g is not None]  # type: ignore[union-attr]
    for ours, theirs in zip(exact, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def rows(case: Case, rounds: int) -> list[dict[str, object]]:
    found = programs(case)
    check(found)
    timings = interleaved(found, "backprop", rounds)
    peaks = {name: peak_bytes(program) for name, program in found.items()}
    copy = value_bytes(case)
    result: list[dict[str, object]] = []
    for name, timing in timings.items():
        extra = (peaks[name] - peaks["backprop"]) / copy
        result.append(
            {
                "case": case.name,
                "program": name,
                "ms": round(timing.milliseconds, 2),
                "multiple": round(timing.ratio, 2),
                "quartiles": (round(timing.low, 2), round(timing.high, 2)),
                "peak MiB": round(peaks[name] / 2**20, 2),
                "copies of the values above backprop": round(extra, 2),
                "target": TARGETS.get(name, {}).get(case.name),
            }
        )
    step = (timings["PredictiveCoding"].ratio - 1) / STEPS
    target = TARGETS["one inference step"].get(case.name)
    result.append({"case": case.name, "program": "one inference step", "multiple": round(step, 3), "target": target})
    return result


def table(results: Sequence[dict[str, object]]) -> str:
    header = [
        "case",
        "program",
        "ms",
        "multiple",
        "quartiles",
        "target",
        "peak MiB",
        "copies of the values above backprop",
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in results:
        cells = [row.get(name) for name in header]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cases", nargs="*", default=[case.name for case in CASES])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(f"torch {torch.__version__}, {platform.machine()}, 2 threads, float32, {arguments.rounds} rounds")
    results = [row for case in CASES if case.name in arguments.cases for row in rows(case, arguments.rounds)]
    for case in CASES:
        print(f"({case.name}) {case.description}")
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
