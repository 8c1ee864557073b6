"""Pickles of version 0.1 load with their settings, and go on with its numbers; saved again they hold no old path."""

import io
import pickle
import pickletools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch2ebm
from torch2ebm.common import moved

DATA: dict[str, Any] = pickle.loads((Path(__file__).parent / "data" / "pickles_of_0_1.pkl").read_bytes())
X, Y = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4), torch.tensor([0, 1, 2, 0, 1])

SETTINGS = {
    "solver": {
        "GradientDescent": torch2ebm.GradientDescent(7, 0.03, 1e-5),
        "Momentum": torch2ebm.Momentum(7, 0.03, 0.5, 1e-5),
        "Adam": torch2ebm.AdamDescent(7, 0.03, (0.5, 0.75), 1e-4, 1e-5),
        "SequentialDescent": torch2ebm.SequentialDescent(7, 0.03, 1e-5),
        "ErrorDescent": torch2ebm.ErrorDescent(7, 0.03, 1e-5),
        "LocalErrorDescent": torch2ebm.LocalErrorDescent(7, 0.03, 1e-5),
        "Anderson": torch2ebm.AndersonErrorDescent(7, 0.03, 3, 1e-5),
    },
    "linear solver": {
        "Neumann": torch2ebm.Neumann(7),
        "FixedPointSolve": torch2ebm.FixedPointSolve(7, 1e-5),
        "ConjugateGradient": torch2ebm.ConjugateGradient(7, 1e-5),
    },
    "update": {"GaussSeidel": torch2ebm.GaussSeidel(), "AndersonMixing": torch2ebm.AndersonMixing(3)},
    "energy": {"Gaussian": torch2ebm.Gaussian(0.5), "Categorical": torch2ebm.Categorical(dim=1)},
    "nudging": {
        "OneSided": torch2ebm.OneSided(0.25),
        "Symmetric": torch2ebm.Symmetric(0.25),
        "RandomSign": torch2ebm.RandomSign(0.25),
        "Holomorphic": torch2ebm.Holomorphic(0.25, 6),
    },
}
ALGORITHMS: dict[str, torch2ebm.Algorithm] = {
    "PredictiveCoding": torch2ebm.PredictiveCoding(
        solver=torch2ebm.Momentum(7, 0.03, 0.5),
        nudging=torch2ebm.Symmetric(0.25),
        precisions={"0": 0.5},
        energies={"2": torch2ebm.Gaussian(2.0)},
        loss_reduction="sum",
        on_divergence="warn",
    ),
    "PredictiveCoding by Adam": torch2ebm.PredictiveCoding(solver=torch2ebm.AdamDescent(7, 0.03)),
    "PredictiveCoding by Anderson": torch2ebm.PredictiveCoding(solver=torch2ebm.AndersonErrorDescent(7, 0.3)),
    "PredictiveCoding by steps": torch2ebm.PredictiveCoding(7, 0.03),
    "FixedPrediction": torch2ebm.FixedPrediction(7, 0.3, method="sweep", loss_reduction="sum"),
    "FixedPrediction in closed form": torch2ebm.FixedPrediction(7, 0.3),
    "ZeroDivergence": torch2ebm.ZeroDivergence("levels", gamma=0.5),
    "IncrementalPredictiveCoding": torch2ebm.IncrementalPredictiveCoding(
        7, 0.3, energies={"0": torch2ebm.Gaussian(0.5)}, loss_reduction="sum"
    ),
    "ProximalInferenceLearning": torch2ebm.ProximalInferenceLearning(0.5, 7, 0.03, 0.02, 0.01, loss_reduction="sum"),
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
COMPILED: dict[str, torch2ebm.Algorithm] = {
    "PredictiveCoding": torch2ebm.PredictiveCoding(7, 0.03, compile=True),
    "FixedPrediction": torch2ebm.FixedPrediction(7, 0.3, compile=True),
    "ZeroDivergence": torch2ebm.ZeroDivergence(gamma=0.5, compile=True),
    "EquilibriumPropagation": torch2ebm.EquilibriumPropagation(torch2ebm.Symmetric(0.25), 9, 8, compile=True),
}


def quiet(load: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """Who loads a pickle of 0.1 is told where its names are now."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch2ebm", DeprecationWarning)
        return load(*args, **keywords)


def loaded(data: bytes) -> Any:
    return quiet(pickle.loads, data)


def torch_loaded(data: bytes) -> Any:
    return quiet(torch.load, io.BytesIO(data), weights_only=False)


def close(ours: Iterator[Tensor | None], theirs: list[Any]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, torch.tensor(other, dtype=torch.float64), rtol=1e-10, atol=1e-13)


def trained_on(model: torch2ebm.EnergyModel, optimizer: torch2ebm.EnergyOptimizer) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()


def test_the_file_is_of_0_1_and_reading_it_takes_nothing_of_the_package() -> None:
    assert DATA["versions"]["torch2ebm"] == "0.1.0"
    assert {kind: group.keys() for kind, group in DATA["settings"].items()} == {
        kind: group.keys() | ({"Gaussian by entry"} if kind == "energy" else set()) for kind, group in SETTINGS.items()
    }
    assert DATA["algorithms"].keys() == DATA["gradients"].keys() == ALGORITHMS.keys()
    assert DATA["compiled algorithms"].keys() == COMPILED.keys()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, group in SETTINGS.items() for name in group])
def test_settings_of_0_1_are_those_that_they_were_made_with(kind: str, name: str) -> None:
    found, expected = loaded(DATA["settings"][kind][name]), SETTINGS[kind][name]
    assert type(found) is type(expected) and vars(found) == vars(expected)


def test_a_precision_for_each_entry_is_kept() -> None:
    assert loaded(DATA["settings"]["energy"]["Gaussian by entry"]).precision.tolist() == [0.5, 2.0]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_of_0_1_has_its_settings_and_computes_its_gradients(name: str) -> None:
    algorithm = loaded(DATA["algorithms"][name])
    assert type(algorithm) is type(ALGORITHMS[name]) and repr(algorithm) == repr(ALGORITHMS[name])
    assert algorithm.loss_reduction == ALGORITHMS[name].loss_reduction
    model = loaded(DATA["detached model"])
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, algorithm)
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.detach()
    close((parameter.grad for parameter in model.parameters()), DATA["gradients"][name])


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiling_algorithm_of_0_1_still_compiles(name: str) -> None:
    algorithm = loaded(DATA["compiled algorithms"][name])
    assert repr(algorithm) == repr(COMPILED[name]) and "compile=True" in repr(algorithm)


def test_settings_of_0_1_are_read_where_they_are_documented() -> None:
    made = {name: loaded(data) for name, data in DATA["algorithms"].items()}
    coding = made["PredictiveCoding"]
    assert coding.solver == torch2ebm.Momentum(7, 0.03, 0.5) and coding.nudging == torch2ebm.Symmetric(0.25)
    assert coding.on_divergence == "warn"
    assert {name: energy.precision for name, energy in coding.energies.items()} == {"0": 0.5, "2": 2.0}
    assert made["PredictiveCoding by steps"].solver == torch2ebm.GradientDescent(7, 0.03)
    fixed = made["FixedPrediction"]
    assert (fixed.steps, fixed.lr, fixed.method) == (7, 0.3, "sweep")
    assert (made["ZeroDivergence"].schedule, made["ZeroDivergence"].gamma) == ("levels", 0.5)
    assert (made["IncrementalPredictiveCoding"].steps, made["IncrementalPredictiveCoding"].lr) == (7, 0.3)
    proximal = made["ProximalInferenceLearning"]
    assert (proximal.alpha, proximal.steps, proximal.eps) == (0.5, 7, 0.01)
    assert (proximal.feedback_rate, proximal.error_rate) == (0.03, 0.02)
    implicit = made["ImplicitSGD"]
    assert (implicit.alpha, implicit.tol, implicit.max_steps) == (0.25, 1e-9, 50)
    assert made["EquilibriumPropagation"].nudging == torch2ebm.Symmetric(0.25)
    assert made["CoupledLearning"].beta == 0.5 and made["RecurrentBackprop"].solver == torch2ebm.Neumann(7)


def test_a_model_of_0_1_comes_back_as_it_was() -> None:
    detached, attached = loaded(DATA["detached model"]), loaded(DATA["attached model"])
    for model in (detached, attached, torch_loaded(DATA["saved model"])):
        assert isinstance(model, torch2ebm.EnergyModel) and model.training
        assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
        assert list(map(type, model.children())) == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert detached.algorithm is None
    assert attached.algorithm.solver == torch2ebm.GradientDescent(9, 0.05)
    assert attached.algorithm.nudging == torch2ebm.OneSided(0.5)
    assert not attached.attached  # its optimizer is not there


@pytest.mark.parametrize(("how", "key"), [(loaded, "optimizer"), (torch_loaded, "saved optimizer")])
def test_training_of_0_1_goes_on_with_the_same_numbers(how: Any, key: str) -> None:
    optimizer = how(DATA[key])
    assert optimizer.model.algorithm is optimizer.algorithm and optimizer.model.attached
    assert optimizer.param_groups[0]["momentum"] == 0.9
    for expected in DATA["next weights"]:
        trained_on(optimizer.model, optimizer)
        close(optimizer.model.parameters(), expected)


def test_without_the_momentum_of_0_1_training_would_go_another_way() -> None:
    """The negative twin."""
    optimizer = loaded(DATA["optimizer"])
    optimizer.state.clear()
    trained_on(optimizer.model, optimizer)
    with pytest.raises(AssertionError, match="not close"):
        close(optimizer.model.parameters(), DATA["next weights"][0])


def test_results_of_0_1_are_what_they_were() -> None:
    relaxation, comparison = loaded(DATA["relaxation"]), loaded(DATA["comparison"])
    assert isinstance(relaxation, torch2ebm.Relaxation)
    for field, value in DATA["relaxation's fields"].items():
        assert getattr(relaxation, field) == value
    assert relaxation.steps == 9 and relaxation.sample_residual.shape == (5,)
    assert isinstance(comparison, torch2ebm.GradientComparison) and comparison.algorithms == ("PredictiveCoding",)
    assert isinstance(comparison.overall["PredictiveCoding"], torch2ebm.Agreement)
    criterion = loaded(DATA["energy loss"])
    assert isinstance(criterion, torch2ebm.EnergyLoss) and criterion.loss_fn is nn.functional.cross_entropy


def every_pickle(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        for each in value.values():
            yield from every_pickle(each)
    elif isinstance(value, bytes) and value.startswith(b"\x80"):  # and not what torch.save makes
        yield value


def strings_in(data: bytes) -> set[str]:
    return {argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)}


def test_a_pickle_of_0_1_warns_and_saved_again_it_does_not() -> None:
    with pytest.warns(DeprecationWarning, match=r"torch2ebm.model.EnergyModel is now torch2ebm.EnergyModel.*again"):
        pickle.loads(DATA["detached model"])
    gone = {f"torch2ebm.{old}" for old in moved.MOVED}
    before = set().union(*map(strings_in, every_pickle(DATA)))
    assert {"torch2ebm.model", "torch2ebm.state", "torch2ebm.solvers.adam", "torch2ebm.energies"} <= before & gone
    for data in every_pickle(DATA):
        again = pickle.dumps(loaded(data))
        assert not strings_in(again) & gone
        pickle.loads(again)  # a warning would be an error
