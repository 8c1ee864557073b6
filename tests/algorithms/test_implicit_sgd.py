"""Implicit SGD by inference is implicit SGD on the parameters (Alonso et al. 2022)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, scaled_by
from oracles.implicit_steps import (
    ImplicitStep,
    activity_step,
    feedforward,
    flat,
    gram,
    gram_without_bias,
    implicit_step,
    mean_norm,
    one,
    proximal_gradient,
    proximal_objective,
)
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import (
    ConfigurationError,
    DenseLayerError,
    InputGradientError,
    NonFiniteError,
    NotSettledWarning,
    UnsupportedError,
)

Gradients = dict[str, Tensor]
FEATURES, CLASSES = 5, 3


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGETS = data(40, CLASSES, seed=7)


def squared(output: Tensor) -> Tensor:
    return (0.5 * (output - TARGETS[: len(output)]).square().sum(1)).mean()


def entropy(output: Tensor) -> Tensor:
    return F.cross_entropy(output, torch.arange(len(output)) % CLASSES)


ACTIVATIONS: dict[str, tuple[type[nn.Module], Callable[[Tensor], Tensor]]] = {
    "tanh": (nn.Tanh, torch.tanh),
    "softplus": (nn.Softplus, F.softplus),
    "relu": (nn.ReLU, torch.relu),
}
LAYERS = ("0", "2", "4")


@dataclass
class Case:
    """A chain 5-7-6-3, a batch and a loss, for the engine and for the oracle."""

    activation: str = "tanh"
    bias: bool = True
    batch: int = 1
    loss: Callable[[Tensor], Tensor] = entropy
    seed: int = 0

    def __post_init__(self) -> None:
        module, self.function = ACTIVATIONS[self.activation]
        linear = partial(nn.Linear, bias=self.bias)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.net = nn.Sequential(linear(FEATURES, 7), module(), linear(7, 6), module(), linear(6, CLASSES)).double()
        self.x = data(self.batch, FEATURES)
        self.parameters = {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def loss_of(self, parameters) -> Tensor:
        return self.loss(feedforward(parameters, self.x, self.function, LAYERS))

    def oracle(self, alpha: float) -> ImplicitStep:
        return implicit_step(self.loss_of, self.parameters, alpha)

    def change(self, after) -> Gradients:
        """theta - theta+: what ``.grad`` has to be."""
        return {name: parameter - after[name] for name, parameter in self.parameters.items()}


def learned(
    net: nn.Module, algorithm: torch2ebm.Algorithm, x: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[Gradients, torch2ebm.EnergyModel]:
    model = torch2ebm.convert(net)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), model, algorithm)
    loss(model(x)).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}, model


def step_of(case: Case, alpha: float, **settings) -> tuple[Gradients, torch2ebm.EnergyModel]:
    return learned(case.net, torch2ebm.ImplicitSGD(alpha, **settings), case.x, case.loss)


both_losses = pytest.mark.parametrize("loss", [squared, entropy], ids=["squared", "cross_entropy"])


# The step is the implicit one -----------------------------------------------------------------------------------------


@both_losses
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("activation", ["tanh", "softplus"])
@pytest.mark.parametrize("alpha", [1e-3, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_step_is_the_oracle_s(batch: int, alpha: float, activation: str, bias: bool, loss) -> None:
    case = Case(activation, bias, batch, loss)
    expected = case.oracle(alpha)
    assert expected.gradient <= 1e-12
    ours, model = step_of(case, alpha, tol=1e-12)
    relaxation = model.state.relaxation
    assert relaxation.converged and relaxation.residual <= 1e-12
    assert relative_error(ours, case.change(expected.parameters)) <= 1e-8
    assert relaxation.energy[-1] == pytest.approx(expected.objective, rel=1e-13)


@pytest.mark.parametrize("batch", [12, 40])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_the_batch_may_be_larger_than_the_fan_in(bias: bool, batch: int) -> None:
    """The Gram matrix is singular then; in the coordinates of the engine nothing is inverted."""
    case = Case("tanh", bias, batch)
    ours, _ = step_of(case, 0.3, tol=1e-12)
    assert relative_error(ours, case.change(case.oracle(0.3).parameters)) <= 1e-8


def test_a_sample_that_is_there_twice_is_no_obstacle() -> None:
    case = Case(batch=4)
    case.x = case.x[[0, 1, 1, 0]]
    ours, _ = step_of(case, 0.3, tol=1e-12)
    assert relative_error(ours, case.change(case.oracle(0.3).parameters)) <= 1e-8


@both_losses
def test_with_rectifiers_too_where_no_value_ends_on_a_kink(loss) -> None:
    case = Case("relu", loss=loss, batch=4)
    expected = case.oracle(1e-3)
    assert expected.gradient <= 1e-12  # the oracle has found a minimum off the kinks
    ours, _ = step_of(case, 1e-3, tol=1e-12)
    assert relative_error(ours, case.change(expected.parameters)) <= 1e-8


@both_losses
@pytest.mark.parametrize("batch", [1, 4])
def test_at_step_size_one_both_descents_end_in_the_same_minimum(batch: int, loss) -> None:
    case = Case(batch=batch, loss=loss)
    ours, _ = step_of(case, 1.0, tol=1e-12)
    assert relative_error(ours, case.change(case.oracle(1.0).parameters)) <= 1e-8


@both_losses
@pytest.mark.parametrize("alpha", [5.0, 100.0])
@pytest.mark.parametrize("batch", [1, 4])
def test_large_steps_end_in_a_minimum_below_every_explicit_step(batch: int, alpha: float, loss) -> None:
    """There are several minima; D3 (5) compares with the best step along the gradient."""
    case, case_before = Case(batch=batch, loss=loss), Case(batch=batch, loss=loss)
    ours, model = step_of(case, alpha, max_steps=200)
    relaxation = model.state.relaxation
    assert relaxation.converged
    after = {name: parameter - ours[name] for name, parameter in case.parameters.items()}
    assert proximal_gradient(case.loss_of, case.parameters, alpha, after) <= 1.01e-10
    objective = proximal_objective(case.loss_of, case.parameters, alpha)
    assert torch.linalg.eigvalsh(torch.func.hessian(objective)(flat(after)))[0] > 0
    start = flat(case.parameters)
    gradient = torch.func.grad(objective)(start)
    explicit = min(float(objective(start - rate * gradient)) for rate in torch.logspace(-4, 3, 200).double())
    assert relaxation.energy[-1] == pytest.approx(float(objective(flat(after))), rel=1e-12)
    assert relaxation.energy[-1] < explicit
    if (loss, batch, alpha) != (entropy, 1, 100.0):  # there the oracle's descent falls into one .8% lower
        assert relaxation.energy[-1] <= case_before.oracle(alpha).objective * (1 + 1e-9)


@pytest.mark.parametrize("activation", ["tanh", "softplus"])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_the_residual_is_the_proximal_gradient_at_the_parameters_after_the_step(steps: int, activation: str) -> None:
    """Wherever the relaxation stops, converged or not."""
    case = Case(activation, batch=4)
    ours, model = step_of(case, 2.0, tol=1e-12, max_steps=steps)
    after = {name: parameter - ours[name] for name, parameter in case.parameters.items()}
    relaxation = model.state.relaxation
    expected = proximal_gradient(case.loss_of, case.parameters, 2.0, after)
    assert relaxation.residual == pytest.approx(expected, rel=1e-10, abs=1e-13)
    assert relaxation.converged == (relaxation.residual <= 1e-12) and relaxation.steps <= steps
    assert steps > 2 or not relaxation.converged


def test_explicit_and_implicit_steps_differ_by_the_square_of_the_step_size() -> None:
    case = Case("tanh", batch=4)
    explicit = torch.func.grad(case.loss_of)(case.parameters)
    alphas = torch.tensor([1e-4, 3e-4, 1e-3], dtype=torch.float64)
    distances = []
    for alpha in alphas.tolist():
        ours, _ = step_of(Case("tanh", batch=4), alpha, tol=1e-13)
        distances.append(torch.cat([(g - alpha * explicit[n]).reshape(-1) for n, g in ours.items()]).norm())
    slopes = torch.stack(distances).log().diff() / alphas.log().diff()
    assert ((slopes - 2).abs() <= 0.1).all()


# Kinks ----------------------------------------------------------------------------------------------------------------

on_kinks = pytest.mark.parametrize(
    ("batch", "alpha", "loss", "bias"),
    [
        (1, 0.1, squared, True),
        (1, 0.5, squared, True),
        (1, 0.1, entropy, False),
        (1, 0.5, entropy, False),
        (4, 0.5, squared, False),
        (6, 0.5, squared, True),
    ],
)


@on_kinks
def test_a_minimum_on_a_kink_is_one_in_every_direction(batch: int, alpha: float, loss, bias: bool) -> None:
    case = Case("relu", bias, batch, loss)
    ours, model = step_of(case, alpha, tol=1e-11)
    relaxation = model.state.relaxation
    assert relaxation.converged
    objective = proximal_objective(case.loss_of, case.parameters, alpha)
    after = flat({name: parameter - ours[name] for name, parameter in case.parameters.items()})
    value = float(objective(after))
    assert relaxation.energy[-1] == pytest.approx(value, rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-2, 1e-4, 1e-6):
        for _ in range(100):
            direction = torch.randn(after.shape, generator=generator, dtype=after.dtype)
            assert float(objective(after + size * direction / direction.norm())) >= value - 1e-14 * abs(value)
    # Newton's method on the parameters knows no kinks: it stops on one, and no lower
    assert value <= case.oracle(alpha).objective * (1 + 1e-12)


def test_some_of_these_minima_lie_on_kinks() -> None:
    held = 0
    for batch, alpha, loss, bias in on_kinks.args[1]:
        _, model = step_of(Case("relu", bias, batch, loss), alpha)
        held += sum(int((model.state.value[name] == 0).sum()) for name in LAYERS)
    assert held >= 3


def test_without_holding_values_on_the_kink_the_relaxation_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch2ebm.implicit.objective.ProximalObjective._has_kink", lambda self, slot: False)
    with pytest.warns(NotSettledWarning, match=r"not at rest.*kink.*tol=1e-10"):
        _, model = step_of(Case("relu", True, 1, squared), 0.1)
    relaxation = model.state.relaxation
    assert relaxation.converged is False and relaxation.residual > 1e-4
    assert relaxation.energy[-1] < relaxation.energy[0]


# The values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_after_the_step_a_feed_forward_pass_reproduces_the_values(activation: str, steps: int, batch: int) -> None:
    """Target attainment (D3, 1), converged or not."""
    case = Case(activation, batch=batch)
    _, model = step_of(case, 1.0, max_steps=steps)
    values = dict(model.state.value)
    assert max(float(error.abs().max()) for error in model.state.error.values()) > 0.01
    torch.optim.SGD(case.net.parameters(), lr=1.0).step()
    h = case.x
    for name, layer in case.net.named_children():
        h = layer(h)
        if name in LAYERS:
            torch.testing.assert_close(h, values[name], rtol=0, atol=1e-12)


def test_the_report_adds_up() -> None:
    case = Case(batch=4)
    _, model = step_of(case, 0.5)
    state, relaxation = model.state, model.state.relaxation
    assert len(relaxation.energy) == relaxation.steps + 1 and set(relaxation.node_energy) == set(LAYERS)
    parts = zip(relaxation.loss, *relaxation.node_energy.values(), strict=True)
    assert relaxation.energy == pytest.approx([sum(part) for part in parts], rel=1e-14)
    assert relaxation.loss[0] == pytest.approx(float(case.loss_of(case.parameters)), rel=1e-13)
    assert relaxation.energy[0] == relaxation.loss[0] and relaxation.energy[-1] < relaxation.energy[0]
    a = case.x
    for name in LAYERS:
        e = state.error[name]
        torch.testing.assert_close(state.value[name] - state.prediction[name], e, rtol=1e-12, atol=1e-14)
        energy = (e * torch.linalg.solve(gram(a, True), e)).sum() / (2 * 0.5)
        assert relaxation.node_energy[name][-1] == pytest.approx(float(energy), rel=1e-9)
        a = torch.tanh(state.value[name])
    torch.testing.assert_close(relaxation.loss[-1], float(case.loss(state.value["4"])), rtol=1e-12, atol=0)


# What the theorem rests on: negative twins ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_the_oracle_s_inference_on_activities_is_the_step_too(batch: int) -> None:
    case = Case(batch=batch)
    by_inference = activity_step(case.parameters, LAYERS, case.x, case.loss, 0.5, case.function)
    expected = case.change(case.oracle(0.5).parameters)
    assert relative_error(case.change(by_inference.parameters), expected) <= 1e-8
    ours, model = step_of(case, 0.5, tol=1e-12)
    assert relative_error(ours, case.change(by_inference.parameters)) <= 1e-8
    for name, h in zip(LAYERS, by_inference.activities, strict=True):
        torch.testing.assert_close(model.state.value[name], h, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("normaliser", "batch"), [(gram_without_bias, 1), (gram_without_bias, 4), (mean_norm, 4), (one, 1), (one, 4)]
)
def test_another_normaliser_is_another_step(normaliser, batch: int) -> None:
    case = Case(batch=batch)
    wrong = activity_step(case.parameters, LAYERS, case.x, case.loss, 0.5, case.function, normaliser)
    ours, _ = step_of(case, 0.5)
    assert relative_error(case.change(wrong.parameters), ours) > 0.01


# Other graphs ---------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """A residual add, a value with three readers, a value without parameters of its own, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.stem, self.block = nn.Linear(FEATURES, 6), nn.Linear(6, 6)
            self.gate, self.first = nn.Linear(6, 6, bias=False), nn.Linear(6, CLASSES)
            self.second = nn.Linear(6, 2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.stem(x)
        h = h + self.block(torch.tanh(h))
        a = torch.tanh(h)
        return self.first(a * torch.sigmoid(self.gate(a))), self.second(a).log_softmax(1)


def branches_by_hand(p, x: Tensor) -> tuple[Tensor, Tensor]:
    def dense(name: str, a: Tensor) -> Tensor:
        return a @ p[f"{name}.weight"].t() + p.get(f"{name}.bias", torch.zeros(()).double())

    h = dense("stem", x)
    h = h + dense("block", torch.tanh(h))
    a = torch.tanh(h)
    return dense("first", a * torch.sigmoid(dense("gate", a))), dense("second", a).log_softmax(1)


def of_both(outputs: tuple[Tensor, Tensor]) -> Tensor:
    return entropy(outputs[0]) + 0.3 * F.nll_loss(outputs[1], torch.arange(len(outputs[1])) % 2)


@pytest.mark.parametrize("nodes", ["auto", ["stem", "block", "gate", "first", "second"]])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("loss", [of_both, lambda outputs: entropy(outputs[0])], ids=["both", "one_output"])
def test_a_graph_with_branches_and_two_outputs(loss, batch: int, nodes) -> None:
    net, x = Branches(), data(batch, FEATURES)
    parameters = {name: p.detach().clone() for name, p in net.named_parameters()}
    expected = implicit_step(lambda p: loss(branches_by_hand(p, x)), parameters, 0.5)
    model = torch2ebm.convert(net, nodes=nodes)
    algorithm = torch2ebm.ImplicitSGD(0.5, tol=1e-12)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), model, algorithm)
    loss(model(x)).backward()
    change = {name: parameters[name] - after for name, after in expected.parameters.items()}
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, change[name], rtol=1e-8, atol=1e-11)


