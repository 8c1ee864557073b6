"""Averaged copies of the weights: ``AveragedModel`` of the converted model is that of the net itself."""

import copy
from typing import Any

import pytest
import torch
from loops import ALGORITHMS, batches, classification, network, same_bits
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import torch2ebm

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
AVERAGES: dict[str, dict[str, Any]] = {
    "SWA": {},
    "EMA": {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
    "EMA of buffers too": {"multi_avg_fn": get_ema_multi_avg_fn(0.8), "use_buffers": True},
}
every_average = pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)


class Run:
    def __init__(self, algorithm: torch2ebm.Algorithm, average: dict[str, Any]) -> None:
        self.net = network()
        self.model = torch2ebm.convert(self.net)
        sgd = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.optimizer = torch2ebm.EnergyOptimizer(sgd, self.model, algorithm)
        self.schedule = SWALR(self.optimizer, 0.02, anneal_epochs=2)
        self.ours, self.theirs = AveragedModel(self.model, **average), AveragedModel(self.net, **average)

    def train(self) -> None:
        for batch in batches():
            self.optimizer.zero_grad()
            classification(self.model, *batch).backward()
            self.optimizer.step()
            self.schedule.step()
            self.ours.update_parameters(self.model)
            self.theirs.update_parameters(self.net)


@every_algorithm
@every_average
def test_the_average_of_the_converted_model_is_that_of_the_net(
    algorithm: torch2ebm.Algorithm, average: dict[str, Any]
) -> None:
    run = Run(algorithm, average)
    run.train()
    assert same_bits(run.ours, run.theirs)
    assert not same_bits(run.ours.module, run.net)  # an average, and a copy
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
    with torch.no_grad():
        for x, _ in batches():
            assert torch.equal(run.ours.eval()(x), run.theirs.eval()(x))


@every_average
def test_batch_statistics_of_the_average_are_updated_as_the_nets(average: dict[str, Any]) -> None:
    run = Run(ALGORITHMS["PredictiveCoding"], average)
    run.train()
    before = copy.deepcopy(run.ours.module.state_dict())
    for averaged in (run.ours, run.theirs):
        update_bn(batches(), averaged)
    assert same_bits(run.ours, run.theirs)
    changed = [name for name, tensor in run.ours.module.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {"1.running_mean", "1.running_var"} <= set(changed) <= {n for n, _ in run.ours.module.named_buffers()}


@every_algorithm
def test_averaging_does_not_disturb_the_training(algorithm: torch2ebm.Algorithm) -> None:
    averaged, alone = (Run(algorithm, AVERAGES["EMA"]) for _ in range(2))
    averaged.train()
    for batch in batches():
        alone.optimizer.zero_grad()
        classification(alone.model, *batch).backward()
        alone.optimizer.step()
        alone.schedule.step()
    assert same_bits(averaged.net, alone.net)


def test_an_average_loads_into_the_net_and_is_no_model_that_learns() -> None:
    """The copy has the algorithm, and no optimizer: its ``.grad`` are local gradients, and nobody steps."""
    run = Run(ALGORITHMS["PredictiveCoding"], AVERAGES["EMA"])
    run.train()
    net = network()
    net.load_state_dict(run.ours.module.state_dict())
    assert same_bits(net, run.theirs.module)
    model = torch2ebm.convert(net)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, ALGORITHMS["PredictiveCoding"])
    for each in (run.ours.module.train(), model.train()):
        classification(each, *batches()[0]).backward()
    assert gradients(run.ours.module).keys() == gradients(net).keys()
    torch.testing.assert_close(gradients(run.ours.module), gradients(net), rtol=0, atol=0)


def gradients(model: nn.Module) -> dict[str, Any]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}
