"""``model.energy``: against F as it is written, and without a trace in the module."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import attached
from oracles.energy import EnergyProblem
from oracles.graphs import SkipDag, cross_entropy, half_squared_error, skip_dag
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import BatchDimensionError, ConfigurationError, UnknownNameError, UnsupportedError

LABELS = torch.tensor([0, 1, 2, 0, 1])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(make) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


def half(error: Tensor) -> Tensor:
    return 0.5 * error.square().flatten(1).sum(1)


def mlp() -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)))


X, VALUES = normal(5, 4), {"0": normal(5, 8, seed=1), "2": normal(5, 6, seed=2)}
# ---- against the formula


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_share_of_a_chain(reduction: str) -> None:
    net = mlp()
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    found = torch2ebm.convert(net).energy(VALUES, X, loss_fn=loss_fn, target=LABELS, beta=0.5)
    first, second = half(VALUES["0"] - net[:2](X)), half(VALUES["2"] - net[2:4](VALUES["0"]))
    loss = 0.5 * F.cross_entropy(net[4](VALUES["2"]), LABELS, reduction="none")
    assert torch.allclose(found.nodes["0"], first) and torch.allclose(found.nodes["2"], second)
    assert torch.allclose(found.loss, loss) and torch.allclose(found.total, first + second + loss)
    assert list(found.nodes) == ["0", "2"] and found.value["2"] is VALUES["2"]
    assert torch.allclose(found.prediction["2"], net[2:4](VALUES["0"]))


def test_a_value_that_is_not_given_is_its_prediction() -> None:
    net = mlp()
    found = torch2ebm.convert(net).energy({"0": VALUES["0"]}, X, loss_fn=F.cross_entropy, target=LABELS)
    assert list(found.nodes) == ["0"]
    assert torch.allclose(found.value["2"], net[2:4](VALUES["0"]))
    assert torch.allclose(found.loss, F.cross_entropy(net[2:](VALUES["0"]), LABELS, reduction="none"))
    at_start = torch2ebm.convert(net).energy({}, X)
    assert torch.equal(at_start.total, torch.zeros(5).double()) and at_start.loss is None


def squares_of_samples(output: Tensor) -> Tensor:
    return half(output - target_of_half_squared_error(output.shape))


@functools.cache
def target_of_half_squared_error(shape: torch.Size) -> Tensor:
    return -torch.func.grad(half_squared_error)(torch.zeros(shape, dtype=torch.float64))


def entropies_of_samples(output: Tensor) -> Tensor:
    return F.cross_entropy(output, torch.arange(len(output)) % output.shape[1], reduction="none")


OF_SAMPLES = {half_squared_error: squares_of_samples, cross_entropy: entropies_of_samples}


@pytest.mark.parametrize("loss", OF_SAMPLES)
@pytest.mark.parametrize("categorical", [(), ("third",)])
def test_on_a_dag_with_skips_and_shared_weights(loss, categorical) -> None:
    """Value, gradient and Hessian, as the oracle has them."""
    precisions = {"first": 2.5, "gated": torch.linspace(0.5, 2.0, 6, dtype=torch.float64)}
    problem = EnergyProblem(skip_dag(), loss, precisions=precisions, categorical=categorical)
    values = {
        name: value + normal(*value.shape, seed=i) for i, (name, value) in enumerate(problem.feedforward().items())
    }
    model = torch2ebm.convert(SkipDag(), nodes=[vertex.name for vertex in skip_dag().vertices])
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}

    own = {name: torch2ebm.Categorical() for name in categorical}

    def ours(given: dict[str, Tensor]) -> Tensor:
        x, given_loss = problem.dag.inputs["x"], OF_SAMPLES[loss]
        return model.energy(given, x, loss_fn=given_loss, precisions=precisions, energies=own).total.sum()

    expected = problem.of_values(leaves)
    assert torch.allclose(ours(leaves), expected, rtol=1e-12)
    wanted = torch.autograd.grad(expected, list(leaves.values()))
    for gradient, oracle in zip(torch.autograd.grad(ours(leaves), list(leaves.values())), wanted, strict=True):
        assert torch.allclose(gradient, oracle, atol=1e-12)
    name = "first"
    hessian = torch.func.hessian(lambda value: ours({**values, name: value}))(values[name])
    written = lambda value: problem.of_values({**values, name: value})  # noqa: E731
    oracle = torch.autograd.functional.hessian(written, values[name])
    assert torch.allclose(hessian, oracle, atol=1e-11)


def test_a_convolutional_net() -> None:
    net = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)))
    x, value = normal(4, 2, 6, 6), normal(4, 48, seed=1)
    found = torch2ebm.convert(net).energy({"0": value}, x)
    assert torch.allclose(found.total, half(value - net[:3](x)))


class Chunked(nn.Module):
    """One node of two slots, an LSTM of three outputs of which one is read, and a weight that two nodes share."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.cell, self.shared = nn.Linear(4, 10), nn.LSTM(5, 5, batch_first=True), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.two(x).chunk(2, -1)
        sequence, _ = self.cell(left[:, None] * right[:, None])
        return self.shared(self.shared(sequence[:, 0]).tanh() + left)


