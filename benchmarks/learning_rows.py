"""The networks and the data on which learning is measured, each with a protocol that one core finishes in minutes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from reporting import MNIST
from torch import Tensor, nn

import torch2ebm

FASHION = MNIST.parent / "fashion_mnist"
Split = tuple[Tensor, Tensor, Tensor, Tensor]  # training inputs and targets, test inputs and targets


def _call(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = model(x)
    return output


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = model(input_ids=x).logits
    return output


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())  # of all tokens, where there are several


@dataclass(frozen=True)
class Row:
    """One network with its data and its training.

    Attributes:
        name: As the table has it.
        build: Makes the network, by torch's generator.
        data: Its inputs and targets.
        epochs: Passes over the training data; Adam's learning rate falls from ``lr`` to 0 along a line.
        batch: Samples a step.
        lr: Learning rate to begin with.
        head: Names of the parameters of the last block begin with one of these.
        output: The logits of a model for inputs; classes are along the last dimension.
        score: ``"accuracy"`` in percent, or ``"loss"`` of the test data.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], Split]
    epochs: int
    batch: int
    lr: float
    head: Sequence[str]
    output: Callable[[nn.Module, Tensor], Tensor] = _call
    score: str = "accuracy"

    @property
    def protocol(self) -> dict[str, Any]:
        """What a stored result must agree with to be used again."""
        train, _, test, _ = self.data()
        return {
            "epochs": self.epochs,
            "batch": self.batch,
            "lr": self.lr,
            "train": len(train),
            "test": len(test),
        }

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return _cross_entropy(output, target)


# ---- data


@functools.cache
def digits() -> Split:
    """1,347 and 450 images ``[1, 8, 8]`` of scikit-learn's digits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train, test = (torch.tensor(part, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 for part in parts[:2])
    train_labels, test_labels = (torch.tensor(part) for part in parts[2:])
    return train, train_labels, test, test_labels


@functools.cache
def mnist() -> Split:
    """8,000 and 2,000 images ``[1, 28, 28]``."""
    return _images(torch2ebm.mnist.load_mnist(MNIST))


@functools.cache
def fashion(train: int = 60_000, test: int = 10_000) -> Split:
    """The first images ``[1, 28, 28]`` of Fashion-MNIST."""
    images = _images(torch2ebm.mnist.load_mnist(FASHION))
    return images[0][:train], images[1][:train], images[2][:test], images[3][:test]


def _images(stored: Any) -> Split:
    train, test = (part.unsqueeze(1).float() / 255 for part in (stored.train_images, stored.test_images))
    return train, stored.train_labels, test, stored.test_labels


@functools.cache
def characters(length: int = 32, train: int = 4096, test: int = 512) -> Split:
    """Windows of the text on Python's own language that each Python comes with; the target is the next character."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    coded = torch.tensor(list(text.encode("ascii", "replace")))
    starts = torch.linspace(0, len(coded) - length - 2, train + test).long()
    windows = coded[starts[:, None] + torch.arange(length + 1)]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    inputs, targets = windows[order, :-1], windows[order, 1:]
    return inputs[:train], targets[:train], inputs[train:], targets[train:]


@functools.cache
def comparisons(length: int = 8, train: int = 2048, test: int = 1024) -> Split:
    """Sequences of 50 tokens; the class says whether the first one is larger than the last one."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (train + test, length), generator=generator)
    classes = (tokens[:, 0] > tokens[:, -1]).long()
    return tokens[:train], classes[:train], tokens[train:], classes[train:]


# ---- networks


def mlp() -> nn.Module:
    hidden = (nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))


def plain(depth: int = 20) -> nn.Module:
    """Linear layers with ReLU between them, initialised for ReLU (He et al. 2015)."""
    hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(64, 64), nn.ReLU())]
    net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return net


class Residual(nn.Module):
    """Layer norm, a linear layer and ReLU, beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.inner(x)
        return added


