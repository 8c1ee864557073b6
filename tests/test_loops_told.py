"""Loops that never relax are told, once, what to change; loops that are as they should be are told nothing."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import PlainBackwardWarning, WrappedStepWarning

X, LABELS = torch.linspace(-1, 1, 24).reshape(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
CODING = torch2ebm.PredictiveCoding(steps=3, lr=0.1)


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def loss(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self(x), LABELS)


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)


def attached(net: nn.Module, algorithm: Any = CODING) -> tuple[Any, Any]:
    model = torch2ebm.convert(net)
    return model, torch2ebm.EnergyOptimizer(sgd(net), model, algorithm)


def train(forward: Callable[[Tensor], Tensor], optimizer: Any, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(forward(X), LABELS).backward()
        optimizer.step()


@contextmanager
def told(category: type[Warning], said: str) -> Iterator[None]:
    """Inside, this is said once, by a warning that points here, and nothing else is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [each.category for each in caught] == [category]
    assert said in str(caught[0].message) and caught[0].filename == __file__


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- told


def test_the_module_in_the_place_of_the_model() -> None:
    net = Net()
    _, optimizer = attached(net)
    with told(PlainBackwardWarning, "Call model(x)"):
        train(net, optimizer)


def test_a_method_of_the_module() -> None:
    net = Net()
    _, optimizer = attached(net)
    with told(PlainBackwardWarning, "net(x)"):
        for _ in range(3):
            optimizer.zero_grad()
            net.loss(X).backward()
            optimizer.step()


def test_the_module_after_some_steps_on_the_model() -> None:
    net = Net()
    model, optimizer = attached(net)
    with quiet():
        train(model, optimizer)
    with told(PlainBackwardWarning, "Call model(x)"):
        train(net, optimizer)


def test_a_part_of_the_module() -> None:
    body = Net()
    net = nn.Sequential(body, nn.Tanh())
    _, optimizer = attached(net)
    with told(PlainBackwardWarning, "a part of it"):
        train(body, optimizer)


def test_what_a_second_convert_has_returned() -> None:
    net = Net()
    _, optimizer = attached(net)
    again = torch2ebm.convert(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(again, optimizer)
    said = [str(each.message) for each in caught]
    assert {each.category for each in caught} == {PlainBackwardWarning} and len(said) == 2  # once by each of the two
    assert "another torch2ebm.convert" in said[0] and "nothing is attached" in said[1]


def test_a_converted_model_without_an_energy_optimizer() -> None:
    net = Net()
    model = torch2ebm.convert(net)
    with told(PlainBackwardWarning, "torch2ebm.EnergyOptimizer(optimizer, model"):
        train(model, sgd(net))


@pytest.mark.parametrize("algorithm", [CODING, torch2ebm.IncrementalPredictiveCoding(steps=3, lr=0.05)])
def test_the_step_of_the_optimizer_inside(algorithm: torch2ebm.Algorithm) -> None:
    net = Net()
    model, optimizer = attached(net, algorithm)
    with told(WrappedStepWarning, "SGD.step()"):
        train(model, optimizer.optimizer)


def test_a_method_that_steps_on_gradients_of_the_module() -> None:
    class Own(torch.optim.SGD):
        def second_step(self) -> None:
            super().step()

    net = Net()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(Own(net.parameters(), lr=0.1), model, CODING)
    with told(PlainBackwardWarning, "Call model(x)"):
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(net(X), LABELS).backward()
            optimizer.second_step()


# ---- quiet


def evaluation(net: Net) -> None:
    model, optimizer = attached(net)
    for _ in range(3):
        train(model, optimizer, 1)
        net.eval(), net(X).sum().item()
        with torch.no_grad():
            model(X), net(X)
        net.train()


def frozen_parts(net: Net) -> None:
    net[0].requires_grad_(False)
    model, optimizer = attached(net)
    train(model, optimizer)
    net[0].requires_grad_(True)


def everything_frozen_but_a_part_that_is_converted(net: Net) -> None:
    body = nn.Linear(4, 4)
    model, optimizer = attached(net)
    train(lambda x: model(body(x)), optimizer)


def averaged_copy(net: Net) -> None:
    model, optimizer = attached(net)
    teacher = copy.deepcopy(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
        with torch.no_grad():
            for ours, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
                ours.lerp_(theirs, 0.1)
            teacher(X), averaged(X)


def a_plain_copy_that_is_averaged(net: Net) -> None:
    """Its results require gradients, and are detached; its weights move, and no backward ever comes."""
    teacher = torch2ebm.convert(copy.deepcopy(net))
    model, optimizer = attached(net)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(X), teacher(X).detach() + 1).backward()
        optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
                ours.lerp_(theirs, 0.1)


def adversaries(net: Net) -> None:
    """The detached pass of the generator, which the discriminator's step sees."""
    critic = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))
    model, optimizer = attached(net, torch2ebm.ZeroDivergence())
    judge, judges = attached(critic, torch2ebm.ZeroDivergence())
    for _ in range(3):
        judges.zero_grad()
        (judge(model(X).detach()).mean() - judge(torch.ones(6, 3)).mean()).square().backward()
        judges.step()
        optimizer.zero_grad()
        (judge(model(X)).mean() - 1).square().backward()
        optimizer.step()


