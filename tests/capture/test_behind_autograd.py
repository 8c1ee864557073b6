"""What autograd is not told of: writes by ``.data``, ``out=``, transforms of ``torch.func`` inside of forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import attached
from test_capture import WIDTH, Wired, assert_is_the_module, normal, statements
from torch import nn

import torch2ebm
from torch2ebm.errors import CaptureMismatchError

NODES = pytest.mark.parametrize("nodes", ["auto", "op"])


def is_followed(source: str, nodes: Any, warning: str = "") -> Any:
    """In a recorded run and in those that follow it, each from the buffers that the last has left."""

    def build() -> nn.Module:
        return Wired(statements(source), codes=torch.linspace(0.5, 2, WIDTH), table=normal(5, WIDTH, seed=9))

    model, twin = attached(build(), torch2ebm.ZeroDivergence(), nodes), build()
    for seed in range(4):
        assert_is_the_module(model, twin, normal(5, WIDTH, seed=seed))
    relaxing = attached(build(), torch2ebm.PredictiveCoding(3, 1e-3), nodes)
    for _ in range(2):
        relaxing(normal(5, WIDTH)).square().mean().backward()
        assert relaxing.state.relaxation.energy[-1] < relaxing.state.relaxation.energy[0]
    return model


BY_DATA = {
    "written, then read": "self.codes.data.mul_(0.9); h = h * self.codes",
    "read, written, read": "h = h + self.codes; self.codes.data.mul_(0.9); h = torch.tanh(h) + self.codes",
    "an index": "h = h + self.codes; self.codes.data[:2] = 3.0; h = torch.tanh(h) + self.codes",
    "what is hidden": "h = h + self.codes; self.codes.data.copy_(h.detach().mean(0)); h = torch.sin(h) + self.codes",
    "of a hot tensor": "h = h + self.codes; self.codes.data.mul_(0.9).add_(h.mean(0)); h = torch.tanh(h) + self.codes",
    "index_add_": "h = h + self.codes; self.codes.data.index_add_(0, torch.arange(3), x[0, :3]); h = h + self.codes",
    "a view first": "h = h + self.table[0]; self.table[0].data.zero_(); h = torch.tanh(h) + self.table[0]",
    "another memory": "h = h + self.codes; self.codes.data = x.mean(0); h = torch.tanh(h) + self.codes",
    "twice": "h = h + self.codes; d = self.codes.data; d.add_(1); h = torch.tanh(h) + self.codes; d.add_(1); "
    "h = torch.sin(h) + self.codes",
    "a codebook": "i = torch.cdist(h, self.table).argmin(1); q = F.embedding(i, self.table); "
    "self.table.data.mul_(0.9).add_(h.data, alpha=0.1); h = h + (q - h).detach()",
    "hidden values": "h = torch.sin(h); y = h * 1.0; y.data.clamp_(-0.3, 0.3); h = h + y",
}


@NODES
@pytest.mark.parametrize("source", BY_DATA.values(), ids=BY_DATA)
def test_a_write_by_data_is_followed(source: str, nodes: str) -> None:
    is_followed(source, nodes)


REFUSED = {
    "in NumPy": ("h = h + self.codes; self.codes.numpy()[:] *= 0.5; h = torch.tanh(h) + self.codes", "buffer 'codes'"),
    "what autograd has saved": ("h = h * self.codes; self.codes.data.mul_(0.5); h = torch.tanh(h)", "buffer 'codes'"),
    "the memory of a parameter": (
        "w = self.last.weight; old = w.data; w.data = old * 2; h = torch.tanh(h @ w); w.data = old",
        "'last.weight'",
    ),
    "a parameter": ("w = self.last.weight; h = h @ w; w.data.mul_(0.5); h = torch.tanh(h) @ w", "'last.weight'"),
}


@pytest.mark.parametrize(("source", "named"), REFUSED.values(), ids=REFUSED)
def test_a_write_that_cannot_be_followed_is_named(source: str, named: str) -> None:
    model = attached(Wired(statements(source), codes=torch.linspace(0.5, 2, WIDTH)), torch2ebm.ZeroDivergence())
    with pytest.raises(CaptureMismatchError, match="in place after it was read") as caught:
        model(normal(5, WIDTH))
    assert named in str(caught.value)


OUT = {
    "a buffer": "with torch.no_grad(): torch.mul(h, 2, out=self.table)\nh = h + self.table",
    "what is hidden": "y = torch.sin(h).detach(); torch.mul(h.detach(), 2, out=y); h = h + y",
    "a part of it": "y = torch.sin(h).detach(); torch.mul(h.detach()[:, :2], 2, out=y[:, :2]); h = h + y",
    "an empty tensor": "y = torch.empty(0, dtype=h.dtype); torch.add(h.detach(), 1, out=y); h = h + y",
    "another precision": "y = torch.sin(h).detach().float(); torch.add(h.detach(), 1, out=y); h = h + y",
    "two": "y = h.detach().sum(1); i = torch.empty(5, dtype=torch.long); torch.max(h.detach(), 1, out=(y, i)); "
    "h = h + y[:, None] + i[:, None]",
}


@NODES
@pytest.mark.parametrize("source", OUT.values(), ids=OUT)
def test_out_is_followed(source: str, nodes: str) -> None:
    is_followed(source.replace("\n", ";"), nodes)


@NODES
def test_a_hidden_sparse_tensor_is_followed(nodes: str) -> None:
    source = "m = (self.last.weight * (self.last.weight > 0)).to_sparse(); h = torch.sparse.mm(m, h.t()).t()"
    is_followed(source, nodes)


SWITCHED = {
    "a constant": "h = h * torch.ones(WIDTH, dtype=h.dtype).requires_grad_()",
    "off": "y = torch.sin(h).detach(); y.requires_grad_(False); h = h * y",
    "an attribute": "y = torch.ones(WIDTH, dtype=h.dtype); y.requires_grad = True; h = h * y",
}


@NODES
@pytest.mark.parametrize("source", SWITCHED.values(), ids=SWITCHED)
def test_requires_grad_is_followed(source: str, nodes: str) -> None:
    is_followed(source.replace("WIDTH", str(WIDTH)), nodes)


class Transformed(nn.Module):
    """A hidden block with a transform inside."""

    def __init__(self, source: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(WIDTH, WIDTH), Wired(statements(source)), nn.Linear(WIDTH, 3)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(torch.tanh(self.first(x))))


TRANSFORMS = {
    "grad": "h = h - 0.1 * torch.func.grad(lambda z: self.last(z).square().sum())(h)",
    "grad of a parameter": "h = h @ torch.func.grad(lambda w: F.linear(h, w).square().sum())(self.last.weight)",
    "vmap": "h = torch.func.vmap(lambda z: torch.tanh(self.last(z)))(h)",
    "vjp": "o, pull = torch.func.vjp(lambda z: torch.tanh(self.last(z)), h); h = o + pull(torch.ones_like(o))[0]",
    "jvp": "o, t = torch.func.jvp(lambda z: torch.tanh(self.last(z)), (h,), (torch.ones_like(h),)); h = o + t",
    "jacrev": "h = h + torch.func.vmap(torch.func.jacrev(lambda z: torch.tanh(self.last(z))))(h).sum(1)",
    "jacobian": "h = h + torch.autograd.functional.jacobian(lambda z: self.last(z).sin().sum(0), h, "
    "create_graph=True).sum(0)",
    "forward mode": "fa = torch.autograd.forward_ad; level = fa.dual_level(); level.__enter__(); "
    "p, t = fa.unpack_dual(torch.tanh(self.last(fa.make_dual(h, torch.ones_like(h))))); h = p + t; "
    "level.__exit__(None, None, None)",
}


@pytest.mark.parametrize("source", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_module_that_transforms_is_one_node(source: str) -> None:
    model, twin = attached(Transformed(source), torch2ebm.ZeroDivergence()), Transformed(source)
    with pytest.warns(torch2ebm.errors.OpaqueModuleWarning, match=r"Transformed\.inner takes a"):
        assert_is_the_module(model, twin, normal(5, WIDTH))
    for seed in range(3):
        assert_is_the_module(model, twin, normal(5, WIDTH, seed=seed))
    assert list(model.nodes) == ["first", "inner", "last"]


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.OpaqueModuleWarning")
@pytest.mark.parametrize("source", TRANSFORMS.values(), ids=TRANSFORMS)
def test_values_around_a_transform_relax(source: str) -> None:
    model = attached(Transformed(source), torch2ebm.PredictiveCoding(3, 1e-3))
    for _ in range(2):
        model(normal(5, WIDTH)).square().mean().backward()
        assert model.state.relaxation.energy[-1] < model.state.relaxation.energy[0]
