"""IL-prox against explicit formulas (Alonso et al. 2022), and what it promises: the target attained, no divergence."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import attached, local_gradients, relative_error, scaled_by
from oracles.proximal_steps import (
    RELU,
    TANH,
    Dense,
    Function,
    Pair,
    Proximal,
    ProximalStep,
    applied,
    cross_entropy_gradient,
    half_squared_error_gradient,
)
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import (
    ConfigurationError,
    DenseLayerError,
    DivergenceError,
    InputGradientError,
    LossCurvatureError,
    LossReductionError,
    NonFiniteError,
)

EXACT = 1e-12
FEATURES, CLASSES = 6, 4
WIDTHS = (FEATURES, 9, 8, CLASSES)
STRONG = {"alpha": 0.7, "steps": 6, "feedback_rate": 0.3, "error_rate": 0.2, "eps": 0.25}  # every term shows

IL = torch2ebm.ProximalInferenceLearning


def chain(activation: type[nn.Module] = nn.Tanh, bias: bool = True, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(WIDTHS):
            layers += [nn.Linear(fan_in, fan_out, bias=bias), activation()]
        net = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    return net


class Skip(nn.Module):
    """The last layer reads two values, and the second value one of them too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(FEATURES, 8), nn.Linear(8, 8, bias=False)
        self.last = nn.Linear(8, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(torch.tanh(first))
        return self.last(torch.tanh(second) + torch.tanh(first))


def layers_of(net: nn.Module) -> list[Dense]:
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    reads = [(0,), (1,), (2, 1)] if isinstance(net, Skip) else [(i,) for i in range(len(linear))]
    return [
        Dense(m.weight.detach().clone(), None if m.bias is None else m.bias.detach().clone(), r)
        for m, r in zip(linear, reads, strict=True)
    ]


def x_of(batch: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(batch: int) -> Tensor:
    return torch.arange(1, batch + 1) % CLASSES


def target(batch: int) -> Tensor:
    return torch.linspace(-2, 2, batch * CLASSES, dtype=torch.float64).reshape(batch, CLASSES)


def half_squared_error(output: Tensor) -> Tensor:
    return (0.5 * (output - target(len(output))).square()).sum(1).mean()


def cross_entropy(output: Tensor) -> Tensor:
    return F.cross_entropy(output, labels(len(output)))


LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[int], Function]]] = {
    "cross_entropy": (cross_entropy, lambda batch: cross_entropy_gradient(labels(batch))),
    "half_squared_error": (half_squared_error, lambda batch: half_squared_error_gradient(target(batch))),
}
ACTIVATIONS: dict[str, tuple[type[nn.Module], Pair]] = {"relu": (nn.ReLU, RELU), "tanh": (nn.Tanh, TANH)}

every_batch = pytest.mark.parametrize("batch", [1, 4])
every_loss = pytest.mark.parametrize("loss", LOSSES)


def gradients_of(net: nn.Module, step: ProximalStep, factor: float = 1.0) -> dict[str, Tensor]:
    """Minus the oracle's changes under the names of the net's parameters."""
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    found = {f"{n}.weight": -factor * change for n, change in zip(names, step.weight_changes, strict=True)}
    biases = zip(names, step.bias_changes, strict=True)
    return found | {f"{n}.bias": -factor * change for n, change in biases if change is not None}


# ---- the formulas


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@every_batch
@every_loss
def test_a_step_is_that_of_the_explicit_formulas(loss: str, batch: int, bias: bool, activation: str) -> None:
    module, pair = ACTIVATIONS[activation]
    net, (objective, gradient) = chain(module, bias), LOSSES[loss]
    model = attached(net, IL(**STRONG))
    ours = local_gradients(model, (x_of(batch),), objective)
    expected = Proximal(layers_of(net), pair, gradient(batch), **STRONG).run(x_of(batch))
    assert relative_error(ours, gradients_of(net, expected)) <= EXACT
    for ours_by_node, theirs in (
        (model.state.value, expected.values),
        (model.state.prediction, expected.predictions),
        (model.state.error, expected.errors),
    ):
        for mine, reference in zip(ours_by_node.values(), theirs, strict=True):
            assert (mine - reference).abs().max() <= EXACT * reference.abs().max()


