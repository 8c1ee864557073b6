"""Random modules and random losses: whatever the module is, it is refused by name or it is itself, node by node.

A program is a tuple of instructions ``(kind, variant, pick)``. :class:`RandomModule` turns it into layers and plain
steps whose structure is Python data, so that any of them can be traced; :func:`check` holds everything against it.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import FullSweep, attached, local_gradients
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from oracles.graphs import Loss, backprop
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torch2ebm
from torch2ebm.common.nested import map_leaves
from torch2ebm.inference import solver as solvers

pytestmark = pytest.mark.filterwarnings("ignore::torch2ebm.errors.LoneNodeWarning")  # many of these are that small

Instruction = tuple[str, int, int]  # kind, variant, pick
Step = Callable[..., Tensor]  # of the module and the values so far

GRANULARITIES = ("layer", "preactivation", "activation", "module", "op", "children")


# ---- instructions: each adds its layers to the module and returns a step, or None where the shape does not suit it

KINDS: dict[str, Callable[["RandomModule", str, int, int, int], Step | None]] = {}
NOT_SMOOTH = {"kink", "pool", "mask", "order"}
NOT_A_GRADIENT = {"stop", "no_grad"}  # what is detached makes the update another thing than the energy's gradient
FRESH = {"linear", "conv", "norm", "residual", "block", "recurrent"}


def instruction(make: Callable[..., Step | None]) -> Callable[..., Step | None]:
    KINDS[make.__name__] = make
    return make


@instruction
def linear(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    width = net.shapes[x][-1]
    net.add_module(name, nn.Linear(width, (width, 3, 4, 6)[variant % 4], bias=variant < 6))
    return lambda net, values: getattr(net, name)(values[x])


@instruction
def activation(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    kinds = [nn.Tanh, nn.GELU, nn.Sigmoid, nn.SiLU, nn.Softplus, lambda: nn.SiLU(inplace=net.is_fresh(x))]
    if variant < 6:
        net.add_module(name, kinds[variant]())
        return lambda net, values: getattr(net, name)(values[x])
    return lambda net, values: torch.tanh(values[x]) if variant == 6 else F.softmax(values[x], dim=-1)


@instruction
def kink(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    fresh = net.is_fresh(x)
    kinds = [nn.ReLU, lambda: nn.ReLU(inplace=fresh), lambda: nn.LeakyReLU(0.1, inplace=fresh), nn.Hardswish]
    kinds += [lambda: nn.Hardtanh(inplace=fresh), lambda: nn.ELU(inplace=fresh)]
    if variant < 6:
        net.add_module(name, kinds[variant]())
        return lambda net, values: getattr(net, name)(values[x])
    if variant == 6:
        return lambda net, values: F.relu(values[x], inplace=fresh)
    return lambda net, values: values[x].clamp_(-1, 1) if fresh else values[x].clamp(-1, 1)


@instruction
def norm(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step | None:
    shape = net.shapes[x]
    if len(shape) == 2:
        layer: nn.Module = nn.BatchNorm1d(shape[1]) if variant < 5 else nn.LayerNorm(shape[1])
    elif variant < 2:
        layer = nn.BatchNorm1d(shape[1]) if len(shape) == 3 else nn.BatchNorm2d(shape[1], affine=variant == 0)
    elif variant < 4:
        layer = (nn.InstanceNorm1d if len(shape) == 3 else nn.InstanceNorm2d)(
            shape[1], affine=True, track_running_stats=variant == 3
        )
    else:
        layer = nn.GroupNorm(1, shape[1]) if variant < 6 else nn.LayerNorm(shape[-1])
    net.add_module(name, layer)
    return lambda net, values: getattr(net, name)(values[x])


@instruction
def conv(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step | None:
    shape = net.shapes[x]
    if len(shape) < 3:
        return None
    kind = nn.Conv1d if len(shape) == 3 else nn.Conv2d
    net.add_module(name, kind(shape[1], (shape[1], 2, 4, 3)[variant % 4], 1 + 2 * (variant // 4), padding=variant // 4))
    return lambda net, values: getattr(net, name)(values[x])


@instruction
def pool(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step | None:
    shape = net.shapes[x]
    if len(shape) < 3 or shape[-1] < 2 or shape[-2] < 2:
        return None
    image = len(shape) == 4
    if variant < 3:
        net.add_module(name, nn.MaxPool2d(2, stride=1) if image else nn.MaxPool1d(2, stride=1))
    elif variant < 5:
        net.add_module(name, nn.AvgPool2d(2, stride=1) if image else nn.AvgPool1d(2, stride=1))
    elif variant < 6:
        net.add_module(name, nn.AdaptiveAvgPool2d(2) if image else nn.AdaptiveMaxPool1d(2))
    else:
        return lambda net, values: values[x].mean(dim=-1)
    return lambda net, values: getattr(net, name)(values[x])


@instruction
def residual(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    if net.shapes[x] != net.shapes[other]:
        other = x
    forms: list[Step] = [
        lambda net, values: values[x] + values[other],
        lambda net, values: torch.add(values[x], values[other], alpha=0.5),
        lambda net, values: values[x] - 0.5 * values[other].tanh(),
        lambda net, values: torch.stack([values[x], values[other]]).mean(0),
    ]
    return forms[variant % 4]


@instruction
def concat(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    one, two = net.shapes[x], net.shapes[other]
    if len(one) != len(two) or one[2:] != two[2:] or one[1] + two[1] > 12:
        other = x
    return lambda net, values: torch.cat((values[x], values[other])[:: 1 if variant < 4 else -1], dim=1)


@instruction
def parts(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step | None:
    width = net.shapes[x][-1]
    if width < 2:
        return None

    def step(net: nn.Module, values: Sequence[Tensor]) -> Tensor:
        v = values[x]
        if variant < 2 and width % 2 == 0:
            left, right = v.chunk(2, dim=-1)
            return left * torch.sigmoid(right)
        if variant < 4:
            left, right = torch.split(v, [1, width - 1], dim=-1)
            return torch.cat([right, left], dim=-1)
        if variant < 5:
            return torch.stack(v.unbind(-1)[::-1], dim=-1)
        if variant < 6:
            return v.narrow(-1, 1, width - 1) * v[..., :1]
        pieces = torch.tensor_split(v, 2, dim=-1)
        return torch.cat([pieces[0], v[..., 1:]], dim=-1)

    return step


@instruction
def gate(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    width = net.shapes[x][-1]
    net.add_module(name, nn.Linear(width, width))
    if net.shapes[x] != net.shapes[other] or variant < 3:
        other = x
    return lambda net, values: values[x] * torch.sigmoid(getattr(net, name)(values[other]))


@instruction
def reuse(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    width = net.shapes[x][-1]
    fitting = [n for n, m in net.named_children() if isinstance(m, nn.Linear) and m.in_features == width]
    if fitting and variant < 4:
        shared = fitting[variant % len(fitting)]
        return lambda net, values: torch.tanh(getattr(net, shared)(values[x]))
    net.add_module(name, nn.Linear(width, width))
    if fitting and variant < 6 and (own := getattr(net, fitting[0])).out_features == width:
        getattr(net, name).weight = own.weight  # one parameter in two layers
        return lambda net, values: getattr(net, name)(values[x])
    return lambda net, values: getattr(net, name)(torch.tanh(getattr(net, name)(values[x])))


@instruction
def reshape(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    shape = net.shapes[x]
    if len(shape) == 2:
        if shape[1] % 2:
            return lambda net, values: values[x].unsqueeze(1)
        return lambda net, values: values[x].view(values[x].shape[0], 2, -1)
    if variant < 2:
        return lambda net, values: values[x].flatten(1)
    if variant < 3:
        return lambda net, values: values[x].reshape(values[x].size(0), -1)
    if variant < 5:
        return lambda net, values: values[x].transpose(1, 2)
    if variant < 6:
        return lambda net, values: values[x].transpose(0, 1).tanh().transpose(0, 1)
    return lambda net, values: values[x].permute(0, *range(len(shape) - 1, 0, -1)).contiguous()


@instruction
def dropout(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    if variant < 2:
        return lambda net, values: F.dropout(values[x], 0.3, net.training)
    if variant < 3:
        return lambda net, values: values[x] + 0.1 * torch.randn_like(values[x])
    net.add_module(name, nn.Dropout(0.3, inplace=variant > 5 and net.is_fresh(x)))
    return lambda net, values: getattr(net, name)(values[x])


@instruction
def mask(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    if net.shapes[x] != net.shapes[other]:
        other = x
    forms: list[Step] = [
        lambda net, values: values[x] * (values[other] > 0),
        lambda net, values: torch.where(values[other] > 0, values[x], 0.1 * values[x]),
        lambda net, values: values[x].masked_fill(values[other] < 0, 0.0),
        lambda net, values: values[x] * (values[other] > values[other].mean()).to(values[x].dtype),
        lambda net, values: F.softmax(values[x].masked_fill(values[other] < values[other].amin(), -torch.inf), -1),
        lambda net, values: values[x] + values[other].sign(),
        lambda net, values: values[x].gather(-1, values[other].argsort(-1)),
        lambda net, values: values[x] + F.one_hot(values[other].argmax(-1), net.shapes[x][-1]),
    ]
    return forms[variant]


@instruction
def shape(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    forms: list[Step] = [
        lambda net, values: values[x] / values[other].shape[-1] ** 0.5,
        lambda net, values: values[x] + values[other].new_ones(values[other].shape[0]).mean(),
        lambda net, values: values[x] * values[other].size(1) / values[x].size(1),
        lambda net, values: values[x][..., : values[other].shape[-1]],
        lambda net, values: values[x] + torch.zeros_like(values[x]).fill_(0.5),
        lambda net, values: values[x] + torch.arange(values[x].shape[-1], dtype=values[x].dtype) / 8,
        lambda net, values: values[x].flatten(1).reshape(values[other].shape[0], -1),
        lambda net, values: values[x] + torch.full_like(values[x], 0.1) * values[other].numel() / values[other].size(0),
    ]
    return forms[variant]


@instruction
def functional(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    width = net.shapes[x][-1]
    net.register_parameter(f"{name}_w", nn.Parameter(torch.randn(width, width) / width**0.5))
    net.register_parameter(f"{name}_b", nn.Parameter(0.1 * torch.randn(width)))
    net.names.append(name)

    def step(net: nn.Module, values: Sequence[Tensor]) -> Tensor:
        v, w, b = values[x], getattr(net, f"{name}_w"), getattr(net, f"{name}_b")
        if variant < 2:
            return F.linear(v, w, b)
        if variant < 3:
            return torch.einsum("...i,ij->...j", v, w) + b
        if variant < 4:
            return v @ F.softmax(w, dim=0) + b
        if variant < 5:
            return F.layer_norm(v, (width,), b.exp()) + w[0]
        if variant < 6:
            return v * b.exp() + w.sum(0)
        if variant < 7:
            return torch.addmm(b, v.flatten(0, -2), w).view(v.shape) * b
        return v @ (w + w.t()) + b.expand(width)

    return step


@instruction
def in_place(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    same, fresh = net.shapes[x] == net.shapes[other], net.is_fresh(x)

    def step(net: nn.Module, values: Sequence[Tensor]) -> Tensor:
        v = values[x] + 1.0
        if variant < 1:
            v[..., 0] = 0.5
        elif variant < 2:
            v[:, 0] *= 2.0
        elif variant < 3:
            v += values[other] if same else values[x]
        elif variant < 4:
            v.add_(values[other] if same else 1.0).tanh_()
        elif variant < 5:
            v[..., :1] += values[x][..., :1]
        elif variant < 6:
            v.neg_().sub_(values[x]).exp_()
            return v / (1 + v)
        elif variant < 7 and fresh:
            values[x].mul_(0.5)
        else:
            v.copy_(values[x].sigmoid())
        return v

    return step


@instruction
def stop(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    if net.shapes[x] != net.shapes[other]:
        other = x
    if variant < 4:
        return lambda net, values: values[x] + values[other].detach()
    return lambda net, values: values[x] * values[other].detach().sigmoid()


@instruction
def no_grad(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    def step(net: nn.Module, values: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            centre = values[other].mean()
        return values[x] - centre

    return step


@instruction
def order(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    forms: list[Step] = [
        lambda net, values: values[x].max(dim=-1, keepdim=True).values + values[x],
        lambda net, values: values[x].sort(dim=-1)[0],
        lambda net, values: torch.topk(values[x], 1, dim=-1).values * values[x],
        lambda net, values: values[x].abs(),
    ]
    return forms[variant % 4]


@instruction
def block(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    width = net.shapes[x][-1]
    net.add_module(name, nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, width)))
    if variant < 4:
        return lambda net, values: getattr(net, name)(values[x])
    return lambda net, values: values[x] + getattr(net, name)(values[x])


@instruction
def buffer(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    width = net.shapes[x][-1]
    net.register_buffer(f"{name}_buffer", torch.linspace(0.5, 1.5, width))
    net.names.append(name)

    def step(net: nn.Module, values: Sequence[Tensor]) -> Tensor:
        scale = getattr(net, f"{name}_buffer")
        if variant > 5:  # a running statistic of a live value
            scale.mul_(0.9).add_(values[x].detach().flatten(0, -2).mean(0), alpha=0.1)
            return values[x].tanh()
        return values[x] * scale

    return step


@instruction
def attention(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step | None:
    if len(net.shapes[x]) != 3:
        return None
    width = net.shapes[x][-1]
    if variant > 4:
        net.add_module(name, nn.MultiheadAttention(width, 1, batch_first=True))
        return lambda net, values: getattr(net, name)(values[x], values[x], values[x])[0]
    net.add_module(name, nn.Linear(width, 3 * width))

    def step(net: nn.Module, values: Sequence[Tensor]) -> Tensor:
        query, key, value = getattr(net, name)(values[x]).chunk(3, dim=-1)
        if variant > 2:
            return F.scaled_dot_product_attention(query, key, value)
        return F.softmax(query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5, dim=-1) @ value

    return step


@instruction
def recurrent(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step | None:
    if len(net.shapes[x]) != 3:
        return None
    net.add_module(name, (nn.GRU if variant < 4 else nn.LSTM)(net.shapes[x][-1], 3, batch_first=True))
    return lambda net, values: getattr(net, name)(values[x])[0]


def alias(net: "RandomModule", name: str, variant: int, x: int, other: int) -> Step:
    """Writes that are seen through another tensor: the library may refuse them."""

    def step(net: nn.Module, values: Sequence[Tensor]) -> Tensor:
        v = values[x] + 0.0
        if variant < 1:
            v[:, :1].mul_(2.0)
        elif variant < 2:
            F.relu_(v[:, :1])
        elif variant < 3:
            view = v.view(v.shape)
            v.mul_(0.5)
            return view + v
        elif variant < 4:
            left, right = v.split([1, v.shape[-1] - 1], dim=-1)
            right.add_(left)
        elif variant < 5:
            v.transpose(0, 1)[0] = 0.0
        elif variant < 6:
            whole = v.flatten(1)
            v.clamp_(min=0.0)
            return whole
        else:
            v.select(1, 0).clamp_(min=0.0)
        return v

    return step


ALL_KINDS = {**KINDS, "alias": alias}


# ---- the module and the case


@dataclass(frozen=True)
class Case:
    """One random module and how it is used; ``repr`` builds it again."""

    shape: tuple[int, ...]  # of one sample
    program: tuple[Instruction, ...]
    head: bool = True  # a linear layer at the end
    returned: tuple[int, ...] = ()  # hidden features that are returned too
    structure: str = "tuple"
    nodes: str | tuple[int, ...] = "layer"  # picks from the submodules
    training: bool = True
    batches: tuple[int, int] = (3, 2)

    def build(self) -> "RandomModule":
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return RandomModule(self).double().train(self.training)

    def inputs(self, batch: int, seed: int = 1) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(batch, *self.shape, generator=generator, dtype=torch.float64),)

    def granularity(self, module: nn.Module) -> str | list[str]:
        if isinstance(self.nodes, str):
            return self.nodes
        called = [name for name, _ in module.named_modules() if name]
        chosen: list[str] = []
        for pick in self.nodes:
            name = called[pick % len(called)] if called else ""
            parent = module.get_submodule(name.rpartition(".")[0])
            nested = any(name.startswith(f"{c}.") or c.startswith(f"{name}.") for c in chosen)
            if name and name not in chosen and not nested and not isinstance(parent, nn.MultiheadAttention):
                chosen.append(name)
        return chosen or "layer"

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _, _ in self.program}

    @property
    def smooth(self) -> bool:
        return not self.kinds & (NOT_SMOOTH | NOT_A_GRADIENT)


class RandomModule(nn.Module):
    """Interprets a program. Shapes are found by running each step on a probe while the module is built."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.names: list[str] = []
        self.case = case
        probes = [torch.randn(3, *case.shape)]
        for i, (kind, variant, pick) in enumerate(case.program):
            self.shapes = [tuple(probe.shape) for probe in probes]
            source = len(probes) - 1 if pick < 6 else pick % len(probes)
            step = ALL_KINDS[kind](self, f"{kind}{i}", variant, source, pick % len(probes))
            step = step or linear(self, f"{kind}{i}", variant, source, 0)
            self._add(step, probes)
        if case.head:
            self.shapes = [tuple(probe.shape) for probe in probes]
            self._add(linear(self, "head", 1, len(probes) - 1, 0), probes)
        with torch.no_grad():
            for name, tensor in self.named_buffers():
                if name.endswith("_buffer"):
                    tensor.copy_(torch.linspace(0.5, 1.5, len(tensor)))

    def is_fresh(self, value: int) -> bool:
        """Whether nothing else shares the memory of a value, so that writing it in place is seen by its name only."""
        return value > 0 and self.case.program[value - 1][0] in FRESH

    def _add(self, step: Step, probes: list[Tensor]) -> None:
        self.eval()
        probes.append(step(self, [probe.clone() for probe in probes]))
        self.steps.append(step)

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for step in self.steps:
            values.append(step(self, values))
        extra = [values[1 + pick % (len(values) - 1)] for pick in self.case.returned]
        if not extra:
            return values[-1]
        if self.case.structure == "dict":
            return {"output": values[-1], "hidden": extra}
        return (values[-1], *extra)


