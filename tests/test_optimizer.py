"""The wrapper is the wrapped optimizer: every one that torch has, every scheduler, and all that people do to one."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import SCHEDULERS_OWN_WARNING, same
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

import torch2ebm

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.05),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.05),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}
OPTIMIZERS = {name: make for name, make in OPTIMIZERS.items() if hasattr(torch.optim, name)}

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.8),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
}
SWA = {"SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 3)}

ALGORITHM = torch2ebm.PredictiveCoding(steps=3, lr=0.3)
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0, 1])


def network() -> nn.Sequential:
    """Without biases: Muon takes matrices alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))


class Wrapped:
    """A net whose optimizer is wrapped."""

    def __init__(self, make: str = "Adam") -> None:
        self.net = network()
        self.model = torch2ebm.convert(self.net)
        self.inner = OPTIMIZERS[make](self.net.parameters())
        self.optimizer = torch2ebm.EnergyOptimizer(self.inner, self.model, ALGORITHM)

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(X), LABELS)
        loss.backward()
        return loss


class Bare:
    """Its twin with the bare optimizer, whose gradients come from an attachment that no optimizer knows of."""

    def __init__(self, make: str = "Adam") -> None:
        self.net = network()
        self.model = torch2ebm.convert(self.net)
        self.model.attach(ALGORITHM)
        self.optimizer = OPTIMIZERS[make](self.net.parameters())

    closure = Wrapped.closure


def weights(pair: Wrapped | Bare) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in pair.net.parameters()]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


def shared(state: dict[str, Any]) -> dict[str, Any]:
    """What the bare optimizer's state_dict has too."""
    return {key: state[key] for key in ("state", "param_groups")}


every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS)


def test_every_optimizer_and_every_scheduler_of_torch_is_in_the_lists() -> None:
    """SparseAdam takes sparse gradients alone."""
    optimizers = {n for n in dir(torch.optim) if _is(getattr(torch.optim, n), torch.optim.Optimizer)}
    assert optimizers - {"Optimizer", "SparseAdam"} == set(OPTIMIZERS)
    schedulers = {n for n in dir(lr_scheduler) if _is(getattr(lr_scheduler, n), lr_scheduler.LRScheduler)}
    assert schedulers - {"LRScheduler", "_LRScheduler"} == set(SCHEDULERS)


def _is(found: Any, base: type) -> bool:
    return isinstance(found, type) and issubclass(found, base)


# ---- steps


@every_optimizer
def test_three_steps_are_the_bare_optimizers_bit_for_bit(make: str) -> None:
    wrapped, bare = Wrapped(make), Bare(make)
    before = weights(wrapped)
    for _ in range(3):
        for each in (wrapped, bare):
            if make == "LBFGS":
                each.optimizer.step(each.closure)
            else:
                each.closure()
                each.optimizer.step()
    assert same(weights(wrapped), weights(bare)) and not same(weights(wrapped), before)
    assert same(shared(wrapped.optimizer.state_dict()), bare.optimizer.state_dict())


@every_optimizer
def test_a_closure_is_run_as_often_as_the_bare_optimizer_runs_it_and_its_loss_returned(make: str) -> None:
    wrapped, bare = Wrapped(make), Bare(make)
    calls: dict[int, int] = {0: 0, 1: 0}

    def counted(index: int, each: Wrapped | Bare) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            calls[index] += 1
            return each.closure()

        return closure

    losses = [each.optimizer.step(counted(i, each)) for i, each in enumerate((wrapped, bare))]
    assert torch.equal(*losses) and losses[0] > 0
    assert calls[0] == calls[1] and (calls[0] > 1) == (make == "LBFGS")
    assert same(weights(wrapped), weights(bare))


