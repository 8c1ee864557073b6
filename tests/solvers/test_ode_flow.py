"""``ODEFlow``: against the flow of a linear network in closed form, and against plain descent."""

import importlib.util
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers import attached
from torch import Tensor, nn

import torch2ebm
from torch2ebm import theory
from torch2ebm.errors import CompilationWarning, ConfigurationError, DivergenceError

if importlib.util.find_spec("torchdiffeq") is None:
    pytest.skip("torchdiffeq is not installed", allow_module_level=True)

X, Y, LABELS = (
    torch.linspace(-1, 1, 24).reshape(6, 4).double(),
    torch.linspace(2, -1, 18).reshape(6, 3).double(),
    torch.tensor([0, 1, 2, 0, 1, 2]),
)


def half_squares(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum()


def seeded(*layers) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*[layer() for layer in layers]).double()


def linear() -> nn.Sequential:
    return seeded(lambda: nn.Linear(4, 5), lambda: nn.Linear(5, 4), lambda: nn.Linear(4, 3))


def curved() -> nn.Sequential:
    return seeded(lambda: nn.Linear(4, 5), nn.Tanh, lambda: nn.Linear(5, 4), nn.Tanh, lambda: nn.Linear(4, 3))


def state_of(net: nn.Module, solver: torch2ebm.Solver, loss_fn=F.cross_entropy, y: Tensor = LABELS, **settings):
    reduction = "sum" if loss_fn is half_squares else "mean"
    model = attached(net, torch2ebm.PredictiveCoding(solver=solver, loss_reduction=reduction, **settings))
    loss_fn(model(X), y).backward()
    return model.state


@pytest.mark.parametrize("duration", [0.3, 2.0])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "rk4"])
def test_the_flow_of_a_linear_network_in_closed_form(method: str, duration: float) -> None:
    """v(t) = v* + exp(-H t) (v(0) - v*), v* and H by theory."""
    net = linear()
    found = theory.LinearGaussian.of(net).posterior({"input": X, "2": Y})
    rest = torch.cat([found.mean["0"], found.mean["1"]], 1)
    start = torch.cat([net[0](X), net[:2](X)], 1).detach()
    expected = rest + (start - rest) @ torch.matrix_exp(-duration * found.hessian)
    solver = torch2ebm.ODEFlow(duration, rtol=1e-8, atol=1e-10, method=method, steps=40 if method == "rk4" else 3)
    state = state_of(net, solver, half_squares, Y)
    values = torch.cat([state.value["0"], state.value["1"]], 1)
    assert torch.allclose(values, expected, atol=1e-6)
    assert not torch.allclose(values, rest, atol=1e-2)  # it is on its way


def test_euler_is_gradient_descent() -> None:
    flow = state_of(curved(), torch2ebm.ODEFlow(1.5, method="euler", steps=10))
    descent = state_of(curved(), torch2ebm.GradientDescent(10, 0.15))
    for node in ("0", "2"):
        assert torch.allclose(flow.value[node], descent.value[node], atol=1e-12)
    assert flow.relaxation.energy == pytest.approx(descent.relaxation.energy, rel=1e-12)
    assert flow.relaxation.residual == pytest.approx(descent.relaxation.residual, rel=1e-10)


def test_it_comes_to_the_same_rest_as_descent() -> None:
    flow = state_of(curved(), torch2ebm.ODEFlow(200.0, rtol=1e-7, atol=1e-9, tol=1e-6, steps=50))
    descent = state_of(curved(), torch2ebm.GradientDescent(5_000, 0.2, tol=1e-9))
    assert flow.relaxation.converged and flow.relaxation.steps < 50
    for node in ("0", "2"):
        assert torch.allclose(flow.value[node], descent.value[node], atol=1e-5)
    energies = flow.relaxation.energy
    assert len(energies) == flow.relaxation.steps + 1
    assert all(after <= before + 1e-9 for before, after in pairwise(energies))


def test_tighter_tolerances_are_nearer_to_the_flow() -> None:
    """The negative twin of exactness: rtol and atol are what decides."""
    exact = state_of(curved(), torch2ebm.ODEFlow(2.0, rtol=1e-10, atol=1e-12, steps=2)).value["0"]
    loose, tight = (
        float((state_of(curved(), torch2ebm.ODEFlow(2.0, rtol=r, atol=r, steps=2)).value["0"] - exact).norm())
        for r in (1e-2, 1e-7)
    )
    assert loose > 100 * tight


def test_more_steps_are_a_longer_flow() -> None:
    solver = torch2ebm.ODEFlow(2.0, steps=4).with_steps(6)
    assert (solver.steps, solver.duration) == (6, 3.0)


def test_energies_of_a_users_own_and_precisions_count() -> None:
    settings = {"precisions": {"0": 2.0}, "energies": {"2": torch2ebm.Categorical()}}
    flow = state_of(curved(), torch2ebm.ODEFlow(1.5, method="euler", steps=10), **settings)
    descent = state_of(curved(), torch2ebm.GradientDescent(10, 0.15), **settings)
    assert torch.allclose(flow.value["2"], descent.value["2"], atol=1e-12)


def test_compiling_is_declined_in_words_and_changes_nothing() -> None:
    solver = torch2ebm.ODEFlow(1.0, steps=3)
    plain = state_of(curved(), solver)
    with pytest.warns(CompilationWarning):
        compiled = state_of(curved(), solver, compile=True)
    assert torch.allclose(compiled.value["0"], plain.value["0"], atol=1e-12)


def test_an_energy_without_a_floor_is_told_of() -> None:
    net = curved()
    with torch.no_grad():
        net[4].weight.mul_(20)
    model = attached(net, torch2ebm.PredictiveCoding(solver=torch2ebm.ODEFlow(500.0), loss_reduction="sum"))
    loss = -model(X).square().square().sum()
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(DivergenceError):
        loss.backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(parameter, old) for parameter, old in zip(net.parameters(), before, strict=True))


def test_an_interval_without_end_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch2ebm.solvers.ode_flow.MOST", 50)
    with pytest.raises(DivergenceError, match="not through after 50 evaluations"):
        state_of(curved(), torch2ebm.ODEFlow(20.0, rtol=1e-12, atol=1e-14, method="bosh3", steps=1))


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch2ebm.solvers.ode_flow.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install torch2ebm\[ode\]"):
        torch2ebm.ODEFlow()


@pytest.mark.parametrize(
    "setting",
    [
        {"duration": 0.0},
        {"duration": math.inf},
        {"rtol": -1e-3},
        {"atol": math.nan},
        {"method": "rk5"},
        {"steps": 0},
        {"steps": "auto"},
        {"tol": -1.0},
    ],
    ids=str,
)
def test_an_illegal_setting_is_named(setting) -> None:
    (name,) = setting
    with pytest.raises(ConfigurationError, match=rf"ODEFlow\({name}=.*expected"):
        torch2ebm.ODEFlow(**setting)
