"""The models that speed and memory are measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def classification(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def next_token(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = model(input_ids=x).logits
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@dataclass(frozen=True)
class Case:
    """A model, its batch and its loss."""

    name: str
    description: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    loss: Loss = classification
    tokens: int = 0  # size of the vocabulary, where inputs and targets are tokens

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()

    def batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        if self.tokens:
            x, y = torch.randint(0, self.tokens, (2, *self.input_shape), generator=generator)
            return x, y
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


class Residual(nn.Module):
    """The blocks of ResNet-18 and -34 (two 3x3) and of ResNet-50 and deeper (a bottleneck)."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        last = nn.Conv2d(width, outputs, 1 if bottleneck else 3, padding=0 if bottleneck else 1, bias=False)
        first = nn.Conv2d(channels, width, 1, bias=False) if bottleneck else _three(channels, width, stride)
        middle = [nn.BatchNorm2d(width), nn.ReLU(), _three(width, width, stride)] if bottleneck else []
        self.body = nn.Sequential(first, *middle, nn.BatchNorm2d(width), nn.ReLU(), last, nn.BatchNorm2d(outputs))
        same = stride == 1 and channels == outputs
        shortcut = [nn.Conv2d(channels, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Identity() if same else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(self.body(x) + self.shortcut(x))
        return out


def _three(channels: int, outputs: int, stride: int) -> nn.Module:
    return nn.Conv2d(channels, outputs, 3, stride, 1, bias=False)


def resnet(depths: Sequence[int], bottleneck: bool) -> nn.Module:
    """The published architecture (He et al. 2016) with 10 classes: (2, 2, 2, 2) is ResNet-18."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    channels = 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        for i in range(depth):
            layers.append(Residual(channels, width, 2 if stage and not i else 1, bottleneck))
            channels = 4 * width if bottleneck else width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def resnet18() -> nn.Module:
    return resnet((2, 2, 2, 2), bottleneck=False)


def resnet50() -> nn.Module:
    return resnet((3, 4, 6, 3), bottleneck=True)


def resnet18_case(batch: int = 8, size: int = 96) -> Case:
    return Case(f"ResNet-18, batch {batch}", f"ResNet-18, {batch}x3x{size}x{size}", resnet18, (batch, 3, size, size))


def gpt2(width: int = 256, dropout: float = 0.1, written_out: bool = False) -> nn.Module:
    """Twelve layers, as transformers makes them; ImportError where that is missing.

    With ``written_out`` attention is two matrix products: torch's counter has no formula for the fused one on the CPU.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    settings: dict[str, Any] = {"vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0}
    settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    if written_out:
        settings["attn_implementation"] = "eager"
    config = GPT2Config(n_layer=12, n_embd=width, n_head=width // 64, use_cache=False, **settings)
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def gpt2_case(width: int = 256, batch: int = 8, length: int = 64) -> Case:
    description = f"GPT-2, 12 layers of width {width}, no dropout, {batch} sequences of {length} tokens"
    return Case(
        f"GPT-2, width {width}",
        description,
        lambda: gpt2(width, 0.0, written_out=True),
        (batch, length),
        next_token,
        1000,
    )


class ResidualLayer(nn.Module):
    """``x + tanh(W x + b)``: one level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def residual_mlp_case(levels: int = 50, width: int = 256, batch: int = 64) -> Case:
    """Hidden layers and a linear output: ``levels`` + 1 layers, as many levels as the name says above the output."""

    def build() -> nn.Module:
        return nn.Sequential(*[ResidualLayer(width) for _ in range(levels)], nn.Linear(width, 10))

    return Case(f"{levels} levels", f"residual MLP of {levels} levels, width {width}", build, (batch, width))
