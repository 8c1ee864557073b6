"""A module that is evaluated as a whole computes again what it computed; one met late has had one call."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import attached
from test_capture import WIDTH, normal
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import CaptureMismatchError

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch2ebm.errors.OpaqueModuleWarning", "ignore::torch2ebm.errors.CompilationWarning"
)


def a_number(block: Block) -> float:
    block.calls += 1
    return block.calls / 10


def an_object(block: Block) -> float:
    block.config.calls += 1
    return float(block.config.calls) / 10


def a_list(block: Block) -> float:
    block.log.append(1)
    return len(block.log) / 10


def a_queue(block: Block) -> float:
    block.queue.append(block.queue[-1] + 1)
    return float(block.queue[0]) / 10


def a_set(block: Block) -> float:
    block.seen.add(len(block.seen))
    return len(block.seen) / 10


def a_buffer(block: Block) -> float:
    block.count.add_(1)
    return float(block.count) / 10


def a_buffer_that_is_replaced(block: Block) -> float:
    block.count = block.count + 1
    return float(block.count) / 10


def pythons_generator(block: Block) -> float:
    return random.random()


def numpys_generator(block: Block) -> float:
    return float(np.random.rand())


def torchs_generator(block: Block) -> float:
    return float(torch.rand(1))


STATES = [a_number, an_object, a_list, a_queue, a_set, a_buffer, a_buffer_that_is_replaced]
STATES += [pythons_generator, numpys_generator, torchs_generator]
state_of = pytest.mark.parametrize("state", STATES, ids=lambda f: f.__name__)


class Block(nn.Module):
    """Steps down a gradient, which makes it opaque, where ``steps`` says so."""

    def __init__(self, state: Callable[[Block], float], steps: Callable[[float], bool]) -> None:
        super().__init__()
        self.layer, self.state, self.steps = nn.Linear(WIDTH, WIDTH), state, steps
        self.calls, self.log, self.config = 0, [], SimpleNamespace(calls=0)
        self.queue, self.seen = deque([0, 0, 0], maxlen=3), set()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        strength = self.state(self)
        if not self.steps(strength):
            return torch.tanh(self.layer(h)) * strength
        return h - strength * torch.func.grad(lambda z: self.layer(z).square().sum())(h) * self.count.add(1)


class Net(nn.Module):
    def __init__(self, state: Callable[[Block], float], steps: Callable[[float], bool]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.last = nn.Linear(WIDTH, WIDTH), Block(state, steps), nn.Linear(WIDTH, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(torch.tanh(self.first(x))))


def always(strength: float) -> bool:
    return True


def at_times(strength: float) -> bool:
    return round(strength * 10) % 4 == 3


def seeded(seed: int) -> None:
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


@state_of
@pytest.mark.parametrize("steps", [always, at_times])
def test_a_call_is_the_module_s_and_happens_once(state: Any, steps: Any) -> None:
    module, twin = Net(state, steps), Net(state, steps)
    model = attached(module, torch2ebm.ZeroDivergence())
    for seed in range(9):
        x = normal(5, WIDTH, seed=seed)
        twin.zero_grad(), model.zero_grad()
        seeded(seed)
        expected = twin(x)
        drawn = random.getstate(), torch.get_rng_state()
        expected.square().mean().backward()
        seeded(seed)
        ours = model(x)
        assert torch.equal(ours, expected)
        assert (random.getstate(), True) == (drawn[0], torch.equal(torch.get_rng_state(), drawn[1]))
        ours.square().mean().backward()
        for own, real in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(own.grad, real.grad, rtol=1e-12, atol=1e-14)
        for kept in ("calls", "log", "config", "queue", "seen", "count"):
            assert getattr(module.block, kept) == getattr(twin.block, kept)


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # one block can have no part in a loss
@state_of
@pytest.mark.parametrize("compiled", [False, True])
def test_a_relaxation_leaves_the_state_and_reads_that_of_forward(state: Any, compiled: bool) -> None:
    module, twin = Net(state, always), Net(state, always)
    model = attached(module, torch2ebm.PredictiveCoding(4, 1e-4, compile=compiled))
    for seed in range(4):
        x = normal(5, WIDTH, seed=seed)
        seeded(seed)
        expected = twin(x).square().mean().detach()
        seeded(seed)
        loss = model(x).square().mean()
        loss.backward()
        energy = model.state.relaxation.energy
        assert energy[0] == pytest.approx(5 * float(expected), rel=1e-12)  # no error yet: the loss of five samples
        assert all(later < earlier for earlier, later in pairwise(energy)), energy
        for kept in ("calls", "log", "config", "queue", "seen", "count"):
            assert getattr(module.block, kept) == getattr(twin.block, kept)


COUNTED = {"calls": 0}


def a_global(block: Block) -> float:
    COUNTED["calls"] += 1
    return COUNTED["calls"] / 10


def test_what_cannot_be_put_back_is_refused() -> None:
    with pytest.raises(CaptureMismatchError, match=r"'block' is evaluated again as a whole.*not in globals"):
        attached(Net(a_global, always), torch2ebm.ZeroDivergence())(normal(5, WIDTH))
