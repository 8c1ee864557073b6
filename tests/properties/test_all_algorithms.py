"""What holds for every algorithm when something goes wrong, and over many steps.

test_faults, test_bad_input and test_steady go deeper, with batch norm and dropout, for algorithms that take these; here
is a net that all of them take.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from algorithms_list import ALL, ROWS, TESTS
from helpers import in_threads, same
from test_faults import InterruptedAt, no_cpu_memory, no_memory, points
from test_steady import deterministic, live_tensors
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import DivergenceError, NonFiniteError, NumericalError, OutOfMemoryError, Torch2EBMError

# test_bad_input and test_steady go deeper with those
OTHERS = {row.name: row.algorithm for row in ROWS if "test_bad_input" not in row.also}
every_other = pytest.mark.parametrize("algorithm", OTHERS.values(), ids=OTHERS)
every_algorithm = pytest.mark.parametrize("algorithm", ALL.values(), ids=ALL)
LABELS = torch.tensor([0, 1, 2, 0, 1])


def test_no_algorithm_is_left_out() -> None:
    public = {
        value
        for name in torch2ebm.__all__
        if isinstance(value := getattr(torch2ebm, name), type) and issubclass(value, torch2ebm.Algorithm)
    }
    assert {type(algorithm) for algorithm in ALL.values()} == public - {torch2ebm.Algorithm}


def test_the_list_names_each_row_once_and_files_that_there_are() -> None:
    assert len(ALL) == len(ROWS)
    for kind, name in {type(row.algorithm).__name__: row.name for row in reversed(ROWS)}.items():
        assert name == kind  # the first row of a class has its name
    there = {path.stem for path in TESTS.rglob("*.py")}
    assert {file for row in ROWS for file in row.also} <= there


class Training:
    """Three layers whose tanh turns infinity into 1, and a linear one."""

    def __init__(self, algorithm: torch2ebm.Algorithm, seed: int = 0, module: nn.Module | None = None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = module or nn.Sequential(
                *(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
            )
            self.x = torch.randn(5, 4)
        self.model = torch2ebm.convert(self.net)
        self.inner = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.5)
        self.optimizer = torch2ebm.EnergyOptimizer(self.inner, self.model, algorithm)

    def backward(self, x: Any = None, scale: float = 1.0) -> None:
        self.optimizer.zero_grad()
        (scale * F.cross_entropy(self.model(self.x if x is None else x), LABELS)).backward()

    def train(self, steps: int) -> dict[str, Tensor]:
        for _ in range(steps):
            self.backward()
            self.optimizer.step()
        return self.net.state_dict()

    def snapshot(self) -> dict[str, Any]:
        return {
            "net": {name: t.nan_to_num(nan=12345.0) for name, t in self.net.state_dict().items()},  # NaN is as NaN
            "grad": [None if p.grad is None else p.grad.clone() for p in self.net.parameters()],
            "optimizer": copy.deepcopy(self.inner.state_dict()),
        }


@contextmanager
def nothing_changes(training: Training) -> Iterator[None]:
    before = training.snapshot()
    yield
    after = training.snapshot()
    assert [part for part in before if not same(before[part], after[part])] == []


def trained(algorithm: torch2ebm.Algorithm) -> Training:
    training = Training(algorithm)
    training.train(1)
    training.net.zero_grad()
    return training


def assert_goes_on_as_if_nothing_had_been(training: Training, algorithm: torch2ebm.Algorithm) -> None:
    found, expected = training.train(1), trained(algorithm).train(1)
    if getattr(algorithm, "lr", None) == "auto":  # what was refused is captured anew, and its step is measured anew
        assert all(torch.allclose(found[name], expected[name], rtol=0.05, atol=1e-4) for name in expected)
    else:
        assert same(found, expected)


# ---- NaN and infinity


@every_other
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", ["0.weight", "2.weight", "4.weight", "6.weight", "0.bias", "2.bias", "4.bias"])
def test_a_weight_that_is_no_number_is_named_though_a_tanh_hides_it(
    algorithm: torch2ebm.Algorithm, path: str, bad: float
) -> None:
    training = trained(algorithm)
    tensor = training.net.state_dict()[path]
    kept = tensor.clone()
    tensor.view(-1)[1] = bad
    with nothing_changes(training), pytest.raises(NonFiniteError, match=rf"'{path}', feed-forward pass: got 1 of "):
        training.backward()
    tensor.copy_(kept)
    assert_goes_on_as_if_nothing_had_been(training, algorithm)


def test_plain_torch_says_nothing_of_an_infinite_weight_behind_a_tanh() -> None:
    """The negative twin: the loss is finite, and so are the gradients behind the first layer."""
    net = Training(ALL["Backprop"]).net
    net[0].bias.data[1] = float("inf")
    loss = F.cross_entropy(net(torch.randn(5, 4)), LABELS)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in net.parameters())


@every_other
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_input_that_is_no_number_is_named(algorithm: torch2ebm.Algorithm, bad: float) -> None:
    training = trained(algorithm)
    x = training.x.clone()
    x[3, 2] = bad
    with nothing_changes(training), pytest.raises(NonFiniteError, match=r"input 0.* 1 of 20 elements"):
        training.backward(x)
    assert_goes_on_as_if_nothing_had_been(training, algorithm)


@every_other
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_target_that_is_no_number_is_found_before_inference(algorithm: torch2ebm.Algorithm, bad: float) -> None:
    training = trained(algorithm)
    target = torch.zeros(5, 3)
    target[3, 2] = bad
    says = r"(the loss|^6), (backward|feed-forward).*target"
    with nothing_changes(training), pytest.raises(NonFiniteError, match=says):
        F.mse_loss(training.model(training.x), target).backward()
    assert_goes_on_as_if_nothing_had_been(training, algorithm)


class Overflowing(nn.Module):
    """An infinity between one layer and its tanh, in no parameter and no prediction of the model."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.depth = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), depth
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x)
            x = torch.tanh(torch.exp(1000 * x) if index == self.depth else x)
        return self.last(x)