def test_a_skip_inside_a_named_node_is_no_part_of_the_step() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(7, 7)

        def forward(self, h: Tensor) -> Tensor:
            return self.inner(torch.tanh(h)) + h

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(FEATURES, 7), Block(), nn.Linear(7, CLASSES)).double()
    x = data(4, FEATURES)
    parameters = {name: p.detach().clone() for name, p in net.named_parameters()}

    def by_hand(p) -> Tensor:
        h = x @ p["0.weight"].t() + p["0.bias"]
        h = torch.tanh(h) @ p["1.inner.weight"].t() + p["1.inner.bias"] + h
        return entropy(h @ p["2.weight"].t() + p["2.bias"])

    expected = implicit_step(by_hand, parameters, 0.5)
    model = torch2ebm.convert(net, nodes=["0", "1", "2"])
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), model, torch2ebm.ImplicitSGD(0.5, tol=1e-12))
    entropy(model(x)).backward()
    ours = {name: p.grad for name, p in net.named_parameters()}
    change = {name: parameters[name] - after for name, after in expected.parameters.items()}
    assert relative_error(ours, change) <= 1e-8


def test_frozen_layers_of_any_kind_pass_the_inference_through() -> None:
    """A convolution, a norm and a bias that are not trained are functions like any other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.Tanh())
        net.extend([nn.Flatten(), nn.LayerNorm(9), nn.Linear(9, CLASSES)])
    net = net.double()
    for frozen in (net[2], net[5]):
        frozen.requires_grad_(False)
    net[6].bias.requires_grad_(False)
    x, fixed = data(4, FEATURES), dict(net.named_parameters())
    parameters = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}

    def by_hand(p) -> Tensor:
        h = (x @ p["0.weight"].t() + p["0.bias"]).reshape(4, 2, 4)
        a = torch.tanh(F.conv1d(h, fixed["2.weight"], fixed["2.bias"])).flatten(1)
        a = F.layer_norm(a, (9,), fixed["5.weight"], fixed["5.bias"])
        return entropy(a @ p["6.weight"].t() + fixed["6.bias"])

    ours, _ = learned(net, torch2ebm.ImplicitSGD(0.5, tol=1e-12), x, entropy)
    expected = implicit_step(by_hand, parameters, 0.5)
    change = {name: parameters[name] - after for name, after in expected.parameters.items()}
    assert relative_error(ours, change) <= 1e-8


def test_batch_statistics_without_parameters_follow_the_values() -> None:
    """The step is that of the whole batch's loss, so the statistics are part of it; the running ones move once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(7, affine=False)
        net = nn.Sequential(nn.Linear(FEATURES, 7), norm, nn.Tanh(), nn.Linear(7, CLASSES)).double()
    x = data(4, FEATURES)
    parameters = {name: p.detach().clone() for name, p in net.named_parameters()}

    def by_hand(p) -> Tensor:
        h = x @ p["0.weight"].t() + p["0.bias"]
        a = torch.tanh((h - h.mean(0)) / (h.var(0, correction=0) + norm.eps).sqrt())
        return entropy(a @ p["3.weight"].t() + p["3.bias"])

    ours, _ = learned(net, torch2ebm.ImplicitSGD(0.1, tol=1e-12), x, entropy)
    expected = implicit_step(by_hand, parameters, 0.1)
    change = {name: parameters[name] - after for name, after in expected.parameters.items()}
    for name, g in ours.items():  # a bias before a norm has no gradient
        torch.testing.assert_close(g, change[name], rtol=1e-8, atol=1e-11)
    first = x @ parameters["0.weight"].t() + parameters["0.bias"]
    torch.testing.assert_close(norm.running_mean, 0.1 * first.mean(0), rtol=1e-12, atol=1e-14)
    assert int(norm.num_batches_tracked) == 1


