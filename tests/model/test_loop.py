"""The loop stays as it was: whatever people do to the output and the optimizer, ``.grad`` is the algorithm's.

Every net is a chain written as its list of layers, so the oracles need no partition of their own.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import UNSETTLED, attached, local_gradients, relative_error
from oracles.energy import chain_error_descent
from oracles.equilibria import chain_of_blocks, symmetric
from oracles.graphs import ChainState, Gradients, backprop, binomial_tail, strict
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.checkpoint import checkpoint

import torch2ebm
from torch2ebm.errors import (
    GraphFreedError,
    HigherOrderGradientError,
    LossIndependentError,
    LossNotRecordedError,
    LossReductionError,
)

pytestmark = pytest.mark.filterwarnings(UNSETTLED)  # the oracle takes the same six steps

Loss = Callable[[Tensor], Tensor]
EXACT = 1e-12
BATCH, FEATURES, CLASSES = 4, 6, 4

ALGORITHMS: dict[str, torch2ebm.Algorithm] = {
    "backprop": torch2ebm.Backprop(),
    "zero_divergence": torch2ebm.ZeroDivergence(),
    "fixed_prediction": torch2ebm.FixedPrediction(steps=4, lr=0.3),
    "predictive_coding": torch2ebm.PredictiveCoding(steps=6, lr=0.2),
    "error_descent": torch2ebm.PredictiveCoding(
        solver=torch2ebm.ErrorDescent(steps=3, lr=0.2), nudging=torch2ebm.OneSided(0.7)
    ),
    "equilibrium": torch2ebm.EquilibriumPropagation(torch2ebm.Symmetric(0.7), 6, 4, feedback=0.8),
}
CODING = ALGORITHMS["predictive_coding"]


def mlp() -> nn.Sequential:
    wide = 7
    return nn.Sequential(
        nn.Sequential(nn.Linear(FEATURES, wide), nn.Tanh()),
        nn.Sequential(nn.Linear(wide, wide), nn.Tanh()),
        nn.Linear(wide, CLASSES),
    )


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten()),
        nn.Linear(16, CLASSES),
    )


def built(make: Callable[[], nn.Sequential], seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make().double()
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(1.5)  # larger errors: predictive coding is then far from backprop
    return net


def batch_for(net: nn.Sequential, seed: int = 1, size: int = BATCH) -> Tensor:
    shape = (size, FEATURES) if isinstance(net[0][0], nn.Linear) else (size, 2, 8, 8)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_for(x: Tensor) -> Tensor:
    return torch.arange(len(x)) % CLASSES


def classification(output: Tensor) -> Tensor:
    return F.cross_entropy(output, labels_for(output))


def regression(output: Tensor) -> Tensor:
    targets = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return F.mse_loss(output, targets)


def relaxed(algorithm: torch2ebm.Algorithm, net: nn.Sequential, x: Tensor, loss_sum: Loss) -> ChainState:
    trainable = [[p for p in layer.parameters() if p.requires_grad] for layer in net]
    return relaxed_chain(algorithm, list(net), trainable, x, lambda y: loss_sum(y.clone()))


def relaxed_chain(
    algorithm: torch2ebm.Algorithm,
    layers: list[Callable[[Tensor], Tensor]],
    trainable: list[list[Tensor]],
    x: Tensor,
    loss: Loss,
) -> ChainState:
    assert isinstance(algorithm, torch2ebm.PredictiveCoding)
    solver = algorithm.solver
    if isinstance(solver, torch2ebm.ErrorDescent):
        (beta,) = algorithm.nudging.betas
        return chain_error_descent(layers, trainable, x, loss, solver.steps, solver.lr, beta)
    return strict(layers, trainable, x, loss, solver.steps, solver.lr)


def by_name(net: nn.Sequential, gradients: tuple[tuple[Tensor, ...], ...], scale: float = 1.0) -> Gradients:
    names = [[n for n, p in layer.named_parameters() if p.requires_grad] for layer in net]
    return {
        f"{i}.{name}": scale * gradient
        for i, (layer, parts) in enumerate(zip(names, gradients, strict=True))
        for name, gradient in zip(layer, parts, strict=True)
    }


def expected(algorithm: torch2ebm.Algorithm, net: nn.Sequential, x: Tensor, loss: Loss = classification) -> Gradients:
    """What the mathematics gives for a loss that is a mean over the batch."""
    if isinstance(algorithm, torch2ebm.PredictiveCoding):
        state = relaxed(algorithm, net, x, lambda output: len(x) * loss(output))
        return by_name(net, state.gradients, 1 / len(x))
    if isinstance(algorithm, torch2ebm.EquilibriumPropagation):
        return nudged(algorithm, net, x, loss)
    exact = backprop(net, (x,), loss)
    if isinstance(algorithm, torch2ebm.FixedPrediction):
        distance = {name: len(net) - 1 - int(name[0]) for name in exact}
        return {n: binomial_tail(algorithm.steps, algorithm.lr, distance[n]) * g for n, g in exact.items()}
    return exact


def nudged(algorithm: torch2ebm.EquilibriumPropagation, net: nn.Sequential, x: Tensor, loss: Loss) -> Gradients:
    """Equilibrium propagation on the chain written out, for the trainable parameters."""
    free = algorithm.free_phase
    network = chain_of_blocks(net, x, lambda output: len(x) * loss(output.clone()), free.feedback)
    start = network.relax(network.feedforward(), free.steps)
    found = symmetric(network, start, algorithm.nudged_steps, algorithm.nudging.betas[0])
    return {name: found[name] / len(x) for name, p in net.named_parameters() if p.requires_grad}


def total(*parts: tuple[float, Gradients]) -> Gradients:
    return {name: sum(factor * part[name] for factor, part in parts) for name in parts[0][1]}


def gradients_of(net: nn.Module) -> Gradients:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_equal(ours: Gradients, reference: Gradients) -> None:
    assert relative_error(ours, reference) <= EXACT


every_net = pytest.mark.parametrize("make", [mlp, cnn], ids=lambda make: make.__name__)
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
# of these model(x) is the module's own output, and what no loss reads has no part in it
FEEDFORWARD = {name: algorithm for name, algorithm in ALGORITHMS.items() if not algorithm.defines_output}
every_feedforward_algorithm = pytest.mark.parametrize("algorithm", FEEDFORWARD.values(), ids=FEEDFORWARD)


def test_the_algorithms_are_told_apart_by_these_nets() -> None:
    """The negative twin of everything below: equality with the wrong oracle would be noticed."""
    for make in (mlp, cnn):
        net = built(make)
        x = batch_for(net)
        exact = expected(ALGORITHMS["backprop"], net, x)
        for name in ("fixed_prediction", "predictive_coding"):
            assert relative_error(expected(ALGORITHMS[name], net, x), exact) > 0.05


# ---- factors, accumulation, scalers


@every_net
@every_algorithm
@pytest.mark.parametrize("factor", [1.0, 0.25, 3.0, -1.0, -0.25])
def test_a_factor_before_the_loss_is_part_of_it(
    make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm, factor: float
) -> None:
    net = built(make)
    x = batch_for(net)
    model = attached(net, algorithm)
    (classification(model(x)) * factor).backward()
    assert_equal(gradients_of(net), expected(algorithm, net, x, lambda output: factor * classification(output)))


@every_algorithm
@pytest.mark.parametrize("given", [0.25, -0.25, 8.0])
def test_a_gradient_that_backward_is_given_scales_and_its_sign_enters_the_energy(
    algorithm: torch2ebm.Algorithm, given: float
) -> None:
    net = built(mlp)
    x = batch_for(net)
    classification(attached(net, algorithm)(x)).backward(torch.tensor(given, dtype=torch.float64))
    sign = 1 if given > 0 else -1
    reference = expected(algorithm, net, x, lambda output: sign * classification(output))
    assert_equal(gradients_of(net), total((abs(given), reference)))


def test_the_sign_of_the_loss_is_not_the_sign_of_the_gradient() -> None:
    """Why it has to enter the energy: strict predictive coding of -L is not minus that of L."""
    net = built(mlp)
    x = batch_for(net)
    minus = expected(CODING, net, x, lambda output: -classification(output))
    assert relative_error(minus, total((-1.0, expected(CODING, net, x)))) > 0.05


@every_net
@every_algorithm
def test_accumulated_micro_batches_are_their_mean_and_the_whole_batch(
    make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm
) -> None:
    net = built(make)
    x = batch_for(net)
    model = torch2ebm.convert(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.5)
    optimizer = torch2ebm.EnergyOptimizer(sgd, model, algorithm, accumulation=2)
    assert "accumulation=2" in repr(optimizer)
    parts = [(x[:2], labels_for(x)[:2]), (x[2:], labels_for(x)[2:])]
    for inputs, labels in parts:
        (F.cross_entropy(model(inputs), labels) / 2).backward()
    halves = [expected(algorithm, net, inputs, partial(F.cross_entropy, target=labels)) for inputs, labels in parts]
    assert_equal(gradients_of(net), total((0.5, halves[0]), (0.5, halves[1])))
    assert_equal(gradients_of(net), expected(algorithm, net, x))


@every_net
@every_algorithm
def test_grad_scaler_unscales_clips_and_steps(
    make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm
) -> None:
    net, twin = built(make), built(make)
    x = batch_for(net)
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.5), model, algorithm)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(classification(model(x))).backward()
    reference = expected(algorithm, net, x)
    assert_equal(gradients_of(net), total((2.0**10, reference)))
    scaler.unscale_(optimizer)
    assert_equal(gradients_of(net), reference)
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    step_by_hand(twin, torch.optim.SGD(twin.parameters(), lr=0.5), reference, clip=0.1)
    assert_same_parameters(net, twin)


def test_an_overflow_under_the_scaler_skips_the_step_and_halves_the_scale() -> None:
    net = built(mlp).float()
    before = copy.deepcopy(net.state_dict())
    x = batch_for(built(mlp)).float()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.5), model, CODING)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    scaler.scale(1e4 * classification(model(x))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    scaler.scale(classification(model(x))).backward()
    scaler.step(optimizer)
    assert not any(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@every_algorithm
def test_an_overflow_in_half_precision_is_the_scalers_to_see(algorithm: torch2ebm.Algorithm) -> None:
    """The scale is finite, the loss is finite, what autograd delivers in float16 is not: skip the step, no error."""
    net = built(mlp).float()
    before = copy.deepcopy(net.state_dict())
    x = batch_for(built(mlp)).float()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.5), model, algorithm)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = classification(model(x))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**23
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# ---- what is done to the output


def scaled_in_place(y: Tensor) -> Tensor:
    y.mul_(2)
    return classification(y)


def column_assigned(y: Tensor) -> Tensor:
    y[:, 0] = 0
    return classification(y)


def view_mutated(y: Tensor) -> Tensor:
    y += 1
    view = y[:, 1:]
    view.mul_(3)
    return classification(y)


def overwritten_after_use(y: Tensor) -> Tensor:
    kept = y * 1.5
    y.zero_()
    return classification(kept + y)


def one_by_one(y: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(row[None], labels_for(y)[i : i + 1]) for i, row in enumerate(y)]).mean()


def chunked(y: Tensor) -> Tensor:
    left, right = y.chunk(2, dim=1)
    return (left * right - 1).square().sum(1).mean()


WHAT_PEOPLE_DO: dict[str, Loss] = {
    "view": lambda y: F.cross_entropy(y.view(len(y) * 2, 2), torch.arange(len(y) * 2) % 2),
    "index": lambda y: F.mse_loss(y[:, [0, 2]], y.new_ones(len(y), 2)) + 0 * y[0, 0].detach(),
    "chunk": chunked,
    "cat": lambda y: classification(torch.cat([y, y.square()], dim=1)),
    "einsum": lambda y: torch.einsum("bi,bj->bij", y, y).tanh().mean(),
    "log_softmax": lambda y: F.nll_loss(F.log_softmax(y, dim=1), labels_for(y)),
    "gather": lambda y: -y.log_softmax(1).gather(1, labels_for(y)[:, None]).mean(),
    "transposed": lambda y: F.mse_loss(y.T @ y, torch.eye(CLASSES, dtype=y.dtype)),
    "max": lambda y: y.max(dim=1).values.square().mean() + y.topk(2, dim=1)[0].mean() * 0,
    "masked": lambda y: y[labels_for(y) > 0].square().mean(),
    "unbind": lambda y: sum(part.square() for part in y.unbind(1)).mean(),
    "norm": lambda y: torch.linalg.vector_norm(y - 1, dim=1).mean(),
    "in_place_method": scaled_in_place,
    "in_place_item": column_assigned,
    "in_place_view": view_mutated,
    "in_place_later": overwritten_after_use,
    "clamp_": lambda y: classification(y.clamp_(-0.3, 0.4)),
    "relu_in_place": lambda y: classification(F.relu(y, inplace=True)),
}


@every_algorithm
@pytest.mark.parametrize("loss", WHAT_PEOPLE_DO.values(), ids=WHAT_PEOPLE_DO)
def test_operations_after_the_model_are_part_of_the_loss(algorithm: torch2ebm.Algorithm, loss: Loss) -> None:
    net = built(mlp)
    x = batch_for(net)
    assert_equal(local_gradients(attached(net, algorithm), (x,), loss), expected(algorithm, net, x, loss))


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # a loss of nothing
@every_net
@every_algorithm
def test_writing_on_the_output_alters_no_value_of_the_call(
    make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm
) -> None:
    """What the model predicted stays what it predicted; here the relaxation does not move it, the loss being flat."""
    net = built(make)
    x = batch_for(net)
    model = attached(net, algorithm)
    y = model(x)
    before = y.detach().clone()
    y.mul_(2)
    assert torch.equal(y, 2 * before)
    (y * 0).mean().backward()
    assert (list(model.state.prediction.values())[-1] - before).abs().max() <= EXACT


def by_prediction(state: ChainState) -> list[Tensor]:
    hidden = [v - e for v, e in zip(state.values[:-1], state.errors[:-1], strict=True)]
    return [*hidden, state.values[-1]]


@every_algorithm
@pytest.mark.parametrize("explicit", [False, True])
def test_one_loss_computed_sample_by_sample_is_the_mean(algorithm: torch2ebm.Algorithm, explicit: bool) -> None:
    net = built(mlp)
    x = batch_for(net)
    loss = torch2ebm.EnergyLoss(one_by_one) if explicit else one_by_one
    assert_equal(local_gradients(attached(net, algorithm), (x,), loss), expected(algorithm, net, x))


@every_feedforward_algorithm
def test_a_head_outside_the_model_gets_its_own_autograd_gradient(algorithm: torch2ebm.Algorithm) -> None:
    net, head = built(mlp), nn.Linear(CLASSES, CLASSES).double()
    x = batch_for(net)
    model = attached(net, algorithm)
    classification(head(model(x).tanh())).backward()
    assert_equal(gradients_of(net), expected(algorithm, net, x, lambda y: classification(head(y.tanh()))))
    assert_equal(gradients_of(head), backprop(head, (net(x).tanh().detach(),), classification))


@every_feedforward_algorithm
def test_the_output_reads_as_an_ordinary_tensor(algorithm: torch2ebm.Algorithm) -> None:
    net = built(mlp)
    x = batch_for(net)
    output, plain = attached(net, algorithm)(x), net(x)
    assert isinstance(output, Tensor)
    assert torch.equal(output.detach(), plain.detach())
    assert (
        output.requires_grad and output.shape == plain.shape and output.argmax(1).tolist() == plain.argmax(1).tolist()
    )
    assert output.detach().numpy().shape == plain.shape
    loss = classification(output)
    assert isinstance(loss, Tensor) and f"{loss:.3f}" == f"{classification(plain):.3f}"


# ---- several scalars


def huber(output: Tensor) -> Tensor:
    return F.huber_loss(output, torch.ones_like(output))


@every_net
@every_algorithm
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, -0.5), (0.1, 1.0), (0.3, 0.7)], ids=str)
def test_a_weighted_sum_of_two_losses_is_the_one_loss(
    make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm, weights: tuple[float, float]
) -> None:
    net = built(make)
    x = batch_for(net)
    a, b = weights

    def one(output: Tensor) -> Tensor:
        return a * classification(output) + b * regression(output)

    model = attached(net, algorithm)
    output = model(x)
    first, second = classification(output), regression(output)
    (a * first + b * second).backward()
    assert_equal(gradients_of(net), expected(algorithm, net, x, one))


@every_algorithm
def test_a_common_factor_of_a_sum_of_losses_is_part_of_the_loss(algorithm: torch2ebm.Algorithm) -> None:
    net = built(mlp)
    x = batch_for(net)

    def loss(factor: float, output: Tensor) -> Tensor:
        return factor * (classification(output) + 0.2 * huber(output))

    model = attached(net, algorithm)
    for factor in (1.0, 2.5):
        ours = local_gradients(model, (x,), partial(loss, factor))
        assert_equal(ours, expected(algorithm, net, x, partial(loss, factor)))


@every_algorithm
def test_a_loss_used_twice_has_the_sum_of_its_factors(algorithm: torch2ebm.Algorithm) -> None:
    net = built(mlp)
    x = batch_for(net)
    loss = classification(attached(net, algorithm)(x))
    (0.3 * loss + 0.7 * loss).backward()
    assert_equal(gradients_of(net), expected(algorithm, net, x))


@every_net
@every_algorithm
def test_a_regulariser_adds_its_own_gradient(make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm) -> None:
    net = built(make)
    x = batch_for(net)
    model = attached(net, algorithm)
    (classification(model(x)) + 0.01 * sum(p.square().sum() for p in net.parameters())).backward()
    decay = {name: p.detach() for name, p in net.named_parameters()}
    assert_equal(gradients_of(net), total((1.0, expected(algorithm, net, x)), (0.02, decay)))


# ---- several forwards


@every_net
@every_algorithm
def test_two_forwards_before_one_backward_add_up(
    make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm
) -> None:
    net = built(make)
    one, two = batch_for(net, 1), batch_for(net, 2, size=3)
    model = attached(net, algorithm)
    (classification(model(one)) + 0.5 * regression(model(two))).backward()
    second = expected(algorithm, net, two, lambda output: 0.5 * regression(output))
    assert_equal(gradients_of(net), total((1.0, expected(algorithm, net, one)), (1.0, second)))


@every_net
@every_algorithm
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["same order", "reverse order"])
def test_two_forwards_with_backwards_of_their_own_keep_apart(
    make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm, order: tuple[int, int]
) -> None:
    net = built(make)
    inputs = [batch_for(net, 1), batch_for(net, 2)]
    model = attached(net, algorithm)
    losses = [classification(model(x)) for x in inputs]
    for which in order:
        model.zero_grad()
        losses[which].backward()
        assert_equal(gradients_of(net), expected(algorithm, net, inputs[which]))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    yield
    model.train()


@every_algorithm
@pytest.mark.parametrize("how", ["with gradients", "no_grad", "inference_mode", "eval", "eval and no_grad"])
def test_another_forward_in_between_changes_nothing(algorithm: torch2ebm.Algorithm, how: str) -> None:
    net = built(cnn)
    x, other = batch_for(net, 1), batch_for(net, 2)
    model = attached(net, algorithm)
    loss = classification(model(x))
    if how == "with gradients":
        model(other)
    elif how == "no_grad":
        with torch.no_grad():
            model(other)
    elif how == "inference_mode":
        with torch.inference_mode():
            model(other)
    elif how == "eval":
        with evaluating(model):
            model(other)
    else:
        with evaluating(model), torch.no_grad():
            model(other)
    loss.backward()
    assert_equal(gradients_of(net), expected(algorithm, net, x))


@every_algorithm
def test_a_metric_between_backward_and_step_does_not_stop_the_step(algorithm: torch2ebm.Algorithm) -> None:
    """A forward for an accuracy, with gradients left on: an ordinary loop allows it."""
    net, twin = built(mlp), built(mlp)
    x = batch_for(net)
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.5), model, algorithm)
    classification(model(x)).backward()
    assert 0 <= int((model(x).argmax(1) == labels_for(x)).sum()) <= BATCH
    optimizer.step()
    step_by_hand(twin, torch.optim.SGD(twin.parameters(), lr=0.5), expected(algorithm, twin, x))
    assert_same_parameters(net, twin)


def test_a_step_without_a_backward_is_refused() -> None:
    net = built(mlp)
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.5), model, CODING)
    model(batch_for(net))
    with pytest.raises(LossIndependentError, match=r"loss\.backward"):
        optimizer.step()


@every_algorithm
def test_one_loss_across_two_forwards_is_taken_by_every_algorithm(algorithm: torch2ebm.Algorithm) -> None:
    """``|f(x) - f(x')|`` is no function of one prediction: both relax, side by side (see test_joined_calls)."""
    net = built(mlp)
    x, other = batch_for(net, 1), batch_for(net, 2)
    model = attached(net, algorithm)
    loss = F.mse_loss(model(x), model(other))
    loss.backward()
    if algorithm.reevaluates_loss:
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        return
    left = expected(algorithm, net, x, lambda y: F.mse_loss(y, net(other).detach()))
    right = expected(algorithm, net, other, lambda y: F.mse_loss(net(x).detach(), y))
    assert_equal(gradients_of(net), total((1.0, left), (1.0, right)))


# ---- several backwards


@every_net
@every_algorithm
def test_backward_with_retain_graph_repeats(make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm) -> None:
    net = built(make)
    x = batch_for(net)
    loss = classification(attached(net, algorithm)(x))
    reference = expected(algorithm, net, x)
    for times, retain in ((1, True), (2, True), (3, False)):
        loss.backward(retain_graph=retain)
        assert_equal(gradients_of(net), total((times, reference)))
    with pytest.raises(RuntimeError):
        loss.backward()
    assert_equal(gradients_of(net), total((3, reference)))


@every_algorithm
def test_a_second_backward_through_one_forward_is_refused(algorithm: torch2ebm.Algorithm) -> None:
    net = built(mlp)
    output = attached(net, algorithm)(batch_for(net))
    first, second = classification(output), regression(output)
    first.backward()
    with pytest.raises(GraphFreedError, match="retain_graph=True"):
        second.backward()


@every_algorithm
def test_two_losses_of_one_forward_relax_on_their_own(algorithm: torch2ebm.Algorithm) -> None:
    net = built(mlp)
    x = batch_for(net)
    output = attached(net, algorithm)(x)
    first, second = classification(output), regression(output)
    first.backward(retain_graph=True)
    second.backward()
    parts = (1.0, expected(algorithm, net, x)), (1.0, expected(algorithm, net, x, regression))
    assert_equal(gradients_of(net), total(*parts))


@every_net
@every_algorithm
def test_autograd_grad_returns_what_backward_writes(
    make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm
) -> None:
    net = built(make)
    x = batch_for(net)
    model = attached(net, algorithm)
    found = torch.autograd.grad(classification(model(x)), list(net.parameters()))
    assert_equal(dict(zip(dict(net.named_parameters()), found, strict=True)), expected(algorithm, net, x))
    assert gradients_of(net) == {}


@every_algorithm
def test_backward_with_inputs_writes_those_alone(algorithm: torch2ebm.Algorithm) -> None:
    net = built(mlp)
    x = batch_for(net)
    classification(attached(net, algorithm)(x)).backward(inputs=[net[1][0].weight])
    assert_equal(gradients_of(net), {"1.0.weight": expected(algorithm, net, x)["1.0.weight"]})


@every_algorithm
def test_higher_order_gradients_are_refused(algorithm: torch2ebm.Algorithm) -> None:
    net = built(mlp)
    loss = classification(attached(net, algorithm)(batch_for(net)))
    with pytest.raises(HigherOrderGradientError, match="create_graph"):
        loss.backward(create_graph=True)
    assert gradients_of(net) == {}


@every_algorithm
def test_a_loss_without_a_gradient_is_refused(algorithm: torch2ebm.Algorithm) -> None:
    net = built(mlp)
    output = attached(net, algorithm)(batch_for(net))
    with pytest.raises((LossIndependentError, RuntimeError)):
        classification(output.detach()).backward()


# ---- frozen parameters, optimizers, schedulers


def step_by_hand(
    twin: nn.Module, optimizer: torch.optim.Optimizer, gradients: Gradients, clip: float | None = None
) -> None:
    """A step of an ordinary optimizer with the oracle's gradients."""
    for name, parameter in twin.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None
    if clip is not None:
        norm = torch.stack([p.grad.norm() for p in twin.parameters()]).norm()
        for parameter in twin.parameters():
            parameter.grad *= min(1.0, clip / (float(norm) + 1e-6))
    optimizer.step()


def assert_same_parameters(net: nn.Module, twin: nn.Module) -> None:
    for (name, ours), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= 10 * EXACT, name


@every_net
@every_algorithm
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (2,)], ids=str)
def test_frozen_layers_get_no_gradient_and_unfrozen_ones_do(
    make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm, frozen: tuple[int, ...]
) -> None:
    net = built(make)
    x = batch_for(net)
    everything = expected(algorithm, net, x)
    model = attached(net, algorithm)
    for index in frozen:
        net[index].requires_grad_(False)
    ours = local_gradients(model, (x,), classification)
    assert_equal(ours, {name: g for name, g in everything.items() if int(name[0]) not in frozen})
    net.requires_grad_(True)
    assert_equal(local_gradients(model, (x,), classification), everything)


