"""Losses put together at random are replayed as they were written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import attached
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles.whole_losses import TwoLayers
from torch import Tensor, nn

import torch2ebm

STEPS, RATE = 4, 0.02
BATCH, CLASSES = 4, 3
Part = Callable[[Tensor], Tensor]

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(BATCH, 4, dtype=torch.float64, generator=GENERATOR)
T = torch.randn(BATCH, CLASSES, dtype=torch.float64, generator=GENERATOR)
Y = torch.tensor([0, 2, 1, 0])
WEIGHTS = torch.rand(BATCH, dtype=torch.float64, generator=GENERATOR)
MASK = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]]).bool()


def written(output: Tensor) -> Tensor:
    copied = output * 1
    copied[:, 0] = 0.5 * copied[:, 1]
    copied.tanh_()
    return copied


def halves(output: Tensor) -> Tensor:
    first, second = output.chunk(2)
    return torch.cat([second, first.flip(0)])


# from an output to an output
STEPS_OF_OUTPUTS: dict[str, Part] = {
    "tanh": torch.tanh,
    "softmax": lambda o: o.softmax(1),
    "normalised": lambda o: F.normalize(o, dim=1, eps=1e-3),
    "layer norm": lambda o: F.layer_norm(o, (CLASSES,), eps=0.1),
    "residual": lambda o: o + 0.3 * o.sin(),
    "scaled": lambda o: 0.7 * o,
    "transposed twice": lambda o: o.t().contiguous().t(),
    "written in place": written,
    "halves exchanged": halves,
    "masked": lambda o: torch.where(MASK, o, 0.1 * o),
    "cumulated": lambda o: o.cumsum(1),
    "smoothed": lambda o: F.softplus(o),
}
# from an output to one number, of the size of one sample's loss
ENDS: dict[str, Part] = {
    "cross entropy": lambda o: F.cross_entropy(o, Y),
    "smoothed labels": lambda o: F.cross_entropy(o, Y, label_smoothing=0.1),
    "squares": lambda o: F.mse_loss(o, T),
    "half the squares": lambda o: 0.5 * (o - T).square().sum(1).mean(),
    "over the batch": lambda o: (o - T).square().sum() / BATCH,
    "absolute": lambda o: F.smooth_l1_loss(o, T),
    "weighted samples": lambda o: (WEIGHTS * (o - T).square().sum(1)).mean(),
    "a masked mean": lambda o: (o - T).square()[MASK].mean(),
    "over the mask": lambda o: ((o - T).square() * MASK).sum() / MASK.sum(),
    "a norm": lambda o: (o - T).norm() / BATCH,
    "logits": lambda o: F.binary_cross_entropy_with_logits(o, T.sigmoid()),
    "entropy": lambda o: -(o.softmax(1) * o.log_softmax(1)).sum(1).mean(),
    "distances": lambda o: torch.cdist(o, T).mean(),
    "a soft maximum": lambda o: o.logsumexp(1).mean(),
    "einsum": lambda o: torch.einsum("bi,bi->b", o, T).mean(),
    "sample by sample": lambda o: sum(F.mse_loss(o[i], T[i]) for i in range(BATCH)) / BATCH,  # type: ignore[return-value]
}
# from numbers to one number
TWO = {
    "sum": lambda a, b: a + b,
    "weighted": lambda a, b: 0.3 * a - 0.2 * b,
    "product": lambda a, b: a * b.tanh(),
    "quotient": lambda a, b: a / (1 + b.square()),
    "stacked": lambda a, b: torch.stack([a, b]).mean(),
    "larger": torch.maximum,
    "in place": lambda a, b: (a * 1).add_(b),
    "root of squares": lambda a, b: (a.square() + b.square() + 0.1).sqrt(),
}
ONE: dict[str, Part] = {
    "halved": lambda a: a / 2,
    "root": lambda a: (a.square() + 0.1).sqrt(),
    "logarithm": lambda a: (1 + a.square()).log(),
    "exponential": lambda a: torch.exp(-a.square()),
    "constant": lambda a: a + 2.5,
    "negative": lambda a: -0.1 * a,
    "clamped": lambda a: a.clamp(max=1.5) + 0.1 * a,
    "to the power": lambda a: (1 + a.square()) ** 0.7,
}


def of(table: dict[str, Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from(sorted(table))


ended = st.tuples(st.lists(of(STEPS_OF_OUTPUTS), max_size=3), of(ENDS))
losses = st.recursive(
    ended, lambda inner: st.one_of(st.tuples(of(ONE), inner), st.tuples(of(TWO), inner, inner)), max_leaves=4
)


def built(term: Any) -> Part:
    head, *rest = term
    if isinstance(head, list):
        end, steps = ENDS[rest[0]], [STEPS_OF_OUTPUTS[name] for name in head]

        def loss(output: Tensor) -> Tensor:
            for step in steps:
                output = step(output)
            return end(output)

        return loss
    parts = [built(each) for each in rest]
    return lambda output: (ONE | TWO)[head](*[part(output) for part in parts])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def check(term: Any) -> None:
    loss = built(term)
    expected = TwoLayers(net(), 2, [X], loss, BATCH).gradients(STEPS, RATE)
    largest = max(float(g.abs().max()) for g in expected.values())
    for written_as in (loss, torch2ebm.EnergyLoss(loss)):
        module = net()
        written_as(attached(module, torch2ebm.PredictiveCoding(STEPS, RATE))(X)).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            assert float((parameter.grad - expected[name]).abs().max()) <= 1e-12 * max(largest, 1e-2), (term, name)


IN_A_HURRY = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}


@settings(max_examples=100, **IN_A_HURRY)
@given(losses)
def test_a_random_loss_is_replayed_as_it_was_written(term: Any) -> None:
    check(term)


@pytest.mark.slow
@settings(max_examples=1000, **IN_A_HURRY)
@given(losses)
def test_a_thousand_random_losses_are_replayed_as_they_were_written(term: Any) -> None:
    check(term)