def test_dropout_draws_one_mask() -> None:
    net = nn.Sequential(nn.Linear(FEATURES, 40), nn.Dropout(0.5), nn.Linear(40, CLASSES)).double()
    torch.manual_seed(4)
    _, model = learned(net, torch2ebm.ImplicitSGD(0.1), data(4, FEATURES), entropy)
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    values = model.state.value["2"]
    torch.manual_seed(4)
    torch.testing.assert_close(net(data(4, FEATURES)), values, rtol=0, atol=1e-12)


# The loop -------------------------------------------------------------------------------------------------------------


def test_in_the_unchanged_loop_every_step_is_the_implicit_one() -> None:
    case = Case(batch=4, loss=squared)
    model = torch2ebm.convert(case.net)
    optimizer = torch2ebm.EnergyOptimizer(
        torch.optim.SGD(case.net.parameters(), lr=1.0), model, torch2ebm.ImplicitSGD(0.5, tol=1e-12)
    )
    losses = []
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in case.net.named_parameters()}
        expected = implicit_step(case.loss_of, before, 0.5)
        optimizer.zero_grad()
        loss = case.loss(model(case.x))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        after = {name: p.detach() for name, p in case.net.named_parameters()}
        change = {name: after[name] - before[name] for name in after}
        assert relative_error(change, {n: p - before[n] for n, p in expected.parameters.items()}) <= 1e-8
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("factor", [0.25, 1000.0, 2.0**16])
def test_a_factor_outside_the_loss_scales_the_gradient_and_nothing_else(factor: float) -> None:
    plain, _ = step_of(Case(batch=4), 0.5)
    case = Case(batch=4)
    scaled, _ = learned(
        case.net, torch2ebm.ImplicitSGD(0.5), case.x, lambda output: scaled_by(factor, case.loss(output))
    )
    assert relative_error({name: g / factor for name, g in scaled.items()}, plain) <= 1e-12


