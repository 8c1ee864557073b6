"""What the pages "Coming from" say of settings, held against the other libraries' rules, written out here by hand.

Each rule was read in the sources that its page names, and runs in plain torch.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import torch2ebm
from torch2ebm import EquilibriumPropagation, Holomorphic, OneSided, PredictiveCoding, RandomSign, Symmetric
from torch2ebm.extend import Nudging

N, IN, HIDDEN, OUT = 6, 5, 4, 3


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(N, IN).double(), torch.randint(0, OUT, (N,))


def net_of(*activations: nn.Module) -> nn.Sequential:
    """Two layers with an activation behind the first one, or behind both."""
    torch.manual_seed(1)
    first, last = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)
    return nn.Sequential(first, activations[0], last, *activations[1:]).double()


def gradients(
    net: nn.Module, algorithm: torch2ebm.Algorithm, loss: Callable[[Tensor], Tensor], x: Tensor
) -> list[Tensor]:
    """Those of the weights."""
    model = torch2ebm.convert(net)
    model.attach(algorithm)
    loss(model(x)).backward()
    model.detach()
    return [layer.weight.grad for layer in net if isinstance(layer, nn.Linear) and layer.weight.grad is not None]


# ---- equilibrium propagation: s <- act(slope * drive + shift), gradients from the products of states


def settled(layers: list[nn.Linear], x: Tensor, target: Tensor, act: Callable[[Tensor], Tensor], beta: float) -> Tensor:
    """The gradients of both weights by two nudged phases of ten steps, from a free phase that has settled."""
    first, last = layers

    def phase(states: tuple[Tensor, Tensor], nudge: float, steps: int) -> tuple[Tensor, Tensor]:
        for _ in range(steps):
            hidden, output = states
            states = act(first(x) + output @ last.weight), act(last(hidden) - nudge * (output - target))
        return states

    zero = torch.zeros(N, HIDDEN).double(), torch.zeros(N, OUT).double()
    free = phase(zero, 0.0, 300)
    (hidden_up, up), (hidden_down, down) = phase(free, beta, 10), phase(free, -beta, 10)
    lower, upper = (hidden_up - hidden_down).T @ x, up.T @ hidden_up - down.T @ hidden_down
    return [-each / (2 * beta * N) for each in (lower, upper)]


@pytest.mark.parametrize(
    ("act", "module", "slope", "shift"),
    [
        (lambda drive: drive.clip(0, 1), nn.Hardtanh(0.0, 1.0), 1.0, 0.0),
        (lambda drive: (0.5 * drive).clip(0, 1), nn.Hardtanh(0.0, 1.0), 0.5, 0.0),
        (lambda drive: torch.sigmoid(4 * drive - 2), nn.Sigmoid(), 4.0, -2.0),
        (torch.tanh, nn.Tanh(), 1.0, 0.0),
    ],
    ids=["hard_sigmoid", "my_hard_sig", "mysig", "tanh"],
)
def test_a_slope_goes_into_weights_bias_and_nudge(
    data: tuple[Tensor, Tensor], act: Callable[[Tensor], Tensor], module: nn.Module, slope: float, shift: float
) -> None:
    x, y = data
    target, beta = one_hot(y, OUT).double(), 0.3
    net = net_of(module, module)
    theirs = [nn.Linear(IN, HIDDEN).double(), nn.Linear(HIDDEN, OUT).double()]
    with torch.no_grad():
        for layer, other in zip((net[0], net[2]), theirs, strict=True):
            other.weight.mul_(0.4)
            layer.weight.copy_(slope * other.weight), layer.bias.copy_(slope * other.bias + shift)
        expected = settled(theirs, x, target, act, beta)
    algorithm = EquilibriumPropagation(Symmetric(slope * beta), 300, 10)
    found = gradients(net, algorithm, lambda output: (0.5 * (output - target).square().sum(1)).mean(), x)
    for ours, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(slope * ours, other, rtol=1e-9, atol=1e-12)


def test_points_on_a_circle_with_a_layer_that_is_read_out(data: tuple[Tensor, Tensor]) -> None:
    """The mean over the circle of what the energy's derivative, over the nudge, is at each nudged equilibrium."""
    x, y = data
    net, target, beta, points = net_of(nn.Tanh()), one_hot(y, OUT).double(), 0.4, 4
    weight, bias = (each.detach().cdouble() for each in (net[2].weight, net[2].bias))
    inner = (x @ net[0].weight.T + net[0].bias).detach().cdouble()
    lower, upper = torch.zeros(HIDDEN, IN).cdouble(), torch.zeros(OUT, HIDDEN).cdouble()
    for k in range(points):
        nudge = beta * torch.exp(2j * torch.pi * torch.tensor(k / points).cdouble())
        state = inner.tanh()
        for _ in range(60):
            scores = (state @ weight.T + bias).exp()
            error = target - scores / scores.sum(1, keepdim=True)
            state = (inner + nudge * error @ weight).tanh()
        scores = (state @ weight.T + bias).exp()
        error = target - scores / scores.sum(1, keepdim=True)
        lower -= state.T @ x.cdouble() / nudge / (points * N)
        upper -= error.T @ state / (points * N)
    algorithm = EquilibriumPropagation(Holomorphic(beta, points), 60, 60, readout=True)
    found = gradients(net, algorithm, lambda output: cross_entropy(output, y), x)
    for ours, other in zip(found, (lower, upper), strict=True):
        torch.testing.assert_close(ours, other.real, rtol=1e-9, atol=1e-12)
        assert other.imag.abs().max() < 1e-9


