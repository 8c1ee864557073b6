"""What third-party architectures do in forward, each kind in a few lines: outputs, buffers and gradients stay exact."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import pytest
import torch
from forwards import training_with
from torch import Tensor, nn
from torch.nn import functional

import torch2ebm
from torch2ebm.common.nested import leaves_of


def squares(output: Any) -> Tensor:
    """A loss of every differentiable tensor of the output."""
    found = [leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([leaf.square().mean() for leaf in found]).sum()


def called(
    module: Callable[..., Any], net: nn.Module, x: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The loss, gradients by name, and buffers by name, of a call with the same random numbers each time."""
    net.zero_grad()
    torch.manual_seed(3)
    loss = squares(module(x))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, {name: b.clone() for name, b in net.named_buffers()}


def check_calls(net: nn.Module, *inputs: Tensor, before: Callable[[nn.Module, int], None] | None = None) -> Any:
    """Hold each of several calls against a plain copy of the module; returns the converted model.

    Args:
        net: In training mode.
        inputs: One for each call.
        before: Called before each call with either module, and the number of the call.
    """
    net = net.double()
    plain = copy.deepcopy(net)
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), model, torch2ebm.ZeroDivergence())
    for i, x in enumerate(inputs):
        if before is not None:
            before(net, i)
            before(plain, i)
        ours, real = called(model, net, x), called(plain, plain, x)
        assert torch.equal(ours[0], real[0])
        assert ours[1].keys() == real[1].keys()
        for name, gradient in real[1].items():
            torch.testing.assert_close(ours[1][name], gradient, rtol=1e-10, atol=1e-12, msg=name)
        for name, buffer in real[2].items():
            torch.testing.assert_close(ours[2][name], buffer, rtol=0, atol=0, equal_nan=True, msg=name)
    optimizer.detach()
    return model


class AttentionWithDropouts(nn.Module):
    """Two draws in what a node per layer holds, and numbers that follow the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inwards, self.outwards = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inwards(x).chunk(3, -1)
        weights = functional.dropout(torch.softmax(q @ k.transpose(-1, -2), -1), 0.2, self.training)
        mixed = functional.dropout(weights @ v, 0.3, self.training).view(len(x), -1, 4)
        return functional.dropout(self.outwards(mixed), 0.1, self.training)


def batches(*sizes: int) -> list[Tensor]:
    return [torch.randn(size, 3, 4, dtype=torch.float64) for size in sizes]


def test_several_draws_of_one_node_at_another_batch_size() -> None:
    check_calls(AttentionWithDropouts(), *batches(2, 2, 5, 5, 3))


class Normalised(nn.Module):
    """Batch statistics, a number that follows the batch, and a branch that another call takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.other = nn.BatchNorm1d(6)
        self.branch = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(functional.dropout(self.first(x[:, 0]), 0.2, self.training)).tanh()
        if self.branch:
            h = functional.dropout(self.other(functional.dropout(h, 0.5, self.training)), 0.1, self.training)
        return self.last(h).reshape(len(x), 2, 1)


def test_running_statistics_move_once_at_another_batch_size() -> None:
    check_calls(Normalised(), *batches(4, 6, 6, 5))


def test_running_statistics_move_once_in_another_branch() -> None:
    def before(net: nn.Module, call: int) -> None:
        net.branch = call in (1, 3, 4)

    check_calls(Normalised(), *batches(4, 4, 4, 4, 5, 6), before=before)


def test_running_statistics_move_once_after_a_call_in_evaluation() -> None:
    def before(net: nn.Module, call: int) -> None:
        net.train(call > 0)

    check_calls(Normalised(), *batches(4, 4, 4, 5), before=before)


class Typed(nn.Module):
    """Asks a tensor for its type, and converts another by the same method; compares with what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        kind = h.type()
        if h == "nothing":
            return h
        scores = (h.float() * 2).softmax(-1).type(h.dtype)
        return self.last((scores + (h == 3)).type(kind))


def test_a_method_that_tells_or_converts_is_followed_where_it_converts() -> None:
    model = check_calls(Typed(), *batches(2, 2, 3))
    assert not model.graph.opaque
    assert len(model.nodes) == 2


@dataclass
class Kept:
    hidden: Tensor
    layers: list[Tensor]
    name: str = "kept"


class OutsideOfTorch(nn.Module):
    """Opaque, since C++ calls torch here; its result holds fields, and lists in fields."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        h = self.linear(x)
        with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
            g = h.tanh()
        return g * 2, Kept(g, [h, g + h])


