"""Given values and free inputs while a model trains: the gradients of the energy, by autograd on its formula."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ConfigurationError
from torch2ebm.programs.program import Program

TIGHT = torch2ebm.ErrorConjugateGradient(tol=1e-10, steps=300)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def half(error: Tensor) -> Tensor:
    return 0.5 * error.square().sum()


class Decoder:
    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6))
        self.model = torch2ebm.convert(self.net)
        self.image = torch.randn(5, 6)

    def trained(self, algorithm: torch2ebm.PredictiveCoding, *more: nn.Parameter) -> torch2ebm.EnergyOptimizer:
        sgd = torch.optim.SGD([*self.net.parameters(), *more], lr=0.1)
        return torch2ebm.EnergyOptimizer(sgd, self.model, algorithm)

    def energy(self, prior: Tensor, z: Tensor, h: Tensor) -> Tensor:
        return half(z - prior) + half(h - self.net[1](self.net[0](z))) + half(self.image - self.net[2](h))

    def assert_gradients_are_those_of(self, energy: Tensor) -> None:
        expected = torch.autograd.grad(energy, list(self.net.parameters()))
        for parameter, gradient in zip(self.net.parameters(), expected, strict=True):
            assert parameter.grad is not None and torch.allclose(parameter.grad, gradient, atol=1e-12)


def test_a_free_input_and_the_module_that_guesses_it_both_learn() -> None:
    """The energy's minimum is one in the latent and the hidden value; the encoder is drawn to the latent."""
    decoder, encoder = Decoder(), nn.Linear(6, 3)
    decoder.trained(
        torch2ebm.PredictiveCoding(free=["input"], solver=TIGHT, loss_reduction="sum"), *encoder.parameters()
    )
    for _ in range(3):  # the first call is captured, the others are cut at the nodes
        decoder.net.zero_grad()
        guess = encoder(decoder.image)
        guess.retain_grad()
        half(decoder.model(guess) - decoder.image).backward()
    z, h = (decoder.model.state.value[name].requires_grad_() for name in ("input", "0"))
    energy = decoder.energy(guess.detach(), z, h)
    assert all(slope.abs().max() < 1e-8 for slope in torch.autograd.grad(energy, [z, h], retain_graph=True))
    decoder.assert_gradients_are_those_of(energy)
    assert guess.grad is not None and torch.allclose(guess.grad, guess - z)
    assert encoder.weight.grad is not None and bool(encoder.weight.grad.any())
    # the twin: backpropagation at the guess is another gradient
    backprop = torch.autograd.grad(half(decoder.net(guess) - decoder.image), decoder.net[0].weight)[0]
    assert not torch.allclose(decoder.net[0].weight.grad, backprop, atol=1e-2)


