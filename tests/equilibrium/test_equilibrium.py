"""Equilibrium propagation against networks written out by hand, and against the gradient at the equilibrium."""

import math

import pytest
import torch
from helpers import UNSETTLED, attached, local_gradients, scaled_by
from oracles.equilibria import (
    Example,
    Loss,
    bptt,
    convolutional,
    cosine,
    distance,
    linearised,
    mlp,
    one_sided,
    recurrent_backprop,
    settled,
    skip,
    symmetric,
)
from oracles.graphs import backprop
from torch import Tensor, nn

import torch2ebm

EXAMPLES = [mlp, convolutional, skip]
ESTIMATES = [(torch2ebm.OneSided, one_sided), (torch2ebm.Symmetric, symmetric)]


def summed(loss: Loss) -> torch2ebm.EnergyLoss:
    def of(output: Tensor) -> Tensor:
        return loss(output)

    of.reduction = "sum"
    return torch2ebm.EnergyLoss(of)


def gradients(example: Example, nudging, free_steps: int = 300, nudged_steps: int = 7, **settings):
    algorithm = torch2ebm.EquilibriumPropagation(
        nudging,
        free_steps,
        nudged_steps,
        feedback=example.network.feedback,
        loss_reduction="sum",
        **settings,
    )
    model = attached(example.module, algorithm)
    return local_gradients(model, (example.x,), summed(example.network.loss)), model


# The oracle itself ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", EXAMPLES)
def test_the_networks_written_out_are_the_modules(make) -> None:
    example = make()
    ours = example.network.feedforward()[example.network.output]
    torch.testing.assert_close(ours, example.module(example.x).detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("make", EXAMPLES)
def test_two_ways_to_the_gradient_at_the_equilibrium_agree(make) -> None:
    """A dense solve, and backprop through many steps: the error of the second goes like rho(J)^steps."""
    network = make().network
    states = settled(network)
    radius = float(torch.linalg.eigvals(linearised(network, states).jacobian).abs().max())
    assert distance(bptt(network, states, 100), recurrent_backprop(network, states)) <= 10 * radius**100 + 1e-13


# The same finite steps ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(UNSETTLED)  # so few steps are meant
@pytest.mark.parametrize("feedback", [1.0, 0.3])
@pytest.mark.parametrize("steps", [1, 4, 300])
@pytest.mark.parametrize("make", EXAMPLES)
def test_the_free_phase_is_the_oracles_and_the_output_of_the_model(make, steps: int, feedback: float) -> None:
    example = make().with_settings(feedback=feedback)
    expected = example.network.relax(example.network.feedforward(), steps)[example.network.output]
    algorithm = torch2ebm.EquilibriumPropagation(free_steps=steps, feedback=feedback)
    model = attached(example.module, algorithm)
    torch.testing.assert_close(model(example.x), expected, rtol=0, atol=1e-13)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(example.x), expected, rtol=0, atol=1e-13)
    with torch.inference_mode():
        torch.testing.assert_close(model(example.x.clone()), expected, rtol=0, atol=1e-13)
    assert torch.equal(model.feedforward(example.x), example.module(example.x))


@pytest.mark.parametrize("feedback", [1.0, 0.3])
@pytest.mark.parametrize(("nudging", "estimate"), ESTIMATES)
@pytest.mark.parametrize("make", EXAMPLES)
def test_the_gradient_is_the_oracles_after_the_same_steps(make, nudging, estimate, feedback: float) -> None:
    example = make().with_settings(feedback=feedback)
    free = example.network.relax(example.network.feedforward(), 300)
    ours, model = gradients(example, nudging(0.1))
    assert distance(ours, estimate(example.network, free, 7, 0.1)) <= 1e-10
    assert [phase.steps for phase in model.state.phases] == [300] + [7] * (len(model.state.phases) - 1)


@pytest.mark.parametrize("twin", [{"nudge_by_output": False}, {"symmetric": False}])
def test_a_faulty_twin_has_another_gradient(twin) -> None:
    """Without c_o on the nudge, and without symmetric feedback."""
    example = mlp().with_settings(feedback=0.3)
    faulty = example.with_settings(**twin).network
    free = faulty.relax(faulty.feedforward(), 300)
    ours, _ = gradients(example, torch2ebm.Symmetric(0.1))
    assert distance(ours, symmetric(faulty, free, 7, 0.1)) > 0.1


@pytest.mark.filterwarnings(UNSETTLED)  # so few steps are meant
@pytest.mark.parametrize("damping", [0.3, 0.6])
def test_damping_takes_part_of_a_step_back(damping: float) -> None:
    example, states = skip(), skip().network.feedforward()
    for _ in range(5):
        moved = example.network.step(states)
        states = {name: damping * states[name] + (1 - damping) * moved[name].detach() for name in states}
    model = attached(example.module, torch2ebm.EquilibriumPropagation(free_steps=5, damping=damping))
    torch.testing.assert_close(model(example.x), states["s4"], rtol=0, atol=1e-13)


