"""Precisions that learn in the user's optimizer, against autograd on the energy written out in plain torch."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch2ebm
from torch2ebm import IncrementalPredictiveCoding, OneSided, Precision, PredictiveCoding, Symmetric
from torch2ebm.engine.energies import precision_now
from torch2ebm.errors import ConfigurationError
from torch2ebm.programs.program import Program

STRONG = {"solver": torch2ebm.ErrorConjugateGradient(tol=1e-6), "nudging": OneSided(1.0)}


def net_of(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [[nn.Linear(a, b), nn.Tanh()] for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[part for pair in layers for part in pair][:-1]).double()


def batch(rows: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(rows, 3, generator=generator, dtype=torch.float64)


def precision_like(kind: str, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    if kind == "a parameter":
        return nn.Parameter(0.5 + torch.rand(5, generator=generator, dtype=torch.float64))
    made = {"scalar": Precision(), "diagonal": Precision(5), "full": Precision(5, full=True)}[kind].double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def parameters_of(precision: Any) -> list[Tensor]:
    return list(precision.parameters()) if isinstance(precision, nn.Module) else [precision]


def written_out(precision: Any, error: Tensor) -> Tensor:
    """1/2 e^T P e - 1/2 log det P, summed over samples, with P as torch has it."""
    if isinstance(precision, Precision) and precision.below is not None:
        factor = precision.below.tril(-1) + torch.diag(precision.log.exp())
        matrix = factor @ factor.T
        return 0.5 * torch.einsum("bi,ij,bj->", error, matrix, error) - 0.5 * len(error) * torch.logdet(matrix)
    pi = precision.log.exp() if isinstance(precision, Precision) else precision
    return (0.5 * pi * error**2 - 0.5 * torch.log(pi * torch.ones_like(error))).sum()


def trained_once(algorithm: Any, precision: Any, seed: int = 0, loss: Any = F.mse_loss) -> tuple[nn.Module, Any]:
    net = net_of(4, 5, 5, 3, seed=seed)
    model = torch2ebm.convert(net)
    sgd = torch.optim.SGD([*net.parameters(), *parameters_of(precision)], lr=0.1)
    optimizer = torch2ebm.EnergyOptimizer(sgd, model, algorithm)
    x, y = batch()
    loss(model(x), y).backward()
    return model, optimizer


def energy_at(model: Any, precision: Any) -> Tensor:
    return written_out(precision, model.state.error["2"].detach())


KINDS = ["scalar", "diagonal", "full", "a parameter"]
SOLVERS = {
    "conjugate": STRONG,
    "values": {"steps": 7, "lr": 0.2, "nudging": OneSided(0.7)},
    "errors": {"solver": torch2ebm.ErrorDescent(5, 0.1), "nudging": OneSided(2.0)},
    "programs": {"steps": 7, "lr": 0.2, "compile": True},
    "conjugate by programs": {**STRONG, "compile": True},
}


PAIRS = [
    *((kind, solver) for kind in KINDS for solver in ("conjugate", "values")),
    ("full", "errors"),
    ("scalar", "programs"),
    ("a parameter", "programs"),
    ("full", "conjugate by programs"),
]


@pytest.mark.parametrize(("kind", "solver"), PAIRS)
def test_the_gradient_is_that_of_the_energy_written_out(
    kind: str, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Program, "compile", lambda self: None)  # a program as it was recorded
    precision, settings = precision_like(kind), SOLVERS[solver]
    algorithm = PredictiveCoding(precisions={"2": precision}, **settings)
    model, optimizer = trained_once(algorithm, precision)
    beta = settings.get("nudging", OneSided(1.0)).beta  # type: ignore[attr-defined]
    # .grad of every parameter is dF/dtheta over the batch's size and the nudge, for a loss that is a mean
    expected = torch.autograd.grad(energy_at(model, precision) / (6 * beta), parameters_of(precision))
    for parameter, gradient in zip(parameters_of(precision), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)
    # a second batch: nothing of the first precision stays in a program
    optimizer.step()
    optimizer.zero_grad()
    x, y = batch(seed=5)
    F.mse_loss(model(x), y).backward()
    expected = torch.autograd.grad(energy_at(model, precision) / (6 * beta), parameters_of(precision))
    for parameter, gradient in zip(parameters_of(precision), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_relaxation_is_that_with_the_same_precision_held_fixed(kind: str) -> None:
    precision = precision_like(kind)
    model, _ = trained_once(PredictiveCoding(precisions={"2": precision}, **STRONG), precision)
    relaxed = model.state.error["2"]
    assert model.state.relaxation.converged
    net = net_of(4, 5, 5, 3)
    x, y = batch()
    first, second, last = net[0], net[2], net[4]
    at = [model.state.value[name].clone().requires_grad_() for name in ("0", "2")]
    pi = precision() if isinstance(precision, Precision) else precision
    matrix = (pi if pi.ndim == 2 else torch.diag(pi * torch.ones(5).double())).detach()
    error = at[1] - second(at[0]).tanh()
    energy = 0.5 * ((at[0] - first(x).tanh()) ** 2).sum() + 0.5 * torch.einsum("bi,ij,bj->", error, matrix, error)
    energy = energy + 6 * F.mse_loss(last(at[1]), y)
    slopes = torch.autograd.grad(energy, at)
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-5 * float(relaxed.abs().max())
    # what is shown is without the logarithm
    shown = model.state.energy["2"].sum()
    torch.testing.assert_close(shown, 0.5 * torch.einsum("bi,ij,bj->", relaxed, matrix, relaxed), rtol=1e-9, atol=0)


def test_two_nodes_with_one_precision_give_it_the_sum() -> None:
    shared = torch2ebm.Gaussian(precision_like("diagonal"))
    algorithm = PredictiveCoding(energies={"0": shared, "2": shared}, **STRONG)
    model, _ = trained_once(algorithm, shared.precision)
    total = sum(written_out(shared.precision, model.state.error[name]) for name in ("0", "2"))
    (expected,) = torch.autograd.grad(total / 6, [shared.precision.log])
    torch.testing.assert_close(shared.precision.log.grad, expected, rtol=1e-10, atol=1e-12)


def test_a_node_that_no_error_has_reached_learns_that_its_error_is_zero() -> None:
    precision = precision_like("diagonal")
    model, _ = trained_once(PredictiveCoding(precisions={"0": precision}, steps=1, lr=0.1), precision)
    assert model.state.unreached == ("0",)
    torch.testing.assert_close(precision.log.grad, torch.full((5,), -0.5).double())  # of each of 6 samples, over 6


def test_in_the_mean_of_two_mirrored_phases_the_logarithm_cancels() -> None:
    precision, beta = precision_like("diagonal"), 1e-3
    algorithm = PredictiveCoding(
        precisions={"2": precision}, solver=torch2ebm.ErrorConjugateGradient(tol=1e-9), nudging=Symmetric(beta)
    )
    trained_once(algorithm, precision)
    logarithm = torch.full((5,), -0.5 / beta).double()  # what one phase alone has of it
    assert float(precision.log.grad.abs().max()) < 1e-2 * float(logarithm.abs().max())


def test_a_sum_over_the_batch_is_taken_as_it_is_written() -> None:
    precision = precision_like("scalar")
    algorithm = PredictiveCoding(precisions={"2": precision}, loss_reduction="sum", **STRONG)
    model, _ = trained_once(algorithm, precision, loss=lambda output, y: F.mse_loss(output, y, reduction="sum"))
    (expected,) = torch.autograd.grad(energy_at(model, precision), [precision.log])
    torch.testing.assert_close(precision.log.grad, expected, rtol=1e-10, atol=1e-12)


def test_gradients_of_several_backwards_add_up() -> None:
    precision = precision_like("full")
    model, optimizer = trained_once(PredictiveCoding(precisions={"2": precision}, **STRONG), precision)
    first = [parameter.grad.clone() for parameter in precision.parameters()]
    x, y = batch()
    F.mse_loss(model(x), y).backward()
    for parameter, once in zip(precision.parameters(), first, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * once)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in precision.parameters())


def test_a_precision_is_learned_up_to_its_closed_form() -> None:
    """pi = n / sum |e|^2: with weights that stand still, at the fixed point of relaxing and learning."""
    net = net_of(4, 5, 3, seed=2)
    x, y = batch(40)
    y = 4 * y  # far from what the net says: errors stay long
    precision = Precision(start=0.3).double()
    model = torch2ebm.convert(net)
    adam = torch.optim.Adam([{"params": precision.parameters(), "lr": 0.1}, {"params": net.parameters(), "lr": 0.0}])
    coding = PredictiveCoding(precisions={"0": precision}, loss_reduction="sum", **STRONG)
    optimizer = torch2ebm.EnergyOptimizer(adam, model, coding)
    for _ in range(120):
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().sum()).backward()
        optimizer.step()
    errors = model.state.error["0"]
    closed = errors.numel() / float(errors.square().sum())
    assert abs(precision().item() / closed - 1) < 1e-3
    assert abs(math.log(precision().item() / 0.3)) > 0.1  # it has gone somewhere


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_precisions_move_together_where_weights_move_with_the_values(kind: str) -> None:
    """Every inner step of the algorithm has the gradient of its own moment: one step of SGD for each."""
    precision = precision_like(kind)
    before = [parameter.detach().clone() for parameter in parameters_of(precision)]
    twin = copy.deepcopy(precision)
    _model, optimizer = trained_once(IncrementalPredictiveCoding(3, 0.3, precisions={"2": precision}), precision)
    optimizer.step()
    # written out: the same net, its values and precision in plain torch
    net = net_of(4, 5, 5, 3)
    x, y = batch()
    values = [net[:2](x).detach(), net[:4](x).detach()]
    for _ in range(3):
        leaves = [value.requires_grad_() for value in values]
        error = leaves[1] - net[2:4](leaves[0])
        energy = 0.5 * ((leaves[0] - net[:2](x)) ** 2).sum() + written_out(twin, error)
        energy = energy + 6 * F.mse_loss(net[4](leaves[1]), y)
        moving = [*net.parameters(), *parameters_of(twin)]
        slopes = torch.autograd.grad(energy, [*leaves, *moving])
        with torch.no_grad():
            values = [value - 0.3 * slope for value, slope in zip(leaves, slopes[:2], strict=True)]
            for parameter, slope in zip(moving, slopes[2:], strict=True):
                parameter -= 0.1 * slope / 6
    for now, expected, start in zip(parameters_of(precision), parameters_of(twin), before, strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-9, atol=1e-12)
        assert not torch.equal(now, start)


# what the optimizer does with it


def test_a_checkpoint_brings_precisions_moments_and_steps_back() -> None:
    def made() -> tuple[Any, Any, Any]:
        net, precision = net_of(4, 5, 5, 3), precision_like("full")
        model = torch2ebm.convert(net)
        adam = torch.optim.Adam([*net.parameters(), *precision.parameters()], lr=0.05)
        coding = PredictiveCoding(precisions={"2": precision}, **STRONG)
        return model, precision, torch2ebm.EnergyOptimizer(adam, model, coding)

    def step(model: Any, optimizer: Any, seed: int) -> None:
        x, y = batch(seed=seed)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()

    model, precision, optimizer = made()
    for seed in range(3):
        step(model, optimizer, seed)
    saved = io.BytesIO()
    torch.save([model.state_dict(), precision.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    other, its_precision, its_optimizer = made()
    states = torch.load(saved, weights_only=True)
    for part, state in zip((other, its_precision, its_optimizer), states, strict=True):
        part.load_state_dict(state)
    step(model, optimizer, 7)
    step(other, its_optimizer, 7)
    for one, two in zip(precision.parameters(), its_precision.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_state_of_a_backward_stays_as_it_was_while_the_precision_learns_on() -> None:
    precision = precision_like("diagonal")
    model, optimizer = trained_once(PredictiveCoding(precisions={"2": precision}, **STRONG), precision)
    state = model.state
    before = state.energy["2"].clone()
    assert not before.requires_grad
    optimizer.step()
    assert torch.equal(state.energy["2"], before)


def test_a_scaler_that_overflows_skips_precisions_too() -> None:
    precision = precision_like("diagonal").float()
    net = net_of(4, 5, 5, 3).float()
    model = torch2ebm.convert(net)
    sgd = torch.optim.SGD([*net.parameters(), *precision.parameters()], lr=0.1)
    optimizer = torch2ebm.EnergyOptimizer(sgd, model, PredictiveCoding(precisions={"2": precision}, **STRONG))
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    x, y = (each.float() for each in batch())
    before = [parameter.detach().clone() for parameter in [*net.parameters(), *precision.parameters()]]
    scaler.scale(1e6 * F.mse_loss(model(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    for now, then in zip([*net.parameters(), *precision.parameters()], before, strict=True):
        assert torch.equal(now, then)


def test_an_optimizer_of_its_own_may_step_the_precisions() -> None:
    net, precision = net_of(4, 5, 5, 3), precision_like("scalar")
    model = torch2ebm.convert(net)
    algorithm = PredictiveCoding(precisions={"2": precision}, **STRONG)
    weights = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
    precisions = torch2ebm.EnergyOptimizer(torch.optim.SGD(precision.parameters(), lr=0.1), model, algorithm)
    x, y = batch()
    F.mse_loss(model(x), y).backward()
    before = precision.log.item()
    weights.step()
    assert precision.log.item() == before
    precisions.step()
    assert precision.log.item() != before


def test_a_parameter_of_a_functions_module_learns_with_its_logarithm() -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

        def forward(self, error: Tensor) -> Tensor:
            return 0.5 * self.log.exp() * error**2 - 0.5 * self.log

    phi = Tempered()
    algorithm = PredictiveCoding(energies={"2": torch2ebm.FunctionEnergy(phi, of_error=True)}, **STRONG)
    model, _ = trained_once(algorithm, phi)
    (expected,) = torch.autograd.grad(phi(model.state.error["2"]).sum() / 6, [phi.log])
    torch.testing.assert_close(phi.log.grad, expected, rtol=1e-10, atol=1e-12)
    # the constant moves no value, and is in no energy that is shown
    torch.testing.assert_close(
        model.state.energy["2"].sum(), (0.5 * phi.log.exp() * model.state.error["2"] ** 2).sum().detach()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_the_algebra_of_a_precision_is_in_single_precision(kind: str) -> None:
    precision = precision_like(kind)
    precision = precision.float() if isinstance(precision, Precision) else nn.Parameter(precision.detach().float())
    net = net_of(4, 5, 5, 3).float()
    model = torch2ebm.convert(net)
    sgd = torch.optim.SGD([*net.parameters(), *parameters_of(precision)], lr=0.1)
    keep = torch2ebm.EnergyOptimizer(sgd, model, PredictiveCoding(5, 0.1, precisions={"2": precision}))
    x, y = (each.float() for each in batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.mse_loss(model(x).float(), y)
    loss.backward()
    assert keep.model is model
    error = model.state.error["2"]
    expected = torch.autograd.grad(written_out(precision, error) / 6, parameters_of(precision))
    for parameter, gradient in zip(parameters_of(precision), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    energy = written_out(precision, error) - written_out(precision, torch.zeros_like(error))
    torch.testing.assert_close(model.state.energy["2"].sum(), energy.detach(), rtol=1e-4, atol=1e-7)
    matrix = precision_now(precision)
    if matrix.ndim == 2:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pulled = torch2ebm.Gaussian(precision).gradients(error, error)[0].detach()
        torch.testing.assert_close(pulled, (error.double() @ matrix.double()).float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_model_and_optimizer_learns_a_precision_of_its_own(kind: str, copied: Any) -> None:
    precision = precision_like(kind)
    _, optimizer = trained_once(PredictiveCoding(precisions={"2": precision}, **STRONG), precision)
    optimizer.zero_grad()
    other = copied(optimizer)
    x, y = batch()
    F.mse_loss(other.model(x), y).backward()
    theirs = parameters_of(other.algorithm.energies["2"].precision)
    known = {id(parameter) for group in other.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in theirs} <= known
    assert all(parameter.grad is not None for parameter in theirs)
    assert all(parameter.grad is None for parameter in parameters_of(precision))


def test_a_comparison_leaves_no_gradient_in_a_precision() -> None:
    precision, net = precision_like("diagonal"), net_of(4, 5, 5, 3)
    x, y = batch()
    algorithm = PredictiveCoding(precisions={"2": precision}, **STRONG)
    torch2ebm.compare(net, F.mse_loss, (x, y), algorithms=[algorithm])
    assert precision.log.grad is None


def test_the_steepness_counts_a_full_matrix() -> None:
    """lr="auto" is below 2 over the largest eigenvalue of the matrix, with which a larger one would run away."""
    precision = Precision(5, full=True, start=50.0).double()
    model, _ = trained_once(PredictiveCoding(20, "auto", precisions={"2": precision}), precision)
    relaxation = model.state.relaxation
    assert relaxation.lr < 2 / 50
    assert all(after <= before for before, after in itertools.pairwise(relaxation.energy))


# what is refused


def test_a_weight_that_was_computed_once_from_a_parameter_is_refused() -> None:
    class Weighted(torch2ebm.Energy):
        def __init__(self, weight: Tensor) -> None:
            self.weight = weight

        def of_samples(self, error: Tensor, prediction: Tensor) -> Tensor:
            return (self.weight * error**2).flatten(1).sum(1)

        def of_batch(self, error: Tensor, prediction: Tensor) -> Tensor:
            return (self.weight * error**2).sum()

        def gradients(self, error: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * self.weight * error, 2 * self.weight * error

    log = nn.Parameter(torch.zeros(5).double())
    with pytest.raises(ConfigurationError, match="node '2', its weight"):
        trained_once(PredictiveCoding(energies={"2": Weighted(log.exp())}, **STRONG), log)
    leaf = Weighted(nn.Parameter(torch.full((5,), 2.0).double()))
    model, _ = trained_once(PredictiveCoding(energies={"2": leaf}, **STRONG), leaf.weight)
    torch.testing.assert_close(leaf.weight.grad, model.state.error["2"].square().sum(0) / 6, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("precision", [Precision(4), Precision(4, full=True), nn.Parameter(torch.ones(7, 1, 5))])
def test_a_precision_of_another_shape_than_its_node_is_named(precision: Any) -> None:
    algorithm = PredictiveCoding(precisions={"2": precision}, **STRONG)
    with pytest.raises(ConfigurationError, match="energy of node '2', its precision"):
        trained_once(algorithm, precision)


@pytest.mark.parametrize("algorithm", [PredictiveCoding, IncrementalPredictiveCoding])
@pytest.mark.parametrize("number", [-0.3, 0.0, math.nan, math.inf])
def test_a_raw_precision_that_training_has_made_illegal_is_named_before_anything_moves(
    algorithm: Any, number: float
) -> None:
    pi = nn.Parameter(torch.ones(5).double())
    model, optimizer = trained_once(algorithm(3, 0.1, precisions={"2": pi}), pi)
    optimizer.zero_grad()
    with torch.no_grad():
        pi[2] = number
    before = [parameter.detach().clone() for parameter in model.parameters()]
    x, y = batch()
    with pytest.raises(ConfigurationError, match=r"precision of node '2'.*above 0.*Precision"):
        F.mse_loss(model(x), y).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


def test_a_precision_that_turns_negative_between_inner_steps_undoes_the_step() -> None:
    pi = nn.Parameter(torch.full((5,), 0.01).double())
    net = net_of(4, 5, 5, 3)
    model = torch2ebm.convert(net)
    sgd = torch.optim.SGD([{"params": net.parameters(), "lr": 1e-3}, {"params": [pi], "lr": -1.0}])
    optimizer = torch2ebm.EnergyOptimizer(sgd, model, IncrementalPredictiveCoding(4, 0.1, precisions={"2": pi}))
    x, y = batch()
    F.mse_loss(model(x), y).backward()
    before = [parameter.detach().clone() for parameter in [*net.parameters(), pi]]
    with pytest.raises(ConfigurationError, match="precision of node '2'"):
        optimizer.step()
    assert all(torch.equal(now, then) for now, then in zip([*net.parameters(), pi], before, strict=True))


def test_a_precision_by_its_logarithm_stays_positive_wherever_an_optimizer_takes_it() -> None:
    for kind in ("scalar", "diagonal", "full"):
        precision = precision_like(kind)
        with torch.no_grad():
            for parameter in precision.parameters():
                parameter.sub_(3.0)
        matrix = precision()
        assert bool((torch.linalg.eigvalsh(matrix) > 0).all() if matrix.ndim == 2 else (matrix > 0).all())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Precision(0),
        lambda: Precision(-3),
        lambda: Precision(full=True),
        lambda: Precision((2, 3), full=True),
        lambda: Precision(start=0.0),
        lambda: Precision(start=math.nan),
        lambda: Precision(True),
        lambda: torch2ebm.Gaussian(nn.Parameter(torch.tensor(-1.0))),
        lambda: torch2ebm.Gaussian(nn.Parameter(torch.zeros(3)).exp()),
    ],
)
def test_an_illegal_precision_is_refused(make: Any) -> None:
    with pytest.raises(ConfigurationError):
        make()
