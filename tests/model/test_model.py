"""The contract of ``convert``, ``EnergyModel`` and ``EnergyOptimizer``: the module that one had, undisturbed."""

import copy
import gc
import inspect
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from helpers import attached, local_gradients, relative_error, scaled_by
from oracles.graphs import Gradients, backprop, binomial_tail, strict
from torch import Tensor, nn
from zoo import KeywordInput

import torch2ebm
from torch2ebm.errors import (
    AttachmentError,
    BatchDimensionError,
    ConfigurationError,
    DivergenceError,
    NoStateError,
    NotCapturedError,
)

EXACT = 1e-12
BATCH, FEATURES, WIDE, CLASSES = 5, 6, 7, 4

ALGORITHMS: dict[str, torch2ebm.Algorithm] = {
    "backprop": torch2ebm.Backprop(),
    "zero_divergence": torch2ebm.ZeroDivergence(),
    "fixed_prediction": torch2ebm.FixedPrediction(steps=4, lr=0.3),
    "predictive_coding": torch2ebm.PredictiveCoding(steps=6, lr=0.2),
}
CODING = ALGORITHMS["predictive_coding"]
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_net(seed: int = 0) -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Linear(FEATURES, WIDE), nn.Tanh(), nn.Linear(WIDE, CLASSES)), seed)


