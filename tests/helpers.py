"""Small pieces that several test files share."""

from collections.abc import Mapping
from typing import Any

import torch
from oracles import Inputs, Loss, call
from torch import Tensor, nn

import torch2ebm

UNSETTLED = "ignore:The free phase has not settled"  # for tests of relaxations that are cut short on purpose


def attached(module: nn.Module, algorithm: torch2ebm.Algorithm, nodes: Any = "auto") -> torch2ebm.EnergyModel:
    """A converted model that learns by ``algorithm``."""
    model = torch2ebm.convert(module, nodes=nodes)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), model, algorithm)
    return model


def local_gradients(model: nn.Module, inputs: Inputs, loss: Loss, seed: int = 0) -> dict[str, Tensor]:
    """``.grad`` after one backward, by name; drawn from the same generator state as ``oracles.backprop``."""
    model.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loss(call(model, inputs)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative_error(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """The largest over parameters of |g - r| / |r|; they must be the same parameters."""
    assert ours.keys() == reference.keys()
    return max(float((ours[name] - r).norm() / r.norm().clamp_min(1e-30)) for name, r in reference.items())
