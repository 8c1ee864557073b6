"""Tensors that forward leaves with a hook or an attribute are outputs: a loss that uses them reaches every node."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import attached
from torch import Tensor, nn
from torch.nn import functional

import torch2ebm
from torch2ebm.errors import KeptValueWarning

SMALL = torch2ebm.PredictiveCoding(steps=600, lr=0.1, nudging=torch2ebm.Symmetric(1e-4))


def net_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def by_hook(net: nn.Sequential, seen: dict[str, Any]) -> Callable[[], Tensor]:
    net[2].register_forward_hook(lambda module, args, output: seen.__setitem__("h", output))
    return lambda: seen["h"]


def by_view(net: nn.Sequential, seen: dict[str, Any]) -> Callable[[], Tensor]:
    net[1].register_forward_hook(lambda module, args, output: seen.__setitem__("h", output[:, 2:]))
    return lambda: seen["h"]


def in_an_object(net: nn.Sequential, seen: dict[str, Any]) -> Callable[[], Tensor]:
    class Box:
        content: Tensor

    box = Box()

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        box.content = output

    net[3].register_forward_hook(keep)
    return lambda: box.content


def gradients(net: nn.Sequential, model: nn.Module, kept: Callable[[], Tensor], batch: int) -> dict[str, Tensor]:
    torch.manual_seed(batch)
    x, y = torch.randn(batch, 4).double(), torch.randint(3, (batch,))
    net.zero_grad()
    loss = functional.cross_entropy(model(x), y)
    (loss + 0.5 * kept().square().sum(1).mean()).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.KeptValueWarning")  # some keep what is inside of a node
@pytest.mark.parametrize("keep", [by_hook, by_view, in_an_object])
@pytest.mark.parametrize(
    ("algorithm", "tolerance"),
    # a nudge of 1e-4 to both sides is backprop to its square (Scellier and Bengio 2017), and to what has not settled
    [(torch2ebm.ZeroDivergence(), 1e-12), (torch2ebm.FixedPrediction(20, 1.0), 1e-12), (SMALL, 1e-5)],
)
def test_a_loss_on_a_hidden_value_has_its_gradient(keep: Any, algorithm: Any, tolerance: float) -> None:
    net, twin = net_of(), net_of()
    ours, theirs = keep(net, {}), keep(twin, {})
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
    for batch in (5, 5, 7):
        expected = gradients(twin, twin, theirs, batch)
        found = gradients(net, model, ours, batch)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert float((found[name] - gradient).abs().max()) <= tolerance * max(1.0, float(gradient.abs().max()))
    assert optimizer.model is model and len(model.torch2ebm.captures.entries) == 1


def test_nothing_is_taken_for_kept_where_nothing_is() -> None:
    net = net_of()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, torch2ebm.ZeroDivergence())
    for _ in range(3):
        model(torch.randn(5, 4).double()).sum().backward()
    assert model.graph.held == () and list(model.nodes) == ["0", "2", "4"]
    assert optimizer.model is model


def test_a_hook_that_looks_at_a_detached_copy_adds_no_output() -> None:
    net, seen = net_of(), []
    net[0].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model = torch2ebm.convert(net, example_inputs=torch.randn(5, 4).double())
    assert model.graph.held == () and len(seen) == 1 and type(seen[0]) is Tensor


def tensors() -> int:
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def test_a_call_leaves_no_cycle() -> None:
    """Else its tensors would stay until they are collected, and each forward would ask for new memory."""
    net = net_of()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, torch2ebm.ZeroDivergence())
    for _ in range(3):
        model(torch.randn(5, 4).double()).sum().backward()
    gc.collect()
    gc.disable()
    try:
        model(torch.randn(5, 4).double()).sum().backward()
        before = tensors()
        for _ in range(5):
            model(torch.randn(5, 4).double()).sum().backward()
        assert tensors() <= before
    finally:
        gc.enable()
    assert optimizer.model is model


KEEPS: dict[str, Any] = {
    "the value of a node": (3, lambda output: output),
    "a detached tensor": (2, lambda output: output.detach()),
}


def coded(hooked: int, kept: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    net, seen = net_of(), {}
    net[hooked].register_forward_hook(lambda module, args, output: seen.__setitem__("h", kept(output)))
    model = attached(net, torch2ebm.PredictiveCoding(steps=5, lr=0.1))
    for _ in range(2):
        net.zero_grad()
        torch.manual_seed(0)
        model(torch.randn(5, 4).double()).square().mean().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def test_a_tensor_from_inside_of_a_node_that_is_kept_cuts_it_and_is_told_once() -> None:
    whole = coded(2, torch.detach)
    with pytest.warns(KeptValueWarning, match=r"nodes '2', '4'.*keep tensor.detach\(\)") as told:
        cut = coded(2, lambda output: output)
    assert len([each for each in told if each.category is KeptValueWarning]) == 1
    assert not torch.allclose(cut["0.weight"], whole["0.weight"], rtol=1e-3)


@pytest.mark.parametrize(("hooked", "kept"), KEEPS.values(), ids=KEEPS)
def test_what_cuts_no_node_is_told_nothing_and_changes_nothing(hooked: int, kept: Any) -> None:
    found, plain = coded(hooked, kept), coded(0, lambda output: None)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


class Equilibrium(nn.Module):
    """A fixed point whose gradient a hook finds by differentiating a step that it has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        with torch.no_grad():
            self.inner.weight.mul_(0.4)

    def forward(self, x: Tensor) -> Tensor:
        step = lambda z: torch.tanh(self.inner(z) + self.outer(x))  # noqa: E731
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(60):
                z = step(z)
        z = step(z)
        start = z.detach().requires_grad_()
        kept = step(start)

        def implicit(gradient: Tensor) -> Tensor:
            found = gradient
            for _ in range(60):
                found = torch.autograd.grad(kept, start, found, retain_graph=True)[0] + gradient
            return found

        if z.requires_grad:
            z.register_hook(implicit)
        return z


def test_a_hook_that_differentiates_what_forward_has_kept_means_just_that() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), Equilibrium(), nn.Linear(4, 3)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    net(x).square().mean().backward()
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    model = attached(net, torch2ebm.ZeroDivergence(), nodes=["0", "1", "2"])
    for _ in range(3):
        net.zero_grad()
        model(x).square().mean().backward()
        found = [p.grad for p in net.parameters() if p.grad is not None]
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(found, expected, strict=True))
