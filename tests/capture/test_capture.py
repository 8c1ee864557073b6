"""Whatever forward is written like, its run is followed: the same bits out, autograd's gradients back."""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import attached, relative_error
from torch import Tensor, nn

import torch2ebm

WIDTH = 6


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors_in(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        for part in result.values():
            yield from tensors_in(part)
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(result):
        yield from tensors_in(vars(result))


def loss_of(result: Any) -> Tensor:
    """A mean of squares of every output that has a gradient."""
    found = [tensor.square().mean() for tensor in tensors_in(result) if tensor.requires_grad]
    return sum(found[1:], found[0])


def run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Output and gradients, from one seed."""
    torch.manual_seed(0)
    result = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    model.zero_grad()
    loss_of(result).backward()
    return result, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_is_the_module(model: nn.Module, twin: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Types, bits of the outputs, bits of the buffers, random draws, and gradients to 1e-12."""
    expected, reference = run(twin, args, kwargs)
    state = torch.get_rng_state()
    ours, gradients = run(model, args, kwargs)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(ours) is type(expected) or isinstance(expected, Tensor)
    pairs = list(zip(tensors_in(ours), tensors_in(expected), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    for name, buffer in twin.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    gradients = {name: gradients.get(name, torch.zeros_like(g)) for name, g in reference.items()}
    assert relative_error(gradients, reference) < 1e-12


class Wired(nn.Module):
    """Two layers, with what a test wants between them: ``between(self, hidden, input)``."""

    def __init__(self, between: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.between = between
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)
        self.double()

    def forward(self, x: Tensor) -> Any:
        between = self.between
        result = between(self, self.first(x), x)
        return self.last(result) if not isinstance(result, (tuple, dict)) else result


def statements(source: str) -> Callable[..., Any]:
    """``between`` from the statements of a forward, on ``h`` (hidden) and ``x`` (input); the result is ``h``."""
    body = "\n".join(f"    {line.strip()}" for line in source.split(";"))
    namespace = {"torch": torch, "F": F, "math": math, "np": np}
    exec(f"def between(self, h, x):\n{body}\n    return h", namespace)
    return namespace["between"]  # type: ignore[return-value]


IN_PLACE = {
    "relu_": "h.relu_()",
    "chain of methods": "h = h.mul_(2.0).add_(1.0).tanh_()",
    "functional inplace=True": "h = F.relu(h, inplace=True)",
    "functional inplace, result dropped": "F.relu(h, inplace=True); h = h * 2",
    "functional inplace by position": "h = F.leaky_relu(h, 0.2, True)",
    "F.relu_": "F.relu_(h)",
    "torch.sigmoid_": "torch.sigmoid_(h)",
    "F.dropout inplace": "F.dropout(h, 0.5, self.training, inplace=True)",
    "clamp_ and masked_fill_": "h.clamp_(-0.5, 0.5).masked_fill_(x > 0, 0.1)",
    "augmented": "h += x; h -= 0.5; h *= x; h /= 2.0",
    "setitem of a constant": "h[:, 0] = 0",
    "setitem of a value": "h[:, 1] = h[:, 2] * x[:, 0]; h[..., -1:] = h[..., :1]",
    "setitem by mask": "h = h * 2; h[x > 0] = 0.25",
    "augmented slice": "h[:, :2] += 1; h[:, 2:] *= x[:, 2:]",
    "static": "y = x * 1.0; y += 1; y[:, 0] = 3; h = h * y",
    "filled empty": "y = torch.empty_like(h); y.copy_(x); h = h * y",
    "zero_": "y = h.clone(); y.zero_(); h = h + y",
    "fill_": "y = torch.empty_like(h); y.fill_(2.0); h = h * y",
    "unsqueeze_": "h.unsqueeze_(1); h = h.squeeze(1)",
}
RANDOM = {
    "noise like a hidden value": "h = h + torch.randn_like(h)",
    "noise like the input": "h = h * torch.rand_like(x)",
    "noise on both": "y = torch.randn_like(x); h = torch.tanh(h) + torch.randn_like(h); h = h * y",
    "noise of its shape": "h = h + torch.randn(h.shape, dtype=h.dtype)",
    "normal_": "h = h + torch.empty_like(h).normal_()",
    "bernoulli_": "h = h * torch.empty_like(h).bernoulli_(0.5)",
    "multinomial": "h = h[:, torch.multinomial(torch.softmax(h[0].detach(), 0), 6)]",
    "between dropouts": "h = F.dropout(h, 0.5, self.training); h = h + torch.randn_like(h); h = F.dropout(h, 0.5)",
}
SEVERAL = {
    "chunk": "a, b = h.chunk(2, -1); h = torch.cat([a * torch.sigmoid(b), b], -1)",
    "torch.split": "a, b, c = torch.split(h, 2, 1); h = torch.cat([c, a, b * c], 1)",
    "uneven split": "a, b = h.split([1, 5], 1); h = a * b; h = torch.cat([h, a], 1)",
    "unbind": "a = h.unbind(1); h = torch.stack([a[0], a[3], a[1], a[2], a[5], a[0]], 1)",
    "max with dim": "a = h.max(1); h = h - a.values[:, None] * (a.indices[:, None] + 1)",
    "max unpacked": "a, i = torch.max(h, dim=1, keepdim=True); h = h.gather(1, i) * h - a",
    "topk": "a, i = h.topk(3, -1); h = torch.cat([a, x.gather(1, i)], -1)",
    "sort": "a, i = torch.sort(h, -1); h = a * i",
    "var_mean": "v, m = torch.var_mean(h, 0); h = (h - m) * torch.rsqrt(v + 1.0)",
    "chunks across nodes": "a, b = self.first(h).chunk(2, -1); h = torch.cat([a, F.relu(self.last(h))[:, :3] + b], -1)",
    "argmax": "h = h * F.one_hot(h.argmax(-1), 6)",
}
SHAPES = {
    "size of a hidden value": "n = h.size(0); h = torch.tanh(self.last(h)).reshape(n, -1)",
    "size of the input": "h = h.view(x.shape[0], 2, 3).transpose(1, 2).reshape(x.shape[0], -1)",
    "shape unpacked": "n, c = h.shape; h = self.last(h).view(n, 2, c // 2).flatten(1)",
    "divided by a size": "h = self.last(h) / math.sqrt(h.size(-1)) + x.numel() ** 0.5",
    "arange": "h = h * torch.arange(6.0)",
    "arange of a size": "h = h * torch.arange(x.size(1))",
    "zeros of a shape": "h = h + torch.zeros((h.size(0), 6), dtype=h.dtype)",
    "a NumPy number": "h = h / np.sqrt(6)",
    "new_ones": "h = h + x.new_ones(x.size(0), 1)",
    "tensor constant": "h = h * torch.tensor(2.0) + torch.tensor([1.0, 2, 3, 4, 5, 6])",
    "item of the input": "h = h * x.max().item()",
    "item of a hidden value": "h = h * h.max().item()",
    "like of a dtype": "h = h.to(torch.float32).to(x.dtype) + h.type_as(x)",
    "tolist-free where": "h = torch.where(x.sum() > 0, h, -h)",
    "einsum": "h = torch.einsum('bi,bj->bij', h, x).mean(1)",
    "matmul operator": "h = (h[:, None] @ x[:, :, None])[:, 0] * h",
}
STOPPED = {
    "detach": "h = h - h.detach().mean()",
    "no_grad": "with torch.no_grad(): y = torch.tanh(h);  h = h * y",
    "no_grad around a layer": "with torch.no_grad(): y = self.last(x);  h = h * y",
    "data": "h = h * h.data",
}
BUFFERS = {
    "read": "h = h * self.scale",
    "moving average": "self.scale.mul_(0.9).add_(h.detach().mean(0), alpha=0.1); h = h - self.scale",
    "moving average in train mode": "if self.training: self.scale.lerp_(h.detach().mean(0), 0.1);  h = h * self.scale",
    "counted": "self.count += 1; h = h * self.count",
    "counted by method": "self.count.add_(1); h = h * self.count",
    "assigned": "self.last_seen = h.detach().sum(0); h = h + 1",
    "assigned and read": "self.last_seen = x.sum(0); h = h * self.last_seen",
    "slice written": "self.scale[0] = x.mean(); h = h * self.scale",
    "copied into": "self.last_seen.copy_(x.mean(0)); h = h + self.last_seen",
}


def wired(source: str) -> Wired:
    count, last_seen = torch.tensor(0.0), torch.zeros(WIDTH)
    lines = source.replace(":  ", ":\n").split(";")
    return Wired(statements(";".join(lines)), scale=torch.full((WIDTH,), 2.0), count=count, last_seen=last_seen)


def statements_of(*tables: dict[str, str]) -> Any:
    everything = [pytest.param(source, id=name) for table in tables for name, source in table.items()]
    return pytest.mark.parametrize("source", everything)


@statements_of(IN_PLACE, RANDOM, SEVERAL, SHAPES, STOPPED, BUFFERS)
@pytest.mark.parametrize("nodes", ["auto", "op"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_forward_with_this_statement_is_followed(source: str, nodes: str, training: bool) -> None:
    twin = wired(source).train(training)
    model = attached(wired(source), torch2ebm.ZeroDivergence(), nodes).train(training)
    for batch in (5, 3, 5):  # the second batch size goes through the graph of the first
        assert_is_the_module(model, twin, normal(batch, WIDTH, seed=batch))


@statements_of(IN_PLACE, RANDOM, SHAPES, BUFFERS)
def test_conversion_alters_nothing_in_the_module(source: str) -> None:
    module = wired(source)
    untouched = copy.deepcopy(module)
    attributes, state = dict(module.__dict__), torch.get_rng_state()
    try:
        torch2ebm.convert(module)
        torch2ebm.convert(module, example_inputs=normal(3, WIDTH))
    except torch2ebm.Torch2EBMError:
        pass  # the test above says whether that is right; here only what is left behind counts
    assert module.__dict__.keys() == attributes.keys()
    assert all(module.__dict__[name] is value for name, value in attributes.items())
    for name, value in untouched.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    assert torch.equal(torch.get_rng_state(), state)


# ---- Python on tensors, and two names for one memory

PYTHON = {
    "len": "h = h.view(len(x), -1)",
    "assert on a shape": "assert x.ndim == 2; h = h + 1",
    "zeros of sizes": "h = h + torch.zeros(h.size(0), 6, dtype=h.dtype)",
    "branch on a shape": "h = h.flatten(1) if x.dim() > 1 else h",
    "loop over a batch": "h = torch.stack([row * 2 for row in h])",
    "isinstance": "h = h * 2 if isinstance(x, torch.Tensor) else h",
    "autocast": "with torch.autocast('cpu', torch.bfloat16): y = self.last.weight.float() @ x[0].float();  h = h * y",
    "checkpoint": "h = torch.utils.checkpoint.checkpoint(self.last, h, use_reentrant=False)",
    "float of a value": "h = h * float(x.max())",
    "int of a value": "h = h * int(x.abs().max())",
}
ALIASES = {
    "a second name": "y = h; h += 1; h = y * 2",
    "a second name, method": "y = h; h.mul_(2.0); h = y * h",
    "a view of all": "v = h.view(-1); v += 1; h = h * 2",
    "a row": "v = h[:, 0]; v.zero_(); h = h * 2",
    "the base": "v = h[:, :2]; h.mul_(3.0); h = torch.cat([v, h[:, :4]], 1)",
    "a chunk": "y = x * 1.0; a, b = y.chunk(2, -1); a += b; h = h * y",
    "a transpose": "h.t().mul_(2.0); h = h + 1",
    "data": "h.data.mul_(2.0); h = h + 1",
    "a detached one": "h.detach().mul_(2.0); h = h + 1",
    "setitem of a view": "v = h.view(-1, 2); v[:, 0] = 0; h = h + 1",
    "in no_grad": "with torch.no_grad(): h.mul_(2.0);  h = h + 1",
    "out=": "y = x * 1.0; torch.mul(y, 2.0, out=y); h = h * y",
}


def assert_followed(build: Callable[[], nn.Module], *calls: tuple[Any, ...], nodes: Any = "auto") -> None:
    model, twin = attached(build(), torch2ebm.ZeroDivergence(), nodes), build()
    for args in calls:
        assert_is_the_module(model, twin, *args)


@statements_of(ALIASES, PYTHON)
@pytest.mark.parametrize("nodes", ["auto", "op"])
def test_an_alias_or_python_on_a_tensor_is_followed(source: str, nodes: str) -> None:
    x = normal(5, WIDTH)
    assert_followed(lambda: wired(source), (x,), (normal(3, WIDTH, seed=2),), (x,), nodes=nodes)


class _WritingItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        x += 1
        return self.layer(x) * y


def test_a_write_to_the_input_is_followed() -> None:
    assert_followed(_WritingItsInput, (normal(5, WIDTH),), (normal(3, WIDTH),), (normal(5, WIDTH),))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return torch.sign(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


def test_a_custom_autograd_function_keeps_its_own_backward() -> None:
    x = normal(5, WIDTH)
    assert_followed(lambda: Wired(lambda self, h, x: _StraightThrough.apply(h) * h), (x,), (x,))


def test_a_straight_through_estimator_by_detach_is_right() -> None:
    source = "h = h + (torch.sign(h) - h).detach()"
    assert_is_the_module(attached(wired(source), torch2ebm.ZeroDivergence()), wired(source), normal(5, WIDTH))


class _Annealed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.drop = nn.Linear(WIDTH, WIDTH).double(), nn.Dropout(0.5, inplace=True)
        self.temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.drop(self.layer(x))) / self.temperature


@pytest.mark.parametrize(("path", "value"), [("temperature", 0.5), ("drop.p", 0.1)])
def test_a_number_that_the_user_changes_on_the_module_is_followed(path: str, value: float) -> None:
    module, twin, x = _Annealed(), _Annealed(), normal(5, WIDTH)
    model = attached(module, torch2ebm.ZeroDivergence())
    assert_is_the_module(model, twin, x)
    for net in (module, twin):
        owner, _, name = path.rpartition(".")
        setattr(net.get_submodule(owner), name, value)
    for _ in range(2):
        assert_is_the_module(model, twin, x)
    assert len(model.torch2ebm.captures.entries) == 1


class _CountingCalls(_Annealed):
    def forward(self, x: Tensor) -> Tensor:
        self.temperature += 1.0
        return super().forward(x)


def test_a_number_that_forward_itself_changes_is_followed() -> None:
    assert_followed(_CountingCalls, *[(normal(5, WIDTH),)] * 4)


# ---- modules


def deep(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    for layer in layers:
        for part in layer.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    return nn.Sequential(*layers).double()


def test_modules_in_place_work_and_stay_in_place() -> None:
    def build() -> nn.Sequential:
        inner = nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.1, inplace=True))
        return deep(
            nn.Linear(WIDTH, 8), nn.Dropout(0.2, inplace=True), nn.Tanh(), inner, nn.Linear(8, 8), nn.ELU(inplace=True)
        )

    module = build()
    for nodes in ("auto", "op", "module", "children", ["3"]):
        model = attached(module, torch2ebm.ZeroDivergence(), nodes)
        assert_is_the_module(model, build(), normal(5, WIDTH))
        assert_is_the_module(model.eval(), build().eval(), normal(5, WIDTH))
        model.train()
        assert all(part.inplace for part in module.modules() if hasattr(part, "inplace"))


def test_a_named_node_that_writes_its_input_leaves_the_other_readers_theirs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.activation = nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            before = h * 1.0
            return self.activation(h) + before * h

    assert_followed(Net, *[(normal(5, WIDTH),)] * 2, nodes=["activation"])


def test_one_module_under_two_names_keeps_one_parameter() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(WIDTH, WIDTH).double()
            self.b, self.head = self.a, nn.Linear(WIDTH, WIDTH, bias=False).double()
            self.head.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))

    for nodes in ("auto", "op", "children", ["a"]):
        model = attached(Net(), torch2ebm.ZeroDivergence(), nodes)
        assert_is_the_module(model, Net(), normal(5, WIDTH))
        assert [name for name, _ in model.named_parameters()] == ["a.weight", "a.bias"]
    with contextlib.suppress(torch2ebm.errors.UnknownNodeError):  # 'b' is 'a', and the message says what there is
        assert_is_the_module(attached(Net(), torch2ebm.ZeroDivergence(), ["b"]), Net(), normal(5, WIDTH))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(-2, -1) / math.sqrt(x.size(-1))
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, :], float("-inf"))
        return self.out(torch.softmax(scores, -1) @ v)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = _Attention(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.attn(self.norm(x), mask)


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.blocks = _Block(), nn.ModuleList([_Block(), _Block()])
        self.position, self.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 3)
        self.double()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = x + self.position.weight[: x.size(1)]
        for block in [self.block, *self.blocks]:
            h = block(h, mask)
        return self.head(h.mean(1))


