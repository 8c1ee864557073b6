"""compile=True: recorded programs compute what the eager engine does, on every model of the tests."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES
from oracles.graphs import call
from test_programs import ALGORITHMS, Make, assert_same, recorded_only
from torch import Tensor
from zoo import PROBLEMS, Problem

import torch2ebm

__all__ = ["recorded_only"]  # a fixture


LONG = ("T5", "ResNet-50", "GoogLeNet", "DenseNet", "MobileNet", "EfficientNet", "Swin")  # ResNet-18 and ViT are quick


def _cases() -> Iterator[Any]:
    for problem in (*FAMILIES, *PROBLEMS):
        for name, make in ALGORITHMS[:1]:
            marks = [pytest.mark.slow] * problem.name.startswith(LONG)
            yield pytest.param(problem, make, id=f"{problem.name}, {name}", marks=marks)


@pytest.mark.parametrize(("problem", "make"), list(_cases()))
@pytest.mark.usefixtures("recorded_only")
def test_programs_compute_what_the_engine_computes_on_every_model(problem: Problem, make: Make) -> None:
    expected, buffers = short_training(problem, make())
    ours, own_buffers = short_training(problem, make(compile=True))
    assert_same(ours, expected, 1e-10)
    for key, buffer in buffers.items():
        torch.testing.assert_close(own_buffers[key], buffer, rtol=1e-10, atol=1e-12)


def short_training(
    problem: Problem, algorithm: torch2ebm.Algorithm
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    module = problem.build()
    model = torch2ebm.convert(module, example_inputs=problem.inputs(4))
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(module.parameters(), lr=1e-3), model, algorithm)
    torch.manual_seed(0)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        problem.loss(call(model, copy.deepcopy(problem.inputs(4)))).backward()
        found.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
        optimizer.step()
    return found, dict(module.named_buffers())
