"""An energy from one function: its derivatives, where the engine asks for them, and the functions that are none."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch2ebm
from torch2ebm import FunctionEnergy, OneSided, PredictiveCoding
from torch2ebm.errors import ConfigurationError, EnergyGradientError, Torch2EBMError
from torch2ebm.extend import Energy
from torch2ebm.programs.program import Program

STRONG = {"solver": torch2ebm.ErrorConjugateGradient(tol=1e-6), "nudging": OneSided(1.0)}


def half_squares(value: Tensor, mu: Tensor) -> Tensor:
    return 0.5 * (value - mu) ** 2


def of_samples(value: Tensor, mu: Tensor) -> Tensor:
    return half_squares(value, mu).flatten(1).sum(1)


def net_of(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def trained(energy: Energy | None, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    energies = {} if energy is None else {"0": energy, "2": energy}
    net = net_of(dtype)
    model = torch2ebm.convert(net)
    algorithm = PredictiveCoding(energies=energies, **(settings or STRONG))
    keep = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64).to(dtype)
    F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1])).backward()
    assert keep.model is model
    return model


def gradients(model: Any) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("settings", [STRONG, {"steps": 9, "lr": 0.1}, {}, {"steps": 5, "lr": 0.1, "compile": True}])
@pytest.mark.parametrize(
    "energy",
    [
        FunctionEnergy(half_squares),
        FunctionEnergy(of_samples),
        FunctionEnergy(lambda error: 0.5 * error**2, of_error=True),
        FunctionEnergy(lambda value, mu: half_squares(value, mu) + 1000),  # a shift is no energy that is lost
    ],
    ids=["entries", "samples", "error", "shifted"],
)
def test_half_the_squares_as_a_function_are_the_energy_that_is_there_anyway(
    energy: Energy, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Program, "compile", lambda self: None)
    ours, plain = trained(energy, **settings), trained(None, **settings)
    torch.testing.assert_close(gradients(ours), gradients(plain), rtol=1e-9, atol=1e-12)
    for name in ("0", "2"):
        torch.testing.assert_close(ours.state.energy[name], plain.state.energy[name], rtol=1e-8, atol=1e-11)
    ours_energy, theirs = (torch.tensor(each.state.relaxation.energy) for each in (ours, plain))
    torch.testing.assert_close(ours_energy, theirs, rtol=1e-6, atol=1e-8)


def test_a_function_of_the_error_keeps_the_digits_of_a_small_one() -> None:
    error, mu = torch.full((1, 3), 1e-9), torch.full((1, 3), 1.0)
    by_error = FunctionEnergy(lambda e: 0.5 * e**2, of_error=True)
    assert torch.equal(by_error.gradients(error, mu)[0], error)
    assert torch.equal(FunctionEnergy(half_squares).gradients(error, mu)[0], torch.zeros(1, 3))  # 1 + 1e-9 is 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_derivatives_come_whether_gradients_are_on_or_off(mode: Callable[[], Any]) -> None:
    energy = FunctionEnergy(lambda value, mu: (value - mu).cosh().log() * mu.exp())
    generator = torch.Generator().manual_seed(0)
    error, mu = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    with mode():
        own, against = energy.gradients(error, mu)
    assert not own.requires_grad and not against.requires_grad
    torch.testing.assert_close(own, error.tanh() * mu.exp())
    torch.testing.assert_close(against, error.tanh() * mu.exp() - error.cosh().log() * mu.exp())


def test_under_autocast_the_function_computes_in_single_precision() -> None:
    seen: list[torch.dtype] = []

    def phi(value: Tensor, mu: Tensor) -> Tensor:
        seen.append((value @ value.T).dtype)  # what autocast would do in half precision
        return half_squares(value, mu)

    net = net_of(torch.float32)
    model = torch2ebm.convert(net)
    algorithm = PredictiveCoding(energies={"2": FunctionEnergy(phi)}, **STRONG)
    keep = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
    seen.clear()  # at attach the values are in double precision
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1]))
    loss.backward()
    assert keep.model is model
    assert set(seen) == {torch.float32}


def test_an_energy_of_a_module_level_function_is_pickled() -> None:
    assert pickle.loads(pickle.dumps(FunctionEnergy(half_squares))) == FunctionEnergy(half_squares)


# what is no energy


def mixing(value: Tensor, mu: Tensor) -> Tensor:
    return half_squares(value - value.mean(0), mu - mu.mean(0))


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "one number": (lambda value, mu: half_squares(value, mu).mean(), "shape .* for values of shape"),
    "a feature too few": (lambda value, mu: half_squares(value, mu)[:, :-1], "shape .* for values of shape"),
    "no tensor": (lambda value, mu: 1.0, "a float for values of shape"),
    "samples mixed": (mixing, "depends on another sample"),
    "a batch norm": (
        lambda value, mu: half_squares(value, mu) / value.std(0).detach() + value.std(0),
        "another sample",
    ),
    "smallest elsewhere": (lambda value, mu: 0.5 * (value - mu - 1) ** 2, "dphi/dvalue .* where the value is the"),
    "with a slope in the prediction": (lambda value, mu: half_squares(value, mu) + mu, "dphi/dprediction"),
    "of the value alone": (lambda value, mu: 0.5 * value**2, "dphi/dvalue"),
    "a root": (lambda value, mu: half_squares(value, mu).sum(-1).sqrt(), "no finite derivative"),
    "nowhere a number": (lambda value, mu: half_squares(value, mu) * torch.nan, "not finite"),
    "a likelihood": (lambda value, mu: F.softplus(mu) - value * mu, "observed=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_function_that_is_no_energy_is_refused_at_attach(name: str) -> None:
    phi, said = REFUSED[name]
    net = net_of()
    model = torch2ebm.convert(net)
    algorithm = PredictiveCoding(energies={"2": FunctionEnergy(phi)}, **STRONG)
    with pytest.raises(ConfigurationError, match=said):
        torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
    assert model.torch2ebm.algorithm is None


@pytest.mark.parametrize(
    "phi",
    [
        lambda value, mu: 0.5 * (value - mu - torch.ones(8).double()) ** 2,  # fits the node alone
        lambda value, mu: half_squares(value, mu) @ torch.ones(8, 1).double(),
        lambda value, mu: torch.where(mu.abs().amax() < 1e6, half_squares(value, mu)[:, :8].sum(), 0.0),
    ],
)
def test_a_function_that_fits_its_node_alone_is_looked_at_in_the_first_forward(phi: Callable[..., Tensor]) -> None:
    with pytest.raises(ConfigurationError):
        trained(FunctionEnergy(phi))


@pytest.mark.parametrize(
    ("phi", "said"),
    [
        (lambda value, mu: (value - mu) @ torch.ones(5, 1).double(), r"node '0'.*RuntimeError.*shape \(5, 8\)"),
        (lambda value, mu: value.sub_(mu).square(), "node '0'.*RuntimeError"),  # it writes on what it is given
        (lambda value: value**2, "node '0'.*TypeError"),
    ],
)
def test_a_function_that_fails_is_named_with_its_node_before_anything_moves(phi: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        trained(FunctionEnergy(phi))


def test_a_function_for_other_numbers_than_the_node_predicts_is_refused() -> None:
    """Defined for positive predictions; tanh gives negative ones."""
    with pytest.raises(ConfigurationError, match="not finite"):
        trained(FunctionEnergy(lambda value, mu: value * (value.log() - mu.log()) - value + mu))


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_a_function_with_a_weight_of_each_feature_is_let_through(size: int) -> None:
    """Whatever the shapes are that it is tried on: one of them may fit the weights by chance."""
    weight = torch.linspace(0.5, 2, size).double()
    energy = FunctionEnergy(lambda value, mu: (weight * half_squares(value, mu)).sum(1))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, size), nn.Tanh(), nn.Linear(size, 3)).double()
    model = torch2ebm.convert(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    keep = torch2ebm.EnergyOptimizer(sgd, model, PredictiveCoding(energies={"0": energy}, **STRONG))
    F.cross_entropy(model(torch.randn(5, 4).double()), torch.tensor([0, 1, 2, 0, 1])).backward()
    assert keep.model is model
    expected = torch2ebm.Gaussian(weight).of_samples(model.state.error["0"], model.state.error["0"])
    torch.testing.assert_close(model.state.energy["0"], expected, rtol=1e-9, atol=0)


def test_a_divergence_of_positive_numbers_is_let_through_at_attach() -> None:
    energy = FunctionEnergy(lambda value, mu: value * (value.log() - mu.log()) - value + mu)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 3)).double()
    model = torch2ebm.convert(net)
    algorithm = PredictiveCoding(energies={"0": energy})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
        F.cross_entropy(model(torch.randn(5, 4).double()), torch.tensor([0, 1, 2, 0, 1])).backward()
    assert keep.model is model
    assert model.state.relaxation.converged


def test_a_likelihood_of_data_needs_no_rest() -> None:
    energy = FunctionEnergy(lambda value, mu: F.softplus(mu) - value * mu, observed=True)
    energy.check("here")
    value, mu = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.3, -2.0]])
    expected = F.binary_cross_entropy_with_logits(mu, value, reduction="none").sum(1)
    torch.testing.assert_close(energy.of_samples(value - mu, mu), expected)
    torch.testing.assert_close(energy.gradients(value - mu, mu)[1], value - mu.sigmoid())


@pytest.mark.parametrize("phi", [None, 3.0, "log", torch.nn.Linear])
def test_what_is_no_function_is_refused(phi: Any) -> None:
    with pytest.raises(ConfigurationError, match="FunctionEnergy"):
        FunctionEnergy(phi)


def test_a_wrong_gradient_written_by_hand_is_still_refused() -> None:
    class Doubled(torch2ebm.Energy):
        def of_samples(self, error: Tensor, prediction: Tensor) -> Tensor:
            return error.square().flatten(1).sum(1)

        def of_batch(self, error: Tensor, prediction: Tensor) -> Tensor:
            return error.square().sum()

        def gradients(self, error: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
            return error, error

    with pytest.raises(EnergyGradientError):
        trained(Doubled())
    assert issubclass(EnergyGradientError, Torch2EBMError)
