"""The models that speed and memory are measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    name: str
    description: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]

    def batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.input_shape, generator=generator)
        return x, torch.randint(0, 10, self.input_shape[:1], generator=generator)


def mlp(widths: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths[:-1]):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def five_convolutions() -> nn.Module:
    channels = (3, 32, 64, 64, 128, 128)
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(channels)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.ReLU()]
        if i:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


CASES = (
    Case("a", "MLP 784-256-256-256-10 tanh, batch 64", lambda: mlp((784, 256, 256, 256, 10), nn.Tanh), (64, 784)),
    Case("b", "MLP of 8 layers, width 512, relu, batch 128", lambda: mlp((784, *[512] * 7, 10), nn.ReLU), (128, 784)),
    Case("c", "5 convolutions 32-64-64-128-128, 3x32x32, batch 32", five_convolutions, (32, 3, 32, 32)),
)
