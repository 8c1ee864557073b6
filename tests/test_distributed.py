"""Two processes with half a batch each are one process with the whole. Run as a script, this file is one of the two."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_resume import same
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import torch2ebm
from torch2ebm.errors import UnsynchronisedError

RANKS = 2
EXACT = 1e-11  # of sums in another order, in double precision, after some steps

ALGORITHMS: dict[str, torch2ebm.Algorithm] = {
    "PredictiveCoding": torch2ebm.PredictiveCoding(steps=4, lr=0.2),
    "ZeroDivergence": torch2ebm.ZeroDivergence(),
    "IncrementalPredictiveCoding": torch2ebm.IncrementalPredictiveCoding(steps=4, lr=0.2),
}
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
needs_processes = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")


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


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    found: dict[str, Any] = {"passing by": passing_by(rank)}
    for algorithm in ALGORITHMS:
        found[f"{algorithm} plain"] = trained(algorithm, 3, torch.float64, rank=rank)
        found[f"{algorithm} accumulated"] = trained(algorithm, 3, torch.float64, parts=2, rank=rank)
        found[f"{algorithm} single precision"] = trained(algorithm, 20, torch.float32, rank=rank)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("distributed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(RANKS)]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * RANKS
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@needs_processes
@every_algorithm
@pytest.mark.parametrize(("how", "parts"), [("plain", 1), ("accumulated", 2)])
def test_two_processes_are_one_on_the_whole_batch(
    ranks: list[dict[str, Any]], algorithm: str, how: str, parts: int
) -> None:
    """Shared parameters, and accumulation under ``no_sync`` whose last backward synchronises."""
    alone = trained(algorithm, 3, torch.float64, parts)
    for name, value in ranks[0][f"{algorithm} {how}"].items():
        assert (value - alone[name]).abs().max() <= EXACT, name
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
    assert max(float((value - alone[name]).abs().max()) for name, value in net.state_dict().items()) > 1e-3


@needs_processes
@every_algorithm
def test_ranks_are_bit_identical_after_twenty_steps(ranks: list[dict[str, Any]], algorithm: str) -> None:
    first, second = (rank[f"{algorithm} single precision"] for rank in ranks)
    assert same(first, second)
    start = dict(Tied().state_dict())
    assert not same(first, start)
    for name, alone in trained(algorithm, 20, torch.float32).items():
        assert (first[name] - alone).abs().max() <= 1e-5  # twenty steps of single precision


@needs_processes
def test_a_forward_that_passes_by_the_wrapper_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        said = rank["passing by"]
        assert all(words in said for words in ("Tied", "outside the DistributedDataParallel", "no_grad", "detach"))


if __name__ == "__main__":
    worker(int(sys.argv[2]), Path(sys.argv[1]))