@every_algorithm
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_an_overflow_that_a_tanh_hides_moves_no_weight(algorithm: torch2ebm.Algorithm, depth: int) -> None:
    """Every error message names a layer, a parameter or a step; those of equilibria refuse such a layer before."""
    training = Training(algorithm, module=Overflowing(depth))
    before = copy.deepcopy(training.net.state_dict())
    with pytest.raises(Torch2EBMError) as caught:
        training.train(1)
    refused_before = algorithm.defines_output and not isinstance(caught.value, NumericalError)
    assert refused_before or isinstance(caught.value, (NonFiniteError, DivergenceError)), caught.value
    assert any(word in str(caught.value) for word in ("layers.", "inference step"))
    assert same(training.net.state_dict(), before)


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.LoneNodeWarning")  # at depth 0 there is one linear layer
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_prediction_that_is_no_number_names_its_node(depth: int) -> None:
    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x)

    parts = [part for _ in range(3) for part in (nn.Linear(4, 4), nn.Tanh())]
    parts[2 * depth + 1] = Logarithm()
    training = Training(ALL["ZeroDivergence"], module=nn.Sequential(*parts, nn.Linear(4, 3)))
    says = rf"prediction of node '{2 * depth}', feed-forward pass"
    with nothing_changes(training), pytest.raises(NonFiniteError, match=says):
        training.backward()


# ---- interruptions and memory


@every_other
def test_an_interruption_at_any_line_leaves_all_as_before(algorithm: torch2ebm.Algorithm) -> None:
    probe, training = trained(algorithm), trained(algorithm)
    for each in (probe, probe, training, training):  # recorded programs run fewer lines the second and third time
        each.backward()
        each.net.zero_grad()
    with InterruptedAt() as counting:
        probe.backward()
    for line in points(counting.lines)[::3]:
        with nothing_changes(training), pytest.raises(KeyboardInterrupt), InterruptedAt(line):
            training.backward()
    assert_goes_on_as_if_nothing_had_been(training, algorithm)


