"""What needs a second derivative says so where an operation has none, and what does not need it takes the operation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import attached
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import NoEquilibriumError, Torch2EBMError

LABELS = torch.tensor([0, 1, 2, 0, 1])


class Attending(nn.Module):
    """Attention by torch's fused function, which on the CPU has no second derivative in single precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)).reshape(-1, 1, 4, 2)
        return self.last(F.scaled_dot_product_attention(hidden, hidden, hidden).flatten(1))


X = torch.linspace(-1, 1, 20).reshape(5, 4)


@pytest.mark.parametrize("algorithm", [torch2ebm.RecurrentBackprop(free_steps=5), torch2ebm.ImplicitSGD()])
def test_without_a_second_derivative_it_is_refused_and_nothing_changes(algorithm: torch2ebm.Algorithm) -> None:
    model = attached(Attending(), algorithm)
    before = copy.deepcopy(model.state_dict())
    error = NoEquilibriumError if isinstance(algorithm, torch2ebm.RecurrentBackprop) else Torch2EBMError
    with pytest.raises(error, match=r"second derivative.*attention.*(EquilibriumPropagation|PredictiveCoding)"):
        F.cross_entropy(model(X), LABELS).backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_the_message_names_takes_it() -> None:
    """Towards a nudge of 0 it is autograd's gradient."""
    net = Attending()
    solver = torch2ebm.ErrorDescent(60, 0.5)
    coding = attached(copy.deepcopy(net), torch2ebm.PredictiveCoding(solver=solver, nudging=torch2ebm.Symmetric(1e-2)))
    F.cross_entropy(coding(X), LABELS).backward()
    F.cross_entropy(net(X), LABELS).backward()
    for ours, exact in zip(coding.parameters(), net.parameters(), strict=True):
        assert float((ours.grad - exact.grad).norm() / exact.grad.norm()) < 1e-3
