"""Curvature inside of output nodes, as where the model returns its own loss, against matrices written out."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from curved import CutSquare, Square
from helpers import attached, relative_error
from oracles.dense_hessian import ErrorProblem, ValueProblem, of_chain, values_of_chain
from torch import Tensor, nn

import torch2ebm
from torch2ebm.algorithms.given import Given
from torch2ebm.errors import CurvatureWarning
from torch2ebm.inference.steepness import Stability, measured_stability
from torch2ebm.loss.node_curvature import NodeCurvature
from torch2ebm.loss.output_loss import NudgedLoss

CLASSES = torch.tensor([0, 2, 1, 1, 0])
TARGET = torch.linspace(-2.0, 3.0, 15, dtype=torch.float64).reshape(5, 3)

Loss = Callable[[Tensor], Tensor]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = normal(5, 4)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


def cross_entropy(output: Tensor) -> Tensor:
    return F.cross_entropy(output, CLASSES, reduction="sum")


def nll(output: Tensor) -> Tensor:
    return F.nll_loss(output, CLASSES, reduction="sum")


def squared(output: Tensor) -> Tensor:
    return 0.5 * (output - TARGET).square().sum()


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def normalised() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


class Own(nn.Module):
    """A model that is given labels and returns its loss beside its logits."""

    def __init__(self, net: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": self.loss(logits) / len(logits), "logits": logits}


def own(output: dict[str, Tensor]) -> Tensor:
    return output["loss"]


def values_before(net: nn.Sequential) -> list[Callable[[Tensor], Tensor]]:
    """One function a value, of default nodes; the last layer makes none."""
    cuts = [i for i, layer in enumerate(net) if isinstance(layer, (nn.Linear, nn.BatchNorm1d))]
    return [net[start:stop] for start, stop in itertools.pairwise(cuts)]


def bent(net: nn.Sequential, loss: Loss, x: Tensor = X, precisions: Sequence[float] = ()) -> ErrorProblem:
    """What the last node reads counts for the output: its Hessian has the loss's and the node's own."""
    last = net[[i for i, layer in enumerate(net) if isinstance(layer, nn.Linear)][-1] :]
    return of_chain([*values_before(net), lambda value: value], x, lambda value: loss(last(value)), precisions)


def ends_of(problem: ErrorProblem) -> tuple[float, float]:
    values = torch.linalg.eigvalsh(problem.gauss_newton())
    return float(values[-1]), float(values[0])


# ---- against the matrix


@pytest.mark.parametrize("loss", [cross_entropy, squared])
@pytest.mark.parametrize("make", [body, normalised])
@pytest.mark.parametrize("precisions", [{}, {"net.0": 2.5}], ids=["unit", "precisions"])
def test_a_model_that_returns_its_loss_has_the_curvature_of_its_net(
    loss: Loss, make: Callable[[], nn.Module], precisions: dict[str, float]
) -> None:
    net, twin = seeded(make), seeded(make)
    weights = [precisions.get(name, 1.0) for name in ("net.0", "others", "others")]
    expected = bent(twin, loss, precisions=weights[: len(values_before(twin))])
    found = torch2ebm.convert(Own(net, loss)).curvature(own, {"x": X}, precisions=precisions)
    largest, _ = ends_of(expected)
    assert found.sigma_squared == pytest.approx(largest, rel=1e-6) and largest > 0
    assert found.lowest == pytest.approx(0.0, abs=1e-10 * largest)
    assert (found.of_samples is None) == (make is normalised)
    named = {name.removeprefix("net."): each for name, each in precisions.items()}
    outside = torch2ebm.convert(net).curvature(lambda o, _: loss(o) / len(o), (X, None), precisions=named)
    assert found.sigma_squared == pytest.approx(outside.sigma_squared, rel=1e-6)


@pytest.mark.parametrize("loss", [cross_entropy, squared, nll])
def test_without_the_nodes_own_there_is_nothing(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: the loss is linear in itself, and nll in logarithms."""
    monkeypatch.setattr(NodeCurvature, "product", lambda *_: {})
    net = seeded(body)
    model = torch2ebm.convert(nn.Sequential(*net, nn.LogSoftmax(1)) if loss is nll else Own(net, loss))
    found = model.curvature((lambda o, _: nll(o) / 5) if loss is nll else (lambda o, _: own(o)), (X, None))
    assert found.radius == 0.0


