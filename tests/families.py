"""Architectures that people have, in float64 and small: the true structure of each, at toy widths and resolutions.

Written out from the papers in the layout that torchvision and Hugging Face use, so that a way of writing forward
(a view, a roll, a list of features, an output class) is met here before a user meets it.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from oracles.graphs import Inputs
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import Problem

CLASSES = 4
WORDS = 11
STEPS = 5
FEATURES = 6


# ---- inputs and loss


def _normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _integers(bound: int, *shape: int, seed: int = 2) -> Tensor:
    return torch.randint(bound, shape, generator=torch.Generator().manual_seed(seed))


def _images(side: int) -> Callable[[int], Inputs]:
    return lambda batch: (_normal(batch, 3, side, side),)


def _vectors(batch: int) -> Inputs:
    return (_normal(batch, FEATURES),)


def _sequences(batch: int) -> Inputs:
    return (_normal(batch, STEPS, FEATURES),)


def _tokens(batch: int) -> Inputs:
    return (_integers(WORDS, batch, STEPS),)


def _pair_of_sequences(batch: int) -> Inputs:
    return _normal(batch, STEPS, 8), _normal(batch, STEPS - 1, 8, seed=3)


def _padded_tokens(batch: int) -> Inputs:
    """Sequences of different lengths, the rest masked."""
    lengths = 2 + torch.arange(batch) % (STEPS - 1)
    mask = (torch.arange(STEPS) < lengths[:, None]).long()
    return {"input_ids": _integers(WORDS, batch, STEPS), "attention_mask": mask}


def _graph(vertices: int) -> Inputs:
    """A ring with chords, edges in both directions."""
    ring = torch.arange(vertices)
    edges = torch.cat([torch.stack([ring, (ring + hop) % vertices]) for hop in (1, 2)], dim=1)
    return _normal(vertices, FEATURES), torch.cat([edges, edges.flip(0)], dim=1)


def _nested(batch: int) -> Inputs:
    return {"views": (_normal(batch, FEATURES), _normal(batch, FEATURES, seed=3))}, [
        {"side": _normal(batch, 3, seed=5)}
    ]


def loss_of(output: Any) -> Tensor:
    """Half the squared error of every tensor that is returned, a mean over batch and features; targets seeded."""
    found = [leaf for leaf in leaves(output) if leaf.is_floating_point()]
    losses = [
        0.5 * (leaf - _normal(*leaf.shape, seed=4 + i).to(leaf)).flatten(1).square().mean(1).mean()
        for i, leaf in enumerate(found)
    ]
    return sum(losses[1:], losses[0])


def leaves(output: Any) -> list[Tensor]:
    """The tensors of an output, those of dataclasses included."""
    if hasattr(output, "__dataclass_fields__"):
        output = vars(output)
    if isinstance(output, dict):
        return [leaf for part in output.values() for leaf in leaves(part)]
    if isinstance(output, (tuple, list)):
        return [leaf for part in output for leaf in leaves(part)]
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


# ---- VGG


def vgg(batch_norm: bool) -> nn.Module:
    class VGG(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers: list[nn.Module] = []
            channels = 3
            for width in (4, "M", 6, "M", 8, 8, "M"):
                if width == "M":
                    layers.append(nn.MaxPool2d(2, 2))
                    continue
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                layers += [nn.BatchNorm2d(width)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                channels = width
            self.features = nn.Sequential(*layers)
            self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
            self.classifier = nn.Sequential(
                nn.Linear(32, 12), nn.ReLU(True), nn.Dropout(), nn.Linear(12, 12), nn.ReLU(True), nn.Dropout(),
                nn.Linear(12, CLASSES),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            x = self.features(x)
            x = self.avgpool(x)
            x = torch.flatten(x, 1)
            return self.classifier(x)

    return VGG()


# ---- ResNet


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: Sequence[int], width: int) -> None:
        super().__init__()
        self.inputs = width
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(block, width, depths[0], 1)
        self.layer2 = self._stage(block, 2 * width, depths[1], 2)
        self.layer3 = self._stage(block, 2 * width, depths[2], 2)
        self.layer4 = self._stage(block, 2 * width, depths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(2 * width * block.expansion, CLASSES)

    def _stage(self, block: type[BasicBlock] | type[Bottleneck], width: int, depth: int, stride: int) -> nn.Sequential:
        outputs = width * block.expansion
        blocks = []
        for i in range(depth):
            downsample = None
            if i == 0 and (stride != 1 or self.inputs != outputs):
                downsample = nn.Sequential(
                    nn.Conv2d(self.inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )
            blocks.append(block(self.inputs, width, stride if i == 0 else 1, downsample))
            self.inputs = outputs
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18() -> nn.Module:
    return ResNet(BasicBlock, (2, 2, 2, 2), width=4)


def resnet50() -> nn.Module:
    return ResNet(Bottleneck, (3, 4, 6, 3), width=2)


# ---- MobileNet


class Conv2dNormActivation(nn.Sequential):
    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: Any = nn.ReLU6
    ) -> None:
        padding = (kernel - 1) // 2
        layers = [
            nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        super().__init__(*layers, *([] if activation is None else [activation(inplace=True)]))


class InvertedResidual(nn.Module):
    """MobileNetV2: expand, depthwise, linear projection."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.use_res_connect = stride == 1 and inputs == outputs
        layers: list[nn.Module] = [Conv2dNormActivation(inputs, hidden, 1)] if expansion != 1 else []
        layers += [
            Conv2dNormActivation(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        else:
            return self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            Conv2dNormActivation(3, 4, 3, 2),
            InvertedResidual(4, 4, 1, 1),
            InvertedResidual(4, 6, 2, 3),
            InvertedResidual(6, 6, 1, 3),
            Conv2dNormActivation(6, 10, 1),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(10, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int, activation: Any, gate: Any) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = activation()
        self.scale_activation = gate()

    def _scale(self, x: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(scale))

    def forward(self, x: Tensor) -> Tensor:
        return self._scale(x) * x


class InvertedResidualV3(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int, excite: bool, activation: Any) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        layers: list[nn.Module] = [
            Conv2dNormActivation(inputs, hidden, 1, activation=activation),
            Conv2dNormActivation(hidden, hidden, 5, stride, groups=hidden, activation=activation),
        ]
        if excite:
            layers.append(SqueezeExcitation(hidden, 3, nn.ReLU, nn.Hardsigmoid))
        layers.append(Conv2dNormActivation(hidden, outputs, 1, activation=None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result += x
        return result


class MobileNetV3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            Conv2dNormActivation(3, 4, 3, 2, activation=nn.Hardswish),
            InvertedResidualV3(4, 8, 4, 1, excite=True, activation=nn.ReLU),
            InvertedResidualV3(4, 10, 6, 2, excite=False, activation=nn.Hardswish),
            InvertedResidualV3(6, 12, 6, 1, excite=True, activation=nn.Hardswish),
            Conv2dNormActivation(6, 12, 1, activation=nn.Hardswish),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(12, 10), nn.Hardswish(inplace=True), nn.Dropout(0.2, inplace=True), nn.Linear(10, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


# ---- DenseNet


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: Tensor | list[Tensor]) -> Tensor:
        before = [features] if isinstance(features, Tensor) else features
        bottleneck = self.conv1(self.relu1(self.norm1(torch.cat(before, 1))))
        return F.dropout(self.conv2(self.relu2(self.norm2(bottleneck))), p=0.1, training=self.training)


class DenseBlock(nn.ModuleDict):
    def __init__(self, depth: int, inputs: int, growth: int) -> None:
        super().__init__()
        for i in range(depth):
            self.add_module(f"denselayer{i + 1}", DenseLayer(inputs + i * growth, growth))

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for _name, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pool = nn.AvgPool2d(2, 2)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(3, 4, 3, 2, 1, bias=False),
                norm0=nn.BatchNorm2d(4),
                relu0=nn.ReLU(inplace=True),
                denseblock1=DenseBlock(3, 4, growth=3),
                transition1=Transition(13, 6),
                denseblock2=DenseBlock(2, 6, growth=3),
                norm5=nn.BatchNorm2d(12),
            )
        )
        self.classifier = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.relu(features, inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


# ---- GoogLeNet


class BasicConv2d(nn.Module):
    def __init__(self, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(inputs, 3, kernel_size=1)
        self.branch2 = nn.Sequential(BasicConv2d(inputs, 3, kernel_size=1), BasicConv2d(3, 4, kernel_size=3, padding=1))
        self.branch3 = nn.Sequential(BasicConv2d(inputs, 2, kernel_size=1), BasicConv2d(2, 3, kernel_size=5, padding=2))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), BasicConv2d(inputs, 2, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class InceptionAux(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv = BasicConv2d(inputs, 3, kernel_size=1)
        self.fc1 = nn.Linear(12, 8)
        self.fc2 = nn.Linear(8, CLASSES)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.conv(F.adaptive_avg_pool2d(x, (2, 2))), 1)
        return self.fc2(self.dropout(F.relu(self.fc1(x), inplace=True)))


class GoogLeNetOutputs(NamedTuple):
    logits: Tensor
    aux_logits2: Tensor | None
    aux_logits1: Tensor | None


class GoogLeNet(nn.Module):
    """In train mode two auxiliary heads are returned as well, in eval mode the logits alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = BasicConv2d(3, 4, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.inception1 = Inception(4)
        self.aux1 = InceptionAux(12)
        self.inception2 = Inception(12)
        self.aux2 = InceptionAux(12)
        self.inception3 = Inception(12)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(12, CLASSES)

    def _transform_input(self, x: Tensor) -> Tensor:
        red = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
        green = torch.unsqueeze(x[:, 1], 1) * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
        blue = torch.unsqueeze(x[:, 2], 1) * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
        return torch.cat((red, green, blue), 1)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        x = self.inception1(self.maxpool1(self.conv1(self._transform_input(x))))
        aux1 = self.aux1(x) if self.training else None
        x = self.inception2(x)
        aux2 = self.aux2(x) if self.training else None
        x = self.fc(self.dropout(torch.flatten(self.avgpool(self.inception3(x)), 1)))
        if self.training:
            return GoogLeNetOutputs(x, aux2, aux1)
        return x


# ---- EfficientNet, ConvNeXt


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Leave out the branch for some samples, drawn with torch.rand."""
    if rate == 0.0 or not training:
        return x
    kept = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device) >= rate
    return x * kept / (1 - rate)


class StochasticDepth(nn.Module):
    """As a module, drawn with bernoulli_ on a new tensor."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        survival = 1.0 - self.rate
        noise = torch.empty([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device)
        noise = noise.bernoulli_(survival)
        if survival > 0.0:
            noise.div_(survival)
        return x * noise


class MBConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 2 * inputs
        self.residual = stride == 1 and inputs == outputs
        self.block = nn.Sequential(
            Conv2dNormActivation(inputs, hidden, 1, activation=nn.SiLU),
            Conv2dNormActivation(hidden, hidden, 3, stride, groups=hidden, activation=nn.SiLU),
            SqueezeExcitation(hidden, 2, nn.SiLU, nn.Sigmoid),
            Conv2dNormActivation(hidden, outputs, 1, activation=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.residual:
            result = drop_path(result, 0.3, self.training)
            result += x
        return result


class EfficientNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            Conv2dNormActivation(3, 4, 3, 2, activation=nn.SiLU),
            MBConv(4, 4, 1),
            MBConv(4, 6, 2),
            MBConv(6, 6, 1),
            Conv2dNormActivation(6, 12, 1, activation=nn.SiLU),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(12, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Permute(nn.Module):
    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return torch.permute(x, self.dims)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            Permute([0, 2, 3, 1]),
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            Permute([0, 3, 1, 2]),
        )
        self.layer_scale = nn.Parameter(torch.ones(width, 1, 1) * 0.1)
        self.stochastic_depth = StochasticDepth(0.3)

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer_scale * self.block(x)
        result = self.stochastic_depth(result)
        result += x
        return result


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 4, 4), LayerNorm2d(4, eps=1e-6)),
            nn.Sequential(ConvNeXtBlock(4), ConvNeXtBlock(4)),
            nn.Sequential(LayerNorm2d(4, eps=1e-6), nn.Conv2d(4, 8, 2, 2)),
            nn.Sequential(ConvNeXtBlock(8)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(LayerNorm2d(8, eps=1e-6), nn.Flatten(1), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)))


# ---- vision transformers


class EncoderBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width), nn.Dropout(0.1)
        )

    def forward(self, input: Tensor) -> Tensor:
        torch._assert(input.dim() == 3, "expected (batch, sequence, width)")
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = self.dropout(x) + input
        return x + self.mlp(self.ln_2(x))


class ViT(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.conv_proj = nn.Conv2d(3, width, 4, 4)
        self.class_token = nn.Parameter(0.5 * torch.randn(1, 1, width))
        self.pos_embedding = nn.Parameter(0.5 * torch.randn(1, 5, width))
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.Sequential(EncoderBlock(width), EncoderBlock(width))
        self.ln = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = self.conv_proj(x).reshape(n, self.width, (h // 4) * (w // 4)).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1)
        x = self.ln(self.layers(self.dropout(x + self.pos_embedding)))
        return self.head(x[:, 0])


class ShiftedWindowAttention(nn.Module):
    """Windows of 2 x 2 of a map of 4 x 4, shifted by 1 in every second block."""

    def __init__(self, width: int, side: int, shift: int, heads: int = 2, window: int = 2) -> None:
        super().__init__()
        self.side, self.shift, self.heads, self.window = side, shift, heads, window
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(0.1 * torch.randn((2 * window - 1) ** 2, heads))
        places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer(
            "relative_position_index", (relative[:, :, 0] * (2 * window - 1) + relative[:, :, 1]).flatten()
        )

    def _bias(self) -> Tensor:
        area = self.window**2
        bias = self.relative_position_bias_table[self.relative_position_index]
        return bias.view(area, area, -1).permute(2, 0, 1).contiguous().unsqueeze(0)

    def _mask(self, x: Tensor) -> Tensor:
        regions = x.new_zeros((self.side, self.side))
        slices = (0, -self.window), (-self.window, -self.shift), (-self.shift, None)
        count = 0
        for rows in slices:
            for columns in slices:
                regions[rows[0] : rows[1], columns[0] : columns[1]] = count
                count += 1
        across = self.side // self.window
        windows = regions.view(across, self.window, across, self.window).permute(0, 2, 1, 3)
        windows = windows.reshape(across**2, self.window**2)
        mask = windows.unsqueeze(1) - windows.unsqueeze(2)
        return mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        w, heads, across = self.window, self.heads, self.side // self.window
        if self.shift > 0:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        x = x.view(batch, height // w, w, width // w, w, channels)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch * across**2, w * w, channels)
        qkv = self.qkv(x).reshape(x.size(0), x.size(1), 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = q * (channels // heads) ** -0.5
        attention = q.matmul(k.transpose(-2, -1)) + self._bias()
        if self.shift > 0:
            attention = attention.view(batch, across**2, heads, w * w, w * w)
            attention = attention + self._mask(x).unsqueeze(1).unsqueeze(0)
            attention = attention.view(-1, heads, w * w, w * w)
        x = F.softmax(attention, dim=-1).matmul(v).transpose(1, 2).reshape(x.size(0), x.size(1), channels)
        x = self.proj(x)
        x = x.view(batch, across, across, w, w, channels).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, height, width, channels)
        if self.shift > 0:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        return x


class SwinBlock(nn.Module):
    def __init__(self, width: int, side: int, shift: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = ShiftedWindowAttention(width, side, shift)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + drop_path(self.attn(self.norm1(x)), 0.2, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), 0.2, self.training)


class PatchMerging(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[..., 0::2, 0::2, :], x[..., 1::2, 0::2, :], x[..., 0::2, 1::2, :], x[..., 1::2, 1::2, :]]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Sequential(nn.Conv2d(3, 4, 2, 2), Permute([0, 2, 3, 1]), nn.LayerNorm(4))
        self.stage1 = nn.Sequential(SwinBlock(4, 4, 0), SwinBlock(4, 4, 1))
        self.merge = PatchMerging(4)
        self.stage2 = nn.Sequential(SwinBlock(8, 2, 0))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stage2(self.merge(self.stage1(self.patch(x)))))
        return self.head(x.mean(dim=(1, 2)))


# ---- U-Net, variational autoencoder


class DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        )  # fmt: skip


class Up(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        self.conv = DoubleConv(2 * outputs, outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        rows, columns = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.conv(torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inc = DoubleConv(3, 3)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(3, 4))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(4, 6))
        self.up1 = Up(6, 4)
        self.up2 = Up(4, 3)
        self.outc = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        return self.outc(self.up2(self.up1(self.down2(x2), x2), x1))


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh())
        self.mean, self.log_variance = nn.Linear(8, 3), nn.Linear(8, 3)
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, FEATURES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        deviation = torch.exp(0.5 * log_variance)
        latent = mean + deviation * torch.randn_like(deviation)
        return self.decoder(latent), mean, log_variance


# ---- sequences


class Recurrent(nn.Module):
    def __init__(self, layer: type[nn.LSTM] | type[nn.GRU], **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, FEATURES)
        self.rnn = layer(FEATURES, 5, batch_first=True, **options)
        self.fc = nn.Linear(5 * (1 + self.rnn.bidirectional), CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        sequence, _state = self.rnn(self.embedding(tokens))
        return self.fc(sequence[:, -1, :])


class LSTMCellLoop(nn.Module):
    """nn.LSTMCell called in a Python loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(FEATURES, 5)
        self.fc = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h, c = x.new_zeros(x.size(0), 5), x.new_zeros(x.size(0), 5)
        outputs = []
        for t in range(STEPS):
            h, c = self.cell(x[:, t], (h, c))
            outputs.append(h)
        return self.fc(torch.stack(outputs, dim=1))


class WrittenLSTM(nn.Module):
    """The four gates as matrix products with parameters of the module itself."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.width = width
        self.weight_ih = nn.Parameter(0.3 * torch.randn(4 * width, FEATURES))
        self.weight_hh = nn.Parameter(0.3 * torch.randn(4 * width, width))
        self.bias = nn.Parameter(torch.zeros(4 * width))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], self.width, dtype=x.dtype, device=x.device)
        c = torch.zeros_like(h)
        for x_t in torch.unbind(x, dim=1):
            gates = x_t @ self.weight_ih.t() + h @ self.weight_hh.t() + self.bias
            i, f, g, o = gates.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.fc(h)


class SequenceEncoder(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.encoder(self.embedding(tokens)).mean(1))


class Attention(nn.Module):
    """Cross-attention whose weights are returned as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.tanh(self.inner(keys))
        found, weights = self.attention(queries, keys, keys)
        return self.fc(found), weights


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, dropout=0.1, batch_first=True)
        self.generator = nn.Linear(8, CLASSES)
        self.register_buffer("future", nn.Transformer.generate_square_subsequent_mask(STEPS - 1).double())

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.generator(self.transformer(source, target, tgt_mask=self.future))


@dataclass
class EncoderOutput:
    last_hidden_state: Tensor
    pooler_output: Tensor


class Bert(nn.Module):
    """Additive mask from 0 and 1, position and type embeddings, an output class."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.word = nn.Embedding(WORDS, width)
        self.position = nn.Embedding(STEPS, width)
        self.register_buffer("position_ids", torch.arange(STEPS).expand((1, -1)), persistent=False)
        self.norm0 = nn.LayerNorm(width)
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)
        self.norm1 = nn.LayerNorm(width)
        self.intermediate, self.output = nn.Linear(width, 16), nn.Linear(16, width)
        self.norm2 = nn.LayerNorm(width)
        self.pooler = nn.Linear(width, width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view((*x.shape[:-1], 2, -1)).permute(0, 2, 1, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> EncoderOutput:
        hidden = self.norm0(self.word(input_ids) + self.position(self.position_ids[:, : input_ids.size(1)]))
        extended = (1.0 - attention_mask[:, None, None, :].to(hidden.dtype)) * torch.finfo(torch.float64).min
        query, key, value = (self._heads(layer(hidden)) for layer in (self.query, self.key, self.value))
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=extended)
        found = found.transpose(1, 2).contiguous().view(hidden.shape)
        hidden = self.norm1(hidden + self.dropout(self.dense(found)))
        hidden = self.norm2(hidden + self.output(F.gelu(self.intermediate(hidden))))
        return EncoderOutput(last_hidden_state=hidden, pooler_output=torch.tanh(self.pooler(hidden[:, 0])))


class GPT2Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.resid_dropout = nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(STEPS, STEPS)).view(1, 1, STEPS, STEPS).bool())

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (part.view(B, T, 2, C // 2).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        weights = weights.masked_fill(~self.bias[:, :, :T, :T], float("-inf")).softmax(-1)
        return self.resid_dropout(self.c_proj((weights @ v).transpose(1, 2).contiguous().view(B, T, C)))


class GPT2Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = GPT2Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """Word embedding and output head are one parameter."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, width), nn.Embedding(STEPS, width)
        self.drop = nn.Dropout(0.1)
        self.h = nn.ModuleList(GPT2Block(width) for _ in range(3))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, WORDS, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        positions = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device).unsqueeze(0)
        x = self.drop(self.wte(idx) + self.wpe(positions))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def t5(layers: int) -> nn.Module:
    """Hugging Face's own: position biases of the first blocks are read by all, one embedding for both halves."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "vocab_size": WORDS}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
    return T5ForConditionalGeneration(
        T5Config(**sizes, **buckets, num_layers=layers, use_cache=False, decoder_start_token_id=0)
    )


def _translation(decoder: str) -> Callable[[int], Inputs]:
    return lambda batch: {"input_ids": _integers(WORDS, batch, STEPS), decoder: _integers(WORDS, batch, 4, seed=3)}


# ---- graphs and constructs


class GraphConvolution(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        degree = torch.ones(x.shape[0], dtype=x.dtype, device=x.device)
        degree = degree.index_add(0, target, torch.ones_like(target, dtype=x.dtype))
        scale = degree.rsqrt()
        h = self.linear(x)
        messages = h[source] * (scale[source] * scale[target]).unsqueeze(-1)
        return h.new_zeros(h.shape).index_add_(0, target, messages) + h / degree.unsqueeze(-1) + self.bias


class GCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = GraphConvolution(FEATURES, 8), GraphConvolution(8, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = F.dropout(F.relu(self.conv1(x, edge_index)), 0.2, self.training)
        return self.conv2(h, edge_index)


class EinsumAttention(nn.Module):
    """Attention, heads and all, in five einsums with bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(0.4 * torch.randn(FEATURES, 2, 4)) for _ in range(3))
        self.wo = nn.Parameter(0.4 * torch.randn(2, 4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btf,fhd->bhtd", x, w) for w in (self.wq, self.wk, self.wv))
        weights = torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1)
        return torch.einsum("bhtd,hdc->btc", torch.einsum("bhts,bhsd->bhtd", weights, v), self.wo)


class FunctionalCall(nn.Module):
    """A body that runs with modulated weights (hypernetworks, meta-learning)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.2))
        self.body = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: self.scale * p for name, p in self.body.named_parameters()}
        return torch.func.functional_call(self.body, weights, (x,))


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.4 * torch.randn(4, FEATURES))
        self.visible, self.hidden = nn.Parameter(torch.zeros(FEATURES)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.sigmoid(F.linear(x, self.weight, self.hidden))
        return F.linear(code, self.weight.t(), self.visible)


class NestedStructures(nn.Module):
    """Dicts in lists and tuples in dicts, in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, 8)
        self.side = nn.Linear(3, 8)
        self.heads = nn.ModuleDict({"a": nn.Linear(8, CLASSES), "b": nn.Linear(8, 2)})

    def forward(self, sample: dict[str, Any], extra: list[dict[str, Tensor]]) -> dict[str, Any]:
        left, right = (torch.tanh(self.encoder(view)) for view in sample["views"])
        h = left * right + torch.tanh(self.side(extra[0]["side"]))
        return {"heads": {name: head(h) for name, head in self.heads.items()}, "pair": (self.heads["b"](left), [right])}


