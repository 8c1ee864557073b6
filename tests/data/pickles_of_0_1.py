"""Makes ``pickles_of_0_1.pkl``, with torch2ebm 0.1.0 and torch 2.13: ``python tests/data/pickles_of_0_1.py``."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torch2ebm

FILE = Path(__file__).with_suffix(".pkl")
BATCH = (torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4), torch.tensor([0, 1, 2, 0, 1]))


def loss_of(model: nn.Module) -> torch.Tensor:
    x, y = BATCH
    return nn.functional.cross_entropy(model(x), y)


def numbers(tensors: Any) -> list[Any]:
    return [tensor.tolist() for tensor in tensors]


def settings() -> dict[str, dict[str, Any]]:
    """Objects with settings that are none of the defaults."""
    return {
        "solver": {
            "GradientDescent": torch2ebm.GradientDescent(7, 0.03, 1e-5),
            "Momentum": torch2ebm.Momentum(7, 0.03, 0.5, 1e-5),
            "Adam": torch2ebm.Adam(7, 0.03, (0.5, 0.75), 1e-4, 1e-5),
            "SequentialDescent": torch2ebm.SequentialDescent(7, 0.03, 1e-5),
            "ErrorDescent": torch2ebm.ErrorDescent(7, 0.03, 1e-5),
            "LocalErrorDescent": torch2ebm.LocalErrorDescent(7, 0.03, 1e-5),
            "Anderson": torch2ebm.Anderson(7, 0.03, 3, 1e-5),
        },
        "linear solver": {
            "Neumann": torch2ebm.Neumann(7),
            "FixedPointSolve": torch2ebm.FixedPointSolve(7, 1e-5),
            "ConjugateGradient": torch2ebm.ConjugateGradient(7, 1e-5),
        },
        "update": {"GaussSeidel": torch2ebm.GaussSeidel(), "AndersonMixing": torch2ebm.AndersonMixing(3)},
        "energy": {
            "Gaussian": torch2ebm.Gaussian(0.5),
            "Gaussian by entry": torch2ebm.Gaussian(torch.tensor([0.5, 2.0])),
            "Categorical": torch2ebm.Categorical(dim=1),
        },
        "nudging": {
            "OneSided": torch2ebm.OneSided(0.25),
            "Symmetric": torch2ebm.Symmetric(0.25),
            "RandomSign": torch2ebm.RandomSign(0.25),
            "Holomorphic": torch2ebm.Holomorphic(0.25, 6),
        },
    }


def algorithms() -> dict[str, Any]:
    return {
        "PredictiveCoding": torch2ebm.PredictiveCoding(
            solver=torch2ebm.Momentum(7, 0.03, 0.5),
            nudging=torch2ebm.Symmetric(0.25),
            precisions={"0": 0.5},
            energies={"2": torch2ebm.Gaussian(2.0)},
            loss_reduction="sum",
            on_divergence="warn",
        ),
        "PredictiveCoding by Adam": torch2ebm.PredictiveCoding(solver=torch2ebm.Adam(7, 0.03)),
        "PredictiveCoding by Anderson": torch2ebm.PredictiveCoding(solver=torch2ebm.Anderson(7, 0.3)),
        "PredictiveCoding by steps": torch2ebm.PredictiveCoding(7, 0.03),
        "FixedPrediction": torch2ebm.FixedPrediction(7, 0.3, method="sweep", loss_reduction="sum"),
        "FixedPrediction in closed form": torch2ebm.FixedPrediction(7, 0.3),
        "ZeroDivergence": torch2ebm.ZeroDivergence("levels", gamma=0.5),
        "IncrementalPredictiveCoding": torch2ebm.IncrementalPredictiveCoding(
            7, 0.3, energies={"0": torch2ebm.Gaussian(0.5)}, loss_reduction="sum"
        ),
        "ProximalInferenceLearning": torch2ebm.ProximalInferenceLearning(
            0.5, 7, 0.03, 0.02, 0.01, loss_reduction="sum"
        ),
        "ImplicitSGD": torch2ebm.ImplicitSGD(0.25, 1e-9, max_steps=50),
        "EquilibriumPropagation": torch2ebm.EquilibriumPropagation(
            torch2ebm.Symmetric(0.25), 40, 30, feedback=0.1, damping=0.1, tol=1e-12, loss_reduction="sum"
        ),
        "EquilibriumPropagation on a circle": torch2ebm.EquilibriumPropagation(
            torch2ebm.Holomorphic(0.25, 6), 40, 30, feedback=0.1, readout=True, update=torch2ebm.GaussSeidel()
        ),
        "ContrastiveHebbian": torch2ebm.ContrastiveHebbian(0.2, 40, 30, damping=0.1, tol=1e-12),
        "CoupledLearning": torch2ebm.CoupledLearning(0.5, 40, 30, feedback=0.1, damping=0.1, tol=1e-12),
        "RecurrentBackprop": torch2ebm.RecurrentBackprop(
            torch2ebm.Neumann(7), 40, 1e-12, feedback=0.1, damping=0.1, readout=True
        ),
        "Backprop": torch2ebm.Backprop(),
    }


def compiled_algorithms() -> dict[str, Any]:
    """Of these the settings alone are kept: to run them takes a compiler."""
    return {
        "PredictiveCoding": torch2ebm.PredictiveCoding(7, 0.03, compile=True),
        "FixedPrediction": torch2ebm.FixedPrediction(7, 0.3, compile=True),
        "ZeroDivergence": torch2ebm.ZeroDivergence(gamma=0.5, compile=True),
        "EquilibriumPropagation": torch2ebm.EquilibriumPropagation(torch2ebm.Symmetric(0.25), 9, 8, compile=True),
    }


def made() -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    detached = pickle.dumps(torch2ebm.convert(net))
    gradients = {name: gradients_of(pickle.loads(detached), each) for name, each in algorithms().items()}
    return {
        "versions": {"torch": torch.__version__, "torch2ebm": "0.1.0"},
        "settings": {kind: {n: pickle.dumps(o) for n, o in group.items()} for kind, group in settings().items()},
        "algorithms": {name: pickle.dumps(each) for name, each in algorithms().items()},
        "compiled algorithms": {name: pickle.dumps(each) for name, each in compiled_algorithms().items()},
        "gradients": gradients,
        "detached model": detached,
        "energy loss": pickle.dumps(torch2ebm.EnergyLoss(nn.functional.cross_entropy)),
        **training(net),
    }


def gradients_of(model: Any, algorithm: Any) -> list[Any]:
    holder = torch2ebm.EnergyOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, algorithm)
    loss_of(model).backward()
    holder.detach()
    return numbers(parameter.grad for parameter in model.parameters())


def training(net: nn.Module) -> dict[str, Any]:
    """Two steps, the pickles, and the weights after each of two more."""
    model = torch2ebm.convert(net)
    algorithm = torch2ebm.PredictiveCoding(9, 0.05, nudging=torch2ebm.OneSided(0.5))
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9), model, algorithm)
    for _ in range(2):
        step(model, optimizer)
    relaxation = model.state.relaxation
    compared = torch2ebm.compare(copy.deepcopy(net), nn.functional.cross_entropy, BATCH, [algorithm])
    kept = {
        "attached model": pickle.dumps(model),
        "optimizer": pickle.dumps(optimizer),
        "saved model": saved(model),
        "saved optimizer": saved(optimizer),
        "relaxation": pickle.dumps(relaxation),
        "relaxation's fields": {
            "steps": relaxation.steps,
            "beta": relaxation.beta,
            "residual": relaxation.residual,
            "energy": relaxation.energy,
            "node_energy": dict(relaxation.node_energy),
            "loss": relaxation.loss,
        },
        "comparison": pickle.dumps(compared),
    }
    weights = []
    for _ in range(2):
        step(model, optimizer)
        weights.append(numbers(net.parameters()))
    return {**kept, "next weights": weights}


def step(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


if __name__ == "__main__":
    FILE.write_bytes(pickle.dumps(made()))