def normalised_net() -> nn.Sequential:
    """No bias before the batch norm: its gradient would be zero, and all of it rounding."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(FEATURES, WIDE, bias=False), nn.BatchNorm1d(WIDE), nn.Tanh(), nn.Linear(WIDE, CLASSES)
        )
    )


def noisy_net() -> nn.Sequential:
    """Batch norm and dropout, and a buffer that is not saved."""
    net = seeded(
        lambda: nn.Sequential(
            nn.Linear(FEATURES, WIDE), nn.BatchNorm1d(WIDE), nn.Tanh(), nn.Dropout(0.5), nn.Linear(WIDE, CLASSES)
        )
    )
    net.register_buffer("scratch", torch.zeros(2), persistent=False)
    return net


def deep_net(layers: int) -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(
            *[nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh()) for _ in range(layers - 1)],
            nn.Linear(FEATURES, CLASSES),
        )
    )


X = normal(BATCH, FEATURES)
LABELS = torch.arange(BATCH) % CLASSES


def classification(output: Tensor) -> Tensor:
    return F.cross_entropy(output, LABELS)


def loss_sum(output: Tensor) -> Tensor:
    return F.cross_entropy(output, LABELS, reduction="sum")


def gradients_of(net: nn.Module) -> Gradients:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_equal(ours: Gradients, reference: Gradients) -> None:
    assert relative_error(ours, reference) <= EXACT


def coded(net: nn.Module, layers: list[Callable[[Tensor], Tensor]], owners: list[list[nn.Module]]) -> Gradients:
    """Strict predictive coding of a chain of functions by ``CODING``, named as in ``net``."""
    parameters = [[p for module in modules for p in module.parameters()] for modules in owners]
    state = strict(layers, parameters, X, loss_sum, CODING.solver.steps, CODING.solver.lr)
    found = [gradient / BATCH for layer in state.gradients for gradient in layer]
    return dict(zip(dict(net.named_parameters()), found, strict=True))


def normalised(value: Tensor, norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor) -> Tensor:
    """Batch norm with given statistics, written out."""
    return (value - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def coded_with_statistics(net: nn.Sequential, mean: Tensor, variance: Tensor) -> Gradients:
    """Predictive coding of ``normalised_net``, whose batch norm has constant statistics."""
    layers = [net[0], lambda value: normalised(value, net[1], mean, variance).tanh(), net[3]]
    return coded(net, layers, [[net[0]], [net[1]], [net[3]]])


def coded_with_live_statistics(net: nn.Sequential) -> Gradients:
    """The same with the statistics of the values that the batch norm reads, differentiated through."""

    def norm(value: Tensor) -> Tensor:
        return normalised(value, net[1], value.mean(0), value.var(0, correction=0)).tanh()

    return coded(net, [net[0], norm, net[3]], [[net[0]], [net[1]], [net[3]]])


# ---- the module that it came from


def test_parameters_buffers_and_keys_are_the_modules_own() -> None:
    net = noisy_net()
    model = torch2ebm.convert(net, example_inputs=X)
    for ours, theirs in (
        (model.named_parameters(), net.named_parameters()),
        (model.named_buffers(), net.named_buffers()),
    ):
        ours, theirs = list(ours), list(theirs)
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        assert all(a is b for (_, a), (_, b) in zip(ours, theirs, strict=True))
    assert list(model.state_dict()) == list(net.state_dict())
    assert "scratch" not in model.state_dict()
    assert list(model.state_dict(prefix="a.")) == [f"a.{name}" for name in net.state_dict()]


def test_inside_another_module_the_keys_are_the_modules_own_as_well() -> None:
    net = noisy_net()
    outer, twin = nn.Sequential(torch2ebm.convert(net)), nn.Sequential(net)
    assert list(outer.state_dict()) == list(twin.state_dict())
    outer.load_state_dict({name: torch.zeros_like(value) for name, value in twin.state_dict().items()})
    assert not any(p.any() for p in net.parameters())


@pytest.mark.parametrize("into_model", [True, False])
def test_state_dicts_load_both_ways_and_through_a_file(into_model: bool) -> None:
    one, other = plain_net(0), plain_net(1)
    model = torch2ebm.convert(one)
    source, target = (other, model) if into_model else (model, other)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    result = target.load_state_dict(torch.load(file, weights_only=True))
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(model(X).detach(), other(X).detach())
    assert torch.equal(one[0].weight, other[0].weight)


def test_a_state_dict_with_other_keys_is_refused_as_the_module_refuses_it() -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        torch2ebm.convert(plain_net()).load_state_dict({})


@pytest.mark.parametrize("side", ["model", "module"])
def test_modes_set_on_either_side_mean_both(side: str) -> None:
    net = noisy_net()
    model = torch2ebm.convert(net)
    handle = model if side == "model" else net
    for mode in (False, True, False):
        handle.train(mode)
        assert model.training is net.training is net[1].training is net[3].training is mode
    handle.train()
    handle.eval()
    assert model.training is net.training is net[1].training is False
    model.training = True
    assert net.training is True and net[1].training is False


@pytest.mark.parametrize("side", ["model", "module"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_on_either_side_mean_both_and_the_graph_follows(side: str, dtype: torch.dtype) -> None:
    net = normalised_net()
    model = attached(net, CODING)
    classification(model(X)).backward()
    model.zero_grad()
    (model if side == "model" else net).to(dtype)
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in net.parameters()} == {dtype}
    assert net[1].running_mean.dtype == dict(model.named_buffers())["1.running_mean"].dtype == dtype
    classification(model(X.to(dtype))).backward()
    assert {p.grad.dtype for p in net.parameters()} == {dtype}
    net.zero_grad()
    net.double()
    net.load_state_dict(normalised_net().state_dict())
    assert_equal(local_gradients(model, (X,), classification), coded_with_live_statistics(net))


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"hidden": WIDE}
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def generate(self) -> "Configured":
        return self


def test_unknown_attributes_fall_through_to_the_module() -> None:
    net = Configured()
    model = torch2ebm.convert(net)
    assert model.config is net.config
    assert model.layer is net.layer
    assert model.generate() is net
    assert not hasattr(model, "nothing_of_this_name")
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = model.nothing_of_this_name


def test_the_hugging_face_trainer_is_told_to_pass_no_item_count() -> None:
    assert torch2ebm.convert(plain_net()).accepts_loss_kwargs is False


class Choosy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain_net()

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        return scale * self.net(x) if shift is None else self.net(x) + shift


@pytest.mark.parametrize(
    "through",
    [lambda model: model, copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["itself", "copy", "deepcopy", "pickle"],
)
def test_a_model_shows_the_signature_of_its_module(through: Callable[[nn.Module], nn.Module]) -> None:
    """And each its own: ``EnergyModel`` knows of no module."""
    modules = Choosy(), plain_net()
    models = [through(torch2ebm.convert(module)) for module in modules]
    for model, module in zip(models, modules, strict=True):
        assert isinstance(model, torch2ebm.EnergyModel) and type(model).__name__ == "EnergyModel"
        assert inspect.signature(model.forward) == inspect.signature(module.forward)
        shown, own = (inspect.signature(type(each).forward).parameters for each in (model, module))
        assert list(shown) == list(own)
    assert inspect.signature(models[0].forward) != inspect.signature(models[1].forward)
    assert list(inspect.signature(torch2ebm.EnergyModel.forward).parameters) == ["self", "args", "kwargs"]
    assert torch.equal(models[0].forward(X, shift=X[:, :CLASSES]), modules[0](X, shift=X[:, :CLASSES]))


def test_a_forward_that_is_put_in_the_models_place_is_called_and_leaves_no_cycle() -> None:
    """As accelerate does under mixed precision; and the method refers to its model only while it is asked for."""
    model = torch2ebm.convert(plain_net())
    own = model.forward.__func__
    model.forward = MethodType(lambda self, x: own(self, x) + 1, model)
    assert torch.equal(model(X), model.feedforward(X) + 1)
    del model.forward
    assert torch.equal(model(X), model.feedforward(X))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# ---- example inputs and the graph


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_example_inputs_are_positional_or_keywords(form: str) -> None:
    if form == "dict":
        net = seeded(KeywordInput)
        example = {"image": normal(2, 3, 8, 8), "tokens": torch.zeros(2, 5, dtype=torch.long)}
    else:
        net, example = plain_net(), X if form == "tensor" else (X,)
    model = torch2ebm.convert(net, example_inputs=example)
    owned = [name for node in model.nodes.values() for name in node.parameters]
    assert sorted(owned) == sorted(dict(net.named_parameters()))


def test_the_graph_before_any_input_is_an_error_that_names_the_remedy() -> None:
    model = torch2ebm.convert(plain_net())
    with pytest.raises(NotCapturedError, match="example_inputs"):
        _ = model.graph
    with torch.no_grad():
        model(X)
    assert list(model.nodes) == ["0", "2"]


def test_nodes_have_levels_parents_and_the_modules_own_parameters() -> None:
    net = deep_net(4)
    nodes = torch2ebm.convert(net, example_inputs=X).nodes
    assert [node.level for node in nodes.values()] == [3, 2, 1, 0]
    names = list(nodes)
    assert [node.parents for node in nodes.values()] == [(), *[(name,) for name in names[:-1]]]
    assert [node.children for node in nodes.values()] == [*[(name,) for name in names[1:]], ()]
    for index, node in enumerate(nodes.values()):
        assert all(
            ours is theirs for ours, theirs in zip(node.parameters.values(), net[index].parameters(), strict=True)
        )
    with pytest.raises(AttributeError):
        node.level = 7


# ---- what is left undisturbed


@contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """Generators, attributes, registries, hooks, buffers and ``.grad`` are the same before and after."""
    rng = torch.get_rng_state()
    attributes = {name: _shallow(module) for name, module in net.named_modules()}
    contents = {name: value.clone() for name, value in [*net.named_buffers(), *net.named_parameters()]}
    identities = {name: id(value) for name, value in [*net.named_buffers(), *net.named_parameters()]}
    gradients = {name: None if p.grad is None else (id(p.grad), p.grad.clone()) for name, p in net.named_parameters()}
    yield
    assert torch.equal(torch.get_rng_state(), rng)
    assert {name: _shallow(module) for name, module in net.named_modules()} == attributes
    for name, value in [*net.named_buffers(), *net.named_parameters()]:
        assert id(value) == identities[name] and torch.equal(value, contents[name]), name
    for name, parameter in net.named_parameters():
        before = gradients[name]
        assert (parameter.grad is None) == (before is None), name
        assert before is None or (id(parameter.grad) == before[0] and torch.equal(parameter.grad, before[1])), name


def _shallow(module: nn.Module) -> dict[str, object]:
    """Attributes by identity; registries by the identity of what they hold."""
    return {
        name: {key: id(held) for key, held in value.items()} if isinstance(value, dict) else id(value)
        for name, value in vars(module).items()
    }


class HalfWayError(Exception):
    """What a user's own forward raises."""


