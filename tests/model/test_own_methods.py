"""``model.loss(x)`` relaxes as ``model(x)`` does; a step on gradients of the module itself is told."""

import inspect
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torch2ebm
from torch2ebm.errors import PlainBackwardWarning

ALGORITHM = torch2ebm.PredictiveCoding(steps=5, lr=0.05)


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.hooked = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, x: Tensor) -> Tensor:
        return functional.mse_loss(self.forward(x), x)

    def loss_by_call(self, x: Tensor) -> Tensor:
        return functional.mse_loss(self(x), x)


def attached(net: Flow) -> tuple[torch2ebm.EnergyModel, torch2ebm.EnergyOptimizer]:
    model = torch2ebm.convert(net)
    return model, torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, ALGORITHM)


def grads(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("method", ["loss", "loss_by_call"])
def test_a_method_of_the_module_relaxes(method: str) -> None:
    net, twin, x = Flow(), Flow(), torch.randn(5, 4)
    net.register_forward_hook(lambda module, args, output: setattr(module, "hooked", module.hooked + 1))
    model, optimizer = attached(net)
    by_hand, other = attached(twin)
    for _ in range(3):
        net.zero_grad()
        twin.zero_grad()
        getattr(model, method)(x).backward()
        functional.mse_loss(by_hand(x), x).backward()
        assert all(map(torch.equal, grads(net), grads(twin)))
        plain = torch.autograd.grad(net.loss(x), list(net.parameters()))
        assert not all(map(torch.equal, grads(net), plain))  # it is no backpropagation
    assert "forward" not in vars(net) and net.hooked == 3
    assert optimizer.model is model and other.model is by_hand


def test_without_an_algorithm_or_gradients_a_method_is_the_module_s() -> None:
    net, x = Flow(), torch.randn(5, 4)
    model = torch2ebm.convert(net)
    assert torch.equal(model.loss(x), net.loss(x))
    kept = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, ALGORITHM)
    with torch.no_grad():
        assert torch.equal(model.loss(x), net.loss(x))
    assert model.loss.__name__ == "loss" and kept.model is model


def test_a_method_that_fails_leaves_the_module_its_forward() -> None:
    net = Flow()
    model, optimizer = attached(net)
    with pytest.raises(torch2ebm.Torch2EBMError):
        model.loss(torch.randn(5, 3))
    assert "forward" not in vars(net) and optimizer.model is model
    model.loss(torch.randn(5, 4)).backward()


def test_a_step_on_gradients_of_the_module_is_told_once() -> None:
    net = Flow()
    _, optimizer = attached(net)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            net.loss(torch.randn(5, 4)).backward()
            optimizer.step()
    (message,) = [str(each.message) for each in told if each.category is PlainBackwardWarning]
    assert "Call model(x)" in message


def test_a_loop_on_the_model_is_told_nothing() -> None:
    net = Flow()
    model, optimizer = attached(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlainBackwardWarning)
        for _ in range(2):
            optimizer.zero_grad()
            functional.mse_loss(model(torch.randn(5, 4)), torch.zeros(5, 4)).backward()
            optimizer.step()


class Coder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def encode(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """The code of ``x``, ``[batch, 4]``."""
        return self(x) * scale


def test_a_method_on_the_model_is_a_bound_method_of_it() -> None:
    net = Coder()
    model = torch2ebm.convert(net)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, ALGORITHM)
    assert inspect.ismethod(model.encode) and model.encode.__self__ is model
    assert (model.encode.__name__, model.encode.__doc__) == (net.encode.__name__, net.encode.__doc__)
    assert model.encode.__qualname__ == net.encode.__qualname__
    assert inspect.signature(model.encode) == inspect.signature(net.encode)
    x = torch.randn(3, 4)
    assert torch.equal(model.encode(x, scale=2.0), net.encode(x, scale=2.0))
    with pytest.raises(TypeError, match="bad"):
        model.encode(x, bad=1)