@every_batch
@every_loss
def test_a_value_with_two_readers_gets_both_messages(loss: str, batch: int) -> None:
    net, (objective, gradient) = Skip(), LOSSES[loss]
    ours = local_gradients(attached(net, IL(**STRONG)), (x_of(batch),), objective)
    expected = Proximal(layers_of(net), TANH, gradient(batch), **STRONG).run(x_of(batch))
    assert relative_error(ours, gradients_of(net, expected)) <= EXACT


PUBLISHED = {
    "IL-prox": (IL, {"steps": 25, "feedback_rate": 0.015, "error_rate": 0.015}),
    "Fast": (IL.fast, {"steps": 12, "feedback_rate": 0.025, "error_rate": 0.0}),
    "Adam": (IL.adam, {"steps": 20, "feedback_rate": 0.02, "error_rate": 0.015}),
}


@pytest.mark.parametrize("form", PUBLISHED)
def test_the_published_forms_are_settings_of_the_same_formulas(form: str) -> None:
    make, settings = PUBLISHED[form]
    net = chain()
    ours = local_gradients(attached(net, make(alpha=2.5, eps=0.25)), (x_of(4),), cross_entropy)
    oracle = Proximal(layers_of(net), TANH, cross_entropy_gradient(labels(4)), alpha=2.5, eps=0.25, **settings)
    assert relative_error(ours, gradients_of(net, oracle.run(x_of(4)))) <= EXACT


def test_the_authors_lagged_target_is_another_algorithm() -> None:
    """Negative twin: with the target of the step before, the changes differ by far more than rounding."""
    net, gradient = chain(), half_squared_error_gradient(target(4))
    ours = local_gradients(attached(net, IL(**STRONG)), (x_of(4),), half_squared_error)
    lagged = Proximal(layers_of(net), TANH, gradient, **STRONG, lagged=True).run(x_of(4))
    assert relative_error(ours, gradients_of(net, lagged)) > 1e-3


def test_inference_runs_the_same_for_a_sample_alone_except_for_the_normaliser() -> None:
    """The only coupling of samples is nm, a mean over the batch: with equal samples there is none."""
    net = chain()
    twice = x_of(1).expand(2, -1)
    alone = local_gradients(attached(copy.deepcopy(net), IL(**STRONG)), (x_of(1),), cross_entropy)
    both = local_gradients(
        attached(net, IL(**STRONG)), (twice,), lambda output: F.cross_entropy(output, labels(1).expand(2))
    )
    assert relative_error(both, alone) <= EXACT


# ---- target attainment: D3 (1)


def attained(net: nn.Sequential, algorithm: torch2ebm.Algorithm, batch: int, loss: str = "cross_entropy") -> float:
    """The largest distance of a feed-forward pass after SGD(lr=1) from where inference ended, over all values."""
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), model, algorithm)
    LOSSES[loss][0](model(x_of(batch))).backward()
    ends = list(model.state.value.values())
    optimizer.step()
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    seen: dict[int, Tensor] = {}
    hooks = [m.register_forward_hook(lambda m, _, out, i=i: seen.update({i: out})) for i, m in enumerate(linear)]
    with torch.no_grad():
        net(x_of(batch))
    for hook in hooks:
        hook.remove()
    return max(float((seen[i] - end).abs().max()) for i, end in enumerate(ends))


