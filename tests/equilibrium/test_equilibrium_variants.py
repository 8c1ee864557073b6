"""Recurrent backprop, contrastive Hebbian and coupled learning against formulas, and against each other."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import attached, local_gradients
from oracles.equilibria import (
    Example,
    bptt,
    clamped,
    convolutional,
    cosine,
    distance,
    half_squared,
    linearised,
    mlp,
    one_sided,
    recurrent_backprop,
    settled,
    skip,
)
from oracles.graphs import backprop
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ConfigurationError, PartitionError

EXAMPLES = [mlp, convolutional, skip]


def gradients(example: Example, algorithm: torch2ebm.Algorithm):
    """``.grad`` of the summed loss, from algorithms that need its gradient once, so that any form of it will do."""
    model = attached(example.module, algorithm)
    return local_gradients(model, (example.x,), example.network.loss), model


# Recurrent backprop ---------------------------------------------------------------------------------------------------


def recurrent(solver, example: Example, steps: int = 3000) -> torch2ebm.RecurrentBackprop:
    return torch2ebm.RecurrentBackprop(solver, steps, 1e-15, feedback=example.network.feedback)


@pytest.mark.parametrize("feedback", [1.0, 0.3])
@pytest.mark.parametrize("solver", [torch2ebm.FixedPointSolve(4000, 1e-15), torch2ebm.ConjugateGradient(200, 1e-14)])
@pytest.mark.parametrize("make", EXAMPLES)
def test_it_is_the_gradient_at_the_equilibrium(make, solver, feedback: float) -> None:
    example = make().with_settings(feedback=feedback)
    ours, model = gradients(example, recurrent(solver, example))
    assert distance(ours, recurrent_backprop(example.network, settled(example.network))) <= 1e-11
    assert model.state.relaxation.converged and model.state.relaxation.residual <= solver.tol


@pytest.mark.parametrize("terms", [0, 1, 4, 11])
@pytest.mark.parametrize("make", EXAMPLES)
def test_terms_of_the_neumann_series_are_steps_of_truncated_backprop(make, terms: int) -> None:
    """K terms are the powers 0, ..., K, and K + 1 steps through time at the fixed point."""
    example = make()
    ours, model = gradients(example, recurrent(torch2ebm.Neumann(terms), example))
    states = settled(example.network)
    assert distance(ours, bptt(example.network, states, terms + 1)) <= 1e-12
    dense = linearised(example.network, states).neumann(terms)
    assert distance(ours, {name: g.reshape(ours[name].shape) for name, g in dense.items()}) <= 1e-12
    assert model.state.relaxation.steps == terms


def test_one_term_less_is_another_gradient() -> None:
    example = mlp()
    ours, _ = gradients(example, recurrent(torch2ebm.Neumann(4), example))
    assert distance(ours, bptt(example.network, settled(example.network), 4)) > 1e-3


def test_conjugate_gradients_end_after_as_many_steps_as_a_sample_has_states() -> None:
    """In exact arithmetic; four steps more here. Half of them are not enough."""
    example = mlp(widths=(3, 4, 3, 2), gain=0.5)
    exact = recurrent_backprop(example.network, settled(example.network))
    count = 4 + 3 + 2
    ours, _ = gradients(example, recurrent(torch2ebm.ConjugateGradient(count + 4), example))
    assert distance(ours, exact) <= 1e-11
    half, _ = gradients(example, recurrent(torch2ebm.ConjugateGradient(count // 2), example))
    assert distance(half, exact) > 1e-8


def test_conjugate_gradients_need_no_small_spectral_radius() -> None:
    """A linear net whose update expands: the system has one solution, and the series runs away."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Identity(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        module[2].weight.copy_(torch.tensor([[1.5, 0.0, 0.0], [0.0, 1.5, 0.0]]))
    system = torch.zeros(5, 5, dtype=torch.float64)
    system[:3, 3:], system[3:, :3] = module[2].weight.T.detach(), module[2].weight.detach()

    class Dense:
        def transposed(self, z):
            return {"all": z["all"] @ system}

        def product(self, v):
            return {"all": v["all"] @ system.T}

    b = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(5).double() - system.T, b.T).T
    solution = torch2ebm.ConjugateGradient(10).solve(Dense(), {"all": b})
    torch.testing.assert_close(solution.z["all"], exact, rtol=0, atol=1e-12)
    assert torch2ebm.Neumann(50).solve(Dense(), {"all": b}).residual > 1e6


def test_the_error_is_minus_the_adjoint_of_each_state() -> None:
    example = skip()
    _, model = gradients(example, recurrent(torch2ebm.FixedPointSolve(4000, 1e-15), example))
    states = settled(example.network)
    found = linearised(example.network, states)
    z = torch.linalg.solve(torch.eye(len(found.cost)).double() - found.jacobian.T, found.cost)
    parts = z.split([value.numel() for value in states.values()])
    for name, part in zip(["tanh", "sigmoid", "tanh_1", "readout"], parts, strict=True):
        error = model.state.error[name]
        torch.testing.assert_close(error, -part.reshape(error.shape), rtol=0, atol=1e-11)


# Contrastive Hebbian learning -----------------------------------------------------------------------------------------


