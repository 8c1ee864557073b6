"""Several calls and one loss: they relax side by side, each with values of its own."""

import threading
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers import attached, relative_error
from oracles.whole_losses import TwoLayers
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import DivergenceError

EXACT = 1e-12
STEPS, RATE = 8, 0.1
BATCH, CLASSES = 5, 3


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


VIEWS = [numbers(BATCH, 4, seed=seed) for seed in (1, 2, 3)]
Y = torch.tensor([0, 1, 2, 0, 1])


def contrastive(a: Tensor, b: Tensor) -> Tensor:
    return F.cross_entropy(F.normalize(a) @ F.normalize(b).t() / 0.5, torch.arange(BATCH))


def r_drop(a: Tensor, b: Tensor) -> Tensor:
    p, q = F.log_softmax(a, 1), F.log_softmax(b, 1)
    there, back = [F.kl_div(*pair, reduction="batchmean", log_target=True) for pair in ((p, q), (q, p))]
    return 0.5 * (F.cross_entropy(a, Y) + F.cross_entropy(b, Y)) + 0.15 * (there + back)


def siamese(a: Tensor, b: Tensor) -> Tensor:
    alike = (torch.arange(BATCH) % 2).double()
    distance = F.pairwise_distance(a, b)
    return (alike * distance.square() + (1 - alike) * F.relu(1 - distance).square()).mean()


JOINED: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "the distance of two": (2, F.mse_loss),
    "two views": (2, contrastive),
    "R-Drop": (2, r_drop),
    "siamese": (2, siamese),
    "a triplet": (3, lambda a, b, c: F.triplet_margin_loss(a.tanh(), b, c.tanh())),
    "a product of losses": (2, lambda a, b: F.cross_entropy(a, Y) * F.cross_entropy(b, Y)),
    "the mean of outputs": (3, lambda *outputs: F.cross_entropy(torch.stack(outputs).mean(0), Y)),
    "a sum of losses": (2, lambda a, b: F.cross_entropy(a, Y) + 0.3 * a.square().mean() + 0.2 * F.cross_entropy(b, Y)),
}
joined = pytest.mark.parametrize(("calls", "loss"), JOINED.values(), ids=JOINED)


def learned(inputs: Sequence[Tensor], loss: Callable[..., Tensor], algorithm: torch2ebm.Algorithm) -> dict[str, Tensor]:
    module = net()
    model = attached(module, algorithm)
    loss(*[model(x) for x in inputs]).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@joined
def test_calls_relax_together(calls: int, loss: Callable[..., Tensor]) -> None:
    ours = learned(VIEWS[:calls], loss, torch2ebm.PredictiveCoding(STEPS, RATE))
    expected = TwoLayers(net(), 2, VIEWS[:calls], loss, BATCH).gradients(STEPS, RATE)
    assert relative_error(ours, expected) <= EXACT


def test_one_by_one_is_another_relaxation() -> None:
    """The negative twin: with the other view standing still the gradient differs."""
    still = [net()(x).detach() for x in VIEWS]
    a = TwoLayers(net(), 2, VIEWS[:1], lambda a: contrastive(a, still[1]), BATCH).gradients(STEPS, RATE)
    b = TwoLayers(net(), 2, VIEWS[1:2], lambda b: contrastive(still[0], b), BATCH).gradients(STEPS, RATE)
    together = TwoLayers(net(), 2, VIEWS[:2], contrastive, BATCH).gradients(STEPS, RATE)
    assert relative_error({name: a[name] + b[name] for name in a}, together) > 1e-3


@joined
@pytest.mark.parametrize("name", ["ZeroDivergence", "Backprop"])
def test_algorithms_that_see_the_loss_once_are_autograd(name: str, calls: int, loss: Callable[..., Tensor]) -> None:
    module = net()
    loss(*[module(x) for x in VIEWS[:calls]]).backward()
    expected = {n: p.grad for n, p in module.named_parameters()}
    assert relative_error(learned(VIEWS[:calls], loss, getattr(torch2ebm, name)()), expected) <= EXACT


SMALL_NUDGES = {
    "PredictiveCoding": torch2ebm.PredictiveCoding(200, 0.2, nudging=torch2ebm.Symmetric(1e-4)),
    "ErrorDescent": torch2ebm.PredictiveCoding(
        solver=torch2ebm.ErrorDescent(200, 0.2), nudging=torch2ebm.Symmetric(1e-4)
    ),
}


