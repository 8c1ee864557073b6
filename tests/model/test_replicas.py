"""Two processes with half a batch each are one process with the whole. Run as a script, this file is one of the two."""

import re
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from algorithms_list import taken_by
from helpers import same
from processes import RANKS, found_by_ranks, joined, needs_processes
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import torch2ebm
from torch2ebm import demo
from torch2ebm.errors import UnsynchronisedError, UnsynchronisedWarning

EXACT = 1e-11  # of sums in another order, in double precision, after some steps

ALGORITHMS = taken_by(__file__)
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
HOOKED = [
    "PredictiveCoding",
    "ZeroDivergence",
    "EquilibriumPropagation",
]  # all of whose gradients are those of backward


LEARNERS = [torch2ebm.PredictiveCoding, torch2ebm.IncrementalPredictiveCoding]


class Tied(nn.Module):
    """The same layer twice, and one that it is not."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.middle(x)))))


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator)


def trained(algorithm: str, steps: int, dtype: torch.dtype, parts: int = 1, rank: int | None = None) -> dict[str, Any]:
    """Weights after some steps of ``parts`` accumulated backwards: of one process, or of one of two on its half."""
    model: nn.Module = torch2ebm.convert(Tied().to(dtype))
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    called = model if rank is None else DistributedDataParallel(model)
    optimizer = torch2ebm.EnergyOptimizer(inner, called, ALGORITHMS[algorithm])
    for step in range(steps):
        optimizer.zero_grad()
        whole = [tensor.chunk(parts) for tensor in batch(step, dtype)]
        for part, (x, y) in enumerate(zip(*whole, strict=True)):
            if rank is not None:
                x, y = x.chunk(RANKS)[rank], y.chunk(RANKS)[rank]
            waits = isinstance(called, DistributedDataParallel) and part < parts - 1
            with called.no_sync() if waits else nullcontext():
                (F.cross_entropy(called(x), y) / parts).backward()
        optimizer.step()
    return dict(model.state_dict())


def passing_by(rank: int) -> str:
    """What is said of a forward with gradients outside the wrapper, and what is allowed there."""
    model = torch2ebm.convert(Tied())
    wrapper = DistributedDataParallel(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = torch2ebm.EnergyOptimizer(inner, wrapper, ALGORITHMS["PredictiveCoding"])
    x, y = batch(rank, torch.float32)
    F.cross_entropy(wrapper(x), y).backward()
    with torch.no_grad():
        assert torch.equal(model(x), wrapper(x))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        model(x)
    except UnsynchronisedError as error:
        message = str(error)
    else:
        message = "nothing"
    assert same(dict(model.state_dict()), before)
    optimizer.step()
    optimizer.detach()
    F.cross_entropy(model(x), y).backward()
    return message


def gradients(algorithm: str, rank: int, hook: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """``.grad`` in single precision of one process's half: its own, or what a wrapper makes of both by ``hook``."""
    model = torch2ebm.convert(Tied())
    called: nn.Module = model
    if hook is not None:
        called = wrapper = DistributedDataParallel(model)
        wrapper.register_comm_hook(None, hook)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), called, ALGORITHMS[algorithm])
    x, y = (tensor.chunk(RANKS)[rank] for tensor in batch(0, torch.float32))
    F.cross_entropy(called(x), y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def weighed_hook(state: None, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """The sum over processes of (rank + 1) times their gradients: no mean, and not the same from each."""
    message = bucket.buffer() * (distributed.get_rank() + 1)
    return distributed.all_reduce(message, async_op=True).get_future().then(lambda done: done.value()[0])


def half_mean(*both: Tensor) -> Tensor:
    first, second = (gradient.half() / RANKS for gradient in both)
    return (first + second).float()


HOOKS: dict[str, tuple[Callable[..., Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "fp16": (fp16_compress_hook, half_mean),  # and what it makes of the plain gradients of both processes
    "weighed": (weighed_hook, lambda first, second: first + 2 * second),
}


def bare(algorithm: str, rank: int, by_hand: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Weights after three steps without a wrapper, and what was said; ``by_hand`` as docs/distributed.md has it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if by_hand:
            warnings.filterwarnings("ignore", category=UnsynchronisedWarning)
        model = torch2ebm.convert(Tied().double())
        inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer = torch2ebm.EnergyOptimizer(inner, model, ALGORITHMS[algorithm])
        for step in range(3):
            optimizer.zero_grad()
            x, y = (tensor.chunk(RANKS)[rank] for tensor in batch(step, torch.float64))
            F.cross_entropy(model(x), y).backward()
            for parameter in model.parameters() if by_hand else ():
                distributed.all_reduce(parameter.grad)
                parameter.grad /= RANKS
            optimizer.step()
    return dict(model.state_dict()), [
        f"{warning.filename}: {warning.category.__name__}: {warning.message}" for warning in said
    ]


def learned(algorithm: type, rank: int | None) -> Tensor:
    """A precision after three steps of its own gradients, which the wrapper of the model does not see."""
    model: nn.Module = torch2ebm.convert(Tied().double())
    precision = torch2ebm.Precision(4, start=0.5).double()
    inner = torch.optim.SGD([*model.parameters(), *precision.parameters()], lr=0.05)
    called = model if rank is None else DistributedDataParallel(model)
    optimizer = torch2ebm.EnergyOptimizer(inner, called, algorithm(4, 0.1, precisions={"middle": precision}))
    for step in range(3):
        optimizer.zero_grad()
        x, y = batch(step, torch.float64)
        if rank is not None:
            x, y = x.chunk(RANKS)[rank], y.chunk(RANKS)[rank]
        F.cross_entropy(called(x), y).backward()
        optimizer.step()
    return precision.log.detach()


def share() -> Tensor:
    """What the demo gives one process of 192 images in two epochs, by number: [epoch, batch, image]."""
    numbered = TensorDataset(torch.arange(192))
    batches, epochs = demo.batches_and_epochs(numbered, range(2), seed=0)
    return torch.stack([torch.stack([image for [image] in batches]) for _ in epochs])


def worker(rank: int, folder: Path) -> None:
    warnings.simplefilter("error", UnsynchronisedWarning)  # none where a wrapper is called
    found: dict[str, Any] = {"passing by": passing_by(rank)}
    for algorithm in ALGORITHMS:
        found[f"{algorithm} plain"] = trained(algorithm, 3, torch.float64, rank=rank)
        found[f"{algorithm} accumulated"] = trained(algorithm, 3, torch.float64, parts=2, rank=rank)
        found[f"{algorithm} single precision"] = trained(algorithm, 20, torch.float32, rank=rank)
    for algorithm in HOOKED:
        found |= {f"{algorithm} {name}": gradients(algorithm, rank, hook) for name, (hook, _) in HOOKS.items()}
    found |= {f"learned by {each.__name__}": learned(each, rank) for each in LEARNERS}
    found["share"] = share()
    found["bare"], found["said"] = bare("PredictiveCoding", rank, by_hand=False)
    found["by hand"], found["said by hand"] = bare("PredictiveCoding", rank, by_hand=True)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_by_ranks(__file__, tmp_path_factory.mktemp("distributed"))


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@needs_processes
@every_algorithm
@pytest.mark.parametrize(("how", "parts"), [("plain", 1), ("accumulated", 2)])
def test_two_processes_are_one_on_the_whole_batch(
    ranks: list[dict[str, Any]], algorithm: str, how: str, parts: int
) -> None:
    """Shared parameters, and accumulation under ``no_sync`` whose last backward synchronises."""
    alone = trained(algorithm, 3, torch.float64, parts)
    assert difference(ranks[0][f"{algorithm} {how}"], alone) <= EXACT
    assert same(ranks[0][f"{algorithm} {how}"], ranks[1][f"{algorithm} {how}"])


@every_algorithm
def test_half_the_batch_alone_is_something_else(algorithm: str) -> None:
    """The negative twin: without synchronisation a process would be off by far more than that."""
    alone = trained(algorithm, 3, torch.float64)
    net = torch2ebm.convert(Tied().double())
    optimizer = torch2ebm.EnergyOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), net, ALGORITHMS[algorithm]
    )
    for step in range(3):
        optimizer.zero_grad()
        x, y = batch(step, torch.float64)
        F.cross_entropy(net(x[:4]), y[:4]).backward()
        optimizer.step()
    assert difference(net.state_dict(), alone) > 1e-3


@needs_processes
@every_algorithm
def test_ranks_are_bit_identical_after_twenty_steps(ranks: list[dict[str, Any]], algorithm: str) -> None:
    first, second = (rank[f"{algorithm} single precision"] for rank in ranks)
    assert same(first, second)
    start = dict(Tied().state_dict())
    assert not same(first, start)
    assert difference(first, trained(algorithm, 20, torch.float32)) <= 1e-5  # twenty steps of single precision


@needs_processes
@pytest.mark.parametrize("algorithm", LEARNERS)
def test_a_precision_learns_from_all_processes(ranks: list[dict[str, Any]], algorithm: type) -> None:
    alone = learned(algorithm, None)
    for rank in ranks:
        torch.testing.assert_close(rank[f"learned by {algorithm.__name__}"], alone, rtol=0, atol=EXACT)
    assert not torch.equal(alone, torch2ebm.Precision(4, start=0.5).double().log)


@needs_processes
def test_a_forward_that_passes_by_the_wrapper_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        said = rank["passing by"]
        assert all(words in said for words in ("Tied", "outside the DistributedDataParallel", "no_grad", "detach"))


@needs_processes
@pytest.mark.parametrize("algorithm", HOOKED)
@pytest.mark.parametrize("name", HOOKS)
def test_a_comm_hook_sees_local_gradients_as_it_would_see_any(
    ranks: list[dict[str, Any]], algorithm: str, name: str
) -> None:
    """Bit for bit what it makes of the gradients that each process has by itself."""
    first, second = gradients(algorithm, 0), gradients(algorithm, 1)
    expected = {key: HOOKS[name][1](first[key], second[key]) for key in first}
    mean = {key: (first[key] + second[key]) / RANKS for key in first}
    for rank in ranks:
        assert same(rank[f"{algorithm} {name}"], expected)
    assert not same(expected, mean)


@needs_processes
def test_training_without_a_wrapper_warns_once_and_names_the_cure(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        [said] = rank["said"]  # of three steps
        assert said.startswith(f"{__file__}: UnsynchronisedWarning")  # where the model is called
        assert all(words in said for words in ("EnergyModel(Tied)", "2 processes", "DistributedDataParallel", "filter"))
    assert difference(ranks[0]["bare"], ranks[1]["bare"]) > 1e-3  # and it is right to


@needs_processes
def test_who_synchronises_by_hand_can_silence_the_warning(ranks: list[dict[str, Any]]) -> None:
    assert [rank["said by hand"] for rank in ranks] == [[], []]
    assert difference(ranks[0]["by hand"], trained("PredictiveCoding", 3, torch.float64)) <= EXACT


@needs_processes
def test_one_process_has_nothing_to_synchronise() -> None:
    """No warning: pytest makes an error of it."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        inside = trained("PredictiveCoding", 2, torch.float64)
    finally:
        distributed.destroy_process_group()
    assert same(inside, trained("PredictiveCoding", 2, torch.float64))


@needs_processes
def test_the_demo_gives_every_process_its_share_of_every_batch(ranks: list[dict[str, Any]]) -> None:
    whole = torch.cat([rank["share"] for rank in ranks], dim=2)
    assert whole.shape == (2, 192 // demo.BATCH, demo.BATCH)
    first, second = whole.flatten(1)
    assert first.unique().tolist() == second.unique().tolist() == list(range(192))
    assert not torch.equal(first, second)


def test_the_table_of_the_page_is_its_formula() -> None:
    """Rings of N processes: 2 (N - 1) messages of an Nth each, for a ResNet-18 at the page's assumed rates."""
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    rows = [
        re.findall(r"[\d.]+", line.replace(",", "")) for line in text.splitlines() if re.match(r"\| [\d,]+ \|", line)
    ]
    assert [int(row[0]) for row in rows] == [2, 8, 64, 256, 1000]
    for row in rows:
        processes, sent, messages, time, all_sent, all_time, sharded = map(float, row)
        exact = 2 * 11.7e6 * 4 * (processes - 1) / processes
        taken = exact / 12.5e9 + 5e-6 * messages
        assert messages == 2 * (processes - 1)
        assert [sent, sharded] == pytest.approx([exact / 1e6, 1.5 * exact / 1e6], abs=0.05)
        assert [all_sent, all_time] == pytest.approx([20 * exact / 1e6, 20 * taken * 1e3], abs=0.5)
        assert time == pytest.approx(taken * 1e3, abs=0.05)


if __name__ == "__main__":
    rank, folder = int(sys.argv[2]), Path(sys.argv[1])
    with joined(rank, folder):
        worker(rank, folder)
