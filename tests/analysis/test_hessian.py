"""``model.hessian``: against the Hessian of F as it is written, by autograd over the whole of it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import attached
from oracles.energy import EnergyProblem
from oracles.graphs import SkipDag, cross_entropy, half_squared_error, skip_dag
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ConfigurationError, LossNotRecordedError, NonFiniteError, NotSettledWarning

NAMES = [vertex.name for vertex in skip_dag().vertices]
PRECISIONS = {"first": 2.5, "gated": 0.4, "third": torch.linspace(0.5, 2.0, 6, dtype=torch.float64)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


def together(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in named.values()])


def written_out(problem: EnergyProblem, at: dict[str, Tensor], coordinates: str) -> Tensor:
    """All second derivatives of F, at some values."""
    sizes, shapes = [v.numel() for v in at.values()], [v.shape for v in at.values()]

    def named(entries: Tensor) -> dict[str, Tensor]:
        parts = zip(at, entries.split(sizes), shapes, strict=True)
        return {name: part.reshape(shape) for name, part, shape in parts}

    if coordinates == "values":
        return torch.autograd.functional.hessian(lambda e: problem.of_values(named(e)), together(at))
    predicted = problem.predictions(at)
    errors = {name: value - predicted[name] for name, value in at.items()}
    return torch.autograd.functional.hessian(lambda e: problem.of_errors(named(e)), together(errors))


def elsewhere(problem: EnergyProblem) -> dict[str, Tensor]:
    start = problem.feedforward()
    return {name: value + 0.5 * normal(*value.shape, seed=i) for i, (name, value) in enumerate(start.items())}


def dag_model() -> torch2ebm.EnergyModel:
    return torch2ebm.convert(SkipDag(), nodes=NAMES)


# ---- against the matrix


@pytest.mark.parametrize("coordinates", ["values", "errors"])
@pytest.mark.parametrize("loss", [half_squared_error, cross_entropy])
@pytest.mark.parametrize("where", ["feed-forward", "elsewhere"])
def test_on_a_dag_with_precisions_and_shared_weights(coordinates: str, loss, where: str) -> None:
    problem = EnergyProblem(skip_dag(), loss, beta=0.7, precisions=PRECISIONS, categorical=("second",))
    at = problem.feedforward() if where == "feed-forward" else elsewhere(problem)
    expected = written_out(problem, at, coordinates)
    found = dag_model().hessian(
        lambda output, _: loss(output),
        (problem.dag.inputs["x"], None),
        at=None if where == "feed-forward" else at,
        coordinates=coordinates,
        beta=0.7,
        precisions=PRECISIONS,
        energies={"second": torch2ebm.Categorical()},
        loss_reduction="sum",
    )
    assert list(found.at) == list(at)
    assert all(torch.allclose(found.at[name], at[name], atol=1e-12) for name in at)
    assert torch.allclose(found.matrix(), expected, atol=1e-9)
    eigenvalues = torch.linalg.eigvalsh(expected)
    size = float(eigenvalues.abs().max())
    assert found.largest == pytest.approx(float(eigenvalues[-1]), abs=1e-6 * size)
    assert found.smallest == pytest.approx(float(eigenvalues[0]), abs=1e-6 * size)
    assert torch.allclose(found.spectrum(5), eigenvalues.flip(0)[:5], atol=1e-6 * size)
    assert torch.allclose(found.spectrum(5, "smallest"), eigenvalues[:5], atol=1e-6 * size)
    direction = {name: normal(*value.shape, seed=9) for name, value in at.items()}
    product = together(found.product(direction))
    assert torch.allclose(product, expected @ together(direction), atol=1e-9)
    assert found.samples == len(problem.dag.inputs["x"])


def test_second_derivatives_of_nodes_count_where_errors_are_not_zero() -> None:
    """The negative twin: at the feed-forward pass the matrix is another one."""
    problem = EnergyProblem(skip_dag(), half_squared_error)
    here, there = (written_out(problem, at, "values") for at in (problem.feedforward(), elsewhere(problem)))
    assert float((here - there).norm()) > 0.05 * float(here.norm())


def mlp() -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))


X, LABELS = normal(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def energy_of(net: nn.Sequential, first: Tensor, second: Tensor) -> Tensor:
    own = 0.5 * (first - net[:2](X)).square().sum() + 0.5 * (second - net[2:4](first)).square().sum()
    return own + F.cross_entropy(net[4](second), LABELS, reduction="sum")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_at_the_equilibrium(reduction: str) -> None:
    net = mlp()
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    solver = torch2ebm.ErrorConjugateGradient(tol=1e-9, steps=500)
    model = attached(net, torch2ebm.PredictiveCoding(solver=solver, loss_reduction=reduction))
    loss_fn(model(X), LABELS).backward()
    values = [model.state.value[name] for name in ("0", "2")]
    found = model.hessian(loss_fn, (X, LABELS), at="equilibrium", loss_reduction=reduction)
    assert torch.allclose(found.at["0"], values[0], atol=1e-6)
    blocks = torch.func.hessian(lambda a, b: energy_of(net, a, b), argnums=(0, 1))(*values)
    rows = [torch.cat([part.reshape(n, -1) for part in row], 1) for n, row in zip((30, 24), blocks, strict=True)]
    eigenvalues = torch.linalg.eigvalsh(torch.cat(rows).detach())
    assert found.largest == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    assert found.smallest == pytest.approx(float(eigenvalues[0]), rel=1e-6)
    assert found.condition_number == pytest.approx(float(eigenvalues[-1] / eigenvalues[0]), rel=1e-6)
    assert found.bounds[0] <= 1e-8 * found.largest


def test_a_solver_that_does_not_come_to_rest_is_told_of() -> None:
    short = torch2ebm.GradientDescent(steps=1, lr=0.1, tol=1e-9)
    with pytest.warns(NotSettledWarning, match="more steps"):
        torch2ebm.convert(mlp()).hessian(F.cross_entropy, (X, LABELS), at="equilibrium", solver=short)


def test_a_saddle_has_a_negative_eigenvalue_and_no_condition_number() -> None:
    """F = 1/2 (v - w x)^2 - v^2 has the second derivative 1 - 2."""
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5, bias=False)))
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(5))
    found = torch2ebm.convert(net).hessian(lambda out, _: -out.square().sum(), (X, None), loss_reduction="sum")
    assert found.smallest == pytest.approx(-1.0) and found.largest == pytest.approx(-1.0)
    assert found.condition_number == float("inf")


def test_a_batch_norm_makes_one_block_of_all_samples() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3)))
    model = torch2ebm.convert(net, nodes=["0", "1", "3"], example_inputs=X)
    at = {"0": normal(6, 3, seed=1), "1": normal(6, 3, seed=2)}
    found = model.hessian(F.cross_entropy, (X, LABELS), at=at)

    def written(first: Tensor, second: Tensor) -> Tensor:
        normed = F.batch_norm(first, None, None, net[1].weight, net[1].bias, training=True)
        last = F.cross_entropy(net[3](second.tanh()), LABELS, reduction="sum")
        own = 0.5 * (first - net[0](X)).square().sum() + 0.5 * (second - normed).square().sum()
        return own + last

    blocks = torch.autograd.functional.hessian(written, tuple(at.values()))
    expected = torch.cat([torch.cat([part.reshape(18, 18) for part in row], 1) for row in blocks])
    assert found.samples == 1
    assert torch.allclose(found.matrix(), expected, atol=1e-9)
    assert found.largest == pytest.approx(float(torch.linalg.eigvalsh(expected)[-1]), rel=1e-6)


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class Wave(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OnceOnly.apply(x)


def test_a_function_that_is_differentiable_once_is_differentiated_by_differences() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 5), Wave(), nn.Linear(5, 3)))
    value = normal(6, 5, seed=1)
    model = torch2ebm.convert(net, nodes=["0", "1", "2"])
    found = model.hessian(F.cross_entropy, (X, LABELS), at={"0": value, "1": value})

    def written(first: Tensor, second: Tensor) -> Tensor:
        last = F.cross_entropy(net[2](second), LABELS, reduction="sum")
        return 0.5 * (first - net[0](X)).square().sum() + 0.5 * (second - first.sin()).square().sum() + last

    blocks = torch.autograd.functional.hessian(written, (value, value))
    expected = torch.cat([torch.cat([part.reshape(30, 30) for part in row], 1) for row in blocks])
    assert torch.allclose(found.matrix(), expected, atol=1e-7)


def test_nodes_of_several_slots() -> None:
    class Two(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            left, right = super().forward(x).chunk(2, -1)
            return left, right

    class Chunked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two, self.last = Two(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.two(x)
            return self.last(left * right)

    net = seeded(Chunked)
    model = torch2ebm.convert(net, nodes=["two", "last"], example_inputs=X)
    start = model.energy({}, X).value
    name, parts = next((n, v) for n, v in start.items() if isinstance(v, tuple))
    found = model.hessian(F.cross_entropy, (X, LABELS))
    product = found.product({name: (torch.ones_like(parts[0]), None)})[name]
    assert isinstance(product, tuple) and product[1].shape == parts[1].shape

    def written(left: Tensor, right: Tensor) -> Tensor:
        last = F.cross_entropy(net.last(left * right), LABELS, reduction="sum")
        return 0.5 * sum((v - p).square().sum() for v, p in zip((left, right), parts, strict=True)) + last

    blocks = torch.autograd.functional.hessian(written, parts)
    assert torch.allclose(product[0], blocks[0][0].sum((2, 3)), atol=1e-10)
    assert torch.allclose(product[1], blocks[1][0].sum((2, 3)), atol=1e-10)


def test_it_stays_when_weights_and_the_batch_move() -> None:
    net, x = mlp(), X.clone()
    found = torch2ebm.convert(net).hessian(F.cross_entropy, (x, LABELS))
    before, largest = found.matrix(), found.largest
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
        x.mul_(2)
    assert torch.equal(found.matrix(), before) and found.largest == largest
    other = torch2ebm.convert(net).hessian(F.cross_entropy, (x, LABELS))
    assert not torch.allclose(other.matrix(), before, atol=0.1)


def test_nothing_is_left_behind() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)))
    before, drawn = {n: t.clone() for n, t in net.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():
        found = torch2ebm.convert(net).hessian(F.cross_entropy, (X, LABELS))
    assert found.largest > 0
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_net_without_hidden_values_has_an_empty_one() -> None:
    found = torch2ebm.convert(seeded(lambda: nn.Linear(4, 3))).hessian(F.cross_entropy, (X, LABELS))
    assert found.size == 0 and found.largest == 0.0 and found.product({}) == {}


def test_lanczos_on_a_matrix_that_is_too_wide_for_all_products() -> None:
    """A spectrum of 400 entries whose ends are apart is known at its ends after few products."""
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 3)))
    found = torch2ebm.convert(net).hessian(F.cross_entropy, (X[:1], LABELS[:1]), products=120, tol=1e-7)
    eigenvalues = torch.linalg.eigvalsh(found.matrix())
    assert found.largest == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    assert abs(found.largest - float(eigenvalues[-1])) <= max(found.bounds[0], 1e-9)


# ---- bad input

BAD = {
    "other coordinates": ({"coordinates": "weights"}, ConfigurationError, "coordinates"),
    "another word": ({"at": "rest"}, ConfigurationError, "equilibrium"),
    "an unknown node": ({"at": {"9": X}}, ConfigurationError, "9"),
    "the output, whose energy is the loss": ({"at": {"4": normal(6, 3)}}, ConfigurationError, "mode O1"),
    "a value of another shape": ({"at": {"0": normal(6, 7)}}, ConfigurationError, r"\(6, 7\).*\(6, 5\)"),
    "an illegal beta": ({"beta": float("inf")}, ConfigurationError, "beta"),
    "no products": ({"products": 0}, ConfigurationError, "products"),
    "another reduction": ({"loss_reduction": "none"}, ConfigurationError, "loss_reduction"),
    "weights that are not finite": ({"at": {"0": normal(6, 5) / 0}}, NonFiniteError, "not finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    settings, error, words = BAD[case]
    with pytest.raises(error, match=words):
        torch2ebm.convert(mlp()).hessian(F.cross_entropy, (X, LABELS), **settings).largest  # noqa: B018


def test_a_batch_or_a_loss_of_another_form_is_named() -> None:
    model = torch2ebm.convert(mlp())
    with pytest.raises(ConfigurationError, match=r"\(inputs, target\)"):
        model.hessian(F.cross_entropy, X)
    with pytest.raises(LossNotRecordedError, match="Reduce the loss"):
        model.hessian(nn.CrossEntropyLoss(reduction="none"), (X, LABELS))


def test_illegal_requests_of_the_result_are_named() -> None:
    found = torch2ebm.convert(mlp()).hessian(F.cross_entropy, (X, LABELS))
    for ask in (lambda: found.spectrum(0), lambda: found.spectrum(2, "middle"), lambda: found.product({"4": X})):
        with pytest.raises(ConfigurationError, match="got"):
            ask()
