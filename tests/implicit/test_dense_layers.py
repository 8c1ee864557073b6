"""Which nodes are one dense layer, and what is read off them."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch2ebm
from torch2ebm.engine.call import Call
from torch2ebm.errors import DenseLayerError
from torch2ebm.implicit.dense_layers import dense_layers

BATCH = 4


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double()


def fed(module: nn.Module, x: Tensor, nodes: object = "preactivation") -> Call:
    model = torch2ebm.convert(module.double(), nodes=nodes, example_inputs=x)
    call = model.torch2ebm.new_call((x,), {})
    call.feedforward(keep_graph=False)
    return call


def value_of(call: Call, node: str) -> Tensor:
    (slot,) = call.graph.nodes[node].slots
    return call.values[slot]


class Form(nn.Module):
    """A dense layer of its input's tanh, written out as ``layer(weight, bias, rows)``."""

    def __init__(self, layer: Callable[[Tensor, Tensor, Tensor], Tensor], weight: tuple[int, int]) -> None:
        super().__init__()
        self.layer = layer
        self.weight, self.bias = nn.Parameter(data(*weight)), nn.Parameter(data(5))

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(self.weight, self.bias, torch.tanh(h))


class Written(nn.Module):
    def __init__(self, layer: Callable[[Tensor, Tensor, Tensor], Tensor], weight: tuple[int, int] = (5, 5)) -> None:
        super().__init__()
        self.first, self.form = nn.Linear(3, 5), Form(layer, weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.first(x))


WHOLE = ["first", "form"]  # one node each, whatever the form is made of


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda w, b, a: F.linear(a, w, b),
    "keywords": lambda w, b, a: F.linear(a, weight=w, bias=b),
    "addmm": lambda w, b, a: torch.addmm(b, a, w.t()),
    "matmul": lambda w, b, a: torch.matmul(a, w.transpose(0, 1)) + b,
    "T": lambda w, b, a: b + a @ w.T,
    "stored_transposed": lambda w, b, a: a @ w + b,
    "converted": lambda w, b, a: F.linear(a, w.to(a.dtype), b.to(a.dtype)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_way_to_write_a_dense_layer_gives_its_rows_and_its_names(form) -> None:
    module = Written(form)
    call = fed(module, data(BATCH, 3), nodes=WHOLE)
    layer = dense_layers(call)["form"]
    assert (layer.weight, layer.bias, layer.fan_in, layer.fan_out) == ("form.weight", "form.bias", 5, 5)
    assert layer.has_bias and layer.transposed == (form is FORMS["stored_transposed"])
    moved = (value_of(call, "first") + 0.3).detach().requires_grad_()
    found = layer.evaluate(call, [moved])
    activation = torch.tanh(moved)
    torch.testing.assert_close(found.rows, activation, rtol=0, atol=0)
    # derivatives of the rows in the parent's value, as autograd has them outside the node
    ours = torch.autograd.grad(found.rows.square().sum(), moved, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(activation.square().sum(), moved)[0], rtol=1e-15, atol=0)
    weight = module.form.weight.t() if layer.transposed else module.form.weight
    expected = F.linear(activation, weight, module.form.bias)
    torch.testing.assert_close(found.evaluated.predictions[0], expected, rtol=1e-13, atol=1e-14)


def test_gradients_come_in_the_shapes_that_the_parameters_are_stored_in() -> None:
    layer = dense_layers(fed(Written(FORMS["stored_transposed"]), data(BATCH, 3), WHOLE))["form"]
    found = layer.gradients(data(5, 5), data(5))
    assert torch.equal(found["form.weight"], data(5, 5).t()) and torch.equal(found["form.bias"], data(5))


def test_in_a_partition_at_the_pre_activations_every_linear_is_a_node_of_its_own() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
    call = fed(module, data(BATCH, 3))
    layers = dense_layers(call)
    assert [(layer.weight, layer.bias, layer.fan_in, layer.fan_out) for layer in layers.values()] == [
        ("0.weight", "0.bias", 3, 5),
        ("2.weight", None, 5, 4),
        ("4.weight", "4.bias", 4, 2),
    ]
    value = value_of(call, "0").detach()
    assert torch.equal(layers["2"].evaluate(call, [value]).rows, torch.relu(value))


class Residual(nn.Module):
    """One named node ``W a + b + skip``: the skip is free of the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(3, 5), Block(), nn.Linear(5, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(torch.relu(h)) + h


def test_a_skip_inside_the_node_is_free_of_its_parameters() -> None:
    call = fed(Residual(), data(BATCH, 3), nodes=["first", "block", "last"])
    layers = dense_layers(call)
    assert [(layer.weight, layer.bias) for layer in layers.values()] == [
        ("first.weight", "first.bias"),
        ("block.inner.weight", "block.inner.bias"),
        ("last.weight", None),
    ]


def test_frozen_parameters_are_part_of_what_is_free() -> None:
    module, x = Residual(), data(BATCH, 3)
    module.first.requires_grad_(False)
    module.block.inner.bias.requires_grad_(False)
    layers = dense_layers(fed(module, x, nodes=["first", "block", "last"]))
    assert [(layer.weight, layer.bias) for layer in layers.values()] == [
        ("block.inner.weight", None),
        ("last.weight", None),
    ]


@dataclass
class Outside:
    """A model that is outside the theory, and what its refusal has to say."""

    name: str
    build: Callable[[], nn.Module]
    says: tuple[str, ...]
    shape: tuple[int, ...] = (BATCH, 3)
    nodes: object = "preactivation"


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(3, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(torch.tanh(self.twice(torch.tanh(self.first(x)))))


OUTSIDE = [
    Outside("convolution", lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2)),
            ("node '0'", "'0.weight' is used by conv2d"), (BATCH, 2, 5, 5)),
    Outside("norm", lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)),
            ("node '1'", "used by layer_norm")),
    Outside("shared", Shared, ("node 'twice_1'", "read by 2 nodes")),
    Outside("sequence", lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
            ("node '2'", "shape (4, 6, 3)", "not one row for each of 4 samples"), (BATCH, 6, 3)),
    Outside("two_layers", lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5)), nn.Linear(5, 2)),
            ("node '0'", "2 products"), nodes="children"),
    Outside("activation_after", lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, 2)),
            ("node '0'", "through something other than a sum"), nodes="children"),
    Outside("scaled", lambda: Written(lambda w, b, a: F.linear(a, w * 2.0, b)),
            ("'form.weight' is used by mul",), nodes=WHOLE),
    Outside("scaled_after", lambda: Written(lambda w, b, a: 2.0 * F.linear(a, w, b)), ("other than a sum",),
            nodes=WHOLE),
    Outside("bias_first", lambda: Written(lambda w, b, a: F.linear(a + b, w)), ("other than a sum",),
            nodes=WHOLE),
    Outside("bias_alone", lambda: Written(FORMS["matmul"]), ("node 'form.add'", "0 products")),
]  # fmt: skip


@pytest.mark.parametrize("outside", OUTSIDE, ids=lambda outside: outside.name)
def test_what_is_outside_the_theory_is_refused_by_name(outside: Outside) -> None:
    call = fed(outside.build(), data(*outside.shape), outside.nodes)
    with pytest.raises(DenseLayerError) as caught:
        dense_layers(call)
    for part in (*outside.says, "PredictiveCoding", "ZeroDivergence", "requires_grad_(False)"):
        assert part in str(caught.value)
