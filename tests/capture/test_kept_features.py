"""Hidden tensors that hooks of the user keep and a loss reads: they are outputs of the call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import attached, relative_error
from test_capture import WIDTH, normal
from torch import Tensor, nn

import torch2ebm


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    ).double()


def kept_by(net: nn.Sequential, places: tuple[int, ...]) -> dict[int, Tensor]:
    """What forward hooks write down, call after call."""
    found: dict[int, Tensor] = {}

    def keep(place: int) -> Any:
        return lambda module, args, output: found.__setitem__(place, output)

    for place in places:
        net[place].register_forward_hook(keep(place))
    return found


@pytest.mark.parametrize("places", [(0,), (1,), (2, 4), (5,), (0, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("nodes", ["auto", "op"])
def test_a_loss_of_features_has_autograd_s_gradients(places: tuple[int, ...], nodes: str) -> None:
    module, twin = network(), network()
    ours, theirs = kept_by(module, places), kept_by(twin, places)
    model = attached(module, torch2ebm.ZeroDivergence(), nodes)
    for seed in range(4):
        gradients = []
        for net, features in ((model, ours), (twin, theirs)):
            net.zero_grad()
            output = net(normal(5, WIDTH, seed=seed))
            penalty = sum(feature.abs().pow(3).mean() for feature in features.values())
            (output.square().mean() + 0.5 * penalty).backward()
            gradients.append({name: p.grad.clone() for name, p in net.named_parameters()})
        assert all(torch.equal(ours[place], theirs[place]) for place in places)
        assert relative_error(*gradients) < 1e-12


@pytest.mark.parametrize("with_output", [True, False])
def test_a_loss_of_features_alone_or_beside_the_output(with_output: bool) -> None:
    """What stands behind the features has no part in such a loss."""
    module, twin = network(), network()
    ours, theirs = kept_by(module, (2,)), kept_by(twin, (2,))
    model = attached(module, torch2ebm.ZeroDivergence())
    for seed in range(3):
        for net, features in ((model, ours), (twin, theirs)):
            net.zero_grad()
            output = net(normal(5, WIDTH, seed=seed))
            (features[2].square().mean() + (output.sum() if with_output else 0)).backward()
        for (name, p), real in zip(module.named_parameters(), twin.parameters(), strict=True):
            found = torch.zeros_like(p) if p.grad is None else p.grad
            reference = torch.zeros_like(p) if real.grad is None else real.grad
            torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-14, msg=name)


def test_values_relax_towards_a_loss_of_features() -> None:
    module = network()
    features = kept_by(module, (1,))
    model = attached(module, torch2ebm.PredictiveCoding(6, 1e-3))
    for seed in range(3):
        model.zero_grad()
        output = model(normal(5, WIDTH, seed=seed))
        (output.square().mean() + features[1].square().mean()).backward()
        energy = model.state.relaxation.energy
        assert energy[-1] < energy[0]
        assert all(p.grad.any() for p in (module[0].weight, module[2].weight, module[5].weight))


def test_features_that_no_loss_reads_change_nothing() -> None:
    module, plain = network(), network()
    kept_by(module, (1, 2))
    results = []
    for net in (module, plain):
        model = attached(net, torch2ebm.PredictiveCoding(6, 0.01))
        for seed in range(3):
            model.zero_grad()
            model(normal(5, WIDTH, seed=seed)).square().mean().backward()
        results.append({name: p.grad for name, p in net.named_parameters()})
    assert relative_error(*results) < 1e-12
