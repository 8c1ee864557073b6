"""Nothing leaks, nothing drifts: long runs, equal runs, other orders, other threads."""

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from algorithms_list import taken_by
from helpers import in_threads, same
from torch import Tensor, nn

import torch2ebm
from torch2ebm.engine.call import Call
from torch2ebm.graph.energy_graph import EnergyGraph

ALGORITHMS = taken_by(__file__)
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
LABELS = torch.tensor([0, 1, 2, 0, 1])


class Training:
    def __init__(self, algorithm: torch2ebm.Algorithm, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
            )
            self.x = torch.randn(5, 1, 4)
        self.net.train(not algorithm.defines_output)  # in train mode batch norm has no equilibrium
        self.attach(algorithm)

    def attach(self, algorithm: torch2ebm.Algorithm) -> None:
        self.model = torch2ebm.convert(self.net)
        inner = torch.optim.Adam(self.net.parameters(), lr=0.001)
        self.optimizer = torch2ebm.EnergyOptimizer(inner, self.model, algorithm)

    def train(self, steps: int) -> dict[str, Tensor]:
        for _ in range(steps):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x), LABELS).backward()
            self.optimizer.step()
        return self.net.state_dict()


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def resident() -> int:
    """Bytes; 0 where the system does not tell."""
    if not Path("/proc/self/statm").exists():
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def left_by(algorithm: torch2ebm.Algorithm, steps: int) -> tuple[int, int]:
    """How many tensors, and resident bytes, so many steps of training add."""
    training = Training(algorithm)
    training.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    training.x = training.x[:, 0]
    training.attach(algorithm)
    training.train(50)  # caches fill, the allocator's arenas too
    tensors, memory = live_tensors(), resident()
    training.train(steps)
    return live_tensors() - tensors, resident() - memory


QUICK = ("ZeroDivergence", "PredictiveCoding", "IncrementalPredictiveCoding", "EquilibriumPropagation", "ImplicitSGD")


