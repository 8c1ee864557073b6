"""What makes a loop of forward passes wrong in train mode: each trap with a naive twin that falls into it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles.graphs import backprop
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch2ebm
from torch2ebm.engine.call import Call

WIDTH, STEPS, BATCH = 8, 6, 5

ALGORITHMS = (
    torch2ebm.PredictiveCoding(steps=STEPS, lr=0.05),
    torch2ebm.FixedPrediction(steps=STEPS, lr=0.5),
    torch2ebm.ZeroDivergence(),
    torch2ebm.ZeroDivergence(schedule="levels"),
)

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double().train()


def loss_of(output: Tensor) -> Tensor:
    return 0.5 * (output - normal(*output.shape, seed=4).to(output)).square().mean()


def step(module: nn.Module, x: Tensor, algorithm: torch2ebm.Algorithm, nodes: Any = "auto") -> torch2ebm.EnergyModel:
    """One forward and backward from one seed; the model it was done with."""
    model = torch2ebm.convert(module, nodes=nodes, example_inputs=x)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(module.parameters(), lr=0.0), model, algorithm)
    torch.manual_seed(0)
    loss_of(model(x)).backward()
    optimizer.step()
    return model


def one_forward(module: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return module(x)


def naive_inference(module: nn.Module, x: Tensor) -> None:
    """Predictive coding written as a loop of forward passes, one an inference step."""
    torch.manual_seed(0)
    for _ in range(STEPS):
        module(x)


def same_buffers(module: nn.Module, twin: nn.Module) -> bool:
    return all(torch.equal(buffer, twin.get_buffer(name)) for name, buffer in module.named_buffers())


def fed_forward(make: Callable[[], nn.Module], x: Tensor, nodes: str = "layer", freeze: bool = False) -> Call:
    model = torch2ebm.convert(seeded(make), nodes=nodes, example_inputs=x)
    torch.manual_seed(0)
    run = model.torch2ebm.new_call((x,), {})
    run.feedforward(keep_graph=False, freeze_statistics=freeze)  # as for an algorithm that moves values
    return run


def energy_at_zero_displacement(run: Call, evaluate: Callable[..., Any]) -> float:
    """Of all nodes, predicted again from the feed-forward values; exactly zero where nothing is drawn anew."""
    energy = 0.0
    for node in run.graph.nodes.values():
        predictions = evaluate(node, [run.values[slot] for slot in node.reads])
        for slot, prediction in zip(node.slots, predictions, strict=True):
            energy += float(0.5 * (run.values[slot] - prediction).detach().square().sum())
    return energy


def ours(run: Call) -> Callable[..., Any]:
    return lambda node, inputs: run.evaluate(node, inputs).predictions


def naive(run: Call) -> Callable[..., Any]:
    """The node's function, run again."""
    return lambda node, inputs: node.evaluate([*inputs, *[run.environment[n] for n in node.constants]])[
        : len(node.slots)
    ]


# ---- batch norm


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2),
        nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 2),
    )  # fmt: skip


@every_algorithm
def test_running_statistics_move_once_a_step(algorithm: torch2ebm.Algorithm) -> None:
    x = normal(BATCH, 3, 8, 8)
    module, twin, looped = seeded(normalised), seeded(normalised), seeded(normalised)
    model = step(module, x, algorithm)
    one_forward(twin, x)
    assert same_buffers(module, twin)
    assert int(module.get_buffer("1.num_batches_tracked")) == 1
    naive_inference(looped, x)
    assert int(looped.get_buffer("1.num_batches_tracked")) == STEPS
    assert not same_buffers(looped, twin)
    loss_of(model(x)).backward()
    one_forward(twin, x)
    assert same_buffers(module, twin)


