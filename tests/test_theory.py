"""Closed forms of linear Gaussian networks: against autograd on the plain formula, and against relaxations."""

from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from helpers import attached
from torch import Tensor, nn

import torch2ebm
from torch2ebm import theory
from torch2ebm.errors import ConfigurationError, UnsupportedError

SIZES = {"x": 3, "side": 2, "a": 4, "b": 3, "y": 2}
PARENTS = {"a": ("x",), "b": ("a", "side"), "y": ("b", "x", "a")}  # two inputs, skips, several parents


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS = {
    name: {parent: normal(SIZES[name], SIZES[parent], seed=10 * i + j) for j, parent in enumerate(parents)}
    for i, (name, parents) in enumerate(PARENTS.items())
}
BIASES = {"a": normal(4, seed=100), "y": normal(2, seed=101)}
FULL = normal(2, 2, seed=102)
PRECISIONS = {"a": 2.5, "b": torch.tensor([0.5, 1.0, 3.0]).double(), "y": FULL @ FULL.T + torch.eye(2).double()}
PRIORS = {"x": (normal(3, seed=103), 0.7), "side": (0.0, torch.tensor([2.0, 0.4]).double())}
DATA = {name: normal(5, size, seed=200 + i) for i, (name, size) in enumerate(SIZES.items())}
SOME = torch.tensor([True, False, True])

PATTERNS: dict[str, tuple[tuple[str, ...], Mapping[str, Tensor]]] = {
    "training": (("x", "side", "y"), {}),
    "prediction": (("x", "side"), {}),
    "generation": (("y",), {}),
    "nothing clamped": ((), {}),
    "a hidden value": (("b", "side"), {}),
    "completion": (("x", "y"), {"x": SOME}),
    "a masked hidden value": (("b", "x"), {"b": SOME, "x": ~SOME}),
    "all": (tuple(SIZES), {}),
}


def explicit(values: Mapping[str, Tensor]) -> Tensor:
    """F of each sample, as it is written."""
    whole = torch.zeros(len(next(iter(values.values()))), dtype=torch.float64)
    for name, value in values.items():
        if name in PARENTS:
            predicted = sum(values[p] @ w.T for p, w in WEIGHTS[name].items()) + BIASES.get(name, 0.0)
            precision = torch.as_tensor(PRECISIONS.get(name, 1.0), dtype=torch.float64)
        else:
            mean, given = PRIORS[name]
            predicted, precision = torch.as_tensor(mean), torch.as_tensor(given, dtype=torch.float64)
        error = value - predicted
        weighted = error @ precision if precision.ndim == 2 else error * precision
        whole = whole + 0.5 * (weighted * error).sum(1)
    return whole


def of_free(clamped: tuple[str, ...], masks: Mapping[str, Tensor]):
    """F of one sample as a function of its free entries, node after node, and which these are."""
    free = torch.cat([~masks.get(n, torch.full((s,), n in clamped)) for n, s in SIZES.items()])

    def energy(entries: Tensor, sample: int = 0) -> Tensor:
        whole = torch.cat([DATA[name][sample] for name in SIZES])
        whole = whole.index_put((free.nonzero()[:, 0],), entries)
        parts = whole[None].split(list(SIZES.values()), 1)
        return explicit(dict(zip(SIZES, parts, strict=True)))[0]

    return energy, free