@pytest.mark.parametrize("alpha", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("build", [chain, lambda: chain(nn.ReLU), lambda: chain(bias=False), Skip])
@every_loss
def test_the_layers_then_predict_what_inference_came_to(
    loss: str, build: Callable[[], nn.Module], alpha: float
) -> None:
    assert attained(build(), IL(alpha, 6, 0.3, 0.2), 1, loss) <= EXACT


def test_a_ridge_or_a_batch_does_not_reach_the_target() -> None:
    """Negative twins: eps > 0 stops short of it, and one rank-one change cannot serve four samples."""
    assert attained(chain(), IL(1.0, 6, 0.3, 0.2, eps=0.25), 1) > 1e-3
    assert attained(chain(), IL(1.0, 6, 0.3, 0.2), 4) > 1e-3


def distance_after(oracle: Proximal, x: Tensor, factor: Callable[[Dense, int], float]) -> float:
    step = oracle.run(x)
    again = Proximal(applied(oracle.layers, step, factor), oracle.activation, oracle.output_gradient)
    pairs = zip(again.feedforward(x)[1:], step.values, strict=True)
    return max(float((value - end).abs().max()) for value, end in pairs)


def test_without_the_one_for_the_bias_the_target_is_missed() -> None:
    x = x_of(1)
    oracle = Proximal(layers_of(chain()), TANH, cross_entropy_gradient(labels(1)), 1.0, 6, 0.3, 0.2)
    inputs = oracle.inputs([x, *oracle.run(x).values])
    squared = [float((a**2).sum()) for a in inputs]
    assert distance_after(oracle, x, lambda layer, i: 1.0) <= EXACT
    assert distance_after(oracle, x, lambda layer, i: (squared[i] + 1) / squared[i]) > 1e-3


def test_a_norm_summed_over_the_batch_is_another_rule() -> None:
    """The authors' in-loop norm lacks an axis: at four equal samples it would be four times the norm of one."""
    net = chain()
    gradient = cross_entropy_gradient(labels(1).expand(4))
    oracle = Proximal(layers_of(net), TANH, gradient, 1.0, 6, 0.3, 0.2)
    x = x_of(1).expand(4, -1)
    assert distance_after(oracle, x, lambda layer, i: 1.0) <= EXACT
    norms = [
        float(layer.norm(a)) for layer, a in zip(oracle.layers, oracle.inputs([x, *oracle.run(x).values]), strict=True)
    ]
    summed = [1 + 4 * (norm - 1) for norm in norms]
    assert distance_after(oracle, x, lambda layer, i: norms[i] / summed[i]) > 1e-3
    ours = local_gradients(attached(net, IL(1.0, 6, 0.3, 0.2)), (x,), lambda o: F.cross_entropy(o, labels(1).expand(4)))
    assert relative_error(ours, gradients_of(net, oracle.run(x))) <= EXACT


# ---- the scale of the gradients


def test_an_outer_factor_scales_the_gradients_and_nothing_else() -> None:
    net = chain()
    whole = local_gradients(attached(copy.deepcopy(net), IL(**STRONG)), (x_of(4),), cross_entropy)
    scaled = local_gradients(
        attached(net, IL(**STRONG)), (x_of(4),), lambda output: scaled_by(0.25, cross_entropy(output))
    )
    assert relative_error(scaled, {name: 0.25 * g for name, g in whole.items()}) <= EXACT


def test_a_sum_is_taken_as_it_is_written() -> None:
    """With batch 4 the energy holds the sum of the losses either way; dW stays a mean over the batch."""
    net = chain()
    oracle = Proximal(layers_of(net), TANH, cross_entropy_gradient(labels(4)), **STRONG).run(x_of(4))

    def summed(output: Tensor) -> Tensor:
        return F.cross_entropy(output, labels(4), reduction="sum")

    ours = local_gradients(attached(copy.deepcopy(net), IL(**STRONG, loss_reduction="sum")), (x_of(4),), summed)
    assert relative_error(ours, gradients_of(net, oracle)) <= EXACT
    with pytest.raises(LossReductionError, match="loss_reduction='sum'"):
        local_gradients(attached(net, IL(**STRONG)), (x_of(4),), summed)


def test_a_negative_factor_climbs() -> None:
    net = chain()
    gradient = cross_entropy_gradient(labels(4))
    ours = local_gradients(attached(net, IL(**STRONG)), (x_of(4),), lambda output: -cross_entropy(output))
    oracle = Proximal(layers_of(net), TANH, lambda p: -gradient(p), **STRONG).run(x_of(4))
    assert relative_error(ours, gradients_of(net, oracle)) <= EXACT


# ---- what stands where


def test_the_energy_is_the_half_squared_errors_output_included_and_the_loss_stands_beside_it() -> None:
    net = chain()
    model = attached(net, IL(**STRONG))
    local_gradients(model, (x_of(4),), cross_entropy)
    oracle = Proximal(layers_of(net), TANH, cross_entropy_gradient(labels(4)), **STRONG).run(x_of(4))
    relaxation = model.state.relaxation
    assert relaxation.steps == STRONG["steps"] and relaxation.converged is None
    assert [*relaxation.node_energy] == ["0", "2", "4"]
    ours = torch.tensor([*zip(*relaxation.node_energy.values(), strict=True)], dtype=torch.float64)
    torch.testing.assert_close(ours, torch.tensor(oracle.energies, dtype=torch.float64), rtol=EXACT, atol=1e-14)
    torch.testing.assert_close(relaxation.energy, tuple(map(sum, oracle.energies)), rtol=EXACT, atol=1e-14)
    assert relaxation.loss[0] == pytest.approx(4 * float(cross_entropy(net(x_of(4))).detach()), rel=EXACT)
    last = F.cross_entropy(oracle.predictions[-1], labels(4), reduction="sum")
    assert relaxation.loss[-1] == pytest.approx(float(last), rel=EXACT)


@pytest.mark.parametrize(("feedback_rate", "error_rate"), [(0.3, 0.3), (0.3, 0.2), (0.3, 0.0)])
def test_the_residual_is_the_last_change_over_the_feedback_rate(feedback_rate: float, error_rate: float) -> None:
    net = chain()
    model = attached(net, IL(1.0, 6, feedback_rate, error_rate))
    local_gradients(model, (x_of(4),), cross_entropy)
    ends = []
    for steps in (5, 6):
        gradient = cross_entropy_gradient(labels(4))
        oracle = Proximal(layers_of(net), TANH, gradient, 1.0, steps, feedback_rate, error_rate)
        ends.append(oracle.run(x_of(4)).values[:-1])
    change = max(float((after - before).abs().max()) for before, after in zip(*ends, strict=True))
    assert model.state.relaxation.residual == pytest.approx(change / feedback_rate, rel=1e-10)


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # which is what it shows
def test_what_no_error_has_reached_has_a_gradient_of_exactly_zero() -> None:
    """In the oracle too: the error needs two steps to reach the first of three layers' values, and is then its own."""
    net = chain()
    model = attached(net, IL(1.0, 1, 0.3, 0.2))
    ours = local_gradients(model, (x_of(4),), cross_entropy)
    assert model.state.unreached == ("0",)
    assert not ours["0.weight"].any() and not ours["0.bias"].any()
    assert ours["2.weight"].any() and not model.state.error["0"].any()
    local_gradients(deep := attached(net_again := chain(), IL(1.0, 2, 0.3, 0.2)), (x_of(4),), cross_entropy)
    assert deep.state.unreached == () and all(p.grad.any() for p in net_again.parameters())


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # which is what it shows
def test_a_layer_that_reads_zeros_and_has_no_bias_stands_still() -> None:
    """0 / 0 by the formula; the change is e a^T, hence zero."""
    net = chain(nn.ReLU, bias=False)
    ours = local_gradients(attached(net, IL()), (torch.zeros(1, FEATURES, dtype=torch.float64),), cross_entropy)
    assert all(not gradient.any() for gradient in ours.values())


def test_a_frozen_layer_takes_part_in_inference_and_keeps_its_weights() -> None:
    net = chain()
    whole = local_gradients(attached(copy.deepcopy(net), IL(**STRONG)), (x_of(4),), cross_entropy)
    net[2].requires_grad_(False)
    ours = local_gradients(attached(net, IL(**STRONG)), (x_of(4),), cross_entropy)
    assert relative_error(ours, {name: g for name, g in whole.items() if not name.startswith("2.")}) <= EXACT


def test_dropout_keeps_its_mask_while_values_move() -> None:
    net = chain()
    net = nn.Sequential(*net[:4], nn.Dropout(0.5), net[4])
    ours = local_gradients(attached(net, IL(**STRONG)), (x_of(4),), cross_entropy, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mask = F.dropout(torch.ones(4, WIDTHS[2], dtype=torch.float64), 0.5)
    masked: Pair = tuple(  # type: ignore[assignment]
        (lambda h, f=f: f(h) * mask if h.shape == mask.shape else f(h)) for f in TANH
    )
    expected = Proximal(layers_of(net), masked, cross_entropy_gradient(labels(4)), **STRONG).run(x_of(4))
    assert relative_error(ours, gradients_of(net, expected)) <= EXACT


def test_a_scaler_unscales_to_the_same_step() -> None:
    net = chain()
    reference = local_gradients(attached(copy.deepcopy(net), IL(**STRONG)), (x_of(4),), cross_entropy)
    before = copy.deepcopy(net.state_dict())
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), model, IL(**STRONG))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(cross_entropy(model(x_of(4)))).backward()
    scaler.step(optimizer)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - reference[name], rtol=EXACT, atol=1e-14)


