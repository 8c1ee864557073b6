"""The stability of inference learning at any learning rate (Alonso et al. 2022).

python benchmarks/papers_d.py --digits
python benchmarks/papers_d.py --mnist [--data ../shared/mnist_10k.npz] [--rules IL-prox] [--rates 1 10] [--samples 1000]

One sample a step, eps 0, ReLU, torch's default initial weights, float32, images in [0, 1] as they are, each training
image at most once and in a shuffled order. A run that ends in torch2ebm's NonFiniteError or DivergenceError has
diverged; an accuracy of about .10 is chance: the units have died. IL-SGD is ``PredictiveCoding(25, 0.02)``;
docs/inference_learning.md says how near it is to the paper's. Runs that the JSON file holds stay in the table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import torch2ebm

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MNIST = HERE.parents[1] / "shared" / "mnist_10k.npz"
DIVERGED = "diverged"
RATES = (0.01, 0.1, 1.0, 2.5, 10.0, 100.0)


@dataclass(frozen=True)
class Rule:
    """From a learning rate to an algorithm, and to the rate of the SGD that steps its gradients."""

    algorithm: Callable[[float], torch2ebm.Algorithm]
    step: Callable[[float], float]


RULES = {
    "BP-SGD": Rule(lambda lr: torch2ebm.Backprop(), lambda lr: lr),
    "IL-SGD": Rule(lambda lr: torch2ebm.PredictiveCoding(25, 0.02), lambda lr: lr),
    "IL-prox": Rule(lambda lr: torch2ebm.ProximalInferenceLearning(alpha=lr), lambda lr: 1.0),
}
# test accuracies of prototypes on digits, and of the authors' code on MNIST: after 1,000 / 2,500 / 10,000
DIGITS_REFERENCE = {
    "BP-SGD": {0.01: ".67-.73", 0.1: ".76-.86", 1.0: DIVERGED, 2.5: DIVERGED, 10.0: DIVERGED, 100.0: DIVERGED},
    "IL-SGD": {0.01: ".38-.48", 0.1: ".89-.91", 1.0: ".59-.91", 2.5: ".77-.93", 10.0: DIVERGED, 100.0: DIVERGED},
    "IL-prox": {0.01: ".33-.34", 0.1: ".82-.91", 1.0: ".90-.93", 2.5: ".91-.93", 10.0: ".91-.93", 100.0: ".90-.93"},
}
MNIST_REFERENCE = {
    "BP-SGD": {0.01: ".727 .813 .910", 0.1: ".495 .600 diverged", 1.0: DIVERGED, 10.0: DIVERGED},
    "IL-SGD": {0.01: ".443 .655 .880", 0.1: ".834 .843 .925", 1.0: ".735 .766 .893"},
    "IL-prox": {0.1: ".738 .827 .896", 1.0: ".793 .855 .903", 10.0: ".803 .853 .906", 100.0: ".802 .852 .906"},
}


@dataclass(frozen=True)
class Task:
    """Images and labels, the net's widths, and after how many samples it is tested."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    widths: tuple[int, ...]
    marks: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """One net trained by one rule: an accuracy a mark, or that it had diverged by then."""

    rule: str
    lr: float
    seed: int
    marks: tuple[int, ...]
    accuracies: tuple[float | str, ...]
    milliseconds: float  # a training step, mean


def digits(seed: int) -> Task:
    """1,000 of 1,437 training images, tested on the other 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    train, test = train_test_split(range(len(y)), test_size=0.2, stratify=labels, random_state=seed)
    return Task(x[train], y[train], x[test], y[test], (64, 128, 128, 10), (1000,))


def mnist(path: Path, samples: int) -> Task:
    """Up to 10,000 training images, tested on MNIST's own 10,000."""
    with np.load(path) as file:
        x, y, test_x, test_y = (
            torch.tensor(file[name]) for name in ("train_images", "train_labels", "test_images", "test_labels")
        )
    marks = tuple(mark for mark in (1000, 2500, 10_000) if mark <= samples)
    return Task(_scaled(x), y.long(), _scaled(test_x), test_y.long(), (784, 256, 256, 10), marks)


def _scaled(images: Tensor) -> Tensor:
    return images.flatten(1).float() / 255


