"""Speed of equilibrium propagation against hand-written relaxations of the same net in the same run.

python benchmarks/equilibrium.py [--rounds 15] [--cpu-time] [--profile]

- "EP, symmetric": one gradient, free phase and two nudged phases included.
- "free phase + BPTT": the same free steps without a graph, then as many steps with one as a nudged phase has, and
  backprop through them. Written out for each net, its feedback by transposed matrices and convolutions.
- "EP step": what one more step of the free phase adds to it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from contenders import gradient
from measure import Program, interleaved, keep_the_heap
from torch import Tensor, nn
from torch.nn import functional as F

import torch2ebm

FREE, NUDGED, BETA = 20, 10, 0.5
TARGETS = {"EP, symmetric": 1.2, "EP step": 0.6}  # at most: of free phase + BPTT, of backprop (the MLP's)

States = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A net, and its synchronous step written out: ``step(net, drive of the first state, states)``."""

    name: str
    build: Callable[[], nn.Sequential]
    step: Callable[[nn.Sequential, Tensor, States], States]
    input_shape: tuple[int, ...]

    def batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(self.input_shape, generator=generator)
        return x, torch.randint(0, 10, self.input_shape[:1], generator=generator)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(784, 1024), nn.Hardsigmoid(), nn.Linear(1024, 512), nn.Hardsigmoid(), nn.Linear(512, 10)
    return nn.Sequential(*layers)


def mlp_step(net: nn.Sequential, below: Tensor, states: States) -> States:
    first, second, output = states
    middle, last = net[2], net[4]
    return (
        F.hardsigmoid(below + second @ middle.weight),
        F.hardsigmoid(F.linear(first, middle.weight, middle.bias) + output @ last.weight),
        F.linear(second, last.weight, last.bias),
    )


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.Hardsigmoid(), nn.AvgPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.Hardsigmoid(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(4096, 10)),
    )


def convolutions_step(net: nn.Sequential, below: Tensor, states: States) -> States:
    first, second, output = states
    middle, last = net[3], net[7]
    up = F.conv_transpose2d(second, middle.weight, padding=1)
    down = F.conv2d(F.avg_pool2d(first, 2), middle.weight, middle.bias, padding=1)
    feedback = (output @ last.weight).view(len(output), 64, 8, 8)
    return (
        F.hardsigmoid(below + _unpool(up)),
        F.hardsigmoid(down + _unpool(feedback)),
        F.linear(F.avg_pool2d(second, 2).flatten(1), last.weight, last.bias),
    )


def _unpool(message: Tensor) -> Tensor:
    """The transpose of an average over 2 by 2 pixels."""
    return F.interpolate(message, scale_factor=2) / 4


CASES = (
    Case("MLP 784-1024-512-10, batch 128", mlp, mlp_step, (128, 784)),
    Case("2 convolutions 32-64, 32x3x32x32", convolutions, convolutions_step, (32, 3, 32, 32)),
)


def feedforward(net: nn.Sequential, x: Tensor) -> tuple[Tensor, States]:
    """The pre-activation of the first state, and all states."""
    below, value, states = net[0](x), x, []
    for layer in net:
        value = layer(value)
        if isinstance(layer, nn.Hardsigmoid) or layer is net[-1]:
            states.append(value)
    return below, tuple(states)


def free_phase(case: Case, net: nn.Sequential, x: Tensor, steps: int) -> States:
    with torch.no_grad():
        below, states = feedforward(net, x)
        for _ in range(steps):
            states = case.step(net, below, states)
    return states


def bptt(case: Case, net: nn.Sequential, x: Tensor, y: Tensor) -> Program:
    def program() -> list[Tensor | None]:
        net.zero_grad()
        states = free_phase(case, net, x, FREE)
        below = net[0](x)
        for _ in range(NUDGED):
            states = case.step(net, below, states)
        F.cross_entropy(states[-1], y).backward()
        return [parameter.grad for parameter in net.parameters()]

    return program


