"""compile=True: what stands in a program, or in its compiled code, and changes from batch to batch."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_programs import (
    Make,
    assert_same,
    by_algorithm,
    cross_entropy,
    inputs,
    recorded_only,
    recordings,
    trained,
)
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import CompilationWarning
from torch2ebm.programs.record import record_program

__all__ = ["recorded_only", "recordings"]  # fixtures


class Scaled(nn.Module):
    """Reads an attribute that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scales = nn.Linear(8, 8), [1.0]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scales[0]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(0.3), Scaled(), nn.Tanh(), nn.Linear(8, 4)]
    return nn.Sequential(*parts).double()


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def changing(net: nn.Sequential, change: Callable[[nn.Sequential], None], steps: int = 6) -> Iterator[Tensor]:
    for step in range(steps):
        if step == 3:
            change(net)
        yield inputs(step)


CHANGES: list[Callable[[nn.Sequential], Any]] = [
    lambda net: setattr(net[2], "eps", 0.5),
    lambda net: setattr(net[2], "momentum", 0.9),
    lambda net: setattr(net[3], "p", 0.7),
    lambda net: net[4].scales.__setitem__(0, 0.5),
]


@pytest.mark.parametrize("change", CHANGES, ids=["eps", "momentum", "probability", "own"])
@by_algorithm
@pytest.mark.usefixtures("recorded_only")
def test_a_setting_of_a_module_may_change(make: Make, change: Callable[[nn.Sequential], None]) -> None:
    def run(algorithm: torch2ebm.Algorithm, change: Callable[[nn.Sequential], Any]) -> list[dict[str, Tensor]]:
        net = network()
        model = torch2ebm.convert(net, nodes=["0", "2", "4", "6"])
        optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.05), model, algorithm)
        torch.manual_seed(1)
        found = []
        for step, x in enumerate(changing(net, change)):
            optimizer.zero_grad()
            cross_entropy(step)(model(x)).backward()
            found.append({name: p.grad.clone() for name, p in net.named_parameters()} | buffers_of(net))
            optimizer.step()
        return found

    expected = run(make(), change)
    assert_same(run(make(compile=True), change), expected)
    with pytest.raises(AssertionError):
        assert_same(run(make(), lambda net: None), expected, 1e-4)


def buffers_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.double().clone() for name, buffer in net.named_buffers()}


@pytest.mark.usefixtures("recorded_only")
def test_an_attribute_that_changes_with_every_batch_is_recorded_a_few_times(recordings: list[int]) -> None:
    class Annealed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = plain(), 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * self.scale

    def batches(net: Annealed) -> Iterator[Tensor]:
        for step in range(14):
            net.scale = 1 + 0.1 * step
            yield inputs(step)

    def run(algorithm: torch2ebm.Algorithm) -> list[dict[str, Tensor]]:
        net = Annealed()
        return trained(net, algorithm, batches(net), steps=14)[0]

    expected = run(torch2ebm.PredictiveCoding(6, 0.1))
    with pytest.warns(CompilationWarning, match="kinds of batches") as warned:
        ours = run(torch2ebm.PredictiveCoding(6, 0.1, compile=True))
    assert len(warned) == 1
    assert_same(ours, expected)
    count = len(recordings)
    trained(plain(), torch2ebm.PredictiveCoding(6, 0.1, compile=True), steps=1)
    # one kind of the graph that takes the number for granted, and 8 of the one that reads it
    assert count <= (1 + 8) * (len(recordings) - count)


@pytest.mark.usefixtures("recorded_only")
def test_a_coefficient_may_change_with_every_batch(recordings: list[int]) -> None:
    def losses(step: int) -> Callable[[Tensor], Tensor]:
        return lambda output: cross_entropy(step)(output) + (0.1 * step - 0.4) * output.square().mean()

    expected, _ = trained(plain(), torch2ebm.PredictiveCoding(6, 0.1), losses=losses, steps=12)
    ours, _ = trained(plain(), torch2ebm.PredictiveCoding(6, 0.1, compile=True), losses=losses, steps=12)
    assert_same(ours, expected)
    count = len(recordings)
    trained(plain(), torch2ebm.PredictiveCoding(6, 0.1, compile=True), losses=losses, steps=1)
    assert count == len(recordings) - count


@pytest.mark.parametrize("chosen", ["mask", "numbers"])
@pytest.mark.usefixtures("recorded_only")
def test_a_loss_of_as_many_samples_as_a_mask_takes_runs_as_it_is(chosen: str) -> None:
    def losses(step: int) -> Callable[[Tensor], Tensor]:
        mask = torch.arange(5) <= 1 + step % 3
        index = mask if chosen == "mask" else torch.tensor([step % 5, 2])
        return lambda output: output[index].square().mean()

    expected, _ = trained(plain(), torch2ebm.PredictiveCoding(6, 0.1), losses=losses)
    told = pytest.warns(CompilationWarning, match="shape") if chosen == "mask" else contextlib.nullcontext()
    with told:
        ours, _ = trained(plain(), torch2ebm.PredictiveCoding(6, 0.1, compile=True), losses=losses)
    assert_same(ours, expected)


@pytest.mark.parametrize(
    "x",
    [torch.rand(3, 8)[:, 1::2], torch.rand(1, 4).expand(3, 4), torch.rand(5, 4)[2:], torch.rand(4, 3).t()],
    ids=["gaps", "overlaps", "later", "transposed"],
)
def test_a_compiled_program_takes_tensors_as_they_lie_in_memory(x: Tensor) -> None:
    program, expected = record_program(lambda: x.exp() + x, [x])
    program.compile()
    for _ in range(2):
        torch.testing.assert_close(program([x]), expected)


@pytest.mark.slow
def test_a_lazily_negated_input_is_no_kind_of_its_negative() -> None:
    def batches() -> Iterator[Tensor]:
        for step in range(5):
            z = torch.complex(inputs(step + 9), inputs(step))
            yield z.imag if step < 3 else z.conj().imag  # the second has a bit set, and the memory of the first

    expected, _ = trained(plain(), torch2ebm.PredictiveCoding(6, 0.1), batches())
    ours, _ = trained(plain(), torch2ebm.PredictiveCoding(6, 0.1, compile=True), batches())
    assert_same(ours, expected)


@by_algorithm
@pytest.mark.usefixtures("recorded_only")
def test_hooks_of_parameters_run_once_in_a_backward(make: Make) -> None:
    def run(algorithm: torch2ebm.Algorithm, factor: float) -> list[dict[str, Tensor]]:
        net = plain()
        for parameter in net.parameters():
            parameter.register_hook(lambda gradient: factor * gradient)
        return trained(net, algorithm, steps=4)[0]

    expected = run(make(), 2.0)
    assert_same(run(make(compile=True), 2.0), expected)
    with pytest.raises(AssertionError):
        assert_same(run(make(), 1.0), expected, 1e-4)
