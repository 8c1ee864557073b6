"""Paper C: Rosenbaum's convolutional net on MNIST, trained by backprop and by the algorithms of Torch2PC.

Five layers, batch 300, Adam with lr .002, cross-entropy, 10 epochs of 10,000 images, tested on 10,000 others. Trainings
that the JSON file holds, with as many epochs, are not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from measure import Program, interleaved
from reporting import MNIST, arguments_of, save_json, table, this_machine
from torch import Tensor, nn
from torch.nn import functional as F

import torch2ebm
from torch2ebm.reports.agreement import agreement
from torch2ebm.reports.figures import MARKERS, PALETTE, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCH = 300
LEARNING_RATE = 0.002  # of Adam
EPOCHS = 10
SEEDS = (0, 1, 2)
LAYERS = 5
WITHIN = 0.7  # points of test accuracy that every algorithm is to stay within of backprop

# Torch2PC's own two epochs on its GPU (Rosenbaum 2022), as multiples of its backprop's 7.5 s
STRICT, FIXED, EXACT = 30.9 / 7.5, 27.4 / 7.5, 13.0 / 7.5
PAPER = {
    "Strict": STRICT,
    "Strict, literal mean": STRICT,
    "PCInfer Strict": STRICT,
    "FixedPrediction(20, 0.1)": FIXED,
    "FixedPrediction(20, 0.1), swept": FIXED,
    "PCInfer FixedPred": FIXED,
    f"FixedPrediction({LAYERS}, 1)": EXACT,
    f"FixedPrediction({LAYERS}, 1), swept": EXACT,
}

ALGORITHMS: dict[str, torch2ebm.Algorithm | None] = {
    "backprop": None,
    "ZeroDivergence": torch2ebm.ZeroDivergence(),
    "FixedPrediction(20, 0.1)": torch2ebm.FixedPrediction(20, 0.1),
    f"FixedPrediction({LAYERS}, 1)": torch2ebm.FixedPrediction(LAYERS, 1.0),
    "Strict": torch2ebm.PredictiveCoding(20, 0.1),
    "Strict, literal mean": torch2ebm.PredictiveCoding(20, 0.1, loss_reduction="sum"),  # what Torch2PC computes
    "ErrorDescent, literal mean": torch2ebm.PredictiveCoding(
        solver=torch2ebm.ErrorDescent(10, 0.3), loss_reduction="sum"
    ),
}
# Only compared with autograd, on one batch; None is Torch2PC's own call.
DIRECTED: dict[str, torch2ebm.Algorithm | None] = {
    name: algorithm for name, algorithm in ALGORITHMS.items() if isinstance(algorithm, torch2ebm.Algorithm)
} | {
    "PCInfer Strict": None,
    "Strict, literal mean, 400 steps": torch2ebm.PredictiveCoding(400, 0.1, loss_reduction="sum"),
}
# Only timed: what the closed form saves, and Torch2PC's own call.
SWEPT = {
    "FixedPrediction(20, 0.1), swept": torch2ebm.FixedPrediction(20, 0.1, method="sweep"),
    f"FixedPrediction({LAYERS}, 1), swept": torch2ebm.FixedPrediction(LAYERS, 1.0, method="sweep"),
}


def network() -> nn.Sequential:
    """Each child is one layer."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 10, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(10, 5, 3), nn.ReLU(), nn.Flatten()),
        nn.Sequential(nn.Linear(5 * 11 * 11, 50), nn.ReLU()),
        nn.Sequential(nn.Linear(50, 30), nn.ReLU()),
        nn.Linear(30, 10),
    )


@dataclass(frozen=True)
class Data:
    """Images ``[n, 1, 28, 28]`` from 0 to 1, labels ``[n]``."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @staticmethod
    def load(path: str) -> Data:
        mnist = torch2ebm.load_mnist(path)
        train, test = (images.unsqueeze(1) / 255 for images in (mnist.train_images, mnist.test_images))
        return Data((train, mnist.train_labels), (test, mnist.test_labels))


@dataclass(frozen=True)
class Run:
    """One training."""

    algorithm: str
    seed: int
    accuracy: tuple[float, ...]  # on the test images in percent, after each epoch


@dataclass(frozen=True)
class Reached:
    """One algorithm over all seeds."""

    algorithm: str
    accuracy: float  # mean, percent
    low: float
    high: float
    difference: float  # points above backprop's of the same seed, mean


@dataclass(frozen=True)
class Cost:
    """One update, the optimizer's step included."""

    algorithm: str
    milliseconds: float
    multiple: float  # of backprop
    low: float  # quartiles of the multiple
    high: float
    paper: float | None