class Remembering(nn.Module):
    """Its forward writes attributes and a buffer, and may fail in the middle."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.layer, self.fails, self.last = nn.Linear(FEATURES, CLASSES), fails, None
        self.register_buffer("shadow", torch.zeros(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.shadow = self.layer(x).detach().mean(0)
        self.fresh = 1
        if self.fails:
            raise HalfWayError
        return self.layer(x)


@pytest.mark.parametrize("example", [X, None], ids=["with an example", "without"])
def test_convert_leaves_no_trace(example: Tensor | None) -> None:
    net = noisy_net()
    net[0].register_forward_hook(lambda module, args, output: None)
    net[0].weight.register_hook(lambda gradient: gradient)
    torch.manual_seed(3)
    classification(net(X)).backward()
    with undisturbed(net):
        torch2ebm.convert(net, example_inputs=example)


@pytest.mark.parametrize("example", [X, None], ids=["with an example", "without"])
@pytest.mark.parametrize("fails", [False, True], ids=["to its end", "fails half-way"])
def test_convert_leaves_what_forward_writes_as_it_was(fails: bool, example: Tensor | None) -> None:
    net = seeded(lambda: Remembering(fails))
    with undisturbed(net), pytest.raises(HalfWayError) if fails and example is not None else nullcontext():
        torch2ebm.convert(net, example_inputs=example)
    assert net.last is None and not net.shadow.any() and not hasattr(net, "fresh")


@every_algorithm
def test_what_forward_assigns_is_as_the_plain_module_leaves_it(algorithm: torch2ebm.Algorithm) -> None:
    net, twin = seeded(lambda: Remembering(False)), seeded(lambda: Remembering(False))
    model = attached(net, algorithm)
    for seed in (5, 6, 7):
        x = normal(BATCH, FEATURES, seed=seed)
        reference = backprop(twin, (x,), classification)
        twin(x)
        assert_equal(local_gradients(model, (x,), classification), reference)  # one layer: exact for all of them
        assert net.last is twin.last is x and net.fresh == 1
        assert torch.equal(net.shadow, twin.shadow)


@every_algorithm
def test_in_place_activations_keep_their_flag_and_the_right_gradient(algorithm: torch2ebm.Algorithm) -> None:
    def make(inplace: bool) -> nn.Sequential:
        return seeded(
            lambda: nn.Sequential(nn.Linear(FEATURES, WIDE), nn.ReLU(inplace=inplace), nn.Linear(WIDE, CLASSES))
        )

    net = make(True)
    ours = local_gradients(attached(net, algorithm), (X,), classification)
    assert net[1].inplace is True
    reference = local_gradients(attached(make(False), algorithm), (X,), classification)
    assert_equal(ours, reference)


@every_algorithm
def test_a_hook_that_scales_a_gradient_scales_it_once(algorithm: torch2ebm.Algorithm) -> None:
    net = plain_net()
    model = attached(net, algorithm)
    reference = {name: g.clone() for name, g in local_gradients(model, (X,), classification).items()}
    net[0].weight.register_hook(lambda gradient: 3 * gradient)
    reference["0.weight"] *= 3
    assert_equal(local_gradients(model, (X,), classification), reference)


@every_algorithm
def test_hooks_of_parameters_fire_once_a_backward(algorithm: torch2ebm.Algorithm) -> None:
    net = plain_net()
    model = attached(net, algorithm)
    seen: list[str] = []
    net[0].weight.register_hook(lambda gradient: seen.append("hook"))
    net[0].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    classification(model(X)).backward()
    assert seen == ["hook", "accumulated"]


@pytest.mark.parametrize("state", ["plain", "converted", "attached"])
def test_compare_leaves_no_trace(state: str) -> None:
    net = noisy_net()
    torch.manual_seed(3)
    classification(net(X)).backward()
    model = net if state == "plain" else attached(net, CODING) if state == "attached" else torch2ebm.convert(net)
    with undisturbed(net):
        comparison = torch2ebm.compare(model, F.cross_entropy, (X, LABELS), ALGORITHMS, steps=(1, 2))
    assert comparison.algorithms == tuple(ALGORITHMS)
    if state != "plain":
        assert model.algorithm is (CODING if state == "attached" else None)
    for agreement in comparison.agreement["zero_divergence"].values():
        assert agreement.relative_error <= EXACT  # the same dropout mask on both sides


def test_compare_keeps_the_state_of_the_last_backward() -> None:
    model = attached(plain_net(), CODING)
    classification(model(X)).backward()
    state = model.state
    torch2ebm.compare(model, F.cross_entropy, (X, LABELS), [torch2ebm.ZeroDivergence()])
    assert model.state is state


# ---- which algorithm runs when


def counted(net: nn.Module) -> list[int]:
    calls: list[int] = []
    net.register_forward_hook(lambda module, args, output: calls.append(1))
    return calls


@every_algorithm
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_under_no_grad_the_original_module_runs(
    algorithm: torch2ebm.Algorithm, mode: bool, guard: Callable[[], torch.no_grad]
) -> None:
    net = noisy_net()
    twin = copy.deepcopy(net).train(mode)
    model = attached(net, algorithm).train(mode)
    with guard():
        model(X)  # the graph is cut here
        net.load_state_dict(twin.state_dict())
        calls = counted(net)
        torch.manual_seed(0)
        ours = model(X)
        assert calls == [1]
        torch.manual_seed(0)
        assert torch.equal(ours, twin(X)) and type(ours) is Tensor and not ours.requires_grad
    for name, buffer in twin.named_buffers():
        assert torch.equal(net.get_buffer(name), buffer), name


def test_before_an_attach_and_after_detach_it_is_plain_backprop() -> None:
    net = normalised_net()
    reference = backprop(net, (X,), classification)
    model = torch2ebm.convert(net)
    state = copy.deepcopy(net.state_dict())
    assert model.algorithm is None
    assert_equal(local_gradients(model, (X,), classification), reference)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = torch2ebm.EnergyOptimizer(sgd, model, CODING)
    net.load_state_dict(state)
    assert relative_error(local_gradients(model, (X,), classification), reference) > 1e-2
    assert optimizer.detach() is sgd
    assert model.algorithm is None
    net.load_state_dict(state)
    assert_equal(local_gradients(model, (X,), classification), reference)
    with pytest.raises(NoStateError):
        _ = model.state
    (gradient,) = torch.autograd.grad(classification(model(X)), net[3].weight, create_graph=True)
    gradient.square().sum().backward()  # the plain loop, higher orders included


def frozen_reference(algorithm: torch2ebm.Algorithm, net: nn.Sequential) -> Gradients:
    """The gradients of ``normalised_net`` where its batch norm uses its running statistics."""
    if isinstance(algorithm, torch2ebm.PredictiveCoding):
        return coded_with_statistics(net, net[1].running_mean.clone(), net[1].running_var.clone())
    return scaled_by_arrival(algorithm, backprop(net, (X,), classification))


def scaled_by_arrival(algorithm: torch2ebm.Algorithm, exact: Gradients) -> Gradients:
    """FixedPrediction on the chain linear, batch norm, linear."""
    if not isinstance(algorithm, torch2ebm.FixedPrediction):
        return exact
    distance = {"0": 2, "1": 1, "3": 0}
    return {n: binomial_tail(algorithm.steps, algorithm.lr, distance[n[0]]) * g for n, g in exact.items()}


@every_algorithm
def test_in_eval_mode_with_gradients_the_algorithm_runs_on_running_statistics(
    algorithm: torch2ebm.Algorithm,
) -> None:
    net = normalised_net()
    net(normal(9, FEATURES, seed=4))  # statistics that are not those of a fresh module
    model = attached(net, algorithm)
    model.eval()
    before = copy.deepcopy(net.state_dict())
    assert_equal(local_gradients(model, (X,), classification), frozen_reference(algorithm, net))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert set(model.state.value) == {"0", "1", "3"}


@every_algorithm
def test_in_eval_mode_there_is_no_dropout(algorithm: torch2ebm.Algorithm) -> None:
    net = noisy_net().eval()
    model = attached(net, algorithm)
    one = {name: g.clone() for name, g in local_gradients(model, (X,), classification, seed=1).items()}
    assert_equal(local_gradients(model, (X,), classification, seed=2), one)


@every_algorithm
def test_in_train_mode_there_is_dropout(algorithm: torch2ebm.Algorithm) -> None:
    model = attached(noisy_net(), algorithm)
    one = {name: g.clone() for name, g in local_gradients(model, (X,), classification, seed=1).items()}
    assert relative_error(local_gradients(model, (X,), classification, seed=2), one) > 0.1


@every_algorithm
def test_a_single_frozen_batch_norm_is_followed(algorithm: torch2ebm.Algorithm) -> None:
    net = normalised_net()
    model = attached(net, algorithm)
    classification(model(X)).backward()  # in train mode, from one capture
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    assert_equal(local_gradients(model, (X,), classification), frozen_reference(algorithm, net))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_mode_flips_cost_one_capture_a_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch2ebm.model import capture_cache as under_test

    captures: list[int] = []
    real = under_test.capture
    monkeypatch.setattr(under_test, "capture", lambda *args: (captures.append(1), real(*args))[1])
    net = noisy_net()
    model = attached(net, CODING)
    for mode in (True, False, True, False, True):
        model.train(mode)
        for size in (5, 3):
            model(X[:size])
    assert len(captures) == 2
    net[1].eval()
    model(X)
    assert len(captures) == 3


def test_feedforward_is_the_plain_module_whatever_is_attached() -> None:
    net = plain_net()
    model = attached(net, CODING)
    output = model.feedforward(X)
    assert torch.equal(output, net(X))
    classification(output).backward()
    assert_equal(gradients_of(net), backprop(net, (X,), classification))


# ---- attaching


def sgd_of(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def test_a_second_attach_is_refused_until_detach() -> None:
    net = plain_net()
    model = torch2ebm.convert(net)
    first = torch2ebm.EnergyOptimizer(sgd_of(net), model, CODING)
    with pytest.raises(AttachmentError, match="detach"):
        torch2ebm.EnergyOptimizer(sgd_of(net), model, torch2ebm.ZeroDivergence())
    assert model.algorithm is CODING
    first.detach()
    torch2ebm.EnergyOptimizer(sgd_of(net), model, torch2ebm.ZeroDivergence())
    assert_equal(local_gradients(model, (X,), classification), backprop(net, (X,), classification))


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_a_second_attach_needs_no_detach_once_the_first_optimizer_is_gone(in_a_cycle: bool) -> None:
    net = plain_net()
    model = torch2ebm.convert(net)

    def train(algorithm: torch2ebm.Algorithm) -> list[object]:
        optimizer = torch2ebm.EnergyOptimizer(sgd_of(net), model, algorithm)
        trainer: list[object] = [optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)]
        if in_a_cycle:
            trainer.append(trainer)
        classification(model(X)).backward()
        return trainer

    gc.disable()
    try:
        train(CODING)
        kept = train(torch2ebm.ZeroDivergence())
    finally:
        gc.enable()
    assert_equal(local_gradients(model, (X,), classification), backprop(net, (X,), classification))
    del kept[0]  # the negative twin: a scheduler may still step it
    with pytest.raises(AttachmentError, match="detach"):
        train(CODING)
    assert isinstance(model.algorithm, torch2ebm.ZeroDivergence)


def test_the_attachment_outlives_the_variable() -> None:
    net = plain_net()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(sgd_of(net), model, CODING)
    del optimizer
    gc.collect()
    reference = coded(net, [lambda x: net[0](x).tanh(), net[2]], [[net[0]], [net[2]]])
    assert_equal(local_gradients(model, (X,), classification), reference)


class Parallel(nn.Module):
    """As DistributedDataParallel: the model is at ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parallel": Parallel,
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: torch.compile(Parallel(model), backend="eager"),
    "the other way round": lambda model: Parallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_unwrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = plain_net()
    model = torch2ebm.convert(net)
    wrapped = wrap(model)
    optimizer = torch2ebm.EnergyOptimizer(sgd_of(net), wrapped, CODING)
    assert optimizer.model is model and model.algorithm is CODING