instructions = st.tuples(st.sampled_from(sorted(KINDS)), st.integers(0, 7), st.integers(0, 9))
shapes = st.sampled_from([(3,), (4,), (6,), (2, 3), (3, 4), (2, 4, 4), (3, 3, 4)])
granularities = st.sampled_from(GRANULARITIES) | st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
cases = st.builds(
    Case,
    shape=shapes,
    program=st.lists(instructions, min_size=1, max_size=8).map(tuple),
    head=st.booleans(),
    returned=st.lists(st.integers(0, 7), max_size=2).map(tuple),
    structure=st.sampled_from(["tuple", "dict"]),
    nodes=granularities,
    training=st.booleans(),
    batches=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)


# ---- what has to hold


def target_like(output: Tensor) -> Tensor:
    return torch.arange(output.numel(), dtype=output.dtype).cos().reshape(output.shape)


def loss_of(output: Any) -> Tensor:
    """A mean over the batch, with another weight for each tensor of the output."""
    leaves = pytree.tree_leaves(output)
    means = [((leaf - target_like(leaf)).square() / (2 + i)).mean() for i, leaf in enumerate(leaves)]
    return sum(means[1:], means[0])


def learning_parts(module: nn.Module, nodes: str | list[str]) -> dict[str, bool]:
    """Whether a gradient comes to what each named submodule has made of parameters: filled by forward and backward."""
    found = dict.fromkeys([] if isinstance(nodes, str) else nodes, False)

    def watch(name: str) -> Callable[..., None]:
        def called(part: nn.Module, given: Any, made: Any) -> None:
            for leaf in pytree.tree_leaves(made):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(lambda gradient: found.update({name: True}))

        return called

    for name in found:
        module.get_submodule(name).register_forward_hook(watch(name))
    return found