class Branches(nn.Module):
    """A batch norm before a branch on the data, and another one in each of its sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.before, self.positive, self.negative = (nn.BatchNorm1d(WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(self.a(x))
        return self.c(self.positive(h).tanh() if x.sum() > 0 else self.negative(h.relu()))


@every_algorithm
def test_running_statistics_on_either_side_of_a_branch_move_once_a_step(algorithm: torch2ebm.Algorithm) -> None:
    module, twin = seeded(Branches), seeded(Branches)
    model = torch2ebm.convert(module)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(module.parameters(), lr=0.0), model, algorithm)
    for i, sign in enumerate((1, 1, -1, -1, 1, -1, 1)):  # new, known and unexpected sides
        x = normal(BATCH, WIDTH, seed=i) + sign
        loss_of(model(x)).backward()
        optimizer.step()
        one_forward(twin, x)
        assert same_buffers(module, twin)


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_statistics_leave_samples_independent_and_live_ones_follow_the_values(freeze: bool) -> None:
    run = fed_forward(normalised, normal(BATCH, 3, 8, 8), nodes="module", freeze=freeze)
    node = run.graph.nodes["4"]
    value = run.values[node.reads[0]].detach().clone()
    value[0] += 0.5
    before = run.values[node.slots[0]]
    running = {name: buffer.clone() for name, buffer in run.graph.module.named_buffers()}
    moved = ours(run)(node, [value])[0]
    assert all(torch.equal(buffer, running[name]) for name, buffer in run.graph.module.named_buffers())
    assert not torch.allclose(moved[0], before[0])
    if freeze:
        torch.testing.assert_close(moved[1:], before[1:], rtol=1e-12, atol=1e-12)
    else:
        norm = run.graph.module[4]
        mean, variance = value.mean((0, 2, 3), keepdim=True), value.var((0, 2, 3), correction=0, keepdim=True)
        written_out = (value - mean) / (variance + norm.eps).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(
            -1, 1, 1
        )
        torch.testing.assert_close(moved, written_out, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(moved[1:], before[1:], atol=1e-3)


# ---- random draws


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(torch.tanh(self.a(x)), 0.4, training=self.training))


class AttentionDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.view(x.shape[0], 2, 4)))
        return self.b(self.attention(h, h, h, need_weights=False)[0])


class RecurrentDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(5, 3)
        self.lstm = nn.LSTM(4, 5, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.lstm(torch.tanh(self.a(x.view(x.shape[0], 2, 4))))[0][:, -1])


class SumOfDropped(nn.Module):
    """Two draws in one node, and one whose result a later node reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        kept = (torch.rand_like(h) > 0.3).to(h.dtype)
        h = self.drop(h) + self.drop(self.b(h * kept))
        return self.c(h * kept)


class Noisy(nn.Module):
    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.noise = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), noise

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.noise(self.a(x))))


def around(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), layer(), nn.Tanh(), nn.Linear(WIDTH, 3))


def on_maps(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 6, 1), layer(), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)
    )


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "nn.Dropout": around(lambda: nn.Dropout(0.4)),
    "nn.Dropout(inplace)": around(lambda: nn.Dropout(0.4, inplace=True)),
    "F.dropout": FunctionalDropout,
    "MultiheadAttention": AttentionDropout,
    "LSTM": RecurrentDropout,
    "AlphaDropout": around(lambda: nn.AlphaDropout(0.4)),
    "Dropout2d": on_maps(lambda: nn.Dropout2d(0.4)),
    "FeatureAlphaDropout": on_maps(lambda: nn.FeatureAlphaDropout(0.4)),
    "RReLU": around(nn.RReLU),
    "several draws": SumOfDropped,
    "randn_like": lambda: Noisy(lambda h: h + 0.3 * torch.randn_like(h)),
    "rand of a shape": lambda: Noisy(lambda h: h * (torch.rand(h.shape[0], 1, dtype=h.dtype) + 0.5)),
    "normal_": lambda: Noisy(lambda h: h + torch.empty_like(h).normal_(0, 0.3)),
    "bernoulli": lambda: Noisy(lambda h: h * torch.bernoulli(torch.sigmoid(h.detach()))),
    "gumbel_softmax": lambda: Noisy(lambda h: F.gumbel_softmax(h, tau=0.7)),
    "randperm": lambda: Noisy(lambda h: h + 0.5 * h[torch.randperm(h.shape[0])]),
}

every_random = pytest.mark.parametrize("name", RANDOM)