def test_accumulated_micro_batches_are_the_mean_of_their_steps() -> None:
    """Each has its own normaliser; the whole batch has another, and is another step."""
    net = chain()
    halves = [cross_entropy_gradient(labels(4)[:2]), cross_entropy_gradient(labels(4)[2:])]
    steps = [
        gradients_of(net, Proximal(layers_of(net), TANH, gradient, **STRONG).run(x))
        for gradient, x in zip(halves, x_of(4).split(2), strict=True)
    ]
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.1), model, IL(**STRONG), accumulation=2
    )
    for x, y in zip(x_of(4).split(2), labels(4).split(2), strict=True):
        (F.cross_entropy(model(x), y) / 2).backward()
    optimizer.detach()
    ours = {name: p.grad for name, p in net.named_parameters()}
    assert relative_error(ours, {name: (steps[0][name] + steps[1][name]) / 2 for name in ours}) <= EXACT


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_model_and_optimizer_trains_on_the_same_way(duplicate: Callable[[tuple], tuple]) -> None:
    net = chain()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), model, IL(**STRONG))
    pairs = [(model, optimizer), duplicate((model, optimizer))]
    for each, stepping in pairs:
        for _ in range(2):
            stepping.zero_grad()
            cross_entropy(each(x_of(4))).backward()
            stepping.step()
    for ours, theirs in zip(pairs[0][0].parameters(), pairs[1][0].parameters(), strict=True):
        assert ours is not theirs and torch.equal(ours, theirs)