@pytest.mark.filterwarnings("ignore")  # Dynamo's own, of what it traces
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_learns_by_the_algorithm(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = plain_net()
    wrapped = wrap(torch2ebm.convert(net))
    torch2ebm.EnergyOptimizer(sgd_of(net), wrapped, CODING)
    reference = coded(net, [lambda x: net[0](x).tanh(), net[2]], [[net[0]], [net[2]]])
    classification(wrapped(X)).backward()
    assert_equal(gradients_of(net), reference)


@pytest.mark.parametrize("wrong", ["model", "optimizer", "algorithm"])
def test_what_cannot_be_attached_is_refused(wrong: str) -> None:
    net = plain_net()
    model = torch2ebm.convert(net)
    parts = {"optimizer": sgd_of(net), "model": model, "algorithm": CODING}
    parts[wrong] = {"model": net, "optimizer": net, "algorithm": torch2ebm.PredictiveCoding}[wrong]
    with pytest.raises(AttachmentError):
        torch2ebm.EnergyOptimizer(**parts)
    assert model.algorithm is None


def test_the_optimizer_is_one_and_shares_groups_and_state() -> None:
    net = plain_net()
    inner = sgd_of(net)
    optimizer = torch2ebm.EnergyOptimizer(inner, torch2ebm.convert(net), CODING)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    extra = nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.7})
    assert inner.param_groups[1]["lr"] == 0.7 and len(optimizer.param_groups) == 2
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state