def network() -> theory.LinearGaussian:
    return theory.LinearGaussian(WEIGHTS, BIASES, PRECISIONS, PRIORS)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_of_clamped_values(pattern: str) -> None:
    """Newton's step on the plain formula is exact, since it is quadratic."""
    clamped, masks = PATTERNS[pattern]
    energy, free = of_free(clamped, masks)
    found = network().posterior({name: DATA[name] for name in clamped}, masks)
    size = int(free.sum())
    hessian = torch.zeros(0, 0).double()
    if size:
        hessian = torch.autograd.functional.hessian(energy, torch.zeros(size).double())
    assert torch.allclose(found.hessian, hessian, atol=1e-12)
    for sample in range(len(found.energy) if clamped else 0):
        at = torch.zeros(size).double().requires_grad_()
        (slope,) = torch.autograd.grad(energy(at, sample), at, materialize_grads=True, allow_unused=True)
        best = -torch.linalg.solve(hessian, slope)
        ours = torch.cat([found.mean[name][sample] for name in SIZES])
        assert torch.allclose(ours[free], best, atol=1e-10)
        assert torch.allclose(found.energy[sample], energy(best, sample), atol=1e-10)
    assert torch.allclose(explicit(found.mean), found.energy, atol=1e-10)
    if size:
        values = torch.linalg.eigvalsh(hessian)
        assert torch.allclose(found.spectrum, values, atol=1e-10)
        assert found.condition_number == pytest.approx(float(values[-1] / values[0]), rel=1e-9)
        assert torch.allclose(found.covariance @ hessian, torch.eye(size).double(), atol=1e-9)


def test_mean_and_covariance_are_those_of_the_gaussian_that_the_network_draws_from() -> None:
    """Conditioning the joint Gaussian by Schur's complement, its moments made forward, node by node."""
    chain = [normal(4, 3), normal(2, 4, seed=1)]
    biases = [normal(4, seed=2), normal(2, seed=3)]
    found = theory.LinearGaussian(chain, biases, {"0": 2.0}, prior=(0.5, 4.0)).posterior({"1": DATA["y"]})
    cov_x = torch.eye(3).double() / 4
    cov_0 = chain[0] @ cov_x @ chain[0].T + torch.eye(4).double() / 2
    cov_1 = chain[1] @ cov_0 @ chain[1].T + torch.eye(2).double()
    cross = cov_x @ chain[0].T @ chain[1].T
    mean = (0.5 * torch.ones(3).double() @ chain[0].T + biases[0]) @ chain[1].T + biases[1]
    gain = cross @ torch.linalg.inv(cov_1)
    assert torch.allclose(found.mean["input"], 0.5 + (DATA["y"] - mean) @ gain.T, atol=1e-12)
    assert torch.allclose(found.covariance_of("input"), cov_x - gain @ cross.T, atol=1e-12)
    other = cov_0 @ chain[1].T
    expected = cov_x @ chain[0].T - gain @ other.T
    assert torch.allclose(found.covariance_of("input", "0"), expected, atol=1e-12)
    assert torch.equal(found.covariance_of("1"), torch.zeros(2, 2).double())


def deep(*sizes: int, scale: float = 1.0) -> nn.Sequential:
    net = nn.Sequential(*[nn.Linear(m, n) for m, n in pairwise(sizes)]).double()
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=i) * scale / parameter.shape[-1] ** 0.5)
    return net