def runs_and_learns(case: Case) -> bool:
    """Whether plain PyTorch runs the module at both batch sizes and goes backwards through it and the named parts."""
    try:
        for batch in case.batches:
            module = case.build()
            learning = learning_parts(module, case.granularity(module))
            loss = loss_of(module(*case.inputs(batch)))
            if not loss.requires_grad or not bool(torch.isfinite(loss)):
                return False
            loss.backward()
            if not all(learning.values()):
                return False
            if any(p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in module.parameters()):
                return False
    except (RuntimeError, ValueError):  # overwritten before its backward; one value a channel
        return False
    return True


def seen_of(module: nn.Module) -> dict[str, Any]:
    """All that ``convert`` might alter."""
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "objects": {name: id(value) for name, value in [*module.named_parameters(), *module.named_buffers()]},
        "attributes": [sorted(m.__dict__) for m in module.modules()],
        "modes": [m.training for m in module.modules()],
        "gradients": [p.grad is None and p.requires_grad for p in module.parameters()],
        "random": torch.get_rng_state(),
    }


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return one.shape == two.shape and bool(((one == two) | (one.isnan() & two.isnan())).all())
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return bool(one == two)


def distance(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Largest difference over all parameters, in units of the largest entry; no gradient is a gradient of zero."""
    assert ours.keys() <= reference.keys()
    scale = max([float(r.abs().max()) for r in reference.values()], default=0.0)
    differences = [float((ours.get(name, torch.zeros(())) - r).abs().max()) for name, r in reference.items()]
    return max(differences, default=0.0) / max(scale, 1e-6)


def _or(computed: Any, own: Any) -> Any:
    """A leaf of the output: the run's own where no node computes it."""
    return own if computed is None else computed


def literal_predictive_coding(
    model: torch2ebm.EnergyModel, tensors: Sequence[Tensor], loss: Loss, steps: int, lr: float
) -> tuple[dict[str, Tensor], list[float]]:
    """Descent on the energy as one expression in all values, differentiated by autograd; and the energy's curve."""
    torch.manual_seed(0)
    call = model.torch2ebm.new_call(tuple(tensors), {})
    graph, returned = call.graph, call.run.output
    call.feedforward(keep_graph=False)
    hidden = [slot for node in graph.hidden_nodes for slot in node.slots]
    values = {slot: call.values[slot].detach().clone() for slot in hidden}
    trainable = {name: p for name, p in graph.parameters.items() if p.requires_grad}
    curve = []

    def energy() -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {slot: value.detach().requires_grad_() for slot, value in values.items()}
        predictions = {}
        total = torch.zeros((), dtype=torch.float64)
        for node in graph.nodes.values():
            evaluated = call.evaluate(node, [leaves[slot] for slot in node.reads])
            for slot, prediction in zip(node.slots, evaluated.predictions, strict=True):
                predictions[slot] = prediction
                if not node.is_output:
                    total = total + 0.5 * (leaves[slot] - prediction).square().sum()
        output = iter(graph.output(predictions, call.environment))
        total = total + call.batch_size * loss(map_leaves(lambda leaf: _or(next(output), leaf), returned))
        curve.append(float(total.detach()))
        return total, leaves

    saved = {name: b.clone() for name, b in graph.module.named_buffers()}
    for _ in range(steps):
        total, leaves = energy()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True) if leaves else ()
        for slot, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                values[slot] = values[slot] - lr * gradient
    total, _ = energy()
    found = torch.autograd.grad(total, list(trainable.values()), allow_unused=True, materialize_grads=True)
    for name, b in graph.module.named_buffers():
        b.data.copy_(saved[name])
    return {name: g / call.batch_size for name, g in zip(trainable, found, strict=True)}, curve