def test_a_sum_over_samples_is_one_loss_like_another() -> None:
    case = Case(batch=4, loss=lambda output: F.cross_entropy(output, torch.arange(4) % CLASSES, reduction="sum"))
    ours, _ = step_of(case, 0.1, tol=1e-12)
    assert relative_error(ours, case.change(case.oracle(0.1).parameters)) <= 1e-8


def test_a_loss_of_no_second_derivative_is_a_loss_too() -> None:
    case = Case(batch=4, loss=lambda output: (output * TARGETS[:4]).sum(1).mean())
    ours, _ = step_of(case, 0.1, tol=1e-12)
    assert relative_error(ours, case.change(case.oracle(0.1).parameters)) <= 1e-8


def test_single_precision_gives_the_same_step_to_its_precision() -> None:
    reference, _ = step_of(Case(batch=4), 0.5)
    case = Case(batch=4)
    ours, model = learned(case.net.float(), torch2ebm.ImplicitSGD(0.5), case.x.float(), case.loss)
    assert model.state.relaxation.converged
    assert relative_error({name: g.double() for name, g in ours.items()}, reference) <= 1e-4


def test_a_backward_twice_gives_the_same_twice() -> None:
    case = Case(batch=4)
    model = torch2ebm.convert(case.net)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(case.net.parameters(), lr=1.0), model, torch2ebm.ImplicitSGD(0.5))
    loss = case.loss(model(case.x))
    first = torch.autograd.grad(loss, list(case.net.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(case.net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"alpha": 0.0}, {"alpha": -1.0}, {"alpha": float("nan")}, {"tol": -1.0}, {"max_steps": 0}],
    ids=str,
)
def test_illegal_settings_are_refused(settings) -> None:
    with pytest.raises(ConfigurationError, match="ImplicitSGD"):
        torch2ebm.ImplicitSGD(**settings)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(FEATURES, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(torch.tanh(self.twice(torch.tanh(self.first(x)))))


OUTSIDE = {
    "convolution": (lambda: nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(8, CLASSES)), (4, 1, FEATURES)),
    "norm": (lambda: nn.Sequential(nn.Linear(FEATURES, 6), nn.LayerNorm(6), nn.Linear(6, CLASSES)), (4, FEATURES)),
    "shared": (Shared, (4, FEATURES)),
    "sequence": (lambda: nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES)), (4, 2, FEATURES)),
}


