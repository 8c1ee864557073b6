"""Submodules that are named as nodes: one node a call, exact, whatever they do inside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from forwards import BLOCKS, Problem, training_with
from helpers import attached, same
from torch import Tensor, nn

import torch2ebm
from torch2ebm import errors
from torch2ebm.common.nested import leaves_of

NAMED = [Problem(name, labels) for name in BLOCKS for labels in (False, True)]
every_named = pytest.mark.parametrize("named", NAMED, ids=lambda p: f"{p.name}{'-labels' * p.labels}")


def called_children(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if any(True for _ in child.parameters())]


@every_named
@pytest.mark.parametrize("whole", ["blocks", "children"])
def test_named_submodules_are_one_node_each_and_exact(named: Problem, whole: str) -> None:
    module = named.module()
    twin, inputs = copy.deepcopy(module), named.inputs()
    names = BLOCKS[named.name] if whole == "blocks" else called_children(module)
    model = torch2ebm.convert(module, nodes=names if whole == "blocks" else whole, example_inputs=inputs)
    assert [node for node in model.nodes if node in names] == names
    for name in names:
        assert not any(node.startswith(f"{name}.") and node != f"{name}.output" for node in model.nodes)
        own = {id(p) for p in module.get_submodule(name).parameters()}
        in_node = {id(p) for p in model.nodes[name].parameters.values()}
        assert in_node <= own
        assert in_node == own or whole == "children"  # a pooler that the head does not read has no part in it
    with training_with(model, torch2ebm.ZeroDivergence()):
        for batch in (4, 3):
            model.zero_grad(), twin.zero_grad()
            torch.manual_seed(3)
            output = model(**named.inputs(batch))
            torch.manual_seed(3)
            expected = twin(**named.inputs(batch))
            assert isinstance(output, type(expected))
            assert all(same(a, b) for a, b in zip(leaves_of(output), leaves_of(expected), strict=True))
            named.loss(output).backward(), named.loss(expected).backward()
            for (name, ours), real in zip(module.named_parameters(), twin.parameters(), strict=True):
                found = torch.zeros_like(ours) if ours.grad is None else ours.grad
                reference = torch.zeros_like(ours) if real.grad is None else real.grad
                torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-10, msg=name)


@every_named
@pytest.mark.parametrize("whole", ["blocks", "children"])
def test_a_relaxation_over_named_submodules_lowers_the_energy(named: Problem, whole: str) -> None:
    inputs = named.inputs()
    nodes: Any = BLOCKS[named.name] if whole == "blocks" else whole
    model = torch2ebm.convert(named.module(), nodes=nodes, example_inputs=inputs)
    # small embeddings before a norm, as above; below 1e-4 the decrease is lost in Hugging Face's float32 loss
    lr = {"gpt2": 1e-4, "llama": 1e-3, "vit": 1e-3}.get(named.name, 0.01)
    with training_with(model, torch2ebm.PredictiveCoding(steps=3, lr=lr)):
        named.loss(model(**inputs)).backward()
        energy = model.state.relaxation.energy
    assert energy[-1] < energy[0]


class Gated(nn.Module):
    """A residual block with a part under no_grad and a write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.up(x))
        with torch.no_grad():
            gate = hidden.softmax(-1) * 2
        hidden = self.down(hidden * gate)
        hidden[:, 0] = 0.5 * hidden[:, 1]
        return x + hidden, hidden


class Recurring(nn.Module):
    """One block that is called twice, by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.read = nn.Linear(6, 6), Gated(), nn.Linear(6, 3)
        self.again, self.idle, self.noise = self.block, nn.Linear(2, 2), nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 2
        once, side = self.block(torch.relu(self.first(x)) + self.noise(x))
        twice, _ = self.again(once)
        return self.read(torch.sigmoid(twice) * side)


def recurring(nodes: Any) -> tuple[Any, nn.Module, Tensor]:
    torch.manual_seed(0)
    module, x = Recurring().double(), torch.randn(4, 6, dtype=torch.float64)
    return torch2ebm.convert(module, nodes=nodes, example_inputs=x), module, x


def test_a_submodule_that_is_called_twice_is_one_node_a_call() -> None:
    model, module, x = recurring(["block"])
    assert list(model.nodes) == ["first", "block", "block_1", "read"]
    assert model.nodes["block"].parameters == model.nodes["block_1"].parameters
    assert model.nodes["block"].children == ("block_1", "read")
    twin = copy.deepcopy(module)
    with training_with(model, torch2ebm.ZeroDivergence()):
        output = model(x)
        assert torch.equal(output, twin(x))
        output.square().mean().backward(), twin(x).square().mean().backward()
    for (name, ours), real in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, real.grad, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("nodes", "error", "said"),
    [
        (["first", "blocks"], errors.UnknownNodeError, "['blocks']"),
        (["block", "block.up"], errors.UnknownNodeError, "['block.up'], never called"),
    ],
)
def test_a_name_that_can_be_no_node_is_a_typed_error(nodes: list[str], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        recurring(nodes)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["idle", "noise"])
def test_a_submodule_that_was_not_called_is_told_once(name: str) -> None:
    with pytest.warns(errors.UncalledNodeWarning, match=rf"\['{name}'\].*no run so far") as told:
        model, _, _ = recurring(["first", name])
    assert len(told) == 1 and name not in model.nodes and "first" in model.nodes


class Sided(nn.Module):
    """Data decides which of two submodules is called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.read = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        side = self.left if float(x.sum()) < 0 else self.right
        return self.read(torch.tanh(side(x)))


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.UncalledNodeWarning")
@pytest.mark.parametrize("nodes", [["left", "right"], ["right"], ["left", "right", "read"]], ids=str)
def test_names_of_a_branch_are_nodes_where_it_is_taken(nodes: list[str]) -> None:
    module, twin = Sided(), Sided()
    model = attached(module, torch2ebm.ZeroDivergence(), nodes)
    for sign in (-1, 1, 1, -1):
        x = sign * torch.rand(3, 4, dtype=torch.float64)
        module.zero_grad(), twin.zero_grad()
        ours, expected = model(x), twin(x)
        assert torch.equal(ours, expected)
        ours.square().mean().backward(), expected.square().mean().backward()
        for own, real in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(own.grad, real.grad, rtol=1e-12, atol=1e-14)
        taken = "left" if sign < 0 else "right"
        assert taken in model.nodes or taken not in nodes
