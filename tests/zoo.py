"""One list of small problems, in float64, over which the tests run their properties.

Every module can be traced by ``torch.fx.symbolic_trace`` and has only parameters that take part in the loss.
A loss is the mean over the batch, with targets that depend on nothing but the shape of the output.

Tags:
    chain           an ``nn.Sequential`` whose every child is one layer
    kinks           ReLU, max-pooling and the like: no second derivative everywhere
    in_place        operations that overwrite a value
    batch_norm, instance_norm, group_norm, layer_norm
    batch_coupled   one sample's output depends on the others
    dropout         random in train mode
    shared          a parameter, or a module, is used more than once
    direct          a parameter is read in ``forward``, not through a module that owns it
    multiplicative  values are multiplied with one another
    branches        some value has several readers
    convolution, attention, recurrent
    opaque          a module of several operations stays one node (LSTM, GRU, MultiheadAttention)
    integer         some input holds integers
    buffer          a buffer is read in ``forward``
    multi_input, keyword_input, nested_input
    multi_output, nested_output (a dict)
    own_loss        the output is, or holds, the loss
    frozen          some parameter does not require gradients
    stop_gradient   ``detach`` in ``forward``
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from oracles.graphs import Inputs, Loss, SkipDag, call
from torch import Tensor, nn

__all__ = ["PROBLEMS", "Problem", "call", "tagged"]

FEATURES = 6
CLASSES = 4
STEPS = 5
VOCABULARY = 11


@dataclass(frozen=True)
class Problem:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]  # from the batch size
    loss: Loss  # from any output of the module to a scalar
    tags: frozenset[str] = frozenset()


def tagged(*wanted: str, without: tuple[str, ...] = ()) -> tuple[Problem, ...]:
    """The problems that have all of the tags, and none of those in ``without``."""
    return tuple(p for p in PROBLEMS if p.tags.issuperset(wanted) and p.tags.isdisjoint(without))


# ---- seeded inputs


def _normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _integers(bound: int, *shape: int, seed: int = 2) -> Tensor:
    return torch.randint(bound, shape, generator=torch.Generator().manual_seed(seed))


def _vectors(batch: int) -> Inputs:
    return (_normal(batch, FEATURES),)


def _images(batch: int) -> Inputs:
    return (_normal(batch, 3, 8, 8),)


def _sequences(batch: int) -> Inputs:
    return (_normal(batch, STEPS, FEATURES),)


def _tokens(batch: int) -> Inputs:
    return (_integers(VOCABULARY, batch, STEPS),)


def _two_vectors(batch: int) -> Inputs:
    return _normal(batch, FEATURES), _normal(batch, 3, seed=3)


def _image_and_text(batch: int) -> dict[str, Tensor]:
    return {"image": _normal(batch, 3, 8, 8), "tokens": _integers(VOCABULARY, batch, STEPS)}


def _nested(batch: int) -> Inputs:
    return _image_and_text(batch), (_normal(batch, FEATURES), _normal(batch, 3, seed=3))


def _labelled(batch: int) -> Inputs:
    return _normal(batch, FEATURES), _integers(CLASSES, batch)


def _labelled_keywords(batch: int) -> Inputs:
    x, target = _labelled(batch)
    return {"x": x, "target": target}


# ---- losses


def _classification(logits: Tensor) -> Tensor:
    """Mean cross-entropy of the last dimension, labels seeded."""
    rows = logits.flatten(0, -2)
    return F.cross_entropy(rows, _integers(rows.shape[1], len(rows)).to(logits.device))


def _segmentation(logits: Tensor) -> Tensor:
    """Mean cross-entropy of the channels of every pixel."""
    return _classification(logits.movedim(1, -1))


def _regression(output: Tensor) -> Tensor:
    """Half the squared error of each sample, averaged over the batch, targets seeded."""
    target = _normal(*output.shape, seed=4).to(output)
    return 0.5 * (output - target).square().flatten(1).sum(1).mean()


def _pair_loss(outputs: tuple[Tensor, Tensor]) -> Tensor:
    return _classification(outputs[0]) + 0.5 * _regression(outputs[1])


def _dict_loss(outputs: dict[str, Tensor]) -> Tensor:
    return _classification(outputs["logits"]) + 0.5 * _regression(outputs["value"])


def _features_loss(outputs: tuple[Tensor, Tensor]) -> Tensor:
    features, logits = outputs
    return _classification(logits) + 0.1 * features.square().sum(1).mean()


def _itself(output: Tensor) -> Tensor:
    return output


def _first(outputs: tuple[Tensor, Tensor]) -> Tensor:
    return outputs[0]


# ---- chains


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def _relu_mlp() -> nn.Module:
    relu = nn.ReLU(inplace=True)  # one object in two places, as torchvision does
    return nn.Sequential(nn.Linear(FEATURES, 12), relu, nn.Linear(12, 12), relu, nn.Linear(12, CLASSES))


def _deep_linear() -> nn.Module:
    widths = (FEATURES, 8, 7, 5, 3)
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths)))


def _autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 2), nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, FEATURES)
    )


def _tied() -> nn.Module:
    shared = nn.Linear(8, 8)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(8, CLASSES))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )


def _batch_norm_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),  # no bias: batch norm would take its gradient away
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )


def _frozen_first() -> nn.Module:
    module = _mlp()
    next(module.children()).requires_grad_(False)
    return module


# ---- vectors


class InPlaceMLP(nn.Module):
    """The spellings of in-place code: a result that is used, one that is dropped, an augmented assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 12)
        self.second = nn.Linear(12, 12)
        self.third = nn.Linear(12, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x), inplace=True)
        update = self.second(hidden)
        update += hidden
        update.relu_()
        last = self.third(update).mul_(0.5).add_(update)
        F.relu(last, inplace=True)
        return self.head(last)