# ---- the state of the last backward


def test_there_is_no_state_before_the_first_backward() -> None:
    model = attached(plain_net(), CODING)
    loss = classification(model(X))
    with pytest.raises(NoStateError, match="backward"):
        _ = model.state
    loss.backward()
    assert set(model.state.value) == {"0", "2"}


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "no_grad"])
def test_the_state_is_released_at_the_next_forward(mode: bool, gradients: bool) -> None:
    model = attached(plain_net(), CODING)
    classification(model(X)).backward()
    held = weakref.ref(model.state)
    model.train(mode)
    with torch.set_grad_enabled(gradients):
        model(X)
    gc.collect()
    assert held() is None
    with pytest.raises(NoStateError):
        _ = model.state


def test_the_state_is_frozen_and_has_no_graph() -> None:
    model = attached(plain_net(), CODING)
    classification(model(X)).backward()
    state = model.state
    with pytest.raises(AttributeError):
        state.unreached = ()
    with pytest.raises(AttributeError):
        state.relaxation.steps = 0
    for kind in (state.value, state.prediction, state.error, state.energy):
        assert not any(tensor.requires_grad for tensor in kind.values())


@every_algorithm
def test_the_error_is_value_minus_prediction_and_the_outputs_the_losss_gradient(
    algorithm: torch2ebm.Algorithm,
) -> None:
    """At an output e_o = -dL/dmu_o, L the loss summed over samples; whatever the outer factor of the user's loss."""
    model = attached(plain_net(), algorithm)
    scaled_by(7.0, classification(model(X))).backward()
    state = model.state
    for name, error in state.error.items():
        assert (state.value[name] - state.prediction[name] - error).abs().max() <= EXACT
    prediction = state.prediction["2"].requires_grad_()
    (reference,) = torch.autograd.grad(loss_sum(prediction), prediction)
    assert (state.error["2"] + reference).abs().max() <= EXACT


class OwnsItsLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain_net()

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), LABELS)