class Checked:
    """One case under test: the model, and the plain module that it has to be."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.module = case.build()
        self.start = copy.deepcopy(self.module.state_dict())
        self.nodes = case.granularity(self.module)
        self.inputs = case.inputs(case.batches[0])
        before, given_inputs = seen_of(self.module), self.inputs[0].clone()
        self.model = torch2ebm.convert(self.module, self.nodes, example_inputs=self.inputs)
        after = seen_of(self.module)
        for what in before:
            assert same(before[what], after[what]), f"convert altered {what}"
        assert torch.equal(self.inputs[0], given_inputs), "convert wrote its example"

    def learn(self, algorithm: torch2ebm.Algorithm, inputs: tuple[Tensor]) -> dict[str, Tensor]:
        """Gradients by one algorithm, from the module's first state; its buffers must end as plain PyTorch's."""
        self.module.load_state_dict(self.start)
        twin = self.case.build()
        torch.manual_seed(0)
        twin(*self.inputs_copy(inputs))
        self.model.attach(algorithm)
        try:
            gradients = local_gradients(self.model, self.inputs_copy(inputs), loss_of)
        finally:
            self.model.detach()
        assert same(dict(self.module.named_buffers()), dict(twin.named_buffers())), f"buffers after {algorithm!r}"
        return gradients

    def inputs_copy(self, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].clone(),)

    def composition(self, inputs: tuple[Tensor]) -> None:
        """The run as it was cut, and the nodes evaluated one after the other."""
        for cut in (True, False):
            twin = self.case.build()
            torch.manual_seed(0)
            expected = pytree.tree_leaves(twin(*self.inputs_copy(inputs)))
            self.module.load_state_dict(self.start)
            torch.manual_seed(0)
            run = self.model.torch2ebm.new_call(self.inputs_copy(inputs), {})
            run.run.followed &= cut
            run.feedforward(keep_graph=False)
            composed = list(map(_or, run.output(), pytree.tree_leaves(run.run.output)))
            assert len(composed) == len(expected)
            for ours, theirs in zip(composed, expected, strict=True):
                assert same(ours, theirs), f"the nodes compose to another output, {cut=}"
            assert same(dict(self.module.named_buffers()), dict(twin.named_buffers())), f"buffers, {cut=}"

    def parameters(self) -> None:
        own = dict(self.module.named_parameters())
        for node in self.model.nodes.values():
            assert all(parameter is own[name] for name, parameter in node.parameters.items())

    def exact(self, inputs: tuple[Tensor], all_forms: bool) -> None:
        reference = backprop(self.case.build(), self.inputs_copy(inputs), loss_of)
        assert distance(self.learn(torch2ebm.ZeroDivergence(), inputs), reference) <= 1e-10, "ZeroDivergence"
        if not all_forms:
            return
        steps = max(1, self.model.graph.depth)
        fixed = self.learn(torch2ebm.FixedPrediction(steps, 1.0), inputs)
        assert distance(fixed, reference) <= 1e-10, "FixedPrediction"
        if self.model.graph.depth <= 6:
            levels = self.learn(torch2ebm.ZeroDivergence("levels"), inputs)
            assert distance(levels, reference) <= 1e-10, "ZeroDivergence, levels"

    def predictive_coding(self, steps: int = 3, lr: float = 0.02) -> None:
        waved = self.learn(torch2ebm.PredictiveCoding(steps, lr), self.inputs)
        original = solvers.ValueInference
        solvers.ValueInference = FullSweep
        try:
            self.module.load_state_dict(self.start)
            self.model.attach(torch2ebm.PredictiveCoding(steps, lr))
            full = local_gradients(self.model, self.inputs_copy(self.inputs), loss_of)
            relaxation = self.model.state.relaxation
        finally:
            solvers.ValueInference = original
            self.model.detach()
        for name, curve in relaxation.node_energy.items():
            exact = not self.model.nodes[name].batch_statistics
            assert curve[0] <= (0.0 if exact else 1e-24), f"energy of {name} at the feed-forward pass: {curve[0]}"
        # frozen statistics are the batch's to rounding, which a small variance magnifies
        frozen = any(node.batch_statistics for node in self.model.nodes.values())
        assert distance(waved, full) <= (1e-6 if frozen else 1e-11), "wave front"
        self.module.load_state_dict(self.start)
        literal, _ = literal_predictive_coding(self.model, list(self.inputs_copy(self.inputs)), loss_of, steps, lr)
        assert distance(waved, literal) <= (1e-6 if frozen else 1e-10), "strict predictive coding"

    def descent(self) -> None:
        curves = []
        for lr in (1e-2, 1e-4, 1e-6):
            self.learn_curve(lr, curves)
            if all(b <= a * (1 + 1e-13) for a, b in zip(curves[-1], curves[-1][1:], strict=False)):
                return
        raise AssertionError(f"energy rises at every step size: {curves}")

    def learn_curve(self, lr: float, curves: list[tuple[float, ...]]) -> None:
        self.module.load_state_dict(self.start)
        self.model.attach(torch2ebm.PredictiveCoding(4, lr))
        try:
            local_gradients(self.model, self.inputs_copy(self.inputs), loss_of)
            curves.append(self.model.state.relaxation.energy)
        finally:
            self.model.detach()


def check(case: Case) -> None:
    """Everything that has to hold of one case. Raises :class:`Torch2EBMError` where the library refuses it."""
    checked = Checked(case)
    checked.parameters()
    checked.composition(checked.inputs)
    checked.exact(checked.inputs, all_forms=True)
    checked.predictive_coding()
    if case.smooth:
        checked.descent()
    again = case.inputs(case.batches[1], seed=2)
    checked.composition(again)
    checked.exact(again, all_forms=False)


CENSUS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate],  # a failing program is short enough to read; shrinking takes minutes
    "report_multiple_bugs": False,
}


def census(examples: int, strategy: st.SearchStrategy[Case], refusable: float) -> None:
    counts: Counter[str] = Counter()

    @settings(max_examples=examples, **CENSUS)
    @given(strategy)
    def every_case(case: Case) -> None:
        assume(runs_and_learns(case))
        counts["cases"] += 1
        try:
            check(case)
        except torch2ebm.Torch2EBMError as refusal:
            counts[f"{type(refusal).__name__}: {refusal.got}"[:160]] += 1

    every_case()
    cases_seen = counts.pop("cases")
    refused = sum(counts.values())
    print(f"{cases_seen} cases, {refused} refused:", *counts.most_common(), sep="\n  ")
    assert cases_seen >= examples
    assert refused <= refusable * cases_seen, counts.most_common()


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # parts that multiply by zero, for example
@pytest.mark.parametrize("examples", [100, pytest.param(300, marks=pytest.mark.slow)])
def test_a_random_module_is_itself_node_by_node(examples: int) -> None:
    census(examples, cases, refusable=0.02)


@pytest.mark.parametrize("nodes", GRANULARITIES)
def test_draws_on_the_input_and_in_nodes_come_in_the_module_s_own_order(nodes: str) -> None:
    program = ("activation", 4, 3), ("gate", 1, 0), ("block", 2, 0), ("dropout", 3, 4), ("buffer", 3, 2)
    program += ("attention", 7, 2), ("dropout", 5, 7), ("norm", 6, 5)
    case = Case((4,), program, head=True, returned=(6,), structure="tuple", nodes=nodes, training=True, batches=(1, 3))
    check(case)


@pytest.mark.slow
def test_many_random_modules_are_themselves_node_by_node() -> None:
    census(3000, cases, refusable=0.02)


def test_writes_through_other_tensors_are_refused_or_exact() -> None:
    """A view that is written changes what it is a view of; never may the result be quietly another one."""
    some = st.sampled_from(["alias", "alias", "linear", "kink", "residual"])
    aliasing = st.lists(st.tuples(some, st.integers(0, 7), st.integers(0, 9)), min_size=2, max_size=4).map(tuple)
    census(60, st.builds(Case, shape=shapes, program=aliasing, nodes=granularities), refusable=1.0)


# ---- what the search has found, one smallest module each


class Lambda(nn.Module):
    """A forward in a line; ``a`` and ``b`` are square, ``act`` is whatever is given."""

    def __init__(self, forward: Callable[..., Any], act: nn.Module | None = None, width: int = 3) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        if act is not None:
            self.act = act
        self.register_buffer("count", torch.zeros(width))
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients_of(module: nn.Module, algorithm: torch2ebm.Algorithm, nodes: Any = "layer") -> dict[str, Tensor]:
    return local_gradients(attached(module, algorithm, nodes), (normal(4, 3),), loss_of)


@pytest.mark.parametrize("training", [True, False])
def test_convert_leaves_the_mode_of_the_root_module(training: bool) -> None:
    module = nn.Sequential(nn.Linear(3, 2)).train(training)
    torch2ebm.convert(module)
    assert module.training == training


def dead_layer(net: Lambda, x: Tensor) -> Tensor:
    net.a(x)
    return net.b(x)


def dead_chain(net: Lambda, x: Tensor) -> Tensor:
    net.a(torch.tanh(net.a(x)))
    return net.b(x)


@pytest.mark.parametrize("forward", [dead_layer, dead_chain])
def test_layers_whose_result_nobody_reads_do_not_stop_the_levels_schedule(forward: Callable[..., Tensor]) -> None:
    found = gradients_of(seeded(lambda: Lambda(forward)), torch2ebm.ZeroDivergence("levels"))
    reference = backprop(seeded(lambda: Lambda(forward)), (normal(4, 3),), loss_of)
    assert distance(found, reference) <= 1e-12


@pytest.mark.parametrize(
    "algorithm", [torch2ebm.ZeroDivergence(), torch2ebm.ZeroDivergence("levels"), torch2ebm.PredictiveCoding(3, 0.1)]
)
def test_a_named_node_that_writes_its_input_in_place_may_be_evaluated_often(algorithm: torch2ebm.Algorithm) -> None:
    """Only the first layer's activation differs, in place or not, and it is inside a named node fed by the input."""

    def make(inplace: bool) -> nn.Module:
        first = nn.Sequential(nn.SiLU(inplace=inplace), nn.Linear(3, 3))
        return seeded(lambda: nn.Sequential(first, nn.Tanh(), nn.Linear(3, 2)))

    torch.manual_seed(0)
    one, two = make(True), make(False)
    two.load_state_dict(one.state_dict())
    assert distance(gradients_of(one, algorithm, "children"), gradients_of(two, algorithm, "children")) <= 1e-12


