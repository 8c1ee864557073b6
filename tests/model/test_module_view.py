"""A converted model is its module in all that is read, written and deleted on it. Plain torch is the oracle."""

import copy
import functools
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import attached, local_gradients, relative_error, same
from oracles.graphs import Gradients, strict
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import (
    ConfigurationError,
    ModuleChangedError,
    NameCollisionWarning,
    NoStateError,
    NotCapturedError,
    UnsupportedError,
)

EXACT = 1e-12
BATCH, FEATURES, WIDE, CLASSES = 5, 4, 6, 3
CODING = torch2ebm.PredictiveCoding(steps=5, lr=0.1)
# All but predictive coding have autograd's gradients.
ALGORITHMS: dict[str, torch2ebm.Algorithm] = {
    "Backprop": torch2ebm.Backprop(),
    "ZeroDivergence": torch2ebm.ZeroDivergence(),
    "FixedPrediction": torch2ebm.FixedPrediction(steps=6, lr=1.0),
    "PredictiveCoding": CODING,
}
EVERY_KIND: dict[str, torch2ebm.Algorithm] = {
    **ALGORITHMS,
    "ErrorDescent": torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent(3)),
    "Recorded": torch2ebm.PredictiveCoding(steps=3, compile=True),
    "Incremental": torch2ebm.IncrementalPredictiveCoding(steps=7, lr=0.05),
    "EquilibriumPropagation": torch2ebm.EquilibriumPropagation(torch2ebm.Symmetric(0.1), 30, 10, feedback=0.1),
    "ContrastiveHebbian": torch2ebm.ContrastiveHebbian(0.3, free_steps=30, clamped_steps=30),
    "CoupledLearning": torch2ebm.CoupledLearning(0.25, free_steps=30, clamped_steps=10, feedback=0.1),
    "RecurrentBackprop": torch2ebm.RecurrentBackprop(torch2ebm.Neumann(10), free_steps=30, feedback=0.1),
    "ProximalInferenceLearning": torch2ebm.ProximalInferenceLearning(alpha=0.1, steps=5),
    "ImplicitSGD": torch2ebm.ImplicitSGD(alpha=0.1),
}
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
names_meet = pytest.mark.filterwarnings("ignore::torch2ebm.errors.NameCollisionWarning")


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = normal(BATCH, FEATURES)
LABELS = torch.arange(BATCH) % CLASSES


def loss_of(output: Tensor) -> Tensor:
    return F.cross_entropy(output, LABELS)


def loss_sum(output: Tensor) -> Tensor:
    return F.cross_entropy(output, LABELS, reduction="sum")


class Net(nn.Module):
    """One hidden layer, whose forward reads all that a module can have."""

    gain = 1.0
    saved: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, WIDE), nn.Linear(WIDE, CLASSES)
        self.register_buffer("mask", torch.ones(WIDE))
        self.register_buffer("bonus", torch.full((WIDE,), 0.5), persistent=False)
        self.tau, self.shift, self.activation = 1.0, None, torch.tanh
        self.scales, self.options = [1.0, 0.5], {"slope": 1.0}
        self.offset, self.config = torch.zeros(WIDE, dtype=torch.float64), SimpleNamespace(weight=1.0)

    @property
    def temperature(self) -> float:
        return self.tau

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.tau = value

    def encode(self, x: Tensor) -> Tensor:
        return self.body(x)

    def hidden(self, x: Tensor) -> Tensor:
        return self.after(self.encode(x))

    def after(self, h: Tensor) -> Tensor:
        if hasattr(self, "extra"):
            h = h * self.extra
        h = h * self.mask / self.tau * self.gain * self.options["slope"] * self.config.weight
        for scale in self.scales:
            h = h * scale
        if self.shift is not None:
            h = h + self.shift
        if getattr(self, "doubled", False):
            h = 2 * h
        if hasattr(self, "bonus"):
            h = h + self.bonus
        return self.activation(h + self.offset)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))


Chain = dict[str, Callable[[Tensor], Tensor]]  # a function for each value node, by the beginning of its parameters


def hidden_and_head(net: Any) -> Chain:
    return {"body": net.hidden, "head": net.head}


def autograd(twin: nn.Module, x: Tensor = X) -> Gradients:
    """Of the module itself: a copy would not have what a patched forward refers to."""
    parameters = {name: parameter for name, parameter in twin.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss_of(twin(x)), list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def expected(algorithm: torch2ebm.Algorithm, twin: nn.Module, chain: Chain, x: Tensor = X) -> Gradients:
    """Autograd's gradients; for predictive coding those of the chain, written out in ``oracles``."""
    if algorithm is not CODING:
        return autograd(twin, x)
    trained = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    names = [[name for name in trained if name.startswith(layer)] for layer in chain]
    parameters = [[trained[name] for name in layer] for layer in names]
    state = strict(list(chain.values()), parameters, x, loss_sum, CODING.solver.steps, CODING.solver.lr)
    found = [gradient / BATCH for layer in state.gradients for gradient in layer]
    return dict(zip([name for layer in names for name in layer], found, strict=True))


def assert_learns_as(model: nn.Module, twin: nn.Module, algorithm: torch2ebm.Algorithm, chain: Chain) -> None:
    with torch.no_grad():
        assert torch.equal(model(X), twin(X))
    assert torch.equal(model(X).detach(), twin(X).detach())
    ours = local_gradients(model, (X,), loss_of)
    assert relative_error(ours, expected(algorithm, twin, chain)) <= EXACT
    if algorithm is CODING:
        exact = {name: g for name, g in autograd(twin).items() if name in ours and "head" not in name}
        assert not exact or relative_error({name: ours[name] for name in exact}, exact) > 1e-3  # it has relaxed
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in twin.named_parameters()]
    assert same(dict(model.state_dict()), dict(twin.state_dict()))