def test_the_energy_of_a_value_without_a_batch_dimension_is_a_typed_error() -> None:
    model = attached(OwnsItsLoss(), CODING)
    model(X).backward()
    hidden, output = model.nodes
    assert model.state.energy[hidden].shape == (BATCH,)
    with pytest.raises(BatchDimensionError, match="batch dimension"):
        _ = model.state.energy[output]


def round_trip(pair: object) -> object:
    return pickle.loads(pickle.dumps(pair))


every_copy = pytest.mark.parametrize("copied", [copy.deepcopy, round_trip], ids=["deepcopy", "pickle"])


@every_copy
@every_algorithm
def test_copies_of_model_and_optimizer_train_on_the_same_way(
    algorithm: torch2ebm.Algorithm, copied: Callable[[object], object]
) -> None:
    net = normalised_net()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(sgd_of(net), model, algorithm)

    def train(model: torch2ebm.EnergyModel, optimizer: torch2ebm.EnergyOptimizer) -> None:
        for seed in (5, 6):
            optimizer.zero_grad()
            classification(model(normal(BATCH, FEATURES, seed=seed))).backward()
            optimizer.step()

    train(model, optimizer)
    other, its_optimizer = copied((model, optimizer))
    with pytest.raises(NoStateError):
        _ = other.state
    assert repr(other.algorithm) == repr(algorithm) and its_optimizer.model is other
    assert its_optimizer.param_groups[0]["params"][0] is next(other.parameters())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    train(other, its_optimizer)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())  # nothing is shared
    train(model, optimizer)
    for name, value in other.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name
        assert name.endswith("num_batches_tracked") or not torch.equal(value, before[name]), name
    with pytest.raises(AttachmentError):
        torch2ebm.EnergyOptimizer(sgd_of(other), other, algorithm)


@every_copy
def test_a_copied_optimizer_brings_a_model_of_its_own(copied: Callable[[object], object]) -> None:
    net = plain_net()
    optimizer = torch2ebm.EnergyOptimizer(sgd_of(net), torch2ebm.convert(net), CODING)
    other = copied(optimizer)
    before = net[0].weight.detach().clone()
    classification(other.model(X)).backward()
    other.step()
    assert torch.equal(net[0].weight, before) and net[0].weight.grad is None
    assert not torch.equal(other.model.get_parameter("0.weight"), before)
    assert other.param_groups is other.optimizer.param_groups and other.state is other.optimizer.state


@every_copy
def test_a_copied_model_keeps_its_algorithm_and_no_state(copied: Callable[[object], object]) -> None:
    net = plain_net()
    model = attached(net, CODING)
    classification(model(X)).backward()
    other = copied(model)
    with pytest.raises(NoStateError):
        _ = other.state
    reference = coded(net, [lambda x: net[0](x).tanh(), net[2]], [[net[0]], [net[2]]])
    assert_equal(local_gradients(other, (X,), classification), reference)


@every_copy
def test_a_copy_after_detach_is_plain(copied: Callable[[object], object]) -> None:
    net = plain_net()
    model = torch2ebm.convert(net)
    torch2ebm.EnergyOptimizer(sgd_of(net), model, CODING).detach()
    other = copied(model)
    assert other.algorithm is None
    assert_equal(local_gradients(other, (X,), classification), backprop(net, (X,), classification))


def test_a_model_is_pickled_while_a_call_is_open_and_after_a_backward() -> None:
    net = plain_net()
    model = attached(net, CODING)
    size = len(pickle.dumps(model))
    loss = classification(model(X))
    assert len(pickle.dumps(model)) == size
    loss.backward()
    net.zero_grad()
    assert len(pickle.dumps(model)) == size


# ---- text


def test_the_summary_has_a_row_a_node() -> None:
    net = plain_net()
    model = attached(net, CODING)
    classification(model(X)).backward()
    header, rule, *rows, weight, regime, batch = model.summary().splitlines()
    assert regime.startswith("regime: residual over |e|")
    assert weight == "weight of a sample's loss in the energy: 1"
    assert batch == "batch: dimension 0 of the first input (guessed)"
    assert set(rule) <= {"-", " "} and len(rows) == 2
    assert all(word in header for word in ("node", "function", "level", "shape", "parameters"))
    first, last = rows
    assert first.split()[0] == "0" and "(5, 7)" in first and "1" in first.split() and "49" in first.split()
    assert last.split()[0] == "2" and "(5, 4)" in last and "output" in last and "32" in last.split()
    assert max(map(len, rows)) < 120


def test_the_summary_names_what_no_error_has_reached() -> None:
    model = attached(deep_net(5), torch2ebm.PredictiveCoding(steps=2, lr=0.2))
    classification(model(X)).backward()
    first, second = list(model.nodes)[:2]
    assert f"no error has reached {first}, {second}:" in model.summary()


def test_the_repr_of_nothing_set_shows_nothing_set() -> None:
    assert repr(torch2ebm.PredictiveCoding()) == "PredictiveCoding()"
    assert repr(torch2ebm.PredictiveCoding(loss_reduction="sum")) == "PredictiveCoding(loss_reduction='sum')"
    assert "GradientDescent(steps=20, lr=0.1" in repr(torch2ebm.PredictiveCoding(steps=20))


def test_repr_names_module_and_algorithm() -> None:
    assert "Sequential" in repr(attached(plain_net(), CODING)) and "PredictiveCoding" in repr(
        attached(plain_net(), CODING)
    )


# ---- batch norm, dropout, precision


@every_algorithm
def test_running_statistics_move_once_a_step_as_the_modules_own(algorithm: torch2ebm.Algorithm) -> None:
    net, twin = noisy_net(), noisy_net()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), model, algorithm)
    for step in range(3):
        x = normal(BATCH, FEATURES, seed=step)
        optimizer.zero_grad()
        classification(model(x)).backward()
        optimizer.step()
        twin(x)
        assert int(net[1].num_batches_tracked) == step + 1
        for name, buffer in twin.named_buffers():
            assert (net.get_buffer(name) - buffer).abs().max() <= EXACT, name


