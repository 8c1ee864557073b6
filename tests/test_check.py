"""``torch2ebm.check`` lists what there is to know of a module, and leaves it alone."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ConfigurationError


class Odd(nn.Module):
    """Something of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(2, 2)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        self.first.bias.requires_grad_(False)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.drop(torch.tanh(self.first(x))))
        if h.mean() > 100:
            h = h * 2
        self.seen = [h]
        return self.last(self.scripted(h))


def test_every_kind_of_finding_has_its_place_and_its_remedy() -> None:
    report = torch2ebm.check(Odd(), torch.randn(5, 4))
    assert report.nodes == ("first", "norm", "scripted", "last") or set(report.nodes) > {"first", "norm", "scripted"}
    assert [f.place for f in report.of_kind("opaque")] == ["module 'scripted'"]
    assert [f.place for f in report.of_kind("no gradient")] == [
        "parameter 'first.bias'",
        "parameter 'unused.weight'",
        "parameter 'unused.bias'",
    ]
    assert [f.place for f in report.of_kind("random")] == ["node 'first'"]
    assert [f.place for f in report.of_kind("batch statistics")] == ["node 'norm'"]
    (value,) = report.of_kind("value")
    assert value.place.startswith(__file__) and "__bool__" in value.text
    assert len(report.of_kind("held")) == 1
    assert report.batch_size == 5
    assert all(finding.text and finding.place for finding in report.findings)
    assert "scripted" in str(report) and report.table in str(report)


def test_a_plain_net_has_nothing_to_report() -> None:
    report = torch2ebm.check(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(5, 4))
    assert report.findings == () and "nothing to report" in str(report)


class Lucky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.c(torch.tanh(self.a(x) if self.runs % 2 else self.b(self.a(x))))


def test_branches_between_two_runs_are_told() -> None:
    net = Lucky()
    before = torch.random.get_rng_state()
    python, numpy = random.getstate(), np.random.get_state()[1].copy()
    # the count of runs is put back after each, so that both take the first branch
    assert torch2ebm.check(net, torch.randn(2, 4)).of_kind("branches") == ()
    assert net.runs == 0
    torch.random.set_rng_state(before)
    calls = iter([True, False])
    net.forward = lambda x: net.c(net.a(x) if next(calls) else net.b(net.a(x)))  # type: ignore[method-assign]
    assert len(torch2ebm.check(net, torch.randn(2, 4)).of_kind("branches")) == 1
    assert random.getstate() == python and (np.random.get_state()[1] == numpy).all()


def test_a_net_of_one_node_is_told() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    (finding,) = torch2ebm.check(net, torch.randn(2, 4), nodes=["0"]).of_kind("one node")
    assert finding.place == "node '0'"


def test_an_output_without_the_batch_is_told() -> None:
    class Transposed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).T.contiguous()

    assert len(torch2ebm.check(Transposed(4, 3), torch.randn(5, 4)).of_kind("batch")) == 1


def test_check_leaves_the_module_as_it_was() -> None:
    net = Odd()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    generator = torch.random.get_rng_state()
    torch2ebm.check(net, torch.zeros(5, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert net.seen == [] and all(p.grad is None for p in net.parameters())


def test_a_converted_model_can_be_checked_and_inputs_are_asked_for() -> None:
    net = nn.Linear(4, 3)
    assert (
        torch2ebm.check(torch2ebm.convert(net), torch.randn(2, 4)).nodes == torch2ebm.check(net, torch.ones(2, 4)).nodes
    )
    with pytest.raises(ConfigurationError, match="Pass one batch"):
        torch2ebm.check(net, None)
