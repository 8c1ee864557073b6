"""Where nothing is learned: told in one warning, once a graph, with what it would take."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import attached
from own_extensions import PlainDescent
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import NoSignalWarning

X, Y = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def chain(depth: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), activation())]
        return nn.Sequential(*layers, nn.Linear(8, 3)).double()


def batch(model: nn.Module, loss: Any = F.cross_entropy, dtype: torch.dtype = torch.float64) -> list[str]:
    """What one batch is told."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss(model(X.to(dtype)), Y).backward()
    assert all(each.category is NoSignalWarning and each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


class Skip(nn.Module):
    """The first layer is one edge from the output, and four by the long way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.first(x))
        return self.out(torch.tanh(self.third(torch.tanh(self.second(first)))) + first)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_levels_that_are_not_reached_are_named_with_the_steps_it_takes(steps: int) -> None:
    model = attached(chain(5), torch2ebm.PredictiveCoding(steps, 0.2))
    (message,) = batch(model)
    names = list(model.nodes)[: 5 - steps]
    assert f"no error has reached {', '.join(names)}, whose gradients are exactly zero" in message
    assert "take 5 steps or more" in message and "torch2ebm.diagnose(model, loss_fn, batch)" in message
    assert [name for name, signal in model.state.signal.items() if signal == "not reached"] == names
    assert batch(model) == []  # once a graph
    assert batch(attached(chain(5), torch2ebm.PredictiveCoding(5, 0.2))) == []  # as many as it said are enough


def test_a_short_way_counts() -> None:
    module = Skip().double()
    assert batch(attached(module, torch2ebm.PredictiveCoding(1, 0.2)))[0].count("take 2 steps or more") == 1
    assert batch(attached(Skip().double(), torch2ebm.PredictiveCoding(2, 0.2))) == []


def test_an_error_of_exactly_zero_everywhere_is_told() -> None:
    model = attached(chain(2), torch2ebm.PredictiveCoding(5, 0.2))
    (message,) = batch(model, lambda output, _: (output * 0.0).mean())
    assert "every error is exactly zero" in message and "diagnose" in message
    assert set(model.state.signal.values()) <= {"zero", "not reached"}


@pytest.mark.parametrize("algorithm", [torch2ebm.PredictiveCoding(6, 0.2), torch2ebm.PredictiveCoding()], ids=repr)
def test_parameters_of_units_that_are_all_off_are_named(algorithm: torch2ebm.Algorithm) -> None:
    net = chain(3, nn.ReLU)
    with torch.no_grad():
        net[2].bias.fill_(-100.0)
    (message,) = batch(attached(net, algorithm))
    assert "the gradients of 2.weight, 2.bias are exactly zero" in message
    assert "no error has reached" not in message


class StoredDescent(PlainDescent):
    """Puts values where they come to, which swallows moves below their rounding."""

    def step(self, inference: Any, state: None) -> None:
        for slot, gradient in inference.sweep():
            inference.values[slot] -= self.lr * gradient
            inference.moved.add(slot)


def stored(net: nn.Module, steps: int) -> nn.Module:
    solver = StoredDescent(steps, 0.01)
    return attached(net, torch2ebm.PredictiveCoding(solver=solver, nudging=torch2ebm.OneSided(1.0)))


def test_one_warning_has_all_of_it() -> None:
    """In float32: nodes not reached, and rounding in those that are."""
    model = stored(chain(12).float(), steps=10)
    with pytest.warns(NoSignalWarning) as caught:
        F.cross_entropy(model(X), Y).backward()
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "no error has reached" in message and "rounding" in message and message.endswith("what to take and why.")
    assert {"not reached", "zero", "error"} <= set(model.state.signal.values())


@pytest.mark.parametrize("algorithm", [torch2ebm.PredictiveCoding(20, 0.2), torch2ebm.PredictiveCoding()], ids=repr)
def test_where_all_is_learned_nothing_is_said(algorithm: torch2ebm.Algorithm) -> None:
    model = attached(chain(4), algorithm)
    assert batch(model) == [] and set(model.state.signal.values()) == {"error"}


def test_what_the_loss_does_not_read_is_no_fault() -> None:
    """A second output that the loss leaves out, and a frozen layer."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.tanh(self.body(x))
            return self.one(hidden), self.other(hidden)

    module = Two().double()
    module.body.bias.requires_grad_(False)
    model = attached(module, torch2ebm.PredictiveCoding(5, 0.2))
    assert batch(model, lambda outputs, y: F.cross_entropy(outputs[0], y)) == []


def test_the_summary_has_a_column_after_a_step_and_none_before() -> None:
    model = attached(chain(3), torch2ebm.PredictiveCoding(1, 0.2))
    model(X.double())
    assert "signal" not in model.summary()
    batch(model)
    rows = {line.split()[0]: line for line in model.summary().splitlines() if line}
    assert rows["node"].endswith("signal")
    assert all(rows[name].endswith(signal) for name, signal in model.state.signal.items())


def test_nodes_before_a_rounded_one_whose_errors_are_rounded_away_are_named_too() -> None:
    model = stored(chain(12).float(), steps=20)
    with pytest.warns(NoSignalWarning) as told:
        F.cross_entropy(model(X), Y).backward()
    still = [name for name, signal in model.state.signal.items() if signal == "zero"]
    assert still and len(told) == 1 and "rounding outweighs" in str(told[0].message)
    for name in still:
        assert f" {name}," in str(told[0].message)
    assert batch(stored(chain(12), steps=20)) == []  # who computes in double precision knows why
    assert batch(attached(chain(12).float(), torch2ebm.PredictiveCoding(20, 0.01)), dtype=torch.float32) == []


def stepped(model: nn.Module, optimizer: Any, loss: Any = F.cross_entropy, dtype: torch.dtype = torch.float64) -> str:
    """What one batch and its steps are told, once a graph."""
    said: list[str] = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss(model(X.to(dtype)), Y).backward()
            optimizer.step()
        said += [str(each.message) for each in caught if issubclass(each.category, NoSignalWarning)]
    assert len(said) <= 1
    return "".join(said)


def with_optimizer(net: nn.Module, algorithm: torch2ebm.Algorithm) -> tuple[nn.Module, Any]:
    model = torch2ebm.convert(net)
    rate = 1.0 if isinstance(algorithm, (torch2ebm.ImplicitSGD, torch2ebm.ProximalInferenceLearning)) else 0.01
    return model, torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=rate), model, algorithm)


