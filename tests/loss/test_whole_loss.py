"""The energy takes the scalar on which backward is called, whole."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import attached, relative_error, scaled_by
from oracles.whole_losses import TwoLayers, linear_minimum
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ConfigurationError, LossReductionError
from torch2ebm.torch2pc import PCInfer

EXACT = 1e-12
STEPS, RATE = 8, 0.1
RESTING = 160
BATCH, CLASSES = 5, 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, T = numbers(BATCH, 4), numbers(BATCH, CLASSES, seed=2)
Y = torch.tensor([0, 1, 2, 0, 1])
S = torch.tensor(0.3, dtype=torch.float64)


def hinge(output: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    total += F.multi_margin_loss(output, Y)
    total += 0.1 * output.square().mean()
    return total


def filled(output: Tensor) -> Tensor:
    losses = torch.zeros(2, dtype=torch.float64)
    losses[0] = F.mse_loss(output, T)
    losses[1] = F.cross_entropy(output, Y)
    return losses.mean()


MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "half a squared error": lambda o: 0.5 * (o - T).square().sum(1).mean(),
    "halved at the end": lambda o: (o - T).square().sum(1).mean() / 2,
    "divided by the batch": lambda o: ((o - T) ** 2).sum() / BATCH,
    "divided by its own length": lambda o: ((o - T) ** 2).sum() / len(o),
    "divided by its shape": lambda o: ((o - T) ** 2).sum() / o.shape[0],
    "a weighted sum": lambda o: 0.1 * F.cross_entropy(o, Y) + 0.2 * F.mse_loss(o, T),
    "a difference": lambda o: F.mse_loss(o, T) - 0.3 * F.cross_entropy(o, Y),
    "a root": lambda o: F.mse_loss(o, T).sqrt(),
    "a logarithm": lambda o: F.mse_loss(o, T).log(),
    "a product": lambda o: F.cross_entropy(o, Y) * F.mse_loss(o, T),
    "a quotient": lambda o: F.cross_entropy(o, Y) / (1 + F.mse_loss(o, T)),
    "a stack": lambda o: torch.stack([F.cross_entropy(o, Y), F.mse_loss(o, T)]).mean(),
    "a learned weight": lambda o: torch.exp(-S) * F.cross_entropy(o, Y) + S,
    "a penalty on outputs": lambda o: F.cross_entropy(o, Y) + 0.01 * o.norm(),
    "a maximum of losses": lambda o: torch.maximum(F.cross_entropy(o, Y), F.mse_loss(o, T)),
    "added in place": hinge,
    "written into a list of losses": filled,
    "sample by sample": lambda o: sum(F.cross_entropy(o[i], Y[i]) for i in range(BATCH)) / BATCH,
    "negative": lambda o: -0.2 * F.cross_entropy(o, Y),
    "a constant beside it": lambda o: F.cross_entropy(o, Y) + 3.0,
}
SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "half a sum of squares": lambda o: 0.5 * ((o - T) ** 2).sum(),
    "a sum over ten": lambda o: ((o - T) ** 2).sum() / 8,
    "cross entropies": lambda o: 0.1 * F.cross_entropy(o, Y, reduction="sum"),
}


def learned(loss: Callable[[Tensor], Tensor], **settings: str) -> dict[str, Tensor]:
    module = net()
    loss(attached(module, torch2ebm.PredictiveCoding(STEPS, RATE, **settings))(X)).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", MEANS.values(), ids=MEANS)
def test_a_mean_is_taken_whole(loss: Callable[[Tensor], Tensor]) -> None:
    expected = TwoLayers(net(), 2, [X], loss, BATCH).gradients(STEPS, RATE)
    assert relative_error(learned(loss), expected) <= EXACT
    assert relative_error(learned(torch2ebm.EnergyLoss(loss)), expected) <= EXACT


@pytest.mark.parametrize("loss", [*MEANS.values(), *SUMS.values()], ids=[*MEANS, *SUMS])
def test_as_it_is_written_it_is_what_torch2pc_computes(loss: Callable[[Tensor], Tensor]) -> None:
    expected = TwoLayers(net(), 2, [X], loss, 1).gradients(STEPS, RATE)
    assert relative_error(learned(loss, loss_reduction="sum"), expected) <= EXACT
    assert relative_error(learned(torch2ebm.EnergyLoss(loss), loss_reduction="sum"), expected) <= EXACT
    # Torch2PC's last errors are those of before the last update: the two meet where nothing moves any more
    module, theirs = net(), net()
    algorithm = torch2ebm.PredictiveCoding(RESTING, 0.2, loss_reduction="sum")
    loss(attached(module, algorithm)(X)).backward()
    PCInfer(nn.Sequential(theirs[:2], theirs[2]), lambda o, _: loss(o), X, None, "Strict", eta=0.2, n=RESTING)
    ours = {name: p.grad for name, p in module.named_parameters()}
    assert relative_error(ours, {name: p.grad for name, p in theirs.named_parameters()}) <= EXACT


@pytest.mark.parametrize("loss", SUMS.values(), ids=SUMS)
def test_a_bare_sum_keeps_its_error(loss: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(LossReductionError, match=r"loss_reduction='sum'.*divide by len\(x\)"):
        learned(loss)


def test_the_loss_is_not_its_half() -> None:
    """The negative twin: with the one-half left outside, as a factor, the gradient is another."""
    half = MEANS["half a squared error"]
    expected = TwoLayers(net(), 2, [X], half, BATCH).gradients(STEPS, RATE)
    doubled = TwoLayers(net(), 2, [X], lambda o: 2 * half(o), BATCH).gradients(STEPS, RATE)
    assert relative_error({name: g / 2 for name, g in doubled.items()}, expected) > 0.01


@pytest.mark.parametrize("written", [False, True], ids=["mean", "sum"])
def test_at_rest_the_energy_is_that_of_theory(written: bool) -> None:
    """Linear net, the loss of every paper: 0.5 * error.square().sum(1).mean()."""
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)).double()
    algorithm = torch2ebm.PredictiveCoding(3000, 0.1, loss_reduction="sum" if written else "mean")
    model = attached(module, algorithm)
    (0.5 * (model(X) - T).square().sum(1).mean()).backward()
    weight = 1 / BATCH if written else 1.0
    expected = linear_minimum(module[0].weight.detach(), module[1].weight.detach(), X, T, weight)
    assert abs(model.state.relaxation.energy[-1] - expected) <= 1e-10 * expected
    assert model.state.loss_weight == weight
    assert f"weight of a sample's loss in the energy: {weight:.4g}" in model.summary()


def test_a_learned_weight_has_autograd_s_gradient_and_weighs_in_the_energy() -> None:
    module = net()
    weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    model = attached(module, torch2ebm.PredictiveCoding(STEPS, RATE))
    loss = F.cross_entropy(model(X), Y)
    (torch.exp(-weight) * loss + weight).backward()
    value = F.cross_entropy(net()(X), Y).detach()
    assert weight.grad is not None
    assert abs(float(weight.grad - (1 - torch.exp(-weight.detach()) * value))) <= EXACT
    fixed = weight.detach()
    reference = TwoLayers(net(), 2, [X], lambda o: torch.exp(-fixed) * F.cross_entropy(o, Y), BATCH)
    ours = {name: p.grad for name, p in module.named_parameters()}
    assert relative_error(ours, reference.gradients(STEPS, RATE)) <= EXACT


def test_a_penalty_on_parameters_adds_its_own_gradient() -> None:
    module = net()
    model = attached(module, torch2ebm.PredictiveCoding(STEPS, RATE))
    (F.cross_entropy(model(X), Y) + 0.05 * sum(p.square().sum() for p in module.parameters())).backward()
    expected = TwoLayers(net(), 2, [X], lambda o: F.cross_entropy(o, Y), BATCH).gradients(STEPS, RATE)
    decay = {name: 0.1 * p.detach() for name, p in module.named_parameters()}
    ours = {name: p.grad for name, p in module.named_parameters()}
    assert relative_error(ours, {name: expected[name] + decay[name] for name in expected}) <= EXACT


@pytest.mark.parametrize("factor", [2.0, 65536.0])
def test_a_gradient_scaler_leaves_the_energy_alone(factor: float) -> None:
    module = net()
    model = attached(module, torch2ebm.PredictiveCoding(STEPS, RATE))
    scaled_by(factor, 0.5 * F.cross_entropy(model(X), Y)).backward()
    expected = TwoLayers(net(), 2, [X], lambda o: 0.5 * F.cross_entropy(o, Y), BATCH).gradients(STEPS, RATE)
    ours = {name: p.grad / factor for name, p in module.named_parameters()}
    assert relative_error(ours, expected) <= EXACT
    assert model.state.loss_weight == 1.0


def accumulated(parts: int, accumulation: int) -> dict[str, Tensor]:
    module = net()
    model = torch2ebm.convert(module)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer = torch2ebm.EnergyOptimizer(
        sgd, model, torch2ebm.PredictiveCoding(STEPS, RATE), accumulation=accumulation
    )
    x, y = torch.cat([X, X[:1]]), torch.cat([Y, Y[:1]])
    for inputs, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (F.cross_entropy(model(inputs), labels) / parts).backward()
    assert copy.deepcopy(optimizer).accumulation == accumulation
    assert (f"accumulation={accumulation}" in repr(optimizer)) == (accumulation > 1)
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_accumulation_says_that_a_division_is_no_part_of_the_loss() -> None:
    whole = accumulated(1, 1)
    assert relative_error(accumulated(2, 2), whole) <= EXACT
    assert relative_error(accumulated(3, 3), whole) <= EXACT
    assert relative_error(accumulated(2, 1), whole) > 1e-3  # the negative twin: half a loss pulls half as much
    with pytest.raises(ConfigurationError, match=r"accumulation=\.\.\."):
        accumulated(1, 0)


def test_rows_of_a_jacobian_are_the_samples_own_losses() -> None:
    """``autograd.grad`` on a vector of losses: each relaxes its sample, the others stand still."""
    module = net()
    model = attached(module, torch2ebm.PredictiveCoding(STEPS, RATE))
    losses = F.cross_entropy(model(X), Y, reduction="none")
    names, parameters = zip(*module.named_parameters(), strict=True)
    rows = torch.autograd.grad(losses, parameters, torch.eye(BATCH).double(), is_grads_batched=True)
    for i in range(BATCH):
        alone = TwoLayers(net(), 2, [X[i : i + 1]], lambda o, i=i: F.cross_entropy(o, Y[i : i + 1]), 1)
        expected = alone.gradients(STEPS, RATE)
        assert relative_error({n: row[i] for n, row in zip(names, rows, strict=True)}, expected) <= 1e-11


def test_gradients_of_two_tasks_are_taken_one_by_one() -> None:
    """As gradient surgery does: ``autograd.grad`` of each loss, the graph retained."""
    module = net()
    model = attached(module, torch2ebm.PredictiveCoding(STEPS, RATE))
    output = model(X)
    parameters = dict(module.named_parameters())
    for loss in (lambda o: F.cross_entropy(o, Y), lambda o: 0.2 * F.mse_loss(o, T)):
        found = torch.autograd.grad(loss(output), list(parameters.values()), retain_graph=True)
        expected = TwoLayers(net(), 2, [X], loss, BATCH).gradients(STEPS, RATE)
        assert relative_error(dict(zip(parameters, found, strict=True)), expected) <= EXACT


def test_a_loss_whose_gradient_is_zero_up_to_rounding_is_no_error() -> None:
    """The KL to a copy of the model, at step 0."""
    module = net()
    model = attached(module, torch2ebm.PredictiveCoding(STEPS, RATE))
    with torch.no_grad():
        teacher = F.softmax(copy.deepcopy(module)(X), 1)
    F.kl_div(F.log_softmax(model(X), 1), teacher, reduction="batchmean").backward()
    assert max(float(p.grad.abs().max()) for p in module.parameters() if p.grad is not None) <= 1e-15


def test_noise_that_is_drawn_in_the_loss_stays_what_it_was() -> None:
    module = net()
    model = attached(module, torch2ebm.PredictiveCoding(STEPS, RATE))
    torch.manual_seed(5)
    output = model(X)
    (output + torch.randn_like(output) - T).square().mean().backward()
    torch.manual_seed(5)
    noise = torch.randn(BATCH, CLASSES, dtype=torch.float64)
    expected = TwoLayers(net(), 2, [X], lambda o: (o + noise - T).square().mean(), BATCH).gradients(STEPS, RATE)
    assert relative_error({name: p.grad for name, p in module.named_parameters()}, expected) <= EXACT