@pytest.mark.parametrize(("build", "shape"), OUTSIDE.values(), ids=OUTSIDE)
def test_layers_outside_the_theory_are_refused_before_anything_changes(build, shape: tuple[int, ...]) -> None:
    net = build().double()
    model = torch2ebm.convert(net)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), model, torch2ebm.ImplicitSGD())
    loss = model(data(*shape)).square().mean()
    with pytest.raises(DenseLayerError, match="PredictiveCoding or ZeroDivergence"):
        loss.backward()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_inputs_have_no_gradient() -> None:
    case = Case(batch=4)
    with pytest.raises(InputGradientError, match="ZeroDivergence"):
        learned(case.net, torch2ebm.ImplicitSGD(), case.x.requires_grad_(), case.loss)


class Once(torch.autograd.Function):
    """An operation that can be differentiated once."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh().square())


class OnceModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def test_an_operation_that_hides_its_second_derivative_costs_steps_and_no_digits() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(FEATURES, 6), OnceModule(), nn.Linear(6, CLASSES)).double()
    parameters = {name: p.detach().clone() for name, p in net.named_parameters()}
    x = data(4, FEATURES)
    expected = implicit_step(lambda p: entropy(feedforward(p, x, torch.tanh, ["0", "2"])), parameters, 0.1)
    ours, model = learned(net, torch2ebm.ImplicitSGD(0.1, tol=1e-11), x, entropy)
    assert model.state.relaxation.converged and model.state.relaxation.steps > 5
    change = {name: parameters[name] - after for name, after in expected.parameters.items()}
    assert relative_error(ours, change) <= 1e-8


def test_a_loss_without_a_second_derivative_is_refused() -> None:
    def connectionist(output: Tensor) -> Tensor:
        steps = output.reshape(3, 4, 3).transpose(0, 1).log_softmax(2)  # [time, batch, classes]
        return F.ctc_loss(steps, torch.tensor([[1, 2]] * 3), torch.tensor([4] * 3), torch.tensor([2] * 3))

    net = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 12)).double()
    model = torch2ebm.convert(net)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), model, torch2ebm.ImplicitSGD())
    loss = connectionist(model(data(3, FEATURES)))
    with pytest.raises(UnsupportedError, match=r"the loss.*second derivative"):
        loss.backward()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_loss_that_is_no_number_is_refused() -> None:
    case = Case(batch=4, loss=lambda output: (output - TARGETS[:4] * float("nan")).square().mean())
    with pytest.raises(NonFiniteError, match="the loss, backward"):
        step_of(case, 0.1)


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_twice_over_makes_the_step_of_the_batch(seed: int) -> None:
    """The mean over the samples is the same. Samples that are alike make the Gram matrix singular, and ReLU has kinks
    on which their values are held together."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    x, y = torch.randn(6, 6).double(), torch.randint(3, (6,))
    found = []
    for times in (1, 2):
        twin = copy.deepcopy(net)
        model = torch2ebm.convert(twin)
        algorithm = torch2ebm.ImplicitSGD(alpha=0.5)
        torch2ebm.EnergyOptimizer(torch.optim.SGD(twin.parameters(), lr=0.5), model, algorithm)
        F.cross_entropy(model(x.repeat(times, 1)), y.repeat(times)).backward()
        assert model.state.relaxation.converged
        found.append([p.grad for p in twin.parameters() if p.grad is not None])
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