def sequences(batch: int, length: int) -> Tensor:
    return normal(batch, length, WIDTH, seed=batch + length)


def padding(batch: int, length: int) -> Tensor:
    return torch.arange(length)[None, :] >= torch.arange(1, batch + 1).clamp(max=length)[:, None]


GRANULARITIES = [
    "auto",
    "layer",
    "preactivation",
    "activation",
    "module",
    "op",
    "children",
    ["block.attn"],
    ["block", "blocks.1"],
]


@pytest.mark.parametrize("nodes", GRANULARITIES, ids=str)
def test_one_model_takes_a_mask_or_none_and_any_batch_and_length(nodes: Any) -> None:
    model, twin = attached(_Encoder(), torch2ebm.ZeroDivergence(), nodes), _Encoder()
    assert_is_the_module(model, twin, sequences(4, 5))
    assert_is_the_module(model, twin, sequences(2, 7))
    assert_is_the_module(model, twin, sequences(4, 5), padding(4, 5))
    assert_is_the_module(model, twin, sequences(2, 7), mask=padding(2, 7))
    assert_is_the_module(model, twin, x=sequences(2, 7), mask=None)
    assert_is_the_module(model, twin, sequences(4, 5))


def test_named_and_children_nodes_bear_their_paths() -> None:
    x = sequences(4, 5)
    named = torch2ebm.convert(_Encoder(), nodes=["block.attn", "blocks.1"], example_inputs=x)
    assert {"block.attn", "blocks.1"} <= named.nodes.keys()
    assert not any(name.startswith(("block.attn.", "blocks.1.")) for name in named.nodes)
    children = torch2ebm.convert(_Encoder(), nodes="children", example_inputs=x)
    assert {"block", "blocks.0", "blocks.1", "head"} <= children.nodes.keys()


