"""A phase that has not settled is never silent, and one that has is: inference, differences, nudges that cycle."""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from helpers import UNSETTLED, attached
from oracles.equilibria import convolutional, mlp, settled, skip
from torch import Tensor, nn
from torch.nn import functional as F

import torch2ebm
from torch2ebm.engine.call import Call
from torch2ebm.equilibrium.dynamics import Equilibrium, Influence
from torch2ebm.equilibrium.hopfield import HopfieldGraph
from torch2ebm.equilibrium.settling import settle
from torch2ebm.equilibrium.updates import Damped, Synchronous
from torch2ebm.errors import NonFiniteError, NotSettledError, NotSettledWarning

EP = torch2ebm.EquilibriumPropagation
FREE_PHASES = {
    "one-sided": lambda steps: EP(torch2ebm.OneSided(0.5), steps),
    "random sign": lambda steps: EP(torch2ebm.RandomSign(0.5), steps),
    "symmetric": lambda steps: EP(torch2ebm.Symmetric(0.5), steps),
    "holomorphic": lambda steps: EP(torch2ebm.Holomorphic(0.1, 2), steps),
    "loose tol": lambda steps: EP(free_steps=steps, tol=1.0 if steps == 3 else 0.0),
    "recurrent": lambda steps: torch2ebm.RecurrentBackprop(free_steps=steps),
    "contrastive": lambda steps: torch2ebm.ContrastiveHebbian(1.0, steps),
    "coupled": lambda steps: torch2ebm.CoupledLearning(free_steps=steps),
}
every_free_phase = pytest.mark.parametrize("algorithm", FREE_PHASES.values(), ids=FREE_PHASES)


def slow_net() -> nn.Sequential:
    """Settles, without a cycle, in about a hundred steps; nothing in it is watched."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def inputs() -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double()


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Inference ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["training", "evaluation", "no_grad"])
@every_free_phase
def test_an_output_that_is_no_equilibrium_s_is_warned_of(algorithm, mode: str) -> None:
    model = attached(slow_net(), algorithm(3)).train(mode == "training")
    expected = (
        r"free phase.*after \d+ \w+ steps.*'\w+' still move by \de-\d+.*values up to.*feedback.*damping.*free_steps"
    )
    with pytest.warns(NotSettledWarning, match=expected) as caught, torch.set_grad_enabled(mode != "no_grad"):
        model(inputs())
    assert len(caught) == 1


@every_free_phase
def test_an_equilibrium_s_output_comes_in_silence(algorithm) -> None:
    with silence():
        attached(slow_net(), algorithm(1000)).eval()(inputs())


@pytest.mark.parametrize("feedback", [1.0, 0.3])
@pytest.mark.parametrize("make", [mlp, convolutional, skip])
def test_the_warning_comes_where_the_equilibrium_is_a_tenth_away(make, feedback: float) -> None:
    """Of the largest state, by the formulas' own equilibrium: above it warned, below a fiftieth not."""
    example = make().with_settings(feedback=feedback)
    rest, seen = settled(example.network), set()
    size = max(float(value.abs().max()) for value in rest.values())
    for steps in (1, 2, 3, 4, 6, 8, 12, 20, 40, 80):
        states = example.network.relax(example.network.feedforward(), steps)
        apart = max(float((states[name] - value).abs().max()) for name, value in rest.items()) / size
        model = attached(example.module, EP(free_steps=steps, feedback=feedback))
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            model(example.x)
        warned = any(issubclass(each.category, NotSettledWarning) for each in caught)
        assert warned or apart < 0.1, (steps, apart)
        assert not warned or apart > 0.02 or steps < 3, (steps, apart)  # two steps do not show how they shrink
        seen.add(warned)
    assert False in seen


