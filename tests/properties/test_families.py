"""Architectures that people have: each converts, is the module, learns; and docs/supported.md says so.

``UPDATE_DOCS=1 pytest tests/properties/test_families.py`` writes docs/supported.md anew.
"""

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, SPECIAL, leaves
from oracles.graphs import backprop, call
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import PROBLEMS, Problem

import torch2ebm
from torch2ebm.errors import CaptureMismatchError, OpaqueModuleWarning, PartitionError, Torch2EBMError, UntraceableError

DOCS = Path(__file__).parents[2] / "docs" / "supported.md"
BATCH, OTHER_BATCH = 4, 3

every_model = pytest.mark.parametrize("problem", [*FAMILIES, *PROBLEMS], ids=lambda problem: problem.name)
every_family = pytest.mark.parametrize("problem", FAMILIES, ids=lambda problem: problem.name)


def attached(
    module: nn.Module, problem: Problem, algorithm: torch2ebm.Algorithm, nodes: Any = "auto"
) -> tuple[torch2ebm.EnergyModel, torch2ebm.EnergyOptimizer]:
    """Converted with a batch of another size than those that the tests run."""
    model = torch2ebm.convert(module, nodes=nodes, example_inputs=problem.inputs(BATCH + 1))
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(module.parameters(), lr=0.05), model, algorithm)
    return model, optimizer


def seeded_call(module: Callable[..., Any], problem: Problem, batch: int) -> Any:
    torch.manual_seed(0)
    return call(module, copy.deepcopy(problem.inputs(batch)))


def assert_same_output(ours: Any, expected: Any) -> None:
    assert isinstance(ours, type(expected))  # a recording tensor is one
    assert len(leaves(ours)) == len(leaves(expected))
    assert all(torch.equal(a, b) for a, b in zip(leaves(ours), leaves(expected), strict=True))


def assert_same_buffers(module: nn.Module, twin: nn.Module) -> None:
    for name, buffer in twin.named_buffers():
        assert torch.equal(module.get_buffer(name), buffer), name