def test_a_node_of_several_slots_and_a_shared_weight() -> None:
    net = seeded(Chunked)
    model = torch2ebm.convert(net, nodes=["two", "cell", "shared"], example_inputs=X)
    start = model.energy({}, X).value
    several = [name for name, value in start.items() if isinstance(value, tuple)]
    assert several
    moved = {
        name: tuple(part + 0.1 for part in value) if isinstance(value, tuple) else value + 0.1
        for name, value in start.items()
        if not model.nodes[name].is_output
    }
    found = model.energy(moved, X, loss_fn=lambda output: half(output))
    total = torch.zeros(5).double()
    for name, value in moved.items():
        predicted = found.prediction[name]
        pairs = zip(value, predicted, strict=True) if isinstance(value, tuple) else [(value, predicted)]
        expected = sum(half(v - p) for v, p in pairs)
        assert torch.allclose(found.nodes[name], expected)
        total = total + expected
    assert torch.allclose(found.total, total + found.loss) and float(total.min()) > 0.05
    one = several[0]
    left_alone = model.energy({one: (moved[one][0], *[None] * (len(moved[one]) - 1))}, X)
    assert torch.allclose(left_alone.nodes[one], half(moved[one][0] - start[one][0]))


def test_the_value_of_an_output_has_an_energy_and_the_loss_acts_on_it() -> None:
    net, y = mlp(), normal(5, 3, seed=7)
    model = torch2ebm.convert(net)
    assert torch.allclose(model.energy({"4": y}, X).total, half(y - net(X)))
    free = model.energy({"4": y}, X, loss_fn=F.cross_entropy, target=LABELS, precisions={"4": 2.0})
    assert torch.allclose(free.total, 2 * half(y - net(X)) + F.cross_entropy(y, LABELS, reduction="none"))


def test_it_is_the_energy_that_a_relaxation_reports() -> None:
    net, y = mlp(), normal(5, 3, seed=7)
    algorithm = torch2ebm.PredictiveCoding(steps=7, lr=0.2, precisions={"0": 3.0})
    model = attached(net, algorithm)
    F.mse_loss(model(X), y).backward()
    state = model.state
    found = model.energy(
        {n: state.value[n] for n in ("0", "2")}, X, loss_fn=F.mse_loss, target=y, precisions={"0": 3.0}
    )
    assert float(found.total.sum()) == pytest.approx(state.relaxation.energy[-1], rel=1e-12)
    assert model.state is state  # it is no forward


def test_batch_norm_takes_the_statistics_of_the_given_values() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))
    twin = copy.deepcopy(net)
    value = normal(5, 6, seed=3)
    model = torch2ebm.convert(net, nodes=["0", "1", "3"])
    found = model.energy({"0": value, "1": value}, X)
    assert torch.allclose(found.total, half(value - twin[0](X)) + half(value - twin[1](value)))
    assert not torch.allclose(twin[1](value), twin[1](twin[0](X)), atol=0.1)  # others than those of the forward


