"""Other updates than all states at once: the same equilibrium by fewer evaluations, and what is done if they fail."""

import warnings

import pytest
import torch
from helpers import attached
from oracles.equilibria import convolutional, distance, mlp, recurrent_backprop, settled, skip
from test_equilibrium import gradients
from test_equilibrium_refusals import cycling
from torch import Tensor, nn

import torch2ebm
from torch2ebm import AndersonMixing, GaussSeidel
from torch2ebm.equilibrium.dynamics import Equilibrium
from torch2ebm.errors import ConfigurationError, NotAMinimumWarning, NotSettledWarning

UPDATES = [AndersonMixing(), AndersonMixing(memory=2), GaussSeidel()]
NAMES = {AndersonMixing: "anderson", GaussSeidel: "sequential"}


def net(activation: nn.Module, gain: float, seed: int, hidden: int = 2) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 16), activation]
    for _ in range(hidden - 1):
        layers += [nn.Linear(16, 16), activation]
    found = nn.Sequential(*layers, nn.Linear(16, 3)).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(gain)
    return found, torch.randn(8, 4).double()


def slow() -> tuple[nn.Sequential, Tensor]:
    """J's spectral radius is about .98 at its equilibrium."""
    return net(nn.Tanh(), 1.5, 1)[0], torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double()


def free_phase(module: nn.Module, x: Tensor, steps: int, tol: float = 0.0, update=None) -> torch2ebm.Relaxation:
    model = attached(module, torch2ebm.RecurrentBackprop(free_steps=steps, tol=tol, update=update))
    model(x).square().mean().backward()
    return model.state.phases[0]


ONE_EQUILIBRIUM = [(mlp, 1.0), (mlp, 0.3), (convolutional, 1.0), (convolutional, 0.3), (skip, 0.3)]


@pytest.mark.parametrize("update", UPDATES, ids=repr)
@pytest.mark.parametrize(("make", "feedback"), ONE_EQUILIBRIUM)
def test_every_update_ends_at_the_same_equilibrium(make, update, feedback: float) -> None:
    example = make().with_settings(feedback=feedback)
    rest = settled(example.network)
    algorithm = torch2ebm.EquilibriumPropagation(free_steps=300, tol=1e-12, feedback=feedback, update=update)
    with torch.no_grad():
        output = attached(example.module, algorithm)(example.x)
    torch.testing.assert_close(output, rest[example.network.output], rtol=0, atol=1e-10)


def test_of_several_equilibria_it_may_find_another() -> None:
    """With full feedback two of the samples have more than one; what is found is one, by the formulas' own step."""
    example = skip()
    model = attached(example.module, torch2ebm.RecurrentBackprop(free_steps=300, tol=1e-12, update=AndersonMixing()))
    with pytest.warns(NotAMinimumWarning, match=r"saddle.*2 of 5 samples \(2, 3\)"):  # see test_minimum
        output = model(example.x)
    output.square().mean().backward()
    names = {"s1": "tanh", "s2": "sigmoid", "s3": "tanh_1", "s4": "readout"}
    states = {name: model.state.prediction[ours] for name, ours in names.items()}
    moved = example.network.step(states)
    assert max(float((moved[name] - value).abs().max()) for name, value in states.items()) < 1e-11
    assert float((states["s4"] - settled(example.network)["s4"]).abs().max()) > 0.1


@pytest.mark.parametrize("update", UPDATES, ids=repr)
@pytest.mark.parametrize("nudging", [torch2ebm.Symmetric(1e-3), torch2ebm.Holomorphic(1e-2, 4)], ids=repr)
def test_nudged_phases_move_by_it_too(nudging, update) -> None:
    """Complex states are mixed by their parts; the estimate is the gradient at the equilibrium."""
    example = mlp()
    exact = recurrent_backprop(example.network, settled(example.network))
    ours, model = gradients(example, nudging, 300, 300, tol=1e-13, update=update)
    assert {phase.update for phase in model.state.phases} == {NAMES[type(update)]}
    assert distance(ours, exact) < 1e-5


