"""The list of solvers that the tests take: a new solver is one row here.

Its settings are refused and copied (`test_solver_settings`), it is held against a formula on F and sent to an
equilibrium (`test_solvers`), and recorded (`test_programs`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from oracles.energy import (
    EnergyProblem,
    Values,
    by_error_descent,
    by_local_errors,
    by_optimizer,
    by_sequential_descent,
)

import torch2ebm


@dataclass(frozen=True)
class Row:
    """One solver.

    Attributes:
        settings: With 7 steps, and every setting off its default.
        recorded: What recorded programs are tried with.
        make: From a number of steps to a solver, and ``formula`` from a problem and this number to the values where it
            has to end, written without the engine. None where a file of its own holds it against its definition.
        tight: Reaches an equilibrium to 1e-13; None where it is not meant to.
    """

    settings: torch2ebm.Solver
    recorded: torch2ebm.Solver
    make: Callable[[int], torch2ebm.Solver] | None = None
    formula: Callable[[EnergyProblem, int], Values] | None = None
    tight: torch2ebm.Solver | None = None

    @property
    def name(self) -> str:
        return type(self.settings).__name__


ROWS = (
    Row(
        torch2ebm.GradientDescent(7, 0.3, 1e-3),
        torch2ebm.GradientDescent(8, 0.05),
        lambda steps: torch2ebm.GradientDescent(steps, 0.15),
        lambda problem, steps: by_optimizer(problem, steps, lambda v: torch.optim.SGD(v, lr=0.15)),
        torch2ebm.GradientDescent(20_000, 0.2, tol=1e-13),
    ),
    Row(
        torch2ebm.Momentum(7, 0.3, 0.5, 1e-3),
        torch2ebm.Momentum(8, 0.05, 0.8),
        lambda steps: torch2ebm.Momentum(steps, 0.1, momentum=0.7),
        lambda problem, steps: by_optimizer(problem, steps, lambda v: torch.optim.SGD(v, lr=0.1, momentum=0.7)),
        torch2ebm.Momentum(20_000, 0.1, 0.8, tol=1e-13),
    ),
    Row(
        torch2ebm.AdamDescent(7, 0.3, (0.5, 0.6), 1e-4, 1e-3),
        torch2ebm.AdamDescent(6, 0.01),
        lambda steps: torch2ebm.AdamDescent(steps, 0.02, betas=(0.8, 0.99), eps=1e-3),
        lambda problem, steps: by_optimizer(
            problem, steps, lambda v: torch.optim.Adam(v, lr=0.02, betas=(0.8, 0.99), eps=1e-3)
        ),
    ),
    Row(
        torch2ebm.SequentialDescent(7, 0.3, 1e-3),
        torch2ebm.SequentialDescent(3, 0.1),
        lambda steps: torch2ebm.SequentialDescent(steps, 0.2),
        lambda problem, steps: by_sequential_descent(problem, steps, 0.2),
    ),
    Row(
        torch2ebm.ErrorDescent(7, 0.4, 1e-3),
        torch2ebm.ErrorDescent(8, 0.3),
        lambda steps: torch2ebm.ErrorDescent(steps, 0.2),
        lambda problem, steps: by_error_descent(problem, steps, 0.2),
        torch2ebm.ErrorDescent(5_000, 0.2, tol=1e-13),
    ),
    Row(
        torch2ebm.LocalErrorDescent(7, 0.3, 1e-3),
        torch2ebm.LocalErrorDescent(8, 0.1),
        lambda steps: torch2ebm.LocalErrorDescent(steps, 0.2),
        lambda problem, steps: by_local_errors(problem, steps, 0.2),
        torch2ebm.LocalErrorDescent(5_000, 0.3, tol=1e-13),
    ),
    *(
        Row(
            kind(steps=7, lr="auto", tol=1e-3, **more),
            kind(8, "auto"),
            tight=kind(20_000, "auto", tol=1e-13),
        )
        for kind, more in (
            (torch2ebm.GradientDescent, {}),
            (torch2ebm.Momentum, {"momentum": 0.8}),
            (torch2ebm.ErrorDescent, {}),
            (torch2ebm.LocalErrorDescent, {}),
        )
    ),
    Row(torch2ebm.ErrorDescent(7, "auto", 1e-3), torch2ebm.ErrorDescent("auto", "auto")),
    Row(
        torch2ebm.ErrorConjugateGradient(1e-3, 7),
        torch2ebm.ErrorConjugateGradient(1e-5, 8),
        tight=torch2ebm.ErrorConjugateGradient(1e-13, 300),
    ),
    Row(
        torch2ebm.AndersonErrorDescent(7, 0.4, 4, 1e-3),
        torch2ebm.AndersonErrorDescent(8),
        tight=torch2ebm.AndersonErrorDescent(500, 0.2, tol=1e-13),
    ),
)
