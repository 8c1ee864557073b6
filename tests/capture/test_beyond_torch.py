"""What is no plain operation of torch: custom functions, scripted modules, checkpoints, hooks, NumPy, writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import attached
from test_capture import WIDTH, Wired, assert_is_the_module, normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch2ebm
from torch2ebm.errors import OpaqueModuleWarning


def followed(build: Callable[[], nn.Module], nodes: Any = "auto", sizes: tuple[int, ...] = (5, 3, 5)) -> Any:
    model, twin = attached(build(), torch2ebm.ZeroDivergence(), nodes), build()
    for batch in sizes:
        assert_is_the_module(model, twin, normal(batch, WIDTH, seed=batch))
    return model


def relaxes(build: Callable[[], nn.Module]) -> None:
    model = attached(build(), torch2ebm.PredictiveCoding(4, 1e-3))
    for _ in range(2):
        model(normal(5, WIDTH)).square().mean().backward()
        energy = model.state.relaxation.energy
        assert energy[-1] < energy[0]


# Custom autograd functions --------------------------------------------------------------------------------------------


class Reversed(torch.autograd.Function):
    """Gradient reversal: a factor that is no tensor, and that the backward alone knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return -ctx.factor * gradient, None


class Reversal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.factor = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), 1.0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(Reversed.apply(self.first(x), self.factor)))


def test_the_changing_argument_of_a_custom_function_reaches_its_backward() -> None:
    module, twin = Reversal(), Reversal()
    model = attached(module, torch2ebm.ZeroDivergence())
    for factor in (1.0, 1.0, 0.5, 0.25, 0.0, 2.0):
        module.factor = twin.factor = factor
        assert_is_the_module(model, twin, normal(5, WIDTH))
    assert len(model.torch2ebm.captures.entries) == 2  # zero is another sequence


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(scale)
        codes = torch.from_numpy(np.round((x / scale).detach().numpy()))
        ctx.mark_non_differentiable(codes)
        return codes * scale, codes

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
        (scale,) = ctx.saved_tensors
        return gradient, (gradient * 0.1).sum().reshape(scale.shape)


class Quantised(nn.Module):
    """Straight through a rounding in NumPy, with a learned step, and a result without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.step = nn.Parameter(torch.tensor(0.1))
        self.register_buffer("used", torch.zeros(WIDTH))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h, codes = Rounded.apply(self.first(x), self.step)
        self.used += codes.abs().sum(0)
        return self.last(torch.tanh(h))


def test_a_custom_function_in_numpy_with_several_results_keeps_its_backward() -> None:
    followed(Quantised)
    followed(Quantised, "op")
    relaxes(Quantised)


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_is_looked_into(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
            self.block = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, WIDTH))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(checkpoint(self.block, self.first(x), use_reentrant=reentrant)))

    model = followed(Checkpointed)
    assert list(model.nodes) == ["first", "block.0", "block.3", "last"]


# Modules that run outside of Python -----------------------------------------------------------------------------------


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            x = torch.tanh(self.layer(x))
        return x + 1


def scripted() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), torch.jit.script(Gate()), nn.Linear(WIDTH, 3)).double()


def test_a_scripted_submodule_is_one_node_and_said_to_be() -> None:
    with pytest.warns(OpaqueModuleWarning, match=r"Sequential\.1 is a RecursiveScriptModule.*one node"):
        model = followed(scripted)
    assert list(model.nodes) == ["0", "1", "2"]
    assert set(model.nodes["1"].parameters) == {"1.layer.weight", "1.layer.bias"}


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.OpaqueModuleWarning")
def test_a_backward_hook_is_called_with_its_own_backward() -> None:
    seen: list[int] = []

    def build() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        net[1].register_full_backward_hook(lambda module, inputs, outputs: seen.append(1) or (inputs[0] * 2,))
        return net

    followed(build)
    assert len(seen) >= 6  # three backwards of each of the two


# Hooks on tensors -----------------------------------------------------------------------------------------------------


def test_a_hook_on_a_hidden_tensor_changes_the_gradient_that_passes() -> None:
    def between(self: nn.Module, h: Tensor, x: Tensor) -> Tensor:
        h.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        return torch.tanh(h)

    followed(lambda: Wired(between))
    followed(lambda: Wired(between), "op")


# Python and NumPy on values -------------------------------------------------------------------------------------------


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x * 2
        return x


class Tangled(nn.Module):
    """All that stops a tracer, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.pool, self.read = nn.Linear(WIDTH, 4), Branching(), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.pool(self.first(x))
        if hidden.sum() > 1e3:
            hidden = hidden[: int(hidden.detach().min())]
        scale = hidden.abs().max().item()
        hidden = hidden * scale if scale > 0 else hidden
        hidden = self.pool(hidden + torch.from_numpy(np.tanh(hidden.detach().numpy())))
        for value in hidden[0].tolist():
            hidden = hidden + value
        assert not torch.allclose(hidden, hidden + 1)
        assert isinstance(hidden, Tensor) and math.isfinite(float(hidden.detach().sum()))
        return self.read(torch.tanh(hidden[:, : int(hidden.detach().abs().max() * 0) + 3]))