def two_steps_on_one_backward(net: Net) -> None:
    model, optimizer = attached(net)
    train(model, optimizer, 1)
    optimizer.step()
    train(model, optimizer, 1)


def a_saliency_map(net: Net) -> None:
    model = torch2ebm.convert(net)
    for _ in range(3):
        x = X.clone().requires_grad_()
        model(x).sum().backward()


def loading_without_training(net: Net) -> None:
    model = torch2ebm.convert(net)
    for _ in range(3):
        model(X).sum()
        net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})


def a_plain_loop_after_detach(net: Net) -> None:
    model, optimizer = attached(net)
    train(model, optimizer, 1)
    inner = optimizer.detach()
    train(model, inner)
    train(model, optimizer)
    train(net, optimizer)


def another_phase_that_leaves_zeros(net: Net) -> None:
    """A step for parameters beside, in which the model's gradients are zeros and new."""
    extra = nn.Parameter(torch.ones(1))
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD([*net.parameters(), extra], lr=0.1), model, CODING)
    for _ in range(2):
        train(model, optimizer, 1)
        optimizer.zero_grad(set_to_none=False)
        extra.square().sum().backward()
        optimizer.step()


def accumulation(net: Net) -> None:
    model, optimizer = attached(net)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            (F.cross_entropy(model(X), LABELS) / 2).backward()
        optimizer.step()


def a_scheduler_and_a_scaler(net: Net) -> None:
    model, optimizer = attached(net)
    scheduler, scaler = torch.optim.lr_scheduler.StepLR(optimizer, 1), torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(X), LABELS)).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()


def a_cell_that_runs_again(net: Net) -> None:
    for _ in range(3):
        model, optimizer = attached(net)
        train(model, optimizer, 2)


def the_attachment_without_its_variable(net: Net) -> None:
    model, inner = torch2ebm.convert(net), sgd(net)
    torch2ebm.EnergyOptimizer(inner, model, CODING)
    train(model, inner)


RIGHT = [
    evaluation, frozen_parts, everything_frozen_but_a_part_that_is_converted, averaged_copy,
    a_plain_copy_that_is_averaged, adversaries, two_steps_on_one_backward, a_saliency_map, loading_without_training,
    a_plain_loop_after_detach, another_phase_that_leaves_zeros, accumulation, a_scheduler_and_a_scaler,
    a_cell_that_runs_again, the_attachment_without_its_variable,
]  # fmt: skip


@pytest.mark.parametrize("loop", RIGHT, ids=lambda loop: loop.__name__)
def test_a_loop_that_is_right_is_told_nothing(loop: Callable[[Net], None]) -> None:
    net = Net()
    with quiet():
        loop(net)


def test_a_loop_without_an_optimizer_that_is_told_trains_as_before() -> None:
    """What watches leaves gradients and results as they are."""
    net = Net()
    twin = copy.deepcopy(net)
    model = torch2ebm.convert(net)
    with pytest.warns(PlainBackwardWarning):
        train(model, sgd(net))
    train(twin, sgd(twin))
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert model(X)._backward_hooks is None