@every_random
def test_a_draw_is_made_once_a_batch(name: str) -> None:
    run = fed_forward(RANDOM[name], normal(BATCH, WIDTH))
    assert energy_at_zero_displacement(run, ours(run)) == 0.0
    # what is drawn from no value at all belongs to the batch, as its inputs do
    in_a_node = name not in ("rand of a shape", "randperm")
    assert any(node.random for node in run.graph.nodes.values()) == in_a_node
    if in_a_node:
        assert energy_at_zero_displacement(run, naive(run)) > 1e-3


@every_random
def test_with_random_draws_an_infinitesimal_relaxation_stays_where_it_began(name: str) -> None:
    """Errors are of the order of the step size; a draw made anew would be an error of the order of one."""
    model = step(seeded(RANDOM[name]), normal(BATCH, WIDTH), torch2ebm.PredictiveCoding(steps=STEPS, lr=1e-9))
    for curve in model.state.relaxation.node_energy.values():
        assert max(curve) < 1e-14


@every_random
def test_with_random_draws_zero_divergence_is_autograd_of_the_same_draws(name: str) -> None:
    module, x = seeded(RANDOM[name]), normal(BATCH, WIDTH)
    expected = backprop(seeded(RANDOM[name]), (x,), loss_of)
    for schedule in ("reverse", "levels"):
        module.zero_grad()
        step(module, x, torch2ebm.ZeroDivergence(schedule=schedule))
        for parameter_name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[parameter_name], rtol=1e-10, atol=1e-13)


@every_random
def test_the_generator_stands_where_one_forward_pass_leaves_it(name: str) -> None:
    x = normal(BATCH, WIDTH)
    step(seeded(RANDOM[name]), x, ALGORITHMS[0])
    after = torch.get_rng_state()
    one_forward(seeded(RANDOM[name]), x)
    assert torch.equal(torch.get_rng_state(), after)
    naive_inference(seeded(RANDOM[name]), x)
    assert not torch.equal(torch.get_rng_state(), after)


# ---- writes in place


class Writes(nn.Module):
    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.write = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), write
        self.c = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.write(self.b(self.a(x))))


def view_then_base(h: Tensor) -> Tensor:
    """A view that was taken before its base is written sees the write."""
    half = h[:, :4]
    h = h.mul_(0.5)
    return h + torch.cat([half, half], 1)


def base_then_view(h: Tensor) -> Tensor:
    """A base sees what is written on a view of it."""
    h.view(-1, 2, 4)[:, 0].mul_(0.5)
    return h.tanh()


def halves_then_base(h: Tensor) -> Tensor:
    left, right = h[:, :4], h[:, 4:]
    h.add_(1.0)
    return torch.cat([right, left], 1).tanh()


def index_write(h: Tensor) -> Tensor:
    h[:, 0] = h[:, 1] * 2
    return h.tanh()


WRITES = {
    "relu_": lambda h: F.relu(h, inplace=True),
    "a chain": lambda h: h.mul_(0.5).add_(1.0).tanh_(),
    "a view, then its base": view_then_base,
    "a base through its view": base_then_view,
    "halves, then their base": halves_then_base,
    "an index": index_write,
    "a transposed view": lambda h: h.t().mul_(0.5).t().tanh(),
    "copy_": lambda h: h.copy_(h.tanh()),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("nodes", ["layer", "op"])
def test_a_write_in_place_leaves_values_alone(name: str, nodes: str) -> None:
    def make() -> nn.Module:
        return Writes(WRITES[name])

    x = normal(BATCH, WIDTH)
    module, twin = seeded(make), seeded(make)
    expected = backprop(twin, (x,), loss_of)
    model = step(module, x, torch2ebm.ZeroDivergence(), nodes)
    torch.testing.assert_close(model(x).detach(), twin(x).detach(), rtol=0, atol=0)
    for parameter_name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[parameter_name], rtol=1e-10, atol=1e-13)
    model = step(seeded(make), x, torch2ebm.PredictiveCoding(steps=STEPS, lr=1e-9), nodes)
    assert all(max(curve) < 1e-14 for curve in model.state.relaxation.node_energy.values())