def half_squares(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum()


def settled(net: nn.Sequential, **settings: object) -> torch2ebm.EnergyModel:
    solver = torch2ebm.ErrorConjugateGradient(tol=1e-8, steps=500)
    return attached(net, torch2ebm.PredictiveCoding(solver=solver, loss_reduction="sum", **settings))


@pytest.mark.parametrize("precisions", [{}, {"0": 2.0, "1": torch.tensor([0.5, 1.0, 2.0, 4.0]).double()}])
def test_predictive_coding_rests_at_the_posterior_mean(precisions) -> None:
    net, x, y = deep(3, 5, 4, 2), normal(6, 3, seed=50), normal(6, 2, seed=51)
    model = settled(net, precisions=precisions)
    half_squares(model(x), y).backward()
    found = theory.LinearGaussian.of(net, precisions).posterior({"input": x, "2": y})
    for name in ("0", "1"):
        assert torch.allclose(model.state.value[name], found.mean[name], rtol=0, atol=1e-8)
        assert torch.allclose(model.state.error[name], found.error[name], rtol=0, atol=1e-8)
    weights = net[1].weight.grad  # dF/dW = -(Pi e) v^T, local to the layer
    precision = torch.as_tensor(precisions.get("1", 1.0), dtype=torch.float64)
    assert torch.allclose(weights, -(found.error["1"] * precision).T @ found.mean["0"], rtol=0, atol=1e-7)


def test_another_precision_is_another_posterior() -> None:
    """The negative twin."""
    net, x, y = deep(3, 5, 2), normal(6, 3, seed=50), normal(6, 2, seed=51)
    clamped = {"input": x, "1": y}
    one, other = (theory.LinearGaussian.of(net, {"0": p}).posterior(clamped).mean["0"] for p in (1.0, 1.5))
    assert float((one - other).norm()) > 1e-2 * float(one.norm())


def rescaled_loss(net: nn.Sequential, x: Tensor, y: Tensor) -> float:
    """1/2 r^T S^-1 r with S = I + sum over l >= 2 of W_L:l W_L:l^T (Innocenti et al. 2024)."""
    through = torch.eye(len(y.T)).double()
    covariance = through.clone()
    for layer in list(net)[:0:-1]:
        through = through @ layer.weight.detach()
        covariance = covariance + through @ through.T
    rest = y - net(x).detach()
    return float(0.5 * (rest @ torch.linalg.inv(covariance) * rest).sum())


def test_the_energy_at_rest_is_the_rescaled_loss_all_through_training() -> None:
    """JPC's figure for deep linear nets: theory against relaxation, along training by predictive coding."""
    net, x, y = deep(4, 6, 6, 6, 2), normal(16, 4, seed=60), normal(16, 2, seed=61)
    model = settled(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=2e-3)
    energies = []
    for _ in range(25):
        expected = rescaled_loss(net, x, y)
        found = theory.LinearGaussian.of(net).posterior({"input": x, "3": y})
        optimizer.zero_grad()
        half_squares(model(x), y).backward()
        assert float(found.energy.sum()) == pytest.approx(expected, rel=1e-12)
        assert model.state.relaxation.energy[-1] == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        energies.append(expected)
    assert energies[-1] < 0.7 * energies[0]  # it has learned on the way


def test_the_origin_is_a_strict_saddle_of_the_energy_at_rest_and_a_flat_one_of_the_loss() -> None:
    """Innocenti et al. 2024, of JPC's figures: with three layers the loss has no curvature at zero weights."""
    shapes, x, y = [(2, 2), (2, 2), (2, 2)], normal(8, 2, seed=70), normal(8, 2, seed=71)

    def layers(weights: Tensor) -> list[Tensor]:
        return [part.reshape(shape) for part, shape in zip(weights.split(4), shapes, strict=True)]

    def loss(weights: Tensor) -> Tensor:
        first, second, third = layers(weights)
        return 0.5 * (y - x @ first.T @ second.T @ third.T).square().sum()

    def energy(weights: Tensor) -> Tensor:
        return theory.LinearGaussian(layers(weights)).posterior({"input": x, "2": y}).energy.sum()

    origin = torch.zeros(12, dtype=torch.float64)
    of_loss, of_energy = (torch.autograd.functional.hessian(each, origin) for each in (loss, energy))
    assert float(of_loss.abs().max()) == 0.0
    # F* = 1/2 r^T (I + W3 W3^T + ...)^-1 r is -1/2 |W3^T y|^2 to second order
    assert float(torch.linalg.eigvalsh(of_energy)[0]) == pytest.approx(-float(torch.linalg.eigvalsh(y.T @ y)[-1]))


def test_of_a_module_is_that_of_its_matrices() -> None:
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Identity(), nn.Sequential(nn.Linear(4, 2))).double()
    of_module = theory.LinearGaussian.of(net)
    assert list(of_module.sizes) == ["input", "0", "2.0"]
    written = theory.LinearGaussian([net[0].weight, net[2][0].weight], [None, net[2][0].bias])
    assert torch.equal(of_module.precision, written.precision)
    x = normal(5, 3)
    predicted = of_module.posterior({"input": x})
    assert torch.allclose(predicted.mean["2.0"], net(x).detach(), atol=1e-12)
    assert float(predicted.energy.max()) < 1e-24
    assert list(theory.LinearGaussian.of(nn.Linear(3, 2)).sizes) == ["input", "(all)"]