def test_the_drift_is_the_way_that_is_left() -> None:
    """Two linear states, s1 = a + w s2 and s2 = w s1 + b: J has the eigenvalues w and -w, and changes come in pairs."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Hardtanh(-99.0, 99.0), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), (1.0, 0.3, 0.9, -0.2), strict=True):
            parameter.fill_(value)
    x = torch.tensor([[0.7]]).double()
    model = torch2ebm.convert(net, nodes="activation", example_inputs=x)
    call = model.torch2ebm.new_call((x,), {})
    call.feedforward(keep_graph=False)
    equilibrium = Equilibrium(call, HopfieldGraph(model.graph), 1.0)
    for steps, further in ((6, 4), (7, 4), (10, 40), (3, 2)):
        here = settle(equilibrium, equilibrium.states, steps, Synchronous(), Influence())
        there = settle(equilibrium, here.states, further, Synchronous(), Influence())
        moved = max(float((there.states[slot] - value).abs().max()) for slot, value in here.states.items())
        # the changes of both states are summed, of which each state has every other one
        assert 0 < moved <= here.drift(further) * (1 + 1e-9) <= 2.2 * moved


def at_feedforward_values(net: nn.Module) -> Equilibrium:
    model = torch2ebm.convert(net, nodes="activation", example_inputs=inputs())
    call = model.torch2ebm.new_call((inputs(),), {})
    call.feedforward(keep_graph=False)
    return Equilibrium(call, HopfieldGraph(model.graph), 1.0)


@pytest.mark.parametrize(("steps", "tol"), [(1, 0.0), (2, 0.0), (3, 0.0), (7, 0.0), (40, 0.02)])
def test_what_is_measured_is_the_change_of_the_last_steps(steps: int, tol: float) -> None:
    equilibrium = at_feedforward_values(slow_net())
    points = [equilibrium.states]
    for _ in range(steps):
        points.append(Synchronous().step(equilibrium, points[-1], Influence()).states)
    changes = [{slot: after[slot] - before[slot] for slot in after} for before, after in pairwise(points)]
    largest = [max(float(each.abs().max()) for each in change.values()) for change in changes]
    taken = next((i + 1 for i, each in enumerate(largest) if each <= tol), steps)
    found = settle(equilibrium, equilibrium.states, steps, Synchronous(), Influence(), tol)
    last = changes[taken - 1]
    assert found.relaxation.steps == taken
    assert (taken < steps) == (tol > 0)
    assert found.pace == pytest.approx(largest[max(taken - 3, 0) : taken][::-1])
    assert found.relaxation.residual == pytest.approx(largest[taken - 1])
    assert found.distance == pytest.approx(float(torch.cat([each.flatten() for each in last.values()]).norm()))
    assert found.moving_most() == max(last, key=lambda slot: float(last[slot].abs().max()))
    by_sample = torch.stack([each.abs().amax(1) for each in last.values()]).amax(0)
    torch.testing.assert_close(found.relaxation.sample_residual, by_sample)
    assert all(torch.equal(found.states[slot], state) for slot, state in points[taken].items())


@pytest.mark.parametrize("steps", [6, 7])
def test_two_steps_that_lead_back_are_a_cycle(steps: int) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(1.0), nn.Linear(4, 4)).double()
    with torch.no_grad():
        net[0].weight.zero_()
        net[2].weight.copy_(torch.eye(4))  # the states swap: s_1 = a + s_2, s_2 = b + s_1 with a, b = 0
        net[0].bias.zero_()
        net[2].bias.zero_()
    equilibrium = at_feedforward_values(net)
    start = {slot: torch.full_like(s, i) for i, (slot, s) in enumerate(equilibrium.states.items())}
    assert settle(equilibrium, start, steps, Synchronous(), Influence()).cycling
    assert not settle(equilibrium, start, steps, Damped(0.5), Influence()).cycling


def test_the_feedforward_values_go_when_the_states_have_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[object] = []
    feedforward = Call.feedforward

    def watched(self: Call, **options: bool) -> None:
        feedforward(self, **options)
        for value in self.values.values():
            weakref.finalize(value.untyped_storage(), alive.remove, alive.append(slot := object()) or slot)

    monkeypatch.setattr(Call, "feedforward", watched)
    model = attached(slow_net(), EP(free_steps=400))
    output = model(inputs())
    assert len(alive) == 1  # what the input alone makes, and nothing moves
    output.square().mean().backward()


@every_free_phase
def test_an_overflow_of_the_feedforward_pass_is_named_where_it_began(algorithm) -> None:
    torch.manual_seed(0)
    first, second, third = (nn.Linear(4, 4) for _ in range(3))
    net = nn.Sequential(first, nn.Tanh(), second, nn.Softplus(), third, nn.Softplus(), nn.Linear(4, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.3)  # it settles
    model = attached(net, algorithm(20))
    model(inputs().float())
    with torch.no_grad():
        for layer, bias in ((second, 1e38), (third, 1.0)):
            layer.weight.fill_(1e30)
            layer.bias.fill_(bias)
    with pytest.raises(NonFiniteError, match=r"prediction of node '4', feed-forward pass"):
        model(inputs().float())


# Differences to the free state ----------------------------------------------------------------------------------------


def backward(algorithm: torch2ebm.Algorithm, pull: float) -> torch2ebm.EnergyModel:
    """A loss whose gradient at the output is about ``pull``."""
    model = attached(slow_net(), algorithm)
    output = model(inputs())
    target = output.detach() + pull * torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).double()
    loss = torch2ebm.EnergyLoss(lambda y: 0.5 * (y - target).square().sum(1).mean())
    loss(output).backward()
    return model


DIFFERENCES = {
    "one-sided": lambda steps: EP(torch2ebm.OneSided(0.5), steps, 5),
    "read-out": lambda steps: EP(torch2ebm.OneSided(0.5), steps, 5, readout=True),
    "random sign": lambda steps: EP(torch2ebm.RandomSign(0.5), steps, 5),
    "contrastive": lambda steps: torch2ebm.ContrastiveHebbian(1.0, steps, 5),
    "coupled": lambda steps: torch2ebm.CoupledLearning(0.25, steps, 5),
}
every_difference = pytest.mark.parametrize("algorithm", DIFFERENCES.values(), ids=DIFFERENCES)


@pytest.mark.filterwarnings(UNSETTLED)
@every_difference
def test_a_difference_that_would_show_the_drift_is_refused(algorithm) -> None:
    with pytest.raises(NotSettledError, match=r"(one-sided nudge|clamped phase).*still moves by.*Symmetric"):
        backward(algorithm(20), 1e-4)


@every_difference
def test_a_difference_a_tenth_of_which_may_be_drift_is_warned_of(algorithm) -> None:
    """After 40 steps the free phase is settled for inference, and not for a pull as weak as this."""
    with pytest.warns(
        NotSettledWarning, match=r"(one-sided nudge|clamped phase).*still moves by.*drift.*\d+% of what the nudge moves"
    ):
        model = backward(algorithm(40), 1e-3)
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_difference
def test_a_difference_to_a_settled_phase_is_taken_in_silence(algorithm) -> None:
    with silence():
        backward(algorithm(1000), 1e-4)


@pytest.mark.parametrize("nudging", [torch2ebm.Symmetric(1e-3), torch2ebm.Holomorphic(1e-3, 4)])
def test_the_drift_cancels_from_a_circle_of_nudges(nudging) -> None:
    """The twin: where one side is refused, two give the settled phase's gradient but for a few percent."""
    with pytest.raises(NotSettledError):
        backward(EP(torch2ebm.OneSided(1e-3), 20, 60), 1.0)
    cut, whole = (backward(EP(nudging, steps, 60), 1.0) for steps in (20, 1000))
    ours, exact = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (cut, whole))
    assert float((ours - exact).norm() / exact.norm()) < 0.05