def test_a_logarithm_of_softmax_inside_is_cross_entropy() -> None:
    net = seeded(body)
    logarithms = nn.Sequential(*net, nn.LogSoftmax(1))
    largest, _ = ends_of(bent(net, cross_entropy))
    found = torch2ebm.convert(logarithms).curvature(lambda o, _: nll(o) / 5, (X, None))
    assert found.sigma_squared == pytest.approx(largest, rel=1e-6)
    assert ends_of(of_chain([*values_before(net), logarithms[4:]], X, nll))[0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("by_difference", [False, True])
def test_an_output_node_that_bends_under_a_loss_outside(by_difference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both count: the loss's own Hessian through the node, and the node's, here of either sign."""
    if by_difference:  # as where a node cannot be differentiated twice

        def refused(*_: object) -> None:
            raise RuntimeError("no formula")

        monkeypatch.setattr(NodeCurvature, "_twice", refused)
    net = nn.Sequential(*seeded(body), nn.Tanh())
    largest, lowest = ends_of(bent(net, squared))
    gauss_newton = of_chain([*values_before(net), net[4:]], X, squared).sigma_squared()
    found = torch2ebm.convert(net).curvature(lambda o, _: squared(o) / 5, (X, None))
    assert found.sigma_squared == pytest.approx(largest, rel=1e-6)
    assert found.lowest == pytest.approx(lowest, rel=1e-4) and lowest < 0
    assert largest != pytest.approx(gauss_newton, rel=0.01)


class Skips(nn.Module):
    """Its last node reads two values, and computes the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Bilinear(6, 6, 3)

    def second(self, h: Tensor) -> Tensor:
        return torch.tanh(self.b(h))

    def last(self, h: Tensor, k: Tensor) -> Tensor:
        return cross_entropy(self.c(h, k))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.last(h, self.second(h)) / len(x)


@pytest.mark.parametrize("precisions", [{}, {"a": 0.5, "b": 3.0}], ids=["unit", "precisions"])
def test_on_a_graph_whose_last_node_reads_two_values(precisions: dict[str, float]) -> None:
    net = seeded(Skips)
    model = torch2ebm.convert(net)
    start = torch.tanh(net.a(X)).detach()

    def values(errors: Tensor) -> Tensor:
        of_h, of_k = errors.reshape(2, *start.shape)
        h = start + of_h
        return torch.stack([h, net.second(h) + of_k])

    weights = [torch.full((start.numel(),), precisions.get(name, 1.0), dtype=torch.float64) for name in ("a", "b")]
    whole = ErrorProblem(values, torch.cat(weights), lambda both: net.last(*both))
    largest, lowest = ends_of(whole)
    found = model.curvature(lambda loss, _: loss, (X, None), precisions=precisions)
    assert [node.name for node in model.graph.hidden_nodes] == ["a", "b"]
    assert found.sigma_squared == pytest.approx(largest, rel=1e-6)
    assert found.lowest == pytest.approx(lowest, rel=1e-4) and lowest < 0


def test_fused_attention_in_the_last_node_is_not_differentiated_twice() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, v: Tensor) -> Tensor:
            heads = [f(v).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)]
            return F.scaled_dot_product_attention(*heads).square().sum() / len(v)

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), Last()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    net, x = seeded(Attending), normal(3, 5, 4)

    def by_hand(v: Tensor) -> Tensor:  # autograd has no second derivative of the fused one
        q, k, u = (f(v).unflatten(-1, (2, -1)).transpose(1, 2) for f in (net.last.query, net.last.key, net.last.value))
        return ((q @ k.mT / 2).softmax(-1) @ u).square().sum()

    largest, _ = ends_of(of_chain([net.first, lambda v: v], x, by_hand))
    model = torch2ebm.convert(net, nodes=["first", "last"])
    found = model.curvature(lambda loss, _: loss, (x, None))
    assert found.sigma_squared == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize("function", [Square, CutSquare])