# ---- as a function


def test_an_optimizer_of_torch_finds_the_equilibrium() -> None:
    net = mlp()
    model = torch2ebm.convert(net)
    leaves = {name: value.clone().requires_grad_() for name, value in VALUES.items()}
    optimizer = torch.optim.LBFGS(leaves.values(), max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def energy() -> Tensor:
        optimizer.zero_grad()
        total = model.energy(leaves, X, loss_fn=F.cross_entropy, target=LABELS).total.sum()
        total.backward()
        return total

    optimizer.step(energy)
    assert all(parameter.grad is None for parameter in net.parameters())
    solver = torch2ebm.ErrorConjugateGradient(tol=1e-8, steps=500)
    settled = attached(net, torch2ebm.PredictiveCoding(solver=solver))
    F.cross_entropy(settled(X), LABELS).backward()
    for name, leaf in leaves.items():
        assert torch.allclose(leaf, settled.state.value[name], atol=1e-5)


def test_gradients_reach_inputs_and_parameters_where_they_are_asked_for() -> None:
    net, x = mlp(), X.clone().requires_grad_()
    model = torch2ebm.convert(net)
    plain = half(VALUES["0"] - net[:2](x)).sum() + half(VALUES["2"] - net[2:4](VALUES["0"])).sum()
    expected = torch.autograd.grad(plain, [x, *net[:3].parameters()])
    found = model.energy(VALUES, x, parameters=True).total.sum()
    for ours, oracle in zip(torch.autograd.grad(found, [x, *net[:3].parameters()]), expected, strict=True):
        assert torch.allclose(ours, oracle, atol=1e-12)
    model.energy(VALUES, x).total.sum().backward()
    assert torch.allclose(x.grad, expected[0]) and net[0].weight.grad is None
    scaled = model.energy(VALUES, 2 * x).total.sum()  # an input that has been computed
    assert torch.autograd.grad(scaled, x)[0].abs().sum() > 0


def test_without_gradients_there_is_no_graph() -> None:
    model = torch2ebm.convert(mlp())
    with torch.no_grad():
        assert not model.energy(VALUES, X, parameters=True).total.requires_grad
    with torch.inference_mode():
        assert not model.energy(VALUES, X).total.requires_grad


def test_an_input_inside_of_a_transform_is_refused() -> None:
    model = torch2ebm.convert(mlp())
    with pytest.raises(UnsupportedError, match=r"torch\.autograd\.grad"):
        torch.func.grad(lambda x: model.energy(VALUES, x).total.sum())(X)


def test_nothing_is_left_behind() -> None:
    net = seeded(
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
        )
    )
    model = torch2ebm.convert(net)
    before, drawn = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    one = model.energy({"3": normal(5, 6)}, X, loss_fn=F.cross_entropy, target=LABELS)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    other = model.energy({"3": normal(5, 6)}, X, loss_fn=F.cross_entropy, target=LABELS)
    assert torch.equal(one.total, other.total)  # the same dropout mask: the generator stands where it stood


@pytest.mark.parametrize("full", [False, True])
def test_a_precision_that_learns_counts_and_is_left_alone(full: bool) -> None:
    net, precision = mlp(), torch2ebm.Precision(8, full=full, start=2.5).double()
    model = torch2ebm.convert(net)
    leaves = {name: value.clone().requires_grad_() for name, value in VALUES.items()}
    found = model.energy(leaves, X, precisions={"0": precision})
    assert torch.allclose(found.nodes["0"], 2.5 * half(VALUES["0"] - net[:2](X)))
    found.total.sum().backward()
    assert all(parameter.grad is None for parameter in precision.parameters())
    assert not model.energy(VALUES, X, precisions={"0": precision}).total.requires_grad
    with_parameters = model.energy(VALUES, X, precisions={"0": precision}, parameters=True)
    (gradient,) = torch.autograd.grad(with_parameters.total.sum(), precision.log)
    assert float(gradient.abs().sum()) > 0
    hessian = model.hessian(F.cross_entropy, (X, LABELS), precisions={"0": precision})
    before = hessian.matrix()
    with torch.no_grad():
        precision.log.add_(1.0)
    assert torch.equal(hessian.matrix(), before)


