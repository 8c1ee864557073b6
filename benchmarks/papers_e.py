"""Equilibrium algorithms trained in the ordinary loop, each beside backprop of the same net and schedule.

python benchmarks/papers_e.py [--rows TEXT] [--seeds 3] [--json PATH]
python benchmarks/papers_e.py --mnist ../shared/mnist_10k.npz --seeds 1

Digits are scikit-learn's, 1,437 to train on and 360 to test; MNIST is 10,000 and 10,000. Accuracies are of test images,
in percent, the median over the seeds of the last epoch's weights: at the free equilibrium (``model(x)``), and
feed-forward (``model.feedforward(x)``). A target is the most points that may be lost against backprop.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import torch2ebm
from torch2ebm import ContrastiveHebbian, CoupledLearning, EquilibriumPropagation, RecurrentBackprop, Symmetric

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Images:
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits() -> Images:
    """Pixels from 0 to 1, shape ``[n, 1, 8, 8]``."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, stratify=labels, random_state=0)
    return Images(train_x, train_y, test_x, test_y)


def mnist(path: Path) -> Images:
    """Pixels from 0 to 1, shape ``[n, 1, 28, 28]``."""
    import numpy

    with numpy.load(path) as arrays:
        x = {part: torch.tensor(arrays[f"{part}_images"]).float().unsqueeze(1) / 255 for part in ("train", "test")}
        y = {part: torch.tensor(arrays[f"{part}_labels"]).long() for part in ("train", "test")}
    return Images(x["train"], y["train"], x["test"], y["test"])


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """The half stands inside of the mean: outside it would scale the gradient, and the nudge be twice as strong."""
    return (0.5 * (output - F.one_hot(target, output.shape[1])).square().sum(1)).mean()