def test_a_second_backward_through_a_retained_call_is_the_same() -> None:
    net = chain()
    model = attached(net, IL(**STRONG))
    loss = cross_entropy(model(x_of(4)))
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in net.parameters()]
    loss.backward()
    for parameter, gradient in zip(net.parameters(), first, strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)


def test_autocast_keeps_the_values_in_single_precision() -> None:
    net = chain(nn.ReLU).float()
    model = attached(net, IL(**STRONG))
    whole = local_gradients(model, (x_of(4).float(),), cross_entropy)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cross_entropy(model(x_of(4).float())).backward()
    assert model.state.value["0"].dtype == torch.float32
    for name, parameter in net.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert F.cosine_similarity(parameter.grad.flatten(), whole[name].flatten(), dim=0) > 0.99


# ---- losses


def squared(output: Tensor) -> Tensor:
    return (output - target(len(output))).square().sum(1).mean()


def weighted(output: Tensor) -> Tensor:
    weight = torch.tensor([1.0, 12.0, 12.0, 12.0], dtype=output.dtype)
    return F.cross_entropy(output, labels(len(output)), weight=weight, reduction="none").mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("loss", [squared, weighted], ids=["squared error", "large class weights"])
def test_a_loss_that_is_too_curved_is_refused_with_the_ways_out(
    loss: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    net = chain().to(dtype)
    with torch.no_grad():
        net[-1].weight.mul_(0.1)  # a softmax near 1/4 each, where the weighted cross-entropy is most curved
    model = attached(net, IL())
    with pytest.raises(LossCurvatureError, match="Divide the loss by") as caught:
        loss(model(x_of(4).to(dtype)).to(dtype)).backward()
    assert all(word in str(caught.value) for word in ("curvature", "ImplicitSGD", "PredictiveCoding", "alpha"))
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.filterwarnings(
    "ignore::torch2ebm.errors.NoSignalWarning"
)  # a small alpha leaves little in single precision
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "loss",
    [
        half_squared_error,
        cross_entropy,
        lambda o: F.mse_loss(o, target(len(o)).to(o.dtype)),
        lambda o: F.cross_entropy(o, labels(len(o)), label_smoothing=0.1),
        lambda o: F.binary_cross_entropy_with_logits(o, (target(len(o)) > 0).to(o.dtype)),
        lambda o: F.smooth_l1_loss(o, target(len(o)).to(o.dtype)),
    ],
    ids=["half squared error", "cross-entropy", "MSELoss over 4 features", "smoothed", "binary", "Huber"],
)
def test_a_loss_of_curvature_one_or_less_is_taken(loss: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Large predictions included: the differences must not be drowned by rounding."""
    for size in (1.0, 1e3):
        net = chain().to(dtype)
        with torch.no_grad():
            net[-1].weight.mul_(size)
        model = attached(net, IL(steps=2, feedback_rate=1e-9, error_rate=1e-9))
        loss(model(x_of(4).to(dtype))).backward()
        assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("curvature", [1.01, 1.5, 1.9])
def test_the_limit_of_curvature_is_one(curvature: float) -> None:
    """Half of the squared error times c has curvature c in every sample's prediction."""

    def loss(output: Tensor) -> Tensor:
        return (0.5 * curvature * (output - target(len(output))).square()).sum(1).mean()

    with pytest.raises(LossCurvatureError, match=f"{curvature:.3g}"):
        loss(attached(chain(), IL())(x_of(4))).backward()


def test_a_curved_loss_divided_inside_the_mean_is_the_way_out() -> None:
    """As its error says: half of it has curvature 1."""
    net = chain()
    halved = local_gradients(
        attached(copy.deepcopy(net), IL(**STRONG)), (x_of(4),), lambda o: ((o - target(4)).square().sum(1) / 2).mean()
    )
    oracle = Proximal(layers_of(net), TANH, half_squared_error_gradient(target(4)), **STRONG).run(x_of(4))
    assert relative_error(halved, gradients_of(net, oracle)) <= EXACT


# ---- models


class _Tail(nn.Module):
    def __init__(self, tail: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.tail = chain(), tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.net(x))


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "a softmax after the last layer": lambda: _Tail(lambda out: torch.softmax(out, 1)),
    "a reshape after the last layer": lambda: _Tail(lambda out: out.unflatten(1, (2, 2)).flatten(1)),
    "a weight that two nodes read": _Shared,
    "a norm with parameters": lambda: nn.Sequential(
        nn.Linear(FEATURES, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, CLASSES)
    ).double(),
    "a convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, FEATURES)), nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES)
    ).double(),
}


