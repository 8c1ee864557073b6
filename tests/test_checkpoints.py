"""A checkpoint with any entry that cannot be what was saved is refused, and then nothing has been loaded."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import torch2ebm
from torch2ebm.errors import CheckpointError, CheckpointWarning

KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
}


def wrapped(kind: str) -> torch2ebm.EnergyOptimizer:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    model = torch2ebm.convert(net)
    return torch2ebm.EnergyOptimizer(KINDS[kind](net.parameters()), model, torch2ebm.PredictiveCoding(steps=2))


def stepped(kind: str) -> torch2ebm.EnergyOptimizer:
    optimizer = wrapped(kind)
    optimizer.model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    return optimizer


MALFORMED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no dictionary": lambda saved: [saved],
    "nothing": lambda saved: None,
    "no groups": lambda saved: saved.pop("param_groups"),
    "no state": lambda saved: saved.pop("state"),
    "empty groups": lambda saved: saved.update(param_groups=[]),
    "groups of text": lambda saved: saved.update(param_groups="groups"),
    "a group of text": lambda saved: saved.update(param_groups=["group"]),
    "a state of text": lambda saved: saved.update(state="state"),
    "a list as state": lambda saved: saved.update(state=[1, 2]),
    "state of no parameter": lambda saved: saved["state"].update({99: {}}),
    "a parameter's state of text": lambda saved: saved["state"].update({0: "moments"}),
    "no rate": lambda saved: saved["param_groups"][0].pop("lr"),
    "a rate of text": lambda saved: saved["param_groups"][0].update(lr="0.1"),
    "a rate that is no number": lambda saved: saved["param_groups"][0].update(lr=float("nan")),
    "one beta": lambda saved: saved["param_groups"][0].update(betas=(0.9,)),
    "no parameters": lambda saved: saved["param_groups"][0].pop("params"),
    "fewer parameters": lambda saved: saved["param_groups"][0]["params"].pop(),
    "a moment of another shape": lambda saved: saved["state"][0].update(exp_avg=torch.zeros(2, 2)),
    "own entry of text": lambda saved: saved.update(torch2ebm="ZeroDivergence"),
    "own entry of numbers": lambda saved: saved.update(torch2ebm=3),
    "own entry empty": lambda saved: saved.update(torch2ebm={}),
    "own parameters of text": lambda saved: saved["torch2ebm"].update(parameters="0.weight"),
    "own parameters of numbers": lambda saved: saved["torch2ebm"].update(parameters=[1, 2]),
    "own parameters missing": lambda saved: saved["torch2ebm"].pop("parameters"),
    "own algorithm missing": lambda saved: saved["torch2ebm"].pop("algorithm"),
    "own algorithm of a list": lambda saved: saved["torch2ebm"].update(algorithm=["PredictiveCoding"]),
    "own model missing": lambda saved: saved["torch2ebm"].pop("model"),
    "own settings of a list": lambda saved: saved["torch2ebm"].update(settings=["steps"]),
    "own settings of numbers": lambda saved: saved["torch2ebm"].update(settings={"steps": 3}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_checkpoint_is_refused_and_nothing_is_loaded(name: str) -> None:
    saved = copy.deepcopy(stepped("Adam").state_dict())
    other = wrapped("Adam")
    before = copy.deepcopy(other.state_dict())
    changed = MALFORMED[name](saved)
    with pytest.raises(CheckpointError) as caught:
        other.load_state_dict(changed if name in ("no dictionary", "nothing") else saved)
    assert all((caught.value.got, caught.value.expected, caught.value.remedy))
    assert same(other.state_dict(), before)


def _anything(leaves: Any) -> Any:
    return st.one_of(
        st.lists(leaves, max_size=3), st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), leaves)
    )


GARBAGE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)), _anything, max_leaves=5
)
FUZZ = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


def loads_or_refuses(part: str, key: Any, value: Any) -> None:
    """Any entry in the place of any other: it is loaded, or nothing is."""
    one = stepped("SGD")
    saved = copy.deepcopy(one.state_dict())
    places = {
        "whole": saved,
        "group": saved["param_groups"][0],
        "state": saved["state"],
        "entry": saved["state"][0],
        "own": saved["torch2ebm"],
    }
    place = places[part]
    place[key if part == "state" else str(key) if key not in place else key] = value
    before = copy.deepcopy(one.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        try:
            one.load_state_dict(saved)
        except CheckpointError:
            assert same(one.state_dict(), before)


entries = given(
    part=st.sampled_from(["whole", "group", "state", "entry", "own"]),
    key=st.one_of(
        st.sampled_from(
            ["params", "lr", "state", "param_groups", "torch2ebm", "parameters", "settings", "algorithm", 0]
        ),
        st.text(max_size=4),
        st.integers(-3, 99),
    ),
    value=GARBAGE,
)


@settings(FUZZ, max_examples=100)
@entries
def test_any_entry_is_loaded_or_refused(part: str, key: Any, value: Any) -> None:
    loads_or_refuses(part, key, value)


@pytest.mark.slow
@settings(FUZZ, max_examples=1500)
@entries
def test_any_of_many_entries_is_loaded_or_refused(part: str, key: Any, value: Any) -> None:
    loads_or_refuses(part, key, value)