@dataclass(frozen=True)
class Direction:
    """Against autograd, for the weights of each layer."""

    algorithm: str
    cosine: tuple[float, ...]
    norm_ratio: tuple[float, ...]


def attach(net: nn.Module, algorithm: torch2ebm.Algorithm | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    adam = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    if algorithm is None:
        return net, adam
    model = torch2ebm.convert(net, nodes="children")
    return model, torch2ebm.EnergyOptimizer(adam, model, algorithm)


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        predicted = torch.cat([net(part).argmax(1) for part in images.split(1000)])
    return 100 * float((predicted == labels).double().mean())


def train(name: str, data: Data, seed: int, epochs: int) -> Run:
    torch.manual_seed(seed)
    net = network()
    run = Run(name, seed, tuple(fit(net, ALGORITHMS[name], data, seed, epochs)))
    print(f"  {name}, seed {seed}: {run.accuracy[-1]:.2f} %", flush=True)
    return run


def fit(net: nn.Module, algorithm: torch2ebm.Algorithm | None, data: Data, seed: int, epochs: int) -> Iterator[float]:
    """Test accuracy after each epoch; the same seed is the same batches, whatever the algorithm."""
    model, optimizer = attach(net, algorithm)
    order = torch.Generator().manual_seed(seed)
    x, y = data.train
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        yield accuracy(net, *data.test)


def directions(data: Data) -> list[Direction]:
    """Gradients of one batch against autograd's, on a network that backprop has trained for three epochs."""
    torch.manual_seed(0)
    net = network()
    list(fit(net, None, data, 0, 3))
    x, y = (part[:BATCH] for part in data.train)
    reference = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    results = []
    for name, algorithm in DIRECTED.items():
        if algorithm is None:
            torch2ebm.torch2pc.PCInfer(net, F.cross_entropy, x, y, "Strict", 0.1, 20)
        else:
            model, optimizer = attach(net, algorithm)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
        pairs = [(p.grad, g) for p, g in zip(net.parameters(), reference, strict=True) if p.ndim > 1]
        found = [agreement(ours, theirs) for ours, theirs in pairs if ours is not None]
        results.append(Direction(name, tuple(a.cosine for a in found), tuple(a.norm_ratio for a in found)))
    return results


def earlier(path: Path, epochs: int) -> list[Run]:
    """The trainings of an earlier run of this program."""
    found = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = [Run(run["algorithm"], run["seed"], tuple(run["accuracy"])) for run in found]
    return [run for run in runs if len(run.accuracy) == epochs and run.algorithm in ALGORITHMS]


def _update(algorithm: torch2ebm.Algorithm | None, x: Tensor, y: Tensor) -> Program:
    model, optimizer = attach(network(), algorithm)

    def program() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return program


def _torch2pc_update(kind: str, eta: float, n: int, x: Tensor, y: Tensor) -> Program:
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)

    def program() -> None:
        torch2ebm.torch2pc.PCInfer(net, F.cross_entropy, x, y, kind, eta, n)
        optimizer.step()

    return program


def programs(x: Tensor, y: Tensor) -> dict[str, Program]:
    """One update of each, the optimizer's step included."""
    torch.manual_seed(0)
    found: dict[str, Program] = {name: _update(algorithm, x, y) for name, algorithm in (ALGORITHMS | SWEPT).items()}
    found["PCInfer Strict"] = _torch2pc_update("Strict", 0.1, 20, x, y)
    found["PCInfer FixedPred"] = _torch2pc_update("FixedPred", 0.1, 20, x, y)
    return found


def reached(runs: list[Run]) -> list[Reached]:
    last = {(run.algorithm, run.seed): run.accuracy[-1] for run in runs}
    result = []
    for name in dict.fromkeys(run.algorithm for run in runs):
        seeds = [seed for algorithm, seed in last if algorithm == name]
        found = [last[name, seed] for seed in seeds]
        difference = statistics.mean(last[name, seed] - last["backprop", seed] for seed in seeds)
        result.append(Reached(name, statistics.mean(found), min(found), max(found), difference))
    return result


def costs(x: Tensor, y: Tensor, rounds: int) -> list[Cost]:
    timings = interleaved(programs(x, y), "backprop", rounds)
    return [Cost(name, t.milliseconds, t.ratio, t.low, t.high, PAPER.get(name)) for name, t in timings.items()]


