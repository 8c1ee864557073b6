"""Which dimension counts samples: told, found by a run on fewer samples, guessed, and contradicted aloud."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import BatchDimensionError, ConfigurationError

EXACT = 1e-12
TIME, BATCH, FEATURES, CLASSES = 6, 4, 5, 3


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Swapped(nn.Module):
    """A net that treats all steps alike, on [T, B, F] or [B, T, F]; its output is [B, T, C]."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double()
        self.time_first = time_first

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(0, 1) if self.time_first else x)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """[T, B, F] to [T, B, C]: in torch's own order."""

    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.RNN(FEATURES, 7, batch_first=batch_first).double()
        self.out = nn.Linear(7, CLASSES).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])  # type: ignore[no-any-return]


class Last(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[-1]


X = numbers(BATCH, TIME, FEATURES)
T = numbers(BATCH, TIME, CLASSES, seed=2)


def learned(
    net: nn.Module, x: Any, loss: Callable[[Any], Tensor], **settings: Any
) -> tuple[dict[str, Tensor], torch2ebm.EnergyModel]:
    model = torch2ebm.convert(net, **settings)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.PredictiveCoding(5, 0.05))
    loss(model(*x) if isinstance(x, tuple) else model(x)).backward()
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}, model


def squares(output: Tensor) -> Tensor:
    return F.mse_loss(output, T)


reference, _ = learned(Swapped(False), X, squares)


@pytest.mark.parametrize("settings", [{"batch_dim": 1}, {"batch_dim": {"x": 1}}, {"batch_dim": -2}], ids=str)
def test_a_dimension_that_is_told_is_the_batch(settings: dict[str, Any]) -> None:
    ours, model = learned(Swapped(True), X.transpose(0, 1), squares, **settings)
    assert relative_error(ours, reference) <= EXACT
    assert model.state.batch_size == BATCH
    assert "(told)" in model.summary()


def test_a_dimension_that_is_told_and_that_no_output_has_is_an_error() -> None:
    net = nn.Sequential(nn.Linear(FEATURES, 7)).double()
    with pytest.raises(BatchDimensionError, match=rf"a batch of {FEATURES}, told for .*output of shape \(4, 7\)"):
        learned(net, numbers(4, FEATURES), lambda output: output.square().mean(), batch_dim=1)
    assert net[0].weight.grad is None


def test_a_dimension_is_found_on_the_example() -> None:
    ours, model = learned(Swapped(True), X.transpose(0, 1), squares, example_inputs=X.transpose(0, 1))
    assert relative_error(ours, reference) <= EXACT
    assert "batch: dimension 1 of the first input (found)" in model.summary()


def test_a_wrong_dimension_is_another_relaxation() -> None:
    """The negative twin."""
    ours, _ = learned(Swapped(True), X.transpose(0, 1), squares, batch_dim=0)
    assert relative_error(ours, reference) > 1e-3


EXAMPLES: dict[str, tuple[nn.Module, Tensor, int]] = {
    "rows": (nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(), nn.Linear(4, 3)).double(), numbers(4, FEATURES), 0),
    "time first": (Recurrent(), numbers(TIME, BATCH, FEATURES), 1),
    "batch first": (Recurrent(batch_first=True), X, 0),
    "as many steps as samples": (Recurrent(), numbers(BATCH, BATCH, FEATURES), 1),
    "the last step": (Last(), numbers(TIME, BATCH, FEATURES), 1),
    "pictures": (nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Tanh()).double(), numbers(4, 3, 6, 6), 0),
    "attention over steps": (nn.TransformerEncoderLayer(8, 2, 9).double(), numbers(TIME, BATCH, 8), 1),
    "attention, batch first": (
        nn.TransformerEncoderLayer(8, 2, 9, batch_first=True).double(),
        numbers(BATCH, TIME, 8),
        0,
    ),
}


@pytest.mark.parametrize(("net", "x", "dim"), EXAMPLES.values(), ids=EXAMPLES)
def test_the_batch_is_the_dimension_whose_entries_do_not_meet(net: nn.Module, x: Tensor, dim: int) -> None:
    modes = [part.training for part in net.modules()]
    model = torch2ebm.convert(net, example_inputs=x)
    assert (model.torch2ebm.batch.dim, model.torch2ebm.batch.known) == (dim, "found")
    assert [part.training for part in net.modules()] == modes


CONTRADICTED: dict[str, tuple[nn.Module, Any, Callable[[Tensor], Tensor]]] = {
    "an output": (Swapped(True), X.transpose(0, 1), squares),
    "the last step of the output": (Last(), numbers(TIME, BATCH, FEATURES), lambda o: o.square().mean()),
    "a target": (
        Recurrent(),
        numbers(TIME, BATCH, FEATURES),
        lambda o: F.cross_entropy(o[-1], torch.arange(BATCH) % CLASSES),
    ),
}