@pytest.mark.parametrize("build", REFUSED.values(), ids=REFUSED)
def test_a_model_that_is_not_of_dense_layers_is_refused(build: Callable[[], nn.Module]) -> None:
    net = build()
    model = attached(net, IL())
    with pytest.raises(DenseLayerError):
        cross_entropy(model(x_of(4))).backward()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_an_explicit_partition_that_it_cannot_use_names_the_one_to_take() -> None:
    model = attached(chain(), IL(), "layer")
    with pytest.raises(DenseLayerError, match="preactivation"):
        cross_entropy(model(x_of(4))).backward()


@pytest.mark.parametrize("nodes", ["auto", "preactivation"])
def test_the_partition_it_asks_for_is_the_one_before_the_activations(nodes: str) -> None:
    model = attached(chain(), IL(), nodes)
    local_gradients(model, (x_of(4),), cross_entropy)
    assert [node.description for node in model.nodes.values()] == ["Linear", "Tanh > Linear", "Tanh > Linear"]


def test_a_residual_sum_is_a_value_without_weights() -> None:
    """The sum predicts x + f(x) and has an error of its own; what learns are the layers around it."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.inner, self.last = nn.Linear(FEATURES, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            first = self.first(x)
            return self.last(torch.tanh(first + self.inner(torch.tanh(first))))

    net = Residual()
    model = attached(net, IL(1.0, 6, 0.3, 0.2))
    ours = local_gradients(model, (x_of(1),), cross_entropy)
    W = {name: p.detach() for name, p in net.named_parameters()}
    d = lambda h: 1 - torch.tanh(h) ** 2  # noqa: E731
    h1 = x_of(1) @ W["first.weight"].T + W["first.bias"]
    h2 = torch.tanh(h1) @ W["inner.weight"].T + W["inner.bias"]
    gradient = cross_entropy_gradient(labels(1))
    # the sum joins its only reader: h1 is read by the inner layer and by the last one
    for step in range(7):
        p1 = x_of(1) @ W["first.weight"].T + W["first.bias"]
        p2 = torch.tanh(h1) @ W["inner.weight"].T + W["inner.bias"]
        a3 = torch.tanh(h1 + h2)
        p3 = a3 @ W["last.weight"].T + W["last.bias"]
        norm = (a3**2).sum() + 1
        e1, e2, e3 = h1 - p1, h2 - p2, -(norm / (1 + norm)) * gradient(p3)
        if step == 6:
            break
        back = (e3 @ W["last.weight"]) * d(h1 + h2)
        inner = (e2 @ W["inner.weight"]) * d(h1)
        h1, h2 = h1 - 0.2 * e1 + 0.3 * (back + inner), h2 - 0.2 * e2 + 0.3 * back
    expected = {}
    for name, e, a in (("first", e1, x_of(1)), ("inner", e2, torch.tanh(h1)), ("last", e3, a3)):
        size = (a**2).sum() + 1
        expected |= {f"{name}.weight": -(e.T @ a) / size, f"{name}.bias": -e[0] / size}
    assert relative_error(ours, expected) <= EXACT


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.left = nn.Linear(FEATURES, 5), nn.Linear(5, CLASSES)
        self.right = nn.Linear(5, CLASSES, bias=False)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.left(torch.tanh(h)), self.right(torch.relu(h))


@pytest.mark.parametrize("both", [True, False])
def test_every_output_has_a_normaliser_of_its_own(both: bool) -> None:
    """Two heads with other inputs, one without a bias; a head that the loss leaves out sends nothing and stays."""
    net, x, alpha, eps = _TwoHeads(), x_of(4), 0.7, 0.25
    model = attached(net, IL(alpha, 4, 0.3, 0.2, eps))
    left, right = model(x)
    (cross_entropy(left) + (0.5 * cross_entropy(right) if both else 0.0)).backward()
    W = {name: p.detach() for name, p in net.named_parameters()}
    p1 = x @ W["trunk.weight"].T + W["trunk.bias"]
    h, gradient = p1, cross_entropy_gradient(labels(4))
    for step in range(5):
        a, b = torch.tanh(h), torch.relu(h)
        norm_a, norm_b = (a**2).sum(1).mean() + 1 + eps, (b**2).sum(1).mean() + eps
        e1 = h - p1
        ea = -(alpha * norm_a / (1 + alpha * norm_a)) * gradient(a @ W["left.weight"].T + W["left.bias"])
        eb = -(alpha * norm_b / (1 + alpha * norm_b)) * (0.5 * both) * gradient(b @ W["right.weight"].T)
        if step < 4:
            message = (ea @ W["left.weight"]) * (1 - a**2) + (eb @ W["right.weight"]) * (h > 0)
            h = h - 0.2 * e1 + 0.3 * message
    norm = (x**2).sum(1).mean() + 1 + eps
    expected = {
        "trunk.weight": -e1.T @ x / 4 / norm,
        "trunk.bias": -e1.mean(0) / norm,
        "left.weight": -ea.T @ a / 4 / norm_a,
        "left.bias": -ea.mean(0) / norm_a,
        "right.weight": -eb.T @ b / 4 / norm_b,
    }
    ours = {name: p.grad for name, p in net.named_parameters()}
    if not both:
        assert not ours.pop("right.weight").any() and not expected.pop("right.weight").any()
        assert model.state.unreached == ("right",)
    assert relative_error(ours, expected) <= EXACT


def test_inputs_that_want_a_gradient_are_refused() -> None:
    x = x_of(4).requires_grad_()
    with pytest.raises(InputGradientError):
        cross_entropy(attached(chain(), IL())(x)).backward()


# ---- numbers that go wrong


def test_a_relaxation_that_runs_away_is_an_error_with_its_curve() -> None:
    net = chain(nn.ReLU)
    model = attached(net, IL(1.0, 400, 1e6, 1e6))
    with pytest.raises(DivergenceError, match="inference step") as caught:
        cross_entropy(model(x_of(4))).backward()
    assert math.isfinite(caught.value.energy[0]) and not caught.value.energy[-1] <= 1e3 * caught.value.energy[0]
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_target_that_is_no_number_is_an_error_of_the_first_step() -> None:
    model = attached(chain(), IL())
    with pytest.raises(NonFiniteError):
        (0.5 * (model(x_of(4)) - torch.full((4, CLASSES), torch.nan)).square()).mean().backward()


def test_no_learning_rate_makes_it_diverge_where_gradient_descent_does() -> None:
    """D4 in small: 60 steps with one sample at a time, on a task that all rates can be learnt at."""

    def last_losses(make: Callable[[nn.Module], torch.optim.Optimizer], algorithm: torch2ebm.Algorithm) -> float:
        net = chain(nn.ReLU)
        model = torch2ebm.convert(net)
        optimizer = torch2ebm.EnergyOptimizer(make(net), model, algorithm)
        losses = []
        for step in range(60):
            x, y = x_of(1, step % 6), torch.tensor([step % 3])
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return sum(losses[-6:]) / 6

    for alpha in (1.0, 10.0, 100.0):
        assert last_losses(lambda net: torch.optim.SGD(net.parameters(), lr=1.0), IL(alpha)) < math.log(3)
    for lr in (10.0, 100.0):
        try:
            end = last_losses(lambda net, lr=lr: torch.optim.SGD(net.parameters(), lr=lr), torch2ebm.Backprop())
        except NonFiniteError:
            continue
        assert end > math.log(3)


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), "a", None])
@pytest.mark.parametrize("name", ["error_rate", "eps"])
def test_zero_is_legal_where_less_is_not(name: str, value: object) -> None:
    IL(**{name: 0})
    with pytest.raises(ConfigurationError, match=rf"\({name}="):
        IL(**{name: value})


def test_with_steps_keeps_everything_else() -> None:
    changed = IL(**STRONG, loss_reduction="sum").with_steps(3)
    assert repr(changed) == repr(IL(**{**STRONG, "steps": 3}, loss_reduction="sum"))