def net_of(widths: Sequence[int], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(name: str, lr: float, task: Task, seed: int) -> Run:
    """One pass over shuffled images, one at a time, until the last mark."""
    rule, net = RULES[name], net_of(task.widths, seed)
    model = torch2ebm.convert(net)
    sgd = torch.optim.SGD(net.parameters(), lr=rule.step(lr))
    optimizer = torch2ebm.EnergyOptimizer(sgd, model, rule.algorithm(lr))
    order = torch.randperm(len(task.train_y), generator=torch.Generator().manual_seed(seed)).tolist()
    accuracies: list[float | str] = []
    done, seconds = 0, 0.0
    for mark in task.marks:
        started = time.perf_counter()
        try:
            for i in order[done:mark]:
                optimizer.zero_grad()
                F.cross_entropy(model(task.train_x[i : i + 1]), task.train_y[i : i + 1]).backward()
                optimizer.step()
                done += 1
        except (torch2ebm.errors.NonFiniteError, torch2ebm.errors.DivergenceError):
            accuracies += [DIVERGED] * (len(task.marks) - len(accuracies))
            break
        seconds += time.perf_counter() - started
        accuracies.append(accuracy(net, task))
    return Run(name, lr, seed, task.marks, tuple(accuracies), round(1000 * seconds / max(done, 1), 2))


def accuracy(net: nn.Module, task: Task) -> float:
    with torch.no_grad():
        return round(float((net(task.test_x).argmax(1) == task.test_y).double().mean()), 4)


def stability(
    rules: Iterable[str], rates: Iterable[float], seeds: Iterable[int], task_of: Callable[[int], Task], path: Path
) -> list[Run]:
    """Every rule at every rate from every seed. The runs are written to ``path`` as they end, among those it holds."""
    tasks = {seed: task_of(seed) for seed in seeds}
    runs = {_key(run): run for run in _saved(path)}
    for rule, rate, seed in [(rule, rate, seed) for rule in rules for rate in rates for seed in tasks]:
        run = train(rule, rate, tasks[seed], seed)
        runs[_key(run)] = run
        print(f"{rule} lr {rate:g} seed {seed}: {_figures([run])} ({run.milliseconds} ms a step)", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(run) for _, run in sorted(runs.items())], indent=1))
    return [run for _, run in sorted(runs.items())]


def _key(run: Run) -> tuple[str, float, int]:
    return run.rule, run.lr, run.seed


def _saved(path: Path) -> list[Run]:
    found = json.loads(path.read_text()) if path.exists() else []
    return [Run(**{**run, "marks": tuple(run["marks"]), "accuracies": tuple(run["accuracies"])}) for run in found]


def _figures(runs: Sequence[Run]) -> str:
    """At each mark the range over seeds."""
    return " / ".join(_range([run.accuracies[i] for run in runs]) for i in range(len(runs[0].marks)))


def _range(found: Sequence[float | str]) -> str:
    numbers = sorted(entry for entry in found if not isinstance(entry, str))
    if not numbers:
        return DIVERGED
    text = f"{numbers[0]:.3f}" if numbers[0] == numbers[-1] else f"{numbers[0]:.2f}-{numbers[-1]:.2f}"
    lost = len(found) - len(numbers)
    return f"{text} ({lost} {DIVERGED})" if lost else text


def table(runs: Sequence[Run], reference: dict[str, dict[float, str]]) -> str:
    lines = ["| rule | lr | here | reference |", "|---|---|---|---|"]
    for rule, rate in dict.fromkeys((run.rule, run.lr) for run in runs):
        ours = _figures([run for run in runs if (run.rule, run.lr) == (rule, rate)])
        lines.append(f"| {rule} | {rate:g} | {ours} | {reference[rule].get(rate, '')} |")
    return "\n".join(lines)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Accuracy at the last mark against the learning rate, the range over seeds as a band; diverged runs at 0."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for rule, colour, marker in zip(RULES, ("#0072B2", "#D55E00", "#009E73"), ("s", "^", "o"), strict=True):
        by_rate: dict[float, list[float]] = {}
        for run in runs:
            if run.rule == rule:
                last = run.accuracies[-1]
                by_rate.setdefault(run.lr, []).append(0.0 if isinstance(last, str) else last)
        rates = sorted(by_rate)
        middle = [sorted(by_rate[rate])[len(by_rate[rate]) // 2] for rate in rates]
        axes.plot(rates, middle, marker=marker, color=colour, label=rule)
        lowest, highest = [min(by_rate[r]) for r in rates], [max(by_rate[r]) for r in rates]
        axes.fill_between(rates, lowest, highest, color=colour, alpha=0.2)
    axes.axhline(0.1, color="grey", linestyle=":", label="chance")
    axes.set(
        xscale="log", xlabel="learning rate (alpha for IL-prox)", ylabel="test accuracy (diverged: 0)", ylim=(-0.02, 1)
    )
    axes.set_title(f"One sample a step, {max(run.marks[-1] for run in runs):,} samples at most")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--digits", action="store_true")
    which.add_argument("--mnist", action="store_true")
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=list(RULES))
    parser.add_argument("--rates", nargs="*", type=float)
    parser.add_argument("--seeds", nargs="*", type=int, help="default: 0 1 2 for digits, 0 for MNIST")
    parser.add_argument("--samples", type=int, default=10_000, help="MNIST: the last mark is at most this")
    parser.add_argument("--data", type=Path, default=MNIST)
    parser.add_argument("--json", type=Path, help="default: results/papers_d_<task>.json beside this script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task_of: Callable[[int], Task] = digits
    reference, seeds, name = DIGITS_REFERENCE, [0, 1, 2], "digits"
    if arguments.mnist:
        images = mnist(arguments.data, arguments.samples)
        task_of, reference, seeds, name = (lambda seed: images), MNIST_REFERENCE, [0], "mnist"
    rates = arguments.rates or [rate for rate in RATES if name == "digits" or rate != 2.5]
    path = arguments.json or RESULTS / f"papers_d_{name}.json"
    runs = stability(arguments.rules, rates, arguments.seeds or seeds, task_of, path)
    print(table(runs, reference))
    draw(runs, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