def test_the_sign_of_a_nudge_and_the_half_of_a_cost(data: tuple[Tensor, Tensor]) -> None:
    """One-sided gradients are those of a random sign where it is drawn so; without the half, the nudge is doubled."""
    x, y = data
    target = one_hot(y, OUT).double()

    def of(nudging: Nudging, factor: float) -> list[Tensor]:
        net = net_of(nn.Hardtanh(0.0, 1.0), nn.Hardtanh(0.0, 1.0))
        algorithm = EquilibriumPropagation(nudging, 100, 40)
        return gradients(net, algorithm, lambda output: factor * (output - target).square().sum(1).mean(), x)

    torch.testing.assert_close(of(OneSided(0.25), 1.0), [2 * each for each in of(OneSided(0.5), 0.5)])
    torch.manual_seed(3)
    drawn = of(RandomSign(0.5), 0.5)
    plus = of(OneSided(0.5), 0.5)
    both = [2 * mean - one for mean, one in zip(of(Symmetric(0.5), 0.5), plus, strict=True)]
    assert any(torch.allclose(drawn[0], each[0], rtol=1e-9) for each in (plus, both))


# ---- predictive coding


def test_a_precision_of_the_output_is_a_factor_of_the_loss(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    net, target, precision, eta, steps = net_of(nn.Tanh()), one_hot(y, OUT).double(), 2.0, 0.05, 7
    with torch.no_grad():
        prediction = net[1](net[0](x))
        latent = prediction.clone()
        for _ in range(steps):
            latent = latent - eta * (latent - prediction - precision * (target - net[2](latent)) @ net[2].weight)
        hidden, output = latent - prediction, precision * (target - net[2](latent))
        expected = [-(hidden * (1 - prediction**2)).T @ x / N, -output.T @ latent / N]
    algorithm = PredictiveCoding(steps=steps, lr=eta)
    found = gradients(net, algorithm, lambda out: 0.5 * precision * (out - target).square().sum(1).mean(), x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_a_loss_that_is_summed_gives_gradients_that_are_summed(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    means = gradients(net_of(nn.Tanh()), PredictiveCoding(steps=7, lr=0.1), lambda output: cross_entropy(output, y), x)
    summed = PredictiveCoding(steps=7, lr=0.1, loss_reduction="sum")
    sums = gradients(net_of(nn.Tanh()), summed, lambda output: cross_entropy(output, y, reduction="sum"), x)
    torch.testing.assert_close(sums, [N * each for each in means], rtol=1e-10, atol=1e-13)
    other = gradients(net_of(nn.Tanh()), summed, lambda output: cross_entropy(output, y), x)  # the negative twin
    assert not torch.allclose(N * other[0], sums[0], rtol=1e-3)


def test_the_rate_of_a_flow_that_leaks_is_a_precision_of_the_input(data: tuple[Tensor, Tensor]) -> None:
    """dz/dt = (-g z + W^T e) / tau, by Euler steps of dt from zero: a free input around zero, of precision g."""
    x, _ = data
    decoder, leak, dt, tau, steps = nn.Linear(HIDDEN, IN, bias=False).double(), 0.3, 1.0, 20.0, 15
    with torch.no_grad():
        latent = torch.zeros(N, HIDDEN).double()
        for _ in range(steps):
            latent = latent + dt / tau * (-leak * latent + (x - latent @ decoder.weight.T) @ decoder.weight)
    model = torch2ebm.convert(decoder)
    model.attach(PredictiveCoding(steps=steps, lr=dt / tau, free=["input"], precisions={"input": leak}))
    (0.5 * (model(torch.zeros(N, HIDDEN).double()) - x).square().sum(1)).mean().backward()
    torch.testing.assert_close(model.state.value["input"], latent, rtol=1e-10, atol=1e-13)
