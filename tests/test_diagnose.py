"""``torch2ebm.diagnose``: its numbers against dense matrices, its findings in known traps, and its advice tried."""

import copy
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch2ebm
from torch2ebm import Diagnosis, PredictiveCoding, diagnose
from torch2ebm.cli import main
from torch2ebm.errors import ConfigurationError, PartitionError

CE = F.cross_entropy


def chain(depth: int, width: int = 16, act: type[nn.Module] = nn.Tanh, inputs: int = 4) -> nn.Sequential:
    torch.manual_seed(depth)
    layers: list[nn.Module] = [nn.Linear(inputs, width), act()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), act()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def labels(samples: int = 6, inputs: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, inputs, generator=generator).to(dtype), torch.arange(samples) % 3


def kinds(diagnosis: Diagnosis) -> set[str]:
    return {finding.kind for finding in diagnosis.problems}


# ---- numbers, against dense matrices


class Skips(nn.Module):
    """A residual edge, and a value that two nodes read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        k = h + torch.tanh(self.b(h))
        return self.d(h + torch.tanh(self.c(k)))


def dense_spectrum(energy: Callable[..., Tensor], values: list[Tensor]) -> Tensor:
    """Eigenvalues of the Hessian of an energy in all of its values together."""
    sizes = [value.numel() for value in values]

    def of_vector(vector: Tensor) -> Tensor:
        parts = vector.split(sizes)
        return energy(*[part.reshape(value.shape) for part, value in zip(parts, values, strict=True)])

    found = torch.autograd.functional.hessian(of_vector, torch.cat([value.flatten() for value in values]))
    return torch.linalg.eigvalsh(found)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_ends_of_the_spectrum_in_values_are_those_of_the_dense_hessian(beta: float) -> None:
    """The outputs are linear in the values before them, so the Hessian at errors of zero has no further term."""
    net, (x, y) = chain(4, 5).double(), labels(3, dtype=torch.float64)
    layers = [net[0:2], net[2:4], net[4:6]]

    def energy(*values: Tensor) -> Tensor:
        parents = (x, *values[:-1])
        errors = [0.5 * (v - f(p)).square().sum() for v, f, p in zip(values, layers, parents, strict=True)]
        return 2.0 * errors[0] + errors[1] + errors[2] + beta * CE(net[6](values[-1]), y, reduction="sum")

    values = [layers[0](x).detach()]
    for layer in layers[1:]:
        values.append(layer(values[-1]).detach())
    expected = dense_spectrum(energy, values)
    algorithm = PredictiveCoding(steps=20, lr=0.1, nudging=torch2ebm.OneSided(beta), precisions={"0": 2.0})
    found = diagnose(net, CE, (x, y), algorithm)
    assert found.values is not None and not found.values.is_bound
    assert found.values.largest == pytest.approx(float(expected[-1]), rel=1e-3)
    assert found.values.smallest == pytest.approx(float(expected[0]), rel=1e-2)
    assert found.condition == pytest.approx(float(expected[-1] / expected[0]), rel=2e-2)
    assert found.value_step == pytest.approx(1 / float(expected[-1]), rel=1e-3)
    assert found.stable_value_step == pytest.approx(2 / float(expected[-1]), rel=1e-3)


def test_the_same_on_a_graph_with_skips() -> None:
    torch.manual_seed(0)
    net, (x, y) = Skips().double(), labels(3, dtype=torch.float64)
    model = torch2ebm.convert(net, example_inputs=x)
    assert [node.name for node in model.graph.hidden_nodes] == ["a", "b", "c"]

    def first() -> Tensor:
        return torch.tanh(net.a(x))

    def second(h: Tensor) -> Tensor:
        return h + torch.tanh(net.b(h))

    def third(h: Tensor, k: Tensor) -> Tensor:
        return h + torch.tanh(net.c(k))

    def energy(h: Tensor, k: Tensor, g: Tensor) -> Tensor:
        errors = [h - first(), k - second(h), g - third(h, k)]
        return sum((0.5 * e.square().sum() for e in errors), torch.zeros(())) + CE(net.d(g), y, reduction="sum")

    h = first().detach()
    k = second(h).detach()
    expected = dense_spectrum(energy, [h, k, third(h, k).detach()])
    found = diagnose(net, CE, (x, y), PredictiveCoding(steps=20)).values
    assert found is not None and found.largest == pytest.approx(float(expected[-1]), rel=1e-3)
    assert found.smallest == pytest.approx(float(expected[0]), rel=1e-2)


class Bent(nn.Module):
    """Its last node is no linear function of the value that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(x))))


