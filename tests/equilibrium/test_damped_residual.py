"""What a damped phase reports is how far an undamped step would go, so that one ``tol`` means one distance."""

import pytest
import torch
from helpers import UNSETTLED
from oracles.equilibria import detached, skip
from test_equilibrium import gradients

import torch2ebm


@pytest.mark.filterwarnings(UNSETTLED)  # nine steps, of which the residual is held against the oracle's
@pytest.mark.parametrize("damping", [0.3, 0.8])
def test_the_residual_of_a_damped_phase_is_the_change_of_an_undamped_step(damping: float) -> None:
    example = skip()
    network, states, distances = example.network, example.network.feedforward(), []
    for _ in range(9):
        moved = detached(network.step(states))
        apart = torch.stack([(moved[name] - states[name]).abs().flatten(1).amax(1) for name in states])
        distances.append(apart.amax(0))  # [batch]
        states = {name: damping * states[name] + (1 - damping) * moved[name] for name in states}
    _, model = gradients(example, torch2ebm.Symmetric(0.1), free_steps=9, damping=damping)
    free = model.state.phases[0]
    assert free.update == "damped" and free.steps == 9
    assert free.residual == pytest.approx(float(distances[-1].max()), rel=1e-9)
    torch.testing.assert_close(free.sample_residual, distances[-1], rtol=1e-9, atol=0.0)
    tol = float(distances[5].max()) * (1 + 1e-9)
    assert all(float(each.max()) > tol for each in distances[:5])
    _, model = gradients(skip(), torch2ebm.Symmetric(0.1), free_steps=9, damping=damping, tol=tol)
    assert model.state.phases[0].steps == 6 and model.state.phases[0].converged
