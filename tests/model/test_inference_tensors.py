"""What looks at a model does so in inference mode, and at tensors from there; batch norm of one value is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import NodeEvaluationError

Batch = tuple[Tensor, Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(size: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 4, generator=generator, dtype=torch.float64), torch.arange(size) % 3


def trained_by(algorithm: torch2ebm.Algorithm) -> Callable[[nn.Module, Batch], Any]:
    def train(module: nn.Module, given: Batch) -> str:
        model = torch2ebm.convert(module)
        torch2ebm.EnergyOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), model, algorithm)
        F.cross_entropy(model(given[0]), given[1]).backward()
        return str(model.state.relaxation)

    return train


LOOKS: dict[str, Callable[[nn.Module, Batch], Any]] = {
    "diagnose": lambda module, given: str(torch2ebm.diagnose(module, F.cross_entropy, given)),
    "curvature": lambda module, given: torch2ebm.convert(module).curvature(F.cross_entropy, given).sigma_squared,
    "compare": lambda module, given: str(
        torch2ebm.compare(module, F.cross_entropy, given, [torch2ebm.PredictiveCoding(3, 0.1)])
    ),
    "convert": lambda module, given: torch2ebm.convert(module, example_inputs=given[0]).summary(),
}
TRAINS = {
    "default": trained_by(torch2ebm.PredictiveCoding()),
    "auto": trained_by(torch2ebm.PredictiveCoding(8, "auto")),
}


@pytest.mark.parametrize("look", LOOKS)
def test_looks_say_the_same_in_inference_mode_and_of_a_batch_from_there(look: str) -> None:
    module = net()
    expected = LOOKS[look](module, batch())
    with torch.inference_mode():
        inside = LOOKS[look](module, batch())  # made inside too, as a loader would there
        made = batch()
        assert torch.is_inference_mode_enabled() and made[0].is_inference()
    assert inside == expected == LOOKS[look](module, made)
    assert not any(p.is_inference() or p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("train", TRAINS)
def test_training_on_a_tensor_from_inference_mode_is_refused_with_a_cure_that_works(train: str) -> None:
    with torch.inference_mode():
        x, y = batch()
    with pytest.raises(NodeEvaluationError, match=r"pass x\.clone\(\)"):
        TRAINS[train](net(), (x, y))
    TRAINS[train](net(), (x.clone(), y.clone()))


@pytest.mark.parametrize("look", LOOKS)
def test_a_module_from_inference_mode_is_named_as_the_cause(look: str) -> None:
    with torch.inference_mode():
        module = net()
    with pytest.raises(
        NodeEvaluationError, match=r"outside of torch\.inference_mode\(\): its parameters were made inside"
    ):
        LOOKS[look](module, batch())


class Normed(nn.Module):
    """One value a channel and sample, as after a global pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


@pytest.mark.parametrize("name", [*LOOKS, *TRAINS])
def test_a_batch_norm_of_one_value_is_refused_with_cures_that_work(name: str) -> None:
    module, call = Normed().double(), {**LOOKS, **TRAINS}[name]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(NodeEvaluationError, match=r"in module 'norm'.*two samples or more.*eval\(\)"):
        call(module, batch(1))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    call(module, batch(2))
    module.norm.eval()
    call(module, batch(1))
    assert module.training and not module.norm.training