@pytest.mark.filterwarnings(SCHEDULERS_OWN_WARNING)
@pytest.mark.parametrize("scheduler", [*SCHEDULERS, *SWA])
def test_a_scheduler_drives_it_as_the_bare_one(scheduler: str) -> None:
    wrapped, bare = Wrapped("SGD"), Bare("SGD")
    make = {**SCHEDULERS, **SWA}[scheduler]
    schedulers = [make(each.optimizer) for each in (wrapped, bare)]
    rates = []
    for _ in range(5):
        for each, driver in zip((wrapped, bare), schedulers, strict=True):
            loss = each.closure()
            each.optimizer.step()
            driver.step(1.0) if scheduler == "ReduceLROnPlateau" else driver.step()
            assert torch.isfinite(loss)
        assert same(wrapped.inner.state_dict(), bare.optimizer.state_dict())
        rates.append(wrapped.inner.param_groups[0]["lr"])
    assert len(set(rates)) > 1 and same(weights(wrapped), weights(bare))


# ---- what people do to an optimizer


@every_optimizer
def test_state_goes_through_a_file_into_the_bare_optimizer_and_back(make: str) -> None:
    wrapped, bare, third = Wrapped(make), Bare(make), Wrapped(make)
    wrapped.optimizer.step(wrapped.closure)
    saved = through_a_file(wrapped.optimizer.state_dict())
    bare.optimizer.load_state_dict(saved)
    assert saved["state"] and same(bare.optimizer.state_dict(), shared(saved))
    third.optimizer.load_state_dict(through_a_file(bare.optimizer.state_dict()))
    assert same(third.optimizer.state_dict(), saved)
    for each in (bare, third):
        each.net.load_state_dict(wrapped.net.state_dict())
    for each in (wrapped, bare, third):
        each.optimizer.step(each.closure)
    assert same(weights(bare), weights(wrapped)) and same(weights(third), weights(wrapped))


@pytest.mark.parametrize("into", ["the wrapper", "the wrapped"])
def test_after_loading_a_scheduler_drives_the_groups_that_step(into: str) -> None:
    wrapped = Wrapped("SGD")
    scheduler = lr_scheduler.ExponentialLR(wrapped.optimizer, 0.5)
    saved = copy.deepcopy(shared(wrapped.optimizer.state_dict()))
    (wrapped.optimizer if into == "the wrapper" else wrapped.inner).load_state_dict(saved)
    assert wrapped.optimizer.param_groups is wrapped.inner.param_groups
    assert wrapped.optimizer.state is wrapped.inner.state
    wrapped.optimizer.step(wrapped.closure)
    scheduler.step()
    assert wrapped.inner.param_groups[0]["lr"] == 0.05
    assert wrapped.inner.state and wrapped.optimizer.state_dict()["param_groups"][0]["lr"] == 0.05


def test_a_group_added_on_either_side_steps_with_its_own_settings() -> None:
    extra = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))]
    wrapped = Wrapped("SGD")
    wrapped.optimizer.add_param_group({"params": [extra[0]], "lr": 0.7, "momentum": 0.0, "nesterov": False})
    wrapped.inner.add_param_group({"params": [extra[1]], "lr": 0.3, "momentum": 0.0, "nesterov": False})
    assert [group["lr"] for group in wrapped.optimizer.param_groups] == [0.1, 0.7, 0.3]
    wrapped.closure()
    for parameter in extra:
        parameter.grad = torch.ones(2, 2)
    wrapped.optimizer.step()
    assert [float(p.detach()[0, 0]) for p in extra] == pytest.approx([0.3, 0.7])


def test_a_group_that_is_there_already_is_refused_as_torch_refuses_it() -> None:
    wrapped = Wrapped()
    with pytest.raises(ValueError, match="more than one parameter group"):
        wrapped.optimizer.add_param_group({"params": list(wrapped.net.parameters())})
    assert len(wrapped.inner.param_groups) == 1


