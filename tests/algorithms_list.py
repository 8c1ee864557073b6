"""The list of algorithms that the tests take: a new algorithm is one row here.

All rows go through `test_all_algorithms`, and their settings through `test_settings_of_algorithms` and `test_compare`.
Files that look deeper, or at other nets, take the rows that name them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch2ebm

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One algorithm.

    Attributes:
        name: In the names of tests; that of its class, where it is the first of its class.
        algorithm: With few steps, for nets of three or four layers.
        also: Files of the tests that take it, too. Those of `properties` train nets with batch norm and dropout, in
            evaluation mode where the algorithm ``defines_output``. `test_replicas` runs two processes, and `loops` is
            what the frameworks are held against.
        settings: Every setting off its default, with 7 steps where there are steps; None where another row of its class
            has it. Where two settings exclude each other, one is off.
        change: Another value for one of these settings.
    """

    name: str
    algorithm: torch2ebm.Algorithm
    also: tuple[str, ...] = ()
    settings: torch2ebm.Algorithm | None = None
    change: Mapping[str, Any] = field(default_factory=dict)


ROWS = (
    Row(
        "PredictiveCoding",
        torch2ebm.PredictiveCoding(steps=4, lr=0.2),
        ("test_bad_input", "test_faults", "test_steady", "test_resume", "test_replicas", "loops"),
        torch2ebm.PredictiveCoding(
            solver=torch2ebm.Momentum(7, 0.3, 0.5, 1e-3),
            nudging=torch2ebm.Symmetric(0.1),
            precisions={"0": 2.0},
            loss_reduction="sum",
            batch_statistics="frozen",
            on_divergence="skip",
            compile=True,
            free=("input",),
            start="last",
        ),
        {"loss_reduction": "mean"},
    ),
    Row(
        "ErrorDescent",
        torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent(3), nudging=torch2ebm.Symmetric(0.05)),
        ("test_bad_input", "test_faults", "test_steady"),
    ),
    Row(
        "FixedPrediction",
        torch2ebm.FixedPrediction(steps=4),
        ("test_bad_input", "test_steady"),
        torch2ebm.FixedPrediction(7, 0.3, method="sweep", loss_reduction="sum", compile=True),
        {"lr": 0.1},
    ),
    Row(
        "ZeroDivergence",
        torch2ebm.ZeroDivergence(),
        ("test_bad_input", "test_faults", "test_steady", "test_resume", "test_replicas", "loops"),
        torch2ebm.ZeroDivergence(gamma=0.5, compile=True),
        {"gamma": 1.0},
    ),
    Row(
        "IncrementalPredictiveCoding",
        torch2ebm.IncrementalPredictiveCoding(steps=4, lr=0.2),
        ("test_bad_input", "test_faults", "test_steady", "test_resume", "test_replicas"),
        torch2ebm.IncrementalPredictiveCoding(7, 0.3, energies={"0": torch2ebm.Categorical()}, loss_reduction="sum"),
        {"steps": 3},
    ),
    Row("Backprop", torch2ebm.Backprop(), settings=torch2ebm.Backprop()),
    Row("LevelSchedule", torch2ebm.ZeroDivergence("levels")),
    Row("Anderson", torch2ebm.PredictiveCoding(solver=torch2ebm.AndersonErrorDescent(steps=4))),
    # after a refused call the graph is captured anew, and its step measured anew: none is in test_bad_input
    Row("MeasuredStep", torch2ebm.PredictiveCoding(steps=4, lr="auto"), ("test_faults", "test_steady")),
    Row(
        "UntilRest",
        torch2ebm.PredictiveCoding(
            solver=torch2ebm.ErrorDescent("auto", "auto", 0.1), nudging=torch2ebm.OneSided(0.01)
        ),
        ("test_steady",),
    ),
    Row("Recorded", torch2ebm.PredictiveCoding(steps=4, compile=True), ("test_steady",)),
    Row("Sequential", torch2ebm.PredictiveCoding(solver=torch2ebm.SequentialDescent(steps=3))),
    Row(
        "EquilibriumPropagation",
        torch2ebm.EquilibriumPropagation(torch2ebm.Symmetric(0.5), 12, 4, feedback=0.1),
        ("test_faults", "test_steady", "test_replicas"),
        torch2ebm.EquilibriumPropagation(
            torch2ebm.OneSided(0.2),
            7,
            5,
            feedback=0.5,
            damping=0.1,
            tol=1e-3,
            readout=True,
            loss_reduction="sum",
            compile=True,
            start="last",
        ),
        {"feedback": 0.2},
    ),
    Row(
        "HolomorphicPropagation",
        torch2ebm.EquilibriumPropagation(torch2ebm.Holomorphic(0.1, points=3), 8, 4, feedback=0.1),
    ),
    Row(
        "ContrastiveHebbian",
        torch2ebm.ContrastiveHebbian(0.3, free_steps=8, clamped_steps=6),
        settings=torch2ebm.ContrastiveHebbian(0.3, 7, 5, damping=0.1, tol=1e-3, start="last"),
        change={"clamped_steps": 9},
    ),
    Row(
        "CoupledLearning",
        torch2ebm.CoupledLearning(0.25, free_steps=8, clamped_steps=4, feedback=0.1),
        settings=torch2ebm.CoupledLearning(0.3, 7, 5, feedback=0.5, damping=0.1, tol=1e-3, start="last"),
        change={"beta": 0.1},
    ),
    Row(
        "RecurrentBackprop",
        torch2ebm.RecurrentBackprop(torch2ebm.Neumann(4), free_steps=12, feedback=0.05),
        ("test_faults", "test_steady"),
        torch2ebm.RecurrentBackprop(
            torch2ebm.Neumann(4), 7, 1e-3, feedback=0.5, damping=0.1, readout=True, start="last"
        ),
        {"tol": 1e-6},
    ),
    Row(
        "ProximalInferenceLearning",
        torch2ebm.ProximalInferenceLearning(alpha=0.1, steps=5, feedback_rate=0.1),
        settings=torch2ebm.ProximalInferenceLearning(2.0, 7, 0.1, 0.2, 0.3, loss_reduction="sum"),
        change={"eps": 0.25},
    ),
    Row(
        "ImplicitSGD",
        torch2ebm.ImplicitSGD(alpha=0.1),
        settings=torch2ebm.ImplicitSGD(0.3, 1e-4, max_steps=7),
        change={"alpha": 2.0},
    ),
)
ALL = {row.name: row.algorithm for row in ROWS}


def taken_by(file: str) -> dict[str, torch2ebm.Algorithm]:
    """The rows that name this file of tests."""
    return {row.name: row.algorithm for row in ROWS if Path(file).stem in row.also}
