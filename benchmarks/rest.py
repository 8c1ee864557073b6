"""Time to rest at depth 20: torch2ebm's relaxations beside those of PCX, JPC and FabricPC, on the same weights.

``python benchmarks/rest.py [--depth 20] [--width 64] [--batch 16] [--json FILE] [words]``

A chain of tanh layers with orthogonal weights, half the squared error of one-hot targets, one energy for all. A
relaxation is at rest where |dF/dv| is at most 1e-2 of |e| over all hidden values, and F is within 1% of the
equilibrium's. An oracle in double precision that knows no library judges both from the values alone. Each setting is
given the fewest steps that do, within a few percent, and the fastest setting of each contender counts. Programs are
compiled before they are timed. The times of torch2ebm include the forward pass and the gradients of all parameters;
those of the others are relaxations alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from peers_at_rest import Making, NotInstalledError, Relaxing, fabric, jpc, pcx, torch_values
from torch import Tensor, nn

import torch2ebm
from torch2ebm.programs.program import Program

RESIDUAL, CLOSE = 1e-2, 1e-2
MOST_SECONDS = 20.0  # of one relaxation, after which a setting is given up
WARMING, REPEATS = 3, 5


@dataclass(frozen=True)
class Case:
    """A chain, and a batch."""

    layers: Sequence[nn.Linear]
    x: Tensor
    y: Tensor

    @staticmethod
    def of(depth: int, width: int = 64, batch: int = 16, seed: int = 0) -> Case:
        torch.manual_seed(seed)
        layers = [nn.Linear(width, width if i < depth - 1 else 10) for i in range(depth)]
        for layer in layers:
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)
        return Case(layers, torch.randn(batch, width), torch.eye(10)[torch.arange(batch) % 10])

    @property
    def net(self) -> nn.Sequential:
        parts = [part for layer in self.layers[:-1] for part in (layer, nn.Tanh())]
        return nn.Sequential(*parts, self.layers[-1])

    def judged(self, values: Sequence[Tensor]) -> tuple[float, float]:
        """F, and |dF/dv| over |e|, by autograd in double precision."""
        hidden = [value.double().requires_grad_() for value in values]
        below = [self.x.double(), *hidden]
        errors = []
        for i, layer in enumerate(self.layers):
            prediction = nn.functional.linear(below[i], layer.weight.double(), layer.bias.double())
            errors.append(hidden[i] - prediction.tanh() if i < len(hidden) else self.y.double() - prediction)
        energy = sum((0.5 * error.square().sum() for error in errors), torch.zeros(()))
        gradients = torch.autograd.grad(energy, hidden)
        size = math.sqrt(sum(float(error.detach().square().sum()) for error in errors[:-1]))
        return float(energy.detach()), math.sqrt(sum(float(g.square().sum()) for g in gradients)) / max(size, 1e-300)


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum(1).mean()


EAGER, RECORDED, COMPILED = "eager", "recorded", "compiled"


def ours(solver: Callable[[int], torch2ebm.Solver], form: str = EAGER) -> Making:  # type: ignore[type-arg]
    """Forward, relaxation and the gradients of all parameters.

    The fewest steps are looked for by eager steps, and the form is timed at these: a program is made for each number.
    Recorded: the list of ATen calls that ``compile=True`` makes, without torch's compiler.
    """

    def make(layers: Sequence[nn.Linear], x: Tensor, y: Tensor) -> Relaxing:
        net = Case(layers, x, y).net
        model = torch2ebm.convert(net, example_inputs=x)
        nodes = [node.name for node in model.graph.hidden_nodes]
        algorithms: dict[tuple[int, str], torch2ebm.Algorithm] = {}

        def until(steps: int, form: str = EAGER) -> torch2ebm.InferenceState:
            if (steps, form) not in algorithms:  # an algorithm keeps its programs
                algorithms[steps, form] = torch2ebm.PredictiveCoding(solver=solver(steps), compile=form != EAGER)
            model.detach()
            model.attach(algorithms[steps, form])
            uncompiled = mock.patch.object(Program, "compile", return_value=None)
            with uncompiled if form == RECORDED else nullcontext():
                half_squared_error(model(x), y).backward()
            return model.state

        def values(state: torch2ebm.InferenceState) -> list[np.ndarray]:
            return [state.value[name].numpy() for name in nodes]

        return Relaxing(until, values, timed=lambda steps: until(steps, form))

    return make


SOLVERS: dict[str, dict[str, Callable[[int], torch2ebm.Solver]]] = {  # type: ignore[type-arg]
    "ErrorConjugateGradient": {"": lambda n: torch2ebm.ErrorConjugateGradient(1e-9, n)},
    "ErrorDescent": {f"lr {lr}": lambda n, lr=lr: torch2ebm.ErrorDescent(n, lr) for lr in (0.1, 0.3, 0.5)},  # type: ignore[misc]
    "GradientDescent": {f"lr {lr}": lambda n, lr=lr: torch2ebm.GradientDescent(n, lr) for lr in (0.3, 0.45)},  # type: ignore[misc]
    "Momentum": {f"lr 0.3, {m}": lambda n, m=m: torch2ebm.Momentum(n, 0.3, m) for m in (0.8, 0.9)},  # type: ignore[misc]
}
CONTENDERS: dict[str, list[tuple[str, Making]]] = {
    **{
        f"torch2ebm, {name}, {form}": [(setting, ours(make, form)) for setting, make in settings.items()]
        for name, settings in SOLVERS.items()
        for form in (EAGER, RECORDED, COMPILED)
    },
    "PCX": [(f"lr {lr}", pcx(lr)) for lr in (0.3, 0.45)],
    "JPC, Heun, adaptive": [(f"tolerance {tol:g}", jpc(tolerance=tol)) for tol in (1e-3, 1e-4, 1e-5)],
    "JPC, Heun, constant": [(f"dt {dt}", jpc(dt)) for dt in (0.3, 0.45)],
    "FabricPC, values": [(f"lr {lr}", fabric(lr)) for lr in (0.3, 0.45)],
    "FabricPC, errors": [(f"lr {lr}", fabric(lr, errors=True)) for lr in (0.1, 0.3, 0.5)],
}


@dataclass(frozen=True)
class Result:
    """The fewest steps, or the time of a flow, and how long they take."""

    contender: str
    setting: str
    steps: int
    milliseconds: float
    energy: float
    residual: float


def measured(name: str, setting: str, relaxing: Relaxing, case: Case, equilibrium: float) -> Result | None:
    """None where it does not come to rest in time."""
    known: dict[int, tuple[float, float]] = {}

    def rests(steps: int) -> bool:
        known[steps] = case.judged(torch_values(relaxing.values(relaxing.until(steps))))
        energy, residual = known[steps]
        return residual <= RESIDUAL and abs(energy - equilibrium) <= CLOSE * equilibrium

    steps = 1
    while not rests(steps):
        begun = time.perf_counter()
        relaxing.until(steps)
        if time.perf_counter() - begun > MOST_SECONDS / 2 or steps > 2**12 or not math.isfinite(known[steps][0]):
            print(
                f"{name} {setting}: residual {min(residual for _, residual in known.values()):.3g} at best", flush=True
            )
            return None
        steps *= 2
    low, high = steps // 2, steps
    while high - low > max(1, high // 20):
        middle = (low + high) // 2
        low, high = (low, middle) if rests(middle) else (middle, high)
    run = relaxing.timed or relaxing.until
    for _ in range(WARMING):  # the first times record and compile
        known[high] = case.judged(torch_values(relaxing.values(run(high))))
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        run(high)
        times.append(time.perf_counter() - begun)
    return Result(name, setting, high, 1e3 * min(times), *known[high])


def equilibrium_of(case: Case) -> float:
    net = case.net.double()
    relaxing = ours(lambda n: torch2ebm.ErrorConjugateGradient(1e-9, n))(
        [part for part in net if isinstance(part, nn.Linear)], case.x.double(), case.y.double()
    )
    energy, residual = case.judged(torch_values(relaxing.values(relaxing.until(2000))))
    assert residual < 1e-4, f"no equilibrium: residual {residual}"
    net.float()
    return energy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("words", nargs="*", help="contenders alone that have one of these in their name")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    case = Case.of(chosen.depth, chosen.width, chosen.batch)
    equilibrium = equilibrium_of(case)
    print(f"depth {chosen.depth}: F at equilibrium {equilibrium:.6g}", flush=True)
    results: list[Result] = []
    for name, settings in CONTENDERS.items():
        if chosen.words and not any(word in name for word in chosen.words):
            continue
        found = []
        for setting, make in settings:
            try:
                result = measured(name, setting, make(case.layers, case.x, case.y), case, equilibrium)
            except (NotInstalledError, torch2ebm.errors.DivergenceError) as error:
                print(f"{name} {setting}: {str(error).splitlines()[0]}", flush=True)
                continue
            print(f"{name} {setting}: {result or 'not at rest'}", flush=True)
            found += [result] if result else []
        results += [min(found, key=lambda each: each.milliseconds)] if found else []
    for result in results:
        print(f"| {result.contender} | {result.setting} | {result.steps} | {result.milliseconds:.1f} |")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


if __name__ == "__main__":
    np.set_printoptions(precision=3)
    main()
