"""Classes of a user's own file are as good as the library's: trained, compared, pickled, recorded."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import own_extensions
import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, same
from own_extensions import LooseDescent, Negative, Partial, PlainDescent, Swept, Weighted
from test_extend import MAY_IMPORT, imports
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import CheckpointError, CheckpointWarning, DivergenceError
from torch2ebm.programs.program import Program

X, LABELS = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4), torch.tensor([0, 1, 2, 0, 1])
HERE = Path(own_extensions.__file__)


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()


class Learner:
    """A net that is asked for gradients again and again, under one algorithm."""

    def __init__(self, algorithm: torch2ebm.Algorithm) -> None:
        self.net = network()
        self.model = torch2ebm.convert(self.net)
        self.optimizer = torch2ebm.EnergyOptimizer(
            torch.optim.SGD(self.net.parameters(), lr=0.1), self.model, algorithm
        )

    def gradients(self) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(X), LABELS).backward()
        return {name: parameter.grad.clone() for name, parameter in self.net.named_parameters()}


def gradients(algorithm: torch2ebm.Algorithm) -> dict[str, Tensor]:
    return Learner(algorithm).gradients()


EXACT = gradients(torch2ebm.Backprop())


def test_the_users_file_needs_the_door_alone() -> None:
    assert imports(f"```python\n{HERE.read_text()}\n```\n") - {"sys"} <= MAY_IMPORT


# ---- an algorithm


def test_an_algorithm_trains_and_chooses_its_nodes() -> None:
    learner = Learner(Swept())
    assert relative_error(learner.gradients(), EXACT) <= 1e-12
    assert list(learner.model.nodes) == list(torch2ebm.convert(network(), "module", X).nodes)
    assert list(learner.model.nodes) != list(torch2ebm.convert(network(), "layer", X).nodes)
    before = copy.deepcopy(learner.net.state_dict())
    learner.optimizer.step()
    for name, gradient in EXACT.items():
        torch.testing.assert_close(learner.net.state_dict()[name], before[name] - 0.1 * gradient, rtol=1e-12, atol=0)


def test_what_forward_returns_belongs_to_its_call() -> None:
    """Two forwards before a backward; the algorithm itself checks that it gets back what it kept of this call."""
    learner = Learner(Swept())
    first, second = learner.model(X), learner.model(2 * X)
    (F.cross_entropy(second, LABELS) + F.cross_entropy(first, LABELS)).backward()
    twin = network()
    (F.cross_entropy(twin(2 * X), LABELS) + F.cross_entropy(twin(X), LABELS)).backward()
    for ours, theirs in zip(learner.net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def test_an_algorithm_is_compared_by_name_and_by_steps() -> None:
    found = torch2ebm.compare(network(), F.cross_entropy, (X, LABELS), [Swept(), Swept(gain=2.0)], steps=[1, 2])
    assert found.algorithms == ("Swept", "Swept(gain=2.0, steps=1)")
    ratios = [found.agreement[name]["0.weight"].norm_ratio for name in found.algorithms]
    assert ratios == pytest.approx([1, 2], rel=1e-12)
    assert found.along["Swept"].keys() == {1, 2}


def test_a_checkpoint_names_it() -> None:
    saved = Learner(Swept()).optimizer.state_dict()
    with pytest.warns(CheckpointWarning, match=r"Swept with gain=1\.0 \(now 2\.0\)"):
        Learner(Swept(gain=2.0)).optimizer.load_state_dict(saved)
    with pytest.raises(CheckpointError, match=r"Swept.*Backprop"):
        Learner(torch2ebm.Backprop()).optimizer.load_state_dict(saved)


def test_an_error_of_its_own_leaves_all_as_before() -> None:
    learner = Learner(Swept(gain=1e7))
    before = copy.deepcopy(learner.net.state_dict())
    with pytest.raises(DivergenceError, match=r"a gain of 1e\+07"):
        learner.gradients()
    assert same(dict(learner.net.state_dict()), dict(before))
    assert all(parameter.grad is None for parameter in learner.net.parameters())


def test_a_model_is_unpickled_with_it_in_another_process() -> None:
    net = network().float()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, Swept(gain=2.0))
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", f"import own_extensions, runpy; runpy.run_path({str(HERE)!r}, run_name='__main__')"],
        input=pickle.dumps(model),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    model(torch.ones(2, 4)).square().sum().backward()
    expected = [parameter.grad.sum().item() for parameter in net.parameters()]
    assert done.stdout.decode().strip() == f"{expected} {optimizer.algorithm}"


# ---- what predictive coding and equilibrium propagation are given


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", [PlainDescent, LooseDescent])
@pytest.mark.parametrize("rates", [(0.1, 0.3), (torch.tensor(0.1), torch.tensor(0.3))], ids=["numbers", "tensors"])
def test_a_solver_is_taken_whatever_its_class_and_a_changed_setting_is_seen(
    kind: Any, rates: tuple[Any, Any], compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Program, "compile", lambda self: None)
    solver = kind(lr=rates[0])
    learner = Learner(torch2ebm.PredictiveCoding(solver=solver, compile=compile))
    for rate in rates:
        solver.lr = rate
        expected = gradients(torch2ebm.PredictiveCoding(solver=torch2ebm.GradientDescent(6, float(rate))))
        for _ in range(2):  # the second time by programs
            assert relative_error(learner.gradients(), expected) <= 1e-6  # 0.1 as a float32
    assert relative_error(gradients(torch2ebm.PredictiveCoding(6, 0.1)), expected) > 1e-2


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("weights", [(2.0, 0.5), (torch.tensor(2.0), torch.tensor(0.5))], ids=["numbers", "tensors"])
def test_an_energy_is_taken_and_a_changed_setting_is_seen(
    weights: tuple[Any, Any], compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Program, "compile", lambda self: None)
    energy = Weighted(weights[0])
    learner = Learner(torch2ebm.PredictiveCoding(6, 0.1, energies={"0": energy}, compile=compile))
    found = []
    for weight in weights:
        energy.weight = weight
        found.append(gradients(torch2ebm.PredictiveCoding(6, 0.1, precisions={"0": float(weight)})))
        for _ in range(2):
            assert relative_error(learner.gradients(), found[-1]) <= 1e-12
    assert relative_error(*found) > 1e-2


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("shares", [(1.0, 0.5), (torch.tensor(1.0), torch.tensor(0.5))], ids=["numbers", "tensors"])
def test_an_update_is_taken_and_a_changed_setting_is_seen(
    shares: tuple[Any, Any], compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Program, "compile", lambda self: None)
    update = Partial(shares[0])
    settings: dict[str, Any] = {"free_steps": 12, "nudged_steps": 3, "feedback": 0.1}
    learner = Learner(torch2ebm.EquilibriumPropagation(update=update, compile=compile, **settings))
    found = []
    for damping, share in zip((0.0, 0.5), shares, strict=True):
        update.share = share
        found.append(gradients(torch2ebm.EquilibriumPropagation(damping=damping, **settings)))
        for _ in range(2):
            assert relative_error(learner.gradients(), found[-1]) <= 1e-9
        assert learner.model.state.phases[0].update == "partial"
    assert relative_error(*found) > 1e-4


def test_a_negative_phase_and_a_positive_one_average_to_a_symmetric_nudging() -> None:
    def nudged(nudging: torch2ebm.extend.Nudging) -> dict[str, Tensor]:
        return gradients(torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent(20, 0.3), nudging=nudging))

    minus, plus = nudged(Negative(0.05)), nudged(torch2ebm.OneSided(0.05))
    mean = {name: (minus[name] + plus[name]) / 2 for name in minus}
    assert relative_error(mean, nudged(torch2ebm.Symmetric(0.05))) <= 1e-9
    assert relative_error(minus, plus) > 1e-3