READY = {name: getattr(torch2ebm, name)() for name in ("Huber", "StudentT", "Bernoulli", "Poisson", "Categorical")}


@pytest.mark.parametrize("name", READY)
def test_ready_energies_have_the_gradient_that_they_tell_and_a_second_derivative(name: str) -> None:
    net, energy = mlp(), READY[name]
    model, target = torch2ebm.convert(net), {"energies": {"2": energy}}
    last = VALUES["2"].sigmoid().requires_grad_()
    terms = model.energy({"0": VALUES["0"], "2": last}, X, **target)
    (gradient,) = torch.autograd.grad(terms.total.sum(), last)
    prediction = terms.prediction["2"].detach()
    assert torch.allclose(gradient, energy.gradients(last.detach() - prediction, prediction)[0], atol=1e-10)
    at = {"0": VALUES["0"], "2": last.detach()}
    hessian = model.hessian(lambda out, _: out.square().sum(), (X, None), at=at, loss_reduction="sum", **target)
    written = torch.func.hessian(
        lambda value: model.energy({**at, "2": value}, X, loss_fn=lambda out: out.square().sum(1), **target).total.sum()
    )(at["2"])
    product = hessian.product({"2": torch.ones_like(last)})["2"]
    assert torch.allclose(product, written.sum((2, 3)), atol=1e-9)


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_keyword_arguments_and_a_dict_of_outputs() -> None:
    model = torch2ebm.convert(OwnLoss())
    batch = {"x": X, "labels": LABELS}
    found = model.energy({}, batch, loss_fn=lambda output: F.cross_entropy(output["logits"], LABELS, reduction="none"))
    assert torch.allclose(found.loss, F.cross_entropy(model.net(X), LABELS, reduction="none"))


# ---- bad input

BAD = {
    "an unknown node": ({"9": X}, {}, UnknownNameError, r"'9'.*name of a node"),
    "a value of another shape": ({"0": normal(5, 7)}, {}, ConfigurationError, r"\(5, 7\).*\(5, 8\)"),
    "a value of another batch": ({"0": normal(4, 8)}, {}, ConfigurationError, r"\(4, 8\)"),
    "no tensor": ({"0": 1.0}, {}, ConfigurationError, r"a float"),
    "whole numbers": ({"0": torch.ones(5, 8, dtype=torch.long)}, {}, ConfigurationError, r"int64"),
    "two tensors for one slot": ({"0": (VALUES["0"], VALUES["0"])}, {}, ConfigurationError, r"2 tensors"),
    "a precision of no node": ({}, {"precisions": {"9": 1.0}}, UnknownNameError, r"'9'"),
    "a negative precision": ({}, {"precisions": {"0": -1.0}}, ConfigurationError, r"above 0"),
    "a loss that joins samples": (
        {},
        {"loss_fn": lambda output: output.mean(0).square().sum()},
        ConfigurationError,
        r"a mean or a sum over samples",
    ),
    "a loss of another shape": ({}, {"loss_fn": lambda output: output}, ConfigurationError, r"\(5, 3\)"),
    "a loss that is no tensor": ({}, {"loss_fn": lambda output: 1.0}, ConfigurationError, r"a float"),
    "a loss without a target": ({}, {"target": LABELS}, ConfigurationError, r"loss_fn"),
    "an illegal beta": ({}, {"beta": float("nan")}, ConfigurationError, r"beta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    values, settings, error, words = BAD[case]
    with pytest.raises(error, match=words):
        torch2ebm.convert(mlp()).energy(values, X, **settings)


def test_a_value_without_a_leading_batch_dimension_is_named() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)))
    model, x = torch2ebm.convert(net, batch_dim=1), normal(7, 5, 4)
    with pytest.raises(BatchDimensionError, match="leading batch dimension of 5"):
        model.energy({"0": normal(7, 5, 6)}, x)
