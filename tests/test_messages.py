"""Ordinary mistakes are answered with what to write instead, and nothing has changed."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from algorithms_list import ROWS
from solvers_list import ROWS as SOLVERS
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import (
    AttachmentError,
    ConfigurationError,
    LossIndependentError,
    NodeEvaluationError,
    UnknownNameError,
    UnknownSettingError,
)

X, LABELS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])
EXACT = torch2ebm.ZeroDivergence()
CODING = torch2ebm.PredictiveCoding(steps=2)


def network(device: str = "cpu") -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8, device=device), nn.Tanh(), nn.Linear(8, 3, device=device))


def whole(error: Any) -> str:
    assert all((error.where, error.got, error.expected, error.remedy))
    return str(error)


# ---- names of settings


FOREIGN: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (torch2ebm.PredictiveCoding, {"T": 20}, "PredictiveCoding(steps=20)"),
    (torch2ebm.PredictiveCoding, {"gamma": 0.1}, "PredictiveCoding(lr=0.1)"),
    (torch2ebm.PredictiveCoding, {"n": 20, "eta": 0.1}, "PredictiveCoding(lr=0.1)"),
    (torch2ebm.PredictiveCoding, {"ErrType": "Strict"}, "FixedPrediction (FixedPred)"),
    (torch2ebm.PredictiveCoding, {"beta": 0.1}, "nudging=OneSided(0.1)"),
    (torch2ebm.PredictiveCoding, {"tol": 1e-3}, "solver=GradientDescent(tol=...)"),
    (torch2ebm.PredictiveCoding, {"precision": 2.0}, "precisions={'node': 2.0}"),
    (torch2ebm.PredictiveCoding, {"w_lr": 0.1}, "lr of your optimizer"),
    (torch2ebm.FixedPrediction, {"n": 20, "eta": 0.1}, "FixedPrediction(steps=20)"),
    (torch2ebm.IncrementalPredictiveCoding, {"T": 8}, "steps=8"),
    (torch2ebm.EquilibriumPropagation, {"T1": 30, "T2": 5}, "nudged_steps=5"),
    (torch2ebm.ImplicitSGD, {"gamma": 0.5}, "alpha=0.5"),
    (torch2ebm.RecurrentBackprop, {"T": 5}, "free_steps=5"),
    (torch2ebm.GradientDescent, {"T": 3, "step_size": 0.2}, "GradientDescent(lr=0.2)"),
    (torch2ebm.Neumann, {"K": 3}, "terms=3"),
    (torch2ebm.PredictiveCoding, {"step": 3}, "Write steps"),
    (torch2ebm.PredictiveCoding, {"loss_reducton": "sum"}, "Write loss_reduction"),
    (torch2ebm.OneSided, {"bata": 3}, "Write beta"),
    (torch2ebm.Gaussian, {"precison": 3}, "Write precision"),
    (torch2ebm.AndersonMixing, {"memroy": 3}, "Write memory"),
    (torch2ebm.ZeroDivergence, {"zzz": 3}, "Leave zzz out"),
]


@pytest.mark.parametrize(("kind", "given", "says"), FOREIGN, ids=lambda each: str(getattr(each, "__name__", each)))
def test_names_of_other_libraries_and_misspelt_ones_are_told_ours(kind: Any, given: dict[str, Any], says: str) -> None:
    with pytest.raises(UnknownSettingError) as caught:
        kind(**given)
    said = whole(caught.value)
    assert says in said and all(name in caught.value.where and f"{name}=" in caught.value.got for name in given)
    assert isinstance(caught.value, TypeError)  # as Python itself answers an unknown argument


MADE = [row.settings for row in (*ROWS, *SOLVERS) if row.settings is not None]


@pytest.mark.parametrize("made", MADE, ids=lambda made: type(made).__name__)
def test_every_setting_is_known_and_every_other_name_is_not(made: Any) -> None:
    kind = type(made)
    names = [name for name in inspect.signature(kind).parameters if not name.startswith("_")]
    given = {name: getattr(made, name) for name in names if name in vars(made)}
    assert isinstance(kind(**given), kind)
    with pytest.raises(UnknownSettingError) as caught:
        kind(no_such_name=1)
    assert all(name in caught.value.expected for name in names)


def test_an_algorithm_of_your_own_may_take_any_name() -> None:
    class Open(torch2ebm.Algorithm):
        def __init__(self, **settings: Any) -> None:
            self.settings = settings

        def forward(self, call: Any) -> None: ...

        def backward(self, call: Any, kept: Any, loss: Any, retain_graph: bool) -> Any: ...

    assert Open(T=3).settings == {"T": 3}


# ---- what is attached


def scene() -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    net = network()
    return net, torch2ebm.convert(net), torch.optim.SGD(net.parameters(), lr=0.1)


WRONG_PARTS: dict[str, tuple[Callable[[Any, Any, Any], tuple[Any, ...]], str]] = {
    "swapped": (lambda net, model, sgd: (model, sgd, EXACT), "EnergyOptimizer(optimizer, model, ZeroDivergence("),
    "in a circle": (lambda net, model, sgd: (EXACT, sgd, model), "EnergyOptimizer(optimizer, model, ZeroDivergence("),
    "swapped and not converted": (lambda net, model, sgd: (net, sgd, EXACT), "EnergyOptimizer(optimizer, model"),
    "text": (lambda net, model, sgd: (sgd, model, "PredictiveCoding"), "torch2ebm.PredictiveCoding()"),
    "text of another case": (lambda net, model, sgd: (sgd, model, "zero_divergence"), "torch2ebm.ZeroDivergence()"),
    "text of no algorithm": (lambda net, model, sgd: (sgd, model, "adam"), "an object and not its name"),
    "a class": (lambda net, model, sgd: (sgd, model, torch2ebm.FixedPrediction), "FixedPrediction()"),
    "a solver": (lambda net, model, sgd: (sgd, model, torch2ebm.ErrorDescent()), "solver=ErrorDescent("),
    "a list": (lambda net, model, sgd: (sgd, model, [EXACT]), "compare takes several"),
    "nothing": (lambda net, model, sgd: (sgd, model, None), "torch2ebm.PredictiveCoding()"),
}


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_what_cannot_be_attached_is_told_what_to_write(name: str) -> None:
    net, model, sgd = scene()
    parts, says = WRONG_PARTS[name]
    with pytest.raises(AttachmentError) as caught:
        torch2ebm.EnergyOptimizer(*parts(net, model, sgd))
    assert says in whole(caught.value)
    assert model.algorithm is None and not model.attached


@pytest.mark.parametrize("wrong", ["PredictiveCoding", torch2ebm.PredictiveCoding, None])
def test_a_model_takes_no_algorithm_that_is_none(wrong: Any) -> None:
    _, model, _ = scene()
    with pytest.raises(AttachmentError, match=r"PredictiveCoding\(\)"):
        model.attach(wrong)
    assert model.algorithm is None


# ---- compare


def compare(loss: Any = F.cross_entropy, algorithms: Any = (EXACT,), **options: Any) -> Any:
    return torch2ebm.compare(network(), loss, (X, LABELS), algorithms, **options)


COMPARED: dict[str, tuple[dict[str, Any], str]] = {
    "a loss value": ({"loss": torch.tensor(1.0)}, "Pass the function itself"),
    "a loss value as a number": ({"loss": 1.0}, "Pass the function itself"),
    "no loss": ({"loss": None}, "Pass the function itself"),
    "a class": ({"loss": nn.CrossEntropyLoss}, "CrossEntropyLoss()"),
    "the output alone": ({"loss": lambda output: output.sum()}, "loss_fn(output, target)"),
    "a loss for each sample": ({"loss": nn.CrossEntropyLoss(reduction="none")}, "reduction='mean'"),
    "a loss that is a number": ({"loss": lambda o, t: 3.0}, "as a tensor"),
    "one algorithm": ({"algorithms": EXACT}, "[ZeroDivergence("),
    "the name of one": ({"algorithms": "ZeroDivergence"}, "torch2ebm.ZeroDivergence()"),
    "the class of one": ({"algorithms": torch2ebm.ZeroDivergence}, "ZeroDivergence()"),
    "names": ({"algorithms": ["ZeroDivergence"]}, "torch2ebm.ZeroDivergence()"),
    "a name in a dictionary": ({"algorithms": {"exact": "ZeroDivergence"}}, "torch2ebm.ZeroDivergence()"),
    "one number of steps": ({"steps": 3}, "steps=[3]"),
    "steps of text": ({"steps": ["3"]}, "whole number"),
}


@pytest.mark.parametrize("name", COMPARED)
def test_what_cannot_be_compared_is_told_what_to_pass(name: str) -> None:
    options, says = COMPARED[name]
    with pytest.raises(ConfigurationError) as caught:
        compare(**options)
    assert says in whole(caught.value) and "torch2ebm.compare" in caught.value.where


def test_a_loss_that_depends_on_nothing_is_told() -> None:
    with pytest.raises(LossIndependentError, match="detach"):
        compare(lambda output, target: output.detach().sum())


@pytest.mark.parametrize("algorithms", [[EXACT], (EXACT,), iter([EXACT]), {"ZeroDivergence": EXACT}])
def test_algorithms_in_anything_that_holds_several_are_compared(algorithms: Any) -> None:
    assert compare(algorithms=algorithms).algorithms == ("ZeroDivergence",)


# ---- names of nodes


def state_of(model: Any) -> Any:
    F.cross_entropy(model(X), LABELS).backward()
    return model.state


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).tanh())


@pytest.mark.parametrize("part", ["value", "prediction", "error", "energy", "nodes"])
@pytest.mark.parametrize(("name", "near"), [("encodr", "'encoder'"), ("no such", "list(model.nodes)"), (3, "model")])
def test_a_node_that_is_not_there_is_told_with_those_near_by(part: str, name: Any, near: str) -> None:
    net = Blocks()
    model = torch2ebm.convert(net)
    kept = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, CODING)
    state = state_of(model)
    mapping = model.nodes if part == "nodes" else getattr(state, part)
    with pytest.raises(UnknownNameError) as caught:
        mapping[name]
    said = whole(caught.value)
    assert near in said and "encoder, decoder" in said and repr(name) in caught.value.got
    assert isinstance(caught.value, KeyError) and kept.model is model
    assert name not in mapping and mapping.get(name) is None and "encoder" in mapping


# ---- the meta device


def test_a_module_on_the_meta_device_is_told_and_works_once_it_has_numbers() -> None:
    net = network("meta")
    for x in (X, X.to("meta")):
        with pytest.raises(NodeEvaluationError) as caught:
            torch2ebm.convert(net, example_inputs=x)
        assert "'0.weight' and 3 more on the meta device" in whole(caught.value) and "to_empty" in caught.value.remedy
    model = torch2ebm.convert(net)
    with pytest.raises(NodeEvaluationError, match="to_empty"):
        model(X)
    with pytest.raises(NodeEvaluationError, match="to_empty"):
        torch2ebm.compare(net, F.cross_entropy, (X, LABELS), [EXACT])
    net.to_empty(device="cpu")
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.1)
    assert torch.equal(torch2ebm.convert(net)(X), net(X))


def test_an_input_on_the_meta_device_is_told() -> None:
    with pytest.raises(NodeEvaluationError, match="input 0"):
        torch2ebm.convert(network())(X.to("meta"))