def assert_same_gradients(module: nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """In norm for each parameter. A bias before a batch norm has a gradient of zero: rounding of the whole decides."""
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, parameter in module.named_parameters():
        reference = expected[name]
        found = torch.zeros_like(reference) if parameter.grad is None else parameter.grad
        assert (found - reference).norm() <= tolerance * max(float(reference.norm()), 1e-4 * float(whole)), name


# ---- properties


@every_model
def test_outputs_and_buffers_are_the_modules_bit_for_bit_in_both_modes(problem: Problem) -> None:
    module, twin = problem.build(), problem.build()
    model, _ = attached(module, problem, torch2ebm.ZeroDivergence())
    for training, batch in ((True, BATCH), (False, BATCH), (True, OTHER_BATCH), (False, OTHER_BATCH)):
        model.train(training), twin.train(training)
        assert_same_output(seeded_call(model, problem, batch), seeded_call(twin, problem, batch))
        assert_same_buffers(module, twin)


@every_family  # for the zoo see test_algorithms
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_zero_divergence_is_autograd_for_two_batch_sizes(problem: Problem, training: bool) -> None:
    module, twin = problem.build().train(training), problem.build().train(training)
    model, optimizer = attached(module, problem, torch2ebm.ZeroDivergence())
    for batch in (BATCH, OTHER_BATCH):
        optimizer.zero_grad()
        problem.loss(seeded_call(model, problem, batch)).backward()
        assert_same_gradients(module, backprop(twin, problem.inputs(batch), problem.loss))


@every_model
def test_a_step_of_predictive_coding_lowers_the_energy_and_moves_only_what_a_step_moves(problem: Problem) -> None:
    module, twin = problem.build(), problem.build()
    own = dict(module.named_parameters())
    before = {name: p.detach().clone() for name, p in own.items()}
    model, optimizer = attached(module, problem, torch2ebm.PredictiveCoding(steps=3, lr=1e-3))
    problem.loss(seeded_call(model, problem, BATCH)).backward()
    seeded_call(twin, problem, BATCH)  # running statistics of one forward pass
    relaxation = model.state.relaxation
    if relaxation.node_energy:
        assert relaxation.energy[-1] < relaxation.energy[0]
    optimizer.step()
    assert_same_buffers(module, twin)
    assert all(p is own[name] for name, p in model.named_parameters())
    in_nodes = {name: p for node in model.nodes.values() for name, p in node.parameters.items()}
    assert all(p is own[name] for name, p in in_nodes.items())
    trainable = [name for name, p in own.items() if p.requires_grad]
    assert any(not torch.equal(own[name], before[name]) for name in trainable)
    problem.loss(seeded_call(model, problem, OTHER_BATCH)).backward()


@pytest.mark.parametrize("problem", FAMILIES[:3], ids=lambda problem: problem.name)
@pytest.mark.parametrize("example", [True, False], ids=["example", "no example"])
def test_converting_a_module_in_eval_mode_leaves_it_there(problem: Problem, example: bool) -> None:
    module = problem.build().eval()
    model = torch2ebm.convert(module, example_inputs=problem.inputs(BATCH) if example else None)
    assert not any(part.training for part in module.modules())
    assert not model.training


def test_the_energy_test_sees_a_relaxation_that_climbs() -> None:
    problem = next(p for p in FAMILIES if p.name == "VGG")
    model, _ = attached(problem.build(), problem, torch2ebm.PredictiveCoding(steps=3, lr=3.0))
    problem.loss(seeded_call(model, problem, BATCH)).backward()
    assert model.state.relaxation.energy[-1] > model.state.relaxation.energy[0]


# ---- granularity


def by_name(name: str) -> Problem:
    return next(problem for problem in FAMILIES if problem.name == name)


RESIDUAL_BLOCKS = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
TRANSFORMER_BLOCKS = [f"h.{block}" for block in range(3)]


@pytest.mark.parametrize(
    ("name", "blocks"), [("ResNet-18", RESIDUAL_BLOCKS), ("GPT-2", TRANSFORMER_BLOCKS)], ids=["ResNet-18", "GPT-2"]
)
def test_named_blocks_are_one_node_each_compose_to_the_model_and_are_exact(name: str, blocks: list[str]) -> None:
    problem = by_name(name)
    module, twin = problem.build(), problem.build()
    model, _ = attached(module, problem, torch2ebm.ZeroDivergence(), nodes=blocks)
    output = seeded_call(model, problem, BATCH)
    assert [node for node in model.nodes if node in blocks] == blocks
    for block in blocks:
        inside = {f"{block}.{name}" for name, _ in module.get_submodule(block).named_parameters()}
        assert set(model.nodes[block].parameters) == inside
        assert not any(node.startswith(f"{block}.") for node in model.nodes)
    assert all(model.nodes[b].children[0] == c for b, c in pairwise(blocks))
    reference = backprop(twin, problem.inputs(BATCH), problem.loss)
    assert_same_output(output, seeded_call(twin, problem, BATCH))
    assert_same_buffers(module, twin)
    problem.loss(output).backward()
    assert_same_gradients(module, reference)


def test_a_layer_of_resnet18_takes_in_its_batch_norm_s_relu_and_the_residual_add() -> None:
    problem = by_name("ResNet-18")
    model = torch2ebm.convert(problem.build(), nodes="layer", example_inputs=problem.inputs(BATCH))
    assert len(model.nodes) == 38
    adding = [node for node in model.nodes.values() if "add" in node.description]
    assert len(adding) == 8  # one a block, each after its last parameterised operation
    for node in adding:
        operations = node.description.split(" > ")
        norms, after = operations[: operations.index("add")], operations[operations.index("add") + 1 :]
        assert set(norms) == {"BatchNorm2d"} and after[0] == "ReLU"
        assert len(norms) == (2 if ".0" in node.name and "layer1" not in node.name else 1)  # with the shortcut's
        assert len(node.parents) == 2


@pytest.mark.parametrize("nodes", ["layer", "module", "op"])
@pytest.mark.parametrize("name", ["GPT-2", "BERT", "Swin", "Graph convolution"])
def test_integers_masks_and_constants_carry_no_value(name: str, nodes: str) -> None:
    problem = by_name(name)
    module = problem.build()
    model = torch2ebm.convert(module, nodes=nodes, example_inputs=problem.inputs(BATCH))
    call(model, problem.inputs(BATCH))
    model_parents = {slot: node for node in model.nodes.values() for slot in node.slots}
    tokens = {"input_ids", "attention_mask", "idx", "edge_index", "edges", "x_1"}
    assert tokens.isdisjoint(model.nodes) and tokens.isdisjoint(model_parents)
    for node in model.nodes.values():  # every node depends on a parameter: its own, or that of a node above it
        assert node.parameters or node.parents, node.name
        assert not any(word in node.description for word in ("arange", "new_zeros", "ones", "tril")), node.name


# ---- what others ship


def test_torchvision_resnet18_has_38_layer_nodes() -> None:
    torchvision = pytest.importorskip("torchvision")
    module = torchvision.models.resnet18(num_classes=4).double()
    problem = Problem("torchvision", lambda: module, by_name("ResNet-18").inputs, by_name("ResNet-18").loss)
    model, _ = attached(module, problem, torch2ebm.ZeroDivergence())
    assert_same_output(seeded_call(model, problem, 2), seeded_call(copy.deepcopy(module), problem, 2))
    assert len(model.nodes) == 38


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0"])
def test_timm_models_are_exact(name: str) -> None:
    timm = pytest.importorskip("timm")
    module = timm.create_model(name, num_classes=4).double()
    x = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    problem = Problem(name, lambda: module, lambda batch: (x[:batch],), by_name("ViT").loss)
    expected = backprop(module, problem.inputs(2), problem.loss)
    model, _ = attached(module, problem, torch2ebm.ZeroDivergence())
    problem.loss(seeded_call(model, problem, 2)).backward()
    assert_same_gradients(module, expected)


# ---- what forward may do, what is one node, what is refused


class Net(nn.Module):
    """Two layers around a piece of Python."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 6), middle, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.middle(torch.sin(self.first(x))))


class Counter(nn.Module):
    """Counts in a Python number, and reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h / self.calls


class Written(nn.Module):
    """A piece of forward, between two layers."""

    def __init__(self, statement: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.statement = statement

    def forward(self, h: Tensor) -> Tensor:
        return self.statement(h)


def gate_without_gradient(h: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(h)
    return h * gate


def by_item(h: Tensor) -> Tensor:
    for _ in range(int(h.abs().max().item() * 3) + 1):
        h = torch.sin(h)
    return h


CONSTRUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "`h.index_put` with a mask": lambda h: h.index_put((h.abs() > 1,), torch.zeros((), dtype=h.dtype)),
    "`torch.where(h > 0, ...)`": lambda h: torch.where(h > 0, h, 0.1 * h),
    "`torch.sort`, `torch.topk`": lambda h: h.sort(1).values + h.topk(1, 1).values,
    "`torch.cumsum`, `torch.flip`": lambda h: h.cumsum(1).flip(1),
    "`torch.fft`": lambda h: torch.fft.rfft(h, n=10).abs(),
    "`torch.linalg`": lambda h: h @ torch.linalg.inv(h.t() @ h + torch.eye(6, dtype=h.dtype)),
    "`h.detach()`": lambda h: h * torch.sigmoid(h.detach()),
    "`torch.zeros((h.shape[0], 6))`": lambda h: h + torch.zeros((h.shape[0], 6), dtype=h.dtype),
    "`torch.ones(h.shape[0], 6)`": lambda h: h * torch.ones(h.shape[0], 6, dtype=h.dtype),
    "`torch.arange(h.shape[0])`": lambda h: h + torch.arange(h.shape[0], dtype=h.dtype)[:, None],
    "`h.view(h.size(0), 2, -1)`": lambda h: h.view(h.size(0), 2, -1).transpose(1, 2).reshape(h.size(0), -1),
    "`math.sqrt(h.size(-1))`": lambda h: h / math.sqrt(h.size(-1)),
    "`if h.dim() == 2`": lambda h: h.sin() if h.dim() == 2 else h,
    "`if h.shape[1] == 6`": lambda h: h.sin() if h.shape[1] == 6 else h,
    "`for i in range(h.size(1))`": lambda h: torch.stack([h[:, i] * i for i in range(h.size(1))], 1),
    "`for row in h.unbind(1)`": lambda h: torch.stack([row * 2 for row in h.unbind(1)], 1),
    "`isinstance(h, Tensor)`": lambda h: h.sin() if isinstance(h, Tensor) else h,
    "`len(h)`": lambda h: h * len(h),
    "`torch.no_grad` in part of forward": gate_without_gradient,
    "`torch.no_grad` beside a branch on a shape": lambda h: gate_without_gradient(h) if h.dim() == 2 else h,
    "`torch.utils.checkpoint`": lambda h: checkpoint(torch.sin, h, use_reentrant=False),
    "`if h.sum() > 0`": lambda h: h * 2 if h.sum() > 0 else h.sin(),
    "`for _ in range(int(h.abs().max().item() * 3))`": by_item,
    "`h.detach().numpy()`": lambda h: h * torch.from_numpy(np.tanh(h.detach().numpy())),
    "`h.tolist()`": lambda h: h * torch.tensor([max(row) for row in h.tolist()], dtype=h.dtype).unsqueeze(1),
}  # fmt: skip
MODULES: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda statement=statement: Written(statement) for name, statement in CONSTRUCTS.items()},
    "`self.calls += 1`, and `h / self.calls`": Counter,
}


