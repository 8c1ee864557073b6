"""Anderson acceleration against its definition: the affine combination of iterates whose gradient is smallest."""

import pytest
import torch
from helpers import attached, local_gradients
from oracles.energy import EnergyProblem, Values, gradient
from oracles.graphs import SkipDag, half_squared_error, skip_dag
from torch import Tensor

import torch2ebm

NAMES = [vertex.name for vertex in skip_dag().vertices]


def rows(by_name: Values) -> Tensor:
    return torch.cat([value.flatten(1) for value in by_name.values()], 1)


def by_anderson(problem: EnergyProblem, steps: int, lr: float, memory: int) -> Values:
    """Walker and Ni 2011, (1.1): min |sum_j a_j g_j| subject to sum_j a_j = 1 over the last ``memory`` + 1 iterates.

    Solved by its Lagrange conditions, sample by sample; then the next one is sum_j a_j (e_j - lr g_j).
    """
    shapes = {name: value.shape for name, value in problem.feedforward().items()}
    widths = [shape[1:].numel() for shape in shapes.values()]

    def unpacked(packed: Tensor) -> Values:
        return dict(zip(shapes, packed.split(widths, 1), strict=True))

    errors = [torch.zeros(next(iter(shapes.values()))[0], sum(widths), dtype=torch.float64)]
    slopes: list[Tensor] = []
    for _ in range(steps):
        slopes.append(rows(gradient(problem.of_errors, unpacked(errors[-1]))))
        count = min(memory + 1, len(errors))
        of_samples = []
        for sample in range(len(errors[-1])):
            g = torch.stack([each[sample] for each in slopes[-count:]], 1)
            e = torch.stack([each[sample] for each in errors[-count:]], 1)
            system = torch.ones(count + 1, count + 1, dtype=torch.float64)
            system[:count, :count] = g.T @ g / g.square().sum(0).max()
            system[count, count] = 0
            right = torch.zeros(count + 1, dtype=torch.float64)
            right[count] = 1
            a = torch.linalg.solve(system, right)[:count]
            of_samples.append(e @ a - lr * (g @ a))
        errors.append(torch.stack(of_samples))
    return problem.values_of(unpacked(errors[-1]))


@pytest.mark.parametrize(("memory", "steps"), [(1, 4), (2, 1), (2, 2), (2, 5), (3, 4), (5, 4)])
def test_values_are_those_of_the_definition(memory: int, steps: int) -> None:
    """The engine solves normal equations with a ridge of 10 epsilon: half of the digits stay."""
    problem = EnergyProblem(skip_dag(), half_squared_error)
    expected = by_anderson(problem, steps, 0.2, memory)
    algorithm = torch2ebm.PredictiveCoding(
        solver=torch2ebm.AndersonErrorDescent(steps, 0.2, memory=memory), loss_reduction="sum"
    )
    model = attached(SkipDag(), algorithm, nodes=NAMES)
    local_gradients(model, (skip_dag().inputs["x"],), torch2ebm.EnergyLoss(summed))
    for name, value in expected.items():
        torch.testing.assert_close(model.state.value[name], value, rtol=1e-7, atol=1e-8)


def test_another_memory_is_another_result() -> None:
    """The negative twin: one iterate more or less would be seen."""
    problem = EnergyProblem(skip_dag(), half_squared_error)
    two, three = (rows(by_anderson(problem, 5, 0.2, memory)) for memory in (2, 3))
    assert float((two - three).abs().max()) > 1e-4


def summed(output: Tensor) -> Tensor:
    return half_squared_error(output)


summed.reduction = "sum"