def chain_gradients(weights: list[Tensor], biases: list[Tensor], x: Tensor, target: Tensor, gamma: float, steps: int):
    """Xie and Seung's rule for a chain, written with indices (Xie and Seung 2003)."""
    count = len(weights)

    def relax(states: list[Tensor], held: Tensor | None) -> list[Tensor]:
        for _ in range(steps):
            before, states = states, []
            for k in range(count):
                drive = (x if k == 0 else before[k - 1]) @ weights[k].T + biases[k]
                if k < count - 1:
                    drive = torch.sigmoid(drive + gamma * before[k + 1] @ weights[k + 1])
                states.append(drive)
            if held is not None:
                states[-1] = held
        return states

    start, value = [], x
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        value = value @ weight.T + bias
        value = value if k == count - 1 else torch.sigmoid(value)
        start.append(value)
    free = relax(start, None)
    held = relax([*free[:-1], target], target)
    found = []
    for k in range(count):
        scale = -(gamma ** (k + 1 - count))
        below = [x if k == 0 else states[k - 1] for states in (held, free)]
        found.append(scale * (held[k].T @ below[0] - free[k].T @ below[1]))
        found.append(scale * (held[k] - free[k]).sum(0))
    return found


@pytest.mark.parametrize("gamma", [1.0, 0.1])
def test_contrastive_hebbian_learning_is_the_published_rule_on_a_chain(gamma: float) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    x, target = torch.randn(7, 4).double(), torch.randn(7, 3).double()
    model = attached(module, torch2ebm.ContrastiveHebbian(gamma, 12, 9))
    with torch.no_grad():
        linears = [module[0], module[2], module[4]]
        expected = chain_gradients([m.weight for m in linears], [m.bias for m in linears], x, target, gamma, 12)
        # 12 free steps and 9 clamped ones: the rule's loop takes the same number in both
    ours = local_gradients(
        attached_again(model, torch2ebm.ContrastiveHebbian(gamma, 12, 12)), (x,), half_squared(target)
    )
    for name, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(ours[name], reference, rtol=1e-10, atol=1e-11)


def attached_again(model: torch2ebm.EnergyModel, algorithm: torch2ebm.Algorithm) -> torch2ebm.EnergyModel:
    model.detach()
    torch2ebm.EnergyOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, algorithm)
    return model


@pytest.mark.parametrize("make", EXAMPLES)
def test_it_tends_to_backprop_with_first_order_in_gamma(make) -> None:
    errors = []
    gammas = [1e-1, 1e-2, 1e-3]
    for gamma in gammas:
        example = make()
        ours, _ = gradients(example, torch2ebm.ContrastiveHebbian(gamma, 200, 200))
        errors.append(distance(ours, backprop(example.module, (example.x,), example.network.loss)))
        network = replace(example.network, feedback=gamma)
        free = network.relax(network.feedforward(), 200)
        expected = clamped(network, free, 200, 1.0)
        # the difference of two sums, over c_o: their rounding is that of the sums
        size = math.sqrt(sum(float(g.square().sum()) for g in network.phi_gradient(free).values()))
        signal = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
        assert distance(ours, expected) <= 1e-15 * size / (network.weight(network.output) * signal)
    for large, small in itertools.pairwise(errors):
        assert math.log10(large / small) == pytest.approx(1, abs=0.1)


def test_a_signal_near_the_precision_is_refused() -> None:
    model = attached(mlp().module, torch2ebm.ContrastiveHebbian(1e-7))
    with pytest.raises(ConfigurationError, match=r"1e-07\^2 = 1e-14.*larger feedback"):
        model(mlp().x)
    model = attached(mlp().module.float(), torch2ebm.ContrastiveHebbian(1e-3))
    with pytest.raises(ConfigurationError, match=r"precision 1\.2e-07"):
        model(mlp().x.float())


def test_an_output_that_ends_in_an_activation_is_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), nn.Sigmoid())
    model = attached(module, torch2ebm.ContrastiveHebbian())
    with pytest.raises(PartitionError, match=r"'3'.*sigmoid.*binary_cross_entropy_with_logits"):
        model(torch.randn(2, 4))


# Coupled learning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.25])
@pytest.mark.parametrize("make", EXAMPLES)
def test_coupled_learning_is_the_difference_of_two_phases(make, beta: float) -> None:
    example = make()
    ours, model = gradients(example, torch2ebm.CoupledLearning(beta, 300, 6))
    free = example.network.relax(example.network.feedforward(), 300)
    assert distance(ours, clamped(example.network, free, 6, beta)) <= 1e-10
    assert [phase.beta for phase in model.state.phases] == [0.0, beta]


def test_it_is_no_estimate_of_the_gradient_but_a_direction_like_it() -> None:
    """As beta goes to 0 the distance to the gradient stays, where a nudge's goes to 0."""
    example = mlp()
    exact = recurrent_backprop(example.network, settled(example.network))
    ours, _ = gradients(example, torch2ebm.CoupledLearning(1e-4, 3000, 3000, tol=1e-15))
    assert distance(ours, exact) > 0.05 and cosine(ours, exact) > 0.9
    free = settled(example.network)
    assert distance(one_sided(example.network, free, 3000, 1e-4), exact) < 1e-3


def test_contrastive_hebbian_learning_is_coupled_learning_at_one() -> None:
    example = skip()
    hebbian, _ = gradients(example, torch2ebm.ContrastiveHebbian(0.3, 50, 20))
    coupled, _ = gradients(skip(), torch2ebm.CoupledLearning(1.0, 50, 20, feedback=0.3))
    assert distance(hebbian, coupled) <= 1e-14