OPTIMIZERS: dict[str, Callable[[nn.Sequential], torch.optim.Optimizer]] = {
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.3),
    "momentum": lambda net: torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda net: torch.optim.Adam(net.parameters(), lr=0.05),
    "adamw, amsgrad": lambda net: torch.optim.AdamW(net.parameters(), lr=0.05, amsgrad=True),
    "groups": lambda net: torch.optim.SGD(
        [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[1:].parameters(), "momentum": 0.5}], lr=0.4
    ),
}


@every_algorithm
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_three_steps_are_the_optimizers_own_with_the_oracles_gradients(
    algorithm: torch2ebm.Algorithm,
    make_optimizer: Callable[[nn.Sequential], torch.optim.Optimizer],
    set_to_none: bool,
) -> None:
    net, twin = built(mlp), built(mlp)
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(make_optimizer(net), model, algorithm)
    by_hand = make_optimizer(twin)
    for seed in range(3):
        x = batch_for(net, seed)
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) if set_to_none or not seed else not p.grad.any() for p in net.parameters())
        classification(model(x)).backward()
        optimizer.step()
        step_by_hand(twin, by_hand, expected(algorithm, twin, x))
    assert_same_parameters(net, twin)


def adam_step(value: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """The first step of Adam, written out: both moments corrected are the gradient and its square."""
    return value - lr * gradient / (gradient.abs() + 1e-8)


@every_algorithm
def test_the_first_adam_step_written_out(algorithm: torch2ebm.Algorithm) -> None:
    net, twin = built(cnn), built(cnn)
    x = batch_for(net)
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.Adam(net.parameters(), lr=0.01), model, algorithm)
    classification(model(x)).backward()
    optimizer.step()
    gradients = expected(algorithm, twin, x)
    for name, parameter in twin.named_parameters():
        stepped = adam_step(parameter.detach(), gradients[name], 0.01)
        assert (net.get_parameter(name) - stepped).abs().max() <= 1e-9  # |g| may be as small as Adam's epsilon