@pytest.mark.parametrize(("net", "x", "loss"), CONTRADICTED.values(), ids=CONTRADICTED)
def test_a_guess_is_contradicted_aloud(net: nn.Module, x: Any, loss: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(BatchDimensionError, match=r"a batch of 6, guessed.*batch_dim=1"):
        learned(net, x, loss)
    assert all(p.grad is None for p in net.parameters())
    learned(net, x, loss, batch_dim=1)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double()

    def forward(self, edges: Tensor, x: Tensor) -> Tensor:
        return self.net(x + 0 * edges.sum())  # type: ignore[no-any-return]


def test_an_input_with_as_many_rows_as_the_output_is_the_better_guess() -> None:
    x, edges = numbers(BATCH, FEATURES), torch.zeros(2, 9).double()
    _, model = learned(Named(), (edges, x), lambda o: o.square().mean())
    assert model.state.batch_size == BATCH
    _, model = learned(Named(), (edges, x), lambda o: o.square().mean(), batch_dim={"edges": 1})
    assert model.state.batch_size == 9


@pytest.mark.parametrize("batch_dim", ["x", 0.5, True, {"x": "0"}, {"x": 0, "y": 0}, {}], ids=repr)
def test_a_dimension_that_is_none_is_refused(batch_dim: Any) -> None:
    with pytest.raises(ConfigurationError, match="batch_dim"):
        torch2ebm.convert(Swapped(True), batch_dim=batch_dim)


def test_a_dimension_that_no_input_has_is_refused() -> None:
    with pytest.raises(BatchDimensionError, match="dimension 7"):
        learned(Swapped(True), X, squares, batch_dim=7)


def test_algorithms_that_see_the_loss_once_ask_for_no_batch() -> None:
    net, twin = Swapped(True), Swapped(True)
    model = torch2ebm.convert(net)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, torch2ebm.ZeroDivergence())
    squares(model(X.transpose(0, 1))).backward()
    squares(twin(X.transpose(0, 1))).backward()
    pairs = zip(net.parameters(), twin.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=0, atol=1e-14) for a, b in pairs if a.grad is not None)


TERMS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "all entries": (lambda o: F.mse_loss(o, T), TIME * CLASSES),
    "tokens": (lambda o: F.cross_entropy(o.flatten(0, 1), torch.arange(BATCH * TIME) % CLASSES), TIME),
    "tokens, classes second": (
        lambda o: F.cross_entropy(o.transpose(1, 2), (torch.arange(BATCH * TIME) % CLASSES).view(BATCH, TIME)),
        TIME,
    ),
    "samples alone": (lambda o: (o - T).square().flatten(1).sum(1).mean(), 1),
}


@pytest.mark.parametrize(("loss", "terms"), TERMS.values(), ids=TERMS)
def test_a_mean_over_tokens_is_reported_with_what_it_does(loss: Callable[[Tensor], Tensor], terms: float) -> None:
    _, model = learned(Swapped(False), X, loss)
    assert model.state.loss_terms == terms
    told = f"a mean of {terms:.4g} terms: each pulls with 1 over their number"
    assert (told in model.summary()) == (terms > 1)


class Heads(nn.Module):
    """Two outputs, of [B, C] and [B]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classes, self.number = nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES), nn.Linear(6, 1)
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.body(x))
        return {"classes": self.classes(h), "number": self.number(h).squeeze(1)}


def test_several_outputs_and_targets_have_one_energy() -> None:
    """F = 1/2 |v - tanh(W x)|^2 + B (CE(classes(v)) + 0.3 MSE(number(v)))."""
    x, y, z = numbers(BATCH, FEATURES), torch.arange(BATCH) % CLASSES, numbers(BATCH, seed=3)

    def loss(output: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(output["classes"], y) + 0.3 * F.mse_loss(output["number"], z)

    ours, model = learned(Heads(), x, loss)
    net = Heads()
    below = torch.tanh(net.body(x))
    value = below.detach()

    def energy(value: Tensor) -> Tensor:
        output = {"classes": net.classes(value), "number": net.number(value).squeeze(1)}
        return 0.5 * (value - below).square().sum() + BATCH * loss(output)

    for _ in range(5):
        leaf = value.requires_grad_()
        (slope,) = torch.autograd.grad(energy(leaf), leaf, retain_graph=True)
        value = (leaf - 0.05 * slope).detach()
    found = torch.autograd.grad(energy(value) / BATCH, list(net.parameters()))
    expected = {name: g for (name, _), g in zip(net.named_parameters(), found, strict=True)}
    assert relative_error(ours, expected) <= EXACT
    assert model.state.batch_size == BATCH
