"""Random draws of a node are its own: what forward draws between them for others moves none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import attached
from test_capture import WIDTH, assert_is_the_module, normal
from torch import Tensor, nn

import torch2ebm


def nothing(self: Block, h: Tensor) -> Tensor:
    return h


def a_row_mask(self: Block, h: Tensor) -> Tensor:
    """Read by the node, and drawn from the generator alone."""
    return h * (torch.rand(len(h), 1) < 0.6)


def unread_now_and_then(self: Block, h: Tensor) -> Tensor:
    """Not read, so no part of the sequence of operations; in some calls alone."""
    self.calls += 1
    if self.calls % 3 != 1:
        torch.rand(3)
    return h


def a_shuffle(self: Block, h: Tensor) -> Tensor:
    return h[:, torch.randperm(WIDTH)]


def wound_back_by_the_user(self: Block, h: Tensor) -> Tensor:
    torch.manual_seed(11)
    return h


class Block(nn.Module):
    def __init__(self, between: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.between, self.calls = nn.Linear(WIDTH, WIDTH), between, 0

    def forward(self, h: Tensor) -> Tensor:
        h = F.dropout(torch.tanh(self.inner(h)), 0.3)
        h = F.dropout(self.between(self, h), 0.3)
        return h * torch.bernoulli(torch.full_like(self.between(self, h), 0.8))


class Net(nn.Module):
    def __init__(self, between: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.last = nn.Linear(WIDTH, WIDTH), Block(between), nn.Linear(WIDTH, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(torch.tanh(self.first(x))))


BETWEEN = [nothing, a_row_mask, unread_now_and_then, a_shuffle, wound_back_by_the_user]
between_draws = pytest.mark.parametrize("between", BETWEEN)
NODES = pytest.mark.parametrize("nodes", ["auto", "op", ["first", "block", "last"]], ids=str)


@between_draws
@NODES
def test_draws_that_others_interrupt_are_those_of_the_module(between: Any, nodes: Any) -> None:
    model, twin = attached(Net(between), torch2ebm.ZeroDivergence(), nodes), Net(between)
    for size in (5, 3, 5, 5):
        assert_is_the_module(model, twin, normal(size, WIDTH, seed=size))


@between_draws
@NODES
@pytest.mark.parametrize("keep_draws", [False, True])
def test_a_node_draws_again_what_forward_drew(between: Any, nodes: Any, keep_draws: bool) -> None:
    model = attached(Net(between), torch2ebm.PredictiveCoding(2, 0.1), nodes)
    for _ in range(3):  # a recorded run, and two that are followed
        call = model.torch2ebm.new_call((normal(5, WIDTH),), {})
        call.feedforward(keep_graph=False, keep_draws=keep_draws)
        state = torch.get_rng_state()
        for node in [*call.graph.nodes.values(), *call.graph.nodes.values()]:
            again = call.evaluate(node, [call.values[slot] for slot in node.reads])
            for slot, prediction in zip(node.slots, again.predictions, strict=True):
                assert torch.equal(prediction, call.values[slot]), node.name
        assert torch.equal(torch.get_rng_state(), state)


@between_draws
def test_compiled_steps_have_the_draws_of_eager_ones(between: Any) -> None:
    curves: dict[bool, list[Tensor]] = {False: [], True: []}
    for compiled, found in curves.items():
        model = attached(
            Net(between), torch2ebm.PredictiveCoding(4, 0.05, compile=compiled), ["first", "block", "last"]
        )
        for seed in range(3):
            torch.manual_seed(seed)
            model(normal(5, WIDTH, seed=seed)).square().mean().backward()
            found.append(torch.tensor(model.state.relaxation.energy))
    torch.testing.assert_close(curves[True], curves[False], rtol=1e-10, atol=0)