# ---- what forward reads is written where it is read


def set_to(name: str, value: Any) -> Callable[[Any], None]:
    return lambda net: setattr(net, name, value)


def delete(name: str) -> Callable[[Any], None]:
    return lambda net: delattr(net, name)


def in_turn(*changes: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        for each in changes:
            each(net)

    return change


def scale(net: Any) -> None:
    net.tau *= 0.5


def new_encode(net: Any) -> None:
    net.encode = lambda x: net.body(x) * 2


def bound_encode(net: Any) -> None:
    net.encode = MethodType(lambda self, x: self.body(x) * self.tau * 3, net)


HALF = torch.arange(WIDE, dtype=torch.float64) / WIDE
CHANGES: dict[str, Callable[[Any], Any]] = {
    "a number": set_to("tau", 0.5),
    "a number in place": scale,
    "a property with a setter": set_to("temperature", 0.5),
    "a class attribute": set_to("gain", 0.5),
    "a class attribute again": in_turn(set_to("gain", 0.5), delete("gain")),
    "a flag that was not there": set_to("doubled", True),
    "a flag that is gone again": in_turn(set_to("doubled", True), delete("doubled")),
    "None to a number": set_to("shift", 0.25),
    "a number and back to None": in_turn(set_to("shift", 0.25), set_to("shift", None)),
    "None to a tensor": set_to("shift", HALF),
    "a list's append": lambda net: net.scales.append(3.0),
    "a list's item": lambda net: net.scales.__setitem__(0, 0.25),
    "another list": set_to("scales", [2.0]),
    "a dict's item": lambda net: net.options.update(slope=2.0),
    "another dict": set_to("options", {"slope": 0.5}),
    "another object": set_to("config", SimpleNamespace(weight=0.25)),
    "a function": set_to("activation", torch.sigmoid),
    "a tensor": set_to("offset", HALF),
    "a buffer": set_to("mask", HALF),
    "a buffer's contents": lambda net: net.mask.mul_(0.5),
    "a buffer registered again": lambda net: net.register_buffer("mask", HALF),
    "a new buffer": lambda net: net.register_buffer("extra", HALF),
    "a new buffer that is not saved": lambda net: net.register_buffer("extra", HALF, persistent=False),
    "a new buffer by torch.nn.Buffer": lambda net: setattr(net, "extra", nn.Buffer(HALF)),
    "a buffer deleted": delete("bonus"),
    "a buffer deleted and another": in_turn(delete("bonus"), lambda net: net.register_buffer("bonus", HALF)),
    "a method that forward calls": new_encode,
    "a method bound to the model": bound_encode,
    "a frozen layer": lambda net: net.body.requires_grad_(False),
    "all frozen but one": lambda net: net.requires_grad_(False).head.requires_grad_(True),
    "a parameter's data": lambda net: net.body.weight.data.mul_(0.5),
    "a parameter's grad flag": lambda net: setattr(net.body.bias, "requires_grad", False),
}


@every_algorithm
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_written_on_the_model_is_what_forward_reads(
    change: Callable[[Any], Any], algorithm: torch2ebm.Algorithm
) -> None:
    """After a first step, which has captured what was there before."""
    net, twin = seeded(Net), seeded(Net)
    model = attached(net, algorithm)
    assert_learns_as(model, twin, algorithm, hidden_and_head(twin))
    change(model)
    change(twin)
    assert_learns_as(model, twin, algorithm, hidden_and_head(twin))


def test_a_change_makes_a_difference() -> None:
    """The negative twin of the table: nearly all of it would pass if both sides ignored the change."""
    silent = {"a class attribute again", "a flag that is gone again", "a number and back to None", "all frozen but one"}
    silent |= {"a frozen layer", "a parameter's grad flag"}
    for name, change in CHANGES.items():
        net = seeded(Net)
        before = net(X)
        change(net)
        assert torch.equal(net(X), before) is (name in silent), name


VALUES = {
    "number": 0.5,
    "tensor": torch.zeros(2),
    "list": [1],
    "function": torch.relu,
    "parameter": nn.Parameter(torch.zeros(2)),
    "module": nn.Linear(2, 2),
    "buffer": nn.Buffer(torch.zeros(2)),
    "class": dict,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("name", ["fresh", "_fresh", "__fresh", "saved"])
def test_an_attribute_lives_on_the_module_alone(name: str, value: Any) -> None:
    net = seeded(Net)
    model = torch2ebm.convert(net)
    known = hasattr(net, name)
    if known and isinstance(value, (nn.Parameter, nn.Buffer, nn.Module)):
        return  # torch hides these behind an attribute of the class
    assert hasattr(model, name) is known and getattr(model, name, "nothing") == getattr(net, name, "nothing")
    setattr(model, name, value)
    assert getattr(net, name) is value and getattr(model, name) is value
    assert name in dir(model) and name not in vars(model)
    delattr(net, name)
    assert hasattr(model, name) is known
    setattr(net, name, value)
    assert getattr(model, name) is value
    delattr(model, name)
    assert hasattr(net, name) is known and hasattr(model, name) is known
    if not known:
        for owner in (net, model):
            with pytest.raises(AttributeError, match=name):
                delattr(owner, name)
            with pytest.raises(AttributeError, match=name):
                getattr(owner, name)


def test_what_the_module_refuses_is_refused_in_its_words() -> None:
    net = seeded(Net)
    model = torch2ebm.convert(net)
    attempts: list[Callable[[Any], Any]] = [
        set_to("body", 3),
        lambda module: setattr(module.body, "weight", torch.zeros(2)),
        lambda module: module.register_buffer("body", None),
        lambda module: module.add_module("", nn.Linear(1, 1)),
        lambda module: module.register_parameter("tau", None),
    ]
    for attempt in attempts:
        with pytest.raises((TypeError, KeyError)) as plain:
            attempt(net)
        with pytest.raises(type(plain.value)) as ours:
            attempt(model)
        assert str(ours.value) == str(plain.value)


def test_dir_has_the_names_of_both() -> None:
    net = seeded(Net)
    model = torch2ebm.convert(net)
    assert set(dir(net)) <= set(dir(model))
    assert {"graph", "state", "torch2ebm", "tau", "body", "mask", "encode", "temperature"} <= set(dir(model))


def test_methods_and_class_attributes_are_the_modules() -> None:
    net = seeded(Net)
    model = torch2ebm.convert(net)
    assert inspect.unwrap(model.encode) == net.encode and inspect.signature(model.encode) == inspect.signature(
        net.encode
    )
    assert torch.equal(model.encode(X), net.body(X))
    assert model.gain == Net.gain and model.temperature == net.tau


# ---- layers and parameters


def pruned(net: Any) -> None:
    del net.body
    net.body = seeded(lambda: nn.Linear(FEATURES, WIDE), seed=5)


def new_head(net: Any) -> None:
    net.head = seeded(lambda: nn.Linear(WIDE, CLASSES), seed=5)


def added(net: Any) -> None:
    net.add_module("head", seeded(lambda: nn.Linear(WIDE, CLASSES, bias=False), seed=5))


def new_extra(net: Any) -> None:
    net.extra = nn.Parameter(HALF)


def layers_of(net: Any) -> Chain:
    if not hasattr(net, "extra"):
        return hidden_and_head(net)
    return {"body": net.encode, "extra": net.after, "head": net.head}


LAYERS: dict[str, Callable[[Any], Any]] = {
    "a layer": new_head,
    "a layer by setattr": lambda net: setattr(net, "body", seeded(lambda: nn.Linear(FEATURES, WIDE), seed=5)),
    "a layer by add_module": added,
    "a layer by register_module": lambda net: net.register_module("head", seeded(lambda: nn.Linear(WIDE, CLASSES))),
    "a layer by set_submodule": lambda net: net.set_submodule("head", seeded(lambda: nn.Linear(WIDE, CLASSES), 5)),
    "a layer deleted and another": pruned,
    "a parameter": new_extra,
    "a parameter by register_parameter": lambda net: net.register_parameter("extra", nn.Parameter(HALF)),
    "a layer's parameter": lambda net: setattr(net.body, "weight", nn.Parameter(net.body.weight.detach() * 0.5)),
}


@every_algorithm
@pytest.mark.parametrize("change", LAYERS.values(), ids=LAYERS)
def test_layers_that_are_replaced_before_an_algorithm_is_attached_are_the_modules(
    change: Callable[[Any], Any], algorithm: torch2ebm.Algorithm
) -> None:
    net, twin = seeded(Net), seeded(Net)
    model = torch2ebm.convert(net, example_inputs=X)
    change(model)
    change(twin)
    assert_equal_modules(model, twin)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, algorithm)
    assert_learns_as(model, twin, algorithm, layers_of(twin))


def assert_equal_modules(model: nn.Module, twin: nn.Module) -> None:
    assert [name for name, _ in model.named_modules()] == [name for name, _ in twin.named_modules()]
    assert same(dict(model.state_dict()), dict(twin.state_dict()))
    assert torch.equal(model(X), twin(X))


@pytest.mark.parametrize("change", LAYERS.values(), ids=LAYERS)
def test_layers_that_are_replaced_beside_an_optimizer_are_refused_until_it_is_another(
    change: Callable[[Any], Any],
) -> None:
    """It has the parameters from before: they would be trained, and the new ones not."""
    net, twin = seeded(Net), seeded(Net)
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, CODING)
    model(X)
    change(model)
    change(twin)
    with pytest.raises(ModuleChangedError, match="detach"):
        model(X)
    optimizer.detach()
    assert_equal_modules(model, twin)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, CODING)
    assert_learns_as(model, twin, CODING, layers_of(twin))