class _Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.route, self.last = nn.Linear(WIDTH, WIDTH), _Branch(), nn.Linear(WIDTH, WIDTH)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.route(self.first(x)))


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return torch.relu(self.up(h)) if h.sum() > 0 else self.down(h)


def test_a_named_node_may_branch_on_values() -> None:
    model, twin = attached(_Routed(), torch2ebm.ZeroDivergence(), ["route"]), _Routed()
    taken = set()
    for seed in range(6):
        x = normal(2, WIDTH, seed=seed)
        taken.add(bool(twin.first(x).sum() > 0))
        assert_is_the_module(model, twin, x)
    assert taken == {True, False}


def test_a_named_node_may_branch_on_values_under_predictive_coding() -> None:
    model = attached(_Routed(), torch2ebm.PredictiveCoding(steps=3), ["route"])
    model(normal(2, WIDTH)).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.last.parameters())


def test_moving_to_another_precision_after_conversion_is_followed() -> None:
    source = "h = h * torch.tensor(2.0) + self.scale"
    module, twin = wired(source).float(), wired(source).float()
    model = attached(module, torch2ebm.ZeroDivergence())
    model(normal(5, WIDTH).float()).mean().backward()
    assert_is_the_module(model.double(), twin.double(), normal(5, WIDTH))
    ours = model.float()(normal(5, WIDTH).float())
    assert ours.dtype == torch.float32 and torch.equal(ours, twin.float()(normal(5, WIDTH).float()))