@pytest.mark.parametrize("name", [name for name in WRITES if name != "relu_"])
def test_naively_a_write_in_place_overwrites_the_value(name: str) -> None:
    value = normal(BATCH, WIDTH)
    before = value.clone()
    WRITES[name](value)
    assert not torch.equal(value, before)


# ---- buffers that forward writes


class Remembers(nn.Module):
    def __init__(self, remember: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.a, self.b, self.remember = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), remember
        self.register_buffer("last", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("queue", torch.zeros(3 * BATCH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if self.training:
            self.remember(self, h)
        return self.b(h)


def assign(module: Any, h: Tensor) -> None:
    module.last = h.detach().mean(0)


def count_up(module: Any, h: Tensor) -> None:
    module.count += 1


def average_in_place(module: Any, h: Tensor) -> None:
    module.last.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)


def average_assigned(module: Any, h: Tensor) -> None:
    module.last = 0.9 * module.last + 0.1 * h.detach().mean(0)


def average_under_no_grad(module: Any, h: Tensor) -> None:
    with torch.no_grad():
        module.last.copy_(module.last * 0.9 + h.mean(0) * 0.1)


def lerp(module: Any, h: Tensor) -> None:
    module.last.lerp_(h.detach().mean(0), 0.1)


def enqueue(module: Any, h: Tensor) -> None:
    module.queue = torch.cat([h.detach(), module.queue])[: 3 * BATCH]


REMEMBER = {
    f.__name__: f for f in (assign, count_up, average_in_place, average_assigned, average_under_no_grad, lerp, enqueue)
}


@every_algorithm
@pytest.mark.parametrize("name", REMEMBER)
def test_a_buffer_that_forward_writes_moves_once_a_step(name: str, algorithm: torch2ebm.Algorithm) -> None:
    def make() -> nn.Module:
        return Remembers(REMEMBER[name])

    x = normal(BATCH, WIDTH)
    module, twin, looped = seeded(make), seeded(make), seeded(make)
    model = step(module, x, algorithm)
    one_forward(twin, x)
    assert same_buffers(module, twin)
    naive_inference(looped, x)
    assert same_buffers(looped, twin) == (name == "assign")  # the rest moves with every pass
    loss_of(model(x)).backward()
    one_forward(twin, x)
    assert same_buffers(module, twin)
    state = {key: buffer.clone() for key, buffer in module.named_buffers()}
    loss_of(model.eval()(x)).backward()
    assert all(torch.equal(module.get_buffer(key), buffer) for key, buffer in state.items())


# ---- custom autograd functions


class Doubled(torch.autograd.Function):
    """Its backward is not that of its forward."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


saved_apply = Doubled.apply  # at the top of a file, as people write it

CUSTOM = {
    "called by its class": lambda h: Doubled.apply(h),
    "its apply saved before forward": lambda h: saved_apply(h),
    "beside a branch on a shape": lambda h: Doubled.apply(h) if h.dim() == 2 else h,
    "saved, beside a branch on a shape": lambda h: saved_apply(h) if h.dim() == 2 else h,
}


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.OpaqueModuleWarning")  # an apply from before is seen by nobody
@pytest.mark.filterwarnings("ignore::torch2ebm.errors.LoneNodeWarning")
@pytest.mark.parametrize("name", CUSTOM)
def test_a_custom_function_keeps_its_backward(name: str) -> None:
    """Outputs cannot tell: its forward is the identity."""

    def make() -> nn.Module:
        return Writes(CUSTOM[name])

    x = normal(BATCH, WIDTH)
    module, twin = seeded(make), seeded(make)
    expected = backprop(twin, (x,), loss_of)
    step(module, x, torch2ebm.ZeroDivergence())
    for parameter_name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[parameter_name], rtol=1e-10, atol=1e-13)


# ---- checkpoints


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, dropout: float) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.a, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(dropout), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.c(h + checkpoint(self.block, h, use_reentrant=self.reentrant))


@every_algorithm
@pytest.mark.parametrize("nodes", ["layer", ["block"]], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_in_forward_is_right(
    reentrant: bool, dropout: float, nodes: Any, algorithm: torch2ebm.Algorithm
) -> None:
    def make() -> nn.Module:
        return Checkpointed(reentrant, dropout)

    x = normal(BATCH, WIDTH)
    module, twin = seeded(make), seeded(make)
    loss_of(one_forward(twin, x)).backward()  # a reentrant checkpoint knows no torch.autograd.grad
    model = step(module, x, algorithm, nodes)
    torch.manual_seed(0)
    ours_again = model(x).detach()
    torch.testing.assert_close(ours_again, one_forward(twin, x).detach(), rtol=0, atol=0)
    if isinstance(algorithm, torch2ebm.ZeroDivergence):
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(module.get_parameter(name).grad, parameter.grad, rtol=1e-10, atol=1e-13)


# ---- autocast


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def in_bfloat16_and_in_double(algorithm: torch2ebm.Algorithm) -> tuple[torch2ebm.EnergyModel, torch2ebm.EnergyModel]:
    """The same step under autocast, and in float64."""
    module, twin, x = seeded(deep).float(), seeded(deep), normal(BATCH, WIDTH)
    model = torch2ebm.convert(module, example_inputs=x.float())
    torch2ebm.EnergyOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), model, algorithm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x.float())
    loss_of(output.float()).backward()
    return model, step(twin, x, algorithm)


SLOW = {
    "predictive coding": torch2ebm.PredictiveCoding(steps=4, lr=1e-4),
    "fixed prediction": torch2ebm.FixedPrediction(steps=500, lr=1e-3, method="sweep"),
}


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # the first steps are that small
@pytest.mark.parametrize("algorithm", SLOW.values(), ids=SLOW)
def test_under_autocast_small_updates_are_not_lost(algorithm: torch2ebm.Algorithm) -> None:
    """bfloat16 has eight bits: what moves a value by less than a five-hundredth of itself is lost."""
    model, reference = in_bfloat16_and_in_double(algorithm)
    moved, expected = model.state.error["2"].double(), reference.state.error["2"]
    assert (moved - expected).norm() < 0.05 * expected.norm()


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # the first steps are that small
def test_naively_small_updates_are_lost_in_bfloat16() -> None:
    _, reference = in_bfloat16_and_in_double(SLOW["predictive coding"])
    value, update = (kept["2"].to(torch.bfloat16) for kept in (reference.state.prediction, reference.state.error))
    expected = reference.state.error["2"]
    assert ((value + update - value).double() - expected).norm() > 0.3 * expected.norm()


def test_under_autocast_buffers_of_values_and_errors_are_single_precision() -> None:
    model, _ = in_bfloat16_and_in_double(torch2ebm.PredictiveCoding(steps=STEPS, lr=0.05))
    hidden = [node.name for node in model.nodes.values() if not node.is_output]
    assert {model.state.value[name].dtype for name in hidden} == {torch.float32}
    assert {model.state.error[name].dtype for name in hidden} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@every_algorithm
def test_under_autocast_every_error_of_the_state_is_single_precision(algorithm: torch2ebm.Algorithm) -> None:
    model, _ = in_bfloat16_and_in_double(algorithm)
    assert {model.state.error[name].dtype for name in model.nodes} == {torch.float32}


@pytest.mark.parametrize(
    "algorithm",
    [
        torch2ebm.PredictiveCoding(5, 0.1),
        torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent(5, 0.1)),
        torch2ebm.PredictiveCoding(solver=torch2ebm.SequentialDescent(5, 0.1)),
        torch2ebm.FixedPrediction(5, 0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_group_norm_in_channels_last_has_the_same_gradients(algorithm: torch2ebm.Algorithm, whole: bool) -> None:
    """Torch itself crashes where the gradients of the norm's parameters are wanted without its input's."""

    def gradients(memory_format: torch.memory_format) -> list[Tensor]:
        torch.manual_seed(0)
        norm = nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU()) if whole else nn.GroupNorm(2, 8)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).double()
        net.to(memory_format=memory_format)
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64).contiguous(memory_format=memory_format)
        model = torch2ebm.convert(net, nodes=["0", "1", "4"])
        torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        return [parameter.grad for parameter in net.parameters()]

    for ours, theirs in zip(gradients(torch.channels_last), gradients(torch.contiguous_format), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