def test_compare_sees_a_replaced_layer() -> None:
    net, twin = seeded(Net), seeded(Net)
    model = torch2ebm.convert(net, example_inputs=X)
    new_head(model)
    new_head(twin)
    found = torch2ebm.compare(model, F.cross_entropy, (X, LABELS), {"ours": CODING})
    theirs = torch2ebm.compare(twin, F.cross_entropy, (X, LABELS), {"ours": CODING})
    assert found == theirs


# ---- a forward that takes the place of another


def quadrupled(self: Any, x: Tensor) -> Tensor:
    return self.head(torch.tanh(self.body(x) * 4))


def by_a_function(net: Any) -> None:
    net.forward = lambda x: quadrupled(net, x)


def by_a_method(net: Any) -> None:
    net.forward = MethodType(quadrupled, net)


def by_a_method_that_asks_its_class(net: Any) -> None:
    net.activation = lambda h: torch.tanh(4 * h)
    net.forward = MethodType(lambda self, x: type(self).forward(self, x), net)


def by_a_partial(net: Any) -> None:
    net.forward = functools.partial(quadrupled, net)


def by_another_modules(net: Any) -> None:
    net.forward = seeded(Net, seed=3).forward
    net.forward = functools.partial(quadrupled, net)


REPLACED: dict[str, Callable[[Any], Any]] = {
    "a function": by_a_function,
    "a method": by_a_method,
    "a partial": by_a_partial,
    "two in turn": by_another_modules,
}


