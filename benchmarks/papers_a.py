"""Paper A: how near predictive coding is to backprop, layer by layer, as the nudge (lambda) goes to 0.

784-128-64-10, ReLU, linear output, half the squared error summed, batch 64, SGD with momentum .9 and lr 1e-4 on
``.grad`` (Millidge et al. 2022). Each run trains its own network for one epoch by its own gradients
and compares every batch with autograd at the same parameters.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from papers_c import accuracy
from reporting import MNIST, arguments_of, save_json, table, this_machine
from torch import Tensor, nn
from torch.nn import functional as F

import torch2ebm
from torch2ebm.reports.agreement import Agreement, agreement
from torch2ebm.reports.figures import MARKERS, PALETTE, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCH = 64
LEARNING_RATE = 1e-4
LAMBDAS = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0)
LAYERS = {"0.weight": "layer 1, 784 to 128", "2.weight": "layer 2, 128 to 64", "4.weight": "layer 3, 64 to 10"}

# relative error of the whole gradient, one-sided and symmetric, of a smooth net at equilibrium (Millidge et al. 2022)
SMOOTH = {1e-3: (3.5e-3, 1.26e-5), 1e-2: (3.4e-2, 1.3e-3), 0.1: (2.7e-1, 1.3e-1)}


@dataclass(frozen=True)
class Setting:
    """One line of the picture."""

    label: str
    lr: float
    symmetric: bool = False
    dtype: torch.dtype = torch.float64
    errors_stored: bool = False
    steps: int = 50

    def algorithm(self, beta: float) -> torch2ebm.Algorithm:
        solver = torch2ebm.LocalErrorDescent if self.errors_stored else torch2ebm.GradientDescent
        nudging = torch2ebm.Symmetric(beta) if self.symmetric else torch2ebm.OneSided(beta)
        return torch2ebm.PredictiveCoding(
            solver=solver(self.steps, self.lr), nudging=nudging, loss_reduction="sum", on_divergence="skip"
        )


SETTINGS = (
    Setting("OneSided, step .1 (the paper's sweep)", 0.1),
    Setting("OneSided, step .3", 0.3),
    Setting("Symmetric, step .3", 0.3, symmetric=True),
    Setting("OneSided, step .3, float32", 0.3, dtype=torch.float32),
    Setting("OneSided, step .3, float32, LocalErrorDescent", 0.3, dtype=torch.float32, errors_stored=True),
)


@dataclass(frozen=True)
class Layer:
    """One layer over an epoch: means over batches, and the worst batch."""

    layer: str
    cosine: float
    lowest_cosine: float
    relative_error: float
    largest_relative_error: float
    norm_ratio: float


@dataclass(frozen=True)
class Run:
    """One network, trained for one epoch. ``backprop`` has no nudge and no layers."""

    setting: str
    beta: float | None
    layers: tuple[Layer, ...]
    accuracy: float  # on the test images, percent
    lost_batches: int  # the relaxation ran away, or a negative nudge lost the minimum: no gradient


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(*layers).to(dtype)


def half_squared_error(output: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * (output - F.one_hot(labels, 10)).square().sum()


@dataclass(frozen=True)
class Data:
    """Images ``[n, 784]`` from 0 to 1, labels ``[n]``."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @staticmethod
    def load(path: str, batches: int | None) -> Data:
        mnist = torch2ebm.load_mnist(path)
        train, test = (images.flatten(1) / 255 for images in (mnist.train_images, mnist.test_images))
        count = None if batches is None else BATCH * batches
        return Data((train[:count], mnist.train_labels[:count]), (test, mnist.test_labels))


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9)


def backprop(data: Data) -> Run:
    net = network(torch.float64)
    optimizer = sgd(net)
    for x, y in _batches(data, torch.float64):
        optimizer.zero_grad()
        half_squared_error(net(x), y).backward()
        optimizer.step()
    return Run("backprop", None, (), _accuracy(net, data), 0)


