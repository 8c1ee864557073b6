"""Ready monitors: files and services are handed the very numbers; steps and angles are those of plain torch."""

import copy
import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ConfigurationError
from torch2ebm.monitor import CSVFile, Several, StepDetails, StepMonitor, TensorBoard, WeightsAndBiases

LR = 0.1
LOSS = nn.functional.cross_entropy


def problem(drop: float = 0.0) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    parts = (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(drop), nn.Linear(8, 3))
    return nn.Sequential(*parts).double(), torch.randn(12, 6).double(), torch.arange(12) % 3


class Kept:
    """A monitor that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, float]] = []

    def __call__(self, name: str, value: float, step: int) -> None:
        self.rows.append((step, name, value))

    def of(self, name: str) -> dict[int, float]:
        return {step: value for step, found, value in self.rows if found == name}


def attached(net: nn.Module, monitor: Any, algorithm: torch2ebm.Algorithm | None = None) -> torch2ebm.EnergyOptimizer:
    sgd, rule = torch.optim.SGD(net.parameters(), lr=LR), algorithm or torch2ebm.PredictiveCoding()
    return torch2ebm.EnergyOptimizer(sgd, torch2ebm.convert(net), rule, monitor=monitor)


def train(
    monitor: Any, steps: int = 3, algorithm: torch2ebm.Algorithm | None = None, drop: float = 0.0
) -> tuple[nn.Sequential, torch2ebm.EnergyModel]:
    net, x, y = problem(drop)
    optimizer = attached(net, monitor, algorithm)
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(optimizer.model(x), y).backward()
        optimizer.step()
    return net, optimizer.model


# ---- files and services


def rows_of(path: Path) -> list[tuple[int, str, float]]:
    with path.open(newline="") as file:
        return [(int(row["step"]), row["name"], float(row["value"])) for row in csv.DictReader(file)]


def test_a_csv_file_has_the_numbers_to_the_last_digit_after_every_step(tmp_path: Path) -> None:
    kept, file = Kept(), CSVFile(tmp_path / "new" / "run.csv")
    train(Several(kept, file))
    assert kept.rows and rows_of(file.path) == kept.rows  # before it is closed
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file("loss", 1.0, 0)


def test_a_csv_file_that_exists_is_continued_on_request_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    with CSVFile(path) as first:
        first("loss", 1.5, 0)
    with pytest.raises(ConfigurationError, match="append=True"):
        CSVFile(path)
    with CSVFile(path, append=True) as second:
        second("loss", 0.5, 1)
    assert rows_of(path) == [(0, "loss", 1.5), (1, "loss", 0.5)]


def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("a,b\n1,2\n")
    for append in (False, True):
        with pytest.raises(ConfigurationError, match="begins with 'a,b'"):
            CSVFile(path, append=append)
    assert path.read_text() == "a,b\n1,2\n"


def test_tensorboard_is_handed_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class SummaryWriter:
        def __init__(self, log_dir: str | None, **settings: Any) -> None:
            self.log_dir, self.settings, self.kept, self.closed = log_dir, settings, Kept(), False
            made.append(self)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.kept(name, value, step)

        def close(self) -> None:
            self.closed = True

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    kept, board = Kept(), TensorBoard(Path("runs"), flush_secs=5)
    train(Several(kept, board))
    board.close()
    (writer,) = made
    assert writer.log_dir == "runs" and writer.settings == {"flush_secs": 5} and writer.closed
    assert kept.rows and writer.kept.rows == kept.rows


def test_weights_and_biases_is_handed_every_number_under_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        def __init__(self, **settings: Any) -> None:
            self.settings, self.rows, self.finished = settings, [], False

        def log(self, numbers: dict[str, float], step: int) -> None:
            self.rows.extend((step, name, value) for name, value in numbers.items())

        def finish(self) -> None:
            self.finished = True

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Run))
    kept, begun, own = Kept(), WeightsAndBiases(project="p"), WeightsAndBiases(Run())
    train(Several(kept, begun, own))
    begun.close()
    assert begun.run.settings == {"project": "p"} and begun.run.finished and not own.run.finished
    assert kept.rows and begun.run.rows == own.run.rows == kept.rows
    with pytest.raises(ConfigurationError, match="settings project beside a run"):
        WeightsAndBiases(own.run, project="p")


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [(TensorBoard, "torch.utils.tensorboard", "tensorboard"), (WeightsAndBiases, "wandb", "wandb")],
)
def test_a_missing_package_is_named(
    make: Callable[[], object], module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=rf"pip install torch2ebm\[{extra}\]"):
        make()


# ---- steps and angles


def test_an_update_of_sgd_is_its_rate_times_gradient_over_weight() -> None:
    kept = Kept()
    net, x, y = problem()
    with torch.no_grad():
        net[1].bias.zero_()
    optimizer = attached(net, StepDetails(kept, every=2))
    expected: dict[int, dict[str, float]] = {}
    for step in range(5):
        optimizer.zero_grad()
        LOSS(optimizer.model(x), y).backward()
        sizes = {name: (float(p.grad.norm()), float(p.detach().norm())) for name, p in net.named_parameters()}
        expected[step] = {name: LR * moved / size for name, (moved, size) in sizes.items() if size}
        optimizer.step()
    assert "1.bias" not in expected[0] and "1.bias" in expected[2]  # zero weights have no ratio
    for name in expected[2]:
        if name == "0.bias":  # a batch norm takes it away: its gradient is rounding
            continue
        told = kept.of(f"update/{name}")
        assert list(told) == [step for step in (0, 2, 4) if name in expected[step]]
        for step, ratio in told.items():
            assert ratio == pytest.approx(expected[step][name], rel=1e-9)
    assert not any(name.startswith("angle") for _, name, _ in kept.rows)
    assert list(kept.of("loss")) == [0, 1, 2, 3, 4]  # all numbers are handed on


def degrees(a: Tensor, b: Tensor) -> float:
    return math.degrees(torch.acos(torch.dot(a, b) / a.norm() / b.norm()))


def test_an_angle_is_that_of_the_two_gradients_after_the_step() -> None:
    kept, algorithm = Kept(), torch2ebm.PredictiveCoding(steps=5, lr=0.2)
    _, x, y = problem()
    trained, _ = train(StepDetails(kept, every=1, loss_fn=LOSS, batch=(x, y)), 1, algorithm)
    found = []
    for rule in (algorithm, None):
        twin, _, _ = problem()
        twin.load_state_dict(copy.deepcopy(trained.state_dict()))
        LOSS((twin if rule is None else attached(twin, None, rule).model)(x), y).backward()
        found.append({name: p.grad.flatten() for name, p in twin.named_parameters()})
    ours, exact = found
    whole = degrees(torch.cat(list(ours.values())), torch.cat(list(exact.values())))
    assert whole > 0.1 and kept.of("angle")[0] == pytest.approx(whole, abs=1e-6)
    for name in ("0.weight", "1.weight", "4.weight", "4.bias"):
        assert kept.of(f"angle/{name}")[0] == pytest.approx(degrees(ours[name], exact[name]), abs=1e-5)


def test_the_angle_of_an_exact_gradient_is_zero() -> None:
    kept, (_, x, y) = Kept(), problem()
    train(StepDetails(kept, every=1, loss_fn=LOSS, batch=(x, y)), 2, torch2ebm.ZeroDivergence())
    assert len(kept.of("angle")) == 2 and max(kept.of("angle").values()) < 1e-6


def test_looking_changes_nothing() -> None:
    """Weights, batch statistics, random numbers and the state are those of a training that nobody watches."""
    _, x, y = problem()
    ends = []
    for monitor in (None, StepDetails(Kept(), every=2, loss_fn=LOSS, batch=(x, y))):
        net, model = train(monitor, 5, drop=0.3)
        ends.append((net.state_dict(), torch.get_rng_state(), dict(model.state.error.items())))
    (weights, random, errors), (weights_too, random_too, errors_too) = ends
    assert all(torch.equal(weights[name], weights_too[name]) for name in weights)
    assert torch.equal(random, random_too)
    assert errors and all(torch.equal(errors[name], errors_too[name]) for name in errors)


# ---- the contract


class Looking(Kept):
    """Also keeps a weight, before and after each step."""

    def before_step(self, model: torch2ebm.EnergyModel, step: int) -> None:
        self.rows.append((step, "before", float(model.get_parameter("0.weight").detach().sum())))

    def after_step(self, model: torch2ebm.EnergyModel, step: int) -> None:
        self.rows.append((step, "after", float(model.get_parameter("0.weight").detach().sum())))


AROUND: dict[str, Callable[[Looking], Any]] = {
    "itself": lambda monitor: monitor,
    "several": lambda monitor: Several(Kept(), monitor),
    "details": lambda monitor: StepDetails(monitor, every=7),
    "both": lambda monitor: Several(Kept(), StepDetails(monitor)),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_a_monitor_sees_the_model_before_and_after_a_step(around: Callable[[Looking], Any]) -> None:
    inner = Looking()
    train(around(inner), 2)
    steps = [(step, name) for step, name, _ in inner.rows if name in ("before", "after")]
    assert steps == [(0, "before"), (0, "after"), (1, "before"), (1, "after")]
    before, after = inner.of("before"), inner.of("after")
    assert before[0] != after[0] == before[1] != after[1]
    names = [name for step, name, _ in inner.rows if step == 0]
    assert names[0] == "before" and names[-1] == "after" and "loss" in names


def test_what_is_raised_before_a_step_leaves_the_weights() -> None:
    class Refusing(Looking):
        def before_step(self, model: torch2ebm.EnergyModel, step: int) -> None:
            raise KeyError(step)

    net, x, y = problem()
    monitor = Refusing()
    optimizer = attached(net, monitor)
    LOSS(optimizer.model(x), y).backward()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    with pytest.raises(KeyError):
        optimizer.step()
    assert all(map(torch.equal, before, net.parameters())) and monitor.rows == []
    assert not isinstance(Kept(), StepMonitor) and isinstance(monitor, StepMonitor)


MISTAKES: dict[str, Callable[[], object]] = {
    "got 3;": lambda: Several(print, 3),  # type: ignore[arg-type]
    "got None;": lambda: StepDetails(None),  # type: ignore[arg-type]
    "every": lambda: StepDetails(print, every=0),
    "a loss_fn alone": lambda: StepDetails(print, loss_fn=LOSS),
    "a batch alone": lambda: StepDetails(print, batch=(1, 2)),
}


@pytest.mark.parametrize("says", MISTAKES)
def test_illegal_arguments_are_named(says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        MISTAKES[says]()


@pytest.mark.parametrize("path", [3, None, b"run.csv", ""])
def test_what_is_no_path_of_a_file_is_refused(path: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"CSVFile\(path=...\): got .* expected the path of a file"):
        CSVFile(path)