def attached(net: nn.Module, algorithm: torch2ebm.algorithms.base.Algorithm) -> torch2ebm.EnergyModel:
    model = torch2ebm.convert(net)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
    return model


def propagation(free_steps: int, nudged_steps: int = NUDGED) -> torch2ebm.EquilibriumPropagation:
    return torch2ebm.EquilibriumPropagation(torch2ebm.Symmetric(BETA), free_steps, nudged_steps)


def rows(case: Case, rounds: int, clock: Callable[[], float]) -> list[dict[str, object]]:
    net = case.build()
    x, y = case.batch()
    model = attached(net, propagation(FREE))
    short, long = attached(net, propagation(FREE)), attached(net, propagation(3 * FREE))
    programs: dict[str, Program] = {
        "backprop": gradient(net, x, y),
        "free phase + BPTT": bptt(case, net, x, y),
        "EP, symmetric": gradient(model, x, y),
        "free phase": lambda: short(x),
        "free phase, 3 times as long": lambda: long(x),
        "hand-written free phase": lambda: free_phase(case, net, x, FREE),
    }
    agreement = check(case, net, model, programs, x)
    timings = interleaved(programs, "backprop", rounds, clock)
    found: list[dict[str, object]] = [
        {
            "case": case.name,
            "program": name,
            "ms": round(timing.milliseconds, 2),
            "of backprop": round(timing.ratio, 2),
            "quartiles": (round(timing.low, 2), round(timing.high, 2)),
        }
        for name, timing in timings.items()
    ]
    ratio = timings["EP, symmetric"].milliseconds / timings["free phase + BPTT"].milliseconds
    step = (timings["free phase, 3 times as long"].milliseconds - timings["free phase"].milliseconds) / (2 * FREE)
    by_hand = timings["hand-written free phase"].milliseconds / FREE
    found.append({"case": case.name, "program": "EP, symmetric / (free phase + BPTT)", "ratio": round(ratio, 3)})
    found[-1] |= {"target": TARGETS["EP, symmetric"], "cosine of their gradients": round(agreement, 4)}
    of_backprop = step / timings["backprop"].milliseconds
    target = TARGETS["EP step"] if case.step is mlp_step else None
    found.append(
        {"case": case.name, "program": "EP step / backprop", "ms": round(step, 3), "ratio": round(of_backprop, 3)}
    )
    found[-1]["target"] = target
    found.append({"case": case.name, "program": "EP step / hand-written step", "ratio": round(step / by_hand, 3)})
    return found


def check(case: Case, net: nn.Sequential, model: nn.Module, programs: dict[str, Program], x: Tensor) -> float:
    """The compared programs relax to the same output; the cosine of their gradients."""
    with torch.no_grad():
        torch.testing.assert_close(model(x), free_phase(case, net, x, FREE)[-1], rtol=1e-3, atol=1e-4)
    found = []
    for name in ("EP, symmetric", "free phase + BPTT"):
        programs[name]()
        found.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))  # type: ignore[union-attr]
    return float(F.cosine_similarity(found[0], found[1], dim=0))


def profile(case: Case) -> str:
    """Where the time of one gradient goes."""
    net = case.build()
    x, y = case.batch()
    program = gradient(attached(net, propagation(FREE)), x, y)
    program()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        program()
    return str(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=40))


def table(results: Sequence[dict[str, object]]) -> str:
    header = list(dict.fromkeys(name for row in results for name in row))
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in header) + " |" for row in results]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--keep-heap", action="store_true", help="an allocator that gives no memory back")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread, where others use the machine")
    parser.add_argument("--profile", action="store_true", help="where the time of one gradient goes, by operation")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if arguments.keep_heap:
        keep_the_heap()
    threads = 1 if arguments.cpu_time else 2
    torch.set_num_threads(threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, {platform.machine()}, {threads} threads, float32, {arguments.rounds} rounds")
    if arguments.profile:
        print("\n\n".join(profile(case) for case in CASES))
        return
    results = [row for case in CASES for row in rows(case, arguments.rounds, clock)]
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
