"""``PredictiveCoding()`` with nothing set calibrates itself; ``steps`` or ``lr`` ask for the literature's algorithm."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import attached, local_gradients, relative_error
from oracles.graphs import backprop
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import NoSignalWarning

STRICT = torch2ebm.GradientDescent(20, 0.1)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(output: Tensor) -> Tensor:
    return F.cross_entropy(output, torch.arange(len(output)) % output.shape[1])


def seeded(make) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


def tanh_net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)))


@pytest.mark.parametrize("settings", [{}, {"loss_reduction": "sum"}, {"precisions": {"0": 2.0}}], ids=str)
def test_nothing_set_is_the_equilibrium_under_a_relative_nudge(settings: dict[str, Any]) -> None:
    coding = torch2ebm.PredictiveCoding(**settings)
    assert coding.solver == torch2ebm.ErrorConjugateGradient() and isinstance(coding.nudging, torch2ebm.Relative)
    spelt_out = torch2ebm.PredictiveCoding(solver=coding.solver, nudging=coding.nudging, **settings)
    assert coding == spelt_out
    ours, theirs = (local_gradients(attached(tanh_net(), each), (normal(5, 6),), loss) for each in (coding, spelt_out))
    assert relative_error(ours, theirs) == 0.0


@pytest.mark.parametrize(
    ("given", "solver"),
    [
        ({"steps": 7}, torch2ebm.GradientDescent(7, 0.1)),
        ({"lr": 0.3}, torch2ebm.GradientDescent(20, 0.3)),
        ({"steps": 7, "lr": 0.3}, torch2ebm.GradientDescent(7, 0.3)),
        ({"solver": torch2ebm.ErrorDescent(5)}, torch2ebm.ErrorDescent(5)),
    ],
    ids=str,
)
def test_steps_rate_or_a_solver_ask_for_the_literature_s_nudge(given: dict[str, Any], solver) -> None:
    coding = torch2ebm.PredictiveCoding(**given)
    assert coding.solver == solver and coding.nudging == torch2ebm.OneSided(1.0)


def test_a_nudge_alone_is_relaxed_to_the_equilibrium() -> None:
    coding = torch2ebm.PredictiveCoding(nudging=torch2ebm.Symmetric(0.1))
    assert coding.solver == torch2ebm.ErrorConjugateGradient() and coding.nudging == torch2ebm.Symmetric(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize(
    "nudging", [torch2ebm.Relative(0.1), torch2ebm.Relative(1.0, torch2ebm.Symmetric(0.5))], ids=repr
)
def test_programs_compute_what_eager_steps_do(activation, nudging) -> None:
    """A program computes both sides of each choice, and eager steps one; later calls carry the curvature."""
    x, targets = torch.randn(6, 16, 8, dtype=torch.float64), torch.randint(0, 4, (6, 16))
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layers = (nn.Linear(8, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 4))
        net = nn.Sequential(*layers).double()
        model = attached(net, torch2ebm.PredictiveCoding(nudging=nudging, compile=compiled))
        for images, labels in zip(x, targets, strict=True):
            F.cross_entropy(model(images), labels).backward()
        found.append(({name: p.grad for name, p in net.named_parameters()}, model.state.relaxation))
    (eager, relaxation), (recorded, other) = found
    assert relative_error(recorded, eager) < 1e-8
    assert other.steps == relaxation.steps and other.on_kinks == relaxation.on_kinks


def test_what_stands_for_no_settings_makes_room_for_some() -> None:
    coding = torch2ebm.PredictiveCoding(loss_reduction="sum")
    for each in (coding, copy.deepcopy(coding), pickle.loads(pickle.dumps(coding))):
        assert each == coding
        assert dataclasses.replace(each, lr=0.3) == torch2ebm.PredictiveCoding(20, 0.3, loss_reduction="sum")
        assert dataclasses.replace(each, steps=7) == torch2ebm.PredictiveCoding(7, 0.1, loss_reduction="sum")
        other = dataclasses.replace(each, loss_reduction="mean")
        assert other == torch2ebm.PredictiveCoding()
        assert each.with_steps(3).solver == torch2ebm.ErrorConjugateGradient(steps=3)
        assert each.with_steps(3).nudging == coding.nudging


# ---- what it learns


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


def residual_net() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), *[Residual(4) for _ in range(4)],
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )
    )  # fmt: skip


def angle(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    a, b = (torch.cat([each[name].flatten() for name in theirs]) for each in (ours, theirs))
    return float(torch.rad2deg(torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))))


def test_on_a_residual_net_with_batch_norm_a_signal_arrives_in_the_first_layer() -> None:
    net, x = residual_net(), normal(8, 1, 8, 8)
    exact = backprop(net, (x,), loss)
    first = next(iter(exact))

    def found(coding: torch2ebm.PredictiveCoding) -> dict[str, Tensor]:
        return local_gradients(attached(residual_net(), coding), (x,), loss)

    ours = found(torch2ebm.PredictiveCoding())
    assert 0.3 < float(ours[first].norm() / exact[first].norm()) < 2
    weak = found(torch2ebm.PredictiveCoding(nudging=torch2ebm.Relative(1e-3)))
    assert angle(weak, exact) < 2 < angle(ours, exact)  # a weak nudge is backprop, the default is not
    strict = found(torch2ebm.PredictiveCoding(20, 0.01))
    assert float(strict[first].norm() / exact[first].norm()) < 1e-3  # the negative twin


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # of the strict one
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_with_nothing_set_a_deep_net_learns(dtype: torch.dtype) -> None:
    def make() -> nn.Module:
        layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(20)]
        net = nn.Sequential(*layers, nn.Linear(8, 3))
        for layer in layers:
            nn.init.orthogonal_(layer[0].weight)
        return net

    x, y = normal(30, 8).to(dtype), torch.arange(30) % 3
    left = {}
    codings = {"strict": torch2ebm.PredictiveCoding(20, 0.1), "nothing": torch2ebm.PredictiveCoding()}
    for name, coding in {"backprop": torch2ebm.Backprop(), **codings}.items():
        net = seeded(make).to(dtype)
        model = torch2ebm.convert(net)
        adam = torch.optim.Adam(net.parameters(), lr=3e-3)
        optimizer = torch2ebm.EnergyOptimizer(adam, model, coding)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            left[name] = float(F.cross_entropy(net(x), y))
    assert left["nothing"] - left["backprop"] < 0.5 * (left["strict"] - left["backprop"])


def test_the_state_says_what_regime_it_was() -> None:
    model = attached(tanh_net(), torch2ebm.PredictiveCoding(nudging=torch2ebm.Relative(0.1)))
    local_gradients(model, (normal(5, 6),), loss)
    relaxation = model.state.relaxation
    assert relaxation.r == pytest.approx(model.algorithm.nudging.r)
    assert relaxation.converged and relaxation.settled == 1.0 and relaxation.residual <= 0.01
    assert relaxation.curvature_cost > 0


# ---- no signal


def chain_of(depth: int) -> nn.Module:
    def make() -> nn.Module:
        layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth)]
        return nn.Sequential(*layers, nn.Linear(8, 3))

    return seeded(make).float()


def test_it_is_told_once_a_graph_and_not_with_nothing_set() -> None:
    net, x, y = chain_of(8), normal(6, 8).float(), torch.arange(6) % 3
    model = torch2ebm.convert(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.PredictiveCoding(4, 0.01))
    with pytest.warns(NoSignalWarning, match="no error has reached"):
        F.cross_entropy(model(x), y).backward()
    F.cross_entropy(model(x), y).backward()  # a second warning would be an error
    optimizer.detach()
    torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.PredictiveCoding())
    F.cross_entropy(model(x), y).backward()
    assert model.state.without_signal == () and model.state.unreached == ()