@pytest.mark.parametrize("solver", [TIGHT, torch2ebm.GradientDescent(steps=600, lr=0.2)], ids=["errors", "values"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compile"])
def test_a_hidden_value_is_given_in_part(
    solver: torch2ebm.Solver, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Program, "compile", lambda self: None)  # a program as it was recorded
    decoder, given, mask = Decoder(), torch.randn(5, 8), torch.rand(5, 8) > 0.5
    batches = iter([(given + 1, ~mask), None, given, (given, mask)])
    decoder.trained(torch2ebm.PredictiveCoding(clamp={"0": lambda: next(batches)}, solver=solver, compile=compiled))
    x = torch.randn(5, 3)
    for rows in (None, None, torch.ones_like(mask), mask):
        decoder.net.zero_grad()
        (decoder.model(x) - decoder.image).square().mul(0.5).sum(1).mean().backward()
        if rows is not None:
            h = torch.where(rows, given, decoder.model.state.value["0"])
            decoder.assert_gradients_are_those_of(decoder.energy(x, x, h) / 5)


class TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.down = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        return {"scores": self.up(image), "pixels": self.down(label)}


@pytest.mark.parametrize("solver", [TIGHT, torch2ebm.GradientDescent(steps=600, lr=0.2)], ids=["errors", "values"])
@pytest.mark.parametrize("given", ["nothing", "tied", "whole", "in part"])
def test_the_state_has_the_nodes_of_the_model_and_what_was_given(given: str, solver: torch2ebm.Solver) -> None:
    net, h, mask = TwoWays(), torch.randn(8), torch.arange(8) < 3
    clamp = {"nothing": None, "tied": "up.0", "whole": h, "in part": (h, mask)}[given]
    model, image, label = torch2ebm.convert(net), torch.randn(5, 6), torch.randn(5, 3)
    algorithm = torch2ebm.PredictiveCoding(clamp={} if clamp is None else {"down.0": clamp}, solver=solver)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
    output = model(image, label)
    (half(output["scores"] - label) / 5 + half(output["pixels"] - image) / 5).backward()
    value, prediction, error = model.state.value, model.state.prediction, model.state.error
    assert list(value) == list(model.nodes) == ["up.0", "up.2", "down.0", "down.2"]
    assert "down.0" in model.summary() and "|data" not in repr(model.state)
    up, down = value["up.0"], value["down.0"]
    expected = {"nothing": down, "tied": up, "whole": h.expand(5, 8), "in part": torch.where(mask, h, down)}[given]
    assert torch.allclose(down, expected) and (given == "tied") == torch.allclose(down, up)
    assert torch.allclose(prediction["down.0"], net.down[1](net.down[0](label)))
    assert torch.allclose(prediction["down.2"], net.down[2](down)) and torch.allclose(
        error["down.2"], image - prediction["down.2"]
    )
    energy = sum(each.sum() for each in model.state.energy.values())
    assert float(energy) == pytest.approx(model.state.relaxation.energy[-1])


def test_labels_where_there_are_some() -> None:
    """A generative net from labels to images: those of some samples are given, and those of the others are found."""
    decoder = Decoder()
    labels, known = torch.eye(3)[[0, 1, 2, 0, 1]], torch.tensor([True, True, False, False, True])
    optimizer = decoder.trained(
        torch2ebm.PredictiveCoding(
            free=["input"],
            clamp={"input": lambda: (labels, known[:, None].expand(5, 3))},
            solver=TIGHT,
            loss_reduction="sum",
        )
    )
    energies = []
    for _ in range(20):
        optimizer.zero_grad()
        half(decoder.model(torch.zeros(5, 3)) - decoder.image).backward()
        energies.append(decoder.model.state.relaxation.energy[-1])
        optimizer.step()
    value = torch.where(known[:, None], labels, decoder.model.state.value["input"])
    assert bool(value[~known].any()) and energies[-1] < 0.9 * energies[0]
    h = decoder.model.state.value["0"]
    slope = torch.autograd.grad(decoder.energy(torch.zeros(5, 3), value.requires_grad_(), h), value)[0]
    # the energy of the last relaxation, whose weights have moved on by one step
    assert slope[~known].norm() < 0.2 * slope[known].norm()


def test_monte_carlo_gradients_are_the_mean_over_the_posterior() -> None:
    """One linear latent: the gradient in w of -log p(x) = (log(1 + w^2) + x^2 / (1 + w^2)) / 2, and not MAP's."""
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1.5)
    model, x = torch2ebm.convert(nn.Sequential(net)), torch.full((4000, 1), 2.0)
    sampler = torch2ebm.Langevin(steps=160, lr=0.02, burn_in=100, thinning=20)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.PredictiveCoding(free=["input"], solver=sampler))
    (model(torch.zeros(4000, 1)) - x).square().mul(0.5).mean().backward()
    w = torch.tensor(1.5, requires_grad=True)
    (exact,) = torch.autograd.grad(0.5 * ((1 + w**2).log() + 4 / (1 + w**2)), w)
    assert net.weight.grad is not None and net.weight.grad.item() == pytest.approx(exact.item(), abs=0.1)
    optimizer.detach()
    net.weight.grad = None
    torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.PredictiveCoding(free=["input"], solver=TIGHT))
    (model(torch.zeros(4000, 1)) - x).square().mul(0.5).mean().backward()
    assert abs(net.weight.grad.item() - exact.item()) > 0.3  # the mode knows nothing of the posterior's width


@pytest.mark.slow
def test_variance_is_learned_by_sampling_and_not_by_the_mode() -> None:
    """Data of variance 5: the model's is 1 + w^2 (Oliviers et al. 2024); the mode makes w grow without end."""
    data = torch.randn(512, 1) * 5**0.5
    found = {}
    for name, solver in (("mode", TIGHT), ("samples", torch2ebm.Langevin(steps=60, lr=0.05, burn_in=40, thinning=5))):
        torch.manual_seed(1)
        net = nn.Linear(1, 1, bias=False)
        net.weight.data.fill_(1.0)
        model = torch2ebm.convert(nn.Sequential(net))
        optimizer = torch2ebm.EnergyOptimizer(
            torch.optim.SGD(net.parameters(), lr=0.3), model, torch2ebm.PredictiveCoding(free=["input"], solver=solver)
        )
        for _ in range(120):
            optimizer.zero_grad()
            (model(torch.zeros(512, 1)) - data).square().mul(0.5).mean().backward()
            optimizer.step()
        found[name] = 1 + net.weight.item() ** 2
    assert found["samples"] == pytest.approx(float(data.square().mean()), rel=0.15)
    assert found["mode"] > 1.6 * float(data.square().mean())


def algorithm(**settings: object) -> torch2ebm.PredictiveCoding:
    return torch2ebm.PredictiveCoding(**settings)