@pytest.mark.parametrize("by_difference", [False, True])
def test_an_output_that_bends_is_in_the_spectrum(by_difference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_difference:  # as where a node cannot be differentiated twice

        def refused(*_: object) -> None:
            raise RuntimeError("no formula")

        monkeypatch.setattr("torch2ebm.loss.node_curvature.NodeCurvature._twice", refused)
    net, (x, y) = Bent().double(), labels(3, dtype=torch.float64)

    def energy(v: Tensor) -> Tensor:
        errors = 0.5 * (v - torch.tanh(net.a(x))).square().sum()
        return errors + 9.0 * CE(torch.tanh(net.b(v)), y, reduction="sum")

    expected = dense_spectrum(energy, [torch.tanh(net.a(x)).detach()])
    found = diagnose(net, CE, (x, y), PredictiveCoding(steps=5, nudging=torch2ebm.OneSided(9.0))).values
    assert found is not None and found.largest == pytest.approx(float(expected[-1]), rel=1e-3)
    assert found.smallest == pytest.approx(float(expected[0]), rel=1e-3)


def test_a_batch_norm_makes_one_spectrum_of_all_samples() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = labels(6, dtype=torch.float64)

    def energy(v: Tensor, w: Tensor) -> Tensor:
        normal = F.batch_norm(v, None, None, net[1].weight, net[1].bias, training=True, eps=net[1].eps)
        errors = 0.5 * (v - net[0](x)).square().sum() + 0.5 * (w - torch.tanh(normal)).square().sum()
        return errors + CE(net[3](w), y, reduction="sum")

    v = net[0](x).detach()
    w = torch.tanh(F.batch_norm(v, None, None, training=True, eps=net[1].eps))
    expected = dense_spectrum(energy, [v, w])
    found = diagnose(net, CE, (x, y), PredictiveCoding(steps=20))
    assert found.values is not None and found.values.largest == pytest.approx(float(expected[-1]), rel=1e-3)
    assert found.batch_norms == ("1 (training: statistics of the batch)",)
    assert diagnose(net.eval(), CE, (x, y)).batch_norms == ("1 (evaluation: running statistics)",)


def test_sigma_squared_is_that_of_the_model_and_the_spectrum_in_errors_is_made_of_it() -> None:
    """With precisions of 1 the Hessian in the errors is the identity plus beta J^T H J."""
    net, batch = chain(5).double(), labels(dtype=torch.float64)
    sigma_squared = float(torch2ebm.convert(net).curvature(CE, batch))
    found = diagnose(net, CE, batch, PredictiveCoding(steps=20, nudging=torch2ebm.OneSided(3.0)))
    assert found.sigma_squared == pytest.approx(sigma_squared, rel=1e-3)
    assert found.r == pytest.approx(3 * sigma_squared, rel=1e-3)
    assert found.errors is not None and found.errors.largest == pytest.approx(1 + 3 * sigma_squared, rel=1e-3)
    assert found.errors.smallest == pytest.approx(1.0, rel=1e-6)


def test_a_condition_number_that_a_few_products_cannot_tell_is_said_to_be_a_bound() -> None:
    found = diagnose(chain(60, 8, nn.Identity), CE, labels(), PredictiveCoding(steps=60))
    assert found.values is not None and found.values.is_bound
    assert "condition number at least" in str(found)
    assert "at least" not in str(diagnose(chain(3), CE, labels())).partition("condition number")[2].splitlines()[0]


class Shortcut(nn.Module):
    """Five layers, and an edge from the second to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(5)])
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer in self.layers:
            values.append(torch.tanh(layer(values[-1])))
        return self.last(values[-1] + values[2])


@pytest.mark.parametrize("net", [chain(7), Shortcut()], ids=["chain", "skip"])
def test_so_many_steps_reach_every_node_and_one_less_does_not(net: nn.Module) -> None:
    found = diagnose(net.double(), CE, labels(dtype=torch.float64), PredictiveCoding(steps=1))
    model = torch2ebm.convert(net)
    for steps in (found.steps_to_reach, found.steps_to_reach - 1):
        model.attach(PredictiveCoding(steps=steps, lr=0.5))
        CE(model(labels()[0].double()), labels()[1]).backward()
        assert bool(model.state.unreached) == (steps < found.steps_to_reach)
        model.detach()


def test_the_share_of_the_way_of_one_step_of_errors_is_its_step_size() -> None:
    """From zero, at a small nudge: e = -lr beta dF/de, and the equilibrium is -beta dF/de (to first order)."""
    algorithm = PredictiveCoding(solver=torch2ebm.ErrorDescent(steps=1, lr=0.3), nudging=torch2ebm.OneSided(1e-5))
    found = diagnose(chain(4).double(), CE, labels(dtype=torch.float64), algorithm)
    assert set(found.share) == {"0", "2", "4"}
    assert all(share == pytest.approx(0.3, rel=1e-3) for share in found.share.values())


def test_a_long_relaxation_has_gone_all_the_way() -> None:
    found = diagnose(chain(3).double(), CE, labels(dtype=torch.float64), PredictiveCoding(steps=2000, lr=0.3))
    assert all(share == pytest.approx(1.0, abs=1e-2) for share in found.share.values())


@pytest.mark.parametrize(
    ("algorithm", "exact"),
    [
        (torch2ebm.ZeroDivergence(), True),
        (torch2ebm.Backprop(), True),
        (torch2ebm.FixedPrediction(steps=4, lr=1.0), True),
        (torch2ebm.FixedPrediction(steps=20, lr=0.1), False),
        (PredictiveCoding(), False),
    ],
    ids=lambda each: type(each).__name__,
)
def test_whether_an_algorithm_is_exact(algorithm: torch2ebm.Algorithm, exact: bool) -> None:
    assert diagnose(chain(4), CE, labels(), algorithm).exact is exact


@pytest.mark.parametrize(("r", "word"), [(0.01, "infinitesimal"), (1.0, "predictive"), (100.0, "clamped")])
def test_the_regime_in_words(r: float, word: str) -> None:
    found = diagnose(chain(3), CE, labels(), PredictiveCoding(nudging=torch2ebm.Relative(r)))
    assert word in found.regime and found.r == pytest.approx(r, rel=1e-3)


# ---- the loss

OUTPUT, TARGET = 5, torch.randn(6, 5, generator=torch.Generator().manual_seed(2))


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square()


@pytest.mark.parametrize(
    ("loss", "reduction", "terms", "half", "curvature"),
    [
        (lambda o, t: F.mse_loss(o, t), "mean", OUTPUT, False, 2 / OUTPUT),
        (lambda o, t: F.mse_loss(o, t, reduction="sum"), "sum", 1, False, 2),
        (lambda o, t: 0.5 * squared(o, t).sum(1).mean(), "mean", 1, True, 1),
        (lambda o, t: 0.5 * squared(o, t).mean(), "mean", OUTPUT, True, 1 / OUTPUT),
        (lambda o, t: squared(o, t).sum() / len(o), "mean", 1, False, 2),
        (lambda o, t: 0.5 * squared(o, t).sum() / o.numel(), "mean", OUTPUT, True, 1 / OUTPUT),
        (lambda o, t: 0.5 * squared(o, t).sum(), "sum", 1, True, 1),
        (lambda o, t: 3.0 * squared(o, t).sum(1).mean(), "mean", 1, None, 6),
        (lambda o, t: squared(o, t).square().mean(), "mean", OUTPUT, None, None),
    ],
)
def test_what_a_loss_is_made_of(
    loss: Callable[..., Tensor], reduction: str, terms: float, half: bool | None, curvature: float | None
) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, OUTPUT))
    found = diagnose(net, loss, (labels()[0], TARGET), PredictiveCoding(steps=5))
    assert (found.loss.reduction, found.loss.terms, found.loss.one_half) == (reduction, terms, half)
    assert curvature is None or found.loss.curvature == pytest.approx(curvature, rel=1e-3)
    assert ("loss" in kinds(found)) == (reduction == "sum")  # loss_reduction is "mean"


def test_what_is_quadratic_near_the_output_alone_has_no_one_half() -> None:
    net, x = chain(3), labels()[0]
    target = net(x).detach() + 0.1
    huber = diagnose(net, lambda o, t: F.huber_loss(o, t, delta=0.5), (x, target))
    assert huber.loss.one_half is None
    assert diagnose(net, lambda o, t: F.huber_loss(o, t, delta=1e3), (x, target)).loss.one_half is True


def test_a_penalty_on_weights_hides_neither_a_sum_nor_a_mean() -> None:
    for reduction in ("sum", "mean"):
        net = chain(3)
        loss = lambda o, t, net=net, how=reduction: (  # noqa: E731
            CE(o, t, reduction=how) + 0.1 * sum(p.square().sum() for p in net.parameters())
        )
        assert diagnose(net, loss, labels(), PredictiveCoding(steps=5)).loss.reduction == reduction


def test_samples_that_depend_on_each_other_are_neither() -> None:
    found = diagnose(chain(3), lambda o, t: (o @ o.T).square().sum(), labels(), PredictiveCoding(steps=5))
    assert found.loss.reduction == "" and "neither" in str(found)


def test_a_target_that_the_loss_knows_of_itself_cannot_be_repeated_and_the_tape_tells() -> None:
    x, target = labels()[0], TARGET[:, :3]
    losses = {"sum": lambda o: squared(o, target).sum(), "mean": lambda o: squared(o, target).sum(1).mean()}
    for reduction, loss in losses.items():
        found = diagnose(chain(3), loss, {"input": x}, PredictiveCoding(steps=5))
        assert found.loss.reduction == reduction and ("loss" in kinds(found)) == (reduction == "sum")


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.embedding(x)))
        return out


def over_tokens(output: Tensor, target: Tensor) -> Tensor:
    return CE(output.flatten(0, 1), target.flatten())


def test_a_mean_over_tokens_is_told_with_their_number() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(11, (5, 7))
    found = diagnose(Tokens(), over_tokens, (tokens, tokens))
    assert found.ok and found.loss.terms == 7 and found.loss.reduction == "mean" and found.batch_size == 5
    assert "OneSided(7)" in str(found)


# ---- traps


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0])
        return out


def test_the_batch_of_a_recurrent_layer_is_its_second_dimension() -> None:
    torch.manual_seed(0)
    net, x, y = Recurrent(), torch.randn(7, 5, 4), torch.randint(3, (7, 5))
    found = diagnose(net, over_tokens, (x, y))
    assert found.batch_size == 5 and "dimension 1" in found.batch and found.ok
    assert [advice.take for advice in found.advice] == ["convert(net, batch_dim=1)"]
    assert "batch" in kinds(diagnose(torch2ebm.convert(net), over_tokens, (x, y)))  # which guesses dimension 0
    told = diagnose(torch2ebm.convert(net, batch_dim=1), over_tokens, (x, y))
    assert told.ok and not told.advice and told.batch_size == 5


def silenced(net: nn.Sequential, layer: int) -> nn.Sequential:
    nn.init.constant_(net[layer].bias, -1e3)  # type: ignore[arg-type]
    return net


@pytest.mark.parametrize(
    ("net", "dead", "before"),
    [
        (silenced(chain(4, act=nn.ReLU), 2), "2", "0"),
        (silenced(chain(4, act=nn.Sigmoid), 4), "4", "2"),  # saturated: the derivative is 0 in float32
        (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(1.0), nn.Linear(8, 8), nn.Linear(8, 3)), "0", ""),
    ],
)
def test_a_dead_node_is_named_and_so_is_what_stands_before_it(net: nn.Module, dead: str, before: str) -> None:
    found = diagnose(net, CE, labels())
    assert found.dead == (dead,) and {"dead", "no gradient"} <= kinds(found)
    assert not before or before in found.reach.unreached
    assert f"{dead}.weight" in found.without_gradient


def test_a_living_net_has_neither() -> None:
    found = diagnose(chain(4, act=nn.ReLU), CE, labels(), PredictiveCoding())
    assert found.ok and not found.dead and not found.without_gradient and not found.advice
    assert "Wrong:\n  nothing" in str(found)


def test_a_parameter_that_nothing_uses_is_named() -> None:
    net = chain(3)
    net.register_parameter("unused", nn.Parameter(torch.ones(2)))
    found = diagnose(net, CE, labels())
    assert found.without_gradient == ("unused",) and kinds(found) == {"no gradient"}


@pytest.mark.parametrize(
    "loss", [lambda o, t: o.sum() * 0, lambda o, t: o.detach().sum(), lambda o, t: torch.tensor(1.0)]
)
def test_a_constant_loss_makes_no_error(loss: Callable[..., Tensor]) -> None:
    assert kinds(diagnose(chain(3), loss, labels())) == {"no error"}


@pytest.mark.parametrize(
    ("loss", "says"),
    [(lambda o, t: (o - 1e9).log().mean(), "output is finite"), (lambda o, t: (o - o).sqrt().mean(), "gradient")],
)
def test_a_loss_that_is_no_number_is_told_and_not_raised(loss: Callable[..., Tensor], says: str) -> None:
    found = diagnose(chain(3), loss, labels())
    assert kinds(found) == {"not finite"} and says in str(found) and found.sigma_squared is None


def test_an_output_that_is_no_number_is_told() -> None:
    net = chain(3)
    nn.init.constant_(net[0].weight, math.nan)  # type: ignore[arg-type]
    assert "output is not finite" in str(diagnose(net, CE, labels()))


def test_a_concave_loss_is_named_and_is_a_problem_where_the_minimum_is_lost() -> None:
    concave = lambda o, t: -o.square().sum(1).mean()  # noqa: E731
    gentle = diagnose(chain(3), concave, labels())
    assert gentle.lowest is not None and gentle.lowest < 0 and gentle.sigma_squared == 0.0
    assert gentle.of_kind("not convex") and "not convex" not in kinds(gentle)
    beta = 2 / -gentle.lowest
    harsh = diagnose(chain(3), concave, labels(), PredictiveCoding(steps=5, nudging=torch2ebm.OneSided(beta)))
    assert "not convex" in kinds(harsh)
    assert not diagnose(chain(3), CE, labels()).of_kind("not convex")


def test_a_loss_without_curvature_is_told() -> None:
    found = diagnose(chain(3), lambda o, t: o.sum(1).mean(), labels())
    assert found.sigma_squared == 0.0 and found.of_kind("no curvature") and found.ok


class OwnsItsLoss(nn.Module):
    """As a Hugging Face model that is given labels."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.body, self.reduction = chain(4), reduction

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": CE(self.body(inputs), labels, reduction=self.reduction)}


def test_a_model_that_owns_its_loss_takes_a_dict() -> None:
    x, y = labels()
    found = diagnose(OwnsItsLoss("mean"), lambda output: output["loss"], {"inputs": x, "labels": y})
    assert found.ok and found.loss.reduction == "mean" and found.levels == 3 and found.batch_size == 6
    assert found.loss.curvature is None and not found.of_kind("no curvature")
    outside = diagnose(chain(4), CE, (x, y))  # the same net, with its loss outside
    assert found.sigma_squared == pytest.approx(outside.sigma_squared, rel=1e-4)
    summed = diagnose(OwnsItsLoss("sum"), lambda output: output["loss"], {"inputs": x, "labels": y})
    assert summed.loss.reduction == "sum"


def test_a_model_of_one_node_has_nothing_that_relaxes() -> None:
    found = diagnose(nn.Linear(4, 3), CE, labels())
    assert found.ok and found.exact and found.of_kind("no values") and found.values is None and not found.regime


def test_rounding_of_a_coarse_dtype_is_no_negative_curvature() -> None:
    net, (x, y) = chain(3).bfloat16(), labels()
    assert not diagnose(net, CE, (x.bfloat16(), y), PredictiveCoding(steps=5)).of_kind("not convex")


@pytest.mark.parametrize(
    "algorithm",
    [
        torch2ebm.EquilibriumPropagation(),
        torch2ebm.ProximalInferenceLearning(),
        torch2ebm.ImplicitSGD(alpha=0.1),
        torch2ebm.RecurrentBackprop(),
        PredictiveCoding(nudging=torch2ebm.Symmetric(0.1)),
        PredictiveCoding(nudging=torch2ebm.Relative(0.1, sides=torch2ebm.Symmetric(1.0))),
        PredictiveCoding(solver=torch2ebm.SequentialDescent(steps=3)),
        PredictiveCoding(energies={"0": torch2ebm.Categorical()}),
        PredictiveCoding(compile=True),
    ],
    ids=repr,
)
def test_every_kind_of_algorithm_is_judged(algorithm: torch2ebm.Algorithm) -> None:
    found = diagnose(chain(2), CE, labels(), algorithm)
    assert found.ok and found.agreement is not None and found.exact is False, str(found)


# ---- advice, tried


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.n, self.m = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.m(self.b(F.relu(self.n(self.a(x))))))


