"""Outputs given, and inputs free, on architectures as people write them: the energy falls, and nothing else changes."""

import inspect

import pytest
import torch
from torch import Tensor
from zoo import PROBLEMS, Problem

import torch2ebm
from torch2ebm.clamping.places import OUTPUT, Places

NAMES = (
    "skip_dag",
    "tied",
    "siamese",
    "multi_input",
    "multi_output",
    "dict_output",
    "loss_and_logits",
    "direct_parameters",
    "dropout",
    "batch_norm_cnn",
    "vit",
    "lstm",
    "gpt",
)
CHOSEN = [problem for problem in PROBLEMS if problem.name in NAMES]


def test_all_are_there() -> None:
    assert len(CHOSEN) == len(NAMES)


@pytest.mark.filterwarnings("ignore:model.infer. values still move")  # of the gpt
@pytest.mark.parametrize("problem", CHOSEN, ids=lambda problem: problem.name)
def test_an_output_is_given_and_an_input_is_free(problem: Problem) -> None:
    torch.manual_seed(0)
    net, inputs = problem.build(), problem.inputs(4)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    model = torch2ebm.convert(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plain = model.infer(*args, **kwargs)
    assert plain.relaxation.energy[-1] == 0
    places = Places.of(model.graph, plain.output, {}, frozenset())
    slots = {slot: name for name, slot in places.outputs.items() if name != OUTPUT or len(places.outputs) == 1}
    clamp = {}
    for slot, name in slots.items():
        node = model.graph.owner[slot]
        value = plain.value[node.name]
        value = value[node.slots.index(slot)] if isinstance(value, tuple) else value
        clamp[name] = value + 0.3 * torch.randn_like(value)
    given = model.infer(*args, clamp=clamp, **kwargs).relaxation.energy
    assert 0 < given[-1] < given[0]
    named = {**dict(zip(inspect.signature(net.forward).parameters, args, strict=False)), **kwargs}
    floats = {name: t for name, t in named.items() if isinstance(t, Tensor) and t.is_floating_point()}
    if floats:
        prior = {name: (torch2ebm.Gaussian(), tensor) for name, tensor in floats.items()}
        free = model.infer(*args, clamp=clamp, free=list(floats), prior=prior, **kwargs).relaxation.energy
        assert free[0] == pytest.approx(given[0]) and free[-1] <= given[-1] * (1 + 1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