@joined
@pytest.mark.parametrize("algorithm", SMALL_NUDGES.values(), ids=SMALL_NUDGES)
def test_small_nudges_of_joined_calls_tend_to_backprop(
    algorithm: torch2ebm.Algorithm, calls: int, loss: Callable[..., Tensor]
) -> None:
    module = net()
    loss(*[module(x) for x in VIEWS[:calls]]).backward()
    expected = {n: p.grad for n, p in module.named_parameters()}
    assert relative_error(learned(VIEWS[:calls], loss, algorithm), expected) <= 1e-3


def test_two_models_of_one_loss_relax_together() -> None:
    """As the encoders of pictures and of texts do: F is the sum of both, the loss on both."""
    one, other = net(0), net(1)
    models = [attached(module, torch2ebm.PredictiveCoding(STEPS, RATE)) for module in (one, other)]
    contrastive(*[model(x) for model, x in zip(models, VIEWS, strict=False)]).backward()
    values = [module[:2](x).detach() for module, x in ((one, VIEWS[0]), (other, VIEWS[1]))]

    def energy(values: Sequence[Tensor]) -> Tensor:
        errors = [values[0] - one[:2](VIEWS[0]), values[1] - other[:2](VIEWS[1])]
        own = sum(0.5 * error.square().sum() for error in errors)
        return own + BATCH * contrastive(one[2](values[0]), other[2](values[1]))

    for _ in range(STEPS):
        leaves = [value.requires_grad_() for value in values]
        slopes = torch.autograd.grad(energy(leaves), leaves)
        values = [(value - RATE * slope).detach() for value, slope in zip(leaves, slopes, strict=True)]
    parameters = [*one.parameters(), *other.parameters()]
    expected = torch.autograd.grad(energy(values) / BATCH, parameters)
    pairs = list(zip(parameters, expected, strict=True))
    assert max(float((p.grad - g).abs().max()) for p, g in pairs if p.grad is not None) <= EXACT
    assert all(p.grad is not None for p in parameters)


def test_a_rollout_is_one_loss() -> None:
    """REINFORCE: a call a step, actions drawn, and the sum over steps of log-probabilities times returns."""
    module = net()
    model = attached(module, torch2ebm.PredictiveCoding(STEPS, RATE))
    states = [numbers(1, 4, seed=seed) for seed in range(4)]
    returns = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    logs, actions = [], []
    for state in states:
        policy = torch.distributions.Categorical(logits=model(state))
        action = policy.sample()
        actions.append(action)
        logs.append(policy.log_prob(action))
    (-(torch.cat(logs) * returns).sum()).backward()

    def loss(*outputs: Tensor) -> Tensor:
        chosen = [F.log_softmax(o, 1).gather(1, a[:, None]) for o, a in zip(outputs, actions, strict=True)]
        return -sum(r * log.sum() for r, log in zip(returns, chosen, strict=True))

    ours = {name: p.grad for name, p in module.named_parameters()}
    assert relative_error(ours, TwoLayers(net(), 2, states, loss, 1).gradients(STEPS, RATE)) <= EXACT


def test_batches_of_two_sizes_each_have_their_own_mean() -> None:
    """The sum of two mean losses: each sample's energy has its own loss once."""
    module = net()
    model = attached(module, torch2ebm.PredictiveCoding(STEPS, RATE))
    small = VIEWS[1][:2]
    (F.cross_entropy(model(VIEWS[0]), Y) + F.cross_entropy(model(small), Y[:2])).backward()
    one = TwoLayers(net(), 2, VIEWS[:1], lambda o: F.cross_entropy(o, Y), BATCH).gradients(STEPS, RATE)
    two = TwoLayers(net(), 2, [small], lambda o: F.cross_entropy(o, Y[:2]), 2).gradients(STEPS, RATE)
    ours = {name: p.grad for name, p in module.named_parameters()}
    assert relative_error(ours, {name: one[name] + two[name] for name in one}) <= EXACT