@every_feedforward_algorithm
def test_a_closure_is_evaluated_and_its_loss_returned(algorithm: torch2ebm.Algorithm) -> None:
    net, twin = built(mlp), built(mlp)
    x = batch_for(net)
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.3), model, algorithm)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = classification(model(x))
        loss.backward()
        return loss

    returned = optimizer.step(closure)
    assert torch.equal(returned, classification(twin(x)))
    step_by_hand(twin, torch.optim.SGD(twin.parameters(), lr=0.3), expected(algorithm, twin, x))
    assert_same_parameters(net, twin)


@every_algorithm
def test_gradients_are_clipped_to_the_norm_asked_for(algorithm: torch2ebm.Algorithm) -> None:
    net, twin = built(cnn), built(cnn)
    x = batch_for(net)
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), model, algorithm)
    classification(model(x)).backward()
    reference = expected(algorithm, twin, x)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    assert abs(float(norm) - float(torch.stack([g.norm() for g in reference.values()]).norm())) <= EXACT
    optimizer.step()
    step_by_hand(twin, torch.optim.SGD(twin.parameters(), lr=1.0), reference, clip=0.05)
    assert_same_parameters(net, twin)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]] = {
    "step": lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.1),
    "one_cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.4, total_steps=6),
}


@every_algorithm
@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_drive_the_wrapped_optimizer(
    algorithm: torch2ebm.Algorithm,
    make_scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
) -> None:
    net, twin = built(mlp), built(mlp)
    model = torch2ebm.convert(net)
    inner, by_hand = (torch.optim.SGD(n.parameters(), lr=0.2, momentum=0.9) for n in (net, twin))
    optimizer = torch2ebm.EnergyOptimizer(inner, model, algorithm)
    ours, theirs = make_scheduler(optimizer), make_scheduler(by_hand)
    for seed in range(5):
        x = batch_for(net, seed)
        optimizer.zero_grad()
        classification(model(x)).backward()
        optimizer.step()
        ours.step()
        step_by_hand(twin, by_hand, expected(algorithm, twin, x))
        theirs.step()
        assert ours.get_last_lr() == theirs.get_last_lr() == [inner.param_groups[0]["lr"]]
        assert inner.param_groups[0]["momentum"] == by_hand.param_groups[0]["momentum"]
    assert_same_parameters(net, twin)