def train(setting: Setting, beta: float, data: Data) -> Run:
    net = network(setting.dtype)
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(sgd(net), model, setting.algorithm(beta))
    seen: dict[str, list[Agreement]] = defaultdict(list)
    lost = 0
    for x, y in _batches(data, setting.dtype):
        optimizer.zero_grad()
        reference = torch.autograd.grad(half_squared_error(net(x), y), list(net.parameters()))
        half_squared_error(model(x), y).backward()
        for (name, parameter), expected in zip(net.named_parameters(), reference, strict=True):
            if parameter.grad is not None:
                seen[name].append(agreement(parameter.grad, expected))
        lost += net[0].weight.grad is None
        optimizer.step()
    layers = tuple(_layer(name, seen[name]) for name in LAYERS if name in seen)
    return Run(setting.label, beta, layers, _accuracy(net, data), lost)


def _batches(data: Data, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The same batches for all, whole ones only."""
    x, y = data.train
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return [(x[part].to(dtype), y[part]) for part in order.split(BATCH) if len(part) == BATCH]


def _layer(name: str, agreements: Sequence[Agreement]) -> Layer:
    cosines, errors = [a.cosine for a in agreements], [a.relative_error for a in agreements]
    return Layer(
        LAYERS[name],
        statistics.mean(cosines),
        min(cosines),
        statistics.mean(errors),
        max(errors),
        statistics.mean(a.norm_ratio for a in agreements),
    )


def _accuracy(net: nn.Module, data: Data) -> float:
    images, labels = data.test
    return accuracy(net, images.to(next(net.parameters()).dtype), labels)


def run_table(runs: Sequence[Run]) -> str:
    header = ["setting", "lambda", *(f"{c} {i}" for c in ("cosine", "relative error") for i in (1, 2, 3))]
    rows = []
    for run in runs:
        cosines = [f"{layer.cosine:.5f}" for layer in run.layers] or [""] * 3
        errors = [f"{layer.relative_error:.1e}" for layer in run.layers] or [""] * 3
        beta = "" if run.beta is None else f"{run.beta:g}"
        known = SMOOTH.get(run.beta) if run.beta is not None else None
        smooth = "" if known is None else f"{known[run.setting.startswith('Symmetric')]:.1e}"
        rows.append([run.setting, beta, *cosines, *errors, smooth, f"{run.accuracy:.2f}", run.lost_batches or ""])
    return table([*header, "smooth net (A1)", "test accuracy, %", "batches lost"], rows)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Against lambda, a column a layer: what the direction says, and what the length says too."""
    figure = new_figure(10.0, 6.2)
    panels = figure.subplots(2, 3, sharex=True, sharey="row")
    by_setting: Mapping[str, list[Run]] = {s.label: [r for r in runs if r.setting == s.label] for s in SETTINGS}
    for column, layer in enumerate(LAYERS.values()):
        for i, (label, found) in enumerate(by_setting.items()):
            points = [(run.beta, part) for run in found for part in run.layers if part.layer == layer]
            betas = [beta for beta, _ in points]
            style = {"label": label, "color": PALETTE[i], "marker": MARKERS[i], "markersize": 8.5 - 1.3 * i}
            panels[0, column].plot(betas, [max(1 - part.cosine, 1e-16) for _, part in points], **style)
            panels[1, column].plot(betas, [part.relative_error for _, part in points], **style)
        panels[0, column].set_title(layer, fontsize=10)
        panels[1, column].set_xlabel("nudge lambda")
    panels[0, 0].set_ylabel("1 - cosine to backprop,\nmean over an epoch")
    panels[1, 0].set_ylabel("relative error,\nmean over an epoch")
    for axes in panels.flat:
        _logarithmic(axes)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9)
    save(figure, str(path))


def _logarithmic(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=MNIST, help="npz, or folder of IDX files")
    parser.add_argument("--lambdas", type=float, nargs="*", default=LAMBDAS)
    arguments = arguments_of(parser)
    start = time.perf_counter()
    data = Data.load(arguments.data, 5 if arguments.quick else None)
    runs = [backprop(data)]
    for setting in SETTINGS:
        for beta in arguments.lambdas:
            runs.append(train(setting, beta, data))
            print(f"  {setting.label}, lambda {beta:g}: {runs[-1].accuracy:.2f} %", flush=True)
    print(f"{this_machine()}; {len(data.train[0]) // BATCH} batches of {BATCH}")
    print(run_table(runs))
    minutes = (time.perf_counter() - start) / 60
    print(f"{minutes:.1f} minutes, {time.process_time() / 60:.1f} of processor time")
    save_json(arguments.out / "papers_a.json", minutes=minutes, runs=runs)
    draw(runs, arguments.out / "papers_a.png")


if __name__ == "__main__":
    main()