@pytest.mark.parametrize(
    "algorithm",
    [pytest.param(each, id=name, marks=[pytest.mark.slow] * (name not in QUICK)) for name, each in ALGORITHMS.items()],
)
def test_500_steps_leave_no_tensor(algorithm: torch2ebm.Algorithm) -> None:
    tensors, _ = left_by(algorithm, 500)
    assert tensors <= 0  # below 0 where what earlier tests left in circles is freed meanwhile


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.slow
@every_algorithm
def test_5000_steps_leave_no_tensor_and_less_than_5_mib(algorithm: torch2ebm.Algorithm) -> None:
    """In a process of its own: what other tests gave back to the allocator would come and go."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        tensors, memory = process.submit(left_by, algorithm, 5000).result()
    assert tensors == 0
    assert memory < 5 * 2**20


@every_algorithm
def test_a_call_is_freed_without_the_collector(algorithm: torch2ebm.Algorithm) -> None:
    """A circle would hold the values of several batches until the collector comes by."""
    training = Training(algorithm)
    training.train(2)
    gc.collect()
    gc.disable()
    try:
        before = live_calls()  # of other tests, in what pytest keeps of them
        training.train(2)
        with torch.no_grad():
            training.model(training.x)
        assert live_calls() == before
    finally:
        gc.enable()


def live_calls() -> int:
    return sum(type(each) is Call for each in gc.get_objects())


def test_a_tensor_kept_a_step_would_be_seen() -> None:
    """The negative twin of the count: a list of weights holds one tensor a step."""
    training, kept = Training(ALGORITHMS["ZeroDivergence"]), []
    training.train(5)
    before = live_tensors()
    for _ in range(10):
        training.train(1)
        kept.append(training.net[0].bias.detach().clone())
    assert live_tensors() == before + len(kept)


@every_algorithm
def test_forwards_that_no_backward_answers_leave_nothing(algorithm: torch2ebm.Algorithm) -> None:
    training = Training(algorithm)
    training.train(20)
    for _ in range(20):
        training.model(training.x)  # the model keeps what sixteen of them did to its buffers
    before = live_tensors()
    for _ in range(100):
        training.model(training.x)
    assert live_tensors() == before


# ---- two runs


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@every_algorithm
def test_two_runs_are_equal_bit_for_bit_with_deterministic_algorithms(algorithm: torch2ebm.Algorithm) -> None:
    with deterministic():
        first, second = Training(algorithm), Training(algorithm)
        start = {name: value.clone() for name, value in first.net.state_dict().items()}
        assert same(first.train(20), second.train(20))
    assert not same(start, dict(first.net.state_dict()))


@every_algorithm
@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [2, 0, 4, 1, 3]], ids=str)
def test_the_order_of_a_batch_changes_nothing(algorithm: torch2ebm.Algorithm, order: list[int]) -> None:
    """Sums run in another order, so rounding differs: 1e-6 of the largest gradient, in single precision."""
    one, other = Training(algorithm), Training(algorithm)
    F.cross_entropy(one.model(one.x), LABELS).backward()
    F.cross_entropy(other.model(other.x[order]), LABELS[order]).backward()
    for ours, theirs in zip(one.net.parameters(), other.net.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() <= 1e-6


@every_algorithm
def test_threads_with_models_of_their_own_equal_serial_runs(algorithm: torch2ebm.Algorithm) -> None:
    serial = [Training(algorithm, seed).train(20) for seed in range(4)]
    trainings = [Training(algorithm, seed) for seed in range(4)]  # what is drawn comes from the one generator
    parallel = in_threads([partial(training.train, 20) for training in trainings])
    assert all(same(dict(parallel[seed]), dict(serial[seed])) for seed in range(4))


@every_algorithm
def test_detach_leaves_no_hook_and_no_reference(algorithm: torch2ebm.Algorithm) -> None:
    """As in test_optimizer; and what the model held for the algorithm is gone: another step is plain autograd's."""
    training, twin = Training(algorithm), Training(algorithm).net
    training.train(3)
    twin.load_state_dict(training.net.state_dict())
    training.optimizer.zero_grad()
    training.optimizer.detach()
    gc.collect()
    for module in training.model.modules():
        hooks = [name for name, value in vars(module).items() if "hooks" in name and value]
        assert hooks == []
    for parameter in training.net.parameters():
        assert not parameter._backward_hooks and not parameter._post_accumulate_grad_hooks
    for net in (training.model, twin):
        F.cross_entropy(net(training.x), LABELS).backward()
    for ours, theirs in zip(training.net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


class Annealed(nn.Module):
    """Has a number as an attribute and one as an argument; each makes another graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), 1.0

    def forward(self, x: Tensor, power: float = 1.0) -> Tensor:
        return torch.tanh(self.layer(x) * self.scale) * power


@pytest.mark.parametrize("where", ["attribute", "argument"])
def test_graphs_for_numbers_that_change_with_every_batch_are_forgotten(where: str) -> None:
    net = Annealed()
    model = torch2ebm.convert(net)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, torch2ebm.ZeroDivergence())
    x = torch.rand(5, 4)

    def graphs_after(steps: range) -> int:
        for step in steps:
            net.zero_grad()
            number = 1 + 0.01 * step
            net.scale = number if where == "attribute" else 1.0
            arguments = () if where == "attribute" else (number,)
            F.cross_entropy(model(x, *arguments), LABELS).backward()
            ours = net.layer.weight.grad
            (expected,) = torch.autograd.grad(F.cross_entropy(net(x, *arguments), LABELS), [net.layer.weight])
            assert torch.allclose(ours, expected, atol=1e-6)
        gc.collect()
        return sum(type(each) is EnergyGraph for each in gc.get_objects())

    before = graphs_after(range(33))
    assert graphs_after(range(33, 43)) == before
