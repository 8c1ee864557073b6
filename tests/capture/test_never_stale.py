"""What changes between two calls of a model is followed in the next call: outputs, buffers and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import attached
from test_capture import WIDTH, assert_is_the_module, normal
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, weight_norm

import torch2ebm

GLOBAL = {"scale": 1.0}
SCALE = 1.0


@dataclass
class Config:
    scale: float = 1.0
    activation: str = "tanh"
    inner: dict[str, float] = field(default_factory=lambda: {"scale": 1.0})


class Net(nn.Module):
    """Reads numbers in every way that Python has."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop, self.child = nn.Dropout(0.0), nn.LeakyReLU(0.1)
        self.config, self.scales, self.function = Config(), [1.0, 1.0], torch.sin
        self.register_buffer("shift", torch.zeros(WIDTH))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(self.first(x))) * self.config.scale * self.config.inner["scale"] * self.scales[0]
        h = torch.tanh(h) if self.config.activation == "tanh" else torch.sigmoid(h)
        h = self.child(h * self.factor * GLOBAL["scale"] * SCALE) + self.shift
        h = h + 0.1 * self.child.negative_slope * x  # a child's setting, read by its parent
        if getattr(self, "flagged", False):  # a flag that is added later
            h = h * 3
        return self.last(self.function(h))


def called_twice(change: Callable[[Net], Any]) -> int:
    """The plain module beside it: three calls before the change, and three after; how many sequences there are."""
    module, twin = Net(), Net()
    model = attached(module, torch2ebm.ZeroDivergence())
    for seed in (1, 2, 3):
        assert_is_the_module(model, twin, normal(5, WIDTH, seed=seed))
    torch.manual_seed(7)
    before = copy.deepcopy(twin)(normal(5, WIDTH))
    torch.manual_seed(5)
    change(module)
    torch.manual_seed(5)
    change(twin)
    for seed in (4, 5, 6):
        assert_is_the_module(model, twin, normal(5, WIDTH, seed=seed))
    torch.manual_seed(7)
    assert not torch.equal(twin(normal(5, WIDTH)), before)  # it was a change
    return len(model.torch2ebm.captures.entries)


NUMBERS: dict[str, Callable[[Net], Any]] = {
    "a field of a config object": lambda net: setattr(net.config, "scale", 0.5),
    "another config object": lambda net: setattr(net, "config", Config(scale=2.0)),
    "a key inside of it": lambda net: net.config.inner.update(scale=0.5),
    "an item of a list": lambda net: net.scales.__setitem__(0, 0.5),
    "an attribute of the instance over that of its class": lambda net: setattr(net, "factor", 0.5),
    "a child's setting that its parent reads too": lambda net: setattr(net.child, "negative_slope", 0.5),
    "a setting of a norm": lambda net: setattr(net.norm, "eps", 0.5),
    "the momentum of a norm": lambda net: (setattr(net.norm, "momentum", 0.9), net.shift.add_(1.0)),
    "a buffer's content": lambda net: net.shift.fill_(0.5),
    "a buffer": lambda net: setattr(net, "shift", torch.full((WIDTH,), 0.5, dtype=torch.float64)),
    "a weight's content": lambda net: net.first.weight.data.mul_(2.0),
    "a weight's data": lambda net: setattr(net.first.weight, "data", net.first.weight.data * 2.0),
}
OTHERWISE: dict[str, Callable[[Net], Any]] = {
    "a text that forward branches on": lambda net: setattr(net.config, "activation", "sigmoid"),
    "a flag that was not there": lambda net: setattr(net, "flagged", True),
    "a function in an attribute": lambda net: setattr(net, "function", torch.exp),
    "a patched forward": lambda net: setattr(
        net.first, "forward", MethodType(lambda self, x: F.linear(x, self.weight) * 2, net.first)
    ),
    "a patched forward of the whole": lambda net: setattr(net, "forward", MethodType(_another_forward, net)),
    "a hook added": lambda net: net.first.register_forward_hook(lambda module, args, output: output * 2),
    "a hook before added": lambda net: net.last.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "a backward hook added": lambda net: net.child.register_full_backward_hook(_doubled_and_counted(net)),
    "dropout of probability 0, then .5": lambda net: setattr(net.drop, "p", 0.5),
    "no statistics of the batch": lambda net: (net.norm.eval(), net.norm.running_mean.add_(1.0)),
}


def _another_forward(self: Net, x: Tensor) -> Tensor:
    return self.last(torch.relu(self.first(x)))


def _doubled_and_counted(net: Net) -> Callable[..., Any]:
    net.shift.add_(1.0)
    return lambda module, inputs, outputs: (inputs[0] * 2,)


@pytest.mark.parametrize("change", NUMBERS.values(), ids=NUMBERS)
def test_a_number_or_a_content_that_changes_is_followed_by_the_same_graph(change: Callable[[Net], Any]) -> None:
    assert called_twice(change) == 1


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.OpaqueModuleWarning")
@pytest.mark.parametrize("change", OTHERWISE.values(), ids=OTHERWISE)
def test_another_sequence_of_operations_is_followed_by_another_graph(change: Callable[[Net], Any]) -> None:
    assert called_twice(change) == 2