def test_a_named_node_may_write_a_value_in_place_that_functional_code_has_made() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.act = nn.Parameter(torch.eye(3)), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(F.linear(x, self.weight))

    found = gradients_of(seeded(Net), torch2ebm.ZeroDivergence(), ["act"])
    assert distance(found, backprop(seeded(Net), (normal(4, 3),), loss_of)) <= 1e-12


def through_a_module(net: Lambda, x: Tensor) -> Tensor:
    hidden = net.a(x)
    return net.b(net.act(hidden) + hidden)


def through_a_view(net: Lambda, x: Tensor) -> Tensor:
    hidden = net.a(x)
    F.relu_(hidden[:, :1])
    return net.b(hidden)


def through_the_base(net: Lambda, x: Tensor) -> Tensor:
    hidden = net.a(x)
    view = hidden.view(-1)
    hidden.relu_()
    return net.b(view.view(-1, 3))


@pytest.mark.parametrize(
    ("forward", "nodes"),
    [(through_a_module, "children"), (through_a_module, ["act"]), (through_a_view, "layer"), (through_the_base, "op")],
)
def test_a_write_that_the_example_does_not_show_is_exact(forward: Callable[..., Tensor], nodes: Any) -> None:
    """With a positive first batch ReLU in place changes nothing, and the capture cannot be told wrong by its values."""

    def build() -> nn.Module:
        module = seeded(lambda: Lambda(forward, nn.ReLU(inplace=True)))
        with torch.no_grad():
            module.a.weight.copy_(torch.eye(3))
            module.a.bias.zero_()
        return module

    model = torch2ebm.convert(build(), nodes, example_inputs=torch.ones(2, 3).double())
    model.attach(torch2ebm.ZeroDivergence())
    assert torch.equal(model(-normal(4, 3)).detach(), build()(-normal(4, 3)).detach())