@every_algorithm
def test_batch_statistics_are_those_of_the_values_and_differentiated_through(algorithm: torch2ebm.Algorithm) -> None:
    net = normalised_net()
    model = attached(net, algorithm)
    reference = scaled_by_arrival(algorithm, backprop(net, (X,), classification))
    if isinstance(algorithm, torch2ebm.PredictiveCoding):
        reference = coded_with_live_statistics(net)
    assert_equal(local_gradients(model, (X,), classification), reference)


def test_frozen_statistics_are_those_of_the_feedforward_pass() -> None:
    net = normalised_net()
    first = net[0](X).detach()
    reference = coded_with_statistics(net, first.mean(0), first.var(0, correction=0))
    model = attached(net, replace(CODING, batch_statistics="frozen"))
    frozen = local_gradients(model, (X,), classification)
    assert_equal(frozen, reference)
    assert relative_error(frozen, coded_with_live_statistics(net)) > 0.1  # the negative twin


@pytest.mark.parametrize(("statistics", "is_backprop"), [("live", True), ("frozen", False)])
def test_the_limit_of_small_nudges_is_backprop_with_live_statistics_alone(statistics: str, is_backprop: bool) -> None:
    """Millidge et al. 2022: an error of first order in the nudge, also where batch norms couple the samples."""
    net = normalised_net()
    exact = backprop(net, (X,), classification)
    errors = []
    for beta in (1e-2, 1e-3):
        solver = torch2ebm.ErrorDescent(400, 0.5, tol=1e-14)
        coding = torch2ebm.PredictiveCoding(
            solver=solver, nudging=torch2ebm.OneSided(beta), batch_statistics=statistics
        )
        model = torch2ebm.convert(net)
        optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, coding)
        errors.append(relative_error(local_gradients(model, (X,), classification), exact))
        optimizer.detach()
    assert (9 < errors[0] / errors[1] < 11) is is_backprop
    assert (errors[1] < 1e-2) is is_backprop


def dropping_net() -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(nn.Linear(FEATURES, WIDE), nn.Tanh(), nn.Dropout(0.5), nn.Linear(WIDE, CLASSES))
    )


@every_algorithm
def test_dropout_has_one_mask_a_batch(algorithm: torch2ebm.Algorithm) -> None:
    """The oracle multiplies with the mask that a plain run draws from the same seed."""
    net = dropping_net()
    model = attached(net, algorithm)
    model(X)  # the graph is cut: no draw but the forward's from here on
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mask = F.dropout(torch.ones(BATCH, WIDE, dtype=torch.float64), 0.5)
    assert 0 < mask.count_nonzero() < mask.numel()
    if isinstance(algorithm, torch2ebm.PredictiveCoding):
        reference = coded(net, [lambda x: net[0](x).tanh() * mask, net[3]], [[net[0]], [net[3]]])
    else:
        reference = backprop(net, (X,), classification, seed=0)
        if isinstance(algorithm, torch2ebm.FixedPrediction):
            arrived = binomial_tail(algorithm.steps, algorithm.lr, 1)
            reference = {n: g * (arrived if n[0] == "0" else 1) for n, g in reference.items()}
    assert_equal(local_gradients(model, (X,), classification, seed=0), reference)


def test_with_dropout_a_relaxation_still_converges() -> None:
    """A new mask at every step would move the fixed point."""
    net = dropping_net()
    solver = torch2ebm.GradientDescent(steps=3000, lr=0.1, tol=1e-11)
    model = attached(net, torch2ebm.PredictiveCoding(solver=solver))
    torch.manual_seed(0)
    classification(model(X)).backward()
    relaxation = model.state.relaxation
    assert relaxation.converged and relaxation.residual <= 1e-11 and relaxation.steps < 3000


@every_algorithm
def test_the_generator_advances_as_in_the_plain_loop(algorithm: torch2ebm.Algorithm) -> None:
    net, twin = dropping_net(), dropping_net()
    model = attached(net, algorithm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classification(twin(X)).backward()
        after = torch.get_rng_state()
        torch.manual_seed(0)
        classification(model(X)).backward()  # the first call too, which cuts the graph
        assert torch.equal(torch.get_rng_state(), after)


def test_under_autocast_values_and_errors_stay_in_single_precision() -> None:
    """One small step: in bfloat16 buffers it would be lost."""
    net = plain_net().float()
    x = X.float()
    algorithm = torch2ebm.PredictiveCoding(steps=1, lr=1e-4)
    model = attached(net, algorithm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
        loss = classification(output)
    assert output.dtype == torch.bfloat16
    loss.backward()
    state = model.state
    assert state.value["0"].dtype == state.error["0"].dtype == torch.float32
    hidden = net[0](x).tanh().detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_sum(net[2](hidden)), hidden)
    reference = -1e-4 * gradient
    assert (state.error["0"] - reference).norm() < 0.02 * reference.norm()  # bfloat16 has 8 bits
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}


# ---- how a relaxation went


def values_after(net: nn.Sequential, steps: int, lr: float) -> tuple[Tensor, ...]:
    parameters = [list(layer.parameters()) for layer in net]
    return strict(list(net), parameters, X, loss_sum, steps, lr).values[:-1]