@pytest.mark.parametrize("side", ["optimizer", "inner"])
def test_step_hooks_run_once_a_step_and_in_order(side: str) -> None:
    wrapped = Wrapped()
    owner: torch.optim.Optimizer = getattr(wrapped, side)
    seen: list[tuple[str, bool, bool]] = []
    before = weights(wrapped)

    def note(name: str) -> Callable[..., None]:
        return lambda it, args, kwargs: seen.append((name, it is owner, same(weights(wrapped), before)))

    handles = [owner.register_step_pre_hook(note("pre")), owner.register_step_post_hook(note("post"))]
    wrapped.closure()
    wrapped.optimizer.step()
    assert seen == [("pre", True, True), ("post", True, False)]
    for handle in handles:
        handle.remove()
    wrapped.optimizer.step(wrapped.closure)
    assert len(seen) == 2


def test_a_global_step_hook_sees_the_wrapped_optimizer_and_the_wrapper() -> None:
    wrapped, seen = Wrapped(), []
    handle = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: seen.append(optimizer))
    wrapped.optimizer.step(wrapped.closure)
    handle.remove()
    assert seen == [wrapped.inner, wrapped.optimizer]


@pytest.mark.parametrize("side", ["optimizer", "inner"])
def test_hooks_of_saving_and_loading_run_wherever_they_were_registered(side: str) -> None:
    wrapped, seen = Wrapped(), []
    owner: torch.optim.Optimizer = getattr(wrapped, side)
    owner.register_state_dict_pre_hook(lambda optimizer: seen.append("pre save"))
    owner.register_state_dict_post_hook(lambda optimizer, state: seen.append("post save"))
    owner.register_load_state_dict_pre_hook(lambda optimizer, state: seen.append("pre load"))
    owner.register_load_state_dict_post_hook(lambda optimizer: seen.append("post load"))
    wrapped.optimizer.load_state_dict(wrapped.optimizer.state_dict())
    assert seen == ["pre save", "post save", "pre load", "post load"]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["deep", "pickle"]
)
@pytest.mark.parametrize("make", sorted(OPTIMIZERS.keys() - {"LBFGS"}))  # whose copy has lost its parameters, bare too
def test_a_copy_steps_on_as_the_original_and_shares_nothing(make: str, copied: Callable[[Any], Any]) -> None:
    wrapped = Wrapped(make)
    wrapped.optimizer.step(wrapped.closure)
    other = Wrapped(make)
    other.optimizer = copied(wrapped.optimizer)
    other.model = other.optimizer.model
    other.net = other.model
    before = weights(wrapped)
    other.optimizer.step(other.closure)
    assert same(weights(wrapped), before)
    wrapped.optimizer.step(wrapped.closure)
    assert same(weights(other), weights(wrapped)) and not same(weights(wrapped), before)
    assert same(other.optimizer.state_dict(), wrapped.optimizer.state_dict())


def test_a_copy_is_taken_while_a_scheduler_drives_it() -> None:
    """A scheduler leaves a wrapper of ``step`` on the optimizer, which belongs to this one."""
    wrapped = Wrapped("SGD")
    scheduler = lr_scheduler.StepLR(wrapped.optimizer, 1, 0.5)
    wrapped.optimizer.step(wrapped.closure)
    scheduler.step()
    other = copy.deepcopy(wrapped.optimizer)
    assert other.param_groups[0]["lr"] == 0.05
    scheduler.step()
    assert (other.param_groups[0]["lr"], wrapped.inner.param_groups[0]["lr"]) == (0.05, 0.025)


def test_detach_leaves_the_wrapped_optimizer_as_it_was_and_no_hook() -> None:
    wrapped, twin = Wrapped(), Wrapped()
    wrapped.optimizer.step(wrapped.closure)
    inner, model = wrapped.optimizer.detach(), wrapped.model
    assert inner is wrapped.inner and model.algorithm is None and not model.attached
    for module in (*model.modules(), *wrapped.net.modules()):
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        assert not any(getattr(module, name) for name in hooks)
    for parameter in wrapped.net.parameters():
        assert not parameter._backward_hooks and not parameter._post_accumulate_grad_hooks
    for name, value in vars(inner).items():
        assert "hooks" not in name or not value, name
    assert vars(inner).keys() == vars(twin.inner).keys()
