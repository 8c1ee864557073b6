"""accelerate: everything goes through ``prepare``, and the weights are the plain loop's."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import forget_accelerator
from loops import ALGORITHMS, adam, batches, classification, halving, network, plain_loop, same_bits, samples
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torch2ebm

accelerate = pytest.importorskip("accelerate")

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)


class Run:
    """The loop of accelerate's documentation."""

    def __init__(self, algorithm: torch2ebm.Algorithm, precision: str = "no", accumulate: int = 1) -> None:
        forget_accelerator()
        self.accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate
        )
        self.net = network()
        model = torch2ebm.convert(self.net)
        self.own = torch2ebm.EnergyOptimizer(adam(self.net.parameters()), model, algorithm)
        loader = DataLoader(TensorDataset(*samples()), batch_size=5)
        prepared = self.accelerator.prepare(model, self.own, loader, halving(self.own))
        self.model, self.optimizer, self.loader, self.scheduler = prepared

    def train(self, clip: float | None = None) -> None:
        for x, y in self.loader:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(F.cross_entropy(self.model(x), y))
                if clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()


@every_algorithm
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (2, 0.1)])
def test_weights_and_schedule_are_the_plain_loops(
    algorithm: torch2ebm.Algorithm, accumulate: int, clip: float | None
) -> None:
    run = Run(algorithm, accumulate=accumulate)
    run.train(clip)
    net, optimizer = plain_loop(algorithm, batches(), accumulate=accumulate, clip=clip)
    assert same_bits(run.net, net)
    assert run.own.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 0.05


def in_bfloat16(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    return F.cross_entropy(output.float(), y)


@every_algorithm
def test_in_bfloat16_the_weights_are_the_plain_loops_under_autocast(algorithm: torch2ebm.Algorithm) -> None:
    run = Run(algorithm, precision="bf16", accumulate=2)
    run.train()
    assert same_bits(run.net, plain_loop(algorithm, batches(), accumulate=2, loss=in_bfloat16)[0])
    assert not same_bits(run.net, plain_loop(algorithm, batches(), accumulate=2)[0])
    assert {parameter.dtype for parameter in run.net.parameters()} == {torch.float32}


@every_algorithm
def test_a_resumed_run_is_the_straight_one(algorithm: torch2ebm.Algorithm, tmp_path: Path) -> None:
    straight = Run(algorithm)
    straight.train()
    straight.accelerator.save_state(str(tmp_path / "half"))
    straight.train()
    resumed = Run(algorithm)
    resumed.accelerator.load_state(str(tmp_path / "half"))
    resumed.train()
    assert same_bits(resumed.net, straight.net)
    assert resumed.own.param_groups[0]["lr"] == straight.own.param_groups[0]["lr"] == 0.05 / 16
    fresh = Run(algorithm)
    fresh.train()
    assert not same_bits(fresh.net, straight.net)


def test_the_saved_optimizer_loads_into_the_bare_one(tmp_path: Path) -> None:
    run = Run(ALGORITHMS["PredictiveCoding"])
    run.train()
    run.accelerator.save_state(str(tmp_path / "whole"))
    bare = adam(network().parameters())
    bare.load_state_dict(torch.load(tmp_path / "whole" / "optimizer.bin", weights_only=True))
    torch.testing.assert_close(bare.state_dict()["state"], run.own.state_dict()["state"], rtol=0, atol=0)


def copied(optimizer: torch2ebm.EnergyOptimizer) -> torch2ebm.EnergyOptimizer:
    return copy.deepcopy(optimizer)


def pickled(optimizer: torch2ebm.EnergyOptimizer) -> torch2ebm.EnergyOptimizer:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("through", [copied, pickled])
def test_a_copy_of_the_optimizer_that_accelerate_holds_goes_on_as_the_plain_loop(through: Any) -> None:
    run = Run(ALGORITHMS["PredictiveCoding"])
    run.train()
    ours, (_, theirs) = through(run.optimizer.optimizer), plain_loop(ALGORITHMS["PredictiveCoding"], batches())
    for optimizer in (ours, theirs):
        optimizer.zero_grad()
        classification(optimizer.model, *batches()[0]).backward()
        optimizer.step()
    assert same_bits(ours.model, theirs.model) and not same_bits(ours.model, run.net)


def test_unwrapping_gives_the_converted_model_back() -> None:
    run = Run(ALGORITHMS["PredictiveCoding"], precision="bf16")
    model = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    assert model is run.own.model
    x, _ = batches()[0]
    with torch.no_grad():
        assert torch.equal(model.eval()(x), run.net(x))
