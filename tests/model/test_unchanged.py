"""Between forward and backward nothing that the call has read may change; what it has not read may."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import attached
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ChangedSinceForwardError

ALGORITHMS = [
    torch2ebm.ZeroDivergence(),
    torch2ebm.FixedPrediction(5, 0.3),
    torch2ebm.PredictiveCoding(5, 0.01),
    torch2ebm.PredictiveCoding(5, 0.01, compile=True),
    torch2ebm.IncrementalPredictiveCoding(3, 0.01),
]
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.idle = nn.Linear(2, 2)
        self.register_buffer("scale", torch.full((8,), 1.5))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))) * self.scale)


def batch(seed: int = 0) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CHANGED: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "an input": (lambda net, x: x, "input 'x', which forward has read"),
    "a weight": (lambda net, x: net.last.weight, "parameter 'last.weight'"),
    "the weight of a norm": (lambda net, x: net.norm.weight, "parameter 'norm.weight'"),
    "a buffer": (lambda net, x: net.scale, "buffer 'scale', which forward has read"),
}


@every_algorithm
@pytest.mark.parametrize(("which", "named"), CHANGED.values(), ids=CHANGED)
def test_what_forward_has_read_may_not_change_before_the_backward(
    algorithm: torch2ebm.Algorithm, which: Callable[[Net, Tensor], Tensor], named: str
) -> None:
    net = Net()
    model = attached(net, algorithm)
    for seed in range(3):  # a recorded run, one that is cut, and one by programs
        model(batch(seed)).square().mean().backward()
    model.zero_grad()
    x = batch()
    loss = model(x).square().mean()
    with torch.no_grad():
        which(net, x).mul_(2)
    with pytest.raises(RuntimeError, match="changed since model") as caught:
        loss.backward()
    assert isinstance(caught.value, ChangedSinceForwardError) and named in str(caught.value)
    assert all(p.grad is None for p in net.parameters())
    model(x).square().mean().backward()  # and training goes on


@pytest.mark.parametrize("algorithm", ALGORITHMS[2:], ids=repr)
def test_a_write_behind_autograd_s_back_is_seen_where_weights_are_read_again(algorithm: torch2ebm.Algorithm) -> None:
    net = Net()
    loss = attached(net, algorithm)(batch()).square().mean()
    net.last.weight.data.mul_(2)
    with pytest.raises(ChangedSinceForwardError, match=r"last\.weight"):
        loss.backward()


@every_algorithm
def test_what_forward_has_not_read_may_change(algorithm: torch2ebm.Algorithm) -> None:
    """Running statistics that a second forward moves, and parameters that have no part in it."""
    net, other = Net(), Net()
    model, reference = attached(net, algorithm), attached(other, algorithm)
    loss, expected = model(batch()).square().mean(), reference(batch()).square().mean()
    model(batch(1))
    with torch.no_grad():
        net.idle.weight.mul_(2)
    loss.backward(), expected.backward()
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