def test_a_class_attribute_a_global_and_a_dict_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, twin = Net(), Net()
    model = attached(module, torch2ebm.ZeroDivergence())
    assert_is_the_module(model, twin, normal(5, WIDTH))
    for patch in (
        lambda: monkeypatch.setattr(Net, "factor", 0.5),
        lambda: monkeypatch.setitem(globals(), "SCALE", 0.5),
        lambda: monkeypatch.setitem(GLOBAL, "scale", 0.5),
        lambda: monkeypatch.setattr(Config, "scale", 3.0),
    ):
        patch()
        assert_is_the_module(model, twin, normal(5, WIDTH))
    assert len(model.torch2ebm.captures.entries) == 1


def test_an_attribute_set_on_the_model_is_the_module_s() -> None:
    module, twin = Net(), Net()
    model = attached(module, torch2ebm.ZeroDivergence())
    assert_is_the_module(model, twin, normal(5, WIDTH))
    model.flagged = twin.flagged = True
    model.factor = twin.factor = 0.5
    assert_is_the_module(model, twin, normal(5, WIDTH))
    assert module.flagged and module.factor == 0.5


def test_a_hook_that_is_removed_is_gone() -> None:
    module, twin = Net(), Net()
    handles = [net.first.register_forward_hook(lambda _, __, output: output * 2) for net in (module, twin)]
    model = attached(module, torch2ebm.ZeroDivergence())
    assert_is_the_module(model, twin, normal(5, WIDTH))
    for handle in handles:
        handle.remove()
    for _ in range(2):
        assert_is_the_module(model, twin, normal(5, WIDTH))


def test_dropout_draws_one_mask_a_call_after_it_was_switched_on() -> None:
    """The facts of the first run are not for ever: at p = 0 nothing is drawn, at p = .5 inference keeps one mask."""
    module = Net()
    model = attached(module, torch2ebm.PredictiveCoding(6, 1e-3))
    x = normal(5, WIDTH)
    model(x).square().mean().backward()
    module.drop.p = 0.5
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model.zero_grad()
        model(x).square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
        drawn = torch.get_rng_state()
        torch.manual_seed(0)
        module(x)
        assert torch.equal(torch.get_rng_state(), drawn)  # no more than the module's own call
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
    energy = model.state.relaxation.energy
    assert all(later < earlier for earlier, later in pairwise(energy))  # one mask: it descends


# Parametrizations, pruning, weight norms ------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH)).double()


def followed(net: nn.Module, twin: nn.Module, *changes: Callable[[nn.Module], Any], again: bool = False) -> None:
    """Calls between changes; ``again``: where a parameter is another one, the optimizer has to be, too."""
    model = attached(net, torch2ebm.ZeroDivergence())
    for change in (lambda net: None, *changes):
        if again:
            model.detach()
        for each in (net, twin):
            torch.manual_seed(5)
            change(each)
        if again:
            model = attached(net, torch2ebm.ZeroDivergence())
        for _ in range(3):
            assert_is_the_module(model, twin, normal(5, WIDTH))


def test_a_parametrization_added_and_removed_is_followed() -> None:
    followed(
        plain(),
        plain(),
        lambda net: parametrize.register_parametrization(net[0], "weight", Doubled()),
        lambda net: parametrize.remove_parametrizations(net[0], "weight", leave_parametrized=False),
        again=True,
    )


@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm], ids=lambda n: n.__name__
)
def test_a_norm_of_weights_added_and_removed_is_followed(norm: Callable[[nn.Module], nn.Module]) -> None:
    followed(
        plain(),
        plain(),
        lambda net: norm(net[0]),
        lambda net: parametrize.remove_parametrizations(net[0], "weight", leave_parametrized=True),
        again=True,
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_the_old_weight_norm_is_followed() -> None:
    followed(plain(), plain(), lambda net: weight_norm(net[0]), lambda net: remove_weight_norm(net[0]), again=True)


def test_pruning_again_and_again_is_followed() -> None:
    """The first time it puts a parameter of another name in the place of the weight; later it changes a mask."""
    followed(
        plain(),
        plain(),
        lambda net: prune.random_unstructured(net[0], "weight", amount=0.3),
        lambda net: prune.random_unstructured(net[0], "weight", amount=0.3),
        lambda net: prune.remove(net[0], "weight"),
        again=True,
    )


def test_pruning_before_and_further_needs_nothing_attached_anew() -> None:
    net, twin = plain(), plain()
    for each in (net, twin):
        torch.manual_seed(5)
        prune.random_unstructured(each[0], "weight", amount=0.3)
    followed(net, twin, lambda net: prune.random_unstructured(net[0], "weight", amount=0.3))


# Buffers that another run than the first one moves --------------------------------------------------------------------


def test_running_statistics_move_once_when_a_number_changes() -> None:
    module, twin = Net(), Net()
    model = attached(module, torch2ebm.PredictiveCoding(4, 0.1))
    for scale in (1.0, 1.0, 0.5, 0.5, 0.25):
        module.config.scale = twin.config.scale = scale
        model(normal(5, WIDTH)).square().mean().backward()
        twin(normal(5, WIDTH))
        for name, buffer in twin.named_buffers():
            assert torch.equal(module.get_buffer(name), buffer), name


class Averaged(nn.Module):
    """A layer whose buffer takes the mean of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return torch.tanh(h)


def test_a_buffer_that_takes_a_statistic_leaves_the_sequence_of_a_run_as_it_is() -> None:
    model = attached(Averaged().double(), torch2ebm.ZeroDivergence())
    first, *later = [model.torch2ebm.new_call((normal(3, WIDTH),), {}).run for _ in range(4)]
    assert first.records is not None
    assert [(run.records, run.followed) for run in later] == [(None, True)] * 3