class GatedNet(nn.Module):
    """A gate, a bilinear form and a square: the last reads the same value twice."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(FEATURES, 8)
        self.gate = nn.Linear(FEATURES, 8)
        self.inner = nn.Linear(8, 8)
        self.bilinear = nn.Bilinear(8, 8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        value = torch.tanh(self.value(x))
        gated = value * torch.sigmoid(self.gate(x)) + value * value
        hidden = torch.tanh(self.inner(gated))
        return self.head(self.bilinear(hidden, gated))


class Siamese(nn.Module):
    """One encoder, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh())
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.encoder(x[:, :3]), self.encoder(x[:, 3:])
        return self.head(torch.cat([(left - right).square(), left * right], dim=1))


class MultiInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(FEATURES, 8)
        self.right = nn.Linear(3, 8)
        self.head = nn.Linear(11, CLASSES)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        hidden = torch.tanh(self.left(x) + self.right(context))
        return self.head(torch.cat((hidden, context), dim=-1))


class KeywordInput(nn.Module):
    """An image and a text, the text optional in the signature."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, stride=2)
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, image: Tensor, tokens: Tensor | None = None, scale: float = 0.5) -> Tensor:
        seen = torch.tanh(self.convolution(image)).mean(dim=(2, 3))
        read = torch.tanh(self.embedding(tokens)).mean(dim=1)
        return self.head(torch.cat([seen, scale * read], dim=1))


class NestedInput(nn.Module):
    """A dict and a tuple of tensors as positional arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.multimodal = KeywordInput()
        self.vectors = MultiInput()

    def forward(self, sample: dict[str, Tensor], vectors: tuple[Tensor, Tensor]) -> Tensor:
        left, right = vectors
        return self.multimodal(sample["image"], tokens=sample["tokens"]) + self.vectors(left, right)


class MultiOutput(nn.Module):
    """Two heads on one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.policy = nn.Linear(8, CLASSES)
        self.value = nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x)
        return self.policy(hidden), self.value(hidden)


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = MultiOutput()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits, value = self.heads(x)
        return {"logits": logits, "value": torch.tanh(value)}


class FeaturesAndLogits(nn.Module):
    """Returns a value that it goes on to read."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh())
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(x)
        return features, self.head(features)


class DropoutNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 16)
        self.dropout = nn.Dropout(0.2)
        self.second = nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(torch.tanh(self.first(x)))
        hidden = hidden + F.dropout(torch.tanh(self.second(hidden)), 0.3, training=self.training)
        return self.head(hidden)


class DirectParameters(nn.Module):
    """Weights read in ``forward``; a scale that is computed from parameters and read by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.4 * torch.randn(FEATURES, 8))
        self.bias = nn.Parameter(0.1 * torch.randn(8))
        self.inner = nn.Parameter(0.4 * torch.randn(8, 8))
        self.head = nn.Parameter(0.4 * torch.randn(8, CLASSES))
        self.log_scale = nn.Parameter(0.1 * torch.randn(8))
        self.shift = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.exp(self.log_scale) + self.shift
        hidden = torch.tanh(x @ self.weight + self.bias) * scale
        hidden = torch.tanh(hidden @ self.inner) * scale
        return hidden @ self.head


class Masked(nn.Module):
    """Comparisons of live values choose what flows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 12)
        self.second = nn.Linear(12, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = torch.where(hidden > 0, hidden, 0.1 * hidden)
        mask = hidden > hidden.mean(dim=1, keepdim=True)
        return self.head(torch.tanh(self.second(hidden)) * mask + hidden.masked_fill(mask, 0.0))


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Parameter(0.3 * torch.randn(FEATURES, 4, 3))
        self.mixing = nn.Parameter(0.5 * torch.randn(3, 5))
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("bi,ijk->bjk", x, self.core))
        mixed = torch.tanh(torch.einsum("bjk,kl->bjl", hidden, self.mixing))
        return self.head(mixed.flatten(1))


class StopGradient(nn.Module):
    """Part of the network reads a value without training what made it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, 8)
        self.probe = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.encoder(x))
        return self.head(hidden + torch.tanh(self.probe(hidden.detach())))


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = _mlp()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.body(x), target)


class LossAndLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = _mlp()
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.body(x)
        return self.criterion(logits, target), logits


# ---- images


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride > 1:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.layers = nn.Sequential(ResidualBlock(4, 4, stride=1), ResidualBlock(4, 8, stride=2))
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.layers(self.stem(x))), 1))


class DenseNet(nn.Module):
    """Each layer reads the concatenation of all values before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 2 * i, 2, 3, padding=1) for i in range(3))
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(torch.tanh(layer(torch.cat(features, 1))))
        return self.head(torch.cat(features, 1).mean(dim=(2, 3)))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Conv2d(3, 3, 1)
        self.wide = nn.Sequential(nn.Conv2d(3, 2, 1), nn.GELU(), nn.Conv2d(2, 3, 5, padding=2))
        self.pooled = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), nn.Conv2d(3, 2, 1))
        self.mix = nn.Conv2d(8, 4, 3, stride=2)
        self.head = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.point(x), self.wide(x), self.pooled(x)]
        mixed = self.mix(F.gelu(torch.cat(branches, dim=1)))
        return self.head(F.gelu(mixed).reshape(mixed.shape[0], -1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, 2, 1)
        self.expand = nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(self.squeeze(x)))))


def _conv_norm_act(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.Hardswish(inplace=True))