def test_mixing_takes_a_tenth_of_the_evaluations_where_the_plain_update_is_slow(monkeypatch) -> None:
    counted, drive = [], Equilibrium.drive
    monkeypatch.setattr(Equilibrium, "drive", lambda self, *rest: counted.append(1) or drive(self, *rest))
    evaluations = {}
    for name, update in {"plain": None, "mixed": AndersonMixing()}.items():
        counted.clear()
        phase = free_phase(*slow(), 3000, 1e-12, update)
        assert phase.converged and phase.residual <= 1e-12 and phase.steps == len(counted)
        evaluations[name] = len(counted)
    assert evaluations["plain"] > 1000 and evaluations["mixed"] < evaluations["plain"] / 10


def test_on_a_linear_net_it_ends_after_as_many_steps_as_there_are_states() -> None:
    """There it is GMRES (Walker and Ni 2011); a shorter memory is not. Each step is one evaluation."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Hardtanh(-99.0, 99.0), nn.Linear(5, 3)).double()
    with torch.no_grad():
        module[2].weight.mul_(0.95 / torch.linalg.matrix_norm(module[2].weight, 2))
    x = torch.randn(6, 4).double()
    whole = free_phase(module, x, 10, update=AndersonMixing(memory=8))
    assert whole.steps == 10 and whole.residual < 1e-9
    assert free_phase(module, x, 300, 1e-9, AndersonMixing(memory=1)).steps > 15
    assert free_phase(module, x, 300).residual > 1e-9


def test_it_settles_where_the_plain_update_cycles() -> None:
    module, x = cycling()
    assert free_phase(module, x, 400).update == "damped"
    with pytest.warns(NotAMinimumWarning, match=r"1 of 1 samples"):  # between the two that the plain one alternates at
        mixed = free_phase(module, x, 400, 1e-12, AndersonMixing())
    assert mixed.update == "anderson" and mixed.converged and mixed.steps < 50


def test_where_it_does_not_settle_another_update_does() -> None:
    """Hard bounds and strong weights: many equilibria, between which a mixture leaps."""
    module, x = net(nn.Hardtanh(), 5.0, 0, hidden=3)
    phase = free_phase(module, x, 100, update=AndersonMixing())
    assert phase.update == "damped" and phase.residual < 1e-9


def test_where_none_settles_it_is_warned_of() -> None:
    module, x = net(nn.Hardtanh(), 1.0, 1, hidden=3)
    with pytest.warns(NotSettledWarning, match="free phase has not settled"):
        free_phase(module, x, 5, update=AndersonMixing())


def test_a_sample_is_mixed_the_same_alone_or_in_a_batch() -> None:
    module, x = slow()
    model = attached(module, torch2ebm.EquilibriumPropagation(free_steps=40, update=AndersonMixing()))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotSettledWarning)
        together, alone = model(x), torch.cat([model(sample[None]) for sample in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "make",
    [
        torch2ebm.EquilibriumPropagation,
        torch2ebm.RecurrentBackprop,
        torch2ebm.ContrastiveHebbian,
        torch2ebm.CoupledLearning,
    ],
)
def test_every_equilibrium_algorithm_takes_one(make) -> None:
    algorithm = make(update=AndersonMixing(memory=3))
    assert "update=AndersonMixing(memory=3)" in repr(algorithm) and "update" not in repr(make())
    assert algorithm.with_steps(7).free_phase.update == AndersonMixing(memory=3)
    with pytest.raises(ConfigurationError, match=r"update=.*'anderson'.*AndersonMixing\(\)"):
        make(update="anderson")
    with pytest.raises(ConfigurationError, match=r"damping=0\.3 and update=GaussSeidel"):
        make(damping=0.3, update=GaussSeidel())


@pytest.mark.parametrize("memory", [0, -1, 2.0, True])
def test_a_memory_is_a_whole_number(memory) -> None:
    with pytest.raises(ConfigurationError, match="memory"):
        AndersonMixing(memory)
