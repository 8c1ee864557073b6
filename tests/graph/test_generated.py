"""Text is generated from a graph and run: whatever a module's parts and arguments are called, it computes the same."""

import builtins
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch2ebm

RUNS = "setattr(__import__('builtins'), 'intruder', True)"  # torch takes no point in a name
NAMES = [
    "class", "None", "lambda", "async", "self", "torch", "forward", "training", "print", "_", "__class__", "",
    "a b", "a-b", "a;b", "a\nb", "a\\", "a#", "{x}", "x\"y", "x'y", "0", "1st", "x" * 300,
    "é", "名", "ﬁ", "K", "\u2028", "\x00",
    RUNS, f"a={RUNS}, b", f'")+{RUNS}+("', f"');{RUNS}#", f"a\n{RUNS}", f"x):\n    {RUNS}\n#",
]  # fmt: skip
X = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4)


class Inner(nn.Module):
    """Takes an argument of any name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, h: Tensor, **named: Tensor) -> Tensor:
        return self.linear(h) + sum(named.values())


class Opaque(Inner):
    """The same, as one operation: it takes gradients inside of forward."""

    def forward(self, h: Tensor, **named: Tensor) -> Tensor:
        weight = self.linear.weight
        (extra,) = torch.autograd.grad(weight.square().sum(), weight, create_graph=True)
        return super().forward(h, **named) + 0.1 * (h @ extra)


class Net(nn.Module):
    """One of its parts is called by a name; ``use`` says how forward reads it."""

    def __init__(self, name: str, part: Any, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.use = nn.Linear(4, 4), nn.Linear(4, 3), use
        if isinstance(part, nn.Parameter):
            self.register_parameter(name, part)
        elif isinstance(part, Tensor):
            self.register_buffer(name, part)
        else:
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(self, self.first(x).tanh()).tanh())


def square() -> Tensor:
    return torch.linspace(-1, 1, 16).reshape(4, 4).sin()


KINDS: dict[str, Callable[[str], nn.Module]] = {
    "module": lambda n: Net(n, nn.Linear(4, 4), lambda net, h: net._modules[n](h)),
    "module inside": lambda n: nn.Sequential(nn.Linear(4, 4), KINDS["module"](n)),
    "module in a dictionary": lambda n: Net("d", nn.ModuleDict({n: nn.Linear(4, 4)}), lambda net, h: net.d[n](h)),
    "parameter": lambda n: Net(n, nn.Parameter(square()), lambda net, h: h @ net._parameters[n]),
    "buffer": lambda n: Net(n, square(), lambda net, h: h @ net._buffers[n]),
    "argument": lambda n: Net("inner", Inner(), lambda net, h: net.inner(h, **{n: h * 2})),
    "argument of an opaque module": lambda n: Net("inner", Opaque(), lambda net, h: net.inner(h, **{n: h * 2})),
    "key": lambda n: Net("inner", nn.Identity(), lambda net, h: {n: h}[n]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_ran() -> Any:
    yield
    assert not hasattr(builtins, "intruder")


def made(kind: str, name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return KINDS[kind](name).double()


def torch_takes(kind: str, name: str) -> bool:
    try:
        made(kind, name)(X)
    except (KeyError, ValueError, AttributeError, TypeError):
        return False
    return True


CASES = [(kind, name) for kind in KINDS for name in NAMES if torch_takes(kind, name)]


def test_torch_takes_nearly_every_name() -> None:
    assert len(CASES) > 0.9 * len(KINDS) * len(NAMES)
    assert {kind for kind, name in CASES if RUNS in name} == set(KINDS)


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.OpaqueModuleWarning")
@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind} {name!r:.24}" for kind, name in CASES])
def test_a_name_is_a_name_and_nothing_else(kind: str, name: str) -> None:
    net = made(kind, name)
    expected = torch.autograd.grad(net(X).square().mean(), list(net.parameters()), allow_unused=True)
    model = torch2ebm.convert(net)
    for algorithm in (torch2ebm.ZeroDivergence(), torch2ebm.PredictiveCoding(steps=2, lr=1e-3)):
        optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
        optimizer.zero_grad()
        model(X).square().mean().backward()
        found = [parameter.grad for parameter in net.parameters()]
        assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in found)
        if isinstance(algorithm, torch2ebm.ZeroDivergence):
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
        optimizer.detach()


def test_an_argument_of_forward_itself_has_any_name() -> None:
    class Open(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, **named: Tensor) -> Tensor:
            return self.last(sum(self.first(value) for value in named.values()).tanh())

    net = Open().double()
    model = torch2ebm.convert(net)
    model.attach(torch2ebm.PredictiveCoding(steps=2))
    for name in {*NAMES} - {"self"}:
        output = model(**{name: X})
        assert torch.equal(output.detach(), net(**{name: X}))
        output.square().mean().backward()