def test_a_returned_constant_may_depend_on_the_shape_of_a_value() -> None:
    def forward(net: Lambda, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = net.b(net.a(x))
        return hidden, x * hidden.size(1) / 2

    module = seeded(lambda: Lambda(forward))
    model = torch2ebm.convert(module, example_inputs=normal(2, 3))
    for ours, theirs in zip(model(normal(4, 3)), module(normal(4, 3)), strict=True):
        assert torch.equal(ours, theirs)


def test_random_draws_on_the_input_come_in_the_module_s_own_order() -> None:
    def forward(net: Lambda, x: Tensor) -> Tensor:
        hidden = F.dropout(net.a(x))
        return net.b(F.dropout(x)) + hidden

    found = gradients_of(seeded(lambda: Lambda(forward)), torch2ebm.ZeroDivergence())
    assert distance(found, backprop(seeded(lambda: Lambda(forward)), (normal(4, 3),), loss_of)) <= 1e-12


# ---- the recorder

Edit = tuple[str, int, int]


def edited(tensors: list[Tensor], kind: str, variant: int, pick: int) -> Tensor:
    """One more thing that people do to a model's output; nothing of it has no dimension."""
    v = tensors[-1] if pick < 5 else tensors[pick % len(tensors)]
    other = tensors[pick % len(tensors)]
    other = other if other.shape == v.shape else v
    if kind == "view":
        turned = v.mT if v.ndim > 1 else v
        forms = [v.reshape(-1), v.unsqueeze(0), v.transpose(0, -1), v.flatten(), v.view(v.shape), turned]
        return [*forms, v.expand(2, *v.shape), v.squeeze(-1) if v.ndim > 1 else v][variant]
    if kind == "index":
        forms = [v[:1], v[-1:], v[..., :2], v[..., None], v[torch.arange(len(v)).flip(0)], v.narrow(0, 0, 1)]
        return [*forms, v[v > -9.0], v.chunk(2)[0]][variant]
    if kind == "write":
        w = v.clone() if variant % 2 else v
        if variant < 2:
            w[:1] = 0.5
        elif variant < 4:
            w.mul_(0.5).add_(0.25)
        elif variant < 6:
            w += other.detach()
        else:
            F.relu(w, inplace=True)
        return w
    if kind == "reduce":
        return [v.sum(-1, keepdim=True), v.mean(0, keepdim=True), v.logsumexp(-1, keepdim=True), v.cumsum(0),
                v.max(-1, keepdim=True).values, v.norm(dim=-1, keepdim=True), v.var(-1, keepdim=True, correction=0),
                torch.sum(v, 0, keepdim=True)][variant]  # fmt: skip
    if kind == "softmax":
        return [v.log_softmax(-1), F.softmax(v, 0), F.logsigmoid(v), v.sigmoid()][variant % 4]
    if kind == "join":
        return [torch.cat([v, other]), torch.stack([v, other], -1), torch.cat([v[:1], v]),
                torch.where(other > 0, v, -v)][variant % 4]  # fmt: skip
    forms = [v * other, v - other, v / 2, 3 - v, v**2, v.square() + other, -v, 1 / (2 + v.square())]
    return forms[variant]


EDITS = ["view", "index", "write", "reduce", "softmax", "join", "arithmetic"]
edits = st.lists(st.tuples(st.sampled_from(EDITS), st.integers(0, 7), st.integers(0, 9)), min_size=1, max_size=7)


def loss_made_of(program: Sequence[Edit]) -> Loss:
    def loss(output: Tensor) -> Tensor:
        tensors = [output]
        for edit in program:
            tensors.append(edited(tensors, *edit))
        return tensors[-1].mean()

    return loss


def scorer(shape: int) -> nn.Module:
    last = nn.Linear(4, 3) if shape == 0 else nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)))
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), last)