@every_algorithm
@pytest.mark.parametrize("side", ["model", "module"])
@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_a_forward_in_the_place_of_the_modules_learns_by_the_algorithm(
    replace: Callable[[Any], Any], side: str, algorithm: torch2ebm.Algorithm
) -> None:
    net, twin = seeded(Net), seeded(Net)
    model = attached(net, algorithm)
    assert_learns_as(model, twin, algorithm, hidden_and_head(twin))
    replace(model if side == "model" else net)
    replace(twin)
    chain: Chain = {"body": lambda x: torch.tanh(twin.body(x) * 4), "head": twin.head}
    assert_learns_as(model, twin, algorithm, chain)
    del (model if side == "model" else net).forward
    twin = seeded(Net)
    assert_learns_as(model, twin, algorithm, hidden_and_head(twin))


def test_a_replaced_forward_may_ask_for_the_class_of_its_self() -> None:
    net, twin = seeded(Net), seeded(Net)
    model = attached(net, torch2ebm.ZeroDivergence())
    by_a_method_that_asks_its_class(model)
    by_a_method_that_asks_its_class(twin)
    assert_learns_as(model, twin, torch2ebm.ZeroDivergence(), {})


def test_a_replaced_forward_shows_its_own_arguments() -> None:
    model = torch2ebm.convert(seeded(Net))
    model.forward = lambda image, *, scale=1.0: scale * model.head(torch.tanh(model.body(image)))
    assert list(inspect.signature(model.forward).parameters) == ["image", "scale"]
    assert torch.equal(model(image=X, scale=2.0), 2 * model.head(torch.tanh(model.body(X))))
    del model.forward
    assert list(inspect.signature(model.forward).parameters) == ["x"]


class Around:
    """A callable object that holds what it wraps."""

    def __init__(self, wrapped: Callable[..., Tensor]) -> None:
        self.wrapped = wrapped

    def __call__(self, x: Tensor) -> Tensor:
        return self.wrapped(x) * 2

    def run(self, x: Tensor) -> Tensor:
        return self.wrapped(x) * 2


def in_a_closure(net: Any) -> Callable[..., Any]:
    before = net.forward
    return lambda x: before(x) * 2


def in_a_default(net: Any) -> Callable[..., Any]:
    def wrapper(x: Tensor, before: Callable[..., Tensor] = net.forward) -> Tensor:
        return before(x) * 2

    return wrapper


def in_a_keyword_default(net: Any) -> Callable[..., Any]:
    def wrapper(x: Tensor, *, before: Callable[..., Tensor] = net.forward) -> Tensor:
        return before(x) * 2

    return wrapper


def by_wraps(net: Any) -> Callable[..., Any]:
    before = net.forward

    @functools.wraps(before)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return before(*args, **kwargs) * 2

    return wrapper


def bound_again(net: Any) -> Callable[..., Any]:
    function = net.forward.__func__
    return MethodType(lambda self, x: function(self, x) * 2, net)


def in_a_global(net: Any) -> Callable[..., Any]:
    space: dict[str, Any] = {"before": net.forward}
    exec("def wrapper(x):\n    return before(x) * 2", space)
    return space["wrapper"]


WRAPPERS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "in a closure": in_a_closure,
    "in a default": in_a_default,
    "in a keyword's default": in_a_keyword_default,
    "by functools.wraps": by_wraps,
    "bound again": bound_again,
    "in a global": in_a_global,
    "in an object": lambda net: Around(net.forward),
    "in an object's method": lambda net: Around(net.forward).run,
    "in a partial": lambda net: functools.partial(lambda before, x: before(x) * 2, net.forward),
    "three deep": lambda net: functools.partial(lambda before, x: before(x), functools.partial(in_a_closure(net))),
}


@every_algorithm
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_forward_that_calls_the_one_before_stays_around_the_model(
    wrap: Callable[[Any], Callable[..., Any]], algorithm: torch2ebm.Algorithm
) -> None:
    """As accelerate's for mixed precision. What it does to the output is no part of the graph."""
    net, twin = seeded(Net), seeded(Net)
    model = attached(net, algorithm)
    model.forward = wrap(model)
    assert "forward" not in vars(net)
    doubled: Chain = {"body": twin.hidden, "head": lambda h: 2 * twin.head(h)}
    twin.forward = in_a_closure(twin)
    assert_learns_as(model, twin, algorithm, doubled)
    by_a_function(model)  # takes the place of the module's, and of the wrapper
    chain: Chain = {"body": lambda x: torch.tanh(twin.body(x) * 4), "head": twin.head}
    by_a_function(twin)
    assert_learns_as(model, twin, algorithm, chain)


