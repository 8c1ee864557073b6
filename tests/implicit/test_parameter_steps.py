"""Implicit SGD comes to rest where batches are larger than a layer's inputs, and says where it does not."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles.implicit_steps import proximal_gradient, proximal_objective
from torch import Tensor, nn

import torch2ebm
from torch2ebm.algorithms import implicit_sgd
from torch2ebm.errors import NotSettledWarning
from torch2ebm.implicit.newton import Minimum

ACTIVATIONS = {"tanh": nn.Tanh, "gelu": nn.GELU, "softplus": nn.Softplus}
BATCHES = [7, 9, 12, 16]
LAYERS = ("0", "2", "4")


def problem(activation: str, batch: int, seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The chain 5-6-6-3 in double precision, inputs and classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = ACTIVATIONS[activation]
        net = nn.Sequential(nn.Linear(5, 6), module(), nn.Linear(6, 6), module(), nn.Linear(6, 3)).double()
        return net, torch.randn(batch, 5).double(), torch.randint(3, (batch,))


def squares(output: Tensor, classes: Tensor) -> Tensor:
    """Summed over samples: the more samples, the further the implicit step."""
    return 0.5 * (output - F.one_hot(classes, 3)).square().sum()


def stepped(net: nn.Module, x: Tensor, y: Tensor, loss: Any, **settings: Any) -> torch2ebm.EnergyModel:
    model = torch2ebm.convert(net)
    sgd = torch.optim.SGD(net.parameters(), lr=1.0)
    torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.ImplicitSGD(**settings))
    loss(model(x), y).backward()
    return model


@pytest.mark.parametrize("loss", [squares, F.cross_entropy], ids=["summed squares", "mean cross-entropy"])
@pytest.mark.parametrize(
    ("alpha", "seeds"),
    [(1.0, 4), *[pytest.param(*each, marks=pytest.mark.slow) for each in ((0.1, 20), (1.0, 20), (10.0, 20))]],
)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_smooth_nets_come_to_rest_whatever_the_batch(activation: str, alpha: float, seeds: int, loss: Any) -> None:
    """The gradient of L + |theta' - theta|^2 / (2 alpha) is zero at theta' = theta - .grad; its value has fallen."""
    for seed, batch in zip(range(seeds), itertools.cycle(BATCHES)):
        net, x, y = problem(activation, batch, seed)
        before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        relaxation = stepped(net, x, y, loss, alpha=alpha).state.relaxation
        after = {name: before[name] - parameter.grad for name, parameter in net.named_parameters()}
        assert relaxation.converged and relaxation.residual <= 1e-10, (seed, batch, relaxation)

        def of_parameters(parameters: Any, net: nn.Module = net, x: Tensor = x, y: Tensor = y) -> Tensor:
            return loss(torch.func.functional_call(net, dict(parameters), (x,)), y)

        assert proximal_gradient(of_parameters, before, alpha, after) <= 2e-10, (seed, batch)
        energy = proximal_objective(of_parameters, before, alpha)
        end, start = (float(energy(torch.cat([p.reshape(-1) for p in each.values()]))) for each in (after, before))
        assert end == pytest.approx(relaxation.energy[-1], rel=1e-12) and end <= start


def test_in_values_alone_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: the same nets, kept in the coordinates of the values."""
    monkeypatch.setattr(implicit_sgd, "PATIENCE", 1000)
    with pytest.warns(NotSettledWarning, match=r"not at rest.*all 100 steps.*max_steps=400"):
        relaxation = stepped(*problem("tanh", 9, 2), squares, alpha=1.0).state.relaxation
    assert relaxation.converged is False and relaxation.residual > 1e-3


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_what_comes_to_rest_on_the_values_takes_the_same_steps_as_without(
    alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Minimum] = []
    minimise = implicit_sgd.minimise

    def counted(*arguments: Any) -> Minimum:
        found.append(minimise(*arguments))
        return found[-1]

    monkeypatch.setattr(implicit_sgd, "minimise", counted)
    for patience in (implicit_sgd.PATIENCE, 1000):
        monkeypatch.setattr(implicit_sgd, "PATIENCE", patience)
        stepped(*problem("tanh", 5, 0), F.cross_entropy, alpha=alpha)
    one, other = found
    assert one.converged and (one.steps, one.products, one.history) == (other.steps, other.products, other.history)


@pytest.mark.parametrize("bias", [True, False])
def test_both_coordinates_have_one_objective(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a step on the values the same minimum is found; the report adds up in both."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = partial(nn.Linear, bias=bias)
        net = nn.Sequential(linear(5, 7), nn.Tanh(), linear(7, 6), nn.Tanh(), linear(6, 3)).double()
        x, y = torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])
    found = []
    for patience in (1000, 0):
        monkeypatch.setattr(implicit_sgd, "PATIENCE", patience)
        net.zero_grad()
        model = stepped(net, x, y, F.cross_entropy, alpha=0.5)
        last = model.state.relaxation
        assert last.energy[-1] == pytest.approx(last.loss[-1] + sum(e[-1] for e in last.node_energy.values()))
        found.append(([p.grad.clone() for p in net.parameters() if p.grad is not None], last, model.state.error["0"]))
        model.torch2ebm.detach()
    (values, by_values, error), (changes, by_changes, other) = found
    torch.testing.assert_close(values, changes, rtol=0.0, atol=1e-9)
    torch.testing.assert_close(error, other, rtol=0.0, atol=1e-9)
    assert by_values.energy[-1] == pytest.approx(by_changes.energy[-1], rel=1e-13)
    assert by_values.energy[0] == by_changes.energy[0]


def test_who_asks_for_few_steps_is_not_warned_of_them() -> None:
    relaxation = stepped(*problem("tanh", 9, 2), squares, alpha=1.0, max_steps=3).state.relaxation
    assert relaxation.converged is False and relaxation.steps == 3