def test_all_that_stops_a_tracer_in_one_forward_is_followed() -> None:
    followed(Tangled, sizes=(4, 3, 4, 2, 5))


# Writes in place through views ----------------------------------------------------------------------------------------

WRITES: dict[str, Callable[..., Tensor]] = {
    "a column": lambda self, h, x: _column(h, x),
    "a view of a view": lambda self, h, x: _inner(h),
    "a table, row by row": lambda self, h, x: _table(h, x),
    "diagonal": lambda self, h, x: _diagonal(h),
    "a mask": lambda self, h, x: h.clone().masked_scatter_(x > 0, h.flip(0)),
    "index_add_": lambda self, h, x: h * torch.zeros_like(h).index_add_(0, torch.arange(len(h)).flip(0), h),
    "scatter_": lambda self, h, x: h + torch.zeros_like(h).scatter_(1, h.argsort(1), h),
    "addcmul_ and lerp_": lambda self, h, x: h.addcmul_(x, x, value=0.5).lerp_(x, 0.25),
    "into what a residual reads": lambda self, h, x: h + F.relu_(h[:, :3].repeat(1, 2)),
    "copy_ from a later layer": lambda self, h, x: _copied(self, h),
}


def _column(h: Tensor, x: Tensor) -> Tensor:
    h = torch.tanh(h) * 1.5
    h[:, 0] *= x[:, 1]
    h.T[2:4].add_(1.0)
    return h * 2


def _inner(h: Tensor) -> Tensor:
    rows = h.view(len(h), 2, 3)
    rows[:, 0].mul_(2.0)
    rows.select(1, 1)[..., 1:] += h[:, :2]
    return h + rows.flatten(1)


def _table(h: Tensor, x: Tensor) -> Tensor:
    table = x.new_zeros(len(h), WIDTH)
    for i in range(WIDTH):
        table[:, i] = h[:, i] * (i + 1)
    return table + h


def _diagonal(h: Tensor) -> Tensor:
    square = h.T @ h
    square.diagonal().fill_(0.5)
    return h @ square


def _copied(self: nn.Module, h: Tensor) -> Tensor:
    kept = torch.tanh(h) * 1.5
    kept[:, :3].copy_(self.last(kept.clone())[:, 3:])
    return kept


@pytest.mark.parametrize("between", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("nodes", ["auto", "op"])
def test_a_write_through_a_view_is_seen_by_all_who_share_the_memory(between: Any, nodes: str) -> None:
    followed(lambda: Wired(between), nodes)


# What turns out only later -------------------------------------------------------------------------------------------


class Descending(nn.Module):
    """A step down an energy, by a gradient that is taken inside of forward: from some call on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.descends = nn.Linear(WIDTH, WIDTH), False

    def forward(self, h: Tensor) -> Tensor:
        if not self.descends:
            return torch.tanh(self.layer(h))
        energy = self.layer(h).square().sum()
        (gradient,) = torch.autograd.grad(energy, h, create_graph=True)
        return h - 0.1 * gradient


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.3)
        self.inner, self.last, self.calls = Descending(), nn.Linear(WIDTH, 3), 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.inner(self.drop(self.norm(self.first(x)))))


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.OpaqueModuleWarning")
def test_a_module_that_turns_out_to_be_opaque_in_a_later_call_has_had_one_call() -> None:
    """Its run is made twice: running statistics, dropout masks and counters are those of one."""
    module, twin = Late(), Late()
    model = attached(module, torch2ebm.ZeroDivergence())
    for seed, descends in enumerate((False, False, True, True, False, True)):
        module.inner.descends = twin.inner.descends = descends
        assert_is_the_module(model, twin, normal(5, WIDTH, seed=seed))
        assert module.calls == twin.calls
    assert list(model.nodes) == ["first", "norm", "inner", "last"]