def resnet() -> nn.Sequential:
    torch.manual_seed(0)
    stem = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, *[Block(8) for _ in range(6)], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def sharp(net: nn.Sequential) -> nn.Sequential:
    """Trained for a while, as it were: weights have grown, and with them the curvature."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.5)
    return net


IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 3
TRAPS: dict[str, tuple[nn.Module, Any, Any, torch2ebm.Algorithm, set[str]]] = {
    "a ResNet by small steps": (resnet(), CE, IMAGES, PredictiveCoding(steps=20, lr=0.01), {"signal"}),
    "few steps": (chain(20), CE, labels(), PredictiveCoding(steps=5), {"levels"}),
    "few steps in double": (
        chain(20).double(),
        CE,
        labels(dtype=torch.float64),
        PredictiveCoding(steps=5, lr=0.5),
        {"levels"},
    ),
    "fixed predictions": (chain(9), CE, labels(), torch2ebm.FixedPrediction(steps=3, lr=0.5), {"levels"}),
    "incremental": (chain(6), CE, labels(), torch2ebm.IncrementalPredictiveCoding(steps=2, lr=0.1), {"levels"}),
    "a large step": (sharp(chain(4)), CE, labels(), PredictiveCoding(steps=20, lr=0.8), {"step size"}),
    "a step that runs away": (sharp(chain(4)), CE, labels(), PredictiveCoding(steps=200, lr=3.0), {"step size"}),
    "large error steps": (
        sharp(chain(4)),
        CE,
        labels(),
        PredictiveCoding(solver=torch2ebm.ErrorDescent(20, 1.9), nudging=torch2ebm.OneSided(10.0)),
        {"step size"},
    ),
    "momentum": (
        sharp(chain(4)),
        CE,
        labels(),
        PredictiveCoding(solver=torch2ebm.Momentum(steps=20, lr=1.0)),
        {"step size"},
    ),
    "a sum": (chain(3), lambda o, t: CE(o, t, reduction="sum"), labels(), PredictiveCoding(), {"loss"}),
    "a sum, a large step": (
        sharp(chain(3)),
        lambda o, t: CE(o, t, reduction="sum"),
        labels(),
        PredictiveCoding(steps=20, lr=0.9),
        {"loss", "step size"},
    ),
}


def faults_of(net: nn.Module, loss: Any, batch: Any, algorithm: torch2ebm.Algorithm) -> set[str]:
    """What is wrong by the state that a user's own backward leaves."""
    model = torch2ebm.convert(copy.deepcopy(net))
    model.attach(algorithm)
    try:
        loss(model(batch[0]), batch[1]).backward()
    except torch2ebm.errors.LossReductionError:
        return {"loss"}
    except torch2ebm.errors.DivergenceError:
        return {"step size"}
    state, found = model.state, set()
    if state.unreached and not algorithm.weights_move:
        found.add("levels")
    if state.without_signal or any(
        not bool(state.error[n].any()) for n in state.graph.nodes if n not in state.unreached
    ):
        found.add("signal")
    energy = state.relaxation.energy
    if any(after > before + 1e-4 * abs(energy[0]) for before, after in itertools.pairwise(energy)):
        found.add("step size")
    return found


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")
@pytest.mark.filterwarnings("ignore::torch2ebm.errors.StepSizeWarning")  # a step that is too long is one of them
@pytest.mark.parametrize("name", TRAPS)
def test_what_is_wrong_is_named_and_every_advice_cures_it(name: str) -> None:
    net, loss, batch, algorithm, expected = TRAPS[name]
    found = diagnose(net, loss, batch, algorithm)
    assert kinds(found) == expected, str(found)
    assert found.advice and str(found.advice[-1]) in str(found)
    if name == "a ResNet by small steps":  # in the middle, where parents have moved by an epsilon of their values
        assert "6.a" in found.without_signal
    last = found.advice[-1].algorithm
    assert last is not None and faults_of(net, loss, batch, last) == set()
    assert diagnose(net, loss, batch, last).ok
    if not algorithm.weights_move:  # whose first step alone is to be seen here
        assert faults_of(net, loss, batch, algorithm)


