"""Algorithms are their settings: frozen, compared and copied by them."""

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from algorithms_list import ROWS
from helpers import attached
from torch import Tensor, nn
from torch.nn import functional as F

import torch2ebm
from torch2ebm.errors import ConfigurationError

SETTINGS = {row.name: row.settings for row in ROWS if row.settings is not None}
EXCLUDED = {"update", "schedule", "clamp", "on_step"}  # by a damping, compile, a nudging; it only looks on
MADE: dict[str, tuple[torch2ebm.Algorithm, Mapping[str, Any]]] = {
    **{row.name: (row.settings, row.change) for row in ROWS if row.settings is not None},
    "precisions": (torch2ebm.PredictiveCoding(precisions={"0": torch.tensor([2.0, 3.0])}), {"on_divergence": "skip"}),
    "IL-prox": (torch2ebm.ProximalInferenceLearning.fast(5.0), {"eps": 0.25}),
    "Holomorphic": (torch2ebm.EquilibriumPropagation(torch2ebm.Holomorphic(0.2, 4), compile=True), {"damping": 0.1}),
}
every_algorithm = pytest.mark.parametrize(("algorithm", "change"), MADE.values(), ids=MADE)


@pytest.mark.parametrize("made", SETTINGS.values(), ids=SETTINGS)
def test_the_list_has_every_setting_off_its_default(made: torch2ebm.Algorithm) -> None:
    plain = type(made)()
    names = [field.name for field in dataclasses.fields(made) if field.init]
    assert {name for name in names if getattr(made, name) == getattr(plain, name)} <= EXCLUDED


@every_algorithm
def test_settings_are_frozen(algorithm: torch2ebm.Algorithm, change: Mapping[str, Any]) -> None:
    for field in dataclasses.fields(algorithm):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(algorithm, field.name, 1)


@every_algorithm
def test_another_setting_makes_another_algorithm(algorithm: torch2ebm.Algorithm, change: Mapping[str, Any]) -> None:
    changed = dataclasses.replace(algorithm, **change)
    assert all(getattr(changed, name) == value for name, value in change.items())
    assert (changed == algorithm) is not bool(change)
    assert dataclasses.replace(changed, **{name: getattr(algorithm, name) for name in change}) == algorithm


@every_algorithm
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_a_copy_is_equal_and_hashes_alike(algorithm: torch2ebm.Algorithm, change: Mapping[str, Any], copied) -> None:
    other = copied(algorithm)
    assert other == algorithm and hash(other) == hash(algorithm) and repr(other) == repr(algorithm)


def test_a_changed_setting_is_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"FixedPrediction\(lr"):
        dataclasses.replace(torch2ebm.FixedPrediction(), lr=-3)
    with pytest.raises(ConfigurationError, match=r"EquilibriumPropagation\(feedback"):
        dataclasses.replace(torch2ebm.EquilibriumPropagation(), feedback=2.0)


@pytest.mark.parametrize("given", [{"steps": 50}, {"lr": 0.01}, {"steps": 50, "lr": 0.01}, {"steps": 20, "lr": 0.2}])
def test_steps_and_rate_beside_a_solver_that_has_others_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"beside solver=Momentum.*Give them to the solver: Momentum\("):
        torch2ebm.PredictiveCoding(**given, solver=torch2ebm.Momentum(steps=20, lr=0.1))


def test_steps_and_rate_that_say_the_same_as_the_solver_are_taken() -> None:
    momentum = torch2ebm.Momentum(steps=50, lr=0.01)
    assert torch2ebm.PredictiveCoding(50, 0.01, solver=momentum) == torch2ebm.PredictiveCoding(solver=momentum)
    assert torch2ebm.PredictiveCoding(20, 0.1) == torch2ebm.PredictiveCoding(20) == torch2ebm.PredictiveCoding(lr=0.1)
    assert torch2ebm.PredictiveCoding(solver=momentum).steps == 50


