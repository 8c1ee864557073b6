"""Modules of many kinds for the tests of capture: loops, branches on shapes, written views, Hugging Face models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torch2ebm

# Own ------------------------------------------------------------------------------------------------------------------


class LoopOverShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.read = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], 6, dtype=x.dtype)
        for i in range(x.shape[1]):
            state = torch.tanh(self.cell(state) + x[:, i : i + 1])
        return self.read(state)


class BranchOnShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 2
        if x.shape[1] > 3 and len(x) > 0:
            x = self.first(x)
        return self.second(functional.relu(x))


class Chunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(2, 4) for _ in range(3))
        self.read = nn.Linear(4, 3)
        self.register_buffer("position", torch.linspace(0, 1, 40).reshape(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        parts = tuple(part(piece) for part, piece in zip(self.parts, x.chunk(3, 1), strict=True))
        table = torch.stack(parts, 1) + self.position[: len(parts)]
        return self.read(torch.sigmoid(table)).sum(1)


class WrittenView(nn.Module):
    """A table filled column by column, a constant, a part under no_grad, and an output in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = torch.tanh(self.first(x))
        table = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        for i in range(hidden.shape[1]):
            table[:, i] = hidden[:, i] * i
        with torch.no_grad():
            gate = hidden.softmax(-1) * 2
        table += gate * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype)
        return {"logits": self.second(table), "more": (hidden, 3, None)}


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Normalised(nn.Module):
    """Batch norm, dropout and a residual connection; an output in a dataclass that export does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.3)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.norm_again = nn.BatchNorm2d(4)
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Answer:
        hidden = x.reshape(x.shape[0], 1, 2, 3) if x.shape[1] == 6 else x
        hidden = self.dropout(self.relu(self.norm(self.conv(hidden))))
        hidden = self.relu(self.norm_again(self.again(hidden)) + hidden)
        return Answer(self.read(hidden.mean((2, 3))), hidden)


OWN: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: cls for cls in (LoopOverShape, BranchOnShape, Chunks, WrittenView, Normalised)
}


# Hugging Face ---------------------------------------------------------------------------------------------------------

TEXT = {"vocab_size": 50, "max_position_embeddings": 32}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def gpt2(layers: int = 2) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=layers,
        n_head=2,
        vocab_size=50,
        n_positions=32,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **TEXT, use_cache=False))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **TEXT))


def distilbert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, **TEXT)
    return transformers.DistilBertForSequenceClassification(config)


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=2)
    return transformers.ViTForImageClassification(config)


FACE: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2, "llama": llama, "bert": bert, "distilbert": distilbert, "vit": vit
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    name: str
    labels: bool = False

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return {**OWN, **FACE}[self.name]().double()

    def inputs(self, batch: int = 4, seed: int = 1) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        if self.name in OWN:
            return {"x": torch.randn(batch, 6, generator=generator, dtype=torch.float64)}
        tokens = torch.randint(0, 50, (batch, 7), generator=generator)
        image = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)
        given = {"pixel_values": image} if self.name == "vit" else {"input_ids": tokens}
        if self.labels:
            given["labels"] = tokens.clone() if self.name in ("gpt2", "llama") else torch.arange(batch) % 2
        return given

    def loss(self, output: Any) -> Tensor:
        if self.labels:
            return output.loss
        logits = (
            output if isinstance(output, Tensor) else output["logits"] if isinstance(output, dict) else output.logits
        )
        return functional.mse_loss(logits, torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).expand(
            len(logits), -1
        ).reshape(logits.shape))  # fmt: skip


PROBLEMS = [Problem(name) for name in OWN] + [Problem(name, labels) for name in FACE for labels in (False, True)]


# Submodules of which each makes a node
BLOCKS = {
    "gpt2": ["transformer.h.0", "transformer.h.1"],
    "llama": ["model.layers.0", "model.layers.1"],
    "bert": ["bert.encoder.layer.0", "bert.encoder.layer.1"],
    "distilbert": ["distilbert.transformer.layer.0", "distilbert.transformer.layer.1"],
    "vit": ["vit.layers.0", "vit.layers.1"],
}


@contextmanager
def training_with(model: Any, algorithm: Any) -> Iterator[torch2ebm.EnergyOptimizer]:
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, algorithm)
    try:
        yield optimizer
    finally:
        optimizer.detach()


def same(ours: Any, real: Any) -> bool:
    return torch.equal(ours, real) if isinstance(real, Tensor) else ours == real
