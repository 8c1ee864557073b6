"""What a model is called with: dicts of other classes, bad numbers that forward mends, masks, generators, leaves."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import attached, relative_error
from test_capture import WIDTH, assert_is_the_module, normal
from torch import Tensor, nn

import torch2ebm


class Taking(nn.Module):
    """Calls ``use(self, *args)``, with two layers."""

    def __init__(self, use: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.use = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), use
        self.z = nn.Parameter(torch.randn(1, WIDTH))
        self.double()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        use = self.use
        return use(self, *args, **kwargs)


def check_calls(use: Callable[..., Tensor], *calls: Callable[[], Any]) -> torch2ebm.EnergyModel:
    """Calls with what each of ``calls`` makes, the plain module beside it."""
    model, twin = attached(Taking(use), torch2ebm.ZeroDivergence()), Taking(use)
    for make in calls:
        ours, theirs = step(model, make()), step(twin, make())
        assert torch.equal(ours[0], theirs[0])
        assert relative_error(ours[1], theirs[1]) < 1e-12
    return model


def step(net: nn.Module, argument: Any) -> tuple[Tensor, dict[str, Tensor]]:
    net.zero_grad()
    torch.manual_seed(0)
    output = net(argument)
    output.square().mean().backward()
    return output.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def batches(wrap: Callable[[Tensor, Tensor], Any], count: int = 3) -> list[Callable[[], Any]]:
    def of(seed: int) -> Callable[[], Any]:
        return lambda: wrap(normal(5, WIDTH, seed=seed), normal(5, WIDTH, seed=seed + 10))

    return [of(seed) for seed in range(count)]


class Encoding(UserDict):
    """As a tokenizer returns it."""

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


class Graph:
    """An object that is no container that Python knows."""

    def __init__(self, x: Tensor, edges: Tensor) -> None:
        self.x, self.edges = x, edges


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[..., Tensor]]] = {
    "UserDict": (lambda a, b: UserDict(a=a, b=b), lambda net, d: net.last(torch.tanh(net.first(d["a"])) * d["b"])),
    "its attributes": (lambda a, b: Encoding(a=a, b=b), lambda net, d: net.last(torch.tanh(net.first(d.a)) * d.b)),
    "unpacked": (lambda a, b: Encoding(a=a, b=b), lambda net, d: _named(net, **d)),
    "OrderedDict": (lambda a, b: OrderedDict(a=a, b=b), lambda net, d: _named(net, **d)),
    "an object": (Graph, lambda net, g: net.last(torch.tanh(net.first(g.x)) * g.edges)),
    "a namespace": (lambda a, b: SimpleNamespace(a=a, b=b), lambda net, d: _named(net, d.a, d.b)),
}


def _named(net: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    return net.last(torch.tanh(net.first(a)) * b)


@pytest.mark.parametrize(("wrap", "use"), FORMS.values(), ids=FORMS)
def test_an_argument_of_this_class_is_read_anew_in_every_call(wrap: Any, use: Any) -> None:
    model = check_calls(use, *batches(wrap))
    assert len(model.torch2ebm.captures.entries) == 1


def test_an_argument_whose_content_changes_between_calls_is_read_anew() -> None:
    graph = Graph(normal(5, WIDTH), normal(5, WIDTH, seed=2))

    def moved() -> Graph:
        graph.x = graph.x + 1
        return copy.copy(graph)

    use = FORMS["an object"][1]
    model, twin = attached(Taking(use), torch2ebm.ZeroDivergence()), Taking(use)
    for _ in range(3):
        given = moved()
        ours, theirs = step(model, given), step(twin, given)
        assert torch.equal(ours[0], theirs[0])
        assert relative_error(ours[1], theirs[1]) < 1e-12


# Numbers that are none ------------------------------------------------------------------------------------------------

MENDED: dict[str, Callable[..., Tensor]] = {
    "nan_to_num": lambda net, x: net.last(torch.tanh(net.first(x.nan_to_num(0.5)))),
    "where": lambda net, x: net.last(torch.tanh(net.first(torch.where(x.isnan(), net.z, x)))),
    "an index": lambda net, x: net.last(torch.tanh(net.first(x[~x.isnan().any(1)]))),
    "in place": lambda net, x: net.last(torch.tanh(net.first(_filled(x)))),
}


def _filled(x: Tensor) -> Tensor:
    x = x.clone()
    x[x.isnan()] = 0.25
    return x


@pytest.mark.parametrize("use", MENDED.values(), ids=MENDED)
@pytest.mark.parametrize(
    "algorithm", [torch2ebm.ZeroDivergence(), torch2ebm.PredictiveCoding(3, 0.01)], ids=["Z-IL", "PC"]
)
def test_missing_numbers_that_forward_mends_are_no_error(use: Callable[..., Tensor], algorithm: Any) -> None:
    def make(seed: int) -> Tensor:
        x = normal(5, WIDTH, seed=seed)
        x[seed % 5, seed % WIDTH] = torch.nan
        return x

    model, twin = attached(Taking(use), algorithm), Taking(use)
    for seed in (0, 1, 2):
        ours, theirs = step(model, make(seed)), step(twin, make(seed))
        assert torch.equal(ours[0], theirs[0])
        assert all(gradient.isfinite().all() for gradient in ours[1].values())
        if isinstance(algorithm, torch2ebm.ZeroDivergence):
            assert relative_error(ours[1], theirs[1]) < 1e-12


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.last = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2)
        self.double()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.mT
        if mask is not None:
            scores = scores + mask
        return self.last(scores.softmax(-1) @ v)


def causal(length: int) -> Tensor:
    return torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)


def test_a_mask_of_minus_infinities_may_be_an_argument() -> None:
    model, twin = attached(Attention(), torch2ebm.ZeroDivergence()), Attention()
    for length in (4, 4, 6, 3):
        assert_is_the_module(model, twin, normal(2, length, WIDTH), causal(length))
        assert_is_the_module(model, twin, normal(2, length, WIDTH), mask=causal(length))
    assert len(model.torch2ebm.captures.entries) == 1


@pytest.mark.parametrize("nodes", ["auto", "op"])
def test_values_relax_beside_a_mask_of_minus_infinities(nodes: str) -> None:
    model = attached(Attention(), torch2ebm.PredictiveCoding(4, 1e-3), nodes)
    for _ in range(2):
        model(normal(2, 4, WIDTH), causal(4)).square().mean().backward()
        energy = model.state.relaxation.energy
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        assert energy[-1] < energy[0]


# Generators -----------------------------------------------------------------------------------------------------------


def noisy(net: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    h = net.first(x)
    h = h + torch.randn(h.shape, generator=generator, dtype=h.dtype)
    return net.last(torch.tanh(h) * torch.empty_like(h).bernoulli_(0.7, generator=generator))


def test_a_generator_among_the_arguments_is_drawn_from_as_by_the_module() -> None:
    ours, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    model, twin = attached(Taking(noisy), torch2ebm.ZeroDivergence()), Taking(noisy)
    for seed in range(4):
        x = normal(5, WIDTH, seed=seed)
        found = []
        for net, generator in ((model, ours), (twin, theirs)):
            net.zero_grad()
            output = net(x, generator)
            output.square().mean().backward()
            found.append(
                (output.detach(), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
            )
        assert torch.equal(found[0][0], found[1][0])
        assert relative_error(found[0][1], found[1][1]) < 1e-12
        assert torch.equal(ours.get_state(), theirs.get_state())


def test_a_relaxation_draws_nothing_from_a_generator_among_the_arguments() -> None:
    generator, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    module = Taking(noisy)
    model = attached(module, torch2ebm.PredictiveCoding(4, 1e-3))
    for seed in range(3):
        x = normal(5, WIDTH, seed=seed)
        output = model(x, generator)
        output.square().mean().backward()
        assert torch.equal(output, module(x, other))
        assert torch.equal(generator.get_state(), other.get_state())
        energy = model.state.relaxation.energy
        assert energy[-1] < energy[0]


# Where a net begins ---------------------------------------------------------------------------------------------------

STARTS: dict[str, Callable[..., Tensor]] = {
    "a learned constant": lambda net, x: net.last(torch.tanh(net.first(net.z.expand(len(x), -1)))) * x[:, :3],
    "a learned constant and data": lambda net, x: net.last(torch.tanh(net.first(net.z.expand(len(x), -1) + x))),
    "a class token": lambda net, x: net.last(torch.tanh(net.first(torch.cat([net.z.expand(len(x), -1), x], 1).view(
        len(x), 2, -1)))).mean(1),
    "repeated": lambda net, x: net.last(torch.tanh(net.first(net.z.repeat(len(x), 1)))) + x[:, :3],
}  # fmt: skip


@pytest.mark.parametrize("use", STARTS.values(), ids=STARTS)
def test_a_net_that_begins_with_a_learned_constant_has_its_layers_for_nodes(use: Callable[..., Tensor]) -> None:
    model = check_calls(use, *batches(lambda a, b: a))
    assert list(model.nodes)[-2:] == ["first", "last"]
    model.detach()
    model.attach(torch2ebm.PredictiveCoding(6, 1e-2))
    model(normal(5, WIDTH)).square().mean().backward()
    energy = model.state.relaxation.energy
    assert energy[-1] < energy[0]  # values relax


# Inputs that require a gradient ---------------------------------------------------------------------------------------

INPUTS: dict[str, Callable[..., Tensor]] = {
    "as it is": lambda net, x: net.last(torch.tanh(net.first(x))),
    "after a function": lambda net, x: net.last(torch.tanh(net.first(x.sin() * 2))),
    "read twice": lambda net, x: net.last(torch.tanh(net.first(x)) * x),
    "normalised in place of a copy": lambda net, x: net.last(torch.tanh(net.first(x.clone().sub_(x.mean(0))))),
}


@pytest.mark.parametrize("use", INPUTS.values(), ids=INPUTS)
def test_the_gradient_of_an_input_is_autograd_s(use: Callable[..., Tensor]) -> None:
    model, twin = attached(Taking(use), torch2ebm.ZeroDivergence()), Taking(use)
    for seed in range(3):
        inputs = [normal(5, WIDTH, seed=seed).requires_grad_() for _ in range(2)]
        for net, x in zip((model, twin), inputs, strict=True):
            step(net, x)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-14)