def test_a_loss_inside_that_cannot_be_differentiated_twice(function: type[torch.autograd.Function]) -> None:
    net = seeded(body)
    largest, _ = ends_of(bent(net, squared))
    model = torch2ebm.convert(Own(net, lambda output: function.apply(output - TARGET).sum()))
    found = model.curvature(own, {"x": X})
    assert model.graph.hidden_nodes and found.sigma_squared == pytest.approx(largest, rel=1e-6)


# ---- the nudge and the gradients


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name.removeprefix("net."): p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", [cross_entropy, squared])
def test_gradients_are_those_of_the_net_with_its_loss_outside(loss: Loss) -> None:
    net = seeded(body)
    inside = attached(Own(net, loss), torch2ebm.PredictiveCoding())
    outside = attached(net, torch2ebm.PredictiveCoding())
    ours = gradients(inside, own(inside(X)))
    theirs = gradients(outside, loss(outside(X)) / 5)
    assert inside.state.relaxation.sigma_squared == pytest.approx(outside.state.relaxation.sigma_squared, rel=1e-6)
    assert relative_error(ours, theirs) < 1e-6


def test_a_loss_that_the_model_returns_is_still_told_where_nothing_bends() -> None:
    model = attached(Own(seeded(body), lambda output: output.sum()), torch2ebm.PredictiveCoding())
    with pytest.warns(CurvatureWarning, match="no curvature"):
        own(model(X)).backward()


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_logits_that_are_a_value_of_their_own_soften_the_nudge(beta: float) -> None:
    """min over e of e^2 / 2 + beta (y + e - t)^2 / 2 is beta' (y - t)^2 / 2, with beta' = beta / (1 + beta)."""
    found = []
    net = seeded(body)
    settings = {"solver": torch2ebm.ErrorConjugateGradient(tol=1e-10, steps=500), "loss_reduction": "mean"}
    softer = beta / (1 + beta)
    for module, nodes, nudge in ((Own(net, squared), "preactivation", beta), (net, "preactivation", softer)):
        model = attached(module, torch2ebm.PredictiveCoding(nudging=torch2ebm.OneSided(nudge), **settings), nodes)
        output = model(X)
        loss = own(output) if isinstance(output, dict) else squared(output) / 5
        found.append({name: nudge * g for name, g in gradients(model, loss).items()})
    assert relative_error(*found) < 1e-6


def test_sigma_squared_counts_the_error_of_logits_that_are_a_value() -> None:
    net = seeded(body)
    layers = [net[0], net[1:3], net[3:], lambda value: value]
    largest, _ = ends_of(of_chain(layers, X, cross_entropy))
    model = torch2ebm.convert(Own(net, cross_entropy), nodes="preactivation")
    found = model.curvature(own, {"x": X})
    assert found.sigma_squared == pytest.approx(largest, rel=1e-6)
    outside = torch2ebm.convert(net, nodes="preactivation").curvature(lambda o, _: cross_entropy(o) / 5, (X, None))
    assert found.sigma_squared > 1.1 * outside.sigma_squared


# ---- automatic step sizes


def stability(net: nn.Module, beta: float, coordinates: str) -> Stability:
    algorithm = Given("mean")
    own(attached(net, algorithm)(X)).backward(retain_graph=True)
    call, loss = algorithm.found[0]
    return measured_stability(call, NudgedLoss(loss, beta), {}, coordinates, 200, 1e-9)


@pytest.mark.parametrize("beta", [0.5, 20.0])
def test_steps_follow_the_loss_inside(beta: float) -> None:
    """In the values the whole Hessian of F, by autograd: errors are zero, so no other second derivative is left."""
    net = seeded(body)
    values: ValueProblem = values_of_chain([*values_before(net), net[4:]], X, cross_entropy)

    def energy(at: Tensor) -> Tensor:
        return 0.5 * values.errors(at).square().sum() + beta * cross_entropy(values.output(at))

    expected = torch.linalg.eigvalsh(torch.autograd.functional.hessian(energy, values.start))[-1]
    of_errors = torch.linalg.eigvalsh(bent(net, cross_entropy).hessian(beta))[-1]
    model = Own(net, cross_entropy)
    assert stability(model, beta, "values").steepest == pytest.approx(float(expected), rel=1e-6)
    assert stability(model, beta, "errors").steepest == pytest.approx(float(of_errors), rel=1e-6)