def test_steps_and_rate_can_be_replaced_where_no_solver_was_given() -> None:
    algorithm = torch2ebm.PredictiveCoding(7, 0.2, loss_reduction="sum")
    for copied in (algorithm, copy.deepcopy(algorithm), pickle.loads(pickle.dumps(algorithm)), algorithm.with_steps(7)):
        assert dataclasses.replace(copied, lr=0.3) == torch2ebm.PredictiveCoding(7, 0.3, loss_reduction="sum")
        assert dataclasses.replace(copied, steps=9) == torch2ebm.PredictiveCoding(9, 0.2, loss_reduction="sum")
        assert dataclasses.replace(copied, steps=9, lr=0.3).solver == torch2ebm.GradientDescent(9, 0.3)


def test_a_solver_can_be_replaced_and_is_not_overruled() -> None:
    momentum, descent = torch2ebm.Momentum(steps=50, lr=0.01), torch2ebm.ErrorDescent(steps=3)
    for algorithm in (torch2ebm.PredictiveCoding(7, 0.2), torch2ebm.PredictiveCoding(solver=descent)):
        assert dataclasses.replace(algorithm, solver=momentum) == torch2ebm.PredictiveCoding(solver=momentum)
    with pytest.raises(ConfigurationError, match=r"lr=0\.3 beside solver=Momentum"):
        dataclasses.replace(torch2ebm.PredictiveCoding(solver=momentum), lr=0.3)


def test_an_algorithm_that_returns_no_gradients_is_named_and_changes_nothing() -> None:
    class Forgetful(torch2ebm.Algorithm):
        def forward(self, call):
            call.feedforward(keep_graph=True)

        def backward(self, call, kept, loss, retain_graph):
            return {"0.weight": None}

    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(ConfigurationError, match=r"Forgetful\.backward.*type dict.*LocalGradients.*torch2ebm\.extend"):
        gradients(attached(net, Forgetful()))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_precisions_are_compared_by_their_numbers() -> None:
    def of(*numbers: float) -> torch2ebm.Algorithm:
        return torch2ebm.PredictiveCoding(precisions={"0": torch.tensor(numbers)})

    assert of(1.0, 2.0) == of(1.0, 2.0) != of(1.0, 3.0)


def gradients(model: torch2ebm.EnergyModel) -> list[Tensor]:
    """Of the third batch of a kind, which a run that is cut serves."""
    for _ in range(3):
        model.zero_grad()
        F.cross_entropy(model(torch.linspace(-1, 1, 20).reshape(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


# the contract of 0.1 --------------------------------------------------------------------------------------------------


class Plain:
    """Backprop as 0.1 wrote it, with names of its own, and a default beyond the contract."""

    reevaluates_loss = False

    def forward(self, call):
        call.feedforward(keep_graph=True, cut=False)

    def backward(self, call, objective, again, extra=None):
        assert extra is None
        return torch2ebm.Backprop().backward(call, None, objective, again)


def old(slots: bool, mixin: bool) -> type[torch2ebm.Algorithm]:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if mixin:

            class Old(Plain, torch2ebm.Algorithm):
                pass
        else:

            @dataclasses.dataclass(frozen=True, slots=slots)
            class Old(torch2ebm.Algorithm):
                reevaluates_loss = False
                forward, backward = Plain.forward, Plain.backward

    assert {each.category for each in warned} == {DeprecationWarning}
    assert "kept is what forward returned" in str(warned[0].message)
    assert warned[0].filename == __file__  # the line of the class, so that Python's own filters show it
    return Old


@pytest.mark.parametrize(("slots", "mixin"), [(False, False), (True, False), (False, True)])
def test_a_backward_without_kept_works_for_one_version_and_warns(slots: bool, mixin: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    plain = gradients(attached(net, torch2ebm.Backprop()))
    torch.testing.assert_close(gradients(attached(net, old(slots, mixin)())), plain, rtol=0, atol=0)


def test_a_backward_with_kept_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        class New(torch2ebm.Algorithm):
            def forward(self, call):
                return None

            def backward(self, call, kept, loss, retain_graph):
                raise AssertionError