class UsesFields(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = OutsideOfTorch(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        h, kept = self.inner(x)
        return self.last(h + kept.hidden + kept.layers[1]), kept


def test_an_opaque_module_returns_fields() -> None:
    with pytest.warns(torch2ebm.errors.OpaqueModuleWarning, match="inner"):
        model = check_calls(UsesFields(), *batches(2, 2, 3))
    assert list(model.graph.opaque) == ["inner"]


class Experts(nn.Module):
    """Tokens are sorted by the experts that a router chose for each, in equal shares, and put back in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.inwards, self.outwards = (nn.Parameter(torch.randn(3, 4, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(x).tanh().view(-1, 4)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        order = torch.sort(chosen.reshape(-1), stable=True)[1]
        h = torch.bmm(tokens[order // 2].view(3, -1, 4), self.inwards).relu()
        h = torch.bmm(h, self.outwards).view(-1, 4) * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return self.last(h[back].view(-1, 2, 4).sum(1) + tokens).view(len(x), -1, 2)


def test_tokens_go_to_experts_and_back() -> None:
    model = check_calls(Experts(), *batches(2, 2, 3))
    assert len(model.nodes) > 2


class Powers(nn.Module):
    """Operators that torch knows by other names than Python does, in place and not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        g = h.sigmoid() ** 2 + 2 ** h.tanh() + (1 + h * h) ** h.tanh() + x.abs() ** h
        g **= 2
        k = h * 3
        k **= 2
        return self.last(g + k % 3 + (7 // (2 + k.detach())))


def test_powers_by_operators() -> None:
    check_calls(Powers(), *batches(2, 2, 3))


@pytest.mark.parametrize(
    "function",
    [
        lambda h: functional.max_pool1d(h, 2),
        lambda h: functional.adaptive_max_pool1d(h, 2),
        lambda h: functional.max_pool1d(h, 2, return_indices=True)[0],
        lambda h: torch.special.expit(h),
        lambda h: torch.linalg.vector_norm(h, dim=-1),
        lambda h: torch.fft.rfft(h).abs(),
        lambda h: torch.linalg.norm(h, dim=-1),
        lambda h: torch.norm(h, dim=-1),
        lambda h: torch.stft(h[:, 0], 4, window=torch.ones(4, dtype=h.dtype), return_complex=True).abs(),
        lambda h: torch.einsum("bij,bik->bjk", h, h),
        lambda h: torch.split(h, [1, 5], -1)[1],
        lambda h: h.split(2, -1)[0],
        lambda h: torch.cdist(h, h + 1),
        lambda h: torch.nn.utils.rnn.pad_sequence([h[0], h[1, :2]]),
        lambda h: torch.unique(h.detach().round(), dim=0).sum() + h,
        lambda h: torch.meshgrid(h[0, 0], h[1, 0], indexing="ij")[0],
        lambda h: torch.tensordot(h, h, dims=([0], [0])),
        lambda h: functional.interpolate(h, scale_factor=2),
        lambda h: functional.gumbel_softmax(h, hard=True),
        lambda h: torch.block_diag(h[0], h[1]),
    ],
)
def test_functions_of_torch_are_found_again_by_their_names(function: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.first(x)) * 2

    check_calls(Net(), *batches(2, 2, 3))


class AddsToParts(nn.Module):
    """``x[..., :2] += y`` reads a part, writes it, and puts it where it is already."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        boxes = self.first(x)
        boxes[..., :2] += x[..., 2:].sigmoid()
        boxes[:, 0][..., 1:] *= boxes[:, 1][..., 1:].tanh()
        boxes[0, :, 0] -= self.last(boxes.clone())[0, :, 0]
        return self.last(boxes.sigmoid())


def test_parts_are_added_to() -> None:
    check_calls(AddsToParts(), *batches(2, 2, 3))


class SamplesTokens(nn.Module):
    """A layer that serves to choose alone: what others read of it is one tuple of data, and no value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.score, self.last = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        chosen = self.score(h)[..., 0].argsort(dim=-1).unbind()
        return self.last(torch.stack([h[i, each[:2]] for i, each in enumerate(chosen)]))


def test_a_layer_that_serves_to_choose_alone() -> None:
    check_calls(SamplesTokens(), *batches(2, 2, 3))


class Queue(nn.Module):
    """A queue of earlier results in a buffer, with a place that moves on and begins again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("queue", torch.randn(8, 4))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = functional.dropout(functional.normalize(self.first(x[:, 0]), dim=-1), 0.2)
        similar = h @ self.queue.clone().detach().T
        with torch.no_grad():
            place = int(self.place)
            self.queue[place : place + len(x)] = h.detach()
            self.place[0] = (place + len(x)) % 6
        return self.last(h), similar


def test_a_queue_of_earlier_results() -> None:
    check_calls(Queue(), *batches(2, 2, 2, 2, 2, 3, 3, 3))


@dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """A mapping whose fields have to be given, as outputs of diffusers are."""

    sample: Tensor
    others: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        for each in fields(self):
            self[each.name] = getattr(self, each.name)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> Any:
        call, _, *rest = super().__reduce__()
        return call, tuple(getattr(self, each.name) for each in fields(self)), *rest


@dataclass(frozen=True)
class Checked:
    """Fields that are checked, one of them not given but made."""

    value: Tensor
    size: int = field(init=False)

    def __post_init__(self) -> None:
        assert isinstance(self.value, Tensor)
        object.__setattr__(self, "size", len(self.value))


class Named(list):  # type: ignore[type-arg]
    name = "of a class of its own"


class Returns(nn.Module):
    def __init__(self, returned: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.returned = returned

    def forward(self, x: Tensor) -> Any:
        return self.returned(self.last(self.first(x).tanh()))


@pytest.mark.parametrize(
    "returned",
    [
        lambda y: Output(y, (y * 2, y + 1)),
        Checked,
        lambda y: Named([y, y * 2]),
        lambda y: UserDict(a=y, b=[y * 2]),
        lambda y: defaultdict(list, a=[y]),
        lambda y: MappingProxyType({"a": y}),
    ],
    ids=["fields that have to be given", "checked fields", "list", "UserDict", "defaultdict", "proxy"],
)
def test_outputs_keep_their_class(returned: Callable[[Tensor], Any]) -> None:
    net = Returns(returned)
    model = check_calls(net, *batches(2, 2, 3))
    (x,) = batches(3)
    with training_with(model, torch2ebm.ZeroDivergence()):
        ours, real = model(x), net(x)
    assert type(ours) is type(real)
    for a, b in zip(leaves_of(ours), leaves_of(real), strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b
    if isinstance(real, Checked):
        assert ours.size == real.size
    elif not isinstance(real, list):
        assert list(ours) == list(real)


def test_memory_that_runs_out_in_a_capture_is_named() -> None:
    class Large(nn.Module):
        """Fits once: what a capture makes again does not."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return Rows.apply(self.first(x))

    class Rows(torch.autograd.Function):
        runs = 0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            Rows.runs += 1
            if Rows.runs > 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    model = torch2ebm.convert(Large().double())
    with training_with(model, torch2ebm.ZeroDivergence()), pytest.raises(torch2ebm.errors.OutOfMemoryError):
        model(*batches(2))


class ExpertsInTurn(nn.Module):
    """Each expert that any row has chosen adds to the rows that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x[:, 0])
        rows = (x[:, 1, 0].abs() * 10).long() % 3
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            mine = (rows == i).nonzero(as_tuple=True)
            if mine[0].numel():
                out[mine] += expert(h[mine]).tanh()
        return self.last(out)


def test_experts_that_nobody_has_chosen_are_left_out() -> None:
    sets = [[0, 0], [0, 1], [1, 2], [0, 0], [0, 1, 2], [2, 1], [0, 2, 2, 2]]
    inputs = batches(*map(len, sets))
    for x, rows in zip(inputs, sets, strict=True):
        x[:, 1, 0] = torch.tensor(rows) * 0.1 + 0.05
    check_calls(ExpertsInTurn(), *inputs)


class InstanceNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())


def test_running_statistics_of_each_instance() -> None:
    def before(net: nn.Module, call: int) -> None:
        net.train(call not in (2, 4))

    check_calls(InstanceNorms(), *batches(2, 2, 2, 3, 3, 4, 4), before=before)


def test_results_that_are_put_into_a_new_tensor_without_gradients() -> None:
    class Puts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 2)
            self.register_buffer("seen", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x[:, 0])
            self.seen.add_(y.detach().sum(0))
            return torch.zeros_like(x[:, 0, :2]).index_copy_(0, torch.arange(len(x)), y)

    net = Puts().double()
    plain = copy.deepcopy(net)
    model = torch2ebm.convert(net)
    for x in batches(2, 2, 3):
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
        assert torch.equal(net.seen, plain.seen)
    check_calls(net, *batches(2, 3))
