"""Forward runs other operations from call to call: each sequence is followed, and their number is bounded."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from helpers import attached
from test_capture import WIDTH, assert_is_the_module, normal
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ChangingForwardWarning
from torch2ebm.model.capture_cache import KEPT


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.norm(self.layer(h)))


class Deep(nn.Module):
    """Blocks of which ``taken(self, h)`` decides, each time anew, which are run."""

    def __init__(self, taken: Callable[[Tensor, int], bool], depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Residual() for _ in range(depth))
        self.last, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)
        self.taken = taken
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for i, block in enumerate(self.blocks):
            if self.taken(h, i):
                h = self.drop(block(h))
        return self.last(h)


BRANCHES: dict[str, Callable[[Tensor, int], bool]] = {
    "a value of the data": lambda h, i: bool(h.sum() > 0),
    "an item": lambda h, i: h.mean().item() > 0,
    "Python's random numbers": lambda h, i: random.random() < 0.5,  # LayerDrop
    "NumPy's random numbers": lambda h, i: np.random.rand() < 0.5,
    "torch's random numbers": lambda h, i: bool(torch.rand(()) < 0.5),
}


def reseeded(seed: int) -> None:
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def outcomes(net: nn.Module, called: Callable[[Tensor], Tensor], calls: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    for seed in range(calls):
        reseeded(seed)
        net.zero_grad()
        output = called(normal(5, WIDTH, seed=seed))
        output.square().mean().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]
        yield output.detach(), [*grads, *(b.clone() for b in net.buffers()), torch.get_rng_state()]


@pytest.mark.parametrize("taken", BRANCHES.values(), ids=BRANCHES)
def test_a_branch_on_this_is_followed_in_every_call(taken: Callable[[Tensor, int], bool]) -> None:
    module, twin = Deep(taken), Deep(taken)
    model = attached(module, torch2ebm.ZeroDivergence())
    pairs = zip(outcomes(module, model, 12), outcomes(twin, twin, 12), strict=True)
    for (ours, left), (theirs, expected) in pairs:
        assert torch.equal(ours, theirs)
        for a, b in zip(left, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert 1 < len(model.torch2ebm.captures.entries) <= 8  # three blocks


@pytest.mark.parametrize("taken", BRANCHES.values(), ids=BRANCHES)
def test_a_relaxation_keeps_to_the_branch_that_forward_took(taken: Callable[[Tensor, int], bool]) -> None:
    """Predictive coding evaluates nodes, and not forward: no random number is drawn, and no branch is left."""
    model = attached(module := Deep(taken), torch2ebm.PredictiveCoding(4, 1e-3))
    twin = Deep(taken)
    for seed in range(6):
        reseeded(seed)
        output = model(normal(5, WIDTH, seed=seed))
        output.square().mean().backward()
        ours = random.getstate(), torch.get_rng_state()
        reseeded(seed)
        assert torch.equal(output, twin(normal(5, WIDTH, seed=seed)))
        assert ours[0] == random.getstate() and torch.equal(ours[1], torch.get_rng_state())
        energy = model.state.relaxation.energy
        assert energy[-1] < energy[0]
        for name, buffer in twin.named_buffers():
            assert torch.equal(module.get_buffer(name), buffer), name


def test_a_branch_comes_back_to_its_own_graph() -> None:
    choice = [True]
    module, twin = Deep(lambda h, i: choice[0]), Deep(lambda h, i: choice[0])
    model = attached(module, torch2ebm.ZeroDivergence())
    graphs = []
    for choice[0] in (True, False, True, False):
        assert_is_the_module(model, twin, normal(5, WIDTH))
        graphs.append(model.graph)
    assert graphs[0] is graphs[2] is not graphs[1] is graphs[3]


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.ChangingForwardWarning")
def test_branches_that_never_come_back_are_forgotten() -> None:
    module, twin = Deep(_bits := _Bits()), Deep(_Bits())
    model = attached(module, torch2ebm.ZeroDivergence())
    for _bits.number in range(KEPT + 4):
        twin.taken.number = _bits.number
        assert_is_the_module(model, twin, normal(5, WIDTH))
        assert len(model.torch2ebm.captures.entries) <= KEPT
    _bits.number = twin.taken.number = 0  # forgotten by now, and followed anew
    assert_is_the_module(model, twin, normal(5, WIDTH))


class _Bits:
    """As many sequences as there are numbers: how often the first block is run."""

    number = 0

    def __call__(self, h: Tensor, i: int) -> bool:
        return bool(self.number >> i & 1)


class Looped(nn.Module):
    """As many sequences as it is told turns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.turns = 1
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.turns):
            x = torch.tanh(self.layer(x))
        return self.last(x)


def test_too_many_sequences_are_warned_about_once() -> None:
    module, twin = Looped(), Looped()
    model = attached(module, torch2ebm.ZeroDivergence())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for turns in range(1, KEPT + 4):
            module.turns = twin.turns = turns
            assert_is_the_module(model, twin, normal(3, WIDTH))
            assert len(model.torch2ebm.captures.entries) == min(turns, KEPT)
            assert len(caught) == (turns > KEPT)
    assert caught[0].category is ChangingForwardWarning
    assert "Looped.forward has run another sequence" in str(caught[0].message)
    assert caught[0].filename.endswith("test_capture.py")  # the line of the call


def test_a_branch_that_reads_another_input_first_knows_its_name() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)
            self.double()

        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            h = torch.tanh(self.first(x))
            return self.last(h if gate is None else h * gate)

    module = Gated()
    model = attached(module, torch2ebm.ZeroDivergence())
    for _ in range(2):
        model(normal(3, WIDTH)).sum().backward()
    model(normal(3, WIDTH), normal(3, 1)).sum().backward()
    assert set(model.graph.inputs.values()) == {("x",), ("gate",)}


def test_new_batch_sizes_and_lengths_are_no_other_sequence() -> None:
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(WIDTH, 8), nn.Linear(4, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            batch, length, _ = x.shape
            h = torch.tanh(self.first(x)).view(batch, length, 2, 4).transpose(1, 2)
            mask = torch.ones(length, length, dtype=torch.bool).tril()
            weights = (h @ h.mT / h.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
            return self.last(weights @ h).reshape(len(x), 2 * length, -1)

    module, twin = Sequences(), Sequences()
    model = attached(module, torch2ebm.ZeroDivergence())
    for batch, length in ((4, 5), (2, 5), (2, 7), (1, 1), (4, 5)):
        assert_is_the_module(model, twin, normal(batch, length, WIDTH))
    assert len(model.torch2ebm.captures.entries) == 1
    assert ("x",) in model.graph.inputs.values()  # its graph was made again, and knows its input
