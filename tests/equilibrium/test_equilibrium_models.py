"""Every architecture of the zoo: the gradient at its equilibrium tends to backprop's, or a refusal says why not."""

import copy

import pytest
import torch
from oracles.equilibria import distance
from oracles.graphs import backprop, call
from torch import Tensor
from zoo import PROBLEMS, Problem

import torch2ebm
from torch2ebm.errors import NoEquilibriumError

REFUSED = {
    "normalised_cnn": "instance_norm",
    "vit": "layer_norm",
    "gpt": "layer_norm",
    "mixer": "layer_norm",
    "lstm": "lstm",
    "gru": "gru",
}
every_model = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)


def learnt(problem: Problem, algorithm: torch2ebm.Algorithm) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The algorithm's gradients in evaluation mode, and backprop's."""
    module, inputs = problem.build().eval().double(), problem.inputs(3)
    reference = backprop(module, inputs, problem.loss)
    model = torch2ebm.convert(module)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), model, algorithm)
    problem.loss(call(model, copy.deepcopy(inputs))).backward()
    own = dict(module.named_parameters())
    return {n: torch.zeros_like(r) if own[n].grad is None else own[n].grad for n, r in reference.items()}, reference


@every_model
def test_towards_no_feedback_the_gradient_is_backprop_s(problem: Problem) -> None:
    """Distance of first order in the feedback, which residual, gated, shared, tied and recurrent weights keep."""
    distances = []
    for feedback in (1e-3, 1e-4):
        algorithm = torch2ebm.RecurrentBackprop(torch2ebm.Neumann(30), 30, feedback=feedback)
        if problem.name in REFUSED:
            with pytest.raises(NoEquilibriumError, match=REFUSED[problem.name]):
                learnt(problem, algorithm)
            return
        distances.append(distance(*learnt(problem, algorithm)))
    assert distances[0] <= 1e-2 and distances[1] <= 0.12 * distances[0] + 1e-12


# a detach cuts the feedback out of the energy's derivative; ties in a max-pool break under the smallest nudge
NOT_SMOOTH = {"stop_gradient", "cnn"}
SMOOTH = [problem for problem in PROBLEMS if problem.name not in NOT_SMOOTH | REFUSED.keys()]


@pytest.mark.parametrize("problem", SMOOTH, ids=lambda problem: problem.name)
def test_equilibrium_propagation_is_recurrent_backprop_with_strong_feedback(problem: Problem) -> None:
    """The same equilibrium, the gradient by two nudged phases and by a linear system: second order in beta."""
    nudged = torch2ebm.EquilibriumPropagation(torch2ebm.Symmetric(1e-3), 400, 400, feedback=0.3, tol=1e-13)
    ours, _ = learnt(problem, nudged)
    exact, _ = learnt(problem, torch2ebm.RecurrentBackprop(torch2ebm.FixedPointSolve(400), 400, 1e-13, feedback=0.3))
    assert distance(ours, exact) <= 1e-3