# Nudged phases --------------------------------------------------------------------------------------------------------


def test_a_nudge_under_which_the_output_swings_is_warned_of() -> None:
    """s_o <- a - beta (s_o - y): from beta = 1 on it does not come to rest, however many steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Hardsigmoid(), nn.Linear(6, 3)).double()
    model = attached(net, EP(torch2ebm.Symmetric(1.1)))
    with pytest.warns(NotSettledWarning, match=r"nudged phase -?1\.1 does not settle.*'2' still move.*smaller nudge"):
        F.mse_loss(model(inputs()) * 3**0.5, torch.ones(8, 3).double() * 3**0.5).backward()


# What may settle or not ----------------------------------------------------------------------------------------------


class Attending(nn.Module):
    """Softmax attention over four tokens, in the loop."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.mixed, self.readout = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        states = torch.tanh(self.first(x))  # [batch, token, unit]
        weights = torch.softmax(states @ states.mT, -1)
        return self.readout(torch.tanh(self.mixed(weights @ states)).mean(1))


def test_softmax_attention_that_does_not_settle_is_named_and_else_taken_in_silence() -> None:
    x = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    with pytest.warns(NotSettledWarning, match=r"states of '.*' still move by.*softmax.*in the loop.*feedback"):
        attached(Attending(2.5), EP(free_steps=4))(x)
    with silence():
        attached(Attending(0.5), EP(free_steps=60))(x)