class MobileNet(nn.Module):
    """Expand, depthwise, squeeze and excite, project, and a residual edge around it all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm_act(3, 4, kernel=3, stride=2)
        self.expand = _conv_norm_act(4, 8, kernel=1)
        self.depthwise = _conv_norm_act(8, 8, kernel=3, groups=8)
        self.excite = SqueezeExcite(8)
        self.project = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.excite(self.depthwise(self.expand(x))))
        return self.head(x.mean([2, 3]))


class UNet(nn.Module):
    """Two scales; one way up is a transposed convolution, the other interpolates."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 4, 3, padding=1)
        self.down2 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.bottom = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.up2 = nn.Upsample(scale_factor=2, mode="bilinear")
        self.merge2 = nn.Conv2d(12, 6, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.merge1 = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.tanh(self.down1(x))
        coarse = torch.tanh(self.down2(fine))
        bottom = torch.tanh(self.bottom(coarse))
        merged = torch.tanh(self.merge2(torch.cat([self.up2(bottom), coarse], dim=1)))
        return self.merge1(torch.cat([self.up1(merged), fine], dim=1))


class NormalisedCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.group = nn.GroupNorm(2, 6)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.group(self.conv1(x)))
        hidden = F.gelu(self.instance(self.conv2(hidden)))
        return self.head(F.adaptive_avg_pool2d(hidden, 2).flatten(1))


# ---- attention