@every_other
@pytest.mark.parametrize("fails", [no_memory, no_cpu_memory])
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_without_memory_all_is_as_before(
    algorithm: torch2ebm.Algorithm, part: str, fails: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = trained(algorithm)
    with monkeypatch.context() as patch, nothing_changes(training):
        patch.setattr(type(algorithm), part, fails)
        with pytest.raises(OutOfMemoryError, match=r"smaller batch.*fewer inference steps.*coarser nodes"):
            training.backward()
    assert_goes_on_as_if_nothing_had_been(training, algorithm)


# ---- twenty inputs that do not fit


class Embedding(nn.Module):
    """Two inputs, numbers and indices, and a convolution that needs three of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.convolution = nn.Embedding(7, 4), nn.Conv1d(2, 4, 3)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.last(torch.tanh(self.convolution(x).mean(2) + self.embedding(index)))


X, INDEX = torch.linspace(-1, 1, 60).reshape(5, 2, 6), torch.tensor([0, 6, 3, 3, 1])
UNFIT: dict[str, tuple[Any, ...]] = {
    "channels": (torch.ones(5, 3, 6), INDEX),
    "shorter than the kernel": (torch.ones(5, 2, 2), INDEX),
    "a rank more": (torch.ones(5, 2, 6, 1), INDEX),
    "a rank less": (torch.ones(5), INDEX),
    "double": (X.double(), INDEX),
    "half": (X.half(), INDEX),
    "bfloat16": (X.bfloat16(), INDEX),
    "integers": (X.long(), INDEX),
    "complex": (X.to(torch.complex64), INDEX),
    "Booleans": (X > 0, INDEX),
    "meta": (X.to("meta"), INDEX),
    "a second input on meta": (X, INDEX.to("meta")),
    "no sample": (X[:0], INDEX[:0]),
    "a batch of another size": (X, INDEX[:3]),
    "an index that is too large": (X, INDEX + 1),
    "a negative index": (X, INDEX - 1),
    "an index that is a float": (X, INDEX.float()),
    "no second input": (X,),
    "a third input": (X, INDEX, X),
    "a list": ([[1.0, 2.0]], INDEX),
    "an array": (np.ones((5, 2, 6), dtype=np.float32), INDEX),
    "nothing": (None, INDEX),
}


@pytest.mark.parametrize(
    "algorithm", [ALL[name] for name in ("PredictiveCoding", "ZeroDivergence", "IncrementalPredictiveCoding")]
)
@pytest.mark.parametrize("arguments", UNFIT.values(), ids=UNFIT)
def test_an_input_that_does_not_fit_is_refused_before_any_relaxation(
    algorithm: torch2ebm.Algorithm, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(training: Training) -> dict[str, Tensor]:
        F.cross_entropy(training.model(X, INDEX), LABELS).backward()
        training.optimizer.step()
        return copy.deepcopy(training.net.state_dict())

    torch.manual_seed(0)
    net = Embedding()
    training, twin = Training(algorithm, module=net), Training(algorithm, module=copy.deepcopy(net))
    assert same(step(training), step(twin))
    with monkeypatch.context() as patch, nothing_changes(training):
        patch.setattr(type(algorithm), "backward", lambda *_: pytest.fail("relaxed"))
        with pytest.raises(Torch2EBMError):
            F.cross_entropy(training.model(*arguments), LABELS).backward()
    assert same(step(training), step(twin))


@every_other
def test_a_batch_of_one_is_a_step_and_one_of_none_is_refused(algorithm: torch2ebm.Algorithm) -> None:
    training = trained(algorithm)
    with nothing_changes(training), pytest.raises(Torch2EBMError, match="a batch of 0"):
        training.model(training.x[:0])
    before = copy.deepcopy(training.net.state_dict())
    F.cross_entropy(training.model(training.x[:1]), LABELS[:1]).backward()
    training.optimizer.step()
    assert not same(training.net.state_dict(), before)


# ---- long runs, equal runs, other orders, other threads


@every_other
def test_steps_leave_no_tensor(algorithm: torch2ebm.Algorithm) -> None:
    training = Training(algorithm)
    training.train(5)
    before = live_tensors()
    training.train(20)
    assert live_tensors() == before


@every_other
def test_two_runs_are_equal_bit_for_bit_with_deterministic_algorithms(algorithm: torch2ebm.Algorithm) -> None:
    with deterministic():
        first, second = Training(algorithm), Training(algorithm)
        start = copy.deepcopy(first.net.state_dict())
        assert same(first.train(10), second.train(10))
    assert not same(start, first.net.state_dict())


@every_other
@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [2, 0, 4, 1, 3]], ids=str)
def test_the_order_of_a_batch_changes_nothing(algorithm: torch2ebm.Algorithm, order: list[int]) -> None:
    """1e-6 of the largest gradient in double precision: also where a solver stops by a tolerance of its own."""
    one, other = Training(algorithm), Training(algorithm)
    for each in (one, other):
        each.net.double()
    F.cross_entropy(one.model(one.x.double()), LABELS).backward()
    F.cross_entropy(other.model(other.x.double()[order]), LABELS[order]).backward()
    largest = max(float(p.grad.abs().max()) for p in one.net.parameters())
    for ours, theirs in zip(one.net.parameters(), other.net.parameters(), strict=True):
        assert float((ours.grad - theirs.grad).abs().max()) <= 1e-6 * largest


@every_other
def test_threads_with_models_of_their_own_equal_serial_runs(algorithm: torch2ebm.Algorithm) -> None:
    serial = [Training(algorithm, seed).train(5) for seed in range(4)]
    trainings = [Training(algorithm, seed) for seed in range(4)]
    parallel = in_threads([partial(training.train, 5) for training in trainings])
    assert [seed for seed in range(4) if not same(dict(parallel[seed]), dict(serial[seed]))] == []


@every_other
def test_detach_leaves_no_hook_and_plain_backprop(algorithm: torch2ebm.Algorithm) -> None:
    training = trained(algorithm)
    twin = copy.deepcopy(training.net)
    training.optimizer.detach()
    gc.collect()
    for module in training.model.modules():
        assert [name for name, value in vars(module).items() if "hooks" in name and value] == []
    for parameter in training.net.parameters():
        assert not parameter._backward_hooks and not parameter._post_accumulate_grad_hooks
    for net in (training.model, twin):
        F.cross_entropy(net(training.x), LABELS).backward()
    for ours, theirs in zip(training.net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