def residual(depth: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), *[Residual(64) for _ in range(depth)], nn.Linear(64, 10))


def vgg5(width: int = 16) -> nn.Module:
    """Four convolutions with max-pooling, and a linear layer."""
    layers: list[nn.Module] = []
    channels = 1
    for out in (width, 2 * width, 4 * width, 4 * width):
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))


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


def resnet(width: int = 8, blocks: Sequence[int] = (1, 1, 1)) -> nn.Module:
    """The ResNet of small images: stages of blocks, each half as large and twice as wide as the one before."""
    stages: list[nn.Module] = []
    channels = width
    for stage, count in enumerate(blocks):
        out = width * 2**stage
        stages += [Block(channels if i == 0 else out, out, 2 if stage and i == 0 else 1) for i in range(count)]
        channels = out
    stem = (nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Attended(nn.Module):
    """A transformer's block with the norms before its parts (Xiong et al. 2020)."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projected, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widened, self.narrowed = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.projected(self.before(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.movedim(-3, 0).transpose(-2, -3).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.mixed(attended.transpose(-2, -3).flatten(-2))
        added: Tensor = x + self.narrowed(F.gelu(self.widened(self.after(x))))
        return added


class VisionTransformer(nn.Module):
    """Patches of 2 x 2 of an image of 8 x 8, and the mean over them (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*[Attended(width, 4, causal=False) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class Gpt(nn.Module):
    """A decoder over characters (Radford et al. 2018)."""

    def __init__(self, width: int = 64, depth: int = 2, length: int = 32) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(128, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[Attended(width, 4, causal=True) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(x) + self.places)))
        return logits


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=2, **sizes, **dropout))


class Lstm(nn.Module):
    """A cell over the 8 rows of an image, each row an input (Hochreiter and Schmidhuber 1997)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(8, width), nn.Linear(width, 10)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        hidden = memory = x.new_zeros(len(x), self.width)
        for row in x.squeeze(1).unbind(1):
            hidden, memory = self.cell(row, (hidden, memory))
        logits: Tensor = self.head(hidden)
        return logits


def _few() -> Split:
    return fashion(12_000)


ROWS: Sequence[Row] = (
    Row("MLP 784-128-128-10, MNIST 10k", mlp, mnist, 3, 64, 1e-3, ("5.",)),
    Row("20 plain ReLU layers, digits", plain, digits, 12, 32, 1e-3, ("39.",)),
    Row("50 residual blocks, digits", lambda: residual(50), digits, 3, 32, 1e-3, ("52.",)),
    Row("100 residual blocks, digits", lambda: residual(100), digits, 2, 32, 1e-3, ("102.",)),
    Row("VGG-5, Fashion-MNIST", vgg5, _few, 2, 64, 2e-3, ("13.",)),
    Row("ResNet of 3 blocks with batch norm, digits", resnet, digits, 4, 32, 1e-3, ("8.",)),
    Row("ResNet-18 of width 8, Fashion-MNIST", lambda: resnet(8, (2, 2, 2, 2)), _few, 1, 64, 2e-3, ("13.",)),
    Row("VGG-5, Fashion-MNIST 60k", vgg5, fashion, 1, 64, 2e-3, ("13.",)),
    Row("ResNet-18 of width 8, Fashion-MNIST 60k", lambda: resnet(8, (2, 2, 2, 2)), fashion, 1, 64, 2e-3, ("13.",)),
    Row("vision transformer of 2 blocks, digits", VisionTransformer, digits, 10, 32, 2e-3, ("head.",)),
    Row("GPT of 2 blocks, characters", Gpt, characters, 2, 32, 2e-3, ("head.",), score="loss"),
    Row("BERT of 2 layers, comparisons", bert, comparisons, 8, 32, 2e-3, ("classifier.",), _logits),
    Row("LSTM cell over 8 rows, digits", Lstm, digits, 8, 32, 5e-3, ("head.",)),
)
