"""The demo: a small ResNet on the digits of scikit-learn, trained by backpropagation and by predictive coding."""

# mypy: disable-error-code="no-untyped-call"
# (Tensor.backward is untyped, and the training loop is to be copied as it is)

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from torch2ebm.algorithms import Algorithm, PredictiveCoding, ZeroDivergence
from torch2ebm.common.text import aligned
from torch2ebm.compare import GradientComparison, compare
from torch2ebm.engine.nudging import OneSided
from torch2ebm.engine.results import Relaxation
from torch2ebm.model.energy_model import convert
from torch2ebm.model.replicas import process_count
from torch2ebm.optimizer import EnergyOptimizer
from torch2ebm.report import report as page_of
from torch2ebm.reports.figures import require
from torch2ebm.reports.plots import plot_energy, plot_error_map

BATCH = 64


class Block(nn.Module):
    """Two convolutions with batch norm, and a residual connection."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class DigitNet(nn.Module):
    """A ResNet in plain PyTorch: images ``[batch, 1, 8, 8]`` to logits ``[batch, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(1, 8, 1), Block(8, 16, 2), Block(16, 32, 2))
        self.output = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(self.blocks(x).mean((2, 3)))
        return logits


def train(model: nn.Module, optimizer: Optimizer, batches: Iterable[Any], epochs: Iterable[int]) -> None:
    """The ordinary training loop: the same for backpropagation and for every algorithm of torch2ebm."""
    for _ in epochs:
        for x, y in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()


@dataclass(frozen=True)
class Digits:
    """The 1,797 images, in [0, 1], split once."""

    train: TensorDataset
    test_x: Tensor
    test_y: Tensor


def run(epochs: int, output: str, seed: int) -> None:
    """Train, compare the gradients, print what came out, and write three pictures and a page to the folder ``output``.

    Under ``torchrun`` the processes train together, each on its part of every batch, and the first one reports.
    """
    folder = Path(output)
    if first_process():
        folder.mkdir(parents=True, exist_ok=True)
    for each in ("matplotlib", "sklearn", "tqdm"):  # not after a minute of training
        require(each, "demo")
    digits, net = load_digits(seed), initial_net(seed)
    with one_thread(), processes():
        trained = {name: train_by(rule, net, digits, name, epochs, seed) for name, rule in algorithms().items()}
    if first_process():
        report(epochs, folder, net, trained, digits)


def report(epochs: int, folder: Path, net: nn.Module, trained: Mapping[str, nn.Module], digits: Digits) -> None:
    rows = [[name, f"{100 * accuracy(model, digits):.2f}%"] for name, model in trained.items()]
    print(f"\nTest accuracy after {epochs} epochs, from the same initial weights\n")
    print(aligned(["training", "accuracy"], rows))
    comparison = compare_gradients(net, digits)
    print(f"\nGradients of the initial net against backpropagation's, on {BATCH} test images, in float64\n")
    print(comparison.table())
    write_pictures(folder, comparison, relaxation_of(net, digits), relaxation_of(trained["PredictiveCoding"], digits))
    print(f"\nPictures: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")
    print(f"Report, to open in a browser: {write_page(folder, net, digits)}")


def first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def processes() -> Iterator[None]:
    """Inside, the processes that ``torchrun`` started can exchange messages; without it, or alone, nothing changes."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    distributed.init_process_group("gloo", timeout=timedelta(minutes=2))  # for one that hangs; torchrun sees one end
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def one_thread() -> Iterator[None]:
    """For a net this small more threads gain nothing, and on a busy machine they wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def algorithms() -> dict[str, Algorithm | None]:
    return {
        "backpropagation": None,
        "ZeroDivergence": ZeroDivergence(),
        "PredictiveCoding": PredictiveCoding(),
    }


