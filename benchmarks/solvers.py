"""Steps and time of every solver to the same residual, on chains of growing depth (Goemaere et al. 2025).

Tanh chains of width 64, orthogonal weights, ten classes, cross-entropy summed over the batch. A relaxation is done when
no entry of dF/dv, by the energy as it is written out here, exceeds a fraction of what it was at the feed-forward pass:
one measure for solvers of values and of errors. Each solver runs at the best of a small grid of settings. Results that
the JSON file holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from reporting import arguments_of, save_json, table, this_machine
from torch import Tensor, nn
from torch.nn import functional as F

import torch2ebm
from torch2ebm.inference.base import Inference
from torch2ebm.inference.error_inference import ErrorInference
from torch2ebm.inference.solver import Solver, ValueSolver
from torch2ebm.reports.figures import MARKERS, PALETTE, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, CLASSES, BATCH = 64, 10, 32
MOST_STEPS = {True: 10_000, False: 1_000}  # of solvers that move values, and of those that move errors
LEAST_SECONDS = 0.5  # that a time is the mean of

RATES = (0.3, 0.5, 0.7, 0.9, 1.0, 0.1, 0.03)

GRIDS: Mapping[str, Sequence[Solver[Any]]] = {
    "GradientDescent": [torch2ebm.GradientDescent(lr=lr) for lr in (0.7, 0.5, 0.3)],
    "Momentum": [
        torch2ebm.Momentum(lr=lr, momentum=momentum) for lr in (0.1, 0.3, 0.5) for momentum in (0.5, 0.8, 0.9, 0.95)
    ],
    "LocalErrorDescent": [torch2ebm.LocalErrorDescent(lr=lr) for lr in RATES],
    "ErrorDescent": [torch2ebm.ErrorDescent(lr=lr) for lr in RATES],
    "Anderson": [torch2ebm.AndersonErrorDescent(lr=lr, memory=memory) for lr in RATES for memory in (1, 2, 5)],
}


@dataclass(frozen=True)
class Problem:
    """A chain, a batch, and how small dF/dv is to become."""

    name: str
    gain: float = 1.0  # of the orthogonal weights
    fraction: float = 1e-3
    dtype: torch.dtype = torch.float32
    depths: tuple[int, ...] = (5, 10, 20, 50)
    solvers: tuple[str, ...] = ("LocalErrorDescent", "ErrorDescent", "Anderson")


PROBLEMS = (
    Problem("A5: to 1e-3", solvers=tuple(GRIDS)),
    Problem("to 1e-6, float64", fraction=1e-6, dtype=torch.float64),
    Problem("weights times 1.5, to 1e-3", gain=1.5, depths=(5, 10)),
)


@dataclass(frozen=True)
class Result:
    """The best setting of one solver on one problem; no steps where none of the grid got there."""

    problem: str
    depth: int
    solver: str
    setting: str
    steps: int | None
    milliseconds: float | None  # of one whole gradient
    multiple: float | None  # of backprop


class Chain:
    """The network of a problem, its batch, and its energy written out."""

    def __init__(self, problem: Problem, depth: int) -> None:
        torch.manual_seed(0)
        hidden = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(depth - 1)]
        self.net = nn.Sequential(*hidden, nn.Linear(WIDTH, CLASSES)).to(problem.dtype)
        for module in self.net.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, problem.gain)
                nn.init.zeros_(module.bias)
        self.x = torch.randn(BATCH, WIDTH, dtype=problem.dtype)
        self.y = torch.randint(CLASSES, (BATCH,))
        self.hidden, self.last = list(self.net)[:-1], self.net[-1]

    def values(self, inference: Inference) -> list[Tensor]:
        """All values as they are now; where errors move they follow from the errors."""
        slots = [node.slots[0] for node in inference.graph.hidden_nodes]
        if not isinstance(inference, ErrorInference):
            return [inference.values[slot] for slot in slots]
        values, below = [], self.x
        with torch.no_grad():
            for layer, slot in zip(self.hidden, slots, strict=True):
                below = layer(below) + inference.errors.get(slot, 0.0)
                values.append(below)
        return values

    def residual(self, values: Sequence[Tensor]) -> float:
        """Largest entry of dF/dv, F = sum_l |v_l - f_l(v_{l-1})|^2 / 2 + sum_b loss_b."""
        values = [value.detach().requires_grad_() for value in values]
        with torch.enable_grad():
            inputs = [self.x, *values]
            errors = [v - layer(below) for layer, below, v in zip(self.hidden, inputs, values, strict=False)]
            energy = F.cross_entropy(self.last(inputs[-1]), self.y, reduction="sum")
            energy = energy + sum(0.5 * error.square().sum() for error in errors)
        return max(float(gradient.abs().max()) for gradient in torch.autograd.grad(energy, values))

    def backward(self, model: nn.Module) -> None:
        model.zero_grad()
        F.cross_entropy(model(self.x), self.y, reduction="sum").backward()

    def learning_by(self, solver: Solver[Any]) -> nn.Module:
        model = torch2ebm.convert(self.net, nodes="children")
        algorithm = torch2ebm.PredictiveCoding(solver=solver, loss_reduction="sum")
        torch2ebm.EnergyOptimizer(torch.optim.SGD(self.net.parameters(), lr=0.1), model, algorithm)
        return model


class Done(Exception):  # noqa: N818
    """Leaves the relaxation: after that many steps, or because it will not get there."""

    def __init__(self, steps: int | None) -> None:
        self.steps = steps


@dataclass(frozen=True)
class Watched(Solver[Any]):
    """A solver under watch: after each step the residual is compared with that of the start."""

    solver: Solver[Any]
    chain: Chain
    fraction: float
    steps: int
    tol: float = 0.0

    def inference(self, *arguments: Any) -> Any:
        return self.solver.inference(*arguments)

    def with_steps(self, steps: int) -> Watched:
        return Watched(self.solver, self.chain, self.fraction, steps)

    def start(self, inference: Inference) -> tuple[Any, float, int]:
        return self.solver.start(inference), self.chain.residual(self.chain.values(inference)), 0

    def step(self, inference: Inference, state: tuple[Any, float, int]) -> tuple[Any, float, int]:
        inner, first, done = state
        inner = self.solver.step(inference, inner)
        residual = self.chain.residual(self.chain.values(inference))
        if residual <= self.fraction * first:
            raise Done(done + 1)
        if not residual < 1e4 * first:
            raise Done(None)
        return inner, first, done + 1


def steps_of(chain: Chain, solver: Solver[Any], fraction: float, most: int) -> int | None:
    """Steps to the residual; None where it diverges or takes more than ``most``."""
    try:
        chain.backward(chain.learning_by(Watched(solver, chain, fraction, most)))
    except Done as done:
        return done.steps
    except torch2ebm.errors.NumericalError:
        return None
    return None


def best_of(chain: Chain, grid: Iterable[Solver[Any]], fraction: float) -> tuple[Solver[Any], int] | None:
    best: tuple[Solver[Any], int] | None = None
    for solver in grid:
        most = MOST_STEPS[isinstance(solver, ValueSolver)] if best is None else best[1] - 1
        steps = steps_of(chain, solver, fraction, most)
        if steps is not None:
            best = solver.with_steps(steps), steps
    return best


def seconds_of(chain: Chain, model: nn.Module) -> float:
    """Processor time of one gradient: with one thread the wall time of a machine that does nothing else."""
    with torch.no_grad():
        model(chain.x)  # captures the graph
    runs, start = 0, time.process_time()
    while time.process_time() - start < LEAST_SECONDS:
        chain.backward(model)
        runs += 1
    return (time.process_time() - start) / runs


def results_of(problem: Problem, depth: int) -> list[Result]:
    chain = Chain(problem, depth)
    backprop = seconds_of(chain, chain.net)
    results = []
    for name in problem.solvers:
        found = best_of(chain, GRIDS[name], problem.fraction)
        if found is None:
            results.append(Result(problem.name, depth, name, "", None, None, None))
        else:
            solver, steps = found
            seconds = seconds_of(chain, chain.learning_by(solver))
            results.append(
                Result(problem.name, depth, name, setting(solver), steps, 1000 * seconds, seconds / backprop)
            )
        print(f"  {results[-1]}", flush=True)
    return results


def setting(solver: Solver[Any]) -> str:
    numbers = {name: getattr(solver, name, None) for name in ("lr", "momentum", "memory")}
    return ", ".join(f"{name} {number:g}" for name, number in numbers.items() if number is not None)


def result_table(results: Sequence[Result]) -> str:
    rows: list[tuple[object, ...]] = []
    for r in results:
        place = (r.problem, r.depth, r.solver)
        if r.steps is None:
            rows.append((*place, "none of the grid gets there", "", "", ""))
        else:
            rows.append((*place, r.setting, r.steps, f"{r.milliseconds:.1f}", f"{r.multiple:.1f}"))
    return table(["problem", "layers", "solver", "best of its grid", "steps", "ms a gradient", "of backprop"], rows)


def draw(results: Sequence[Result], path: Path) -> None:
    """Steps above, time below, a column a problem."""
    problems = list(dict.fromkeys(result.problem for result in results))
    figure = new_figure(3.6 * len(problems) + 0.6, 6.0)
    panels = figure.subplots(2, len(problems), sharex=True, sharey="row", squeeze=False)
    for column, problem in enumerate(problems):
        for i, name in enumerate(GRIDS):
            found = [r for r in results if (r.problem, r.solver) == (problem, name) and r.steps is not None]
            depths = [r.depth for r in found]
            style = {"label": name, "color": PALETTE[i], "marker": MARKERS[i], "markersize": 9 - i}
            panels[0, column].plot(depths, [r.steps for r in found], **style)
            panels[1, column].plot(depths, [r.multiple for r in found], **style)
        panels[0, column].set_title(problem, fontsize=10)
        panels[1, column].set_xlabel("layers")
    panels[0, 0].set_ylabel("inference steps")
    panels[1, 0].set_ylabel("time of a gradient\n[multiples of backprop]")
    for axes in panels.flat:
        _logarithmic(axes, sorted({result.depth for result in results}))
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(GRIDS), fontsize=9)
    save(figure, str(path))


def _logarithmic(axes: Axes, depths: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def earlier(path: Path) -> list[Result]:
    return [Result(**result) for result in json.loads(path.read_text())["results"]] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = arguments_of(parser)
    start = time.perf_counter()
    path = arguments.out / "solvers.json"
    results = earlier(path)
    done = {(result.problem, result.depth) for result in results}
    for problem in PROBLEMS:
        for depth in problem.depths[: 1 if arguments.quick else None]:
            if (problem.name, depth) not in done:
                results += results_of(problem, depth)
                save_json(path, results=results)
    print(f"{this_machine()}; batch {BATCH}, processor time")
    print(result_table(results))
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes, {time.process_time() / 60:.1f} of processor time")
    draw(results, arguments.out / "solvers.png")


if __name__ == "__main__":
    main()