@pytest.mark.parametrize("name", ["few steps in double", "incremental"])
def test_the_number_of_steps_that_is_advised_is_the_smallest(name: str) -> None:
    net, loss, batch, algorithm, _ = TRAPS[name]
    found = diagnose(net, loss, batch, algorithm)
    (advice,) = found.advice
    assert advice.take == f"steps={found.steps_to_reach}"
    assert "levels" in kinds(diagnose(net, loss, batch, algorithm.with_steps(found.steps_to_reach - 1)))


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**3


def test_where_curvature_grows_on_the_way_the_lr_that_is_advised_is_below_that_of_the_start() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), Cube(), nn.Linear(8, 8), Cube(), nn.Linear(8, 3)).double()
    batch = torch.randn(6, 4).double(), torch.full((6, 3), 30.0).double()
    loss = lambda o, t: 0.5 * squared(o, t).sum(1).mean()  # noqa: E731
    found = diagnose(net, loss, batch, PredictiveCoding(steps=40, lr=2.5))
    assert found.value_step is not None
    at_start = PredictiveCoding(steps=40, lr=found.value_step)
    assert kinds(diagnose(net, loss, batch, at_start)) == {"step size"} == faults_of(net, loss, batch, at_start)
    (advice,) = found.advice
    assert advice.take.startswith("lr=") and advice.algorithm is not None
    assert faults_of(net, loss, batch, advice.algorithm) == set()