@pytest.mark.filterwarnings(UNSETTLED)  # so few steps are meant
def test_the_report_says_what_the_phases_did() -> None:
    example = skip()
    network, beta = example.network, 0.2
    free = network.relax(network.feedforward(), 50)
    before, after = network.relax(free, 6, beta), network.relax(free, 7, beta)
    _, model = gradients(example, torch2ebm.Symmetric(beta), free_steps=50)
    state = model.state
    assert [phase.beta for phase in state.phases] == [0.0, beta, -beta] and state.relaxation is state.phases[1]
    expected = max(float((after[name] - before[name]).abs().max()) for name in after)
    assert state.relaxation.residual == pytest.approx(expected, rel=1e-9)
    assert float(state.relaxation.sample_residual.max()) == pytest.approx(expected, rel=1e-9)
    names = {"s1": "tanh", "s2": "sigmoid", "s3": "tanh_1", "s4": "readout"}
    for ours_name, name in zip(names.values(), names, strict=True):
        torch.testing.assert_close(state.value[ours_name], after[name], rtol=0, atol=1e-13)
        torch.testing.assert_close(state.prediction[ours_name], free[name], rtol=0, atol=1e-13)
    torch.testing.assert_close(state.value["tanh_1"], state.value["shared_1"].tanh(), rtol=0, atol=1e-13)
    plain = example.module(example.x).detach()
    apart = float((free["s4"] - plain).norm() / plain.norm())
    assert state.feedforward_distance == pytest.approx(apart, rel=1e-10)
    assert state.scalars()["feedforward_distance"] == state.feedforward_distance


@pytest.mark.filterwarnings(UNSETTLED)  # so few steps are meant
def test_tol_ends_a_phase_early() -> None:
    _, model = gradients(skip(), torch2ebm.Symmetric(0.1), free_steps=2000, nudged_steps=2000, tol=1e-6)
    assert all(phase.converged and phase.steps < 500 and 0 < phase.residual <= 1e-6 for phase in model.state.phases)
    _, model = gradients(skip(), torch2ebm.Symmetric(0.1), free_steps=3, tol=1e-6)
    assert model.state.phases[0].converged is False and model.state.phases[0].steps == 3


@pytest.mark.filterwarnings(UNSETTLED)  # so few steps are meant
def test_a_sample_relaxes_the_same_alone_or_in_a_batch() -> None:
    example = skip()
    model = attached(example.module, torch2ebm.EquilibriumPropagation())
    with torch.no_grad():
        together = model(example.x)
        alone = torch.cat([model(sample[None]) for sample in example.x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-13)


def test_a_mean_loss_and_a_gradient_scaler_only_scale() -> None:
    example = skip()
    ours, _ = gradients(example, torch2ebm.Symmetric(0.1))
    target = torch.tensor([0, 2, 1, 0, 1])
    model = attached(example.module, torch2ebm.EquilibriumPropagation(torch2ebm.Symmetric(0.1), 300, 7))
    found = local_gradients(model, (example.x,), lambda y: scaled_by(3.0, nn.functional.cross_entropy(y, target)))
    assert distance({name: g * 5 / 3 for name, g in found.items()}, ours) <= 1e-12


def test_gradients_accumulate_and_a_call_may_be_asked_again() -> None:
    example = skip()
    once, model = gradients(example, torch2ebm.Symmetric(0.1))
    model.zero_grad()
    loss = summed(example.network.loss)(model(example.x))
    loss.backward(retain_graph=True)
    loss.backward()
    assert distance({name: p.grad / 2 for name, p in model.named_parameters()}, once) <= 1e-12


# The gradient at the equilibrium --------------------------------------------------------------------------------------

ACTIVATIONS = [nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.SiLU(), nn.GELU(), nn.Softsign()]


@pytest.mark.parametrize(("nudging", "order"), [(torch2ebm.OneSided, 1), (torch2ebm.Symmetric, 2)])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda each: type(each).__name__)
def test_the_error_is_of_the_nudging_s_order(activation: nn.Module, nudging, order: int) -> None:
    """Slopes 1 and 2 against recurrent backprop by a dense solve, equilibria to 1e-14 (Scellier and Bengio 2019)."""
    example = mlp(activation, widths=(4, 6, 5, 2), gain=0.5)
    exact = recurrent_backprop(example.network, settled(example.network))
    errors = []
    for beta in (1e-3, 1e-2):
        ours, model = gradients(example, nudging(beta), 3000, 3000, tol=1e-14)
        assert all(phase.converged for phase in model.state.phases)
        errors.append(distance(ours, exact))
    assert math.log10(errors[1] / errors[0]) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("make", EXAMPLES)
def test_towards_no_feedback_it_is_backprop_of_the_module(make) -> None:
    """Distance O(feedback), cosine .9998 at .01, where the nudge is c_o beta."""
    distances = []
    for feedback in (0.1, 0.01):
        example = make().with_settings(feedback=feedback)
        ours, _ = gradients(example, torch2ebm.Symmetric(1e-2), 100, 100)
        reference = backprop(example.module, (example.x,), example.network.loss)
        distances.append(distance(ours, reference))
    assert cosine(ours, reference) >= 0.9998
    assert math.log10(distances[0] / distances[1]) == pytest.approx(1, abs=0.1)