def accuracy_table(results: list[Reached]) -> str:
    rows = [
        (r.algorithm, f"{r.accuracy:.2f}", f"{r.low:.2f} to {r.high:.2f}", f"{r.difference:+.2f}",
         "" if r.algorithm == "backprop" else "yes" if abs(r.difference) <= WITHIN else "NO")
        for r in results
    ]  # fmt: skip
    header = ["algorithm", "test accuracy, %", "seeds", "points above backprop", f"within {WITHIN}"]
    return table(header, rows)


def cost_table(results: list[Cost]) -> str:
    rows = [
        (c.algorithm, f"{c.milliseconds:.1f}", f"{c.multiple:.2f}", f"{c.low:.2f} to {c.high:.2f}",
         "" if c.paper is None else f"{c.paper:.1f}")
        for c in results
    ]  # fmt: skip
    return table(["one update", "ms", "multiple of backprop", "quartiles", "Torch2PC, its GPU"], rows)


def direction_table(results: list[Direction]) -> str:
    layers = range(1, LAYERS + 1)
    header = ["gradient of one batch", *(f"cosine {i}" for i in layers), *(f"norm ratio {i}" for i in layers)]
    return table(
        header, [(r.algorithm, *(f"{c:.4f}" for c in r.cosine), *(f"{n:.3f}" for n in r.norm_ratio)) for r in results]
    )


def draw(runs: list[Run], results: list[Cost], path: Path) -> None:
    """Accuracy along the epochs, and what an update costs."""
    figure = new_figure(9.5, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1.0])
    colours = {name: i for i, name in enumerate(dict.fromkeys(_convention(name)[0] for name in ALGORITHMS))}
    for name in ALGORITHMS:
        curves = [run.accuracy for run in runs if run.algorithm == name]
        error = [100 - statistics.mean(column) for column in zip(*curves, strict=True)]
        base, line = _convention(name)
        i = colours[base]
        style = {"color": PALETTE[i], "marker": MARKERS[i], "markersize": 9 - i, "linestyle": line}
        left.plot(range(1, len(error) + 1), error, label=name, **style)
    left.set_yscale("log")
    left.set_xlabel("epoch of 10,000 images")
    left.set_ylabel("test error [%], mean over seeds")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.grid(alpha=0.3, which="both")
    left.legend(fontsize=8)
    _draw_costs(right, results)
    save(figure, str(path))


def _convention(name: str) -> tuple[str, str]:
    """What the loss's two conventions share, and the line style that tells them apart."""
    base = name.removesuffix(", literal mean")
    return base, "-" if base == name else "--"


def _draw_costs(axes: Axes, results: list[Cost]) -> None:
    places = range(len(results))[::-1]
    axes.barh(places, [c.multiple for c in results], color=PALETTE[0], height=0.6, label="here")
    known = [(place, c.paper) for place, c in zip(places, results, strict=True) if c.paper is not None]
    axes.plot(
        [paper for _, paper in known], [place for place, _ in known], "D", color=PALETTE[1], label="Torch2PC, its GPU"
    )
    axes.set_yticks(list(places), [c.algorithm for c in results], fontsize=8)
    axes.set_xlabel("time of an update [multiples of backprop]")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=MNIST, help="npz, or folder of IDX files")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--rounds", type=int, default=30, help="of the timing")
    arguments = arguments_of(parser)
    if arguments.quick:
        arguments.epochs, arguments.seeds, arguments.rounds = 1, [0], 3
    start = time.perf_counter()
    path = arguments.out / "papers_c.json"
    data, runs = Data.load(arguments.data), earlier(path, arguments.epochs)
    done = {(run.algorithm, run.seed) for run in runs}
    for seed in arguments.seeds:
        for name in ALGORITHMS:
            if (name, seed) not in done:
                runs.append(train(name, data, seed, arguments.epochs))
                save_json(path, runs=runs)
    results, timings = reached(runs), costs(data.train[0][:BATCH], data.train[1][:BATCH], arguments.rounds)
    print(f"{this_machine()}; {arguments.epochs} epochs, batch {BATCH}, seeds {sorted({run.seed for run in runs})}")
    found = directions(data)
    print(accuracy_table(results), direction_table(found), cost_table(timings), sep="\n\n")
    minutes = (time.perf_counter() - start) / 60
    print(f"{minutes:.1f} minutes, {time.process_time() / 60:.1f} of processor time")
    save_json(path, minutes=minutes, accuracy=results, directions=found, costs=timings, runs=runs)
    draw(runs, timings, arguments.out / "papers_c.png")


if __name__ == "__main__":
    main()