def test_settings_that_do_are_left_alone() -> None:
    found = diagnose(chain(4), CE, labels(), PredictiveCoding(steps=20, lr=0.1))
    assert found.ok and not found.advice


def test_without_an_algorithm_the_attached_one_is_judged() -> None:
    model = torch2ebm.convert(chain(9))
    assert diagnose(model, CE, labels()).algorithm == PredictiveCoding()
    model.attach(PredictiveCoding(steps=2))
    assert "levels" in kinds(diagnose(model, CE, labels()))
    assert diagnose(model, CE, labels(), PredictiveCoding()).ok


# ---- nothing is changed


class Restless(nn.Module):
    """Draws from every generator, counts its calls and moves its running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.frozen = nn.BatchNorm1d(8).eval()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        random.random()
        np.random.random()
        out: Tensor = self.last(self.frozen(F.dropout(self.norm(self.first(x)), 0.2, self.training)))
        return out


class Counting(nn.Module):
    def __init__(self, fails_at: int = 10**9) -> None:
        super().__init__()
        self.seen, self.fails_at = 0, fails_at
        self.register_buffer("running", torch.zeros(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.seen += 1
        self.running += 1
        if self.seen >= self.fails_at:
            raise KeyError("as a user's loss may")
        return CE(output, target)


def everything(model: nn.Module, loss: nn.Module) -> Any:
    module = model.torch2ebm.module if isinstance(model, torch2ebm.EnergyModel) else model
    return (
        {name: tensor.clone() for name, tensor in [*module.state_dict().items(), *loss.state_dict().items()]},
        {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
        [part.training for part in module.modules()],
        (module.calls, loss.seen),
        (torch.get_rng_state(), random.getstate(), np.random.get_state()[1]),
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (Tensor, np.ndarray)):
        return bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("fails_at", [10**9, 1, 2, 5])
@pytest.mark.parametrize("attached", [True, False])
def test_everything_is_as_before_also_where_the_loss_raises(attached: bool, fails_at: int) -> None:
    module, (x, y), loss = Restless(), labels(), Counting()
    model = torch2ebm.convert(module) if attached else module
    if isinstance(model, torch2ebm.EnergyModel):
        model.attach(PredictiveCoding(steps=3))
    loss(model(x), y).backward()
    state = model.state if isinstance(model, torch2ebm.EnergyModel) else None
    loss.seen, loss.fails_at = 0, fails_at
    before = everything(model, loss)
    try:
        with torch.no_grad():
            diagnose(model, loss, (x, y))
            assert not torch.is_grad_enabled()
    except KeyError:
        assert fails_at < 10**9
    assert same(everything(model, loss), before)
    if isinstance(model, torch2ebm.EnergyModel):
        assert model.state is state and model.algorithm == PredictiveCoding(steps=3)
        loss.fails_at = 10**9
        loss(model(x), y).backward()


def test_an_open_forward_is_answered_after_it() -> None:
    module, (x, y) = Restless(), labels()
    model = torch2ebm.convert(module)
    model.attach(torch2ebm.ZeroDivergence())
    loss = CE(model(x), y)
    diagnose(model, CE, (x, y))
    loss.backward()
    assert module.first.weight.grad is not None


# ---- bad input, and how it is shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((CE(torch.zeros(1, 3), torch.tensor([0])), labels()), "is no function"),
        ((nn.CrossEntropyLoss, labels()), "parentheses"),
        ((CE, labels()[0]), "(inputs, target)"),
        ((lambda o, t: o, labels()), "one number"),
        ((lambda o, t: 1.0, labels()), "one number"),
        ((CE, labels(), "PredictiveCoding"), "torch2ebm.PredictiveCoding()"),
        ((CE, labels(), torch2ebm.GradientDescent()), "belongs to an algorithm"),
    ],
)
def test_bad_input_is_refused_by_name(arguments: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match="diagnose") as caught:
        diagnose(chain(3), *arguments)
    assert says in str(caught.value)


def test_a_model_that_cannot_learn_is_refused() -> None:
    with pytest.raises(PartitionError, match="without trainable parameters"):
        diagnose(chain(3).requires_grad_(False), CE, labels())


def test_it_shows_itself_in_a_line_and_in_a_notebook() -> None:
    found = diagnose(chain(9), CE, labels(), PredictiveCoding(steps=2))
    assert len(repr(found).splitlines()) == 1 and "levels" in repr(found)
    assert "<pre>" in found._repr_html_() and "steps=8" in found._repr_html_()
    with pytest.raises(AttributeError):
        found.levels = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [([], 0, "nothing"), (["--steps", "1"], 1, "[levels]"), (["--steps", "9", "--loss", "mse", "--lr", "9"], 1, "lr=")],
)
def test_the_command_ends_with_one_where_something_is_wrong(
    more: list[str], code: int, says: str, tmp_path: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_net.py").write_text(
        "from torch import nn\ndef net():\n"
        "    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))\n"
    )
    assert main(["diagnose", "users_net.py:net", "--input-shape", "6,4", *more]) == code
    assert says in capsys.readouterr().out
