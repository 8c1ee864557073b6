"""Architectures whose forward loops, branches and writes, and Hugging Face's: their run is followed."""

from __future__ import annotations

import copy
from time import perf_counter
from typing import Any

import pytest
import torch
from forwards import BLOCKS, PROBLEMS, BranchOnShape, Chunks, LoopOverShape, Problem, gpt2, training_with
from helpers import same
from torch import Tensor, nn

import torch2ebm
from torch2ebm import errors
from torch2ebm.common.nested import leaves_of
from torch2ebm.reports.drawing import layout


@pytest.fixture(params=PROBLEMS, ids=lambda p: f"{p.name}{'-labels' * p.labels}")
def problem(request: pytest.FixtureRequest) -> Problem:
    return request.param


def assert_same_step(model: Any, twin: nn.Module, x: Tensor) -> None:
    """Output bit for bit, and gradients, with zero for none."""
    model.zero_grad(), twin.zero_grad()
    ours, theirs = model(x), twin(x)
    assert torch.equal(ours, theirs)
    ours.square().mean().backward(), theirs.square().mean().backward()
    for own, real in zip(model.parameters(), twin.parameters(), strict=True):
        found = torch.zeros_like(own) if own.grad is None else own.grad
        reference = torch.zeros_like(own) if real.grad is None else real.grad
        torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_and_buffers_are_those_of_the_module(problem: Problem, mode: str) -> None:
    module = problem.module().train(mode == "train")
    twin, inputs = copy.deepcopy(module), problem.inputs()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = torch2ebm.convert(module, example_inputs=inputs)
    assert model.captured_by == "run"
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    with training_with(model, torch2ebm.ZeroDivergence()):
        torch.manual_seed(3)
        output = model(**inputs)
        torch.manual_seed(3)
        expected = twin(**inputs)
        assert isinstance(output, type(expected))
        assert all(same(a, b) for a, b in zip(leaves_of(output), leaves_of(expected), strict=True))
        problem.loss(output).backward()
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("batch", [4, 3])
def test_zero_divergence_is_autograd(problem: Problem, mode: str, batch: int) -> None:
    module = problem.module().train(mode == "train")
    twin, inputs = copy.deepcopy(module), problem.inputs(batch, seed=2)
    model = torch2ebm.convert(module, example_inputs=problem.inputs())
    with training_with(model, torch2ebm.ZeroDivergence()):
        torch.manual_seed(3)
        problem.loss(model(**inputs)).backward()
    torch.manual_seed(3)
    problem.loss(twin(**inputs)).backward()
    for (name, ours), real in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (real.grad is None), name
        if real.grad is not None:
            torch.testing.assert_close(ours.grad, real.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_predictive_coding_lowers_the_energy(problem: Problem) -> None:
    module, inputs = problem.module(), problem.inputs()
    model = torch2ebm.convert(module, example_inputs=inputs)
    # embeddings of size .02 before a layer norm: J^T J is thousands for tokens, a thousand for patches
    lr = {"gpt2": 1e-4, "vit": 1e-3}.get(problem.name, 0.01)
    with training_with(model, torch2ebm.PredictiveCoding(steps=3, lr=lr)):
        problem.loss(model(**inputs)).backward()
        energy = model.state.relaxation.energy
    assert energy[-1] < energy[0]
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_several_batch_sizes_are_one_sequence(problem: Problem) -> None:
    model = torch2ebm.convert(problem.module(), example_inputs=problem.inputs())
    with training_with(model, torch2ebm.ZeroDivergence()):
        for batch in (4, 6, 3):
            problem.loss(model(**problem.inputs(batch))).backward()
    assert len(model.torch2ebm.captures.entries) == 1


def test_nodes_have_the_paths_of_submodules() -> None:
    problem = Problem("bert")
    model = torch2ebm.convert(problem.module(), example_inputs=problem.inputs())
    assert {
        "bert.embeddings.word_embeddings",
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.1.output.LayerNorm",
        "bert.pooler.dense",
        "classifier",
    } <= set(model.nodes)


def test_nodes_say_what_they_do_and_which_inputs_they_read() -> None:
    problem = Problem("gpt2", labels=True)
    model = torch2ebm.convert(problem.module(), example_inputs=problem.inputs())
    attention = model.nodes["transformer.h.0.attn.c_attn"].description.split(" > ")
    assert attention[0] == "Conv1D" and "scaled_dot_product_attention" in attention
    assert layout(model.graph).items["transformer.ln_f"].description.startswith("LayerNorm")
    boxes = [item.name for item in layout(model.graph).items.values() if item.kind == "input"]
    assert boxes == ["input_ids", "labels"]
    named = torch2ebm.convert(problem.module(), nodes=BLOCKS["gpt2"], example_inputs=problem.inputs())
    assert named.nodes["transformer.h.1"].description == "GPT2Block"


def test_tied_weights_are_one_parameter() -> None:
    problem = Problem("gpt2")
    module = problem.module()
    model = torch2ebm.convert(module, example_inputs=problem.inputs())
    holders = [node for node in model.nodes.values() for p in node.parameters.values() if p is module.lm_head.weight]
    assert len(holders) == 2


def test_running_statistics_move_once_and_masks_stay() -> None:
    problem = Problem("Normalised")
    module, inputs = problem.module(), problem.inputs()
    twin = copy.deepcopy(module)
    model = torch2ebm.convert(module, example_inputs=inputs)
    assert {node.name for node in model.nodes.values() if node.batch_statistics} == {"norm", "norm_again"}
    with training_with(model, torch2ebm.PredictiveCoding(steps=5, lr=0.1)):
        torch.manual_seed(3)
        problem.loss(model(**inputs)).backward()
    torch.manual_seed(3)
    twin(**inputs)
    for (name, ours), real in zip(module.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, real), name


def test_a_mode_flip_is_a_capture_of_its_own() -> None:
    problem = Problem("Normalised")
    module, inputs = problem.module(), problem.inputs()
    model = torch2ebm.convert(module, example_inputs=inputs)
    training = model.graph
    with training_with(model, torch2ebm.ZeroDivergence()):
        model.eval()
        output = model(**inputs)
        assert model.graph is not training
        assert torch.equal(output.logits, module(**inputs).logits)
        model.train()
        model(**inputs)
        assert model.graph is training


@pytest.mark.parametrize("lengths", [(5, 7, 5, 6)])
def test_a_loop_over_the_length_of_the_input_is_one_sequence_a_length(lengths: tuple[int, ...]) -> None:
    module = LoopOverShape().double()
    twin = copy.deepcopy(module)
    model = torch2ebm.convert(module)
    with training_with(model, torch2ebm.ZeroDivergence()):
        for length in lengths:
            assert_same_step(model, twin, torch.randn(4, length, dtype=torch.float64))
    assert len(model.torch2ebm.captures.entries) == len(set(lengths))


class StoppedForLargeBatches(nn.Module):
    """The same outputs for every batch size, and no gradient through the first layer for large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if len(x) > 3:
            hidden = hidden.detach()
        return self.second(torch.tanh(hidden).reshape(-1, 2, 2))


@pytest.mark.parametrize("sizes", [(4, 3, 6), (3, 4, 2)])
def test_a_graph_whose_gradients_differ_at_another_size_does_not_serve_it(sizes: tuple[int, ...]) -> None:
    module = StoppedForLargeBatches().double()
    twin, x = copy.deepcopy(module), torch.randn(6, 6, dtype=torch.float64)
    model = torch2ebm.convert(module, example_inputs=x[: sizes[0]])
    graphs = {}
    with training_with(model, torch2ebm.ZeroDivergence()):
        for size in sizes:
            assert_same_step(model, twin, x[:size])
            graphs[size] = model.graph
            assert (twin.first.weight.grad is None) == (size > 3)
    assert graphs[sizes[0]] is graphs[sizes[2]] is not graphs[sizes[1]]


def test_parts_of_an_input_are_data() -> None:
    model = torch2ebm.convert(Chunks().double(), example_inputs=torch.randn(4, 6, dtype=torch.float64))
    assert list(model.nodes) == ["parts.0", "read"]


def test_captured_by_needs_a_capture() -> None:
    with pytest.raises(errors.NotCapturedError):
        torch2ebm.convert(nn.Linear(2, 2)).captured_by  # noqa: B018


def test_a_bad_input_is_the_modules_own_error() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        torch2ebm.convert(BranchOnShape(), example_inputs=torch.randn(3, 5))


@pytest.mark.parametrize("layers", [12])
def test_a_deep_model_is_captured_in_seconds(layers: int) -> None:
    module, inputs = gpt2(layers).double(), Problem("gpt2", labels=True).inputs()
    start = perf_counter()
    torch2ebm.convert(module, example_inputs=inputs)
    assert perf_counter() - start < 20