def test_an_earlier_output_that_is_detached_is_an_input_like_any_other() -> None:
    """Truncated backpropagation through time."""
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    twin = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    twin.load_state_dict(module.state_dict())
    model = attached(module, torch2ebm.PredictiveCoding(STEPS, RATE))
    state, target = VIEWS[0], numbers(BATCH, 4, seed=7)
    for _ in range(3):
        model.zero_grad()
        given = state
        output = model(given)
        assert type(output.detach()) is Tensor
        state = output.detach()
        F.mse_loss(output, target).backward()
        expected = TwoLayers(twin, 2, [given], lambda o: F.mse_loss(o, target), BATCH).gradients(STEPS, RATE)
        assert relative_error({n: p.grad for n, p in module.named_parameters()}, expected) <= EXACT


def test_a_call_that_was_given_an_output_sends_back_a_pull_that_stands_still() -> None:
    """The generator's step through a converted discriminator: one relaxes, then the other."""
    generator, judge = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double(), net(1)
    algorithm = torch2ebm.PredictiveCoding(STEPS, RATE)
    made = attached(generator, algorithm)(VIEWS[0])
    F.cross_entropy(attached(judge, algorithm)(made), Y).backward()
    fake = generator(VIEWS[0]).detach().requires_grad_()
    problem = TwoLayers(judge, 2, [fake.detach()], lambda o: F.cross_entropy(o, Y), BATCH)
    ours = {n: p.grad for n, p in judge.named_parameters()}
    assert relative_error(ours, problem.gradients(STEPS, RATE)) <= EXACT
    (value,) = problem.relaxed(STEPS, RATE)
    error = value - judge[:2](fake)
    (pull,) = torch.autograd.grad(0.5 * error.square().sum() / BATCH, fake)
    twin = TwoLayers(generator, 2, [VIEWS[0]], lambda o: (o * pull).sum(), BATCH)
    ours = {n: p.grad for n, p in generator.named_parameters()}
    assert relative_error(ours, twin.gradients(STEPS, RATE)) <= 1e-11


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # all units of the judge are one
def test_a_gradient_scaler_reaches_the_call_before() -> None:
    grads = []
    for factor in (1.0, 1024.0):
        generator, judge = net(2), nn.Sequential(nn.Linear(CLASSES, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
        judge.load_state_dict({k: torch.full_like(v, 0.1) for k, v in judge.state_dict().items()})
        algorithm = torch2ebm.PredictiveCoding(STEPS, RATE)
        loss = F.cross_entropy(attached(judge, algorithm)(attached(generator, algorithm)(VIEWS[0])), Y)
        torch.amp.GradScaler("cpu", init_scale=factor).scale(loss).backward()
        grads.append({n: p.grad / factor for n, p in generator.named_parameters()})
    assert relative_error(grads[1], grads[0]) <= EXACT


def test_the_graph_may_be_kept_for_a_second_backward() -> None:
    module = net()
    model = attached(module, torch2ebm.PredictiveCoding(STEPS, RATE))
    loss = contrastive(model(VIEWS[0]), model(VIEWS[1]))
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in module.named_parameters()}
    loss.backward()
    assert relative_error({n: p.grad / 2 for n, p in module.named_parameters()}, once) <= EXACT
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize(
    "algorithm",
    [
        torch2ebm.EquilibriumPropagation(torch2ebm.Symmetric(1e-3)),
        torch2ebm.PredictiveCoding(solver=torch2ebm.AndersonErrorDescent(6, 0.2)),
        torch2ebm.PredictiveCoding(5, 0.1, compile=True),
        torch2ebm.IncrementalPredictiveCoding(3, 0.1),
    ],
    ids=lambda algorithm: type(algorithm).__name__,
)
@pytest.mark.filterwarnings("ignore:compile=True", "ignore:The free phase has not settled")
def test_every_algorithm_takes_a_loss_of_two_calls_and_leaves_no_thread(algorithm: torch2ebm.Algorithm) -> None:
    before = threading.active_count()
    module = net()
    model = torch2ebm.convert(module)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), model, algorithm)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(model(VIEWS[0]), model(VIEWS[1])).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in module.parameters())
    assert threading.active_count() == before


def test_a_relaxation_that_diverges_ends_all_of_them() -> None:
    before = threading.active_count()
    module = net()
    model = attached(module, torch2ebm.PredictiveCoding(60, 30.0))
    loss = (model(VIEWS[0]) * model(VIEWS[1])).square().mean()
    with pytest.raises(DivergenceError):
        loss.backward()
    assert threading.active_count() == before
    assert all(p.grad is None for p in module.parameters())