# ---- torch's own wrappers


@every_net
@every_algorithm
@pytest.mark.parametrize("first_call", [True, False])
def test_a_checkpointed_model_has_the_same_gradients(
    make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm, first_call: bool
) -> None:
    net = built(make)
    x = batch_for(net)
    model = attached(net, algorithm)
    if not first_call:
        model(x)
    classification(checkpoint(model, x, use_reentrant=False)).backward()
    assert_equal(gradients_of(net), expected(algorithm, net, x))


@every_net
@every_feedforward_algorithm
def test_functional_call_differentiates_the_parameters_that_it_is_given(
    make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm
) -> None:
    net, other = built(make), built(make, seed=5)
    x = batch_for(net)
    model = attached(net, algorithm)
    parameters = dict(other.named_parameters())
    output = torch.func.functional_call(model, parameters, (x,))
    assert torch.equal(output.detach(), other(x).detach())
    found = torch.autograd.grad(classification(output), list(parameters.values()))
    assert_equal(dict(zip(parameters, found, strict=True)), expected(algorithm, other, x))
    assert_equal(local_gradients(model, (x,), classification), expected(algorithm, net, x))


# ---- criteria


CRITERIA: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "cross_entropy": lambda: (nn.CrossEntropyLoss(), torch.arange(BATCH) % CLASSES),
    "label_smoothing": lambda: (nn.CrossEntropyLoss(label_smoothing=0.2), torch.arange(BATCH) % CLASSES),
    "class_weights": lambda: (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64)),
        torch.tensor([0, 1, 1, 3]),
    ),
    "ignore_index": lambda: (nn.CrossEntropyLoss(ignore_index=2), torch.arange(BATCH) % CLASSES),
    "soft_targets": lambda: (nn.CrossEntropyLoss(), torch.full((BATCH, CLASSES), 0.25, dtype=torch.float64)),
    "mse": lambda: (nn.MSELoss(), torch.ones(BATCH, CLASSES, dtype=torch.float64)),
    "huber": lambda: (nn.HuberLoss(delta=0.5), torch.ones(BATCH, CLASSES, dtype=torch.float64)),
    "bce_with_logits": lambda: (nn.BCEWithLogitsLoss(), torch.ones(BATCH, CLASSES, dtype=torch.float64)),
}


