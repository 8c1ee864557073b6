"""Processes of different numbers of batches, inside of ``Join``. Run as a script, this file is one of the two."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from algorithms_list import ROWS
from processes import RANKS, found_by_ranks, joined, needs_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import torch2ebm
from torch2ebm.errors import UnsynchronisedError

ALGORITHMS = {row.name: row.algorithm for row in ROWS}
STEPS = (2, 3)  # of each process
EXACT = 1e-11  # of sums in another order, in double precision


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 4, generator=generator).double(), torch.randint(3, (4,), generator=generator)


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    x, y = batch(step, rank)
    return F.mse_loss(model(x), F.one_hot(y, 3).double())


def worker(rank: int, folder: Path) -> None:
    from torch.distributed.algorithms.join import Join

    found: dict[str, Any] = {}
    for name, algorithm in ALGORITHMS.items():
        net = network()
        wrapper = DistributedDataParallel(torch2ebm.convert(net))
        optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), wrapper, algorithm)
        torch.manual_seed(0)
        try:
            with Join([wrapper]):
                for step in range(STEPS[rank]):
                    optimizer.zero_grad()
                    loss_of(wrapper, step, rank).backward()
                    optimizer.step()
        except UnsynchronisedError as error:
            found[name] = str(error)
        else:
            found[name] = dict(net.state_dict())
        optimizer.detach()
    torch.save(found, folder / f"{rank}.pt")


def alone(algorithm: torch2ebm.Algorithm) -> dict[str, Tensor]:
    """In one process: the mean over both, of which one has no gradient where it has no batch."""
    net = network()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
    torch.manual_seed(0)
    for step in range(max(STEPS)):
        optimizer.zero_grad()
        for rank in range(RANKS):
            if step < STEPS[rank]:
                loss_of(model, step, rank).backward()
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.grad /= RANKS
        optimizer.step()
    return dict(net.state_dict())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_by_ranks(__file__, tmp_path_factory.mktemp("join"))


@needs_processes
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_joins_or_is_refused_in_every_process(ranks: list[dict[str, Any]], name: str) -> None:
    if ALGORITHMS[name].weights_move:
        assert all("Join" in rank[name] and "as many batches in every process" in rank[name] for rank in ranks)
        return
    expected = alone(ALGORITHMS[name])
    start = network().state_dict()
    for rank in ranks:
        for parameter, value in expected.items():
            # a measured step is by differences, whose width is that of a part of the batch
            limit = 1e-7 if name in ("MeasuredStep", "UntilRest") else EXACT
            assert float((rank[name][parameter] - value).abs().max()) < limit
            assert not torch.equal(rank[name][parameter], start[parameter])


if __name__ == "__main__":
    rank, folder = int(sys.argv[2]), Path(sys.argv[1])
    with joined(rank, folder):
        worker(rank, folder)