def test_a_parametrised_layer_is_followed() -> None:
    def build() -> nn.Module:
        net = deep(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 3))
        nn.utils.parametrizations.weight_norm(net[0])
        torch.manual_seed(0)
        nn.utils.parametrizations.spectral_norm(net[2])
        return net

    model, twin = attached(build(), torch2ebm.ZeroDivergence()), build()
    assert_is_the_module(model, twin, normal(5, WIDTH))
    assert_is_the_module(model.eval(), twin.eval(), normal(5, WIDTH))


# ---- attributes

KEPT = {
    "an attribute": "self.seen = h; h = h + 1",
    "a list of them": "self.seen = [h, x]; h = h + 1",
    "appended": "self.log.append(h); h = h + 1",
    "under a key": "self.table['h'] = h.detach(); h = h + 1",
    "beside a branch on a shape": "self.seen = h; h = h + 1 if x.dim() == 2 else h",
    "computed for it": "self.seen = h.abs().sum(); h = h + 1",
    "the last value": "h = torch.tanh(h); self.seen = h",
}


def keeping(source: str) -> Wired:
    module = wired(source)
    module.seen, module.log, module.table = None, [], {}
    return module


def kept_by(module: nn.Module) -> list[Tensor]:
    return list(tensors_in([module.seen, module.log, module.table]))


