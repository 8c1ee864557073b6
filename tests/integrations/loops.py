"""The plain loop, written out by hand, that every framework is held against."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from algorithms_list import taken_by
from torch import Tensor, nn

import torch2ebm

Batch = tuple[Tensor, Tensor]

ALGORITHMS = taken_by(__file__)


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def samples(count: int = 20) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, generator=generator), torch.randint(3, (count,), generator=generator)


def batches(size: int = 5, count: int = 20) -> list[Batch]:
    x, y = samples(count)
    return list(zip(x.split(size), y.split(size), strict=True))


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def classification(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def plain_loop(
    algorithm: torch2ebm.Algorithm,
    data: Sequence[Batch],
    epochs: int = 1,
    accumulate: int = 1,
    clip: float | None = None,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = classification,
    make: Callable[[Any], torch.optim.Optimizer] = adam,
    net: nn.Module | None = None,
) -> tuple[nn.Module, torch2ebm.EnergyOptimizer]:
    """The network and its optimizer after training; a step a group of ``accumulate`` batches."""
    net = network() if net is None else net
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(make(net.parameters()), model, algorithm, accumulation=accumulate)
    scheduler = halving(optimizer)
    for index, (x, y) in enumerate([*data] * epochs):
        (loss(model, x, y) / accumulate).backward()
        if (index + 1) % accumulate:
            continue
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return net, optimizer


def same_bits(ours: nn.Module, theirs: nn.Module) -> bool:
    """Parameters and buffers."""
    mine, other = ours.state_dict(), theirs.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