def hard_sigmoid_mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths[:-1]):
        layers += [nn.Linear(fan_in, fan_out), nn.Hardsigmoid()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def convolutional(first: int, second: int, side: int) -> nn.Module:
    """Two convolutions, each with a clamp to [0, 1] and average pooling, on images of ``side`` pixels."""
    return nn.Sequential(
        *(nn.Conv2d(1, first, 3, padding=1), nn.Hardtanh(0.0, 1.0), nn.AvgPool2d(2)),
        *(nn.Conv2d(first, second, 3, padding=1), nn.Hardtanh(0.0, 1.0), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(second * (side // 4) ** 2, 10)),
    )


@dataclass(frozen=True)
class Entry:
    """An algorithm, and how many points it may lose: at equilibrium, and feed-forward."""

    algorithm: torch2ebm.algorithms.base.Algorithm
    equilibrium: float
    feedforward: float | None = None


@dataclass(frozen=True)
class Task:
    """A net with its loss and schedule: Adam, ``lr`` falling to 0 on a cosine."""

    name: str
    build: Callable[[], nn.Module]
    loss: Loss
    lr: float
    epochs: int
    batch_size: int
    entries: Mapping[str, Entry] = field(default_factory=dict)


def on_digits() -> list[Task]:
    def ep(feedback: float, free: int, nudged: int) -> EquilibriumPropagation:
        return EquilibriumPropagation(Symmetric(0.5), free, nudged, feedback=feedback)

    one = {
        "EquilibriumPropagation": Entry(ep(1.0, 15, 8), 0.5),
        "RecurrentBackprop": Entry(RecurrentBackprop(torch2ebm.Neumann(10), free_steps=15), 0.5),
        "ContrastiveHebbian": Entry(ContrastiveHebbian(0.1, 10, 5), 2.0),
        "CoupledLearning": Entry(CoupledLearning(0.25, 15, 8), 2.0),
    }
    two = {"EquilibriumPropagation": Entry(ep(0.1, 10, 5), 1.5, 1.5)}
    pooled = {
        "EquilibriumPropagation": Entry(ep(0.1, 10, 5), 2.5, 3.5),
        "EquilibriumPropagation, feedback .05": Entry(ep(0.05, 10, 5), 2.5, 3.5),
    }
    half = half_squared_error
    return [
        Task("MLP 64-128-10", lambda: hard_sigmoid_mlp(64, 128, 10), half, 1e-2, 50, 32, one),
        Task("MLP 64-128-128-10", lambda: hard_sigmoid_mlp(64, 128, 128, 10), half, 1e-2, 50, 32, two),
        Task("2 convolutions, pooling", lambda: convolutional(16, 32, 8), half, 3e-3, 30, 32, pooled),
    ]


def on_mnist() -> list[Task]:
    def ep(feedback: float, free: int, nudged: int) -> EquilibriumPropagation:
        return EquilibriumPropagation(Symmetric(0.5), free, nudged, feedback=feedback)

    mlp = {"EquilibriumPropagation": Entry(ep(1.0, 15, 8), 1.0)}
    pooled = {"EquilibriumPropagation": Entry(ep(0.1, 10, 5), 2.0)}
    half = half_squared_error
    return [
        Task("MNIST, MLP 784-512-10", lambda: hard_sigmoid_mlp(784, 512, 10), half, 3e-3, 20, 64, mlp),
        Task("MNIST, 2 convolutions, pooling", lambda: convolutional(8, 16, 28), half, 3e-3, 6, 64, pooled),
    ]


@dataclass(frozen=True)
class Run:
    """What one seed reached. ``residual``: of the last batch's free phase; ``distance``: state.feedforward_distance."""

    seed: int
    equilibrium: float
    feedforward: float
    residual: float
    distance: float
    cpu_seconds: float


def train(task: Task, algorithm: torch2ebm.algorithms.base.Algorithm | None, images: Images, seed: int) -> Run:
    """The ordinary loop; without an algorithm it is backprop's."""
    torch.manual_seed(seed)
    net = task.build()
    model = torch2ebm.convert(net)
    adam = torch.optim.Adam(net.parameters(), lr=task.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        adam, task.epochs * -(-len(images.train_y) // task.batch_size)
    )
    optimizer = adam if algorithm is None else torch2ebm.EnergyOptimizer(adam, model, algorithm)
    order = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in range(task.epochs):
        for batch in torch.randperm(len(images.train_y), generator=order).split(task.batch_size):
            optimizer.zero_grad()
            task.loss(model(images.train_x[batch]), images.train_y[batch]).backward()
            optimizer.step()
            schedule.step()
    seconds = time.process_time() - start
    residual, distance = 0.0, 0.0
    if algorithm is not None:  # before the next forward, which releases the state
        residual, distance = model.state.phases[0].residual, model.state.feedforward_distance
    found = [accuracy(model, images), accuracy(model.feedforward, images)]
    return Run(seed, *found, residual, distance, round(seconds, 1))


def accuracy(model: Callable[[Tensor], Tensor], images: Images) -> float:
    """Percent of the test images."""
    parts = zip(images.test_x.split(500), images.test_y.split(500), strict=True)
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
    return round(100 * right / len(images.test_y), 2)


def median(runs: Sequence[Run], name: str) -> float:
    return statistics.median(getattr(run, name) for run in runs)


def rows(task: Task, images: Images, seeds: int, wanted: str) -> list[dict[str, object]]:
    """Backprop's row, and one an algorithm."""
    backprop = [train(task, None, images, seed) for seed in range(seeds)]
    reference = median(backprop, "equilibrium")
    found = [row(task, "backprop", backprop)]
    print(line(found[-1]), flush=True)
    for name, entry in task.entries.items():
        if wanted not in f"{task.name} {name}":
            continue
        runs = [train(task, entry.algorithm, images, seed) for seed in range(seeds)]
        found.append(row(task, name, runs) | against(entry, runs, reference))
        print(line(found[-1]), flush=True)
    return found


def row(task: Task, name: str, runs: Sequence[Run]) -> dict[str, object]:
    return {
        "task": task.name,
        "algorithm": name,
        "equilibrium": median(runs, "equilibrium"),
        "feedforward": median(runs, "feedforward"),
        "residual": median(runs, "residual"),
        "distance": median(runs, "distance"),
        "CPU s": median(runs, "cpu_seconds"),
        "loss": getattr(task.loss, "__name__", ""),
        "lr": task.lr,
        "epochs": task.epochs,
        "batch": task.batch_size,
        "runs": [asdict(run) for run in runs],
    }


def against(entry: Entry, runs: Sequence[Run], reference: float) -> dict[str, object]:
    """Points lost against backprop, and the target of each."""
    lost = {place: round(reference - median(runs, place), 2) for place in ("equilibrium", "feedforward")}
    targets = {"equilibrium": entry.equilibrium, "feedforward": entry.feedforward}
    reached = all(lost[place] <= target for place, target in targets.items() if target is not None)
    return {"settings": repr(entry.algorithm), "lost": lost, "targets": targets, "reached": reached}


def line(row: Mapping[str, object]) -> str:
    cells = [row["task"], row["algorithm"], *(f"{row[name]:.2f}" for name in ("equilibrium", "feedforward"))]
    if "lost" not in row:
        cells += ["", "", ""]
    else:
        lost, targets = row["lost"], row["targets"]
        cells += [_beside(lost[place], targets[place]) for place in ("equilibrium", "feedforward")]  # type: ignore[index]
        cells.append("yes" if row["reached"] else "NO")
    cells += [f"{row['residual']:.1e}", f"{row['distance']:.2f}", row["CPU s"]]
    return "| " + " | ".join(map(str, cells)) + " |"


def _beside(lost: float, target: float | None) -> str:
    return f"{lost:+.2f}" + ("" if target is None else f" (at most {target})")


HEADER = (
    "| task | algorithm | at equilibrium % | feed-forward % | lost at equilibrium | lost feed-forward | reached "
    "| residual | distance | CPU s |\n|" + "---|" * 10
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="only tasks and algorithms with this text in their name")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="other than the table's")
    parser.add_argument("--mnist", type=Path, help="the rows of MNIST, from this file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} threads, {arguments.seeds} seeds")
    print(HEADER)
    images = mnist(arguments.mnist) if arguments.mnist else digits()
    results: list[dict[str, object]] = []
    for task in on_mnist() if arguments.mnist else on_digits():
        if not any(arguments.rows in f"{task.name} {name}" for name in task.entries):
            continue
        results += rows(replaced(task, arguments.epochs), images, arguments.seeds, arguments.rows)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))


def replaced(task: Task, epochs: int | None) -> Task:
    return task if epochs is None else replace(task, epochs=epochs)


if __name__ == "__main__":
    main()
