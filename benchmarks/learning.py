"""Which settings learn: a small network on the digits, trained in the same loop by each of them.

``python benchmarks/learning.py [--net resnet] [--epochs 3] [--seeds 1]`` prints the test accuracy and the seconds of
each. The ResNet takes about five minutes for one seed on one core.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import torch2ebm

WIDTH = 8
ALGORITHMS: Sequence[torch2ebm.Algorithm] = (
    torch2ebm.Backprop(),
    torch2ebm.ZeroDivergence(),
    torch2ebm.FixedPrediction(steps=8, lr=1.0),
    torch2ebm.FixedPrediction(steps=20, lr=0.1),
    torch2ebm.PredictiveCoding(steps=20, lr=0.01),
    torch2ebm.PredictiveCoding(steps=20, lr=0.1),
    torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent(steps=20, lr=0.1)),
    torch2ebm.PredictiveCoding(),
    torch2ebm.PredictiveCoding(nudging=torch2ebm.Relative(0.3)),
    torch2ebm.PredictiveCoding(nudging=torch2ebm.Relative(1.0)),
)


class Block(nn.Module):
    """Two convolutions with batch norm, and a residual connection."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.second, self.second_norm = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


def resnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, 1, 1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        Block(WIDTH, WIDTH, 1),
        Block(WIDTH, 2 * WIDTH, 2),
        Block(2 * WIDTH, 4 * WIDTH, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * WIDTH, 10),
    )


def residual() -> nn.Sequential:
    """50 blocks of layer norm, a linear layer and ReLU."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            added: Tensor = x + self.inner(x)
            return added

    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), *[Added() for _ in range(50)], nn.Linear(64, 10))


def plain() -> nn.Sequential:
    """20 linear layers with ReLU between them, initialised for ReLU (He et al. 2015)."""
    hidden = [layer for _ in range(19) for layer in (nn.Linear(64, 64), nn.ReLU())]
    net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return net


NETS: dict[str, Callable[[], nn.Sequential]] = {"resnet": resnet, "residual": residual, "plain": plain}


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images ``[1347, 1, 8, 8]``, test images, and the labels of both."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train, test = (torch.tensor(part, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 for part in parts[:2])
    return train, test, *(torch.tensor(part) for part in parts[2:])


def accuracy(algorithm: torch2ebm.Algorithm, net_of: Callable[[], nn.Module], epochs: int, seed: int) -> float:
    """Share of the test images that the trained network, run as it is, puts in the right class."""
    train, test, train_labels, test_labels = digits()
    torch.manual_seed(seed)
    net = net_of()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.Adam(net.parameters(), lr=1e-3), model, algorithm)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(train), generator=generator).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(train[batch]), train_labels[batch]).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        return float((net(test).argmax(1) == test_labels).float().mean())


def outcome(algorithm: torch2ebm.Algorithm, net_of: Callable[[], nn.Module], epochs: int, seed: int) -> str:
    try:
        return f"{accuracy(algorithm, net_of, epochs, seed):.3f}"
    except torch2ebm.errors.DivergenceError:
        return "diverged"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", choices=NETS, default="resnet")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for algorithm in ALGORITHMS:
        began = time.perf_counter()
        each = ", ".join(outcome(algorithm, NETS[chosen.net], chosen.epochs, seed) for seed in range(chosen.seeds))
        print(f"{each:24}  {time.perf_counter() - began:4.0f} s  {algorithm!r}", flush=True)


if __name__ == "__main__":
    main()
