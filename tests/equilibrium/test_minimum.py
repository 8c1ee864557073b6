"""Whether an equilibrium is a minimum of the energy or a saddle, held against dense Jacobians of the formulas."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import attached
from oracles.equilibria import Example, convolutional, linearised, mlp, settled, skip
from torch import Tensor, nn

import torch2ebm
from torch2ebm import AndersonMixing, GaussSeidel
from torch2ebm.equilibrium import minimum
from torch2ebm.equilibrium.dynamics import Equilibrium
from torch2ebm.equilibrium.hopfield import HopfieldGraph
from torch2ebm.equilibrium.minimum import are_minima
from torch2ebm.errors import NotAMinimumWarning

STATES = {"s1": "tanh", "s2": "sigmoid", "s3": "tanh_1", "s4": "readout"}  # of the skip net, as its nodes are called


def abscissae(example: Example, states: dict[str, Tensor]) -> Tensor:
    """The largest real part of an eigenvalue of each sample's df/ds, dense."""
    jacobian, batch = linearised(example.network, states).jacobian, len(example.x)
    owner = torch.cat([torch.arange(batch).repeat_interleave(state.numel() // batch) for state in states.values()])
    blocks = [jacobian[owner == sample][:, owner == sample] for sample in range(batch)]
    return torch.stack([torch.linalg.eigvals(block).real.max() for block in blocks])


def learned(example: Example, update, **settings) -> torch2ebm.EnergyModel:
    model = attached(example.module, torch2ebm.RecurrentBackprop(free_steps=300, tol=1e-12, update=update, **settings))
    model(example.x).square().mean().backward()
    return model


def states_of(model: torch2ebm.EnergyModel) -> dict[str, Tensor]:
    return {name: model.state.prediction[ours] for name, ours in STATES.items()}


def test_samples_that_mixing_leaves_in_a_saddle_are_named() -> None:
    example = skip()
    with pytest.warns(NotAMinimumWarning, match=r"AndersonMixing.*saddle.*2 of 5 samples \(2, 3\).*GaussSeidel\(\)"):
        model = learned(example, AndersonMixing())
    growing = abscissae(example, states_of(model))
    assert (growing > 1.05).tolist() == [False, False, True, True, False]
    assert model.state.phases[0].at_minimum.tolist() == (growing < 1).tolist()


@pytest.mark.parametrize("remedy", [{"update": GaussSeidel()}, {"update": None, "damping": 0.5}], ids=repr)
def test_what_the_warning_advises_ends_in_minima(remedy) -> None:
    example = skip()
    assert bool((abscissae(example, states_of(learned(example, **remedy))) < 1).all())
    lower = example.with_settings(feedback=0.5)
    assert learned(lower, AndersonMixing(), feedback=0.5).state.phases[0].at_minimum.all()


@pytest.mark.parametrize(("make", "feedback"), [(mlp, 1.0), (mlp, 0.3), (convolutional, 1.0), (skip, 0.3)])
def test_at_a_minimum_nothing_is_said(make, feedback: float) -> None:
    """The negative twin; a warning would be an error."""
    example = make().with_settings(feedback=feedback)
    assert bool((abscissae(example, settled(example.network)) < 1).all())
    found = learned(example, AndersonMixing(), feedback=feedback).state.phases[0].at_minimum
    assert found.shape == (len(example.x),) and bool(found.all())


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.SiLU(), nn.Hardtanh()], ids=repr)
@pytest.mark.parametrize("gain", [0.5, 1.0, 1.5, 2.5])
def test_at_any_states_the_sign_is_that_of_the_dense_matrix(activation: nn.Module, gain: float) -> None:
    """A chain's s = tanh(W s' + W^T s'' + b): J is written out and its eigenvalues are taken, for random states."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 8), activation, nn.Linear(8, 3)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(gain)
    x, slots = torch.randn(6, 4).double(), ("1", "3", "4")
    model = attached(net, torch2ebm.RecurrentBackprop(feedback=0.7))
    call = model.torch2ebm.new_call((x,), {})
    call.feedforward(keep_graph=False)
    equilibrium = Equilibrium(call, HopfieldGraph(call.graph, False), 0.7)
    given = {slot: state + 0.1 * torch.randn_like(state) for slot, state in equilibrium.states.items()}
    assert len(given) == len(slots)
    growing = []
    for sample in range(6):
        widths, flat = [8, 8, 3], torch.cat([state[sample] for state in given.values()])

        def step(vector: Tensor, sample: int = sample) -> Tensor:
            s1, s2, s3 = vector.split([8, 8, 3])
            first = activation(net[0](x[sample]) + 0.7 * net[2].weight.T @ s2)
            return torch.cat([first, activation(net[2](s1) + 0.7 * net[4].weight.T @ s3), net[4](s2)])

        assert sum(widths) == len(flat)
        growing.append(float(torch.linalg.eigvals(torch.autograd.functional.jacobian(step, flat)).real.max()))
    found = are_minima(equilibrium, given, products=19)
    clear = [sample for sample in range(6) if abs(growing[sample] - 1) > 2e-3]
    assert [bool(found[sample]) for sample in clear] == [growing[sample] < 1 for sample in clear]
    few = are_minima(equilibrium, given, products=3)
    assert all(bool(few[sample]) for sample in clear if growing[sample] < 1)  # few products raise no false alarm


def test_one_free_phase_in_sixteen_is_looked_at_and_plain_updates_never(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    monkeypatch.setattr(minimum, "are_minima", lambda *rest: looked.append(1) or are_minima(*rest))
    example = mlp()
    for update, expected in ((AndersonMixing(), 2), (GaussSeidel(), 0), (None, 0)):
        looked.clear()
        model = attached(example.module, torch2ebm.RecurrentBackprop(free_steps=50, update=update))
        for _ in range(17):
            model(example.x).square().mean().backward()
        assert len(looked) == expected
        model.torch2ebm.detach()


def test_it_is_said_once_and_the_report_goes_on() -> None:
    example = skip()
    model = attached(example.module, torch2ebm.RecurrentBackprop(free_steps=300, tol=1e-12, update=AndersonMixing()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reports = []
        for _ in range(17):
            model(example.x).square().mean().backward()
            reports.append(model.state.phases[0].at_minimum)
    assert [each.category for each in caught] == [NotAMinimumWarning]
    assert caught[0].filename == __file__
    assert reports[1] is None and reports[0].tolist() == reports[16].tolist() == [True, True, False, False, True]


def test_nothing_is_drawn_from_the_user_s_generator() -> None:
    example = mlp()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    learned(example, AndersonMixing())
    assert torch.equal(before, torch.get_rng_state())
