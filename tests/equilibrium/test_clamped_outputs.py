"""Contrastive Hebbian learning of a net with outputs at several depths, each held by its own part of gamma's power."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import attached, local_gradients, relative_error
from oracles.graphs import backprop
from torch import Tensor, nn

import torch2ebm


class Heads(nn.Module):
    """Linear outputs at depths 1, 2 and 3; the second one's layer is read by nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 4)
        self.early, self.middle, self.late = nn.Linear(5, 3), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.tanh(self.first(x))
        two = torch.sigmoid(self.second(one))
        return self.early(one), self.middle(two), self.late(torch.tanh(self.third(two)))


def loss(outputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    target = torch.tensor([0, 1, 2, 0, 1])
    early, middle, late = outputs
    return F.cross_entropy(early, target) + 0.5 * middle.square().mean() + 2 * F.cross_entropy(late, target)


def distance(gamma: float) -> float:
    """To backprop, over all parameters, in double precision."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    algorithm = torch2ebm.ContrastiveHebbian(gamma, 60, 60, tol=1e-15)
    ours = local_gradients(attached(Heads().double(), algorithm), (x,), loss)
    return relative_error(ours, backprop(Heads().double(), (x,), loss))


def test_it_tends_to_backprop_with_first_order_in_gamma_at_every_depth() -> None:
    errors = [distance(gamma) for gamma in (4e-3, 2e-3, 1e-3)]
    assert errors[-1] < 0.02
    for larger, smaller in itertools.pairwise(errors):
        assert larger / smaller == pytest.approx(2, rel=0.1)
