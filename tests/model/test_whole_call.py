"""``EnergyOptimizer(..., check_every=n)`` holds whole calls against the plain module."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import torch2ebm
from torch2ebm.capture.custom_functions import untold
from torch2ebm.errors import CaptureMismatchError, ConfigurationError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.last(functional.dropout(torch.tanh(self.norm(self.first(x))), 0.5, self.training))


def trained(check_every: int | None, algorithm: torch2ebm.Algorithm, steps: int = 6) -> Net:
    torch.manual_seed(0)
    net = Net().double()
    model = torch2ebm.convert(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = torch2ebm.EnergyOptimizer(sgd, model, algorithm, check_every=check_every)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5 + step % 2, 4).double()).square().mean().backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("algorithm", [torch2ebm.ZeroDivergence(), torch2ebm.PredictiveCoding(steps=3, lr=0.05)])
def test_a_checked_call_changes_nothing(algorithm: torch2ebm.Algorithm) -> None:
    checked, plain = trained(2, algorithm), trained(None, algorithm)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in checked.state_dict().items())


def test_the_module_runs_once_more_in_one_of_so_many_calls() -> None:
    net = trained(3, torch2ebm.ZeroDivergence())
    assert net.runs == trained(None, torch2ebm.ZeroDivergence()).runs  # attributes are put back, too


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.last, torch.tanh(self.first(x)), use_reentrant=True)


def test_a_checkpoint_that_gives_no_gradients_apart_is_no_error() -> None:
    """Torch lets nobody ask a reentrant one for gradients but by backward: outputs and buffers are compared alone."""
    net = Checkpointed()
    model = torch2ebm.convert(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    kept = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.ZeroDivergence(), check_every=1)
    for _ in range(2):
        model(torch.randn(5, 4)).square().mean().backward()
    assert kept.model is model and all(p.grad is not None for p in net.parameters())


class Sly(nn.Module):
    """Gives another result where it is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        watched = torch._C._len_torch_function_stack() > 0
        with untold():
            return self.last(torch.tanh(self.first(x))) * (2.0 if watched else 1.0)


def test_a_call_that_is_not_the_module_is_an_error_by_name() -> None:
    net = Sly()
    model = torch2ebm.convert(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    kept = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.ZeroDivergence(), check_every=2)
    model(torch.randn(5, 4))
    with pytest.raises(CaptureMismatchError, match=r"output 0, the gradient of 'first\.weight'"):
        model(torch.randn(5, 4))
    assert kept.algorithm is model.algorithm


def test_a_count_that_is_none_is_refused_before_anything_is_attached() -> None:
    net = Net()
    model = torch2ebm.convert(net)
    with pytest.raises(ConfigurationError, match=r"EnergyOptimizer\(check_every=\.\.\.\)"):
        torch2ebm.EnergyOptimizer(
            torch.optim.SGD(net.parameters(), lr=0.1), model, torch2ebm.ZeroDivergence(), check_every=0
        )
    assert model.algorithm is None