@statements_of(KEPT)
def test_a_tensor_that_forward_leaves_in_an_attribute_is_that_of_the_plain_forward(source: str) -> None:
    module, twin = keeping(source), keeping(source)
    model = torch2ebm.convert(module, example_inputs=normal(5, WIDTH))
    assert (module.seen, module.log, module.table) == (None, [], {})  # as it was
    model.attach(torch2ebm.ZeroDivergence())
    for seed in (1, 2, 3):
        assert_is_the_module(model, twin, normal(5, WIDTH, seed=seed))
        assert [t.tolist() for t in kept_by(module)] == [t.tolist() for t in kept_by(twin)]
        module.log.clear(), twin.log.clear()


@statements_of(KEPT)
def test_a_loss_of_what_forward_left_in_an_attribute_has_its_gradient(source: str) -> None:
    """An auxiliary loss, or an activity penalty."""
    module, twin = keeping(source), keeping(source)
    model = attached(module, torch2ebm.ZeroDivergence())
    for batch in (5, 3, 5):
        gradients = []
        for net, owner in ((model, module), (twin, twin)):
            owner.log, owner.seen, owner.table = [], None, {}
            net.zero_grad()
            output = net(normal(batch, WIDTH, seed=batch))
            penalty = sum(tensor.pow(4).mean() for tensor in kept_by(owner))
            (output.square().mean() + 3 * penalty).backward()
            gradients.append({name: p.grad.clone() for name, p in owner.named_parameters()})
        assert relative_error(*gradients) < 1e-12