class SelfAttention(nn.Module):
    """Written out: one projection cut into queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("future", torch.ones(STEPS, STEPS, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, width = x.shape
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        query = query.view(batch, steps, self.heads, -1).transpose(1, 2)
        key = key.view(batch, steps, self.heads, -1).permute(0, 2, 3, 1)
        value = value.view(batch, steps, self.heads, -1).transpose(1, 2)
        scores = query @ key / (width // self.heads) ** 0.5
        weights = F.softmax(scores.masked_fill(self.future, float("-inf")), dim=-1)
        return self.out((weights @ value).transpose(1, 2).reshape(batch, steps, width))


class GPTBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads=2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(STEPS, width)
        self.blocks = nn.ModuleList(GPTBlock(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        hidden = self.tokens(x) + self.positions(places)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class ViTBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.class_token = nn.Parameter(0.5 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.5 * torch.randn(1, 5, width))
        self.blocks = nn.Sequential(ViTBlock(width), ViTBlock(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        token = self.class_token.expand(x.shape[0], -1, -1)
        hidden = torch.cat([token, patches], dim=1) + self.positions
        return self.head(self.norm(self.blocks(hidden))[:, 0])


class MixerBlock(nn.Module):
    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(steps, 2 * steps), nn.GELU(), nn.Linear(2 * steps, steps))
        self.norm2 = nn.LayerNorm(width)
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, 8)
        self.blocks = nn.Sequential(MixerBlock(STEPS, 8), MixerBlock(STEPS, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(dim=1))


# ---- recurrence


class UnrolledLSTM(nn.Module):
    """One cell, written out and called at every step."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.width = width
        self.cell = nn.Linear(FEATURES + width, 4 * width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = memory = x.new_zeros(x.shape[0], self.width)
        for step in range(STEPS):
            gates = self.cell(torch.cat([x[:, step], hidden], dim=1))
            enter, forget, candidate, leave = gates.chunk(4, dim=1)
            memory = torch.sigmoid(forget) * memory + torch.sigmoid(enter) * torch.tanh(candidate)
            hidden = torch.sigmoid(leave) * torch.tanh(memory)
        return self.head(hidden)


class LSTMNet(nn.Module):
    """Reads the whole sequence and the last state of a two-layer LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        sequence, (hidden, _memory) = self.lstm(x)
        return self.head(torch.cat([sequence.mean(dim=1), hidden[-1]], dim=1))


class GRUNet(nn.Module):
    """Batch in the second dimension inside, and a prediction for every step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.gru = nn.GRU(FEATURES, 6)
        self.head = nn.Linear(6, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        sequence, _last = self.gru(self.embedding(tokens).transpose(0, 1))
        return self.head(sequence).transpose(0, 1)


# ---- the list


def _amplified(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Weights of variance 1 / fan-in: torch's are a third of it, and the gradient fades on a long way back."""

    def build() -> nn.Module:
        module = make()
        with torch.no_grad():
            for weight in module.parameters():
                weight.mul_(3**0.5 if weight.ndim > 1 else 1)
        return module

    return build


def _problem(
    name: str, make: Callable[[], nn.Module], inputs: Callable[[int], Inputs], loss: Loss, tags: str = ""
) -> Problem:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make().double().train()

    return Problem(name, build, inputs, loss, frozenset(tags.split()))


PROBLEMS: tuple[Problem, ...] = (
    _problem("mlp", _mlp, _vectors, _classification, "chain"),
    _problem("relu_mlp", _relu_mlp, _vectors, _classification, "chain in_place kinks"),
    _problem("in_place_mlp", InPlaceMLP, _vectors, _classification, "in_place kinks branches"),
    _problem("deep_linear", _deep_linear, _vectors, _regression, "chain"),
    _problem("autoencoder", _autoencoder, _vectors, _regression, "chain"),
    _problem("tied", _tied, _vectors, _classification, "chain shared"),
    _problem("frozen_first", _frozen_first, _vectors, _classification, "chain frozen"),
    _problem("gated", GatedNet, _vectors, _classification, "multiplicative branches"),
    _problem("siamese", Siamese, _vectors, _classification, "shared multiplicative branches"),
    _problem("skip_dag", SkipDag, lambda batch: (_normal(batch, 5),), _regression, "shared multiplicative branches"),
    _problem("multi_input", MultiInput, _two_vectors, _classification, "multi_input"),
    _problem(
        "keyword_input", KeywordInput, _image_and_text, _classification, "convolution integer multi_input keyword_input"
    ),
    _problem("nested_input", NestedInput, _nested, _classification, "convolution integer multi_input nested_input"),
    _problem("multi_output", MultiOutput, _vectors, _pair_loss, "multi_output branches"),
    _problem("dict_output", DictOutput, _vectors, _dict_loss, "multi_output nested_output branches"),
    _problem("features_and_logits", FeaturesAndLogits, _vectors, _features_loss, "multi_output branches"),
    _problem("dropout", DropoutNet, _vectors, _classification, "dropout branches"),
    _problem("direct_parameters", DirectParameters, _vectors, _classification, "direct shared"),
    _problem("masked", Masked, _vectors, _classification, "kinks multiplicative branches"),
    _problem("einsum", Einsum, _vectors, _classification, "direct"),
    _problem("stop_gradient", StopGradient, _vectors, _classification, "stop_gradient branches"),
    _problem("own_loss", OwnLoss, _labelled, _itself, "own_loss integer multi_input"),
    _problem(
        "loss_and_logits",
        LossAndLogits,
        _labelled_keywords,
        _first,
        "own_loss integer multi_input keyword_input multi_output branches",
    ),
    _problem("cnn", _cnn, _images, _classification, "chain convolution kinks"),
    _problem("batch_norm_cnn", _batch_norm_cnn, _images, _classification, "chain convolution batch_norm batch_coupled"),
    _problem(
        "resnet", ResNet, _images, _classification, "convolution batch_norm batch_coupled in_place kinks branches"
    ),
    _problem("densenet", DenseNet, _images, _classification, "convolution branches"),
    _problem("inception", Inception, _images, _classification, "convolution branches"),
    _problem(
        "mobilenet",
        _amplified(MobileNet),
        _images,
        _classification,
        "convolution batch_norm batch_coupled in_place multiplicative kinks branches",
    ),
    _problem("unet", _amplified(UNet), _images, _segmentation, "convolution branches"),
    _problem("normalised_cnn", NormalisedCNN, _images, _classification, "convolution group_norm instance_norm"),
    _problem("vit", ViT, _images, _classification, "convolution attention opaque layer_norm direct branches"),
    _problem(
        "gpt", GPT, _tokens, _classification, "attention layer_norm shared integer buffer multiplicative branches"
    ),
    _problem("mixer", Mixer, _sequences, _classification, "layer_norm branches"),
    _problem("unrolled_lstm", UnrolledLSTM, _sequences, _classification, "recurrent shared multiplicative branches"),
    _problem("lstm", _amplified(LSTMNet), _sequences, _classification, "recurrent opaque branches"),
    _problem("gru", GRUNet, _tokens, _classification, "recurrent opaque integer"),
)