class Gradient(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        inside = h.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(inside.pow(3).sum(), inside)
        return h + gradient


def watched() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    module.register_full_backward_hook(lambda *given: None)
    return module


class Transformed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, h: Tensor) -> Tensor:
        return h - 0.1 * torch.func.grad(lambda z: torch.tanh(self.layer(z)).square().sum())(h)


ONE_NODE: dict[str, Callable[[], nn.Module]] = {
    "`torch.jit.script(module)`": lambda: torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh())),
    "a module with `register_full_backward_hook`": watched,
    "a module that calls `torch.autograd.grad`": Gradient,
    "a module that calls a transform of `torch.func`, for example `grad` or `vmap`, or uses forward mode": Transformed,
}


class WritesTheSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        ctx.mark_dirty(other)
        return h.clone(), other.mul_(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], 2 * gradients[1]


class WritesElsewhere(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return sum(WritesTheSecond.apply(h, h * 3))


class WritesUntold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.linspace(0.5, 2, 6))

    def forward(self, h: Tensor) -> Tensor:
        h = h * self.codes
        self.codes.numpy()[:] *= 0.5
        return torch.tanh(h) + self.codes


class CountsInGlobal(Transformed):
    calls = 0

    def forward(self, h: Tensor) -> Tensor:
        CountsInGlobal.calls += 1
        return super().forward(h) * (1 + 0.1 * CountsInGlobal.calls)