# ---- arguments and results


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Record:
    left: Any
    right: Any = None


class _Taking(nn.Module):
    """Calls ``use(layer, *args, **kwargs)``."""

    def __init__(self, use: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, WIDTH).double()
        self.use = use

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        use = self.use
        return use(lambda v: torch.tanh(self.layer(v)), *args, **kwargs)


A, B = normal(4, WIDTH), normal(4, WIDTH, seed=2)
FORMS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "several positional": (lambda f, *v: f(v[0]) * f(v[1]), (A, B)),
    "dict in": (lambda f, d: f(d["a"]) + d["b"], ({"a": A, "b": B},)),
    "tuple in": (lambda f, p: f(p[0]) + p[1], ((A, B),)),
    "list in": (lambda f, p: sum(f(v) for v in p), ([A, B, A],)),
    "nested in": (lambda f, p: f(p["a"][0]) * f(p["a"][1]["b"]), ({"a": (A, {"b": B})},)),
    "namedtuple in": (lambda f, p: f(p.left) * p.right, (Pair(A, B),)),
    "dataclass in": (lambda f, p: f(p.left) * p.right, (Record(A, B),)),
    "dict out": (lambda f, x: {"a": f(x), "b": f(f(x))}, (A,)),
    "tuple out": (lambda f, x: (f(x), f(f(x))), (A,)),
    "list out": (lambda f, x: [f(x), f(f(x))], (A,)),
    "nested out": (lambda f, x: {"a": (f(x), [f(x) * 2]), "n": 3, "s": "text", "none": None}, (A,)),
    "namedtuple out": (lambda f, x: Pair(f(x), f(f(x))), (A,)),
    "dataclass out": (lambda f, x: Record(f(x), f(f(x))), (A,)),
    "the input returned": (lambda f, x: (f(x), x), (A,)),
    "a static value returned": (lambda f, x: (x * 2, f(x)), (A,)),
    "the same value twice": (lambda f, x: (lambda h: (h, h, f(h)))(f(x)), (A,)),
    "a hidden value returned": (lambda f, x: (lambda h: (f(h), h))(f(x)), (A,)),
    "an index returned": (lambda f, x: (f(x), f(x).argmax(-1)), (A,)),
    "a size returned": (lambda f, x: (f(x), x.shape, x.size(0)), (A,)),
    "a detached value returned": (lambda f, x: (f(x), f(x).detach()), (A,)),
    "a constant returned": (lambda f, x: (f(x), torch.ones(2), torch.tensor(2.0)), (A,)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("nodes", ["auto", "op"])
def test_arguments_and_results_of_this_form_are_followed(form: Any, nodes: str) -> None:
    use, args = form
    twin, model = _Taking(use), torch2ebm.convert(_Taking(use), nodes, example_inputs=args)
    model.attach(torch2ebm.ZeroDivergence())
    assert_is_the_module(model, twin, *args)
    assert_is_the_module(model, twin, *args)
    assert_is_the_module(model.eval(), twin.eval(), *args)


class _Optioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, x: Tensor, n: Any = 2, mode: str = "tanh", *more: Tensor, bonus: Any = None, **rest: Any) -> Any:
        h = torch.tanh(self.layer(x)) if mode == "tanh" else torch.relu(self.layer(x))
        h = h * 10 if isinstance(n, bool) else h * n / 7 if isinstance(n, float) else h * n
        for tensor in more:
            h = h + tensor
        if bonus is not None:
            h = h * bonus
        for name, value in rest.items():
            h = h + len(name) * value
        return h


