"""A run that is saved at step 50 and resumed in a new process is, bit for bit, the run that never stopped.

Run as a script, this file is that new process.
"""

import io
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from algorithms_list import taken_by
from helpers import same
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import CheckpointError, CheckpointWarning

HALF, WHOLE = 50, 100

# a random sign, since what has been drawn is part of a checkpoint
RANDOM_SIGN = torch2ebm.EquilibriumPropagation(torch2ebm.RandomSign(0.5), 30, 5, feedback=0.3)
ALGORITHMS = {**taken_by(__file__), "EquilibriumPropagation": RANDOM_SIGN}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda net: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9),
    "Adam": lambda net: torch.optim.Adam(net.parameters(), lr=0.001, amsgrad=True),
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=0.001),
}
CASES = list(itertools.product(ALGORITHMS, OPTIMIZERS))


def network(hidden: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Dropout(0.3), nn.Linear(hidden, 3))


class Run:
    """A training run: everything that a checkpoint holds, and the loop."""

    def __init__(self, algorithm: str, optimizer: str) -> None:
        torch.manual_seed(0)
        self.net = network()
        # batch statistics and dropout have no equilibrium; there it is the nudge's sign that is drawn
        self.net.train(not ALGORITHMS[algorithm].defines_output)
        self.model = torch2ebm.convert(self.net)
        self.optimizer = torch2ebm.EnergyOptimizer(OPTIMIZERS[optimizer](self.net), self.model, ALGORITHMS[algorithm])
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.02, total_steps=WHOLE)
        self.random = torch.get_rng_state()

    def train(self, first: int, end: int) -> None:
        torch.set_rng_state(self.random)
        for step in range(first, end):
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(5, 4, generator=generator), torch.randint(3, (5,), generator=generator)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.scheduler.step()
        self.random = torch.get_rng_state()

    def checkpoint(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": self.random,
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        self.random = checkpoint["random"]


def resume_all(folder: Path) -> None:
    for algorithm, optimizer in CASES:
        run = Run(algorithm, optimizer)
        run.load(torch.load(folder / f"{algorithm}-{optimizer}-half.pt", weights_only=True))
        run.train(HALF, WHOLE)
        torch.save(run.checkpoint(), folder / f"{algorithm}-{optimizer}-resumed.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Straight runs here, saved at half; then one new process resumes them all."""
    found = tmp_path_factory.mktemp("resume")
    for algorithm, optimizer in CASES:
        run = Run(algorithm, optimizer)
        run.train(0, HALF)
        torch.save(run.checkpoint(), found / f"{algorithm}-{optimizer}-half.pt")
        run.train(HALF, WHOLE)
        torch.save(run.checkpoint(), found / f"{algorithm}-{optimizer}-straight.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(found), str(torch.get_num_threads())]
    subprocess.run(command, check=True, env=environment, timeout=300)
    return found


@pytest.mark.parametrize(("algorithm", "optimizer"), CASES)
def test_a_resumed_run_is_the_straight_one_bit_for_bit(folder: Path, algorithm: str, optimizer: str) -> None:
    half, straight, resumed = (
        torch.load(folder / f"{algorithm}-{optimizer}-{part}.pt", weights_only=True)
        for part in ("half", "straight", "resumed")
    )
    assert same(straight, resumed)
    assert not any(same(half[part], straight[part]) for part in straight)


def test_without_the_generators_state_it_is_another_run(folder: Path) -> None:
    """The negative twin: dropout draws, so a checkpoint without ``random`` resumes something else."""
    run = Run("ZeroDivergence", "SGD")
    checkpoint = torch.load(folder / "ZeroDivergence-SGD-half.pt", weights_only=True)
    run.load({**checkpoint, "random": run.random})
    run.train(HALF, WHOLE)
    straight = torch.load(folder / "ZeroDivergence-SGD-straight.pt", weights_only=True)
    assert not same(run.checkpoint()["model"], straight["model"])


# ---- what a checkpoint says of itself


def optimizer_of(
    net: nn.Module, algorithm: torch2ebm.Algorithm, make: str = "Adam", *, step: bool = True
) -> torch2ebm.EnergyOptimizer:
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(OPTIMIZERS[make](net), model, algorithm)
    if step:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
        F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1])).backward()
        optimizer.step()
    return optimizer


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


class OtherNames(nn.Module):
    """As ``network()``, under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...]]] = {
    "another algorithm": (network, "ZeroDivergence", ("PredictiveCoding", "ZeroDivergence", "remove")),
    "a wider model": (lambda: network(7), "PredictiveCoding", ("0.weight (6, 4)", "0.weight (7, 4)", "remove")),
    "other names": (OtherNames, "PredictiveCoding", ("0.weight", "body.0.weight", "OtherNames", "remove")),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_of_something_else_is_refused_by_name_and_changes_nothing(
    case: tuple[Callable[[], nn.Module], str, tuple[str, ...]],
) -> None:
    make, algorithm, says = case
    saved = through_a_file(optimizer_of(network(), ALGORITHMS["PredictiveCoding"]).state_dict())
    other = optimizer_of(make(), ALGORITHMS[algorithm])
    before = through_a_file(other.state_dict())
    with pytest.raises(CheckpointError) as caught:
        other.load_state_dict(saved)
    assert [part for part in says if part not in str(caught.value)] == [], str(caught.value)
    assert same(through_a_file(other.state_dict()), before)


def test_the_remedy_that_the_message_names_works() -> None:
    saved = optimizer_of(network(), ALGORITHMS["PredictiveCoding"]).state_dict()
    other = optimizer_of(network(), ALGORITHMS["ZeroDivergence"], step=False)
    del saved["torch2ebm"]
    other.load_state_dict(saved)
    assert same(other.optimizer.state_dict()["state"], saved["state"])


def test_other_settings_of_the_same_algorithm_are_a_choice_and_no_other_checkpoint() -> None:
    saved = optimizer_of(network(), torch2ebm.PredictiveCoding(steps=3)).state_dict()
    other = optimizer_of(network(), torch2ebm.PredictiveCoding(steps=9, lr=0.3), step=False)
    before = other.state_dict()["torch2ebm"]
    with pytest.warns(CheckpointWarning, match=r"steps=3 \(now 9\), lr=0.1 \(now 0.3\)"):
        other.load_state_dict(saved)
    assert same(other.optimizer.state_dict(), {key: saved[key] for key in ("state", "param_groups")})
    assert other.state_dict()["torch2ebm"] == before


def test_the_same_settings_are_told_nothing() -> None:
    """The negative twin; and a checkpoint of before, which has no settings, has nothing to compare."""
    saved = optimizer_of(network(), torch2ebm.PredictiveCoding(steps=3)).state_dict()
    for _ in range(2):
        other = optimizer_of(network(), torch2ebm.PredictiveCoding(solver=torch2ebm.GradientDescent(3)), step=False)
        other.load_state_dict(saved)
        saved["torch2ebm"].pop("settings", None)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_wrapped_state_loads_into_the_bare_optimizer_and_back(make: str) -> None:
    wrapped = optimizer_of(network(), ALGORITHMS["PredictiveCoding"], make)
    saved = through_a_file(wrapped.state_dict())
    bare = OPTIMIZERS[make](network())
    bare.load_state_dict(saved)
    expected = wrapped.optimizer.state_dict()
    assert expected["state"] and same(bare.state_dict(), expected)
    other = optimizer_of(network(), ALGORITHMS["PredictiveCoding"], make, step=False)
    other.load_state_dict(through_a_file(bare.state_dict()))
    assert same(other.state_dict(), saved)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    resume_all(Path(sys.argv[1]))