class DrawsInTurns(nn.Module):
    """One layer's dropout stands before and after another's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.drop = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        h, k = self.drop(self.a(x)), self.drop(self.b(x))
        return self.c(self.drop(h).tanh()) + self.c(k)


@dataclass(frozen=True)
class Refusal:
    what: str
    error: type[Torch2EBMError]
    way_round: str
    make: Callable[[], nn.Module]


REFUSALS = (
    Refusal("a custom autograd function that writes in place what is not its first argument", UntraceableError,
            "put this argument first, or return a new tensor", lambda: net(WritesElsewhere)),
    Refusal("a write that autograd is not told of, to what forward has read before", CaptureMismatchError,
            "write after the last read, or read a copy (`.clone()`)", lambda: net(WritesUntold)),
    Refusal("a module that is one node and counts in a global", CaptureMismatchError,
            "count in an attribute or a buffer of the module", lambda: net(CountsInGlobal)),
    Refusal("a module without parameters", PartitionError, "there is nothing to learn",
            lambda: nn.Sequential(nn.Tanh(), nn.Flatten())),
)  # fmt: skip


def net(middle: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return Net(middle()).double()


def samples(seed: int = 1) -> Tensor:
    return torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_learns_exactly(middle: Callable[[], nn.Module], nodes: Any) -> torch2ebm.EnergyModel:
    """In several batches, which may differ in the side of a branch or the length of a loop."""
    module, twin = net(middle), net(middle)
    model = torch2ebm.convert(module, nodes=nodes, example_inputs=samples())
    optimizer = torch2ebm.EnergyOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.05), model, torch2ebm.ZeroDivergence()
    )
    for seed in range(1, 6):
        x = samples(seed)
        optimizer.zero_grad()
        twin.zero_grad()
        ours, theirs = model(x), twin(x)
        assert_same_output(ours, theirs)
        ours.square().mean().backward()
        theirs.square().mean().backward()
        assert_same_gradients(module, {name: p.grad for name, p in twin.named_parameters() if p.grad is not None})
    assert getattr(module.middle, "calls", None) == getattr(twin.middle, "calls", None)
    return model


@pytest.mark.parametrize("nodes", ["auto", ["middle"]], ids=str)
@pytest.mark.parametrize("construct", MODULES)
def test_a_forward_with_this_construct_is_exact(construct: str, nodes: Any) -> None:
    assert_learns_exactly(MODULES[construct], nodes)


def test_the_batches_of_these_tests_take_both_sides_of_the_branch() -> None:
    module, seen = net(lambda: Written(lambda h: h)), []
    module.middle.register_forward_hook(lambda part, given, h: seen.append(bool(h.sum() > 0)))
    for seed in range(1, 6):
        module(samples(seed))
    assert set(seen) == {True, False}


@pytest.mark.parametrize("what", ONE_NODE)
def test_a_module_that_cannot_be_looked_into_is_one_node_and_said_to_be(what: str) -> None:
    with pytest.warns(OpaqueModuleWarning, match="middle"):
        model = assert_learns_exactly(ONE_NODE[what], "op")
    inside = [name for name in net(ONE_NODE[what]).state_dict() if name.startswith("middle.")]
    assert sorted(model.nodes["middle"].parameters) == sorted(inside)


@pytest.mark.parametrize("nodes", ["auto", ["middle"]], ids=["nodes that draw in turns", "one node"])
def test_draws_in_turns_are_those_of_the_plain_module(nodes: Any) -> None:
    module, twin = net(DrawsInTurns), net(DrawsInTurns)
    problem = Problem("in turns", lambda: module, lambda batch: (samples(),), lambda output: output.square().mean())
    model, _ = attached(module, problem, torch2ebm.ZeroDivergence(), nodes=nodes)
    for _ in range(3):
        module.zero_grad()
        problem.loss(seeded_call(model, problem, BATCH)).backward()
        assert_same_gradients(module, backprop(twin, problem.inputs(BATCH), problem.loss))


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.OpaqueModuleWarning")
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.what)
def test_what_is_refused_is_a_typed_error_that_names_the_module(refusal: Refusal) -> None:
    module = refusal.make()
    with pytest.raises(refusal.error) as caught:
        torch2ebm.convert(module, example_inputs=samples())
    assert caught.value.remedy and type(module).__name__ in str(caught.value)


# ---- the page


def supported_table() -> str:
    """The text of docs/supported.md, from conversions done now."""
    lines = [
        "# Supported models",
        "",
        "This page lists what `torch2ebm.convert` can convert, and what it refuses. A model that is not listed may",
        "convert as well: try it, or ask `torch2ebm.check(module, example_inputs)`.",
        "",
        "The tables come from `tests/properties/test_families.py`. It converts each family with its true structure",
        "at toy widths, and checks three things:",
        "",
        "- Outputs and running statistics equal those of the plain module bit for bit, in training and in evaluation.",
        "- The gradients of `ZeroDivergence` equal those of autograd within 1e-10 in float64.",
        "- The inference of `PredictiveCoding` lowers the energy.",
        "",
        "A batch norm in training mode normalises by the statistics of the values that it reads, also while these "
        "move. Gradients go through the statistics, so small nudges give the gradient of backprop. "
        '`PredictiveCoding(batch_statistics="frozen")` keeps the statistics of the feed-forward pass instead: samples '
        "are then independent.",
        "",
        "*Layer nodes* is the number of value nodes, one for each layer with the activations that follow it.",
        "",
        "## Families of models",
        "",
        "| family | layer nodes | special |",
        "|---|---|---|",
    ]
    for problem in FAMILIES:
        model = torch2ebm.convert(problem.build(), nodes="layer", example_inputs=problem.inputs(BATCH))
        lines.append(f"| {problem.name} | {len(model.nodes)} | {SPECIAL[problem.name]} |")
    lines += [
        "",
        "The node counts belong to the toy depths of the tests. ResNet-18 and ResNet-50 have their true depths.",
        "",
        "A layer of `torch.nn` that torch computes by one function is one node (LSTM, GRU, MultiheadAttention). For a",
        "finer cut, write it out.",
        "",
        "## Constructs in forward",
        "",
        "Your module runs as it is, in every call: `forward` may branch, loop, count and read values as it likes.",
        "`h` is a tensor that your model has computed. With each of these constructs,",
        "outputs equal the plain module's, and gradients of `ZeroDivergence` equal autograd's, batch by batch.",
        "",
        *(f"- {construct}" for construct in MODULES),
        "",
        "What Python reads off a tensor stays as the feed-forward pass has made it while values relax.",
        "",
        "## What is one node",
        "",
        "These cannot be looked into. Each is one node, whatever `nodes` asks for, and you get an",
        "`OpaqueModuleWarning`. Outputs and the gradients of `ZeroDivergence` are exact all the same.",
        "",
        *(f"- {what}" for what in ONE_NODE),
        "",
        "## What is refused, and the way round",
        "",
        "If your module cannot be converted, you get an error at `convert`, or at the first call.",
        "",
        "| what | error | way round |",
        "|---|---|---|",
        *(f"| {r.what} | `{r.error.__name__}` | {r.way_round} |" for r in REFUSALS),
    ]
    return "\n".join([*lines, ""])


def test_the_page_of_supported_models_is_what_the_tests_show() -> None:
    text = supported_table()
    if os.environ.get("UPDATE_DOCS"):
        DOCS.write_text(text)
    assert DOCS.read_text() == text, "run UPDATE_DOCS=1 pytest tests/properties/test_families.py"