def test_single_precision_is_computed_in_double() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert theory.LinearGaussian.of(net).posterior({"input": torch.ones(3)}).mean["1"].dtype == torch.float64


@pytest.mark.parametrize("layer", [nn.Tanh(), nn.Dropout(), nn.Conv1d(1, 1, 1), nn.LayerNorm(4)])
def test_a_layer_that_is_not_linear_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match=rf"'1': got {type(layer).__name__}"):
        theory.LinearGaussian.of(nn.Sequential(nn.Linear(4, 4), layer))


def test_a_free_input_without_a_prior_is_refused_where_nothing_holds_it() -> None:
    wide = theory.LinearGaussian([normal(2, 3)])  # three latents, two numbers of data
    with pytest.raises(ConfigurationError, match=r"'input'.*1 directions.*give it a prior"):
        wide.posterior({"0": DATA["y"]})
    with pytest.raises(ConfigurationError, match="flat"):
        wide.posterior({})
    held = theory.LinearGaussian([normal(3, 2)]).posterior({"0": DATA["x"]})  # data hold two latents: least squares
    assert torch.allclose(held.mean["input"], torch.linalg.lstsq(normal(3, 2), DATA["x"].T).solution.T, atol=1e-10)


X = torch.zeros(5, 3)
WRONG = {
    "no weights": lambda: theory.LinearGaussian([]),
    "layers that do not fit": lambda: theory.LinearGaussian([normal(4, 3), normal(2, 5)]),
    "no matrix": lambda: theory.LinearGaussian([normal(4)]),
    "a parent that comes later": lambda: theory.LinearGaussian({"a": {"b": normal(2, 2)}, "b": {"x": normal(2, 3)}}),
    "its own parent": lambda: theory.LinearGaussian({"a": {"a": normal(2, 2)}}),
    "too few biases": lambda: theory.LinearGaussian([normal(4, 3), normal(2, 4)], [None]),
    "a bias of another size": lambda: theory.LinearGaussian([normal(4, 3)], [normal(3)]),
    "a bias of no node": lambda: theory.LinearGaussian([normal(4, 3)], {"7": normal(4)}),
    "a negative precision": lambda: theory.LinearGaussian([normal(4, 3)], precisions={"0": -1.0}),
    "a precision of no node": lambda: theory.LinearGaussian([normal(4, 3)], precisions={"input": 1.0}),
    "a crooked precision": lambda: theory.LinearGaussian([normal(4, 3)], precisions={"0": normal(4, 4)}),
    "one prior for two inputs": lambda: theory.LinearGaussian(WEIGHTS, prior=(0.0, 1.0)),
    "a prior of no input": lambda: theory.LinearGaussian(WEIGHTS, prior={"a": (0.0, 1.0)}),
    "an unknown clamp": lambda: network().posterior({"z": X}),
    "a clamp of another size": lambda: network().posterior({"x": torch.zeros(5, 4)}),
    "clamps of two batches": lambda: network().posterior({"x": X, "y": torch.zeros(4, 2)}),
    "a mask of another shape": lambda: network().posterior({"x": X}, {"x": torch.ones(4, dtype=torch.bool)}),
    "a mask of numbers": lambda: network().posterior({"x": X}, {"x": torch.ones(3)}),
    "a mask of nothing": lambda: network().posterior({"x": X}, {"y": torch.ones(2, dtype=torch.bool)}),
    "the covariance of no node": lambda: network().posterior({"x": X}).covariance_of("z"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_named(case: str) -> None:
    with pytest.raises(ConfigurationError, match=r"got .*; expected "):
        WRONG[case]()