@every_algorithm
@pytest.mark.parametrize("make_criterion", CRITERIA.values(), ids=CRITERIA)
def test_criteria_of_torch_are_recorded(
    algorithm: torch2ebm.Algorithm, make_criterion: Callable[[], tuple[nn.Module, Tensor]]
) -> None:
    net = built(mlp)
    x = batch_for(net)
    criterion, target = make_criterion()
    ours = local_gradients(attached(net, algorithm), (x,), lambda output: criterion(output, target))
    assert_equal(ours, expected(algorithm, net, x, lambda output: criterion(output, target)))


class Cube(torch.autograd.Function):
    """A loss of which the recorder sees nothing: an autograd function of somebody's own."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.pow(3).mean()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        return gradient * 3 * value.square() / value.numel()


@every_net
@every_algorithm
def test_energy_loss_equals_the_recorder(make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm) -> None:
    net = built(make)
    x = batch_for(net)
    model = attached(net, algorithm)
    criterion = torch2ebm.EnergyLoss(classification)
    ours = local_gradients(model, (x,), lambda output: -0.5 * criterion(output))
    assert_equal(ours, expected(algorithm, net, x, lambda output: -0.5 * classification(output)))


@every_algorithm
def test_energy_loss_takes_a_loss_that_the_recorder_cannot_follow(algorithm: torch2ebm.Algorithm) -> None:
    net = built(mlp)
    x = batch_for(net)
    ours = local_gradients(attached(net, algorithm), (x,), torch2ebm.EnergyLoss(Cube.apply))
    assert_equal(ours, expected(algorithm, net, x, lambda output: output.pow(3).mean()))


def test_energy_loss_refuses_a_loss_with_a_dimension() -> None:
    with pytest.raises(LossNotRecordedError, match="no dimension"):
        torch2ebm.EnergyLoss(nn.CrossEntropyLoss(reduction="none"))(torch.zeros(2, 4), torch.tensor([0, 1]))


def test_a_loss_that_draws_random_numbers_is_refused_or_exact() -> None:
    """Replayed at the feed-forward output it has another gradient than autograd delivered."""
    net = built(mlp)
    output = attached(net, CODING)(batch_for(net))
    with pytest.raises(LossNotRecordedError, match="EnergyLoss"):
        classification(F.dropout(output, 0.5)).backward()
    assert gradients_of(net) == {}


@pytest.mark.parametrize("name", ["backprop", "zero_divergence", "fixed_prediction"])
def test_algorithms_that_see_the_loss_once_take_a_random_one(name: str) -> None:
    net = built(mlp)
    x = batch_for(net)
    algorithm = ALGORITHMS[name]

    def noisy(output: Tensor) -> Tensor:
        torch.manual_seed(3)
        return classification(F.dropout(output, 0.5))

    assert_equal(local_gradients(attached(net, algorithm), (x,), noisy), expected(algorithm, net, x, noisy))


# ---- several outputs, losses inside the model


class TwoHeads(nn.Module):
    """Two heads on a trunk, returned as a tuple or a dict."""

    def __init__(self, named: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh())
        self.left, self.right = nn.Linear(7, CLASSES), nn.Linear(7, 3)
        self.named = named

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        hidden = self.trunk(x)
        left, right = self.left(hidden), self.right(hidden)
        return {"left": left, "right": right} if self.named else (left, right)


@pytest.mark.parametrize("named", [False, True], ids=["tuple", "dict"])
@every_feedforward_algorithm
def test_a_loss_of_several_outputs(algorithm: torch2ebm.Algorithm, named: bool) -> None:
    torch.manual_seed(0)
    net = TwoHeads(named).double()
    x = torch.randn(BATCH, FEATURES, dtype=torch.float64)

    def one(output: tuple[Tensor, Tensor] | dict[str, Tensor]) -> Tensor:
        left, right = output.values() if isinstance(output, dict) else output
        return classification(left * right.mean(1, keepdim=True)) + right.square().mean()

    def of_both(output: Tensor) -> Tensor:
        return one((output[:, :CLASSES], output[:, CLASSES:]))

    ours = local_gradients(attached(net, algorithm), (x,), one)
    exact = backprop(net, (x,), one)
    if isinstance(algorithm, torch2ebm.PredictiveCoding):
        heads = [*net.left.parameters(), *net.right.parameters()]
        state = relaxed_chain(
            algorithm,
            [net.trunk, lambda hidden: torch.cat([net.left(hidden), net.right(hidden)], dim=1)],
            [list(net.trunk.parameters()), heads],
            x,
            lambda output: BATCH * of_both(output),
        )
        found = [g / BATCH for layer in state.gradients for g in layer]
        assert_equal(ours, dict(zip(dict(net.named_parameters()), found, strict=True)))
    elif isinstance(algorithm, torch2ebm.FixedPrediction):
        arrived = binomial_tail(algorithm.steps, algorithm.lr, 1)
        assert_equal(ours, {n: g * (arrived if n.startswith("trunk") else 1) for n, g in exact.items()})
    else:
        assert_equal(ours, exact)


@pytest.mark.parametrize("named", [False, True], ids=["tuple", "dict"])
@every_feedforward_algorithm
def test_an_output_that_no_loss_reads_learns_nothing(algorithm: torch2ebm.Algorithm, named: bool) -> None:
    torch.manual_seed(0)
    net = TwoHeads(named).double()
    x = torch.randn(BATCH, FEATURES, dtype=torch.float64)
    model = attached(net, algorithm)
    output = model(x)
    classification(output["left"] if named else output[0]).backward()
    assert all(p.grad is None or not p.grad.any() for p in net.right.parameters())
    chain = nn.Sequential(net.trunk, net.left)
    reference = expected(algorithm, chain, x)
    ours = {n: g for n, g in gradients_of(net).items() if not n.startswith("right")}
    assert_equal(ours, dict(zip(ours, reference.values(), strict=True)))


class OwnsItsLoss(nn.Module):
    """As the models of Hugging Face: with labels it returns the loss, or the loss and the logits."""

    def __init__(self, net: nn.Sequential, with_logits: bool) -> None:
        super().__init__()
        self.net, self.with_logits = net, with_logits

    def forward(self, x: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logits = self.net(x)
        loss = F.cross_entropy(logits, labels)
        return (loss, logits) if self.with_logits else loss


@every_net
@every_algorithm
@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("factor", [1.0, -0.25])
def test_a_model_that_owns_its_loss_equals_the_external_loss_on_its_logits(
    make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm, with_logits: bool, factor: float
) -> None:
    net = built(make)
    x = batch_for(net)
    model = attached(OwnsItsLoss(net, with_logits), algorithm)
    output = model(x, labels_for(x))
    (factor * (output[0] if with_logits else output)).backward()
    assert_equal(gradients_of(net), expected(algorithm, net, x, lambda y: factor * classification(y)))


# ---- the reduction of the loss


SUMS: dict[str, Loss] = {
    "reduction": lambda y: F.cross_entropy(y, labels_for(y), reduction="sum"),
    "criterion": lambda y: nn.CrossEntropyLoss(reduction="sum")(y, labels_for(y)),
    "position": lambda y: F.cross_entropy(y, labels_for(y), None, None, -100, None, "sum"),
    "method": lambda y: F.cross_entropy(y, labels_for(y), reduction="none").sum(),
    "function": lambda y: torch.sum(F.cross_entropy(y, labels_for(y), reduction="none")),
    "energy_loss": lambda y: torch2ebm.EnergyLoss(nn.CrossEntropyLoss(reduction="sum"))(y, labels_for(y)),
    "partial": lambda y: torch2ebm.EnergyLoss(partial(F.cross_entropy, reduction="sum"))(y, labels_for(y)),
}
every_sum = pytest.mark.parametrize("summed", SUMS.values(), ids=SUMS)


@every_sum
def test_a_summed_loss_is_refused_where_a_mean_is_expected(summed: Loss) -> None:
    net = built(mlp)
    model = attached(net, CODING)
    loss = summed(model(batch_for(net)))
    with pytest.raises(LossReductionError, match="loss_reduction='sum'"):
        loss.backward()
    assert gradients_of(net) == {}


@every_sum
def test_a_summed_loss_of_one_sample_is_its_mean(summed: Loss) -> None:
    net = built(mlp)
    x = batch_for(net, size=1)
    assert_equal(local_gradients(attached(net, CODING), (x,), summed), expected(CODING, net, x))


@every_net
@every_sum
@pytest.mark.parametrize("factor", [1.0, 0.5, -1.0])
def test_a_summed_loss_enters_the_energy_as_it_is_written(
    make: Callable[[], nn.Sequential], summed: Loss, factor: float
) -> None:
    """.grad = dF/dtheta / lambda, F the errors and the sum of the losses."""
    net = built(make)
    x = batch_for(net)
    algorithm = torch2ebm.PredictiveCoding(steps=6, lr=0.2, loss_reduction="sum")
    ours = local_gradients(attached(net, algorithm), (x,), lambda y: factor * summed(y))
    state = relaxed(algorithm, net, x, lambda y: factor * SUMS["reduction"](y))
    assert_equal(ours, by_name(net, state.gradients))


@every_net
def test_a_mean_loss_taken_literally_has_a_lambda_of_one_over_the_batch(make: Callable[[], nn.Sequential]) -> None:
    net = built(make)
    x = batch_for(net)
    algorithm = torch2ebm.PredictiveCoding(steps=6, lr=0.2, loss_reduction="sum")
    ours = local_gradients(attached(net, algorithm), (x,), classification)
    reference = by_name(net, relaxed(algorithm, net, x, classification).gradients)
    assert_equal(ours, reference)
    assert relative_error(ours, expected(CODING, net, x)) > 0.05  # it is not what "mean" gives


@every_net
@every_sum
@pytest.mark.parametrize("name", ["backprop", "zero_divergence", "fixed_prediction"])
def test_a_summed_loss_is_never_refused_by_algorithms_that_see_it_once(
    make: Callable[[], nn.Sequential], summed: Loss, name: str
) -> None:
    net = built(make)
    x = batch_for(net)
    ours = local_gradients(attached(net, ALGORITHMS[name]), (x,), summed)
    assert_equal(ours, expected(ALGORITHMS[name], net, x, SUMS["reduction"]))


@every_net
@every_algorithm
def test_a_batch_of_identical_samples_gives_the_gradient_of_one(
    make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm
) -> None:
    net = built(make)
    x = batch_for(net, size=1)
    model = attached(net, algorithm)

    def first_class(output: Tensor) -> Tensor:
        return F.cross_entropy(output, torch.zeros(len(output), dtype=torch.long))

    one = {name: g.clone() for name, g in local_gradients(model, (x,), first_class).items()}
    five = local_gradients(model, (x.expand(5, *x.shape[1:]).contiguous(),), first_class)
    assert_equal(five, one)


@every_net
@every_algorithm
def test_a_sample_relaxes_the_same_alone_or_in_a_batch(
    make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm
) -> None:
    net = built(make)
    x = batch_for(net)
    model = attached(net, algorithm)
    F.cross_entropy(model(x), labels_for(x)).backward()
    together = model.state
    for row in range(len(x)):
        F.cross_entropy(model(x[row : row + 1]), labels_for(x)[row : row + 1]).backward()
        for name, value in model.state.value.items():
            assert (value[0] - together.value[name][row]).abs().max() <= EXACT
            assert (model.state.error[name][0] - together.error[name][row]).abs().max() <= EXACT
            assert (model.state.energy[name][0] - together.energy[name][row]).abs() <= EXACT


def test_a_mean_loss_taken_literally_relaxes_less_in_a_larger_batch() -> None:
    """The negative twin: with lambda = 1/B a sample is not the same alone."""
    net = built(mlp)
    x = batch_for(net)
    model = attached(net, torch2ebm.PredictiveCoding(steps=6, lr=0.2, loss_reduction="sum"))
    classification(model(x)).backward()
    together = model.state
    classification(model(x[:1])).backward()
    name = next(iter(model.nodes))
    assert (model.state.error[name][0] - together.error[name][0]).norm() > 0.5 * model.state.error[name][0].norm()


@every_net
def test_the_state_holds_what_strict_predictive_coding_ends_with(make: Callable[[], nn.Sequential]) -> None:
    net = built(make)
    x = batch_for(net)
    model = attached(net, CODING)
    (-0.25 * classification(model(x))).backward()
    reference = relaxed(CODING, net, x, lambda y: -0.25 * len(x) * classification(y))
    state = model.state
    for index, name in enumerate(model.nodes):
        error = reference.errors[index]
        assert (state.error[name] - error).abs().max() <= EXACT
        assert (state.prediction[name] - by_prediction(reference)[index]).abs().max() <= EXACT
        assert (state.value[name] - state.prediction[name] - error).abs().max() <= EXACT
        assert (state.energy[name] - 0.5 * error.square().flatten(1).sum(1)).abs().max() <= EXACT


# ---- inputs with a gradient


@every_net
@every_feedforward_algorithm
def test_a_converted_tail_sends_minus_the_sum_of_its_messages_to_its_input(
    make: Callable[[], nn.Sequential], algorithm: torch2ebm.Algorithm
) -> None:
    net = built(make)
    x = batch_for(net).requires_grad_()
    model = attached(net, algorithm)
    (0.5 * classification(model(x))).backward()
    leaf = x.detach().requires_grad_()
    if isinstance(algorithm, torch2ebm.PredictiveCoding):
        state = relaxed(algorithm, net, leaf.detach(), lambda y: 0.5 * len(x) * classification(y))
        (message,) = torch.autograd.grad(net[0](leaf), leaf, state.errors[0])
        reference = -message / len(x) / algorithm.nudging.betas[0]
    else:
        (reference,) = torch.autograd.grad(0.5 * classification(net(leaf)), leaf)
        if isinstance(algorithm, torch2ebm.FixedPrediction):  # e_1 has come along both edges
            reference = binomial_tail(algorithm.steps, algorithm.lr, 2) * reference
    assert_equal({"x": x.grad}, {"x": reference})
    halved = expected(algorithm, net, leaf.detach(), lambda y: 0.5 * classification(y))
    assert_equal(gradients_of(net), halved)


@pytest.mark.parametrize("name", ["backprop", "zero_divergence"])
def test_a_front_before_the_model_learns_by_autograd(name: str) -> None:
    net, front = built(mlp), nn.Linear(3, FEATURES).double()
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    classification(attached(net, ALGORITHMS[name])(front(x).tanh())).backward()
    whole = backprop(nn.Sequential(front, nn.Tanh(), net), (x,), classification)
    assert_equal(gradients_of(front), {n[2:]: g for n, g in whole.items() if n.startswith("0.")})
    assert_equal(gradients_of(net), {n[2:]: g for n, g in whole.items() if n.startswith("2.")})


@every_feedforward_algorithm
def test_a_parameter_without_a_path_to_the_loss_is_the_same_tensor_after_a_step(
    algorithm: torch2ebm.Algorithm,
) -> None:
    torch.manual_seed(0)
    net = TwoHeads().double()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.5), model, algorithm)
    before = net.right.weight.detach().clone()
    classification(model(torch.randn(BATCH, FEATURES, dtype=torch.float64))[0]).backward()
    optimizer.step()
    assert torch.equal(net.right.weight, before)