FEW = [
    (torch2ebm.FixedPrediction(2, 0.5), 4, "ZeroDivergence()"),
    (torch2ebm.FixedPrediction(2, 0.5, method="sweep"), 4, "ZeroDivergence()"),
    (torch2ebm.IncrementalPredictiveCoding(2, 0.2), 5, "PredictiveCoding() with nothing set"),
    (torch2ebm.ProximalInferenceLearning(steps=2), 4, "take 4 steps or more."),
]


@pytest.mark.parametrize(("algorithm", "needed", "cure"), FEW, ids=lambda each: repr(each)[:40])
def test_each_algorithm_that_carries_errors_names_levels_out_of_reach_and_its_cure(
    algorithm: Any, needed: int, cure: str
) -> None:
    message = stepped(*with_optimizer(chain(4), algorithm))
    assert message.startswith(f"{type(algorithm).__name__}: no error has reached 0, ")
    assert f"take {needed} steps or more" in message and cure in message
    assert f"take {needed - 1} steps" not in message
    # as many as it says are enough, and one fewer are not
    assert "no error has reached" not in stepped(*with_optimizer(chain(4), algorithm.with_steps(needed)))
    assert "no error has reached 0," in stepped(*with_optimizer(chain(4), algorithm.with_steps(needed - 1)))


EACH = [
    torch2ebm.FixedPrediction(8, 0.5),
    torch2ebm.IncrementalPredictiveCoding(8, 0.2),
    torch2ebm.ProximalInferenceLearning(),
    torch2ebm.ImplicitSGD(0.1),
]


@pytest.mark.parametrize("algorithm", EACH, ids=lambda each: type(each).__name__)
def test_they_say_nothing_where_all_is_learned(algorithm: torch2ebm.Algorithm) -> None:
    model, optimizer = with_optimizer(chain(3), algorithm)
    assert stepped(model, optimizer) == ""
    assert "not reached" not in model.state.signal.values() and model.state.without_signal == ()


@pytest.mark.parametrize("algorithm", EACH, ids=lambda each: type(each).__name__)
def test_they_tell_a_loss_without_a_slope_and_units_that_are_all_off(algorithm: torch2ebm.Algorithm) -> None:
    flat = stepped(*with_optimizer(chain(2), algorithm), lambda output, _: (output * 0.0).mean())
    assert flat.startswith(type(algorithm).__name__) and "every error is exactly zero" in flat
    net = nn.Sequential(*chain(3, nn.ReLU)[:-1], nn.Linear(8, 3, bias=False)).double()
    with torch.no_grad():
        net[4].bias.fill_(-100.0)
    message = stepped(*with_optimizer(net, algorithm))
    if algorithm in EACH[:2]:  # the others have nothing to make a step of where a layer reads zeros
        assert "the gradients of 4.weight, 4.bias" in message and "are exactly zero" in message
    else:
        assert "every error is exactly zero" in message and "the last layer reads nothing but zeros" in message


@pytest.mark.parametrize("algorithm", [torch2ebm.IncrementalPredictiveCoding(9, 0.005), EACH[2]], ids=repr)
def test_in_single_precision_small_errors_are_a_signal_too(algorithm: Any) -> None:
    assert stepped(*with_optimizer(chain(8).float(), algorithm), dtype=torch.float32) == ""


def test_in_single_precision_the_first_layer_of_inference_learning_has_its_gradient() -> None:
    found = []
    for net in (chain(8).float(), chain(8)):
        model, _ = with_optimizer(net, torch2ebm.ProximalInferenceLearning())
        F.cross_entropy(model(X.to(net[0].weight.dtype)), Y).backward()
        found.append(net[0].weight.grad.double())
    single, double = found
    assert 0 < float((single - double).norm()) < 0.1 * float(double.norm())


def test_noise_is_named_and_what_it_is_sent_to_and_nothing_else() -> None:
    """Against double precision: an error that is named is noise for the most part, and a healthy net has none."""
    torch.manual_seed(0)
    parts = [part for _ in range(6) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *parts, nn.Flatten(), nn.Linear(8 * 36, 3))
    x, found = torch.randn(6, 1, 6, 6), []
    for twin in (copy.deepcopy(net), copy.deepcopy(net).double()):
        model = attached(twin, torch2ebm.PredictiveCoding(40, 0.05, nudging=torch2ebm.OneSided(1e-3)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoSignalWarning)
            F.cross_entropy(model(x.to(twin[0].weight.dtype)), Y).backward()
        found.append(model.state)
    single, double = found
    off = {
        name: float((single.error[name].double() - double.error[name]).norm() / double.error[name].norm())
        for name in single.graph.nodes
    }
    named = set(single.without_signal)
    assert named and all(off[name] > 0.3 for name in named), off
    assert all(off[name] < 1.0 for name in off if name not in named), off
    assert double.without_signal == ()
    assert batch(attached(chain(12).float(), torch2ebm.PredictiveCoding(20, 0.1)), dtype=torch.float32) == []