def test_arguments_that_are_no_tensors_are_told_apart_by_value_and_type() -> None:
    model, twin = attached(_Optioned(), torch2ebm.ZeroDivergence()), _Optioned()
    for n in (2, 3, True, 1, 1.0, 2.0, True, 1):
        assert_is_the_module(model, twin, A, n)
    for mode in ("tanh", "relu", "tanh"):
        assert_is_the_module(model, twin, A, 2, mode)
        assert_is_the_module(model, twin, A, mode=mode)


def test_variable_and_keyword_arguments_are_followed() -> None:
    model, twin = attached(_Optioned(), torch2ebm.ZeroDivergence()), _Optioned()
    for args in ((A,), (A, 2, "tanh", B), (A, 2, "tanh", B, B * 2), (A, 2, "tanh", B)):
        assert_is_the_module(model, twin, *args)
    for kwargs in ({"bonus": B}, {"bonus": 3}, {"u": B}, {"long": B}, {"u": A, "v": B}, {"v": B, "u": A}, {}):
        assert_is_the_module(model, twin, A, **kwargs)


def test_an_array_among_the_arguments_is_followed() -> None:
    def use(f: Callable[..., Tensor], x: Tensor, array: np.ndarray) -> Tensor:
        return f(x) * float(array.sum())

    arrays = np.arange(3.0), np.arange(3.0), np.arange(4.0)
    twin, model = _Taking(use), torch2ebm.convert(_Taking(use), example_inputs=(A, arrays[0]))
    model.attach(torch2ebm.ZeroDivergence())
    for array in arrays:
        assert_is_the_module(model, twin, A, array)


def test_convert_takes_a_forward_of_variable_arguments_without_an_example() -> None:
    model = attached(_Taking(lambda f, a, b: f(a) * b), torch2ebm.ZeroDivergence())
    assert_is_the_module(model, _Taking(lambda f, a, b: f(a) * b), A, B)


def test_an_object_whose_fields_change_between_calls_is_followed() -> None:
    class Settings:
        scale = 2.0

    def use(f: Callable[..., Tensor], x: Tensor, settings: Settings) -> Tensor:
        return f(x) * settings.scale

    settings, twin = Settings(), _Taking(use)
    model = torch2ebm.convert(_Taking(use), example_inputs=(A, settings))
    model.attach(torch2ebm.ZeroDivergence())
    for scale in (2.0, 3.0, 3.0, 0.5):
        settings.scale = scale
        model.zero_grad(), twin.zero_grad()
        assert torch.equal(model(A, settings), twin(A, settings))
        assert_is_the_module(model, twin, A, settings)


def test_convert_without_an_example_takes_an_optional_argument_later() -> None:
    model = torch2ebm.convert(_Encoder())
    torch2ebm.EnergyOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, torch2ebm.ZeroDivergence())
    assert_is_the_module(model, _Encoder(), sequences(3, 4), padding(3, 4))
