"""Values are origins plus displacements: single precision keeps errors that are far below the values' own rounding."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import attached
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import NoSignalWarning
from torch2ebm.inference.value_inference import DisplacedValues

STEPS, LR = 20, 0.01
X, Y = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3


def chain() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(8, 3)).double()


def first_gradient(net: nn.Module, algorithm: torch2ebm.Algorithm) -> Tensor:
    model = attached(net, algorithm)
    F.cross_entropy(model(X.to(net[0].weight.dtype)), Y).backward()
    assert net[0].weight.grad is not None
    return net[0].weight.grad.double()


def by_stored_values(net: nn.Sequential) -> Tensor:
    """The strict algorithm written out (Rosenbaum 2022), with values stored as they are."""
    layers = [nn.Sequential(net[i], net[i + 1]) for i in range(0, len(net) - 1, 2)]
    x = X.to(net[0].weight.dtype)
    values = [x]
    for layer in layers:
        values.append(layer(values[-1]).detach())

    def energy(moving: list[Tensor]) -> Tensor:
        errors = [after - layer(before) for layer, before, after in zip(layers, moving, moving[1:], strict=False)]
        return sum(0.5 * e.square().sum() for e in errors) + F.cross_entropy(net[-1](moving[-1]), Y, reduction="sum")

    for _ in range(STEPS):
        moving = [x, *(value.requires_grad_() for value in values[1:])]
        slopes = torch.autograd.grad(energy(moving), moving[1:])
        values = [x, *(value.detach() - LR * slope for value, slope in zip(moving[1:], slopes, strict=True))]
    (gradient,) = torch.autograd.grad(energy(values), [net[0].weight])
    return gradient.double() / len(X)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


SOLVERS = [
    torch2ebm.GradientDescent(STEPS, LR),
    torch2ebm.Momentum(STEPS, LR),
    torch2ebm.SequentialDescent(2, LR),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda each: type(each).__name__)
def test_the_first_layer_learns_the_same_in_single_precision(solver: torch2ebm.Solver) -> None:
    algorithm = torch2ebm.PredictiveCoding(solver=solver, nudging=torch2ebm.OneSided(1.0))
    double = first_gradient(chain(), algorithm)
    assert distance(first_gradient(chain().float(), algorithm), double) < 0.1


def test_stored_values_would_have_rounded_it_away() -> None:
    strict = torch2ebm.PredictiveCoding(STEPS, LR)
    written_out = by_stored_values(chain())
    assert distance(first_gradient(chain(), strict), written_out) < 1e-4  # in double, where stored values have digits
    assert distance(by_stored_values(chain().float()), written_out) > 0.9
    assert distance(first_gradient(chain().float(), strict), written_out) < 0.1


def test_what_is_kept_counts_as_a_signal() -> None:
    model = attached(chain().float(), torch2ebm.PredictiveCoding(STEPS, LR))
    F.cross_entropy(model(X.float()), Y).backward()
    error, value = model.state.error["0"], model.state.value["0"]
    assert float(error.abs().max()) < 0.1 * torch.finfo(torch.float32).eps * float(value.abs().max())
    assert set(model.state.signal.values()) == {"error"} and model.state.without_signal == ()


@pytest.mark.slow
def test_a_compiled_program_rounds_in_its_own_way_and_what_is_noise_there_is_named() -> None:
    errors = []
    for net, compiled in ((chain().float(), True), (chain(), False)):
        model = attached(net, torch2ebm.PredictiveCoding(STEPS, LR, compile=compiled))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoSignalWarning)
            F.cross_entropy(model(X.to(net[0].weight.dtype)), Y).backward()
        errors.append((model.state.error, set(model.state.without_signal)))
    (single, named), (double, none) = errors
    off = {name: distance(single[name].double(), double[name]) for name in double}
    assert {name for name in off if off[name] > 0.3} <= named and none == set()
    assert all(off[name] > 0.03 for name in named) and off["12"] < 1e-5


def test_a_value_that_is_read_is_a_copy_and_one_that_is_put_begins_anew() -> None:
    origin = torch.ones(3)
    values = DisplacedValues({"a": origin, "b": torch.zeros(3)})
    values.move("a", torch.full((3,), 1e-12), rate=2.0)
    values.move("a", torch.full((3,), 1e-12), rate=1.0)
    values["a"].add_(5.0)
    values["b"].add_(5.0)  # which has not moved
    assert torch.equal(values["a"], torch.ones(3)) and torch.equal(origin, torch.ones(3)) and not values["b"].any()
    assert torch.allclose(values.minus("a", origin), torch.full((3,), 3e-12), rtol=1e-6, atol=0)
    assert not values.rounding("a", origin).any()
    assert torch.equal(values.rounding("a", origin * 2), torch.full((3,), torch.finfo(torch.float32).eps))
    twin = DisplacedValues(values.origins, values.displacements)
    twin["a"] = torch.full((3,), 4.0)
    assert torch.equal(twin.minus("a", origin), torch.full((3,), 3.0))
    assert torch.equal(values["a"], torch.ones(3))
    del twin["b"]
    assert list(twin) == ["a"] and "b" not in twin and len(twin) == 1 and len(values) == 2


def test_memory_of_the_call_is_not_written() -> None:
    """A second backward starts where the first one did."""
    net = chain().float()
    model = attached(net, torch2ebm.PredictiveCoding(STEPS, 0.2))
    loss = F.cross_entropy(model(X.float()), Y)
    loss.backward(retain_graph=True)
    first = copy.deepcopy(net[0].weight.grad)
    net.zero_grad()
    loss.backward()
    assert torch.equal(net[0].weight.grad, first)