def test_what_cannot_be_is_named() -> None:
    decoder = Decoder()
    with pytest.raises(ConfigurationError, match="counts whole"):
        algorithm(clamp={"0": 0.0}, nudging=torch2ebm.Symmetric(0.1))
    for settings, said in (
        ({"free": ["label"]}, "which is no input"),
        ({"clamp": {"2": 0.0}}, "an output"),
        ({"clamp": {"0": torch.zeros(5, 7)}}, r"shape \(5, 7\)"),
        ({"clamp": {"nothing": 0.0}}, "nothing"),
        ({"clamp": {"input": torch.zeros(5, 3)}}, r"free=\['input'\]"),
        ({"clamp": {"0": (torch.zeros(5, 8), torch.zeros(5, 8))}}, r"\.\.\., mask\)}\).*float64"),
    ):
        optimizer = decoder.trained(algorithm(**settings))
        before = [p.clone() for p in decoder.net.parameters()]
        with pytest.raises(ConfigurationError, match=said):
            decoder.model(torch.zeros(5, 3))
        assert all(map(torch.equal, before, decoder.net.parameters()))
        optimizer.detach()


def test_the_precision_of_a_given_value_learns() -> None:
    """Its gradient is that of 1/2 pi e^2 - 1/2 log pi in log pi, per entry and sample, over the batch."""
    decoder, h, x = Decoder(), torch.randn(5, 8), torch.randn(5, 3)
    precision = torch2ebm.Precision(8, start=2.0)
    algorithm = torch2ebm.PredictiveCoding(clamp={"0": h}, precisions={"0": precision}, solver=TIGHT)
    sgd = torch.optim.SGD([*decoder.net.parameters(), *precision.parameters()], lr=0.1)
    torch2ebm.EnergyOptimizer(sgd, decoder.model, algorithm)
    (decoder.model(x) - decoder.image).square().mul(0.5).sum(1).mean().backward()
    error = (h - decoder.net[:2](x)).detach()
    (parameter,) = precision.parameters()
    assert parameter.grad is not None
    assert torch.allclose(parameter.grad, (0.5 * 2 * error.square() - 0.5).mean(0), atol=1e-12)
    part = torch2ebm.PredictiveCoding(clamp={"0": (h, h > 0)}, precisions={"0": precision}, solver=TIGHT)
    other = torch2ebm.convert(decoder.net)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(decoder.net.parameters(), lr=0.1), other, part)
    with pytest.raises(ConfigurationError, match="whose precision learns"):
        other(x)


def test_data_of_a_distribution_has_to_be_there() -> None:
    """A label where there is one: without, an energy of data has no lowest point."""
    decoder, given = Decoder(), iter([torch.eye(8)[:5], None, (torch.eye(8)[:5], torch.eye(5, 8) > 0)])
    energies = {"0": torch2ebm.Categorical(observed=True)}
    decoder.trained(algorithm(clamp={"0": lambda: next(given)}, energies=energies))
    (decoder.model(torch.zeros(5, 3)) - decoder.image).square().mean().backward()
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"whose value is data|joins the entries"):
            decoder.model(torch.zeros(5, 3))


def test_a_part_of_a_value_whose_entries_are_joined_is_refused() -> None:
    decoder, mask = Decoder(), torch.rand(5, 8) > 0.5
    joined = [
        torch2ebm.Gaussian(torch2ebm.Precision(8, full=True)),
        torch2ebm.Categorical(),
        torch2ebm.FunctionEnergy(lambda value, prediction: (value - prediction).sum(1).square()),
    ]
    for energy in joined:
        with pytest.raises(ConfigurationError, match="joins the entries"):
            decoder.model.infer(
                torch.zeros(5, 3), clamp={"0": torch.zeros(5, 8)}, mask={"0": mask}, energies={"0": energy}
            )


def test_what_was_given_may_change_before_the_backward() -> None:
    """The clamp is that of the forward."""
    decoder, buffer, x = Decoder(), torch.zeros(5, 8), torch.randn(5, 3)
    decoder.trained(algorithm(clamp={"0": lambda: buffer}, solver=TIGHT, loss_reduction="sum"))
    loss = half(decoder.model(x) - decoder.image)
    buffer.fill_(7.0)
    loss.backward()
    decoder.assert_gradients_are_those_of(decoder.energy(x, x, torch.zeros(5, 8)))


def test_a_sampler_keeps_its_measured_step() -> None:
    """Noise raises an energy, whatever the step: that shortens no step, and is no reason to warn."""
    decoder = Decoder()
    for lr in ("auto", 0.001):
        optimizer = decoder.trained(algorithm(free=["input"], solver=torch2ebm.Langevin(steps=40, lr=lr, burn_in=20)))
        steps = []
        for _ in range(6):
            (decoder.model(torch.zeros(5, 3)) - decoder.image).square().mean().backward()
            steps.append(decoder.model.state.relaxation.lr)
        assert steps[-1] == steps[0]
        optimizer.detach()