def load_digits(seed: int) -> Digits:
    data, selection = require("sklearn.datasets", "demo"), require("sklearn.model_selection", "demo")
    pixels, labels = data.load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, dtype=torch.int64)
    rest, test = selection.train_test_split(range(len(y)), test_size=0.2, stratify=labels, random_state=seed)
    return Digits(TensorDataset(x[rest], y[rest]), x[test], y[test])


def initial_net(seed: int) -> DigitNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitNet()


def train_by(
    algorithm: Algorithm | None, initial: nn.Module, digits: Digits, name: str, epochs: int, seed: int
) -> nn.Module:
    """A copy of ``initial``, trained by ``algorithm``, or by backpropagation without one."""
    net = copy.deepcopy(initial)
    model: nn.Module = net if algorithm is None else convert(net)
    if process_count() > 1:
        model = DistributedDataParallel(model)
    optimizer: Optimizer = Adam(net.parameters(), lr=2e-3)
    if algorithm is not None:
        optimizer = EnergyOptimizer(optimizer, model, algorithm)
    progress = require("tqdm", "demo").tqdm(range(epochs), desc=f"{name:16}", unit="epoch", disable=not first_process())
    train(model, optimizer, *batches_and_epochs(digits.train, progress, seed))
    return net


def batches_and_epochs(data: TensorDataset, epochs: Iterable[int], seed: int) -> tuple[DataLoader[Any], Iterable[int]]:
    """Batches of BATCH images in an order of the seed, among several processes each its share of every batch."""
    if process_count() == 1:
        order = torch.Generator().manual_seed(seed)
        return DataLoader(data, batch_size=BATCH, shuffle=True, generator=order), epochs
    share: DistributedSampler[Any] = DistributedSampler(data, seed=seed)
    size = max(1, BATCH // process_count())
    return DataLoader(data, batch_size=size, sampler=share), reshuffled(share, epochs)


def reshuffled(share: DistributedSampler[Any], epochs: Iterable[int]) -> Iterator[int]:
    for epoch in epochs:
        share.set_epoch(epoch)
        yield epoch


def accuracy(model: nn.Module, digits: Digits) -> float:
    model.eval()  # batch norm by its running statistics
    with torch.no_grad():
        correct = model(digits.test_x).argmax(1) == digits.test_y
    return float(correct.double().mean())


def first_batch(digits: Digits) -> tuple[Tensor, Tensor]:
    """In float64, where rounding is no part of what is seen."""
    return digits.test_x[:BATCH].double(), digits.test_y[:BATCH]


def compare_gradients(net: nn.Module, digits: Digits) -> GradientComparison:
    algorithms = [ZeroDivergence(), PredictiveCoding()]
    return compare(copy.deepcopy(net).double(), F.cross_entropy, first_batch(digits), algorithms)


def relaxation_of(net: nn.Module, digits: Digits) -> Relaxation:
    """How predictive coding relaxes on the first test images under a full nudge, which shows more than the default."""
    model = convert(copy.deepcopy(net).train())
    EnergyOptimizer(Adam(model.parameters()), model, PredictiveCoding(nudging=OneSided(1.0)))
    F.cross_entropy(model(digits.test_x[:BATCH]), digits.test_y[:BATCH]).backward()
    return model.state.relaxation


def write_pictures(folder: Path, comparison: GradientComparison, before: Relaxation, after: Relaxation) -> None:
    curves = {"PredictiveCoding, initial weights": before.energy, "PredictiveCoding, trained weights": after.energy}
    plot_energy(curves, str(folder / "energy.png"))
    plot_error_map(before, str(folder / "errors.png"))
    comparison.plot(str(folder / "angles.png"))


def write_page(folder: Path, net: nn.Module, digits: Digits) -> Path:
    """One step of predictive coding from the initial weights, as the training makes it, on the first test images."""
    model, (x, y) = convert(copy.deepcopy(net).double()), first_batch(digits)
    model.attach(PredictiveCoding())
    F.cross_entropy(model(x), y).backward()
    page_of(model, F.cross_entropy, (x, y)).to_html(folder / "report.html")
    return folder / "report.html"