class Detector(nn.Module):
    """A pyramid of features in an OrderedDict, a list of outputs, one a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.lateral = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        self.predict = nn.Conv2d(4, 5, 3, 1, 1)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        features = OrderedDict()
        features["fine"] = F.relu(self.stem(x))
        features["coarse"] = F.relu(self.next(features["fine"]))
        coarse = self.lateral[1](features["coarse"])
        upsampled = F.interpolate(coarse, size=features["fine"].shape[-2:], mode="nearest")
        scales = [self.lateral[0](features["fine"]) + upsampled, coarse]
        found = []
        for scale in scales:
            maps = self.predict(scale).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 5)
            found.append({"boxes": maps[..., :4], "scores": maps[..., 4]})
        return found


class MixtureOfExperts(nn.Module):
    """Soft top-2 routing by scatter, every expert computed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(FEATURES, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(FEATURES, 8), nn.GELU(), nn.Linear(8, CLASSES)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        values, chosen = torch.topk(self.gate(x), 2, dim=-1)
        weights = torch.zeros_like(self.gate(x)).scatter(1, chosen, F.softmax(values, -1))
        return torch.stack([expert(x) for expert in self.experts], dim=-1).mul(weights.unsqueeze(1)).sum(-1)


# ---- the list


def _family(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Callable[[int], Inputs],
    special: str,
    tags: str = "",
    loss: Callable[[Any], Tensor] = loss_of,
) -> tuple[Problem, str]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make().double().train()

    return Problem(name, build, inputs, loss, frozenset(tags.split())), special


_LISTED = (
    _family("VGG", lambda: vgg(False), _images(16), "in-place ReLU, dropout", "dropout"),
    _family("VGG, batch norm", lambda: vgg(True), _images(16), "batch norm after convolutions with bias", "batch_norm"),
    _family("ResNet-18", resnet18, _images(32), "residual add and ReLU share a node with the last norm", "batch_norm"),
    _family("ResNet-50", resnet50, _images(32), "bottlenecks", "batch_norm"),
    _family("MobileNetV2", MobileNetV2, _images(16), "depthwise convolutions, ReLU6", "batch_norm"),
    _family("MobileNetV3", MobileNetV3, _images(16), "hardswish, squeeze and excite", "batch_norm"),
    _family("DenseNet", DenseNet, _images(16), "concatenation of all values before; transitions", "batch_norm"),
    _family("GoogLeNet", GoogLeNet, _images(16), "two more outputs in train mode", "batch_norm multi_output"),
    _family("EfficientNet", EfficientNet, _images(16), "SiLU; stochastic depth by torch.rand", "batch_norm"),
    _family("ConvNeXt", ConvNeXt, _images(16), "LayerNorm over channels, layer scale, stochastic depth as a module"),
    _family("ViT", ViT, _images(8), "class token; attention is one node"),
    _family("Swin", Swin, _images(8), "windows by view and roll, bias table read by index, patch merging"),
    _family("U-Net", UNet, _images(8), "skip concatenation, transposed convolutions", "batch_norm"),
    _family("Feature pyramid", Detector, _images(8), "a list of dicts as output, one for each scale", "multi_output"),
    _family("VAE", VAE, _vectors, "one draw of noise for each batch; three outputs", "multi_output"),
    _family("LSTM", lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.2), _tokens, "the layer is one node"),
    _family("GRU, bidirectional", lambda: Recurrent(nn.GRU, bidirectional=True), _tokens, "the layer is one node"),
    _family("LSTM cell in a loop", LSTMCellLoop, _sequences, "one node for each time step, with two values"),
    _family("LSTM written out", WrittenLSTM, _sequences, "parameters shared by all time steps"),
    _family("TransformerEncoder, post-norm", lambda: SequenceEncoder(False), _tokens, "cut in its layers"),
    _family("TransformerEncoder, pre-norm", lambda: SequenceEncoder(True), _tokens, "cut in its layers"),
    _family("Transformer", EncoderDecoder, _pair_of_sequences, "cut in its layers, each attention is one node"),
    _family("MultiheadAttention", Attention, _pair_of_sequences, "attention weights are an output", "multi_output"),
    _family("BERT", Bert, _padded_tokens, "padding mask; a dataclass as output", "multi_output"),
    _family("GPT-2", GPT2, _tokens, "causal mask; head and embedding are one parameter", "shared"),
    _family("T5", lambda: t5(2), _translation("decoder_input_ids"),
            "Hugging Face; encoder and decoder, position biases that all blocks read", "shared multi_output"),
    _family("T5 with labels", lambda: t5(1), _translation("labels"),
            "Hugging Face; the model computes its own loss", "shared multi_output", lambda output: output.loss),
    _family("Graph convolution", GCN, _graph, "messages by index_add; the vertices are the batch"),
    _family("Mixture of experts", MixtureOfExperts, _vectors, "top-k and scatter"),
    _family("einsum", EinsumAttention, _sequences, "parameters read without a module"),
    _family("functional_call", FunctionalCall, _vectors, "weights computed in forward", "shared"),
    _family("Tied autoencoder", TiedAutoencoder, _vectors, "one weight, read twice, once transposed", "shared"),
    _family("Nested structures", NestedStructures, _nested, "dicts, lists and tuples, in and out", "multi_output"),
)  # fmt: skip

FAMILIES: tuple[Problem, ...] = tuple(problem for problem, _ in _LISTED)
SPECIAL: Mapping[str, str] = {problem.name: special for problem, special in _LISTED}