# ---- hooks


class Recorder:
    """A hook that keeps what it was called with, and doubles the output."""

    def __init__(self, doubles: bool = True) -> None:
        self.calls: list[tuple[nn.Module, int]] = []
        self.doubles = doubles

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        self.calls.append((module, len(args)))
        return 2 * output if self.doubles else None


@every_algorithm
def test_a_hook_on_the_model_runs_once_a_call_and_gets_the_model(algorithm: torch2ebm.Algorithm) -> None:
    net, twin, hook = seeded(Net), seeded(Net), Recorder()
    model = attached(net, algorithm)
    model(X)  # the graph is cut: nothing runs the hook but calls
    handle = model.register_forward_hook(hook)
    twin.register_forward_hook(Recorder())
    model(X)
    with torch.no_grad():
        model(X)
    assert hook.calls == [(model, 1), (model, 1)] and not net._forward_hooks
    assert_learns_as(model, twin, algorithm, {"body": twin.hidden, "head": lambda h: 2 * twin.head(h)})
    handle.remove()
    twin = seeded(Net)
    assert_learns_as(model, twin, algorithm, hidden_and_head(twin))


@every_algorithm
def test_a_hook_before_the_call_changes_what_the_module_is_called_with(algorithm: torch2ebm.Algorithm) -> None:
    net, twin = seeded(Net), seeded(Net)
    model = attached(net, algorithm)
    for each in (model, twin):
        each.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assert_learns_as(model, twin, algorithm, {"body": lambda x: twin.hidden(2 * x), "head": twin.head})


def test_hooks_of_the_backward_and_with_keywords_run_as_on_the_module() -> None:
    seen: dict[str, list[str]] = {"ours": [], "theirs": []}
    model, twin = attached(seeded(Net), torch2ebm.ZeroDivergence()), seeded(Net)
    model(X)
    for each, said in ((model, seen["ours"]), (twin, seen["theirs"])):
        each.register_full_backward_hook(lambda *given, said=said: said.append("backward"))
        each.register_full_backward_pre_hook(lambda *given, said=said: said.append("before the backward"))
        each.register_forward_hook(
            lambda module, args, kwargs, output, said=said: said.append(str(sorted(kwargs))), with_kwargs=True
        )
        loss_of(each(X.clone().requires_grad_())).backward()
    assert seen["ours"] == seen["theirs"] and len(seen["ours"]) == 3


@every_algorithm
def test_a_hook_on_the_module_or_a_layer_runs_once_a_call_and_is_followed(algorithm: torch2ebm.Algorithm) -> None:
    net, twin, on_module, on_layer = seeded(Net), seeded(Net), Recorder(), Recorder()
    model = attached(net, algorithm)
    model(X)
    net.register_forward_hook(on_module)
    handle = net.body.register_forward_hook(on_layer)
    for each in (twin, twin.body):
        each.register_forward_hook(Recorder())
    for _ in range(3):  # the first with the hooks is captured, the others are known
        assert torch.equal(model(X), twin(X))
    with torch.no_grad():
        model(X)
    assert on_module.calls == [(net, 1)] * 4 and on_layer.calls == [(net.body, 1)] * 4
    doubled: Chain = {"body": twin.hidden, "head": lambda h: 2 * twin.head(h)}  # twin.body has its own hook
    assert_learns_as(model, twin, algorithm, doubled)
    handle.remove()
    twin.body._forward_hooks.clear()
    assert_learns_as(model, twin, algorithm, doubled)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_the_hooks_as_a_modules_do(copied: Callable[[Any], Any]) -> None:
    model, twin = attached(seeded(Net), torch2ebm.ZeroDivergence()), seeded(Net)
    for each in (model, twin):
        each.register_forward_hook(Recorder())
    ours, theirs = copied(model), copied(twin)
    assert torch.equal(ours(X), theirs(X)) and torch.equal(theirs(X), 2 * theirs.head(theirs.hidden(X)))


def test_hooks_of_the_state_dict_run_whichever_it_is_registered_on() -> None:
    for on in (lambda model, net: model, lambda model, net: net):
        net = seeded(Net)
        model = torch2ebm.convert(net)
        on(model, net).register_state_dict_post_hook(
            lambda module, state, prefix, metadata: state.update(mark=torch.ones(1))
        )
        on(model, net).register_load_state_dict_post_hook(lambda module, keys: keys.unexpected_keys.clear())
        assert "mark" in model.state_dict() and "mark" in net.state_dict()
        assert "mark" in nn.Sequential(model).state_dict()
        model.load_state_dict(model.state_dict())


# ---- what the module's class has of its own


