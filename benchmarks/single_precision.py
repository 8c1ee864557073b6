"""What single precision leaves of small errors: hidden errors and the first gradient, against double precision.

``python benchmarks/single_precision.py`` prints, for each network and algorithm, how far the first layer's gradient is
off, and of each hidden node how far its error is, how long it is in units of the rounding in it, and whether
``model.state.without_signal`` names it. Nothing is trained and nothing is stored; it takes a minute.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from learning_rows import resnet
from torch import Tensor, nn

import torch2ebm


@dataclass(frozen=True)
class Case:
    """A network, its batch, and what relaxes it."""

    name: str
    net: nn.Module
    x: Tensor
    algorithm: torch2ebm.Algorithm


@dataclass(frozen=True)
class Off:
    """How far single precision is from double.

    Attributes:
        gradient: Relative error of the first weight's gradient.
        errors: Relative error of each hidden node's error; infinite where double precision has none.
        rounding: Length of each node's error over that of the rounding in it; infinite where there is none.
        named: The nodes that are told to have no signal.
    """

    gradient: float
    errors: Mapping[str, float]
    rounding: Mapping[str, float]
    named: Sequence[str]


def chain(depth: int, activation: type[nn.Module], width: int = 32) -> nn.Module:
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), activation())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def convolutions() -> nn.Module:
    parts = [part for _ in range(6) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *parts, nn.Flatten(), nn.Linear(8 * 36, 10))


def cases() -> list[Case]:
    torch.manual_seed(0)
    strict, small, images = torch2ebm.PredictiveCoding, torch.randn(16, 32), torch.randn(16, 1, 28, 28)
    weak = strict(40, 0.05, nudging=torch2ebm.OneSided(1e-3))
    return [
        Case("8 tanh layers, strict (20, .01)", chain(8, nn.Tanh), small, strict(20, 0.01)),
        Case("19 tanh layers, strict (20, .1)", chain(19, nn.Tanh), small, strict(20, 0.1)),
        Case("19 ReLU layers, strict (20, .1)", chain(19, nn.ReLU), small, strict(20, 0.1)),
        *(
            Case(f"{depth} tanh layers, IL-prox", chain(depth, nn.Tanh), small, torch2ebm.ProximalInferenceLearning())
            for depth in (6, 14)
        ),
        Case("7 convolutions with batch norm, weak nudge", convolutions(), torch.randn(16, 1, 6, 6), weak),
        Case("ResNet-18 of width 8, strict (20, .01)", resnet(8, (2, 2, 2, 2)), images, strict(20, 0.01)),
        Case("ResNet-18 of width 8, strict (20, .1)", resnet(8, (2, 2, 2, 2)), images, strict(20, 0.1)),
    ]


def relaxed(net: nn.Module, x: Tensor, algorithm: torch2ebm.Algorithm) -> tuple[torch2ebm.InferenceState, Tensor]:
    """The state after a backward, and the first weight's gradient."""
    model = torch2ebm.convert(net)
    model.attach(algorithm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch2ebm.errors.NoSignalWarning)  # that is what is printed
        F.cross_entropy(model(x), torch.arange(len(x)) % 10).backward()
    weight = next(parameter for parameter in net.parameters() if parameter.grad is not None)
    assert weight.grad is not None
    return model.state, weight.grad


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def measured(case: Case) -> Off:
    state, gradient = relaxed(copy.deepcopy(case.net), case.x, case.algorithm)
    double, exact = relaxed(copy.deepcopy(case.net).double(), case.x.double(), case.algorithm)
    hidden = [node for node in state.graph.hidden_nodes if node.name not in state.unreached]
    noise = {node.name: float(state.rounding.get(node.slots[0], 0.0)) for node in hidden}
    return Off(
        distance(gradient, exact),
        {name: distance(state.error[name], double.error[name]) for name in noise},
        {name: float(state.error[name].norm()) / size if size else float("inf") for name, size in noise.items()},
        state.without_signal,
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    for case in cases():
        off = measured(case)
        print(f"\n{case.name}: the first gradient is {off.gradient:.1e} off, {len(off.named)} nodes are named")
        for name, error in off.errors.items():
            if error > 0.1 or name in off.named:
                says = "named" if name in off.named else ""
                print(f"  {name:20} error {error:.1e} off, {off.rounding[name]:.2g} times its rounding  {says}")


if __name__ == "__main__":
    main()
