"""``PredictiveCoding(on_step=...)``: what a user sees of every step, and that looking changes nothing."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import attached, same
from solvers_list import ROWS, Row
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ConfigurationError
from torch2ebm.programs.program import Program

pytestmark = pytest.mark.usefixtures("recorded_only")


@pytest.fixture
def recorded_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run as they were recorded: no compiler has a say in what is seen between them."""
    monkeypatch.setattr(Program, "compile", lambda self: None)


X, Y = torch.linspace(-1, 1, 24).reshape(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def trained(algorithm: torch2ebm.PredictiveCoding, module: nn.Module | None = None) -> torch2ebm.EnergyModel:
    model = attached(module or net(), algorithm)
    F.cross_entropy(model(X), Y).backward()
    return model


def steps_of(**settings: Any) -> tuple[torch2ebm.EnergyModel, list[torch2ebm.InferenceStep]]:
    seen: list[torch2ebm.InferenceStep] = []
    return trained(torch2ebm.PredictiveCoding(on_step=seen.append, **settings)), seen


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def test_the_values_of_every_step_are_those_of_plain_descent() -> None:
    model, seen = steps_of(steps=6, lr=0.2)
    module = model.torch2ebm.module
    first, second = module[:2](X).detach(), module[:4](X).detach()
    for step in seen:
        leaves = [first.requires_grad_(), second.requires_grad_()]
        own = 0.5 * (first - module[:2](X)).square().sum() + 0.5 * (second - module[2:4](first)).square().sum()
        energy = own + F.cross_entropy(module[4](second), Y, reduction="sum")
        slopes = torch.autograd.grad(energy, leaves)
        first, second = ((v - 0.2 * s).detach() for v, s in zip(leaves, slopes, strict=True))
        assert torch.allclose(step.value["0"], first, atol=1e-12)
        assert torch.allclose(step.value["2"], second, atol=1e-12)
        assert torch.allclose(step.error["2"], (second - module[2:4](first)).detach(), atol=1e-12)
    assert [step.step for step in seen] == [1, 2, 3, 4, 5, 6]


RECORDED = [row for row in ROWS if row.name in ("GradientDescent", "ErrorDescent")]


@pytest.mark.parametrize(
    ("row", "compiled"),
    [*((row, False) for row in ROWS), *((row, True) for row in RECORDED)],
    ids=lambda each: getattr(each, "name", str(each)),
)
def test_every_solver_shows_its_energies_and_is_not_disturbed(row: Row, compiled: bool) -> None:
    solver = row.recorded
    alone = trained(torch2ebm.PredictiveCoding(solver=solver, compile=compiled))
    model, seen = steps_of(solver=solver, compile=compiled)
    relaxation = model.state.relaxation
    assert same(gradients(model), gradients(alone)) and relaxation.energy == alone.state.relaxation.energy
    assert [step.step for step in seen] == list(range(1, relaxation.steps + 1))
    for step in seen:
        assert step.energy == pytest.approx(relaxation.energy[step.step], rel=1e-9)
        assert step.energy == pytest.approx(step.loss + sum(step.node_energy.values()))
    for node in ("0", "2"):
        assert torch.allclose(seen[-1].value[node], model.state.value[node], atol=1e-9)
        assert not seen[-1].value[node].requires_grad


def test_what_is_seen_is_a_copy() -> None:
    """The first step's tensors are not those of the last, and a user who writes to them changes nothing."""

    def spoil(step: torch2ebm.InferenceStep) -> None:
        for tensor in (*step.value.values(), *step.error.values()):
            tensor.fill_(7.0)

    for solver in (torch2ebm.GradientDescent(5, 0.2), torch2ebm.ErrorDescent(5, 0.2)):
        alone, _ = steps_of(solver=solver)
        assert same(gradients(trained(torch2ebm.PredictiveCoding(solver=solver, on_step=spoil))), gradients(alone))
        _, seen = steps_of(solver=solver)
        assert not torch.allclose(seen[0].value["0"], seen[-1].value["0"], atol=1e-6)


def test_every_phase_is_seen_with_its_nudge() -> None:
    _, seen = steps_of(solver=torch2ebm.GradientDescent(3, 0.1), nudging=torch2ebm.Symmetric(0.5))
    assert [(step.step, step.beta) for step in seen] == [(i, beta) for beta in (0.5, -0.5) for i in (1, 2, 3)]


class EnoughError(Exception):
    pass


@pytest.mark.parametrize("compiled", [False, True])
def test_a_callback_that_raises_leaves_no_trace(compiled: bool) -> None:
    calls = []

    def stop_once(step: torch2ebm.InferenceStep) -> None:
        calls.append(step.step)
        if len(calls) == 2:
            raise EnoughError("enough")

    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    twin = copy.deepcopy(module)
    model = attached(module, torch2ebm.PredictiveCoding(steps=4, lr=0.1, on_step=stop_once, compile=compiled))
    before = copy.deepcopy(module.state_dict())
    torch.manual_seed(3)
    loss = F.cross_entropy(model(X), Y)
    with pytest.raises(EnoughError, match="enough"):
        loss.backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert calls == [1, 2] and same(dict(module.state_dict()), dict(before))  # running statistics, too
    torch.manual_seed(3)
    F.cross_entropy(model(X), Y).backward()
    other = attached(twin, torch2ebm.PredictiveCoding(steps=4, lr=0.1, compile=compiled))
    torch.manual_seed(3)
    F.cross_entropy(other(X), Y).backward()
    assert same(gradients(model), gradients(other))


def test_a_callback_may_ask_the_model_for_its_energy() -> None:
    found: list[tuple[float, float]] = []
    module = net()

    def ask(step: torch2ebm.InferenceStep) -> None:
        terms = model.energy(step.value, X, loss_fn=F.cross_entropy, target=Y)
        found.append((step.energy, float(terms.total.detach().sum())))

    model = attached(module, torch2ebm.PredictiveCoding(steps=3, lr=0.2, on_step=ask))
    F.cross_entropy(model(X), Y).backward()
    assert len(found) == 3 and all(ours == pytest.approx(theirs, rel=1e-12) for ours, theirs in found)


def test_it_is_no_setting_that_a_checkpoint_or_an_equal_algorithm_knows() -> None:
    one, other = (torch2ebm.PredictiveCoding(steps=3, on_step=call) for call in (print, None))
    assert one == other and "on_step" not in repr(one)
    assert dataclasses.replace(one, steps=4).on_step is print
    module = net()
    optimizers = [
        torch2ebm.EnergyOptimizer(torch.optim.SGD(m.parameters(), lr=0.1), torch2ebm.convert(m), algorithm)
        for m, algorithm in ((module, one), (copy.deepcopy(module), other))
    ]
    optimizers[1].load_state_dict(optimizers[0].state_dict())  # no warning: tests make errors of them


def test_no_function_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"on_step=\.\.\..*'print'"):
        torch2ebm.PredictiveCoding(on_step="print")


def test_a_precision_that_learns_is_in_the_energy_that_is_seen() -> None:
    precision = torch2ebm.Precision(5, start=2.0).double()
    nudging = torch2ebm.OneSided(1.0)
    model, seen = steps_of(solver=torch2ebm.GradientDescent(4, 0.1), nudging=nudging, precisions={"0": precision})
    assert [step.energy for step in seen] == pytest.approx(model.state.relaxation.energy[1:], rel=1e-9)