class Overriding(Net):
    """Much of nn.Module, done otherwise."""

    def train(self, mode: bool = True) -> "Overriding":
        super().train(mode)
        self.body.eval()
        return self

    def parameters(self, recurse: bool = True) -> Any:
        return iter([self.head.weight])

    def to(self, *args: Any, **kwargs: Any) -> "Overriding":
        self.moved = args
        return super().to(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.zeroed = True
        super().zero_grad(set_to_none)

    def get_extra_state(self) -> dict[str, float]:
        return {"tau": self.tau}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.tau = state["tau"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}old" in state_dict:
            state_dict[f"{prefix}mask"] = state_dict.pop(f"{prefix}old")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_what_the_module_overrides_is_used_and_gives_the_model_back() -> None:
    net = seeded(Overriding)
    model = torch2ebm.convert(net)
    assert model.train() is model and not net.body.training and net.training
    assert list(model.parameters()) == [net.head.weight]
    assert model.to(torch.float32) is model and net.moved == (torch.float32,)
    assert model.double() is model and net.head.weight.dtype == torch.float64
    model.zero_grad()
    assert net.zeroed
    assert model.eval() is model and model.requires_grad_(False) is model and model.apply(lambda each: None) is model


def test_what_is_put_in_a_methods_place_is_used() -> None:
    """On the object, before and after it was converted."""
    net = seeded(Net)
    net.train = MethodType(_frozen, net)
    model = torch2ebm.convert(net)
    model.train()
    assert not net.body.training
    model.buffers = lambda recurse=True: iter([])
    assert list(model.buffers()) == list(net.buffers()) == []
    del model.buffers
    assert len(list(model.buffers())) == 2


def _frozen(self: nn.Module, mode: bool = True) -> nn.Module:
    nn.Module.train(self, mode)
    self.body.eval()
    return self


@pytest.mark.parametrize("inside", [lambda module: module, nn.Sequential], ids=["itself", "in another module"])
def test_state_that_the_module_saves_in_its_own_way_is_saved_and_loaded(inside: Callable[[Any], nn.Module]) -> None:
    net = seeded(Overriding)
    model = torch2ebm.convert(net)
    model.tau = 0.25
    saved = inside(model).state_dict()
    assert list(saved) == list(inside(net).state_dict())
    twin, other = seeded(Overriding), torch2ebm.convert(seeded(Overriding))
    name = next(name for name in saved if name.endswith("mask"))
    saved[name.replace("mask", "old")] = 3 * saved.pop(name)
    for each in (twin, other):
        inside(each).load_state_dict(copy.copy(saved))
        assert each.tau == 0.25 and torch.equal(each.mask, 3 * torch.ones(WIDE, dtype=torch.float64))


def test_a_container_is_a_container() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(FEATURES, WIDE), nn.Tanh(), nn.Linear(WIDE, CLASSES))

    net, twin = seeded(make), seeded(make)
    model = torch2ebm.convert(net)
    assert len(model) == 3 and bool(model) and model[0] is net[0] and model[-1] is net[2]
    assert list(model) == list(net) and net[1] in model and list(reversed(list(model))) == [*net][::-1]
    for each in (model, twin):
        each[2] = seeded(lambda: nn.Linear(WIDE, WIDE), seed=5)
        each.append(seeded(lambda: nn.Linear(WIDE, CLASSES), seed=6))
        each.insert(3, nn.Tanh())
        del each[1]
    with_more = model
    with_more += nn.Sequential(nn.Identity())
    assert with_more is model
    twin += nn.Sequential(nn.Identity())
    assert_equal_modules(model, twin)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, torch2ebm.ZeroDivergence())
    assert_learns_as(model, twin, torch2ebm.ZeroDivergence(), {})
    with pytest.raises(TypeError, match="len"):
        len(torch2ebm.convert(seeded(Net)))


class Delegating(nn.Module):
    """A wrapper that answers for what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner.hidden(x))


class Attentive(Delegating):
    """And one that writes through as well."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "tau":
            setattr(self.inner, name, value)
        else:
            super().__setattr__(name, value)


@every_algorithm
def test_modules_that_answer_for_others_do_so_through_the_model(algorithm: torch2ebm.Algorithm) -> None:
    net, twin = seeded(Attentive), seeded(Attentive)
    model = attached(net, algorithm)
    assert model.tau == 1.0 and model.body is net.inner.body and not hasattr(model, "nothing")
    for each in (model, twin):
        each(X)
        each.tau = 0.5
    assert net.inner.tau == model.tau == 0.5 and "tau" not in vars(net)
    with torch.no_grad():
        assert torch.equal(model(X), twin(X))
    if algorithm is not CODING:
        assert relative_error(local_gradients(model, (X,), loss_of), autograd(twin)) <= EXACT


def test_a_wrapper_whose_inner_module_has_one_of_our_names_meets_it() -> None:
    net = seeded(Delegating)
    net.inner.state = "the module's"
    with pytest.warns(NameCollisionWarning, match=r"model\.state is the module's"):
        model = torch2ebm.convert(net)
    assert model.state == "the module's"


class Answering(Net):
    """Has every attribute that one asks for, once it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made = True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "made" not in vars(self) or name.startswith("_") or name in ("doubled", "extra"):
                raise
            return f"no {name}"


def test_a_module_that_answers_to_every_name_leaves_ours() -> None:
    model = attached(seeded(Answering), CODING)
    loss_of(model(X)).backward()
    assert list(model.nodes) == ["body", "head"] and model.anything == "no anything"


def test_data_parallel_on_several_devices_is_refused() -> None:
    """It would copy the model's dictionary, and all replicas would be the first."""
    with pytest.raises(UnsupportedError, match="DistributedDataParallel"):
        torch2ebm.convert(seeded(Net))._replicate_for_data_parallel()


# ---- names that are torch2ebm's too