def residual_before(net: nn.Sequential, step: int, lr: float) -> float:
    """Largest entry of dF/dv that update number ``step`` follows: what the values then moved by, over lr."""
    moved = zip(values_after(net, step, lr), values_after(net, step - 1, lr), strict=True)
    return max(float((after - before).abs().max()) / lr for after, before in moved)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_residual_is_the_last_driving_term(steps: int) -> None:
    net = deep_net(3)
    model = attached(net, torch2ebm.PredictiveCoding(steps=steps, lr=0.2))
    classification(model(X)).backward()
    relaxation = model.state.relaxation
    assert relaxation.steps == steps and not relaxation.converged
    assert abs(relaxation.residual - residual_before(net, steps, 0.2)) <= 10 * EXACT


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_a_met_tolerance_stops_the_relaxation_at_the_first_step_that_meets_it(tol: float) -> None:
    net = deep_net(3)
    model = attached(net, torch2ebm.PredictiveCoding(solver=torch2ebm.GradientDescent(steps=500, lr=0.3, tol=tol)))
    classification(model(X)).backward()
    relaxation = model.state.relaxation
    assert relaxation.converged and relaxation.residual <= tol
    driving = {step: residual_before(net, step, 0.3) for step in range(1, relaxation.steps + 1)}
    assert min(step for step, size in driving.items() if size <= tol) == relaxation.steps
    assert 1 < relaxation.steps < 500


def test_an_unmet_tolerance_is_reported_and_never_raised() -> None:
    model = attached(deep_net(3), torch2ebm.PredictiveCoding(solver=torch2ebm.GradientDescent(4, 0.1, tol=1e-9)))
    classification(model(X)).backward()
    relaxation = model.state.relaxation
    assert not relaxation.converged and relaxation.steps == 4 and relaxation.residual > 1e-9


def test_the_tolerance_is_for_the_worst_sample() -> None:
    """A max-norm: nine samples at rest do not make up for one that is not."""
    net = plain_net()
    solver = torch2ebm.GradientDescent(steps=300, lr=0.3, tol=1e-6)
    model = attached(net, torch2ebm.PredictiveCoding(solver=solver))
    alone = []
    for row in range(BATCH):
        F.cross_entropy(model(X[row : row + 1]), LABELS[row : row + 1]).backward()
        alone.append(model.state.relaxation.steps)
    classification(model(X)).backward()
    assert model.state.relaxation.steps == max(alone) > min(alone)


def test_the_energy_curve_is_the_energy() -> None:
    net = deep_net(3)
    model = attached(net, torch2ebm.PredictiveCoding(steps=5, lr=0.1))
    scaled_by(0.25, classification(model(X))).backward()
    relaxation = model.state.relaxation
    assert len(relaxation.energy) == 6
    for step, energy in enumerate(relaxation.energy):
        parameters = [list(layer.parameters()) for layer in net]
        state = strict(list(net), parameters, X, loss_sum, step, 0.1)
        errors = sum(0.5 * float(error.square().sum()) for error in state.errors[:-1])
        loss = float(loss_sum(state.values[-1]))
        assert abs(energy - errors - loss) <= 10 * EXACT
        assert abs(relaxation.loss[step] - loss) <= 10 * EXACT
    assert list(relaxation.energy) == sorted(relaxation.energy, reverse=True)


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # which is what it shows
@pytest.mark.parametrize("steps", [1, 2, 4, 5])
@pytest.mark.parametrize("name", ["fixed_prediction", "predictive_coding"])
def test_an_error_travels_one_level_a_step(name: str, steps: int) -> None:
    layers = 6
    net = deep_net(layers)
    kind = torch2ebm.FixedPrediction if name == "fixed_prediction" else torch2ebm.PredictiveCoding
    model = attached(net, kind(steps=steps, lr=0.3))
    classification(model(X)).backward()
    names = list(model.nodes)
    unreached = tuple(n for n in names if model.nodes[n].level > steps)
    assert model.state.unreached == unreached == tuple(names[: max(0, layers - 1 - steps)])
    for index, node in enumerate(names):
        for parameter in net[index].parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == (node not in unreached)
        assert bool(model.state.error[node].any()) == (node not in unreached)


@pytest.mark.parametrize("name", ["backprop", "zero_divergence"])
def test_exact_algorithms_reach_every_node(name: str) -> None:
    model = attached(deep_net(6), ALGORITHMS[name])
    classification(model(X)).backward()
    assert model.state.unreached == ()


# ---- settings and failures


@pytest.mark.parametrize("lr", [0.0, -0.1, float("nan"), float("inf")])
def test_a_step_size_that_is_not_positive_and_finite_is_refused(lr: float) -> None:
    for make in (torch2ebm.PredictiveCoding, torch2ebm.FixedPrediction, torch2ebm.GradientDescent):
        with pytest.raises(ConfigurationError, match="lr"):
            make(steps=3, lr=lr)
    with pytest.raises(ConfigurationError, match="gamma"):
        torch2ebm.ZeroDivergence(gamma=lr)


def test_a_large_step_size_is_no_error_until_it_diverges_and_then_nothing_has_changed() -> None:
    net = normalised_net()
    with torch.no_grad():
        net[3].weight.mul_(100)
    model = torch2ebm.convert(net)
    algorithm = torch2ebm.PredictiveCoding(steps=400, lr=50.0)
    optimizer = torch2ebm.EnergyOptimizer(sgd_of(net), model, algorithm)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    loss = F.mse_loss(model(X), torch.ones(BATCH, CLASSES, dtype=torch.float64))
    with pytest.raises(DivergenceError, match="step size") as caught:
        loss.backward()
    assert len(caught.value.energy) > 1 and caught.value.energy[1] > caught.value.energy[0]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert gradients_of(net) == {} and not optimizer.state
    with pytest.raises(NoStateError):
        _ = model.state