def check_recorder(program: Sequence[Edit], shape: int) -> None:
    loss, x = loss_made_of(program), normal(4, 3)
    module = seeded(lambda: scorer(shape))
    try:
        reference = backprop(module, (x,), loss)
    except RuntimeError:  # overwritten before its backward
        assume(False)
    assume(all(bool(torch.isfinite(g).all()) for g in reference.values()))
    found = [
        local_gradients(attached(copy.deepcopy(module), torch2ebm.PredictiveCoding(3, 0.05)), (x,), form)
        for form in (loss, torch2ebm.EnergyLoss(lambda output: loss(output.clone())))
    ]
    assert distance(found[0], found[1]) <= 1e-12, "recorded, and as a function"
    exact = local_gradients(attached(copy.deepcopy(module), torch2ebm.ZeroDivergence()), (x,), loss)
    assert distance(exact, reference) <= 1e-12, "ZeroDivergence"
    literal, _ = literal_predictive_coding(torch2ebm.convert(module), [x], loss, 3, 0.05)
    assert distance(found[0], literal) <= 1e-10, "strict predictive coding"


def test_a_loss_function_may_write_its_argument_in_place() -> None:
    def loss(output: Tensor) -> Tensor:
        output[:1] = 0.5
        return output.square().mean()

    found = [
        local_gradients(attached(seeded(lambda: scorer(0)), torch2ebm.PredictiveCoding(3, 0.05)), (normal(4, 3),), form)
        for form in (loss, torch2ebm.EnergyLoss(loss))
    ]
    assert distance(*found) <= 1e-12


def test_a_loss_may_use_numbers_computed_from_the_output() -> None:
    """What has no dimension is not yet the loss: it may be read again."""

    def loss(output: Tensor) -> Tensor:
        return ((output - output.mean()) / output.std()).pow(4).mean()

    found = [
        local_gradients(attached(seeded(lambda: scorer(0)), torch2ebm.PredictiveCoding(3, 0.05)), (normal(4, 3),), form)
        for form in (loss, torch2ebm.EnergyLoss(loss))
    ]
    assert distance(*found) <= 1e-12


def recorder_census(examples: int) -> None:
    @settings(max_examples=examples, **CENSUS)
    @given(edits, st.integers(0, 1))
    def every_loss(program: list[Edit], shape: int) -> None:
        check_recorder(program, shape)

    every_loss()


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # losses without a slope
def test_a_recorded_loss_is_the_loss_function() -> None:
    recorder_census(100)


@pytest.mark.slow
def test_many_recorded_losses_are_their_loss_functions() -> None:
    recorder_census(2000)