PUBLIC = (
    *("graph", "nodes", "state", "summary", "draw", "feedforward", "algorithm"),
    *("attached", "attach", "detach", "captured_by"),
)
OTHER_NAMES = (
    *("run", "shards", "forwards", "replicas", "captures", "synchronised", "trained_parameters", "granularity"),
    *("module", "answer", "capture", "trace", "_state", "_captures", "_original", "_algorithm", "accepts_loss_kwargs"),
)
ODD_NAMES = ("class", "None", "lambda", "import", "a b", "1", "é", 'quo"te', "back\\slash", "self", "torch")
RESERVED = ("torch2ebm", "accepts_loss_kwargs")  # of the model itself, whatever the module has
NAMES = (*PUBLIC, "torch2ebm", *OTHER_NAMES, *ODD_NAMES)


class Named(nn.Module):
    """Submodules under the names that are asked for, between two of plain ones."""

    def __init__(self, names: tuple[str, ...], within: str = "itself") -> None:
        super().__init__()
        self.names, self.within = names, within
        self.first = nn.Linear(FEATURES, WIDE)
        owner: nn.Module = self
        if within == "a dict":
            owner = self.held = nn.ModuleDict()
        for name in names:
            owner.add_module(name, nn.Linear(WIDE, WIDE))
        self.last = nn.Linear(WIDE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        owner = self._modules if self.within == "itself" else self.held
        for name in self.names:
            h = torch.tanh(owner[name](h))
        return self.last(h)


def step(model: nn.Module, algorithm: torch2ebm.Algorithm) -> None:
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, algorithm)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model(X)).backward()
        optimizer.step()
    optimizer.detach()


def in_order(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def groups(within: str, kind: str) -> list[tuple[str, ...]]:
    """Names, three at a time, so that no node is far from the output; few where a compiler takes seconds for each."""
    if kind == "Recorded":
        return [("graph", "class", "torch2ebm")]
    names = NAMES if within == "itself" else ("graph", "state", "run", *ODD_NAMES)
    return [names[start : start + 3] for start in range(0, len(names), 3)]


@functools.cache
def trained_twin(kind: str, count: int, within: str) -> list[Tensor]:
    twin = seeded(lambda: Named(tuple(f"plain{i}" for i in range(count)), within))
    step(torch2ebm.convert(twin), EVERY_KIND[kind])
    return in_order(twin)


@names_meet
@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NotSettledWarning")
@pytest.mark.parametrize("within", ["itself", "a dict"])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_submodule_of_any_name_trains_as_one_of_a_plain_name(kind: str, within: str) -> None:
    for names in groups(within, kind):
        net = seeded(lambda names=names: Named(names, within))
        before = in_order(net)
        step(torch2ebm.convert(net), EVERY_KIND[kind])
        assert same(in_order(net), trained_twin(kind, len(names), within)), names
        assert not torch.equal(in_order(net)[-1], before[-1]), names


def test_every_kind_of_algorithm_is_among_these() -> None:
    public = {getattr(torch2ebm, name) for name in torch2ebm.__all__}
    kinds = {each for each in public if isinstance(each, type) and issubclass(each, torch2ebm.Algorithm)}
    assert {type(algorithm) for algorithm in EVERY_KIND.values()} == kinds - {torch2ebm.Algorithm}


@names_meet
@pytest.mark.parametrize("name", NAMES)
def test_a_submodule_of_any_name_stays_reachable_saved_and_copied(name: str) -> None:
    net = seeded(lambda: Named((name,)))
    layer = net._modules[name]
    model = attached(net, torch2ebm.ZeroDivergence())
    reference = autograd(net)
    assert relative_error(local_gradients(model, (X,), loss_of), reference) <= EXACT
    assert name in model.torch2ebm.nodes and model.torch2ebm.module is net
    assert model.get_submodule(name) is layer and dict(model.named_modules())[name] is layer
    assert model.get_parameter(f"{name}.weight") is layer.weight
    if name not in RESERVED:
        assert getattr(model, name) is layer
    assert getattr(model.torch2ebm.module, name) is layer
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = torch2ebm.convert(seeded(lambda: Named((name,)), seed=3))
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(each, torch2ebm.EnergyModel) and torch.equal(each(X).detach(), model(X).detach())
        assert each.get_submodule(name) is not layer
        assert torch.equal(each.get_submodule(name).weight, layer.weight)


class WithState(Net):
    """A recurrent module's idiom: its state is an attribute, which the loop resets."""

    def __init__(self) -> None:
        super().__init__()
        self.state = 1.0
        self.register_buffer("graph", torch.ones(WIDE))
        self.nodes = nn.Parameter(torch.ones(WIDE))

    @property
    def algorithm(self) -> str:
        return "the module's"

    def summary(self) -> str:
        return "the module's"

    def encode(self, x: Tensor) -> Tensor:
        return self.body(x) * self.graph * self.nodes * self.state


def three_nodes(net: Any) -> Chain:
    """Its parameter is a node of its own, between the layers."""
    return {
        "body": lambda x: net.body(x) * net.graph,
        "nodes": lambda h: net.after(h * net.nodes * net.state),
        "head": net.head,
    }


MET = ("algorithm", "graph", "nodes", "state", "summary")


def test_a_collision_is_told_at_convert_with_the_way_to_both() -> None:
    with pytest.warns(NameCollisionWarning) as caught:
        torch2ebm.convert(seeded(WithState))
    (warning,) = caught
    assert warning.filename == __file__
    for name in MET:
        assert f"model.{name} is the module's; torch2ebm's is model.torch2ebm.{name}." in f"{warning.message}"
    assert all(f"model.{name} " not in str(warning.message) for name in set(PUBLIC) - set(MET))


@pytest.mark.parametrize("within", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_collision_is_not_told_again_of_a_copy(within: Callable[[Any], Any]) -> None:
    with pytest.warns(NameCollisionWarning):
        model = torch2ebm.convert(seeded(WithState))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert within(model).state == 1.0
        model.state = 3.0
        assert within(model).state == 3.0


def test_no_collision_is_told_where_there_is_none() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in (Net, Overriding, Answering, lambda: nn.Linear(2, 3), lambda: nn.Sequential(nn.Linear(2, 3))):
            torch2ebm.convert(seeded(make))


@names_meet
@every_algorithm
def test_where_names_meet_the_loop_has_the_modules_and_the_library_its_own(algorithm: torch2ebm.Algorithm) -> None:
    net, twin = seeded(WithState), seeded(WithState)
    model = torch2ebm.convert(net)
    seen: list[str] = []
    optimizer = torch2ebm.EnergyOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.0),
        model,
        algorithm,
        monitor=lambda name, value, step: seen.append(name),
    )
    for each in (model, twin):
        each.state = 0.5
        each.graph = HALF.clone()
        each.nodes.data.mul_(3)
    assert (model.state, model.graph, model.nodes) == (0.5, net.graph, net.nodes)
    assert model.summary() == model.algorithm == "the module's"
    assert_learns_as(model, twin, algorithm, three_nodes(twin))
    optimizer.step()
    ours = model.torch2ebm
    assert ours.algorithm is algorithm and list(ours.nodes) == list(ours.graph.nodes) == ["body", "mul_1", "head"]
    assert seen == list(ours.state.scalars()) and "body" in ours.summary()
    assert optimizer.state_dict()["torch2ebm"]["model"] == "WithState"


def test_our_names_cannot_be_written_where_the_module_has_none() -> None:
    """``model.algorithm = ...`` would be an attribute of the module that nobody reads."""
    net = seeded(Net)
    model = torch2ebm.convert(net)
    for name in PUBLIC:
        with pytest.raises(ConfigurationError, match="EnergyOptimizer") as caught:
            setattr(model, name, torch2ebm.ZeroDivergence())
        assert f"model.{name}" in str(caught.value) and not hasattr(net, name)
    model.torch2ebm.attach(CODING)
    assert model.algorithm is CODING


def test_a_name_that_the_module_has_got_by_itself_is_written_there() -> None:
    net = seeded(Net)
    model = torch2ebm.convert(net)
    net.draw = "before"
    for name in ("draw", "torch2ebm"):
        with pytest.warns(NameCollisionWarning, match=rf"model\.torch2ebm\.(module\.)?{name}"):
            setattr(model, name, "the module's")
        assert getattr(net, name) == "the module's"
    assert model.draw == model.torch2ebm.module.torch2ebm == "the module's"
    delattr(model, "torch2ebm")
    assert not hasattr(net, "torch2ebm") and model.torch2ebm.module is net


def test_a_layer_that_takes_one_of_our_names_later_is_told_then() -> None:
    net = seeded(Net)
    model = torch2ebm.convert(net, example_inputs=X)
    for register in (
        lambda: setattr(model, "graph", nn.Linear(2, 2)),
        lambda: model.add_module("draw", nn.Linear(2, 2)),
        lambda: model.register_parameter("summary", nn.Parameter(torch.zeros(2))),
    ):
        with pytest.warns(NameCollisionWarning) as caught:
            register()
        assert len(caught) == 1
    assert model.graph is net.graph and model.draw is net.draw and model.summary is net.summary
    del model.draw
    assert model.draw.__func__ is torch2ebm.EnergyModel.draw


def test_what_is_not_there_yet_is_not_there() -> None:
    """As of any object: ``hasattr`` and a default, and an error that says what to do."""
    model = attached(seeded(Net), CODING)
    for name, error in {"graph": NotCapturedError, "nodes": NotCapturedError, "state": NoStateError}.items():
        assert not hasattr(model, name) and getattr(model, name, 3) == 3
        with pytest.raises(error, match=f"model.{'state' if name == 'state' else 'graph'}"):
            getattr(model, name)
    loss_of(model(X)).backward()
    assert hasattr(model, "state") and dict(inspect.getmembers(model))["state"] is model.state


# ---- pickles


def test_what_version_0_1_pickled_is_read() -> None:
    net = seeded(Net)
    saved = {"module": net, "granularity": "layer", "algorithm": CODING}
    model = torch2ebm.EnergyModel.__new__(torch2ebm.EnergyModel)
    model.__setstate__(saved)
    twin = seeded(Net)
    assert_learns_as(model, twin, CODING, hidden_and_head(twin))
    assert list(model.nodes) == ["body", "head"] and model.torch2ebm.module is net
    written = model.__getstate__()
    assert {name: written[name] for name in saved} == saved


@dataclass
class Handle:
    model: nn.Module


def test_a_model_that_something_in_its_module_refers_to_is_copied_once() -> None:
    """A method that is bound to the model, in the module's own dictionary."""
    model = torch2ebm.convert(seeded(Net))
    model.encode = MethodType(_body, model)
    model.handle = Handle(model)
    other = copy.deepcopy(model)
    assert other.handle.model is other and other.encode.__self__ is other
    assert torch.equal(other(X), model(X))


def _body(self: Any, x: Tensor) -> Tensor:
    return self.body(x)
