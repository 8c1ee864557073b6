"""``torch.amp``: a gradient scaler sees every overflow and skips it, and what is no overflow is an error."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import scaled_by
from loops import ALGORITHMS, Batch, batches, halving, network, plain_loop, same_bits
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import NonFiniteError
from torch2ebm.solvers.anderson_error_descent import AndersonHistory

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)

OVERFLOWING: dict[str, torch2ebm.Algorithm] = {
    **ALGORITHMS,
    "FixedPrediction": torch2ebm.FixedPrediction(steps=3, lr=0.5),
    "EquilibriumPropagation": torch2ebm.EquilibriumPropagation(torch2ebm.Symmetric(0.1), feedback=0.1),
    "Backprop": torch2ebm.Backprop(),
}


def in_bfloat16(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x).float()


def loss_in_bfloat16(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(in_bfloat16(model, x), y)


class Scaled:
    """The loop of the documentation of ``torch.amp``, with a schedule that holds where a step was skipped."""

    def __init__(self, algorithm: torch2ebm.Algorithm, scale: float, net: nn.Module | None = None) -> None:
        self.net = network() if net is None else net
        self.model = torch2ebm.convert(self.net)
        self.inner = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        self.optimizer = torch2ebm.EnergyOptimizer(self.inner, self.model, algorithm)
        self.scheduler = halving(self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        self.delivered: list[Tensor] = []

    def backward(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        output = in_bfloat16(self.model, x)
        output.register_hook(lambda gradient: self.delivered.append(gradient.clone()))
        self.scaler.scale(F.cross_entropy(output, y)).backward()

    def step(self, x: Tensor, y: Tensor) -> bool:
        """Whether a step was made."""
        self.backward(x, y)
        return self.finish()

    def finish(self) -> bool:
        self.scaler.step(self.optimizer)
        before = self.scaler.get_scale()
        self.scaler.update()
        made = self.scaler.get_scale() >= before
        if made:
            self.scheduler.step()
        return made

    def standing(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "parameters": dict(self.net.named_parameters()),
                "optimizer": self.optimizer.state_dict()["state"],
                "schedule": self.scheduler.state_dict(),
                "rate": self.inner.param_groups[0]["lr"],
            }
        )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@every_algorithm
def test_with_a_scaler_in_bfloat16_the_weights_are_the_plain_loops(algorithm: torch2ebm.Algorithm) -> None:
    """A scale that is a power of two changes no bit."""
    scaled = Scaled(algorithm, 2.0**10)
    assert all(scaled.step(*batch) for batch in batches())
    net, optimizer = plain_loop(algorithm, batches(), loss=loss_in_bfloat16, make=sgd)
    assert same_bits(scaled.net, net)
    assert scaled.inner.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.0125
    assert not same_bits(scaled.net, plain_loop(algorithm, batches(), make=sgd)[0])  # bfloat16 was no idle word


def without_statistics() -> nn.Sequential:
    net = network()
    return nn.Sequential(net[0], net[2], net[3])


def far_away() -> Batch:
    """Inputs of 2**14, so that a gradient of the first weight is that much larger than any that is delivered."""
    x, y = batches()[0]
    return 2.0**14 * x.sign(), y


def linear() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3))


@pytest.mark.parametrize("algorithm", OVERFLOWING.values(), ids=OVERFLOWING)
def test_a_gradient_that_overflows_where_the_delivered_one_does_not_is_the_scalers_to_skip(
    algorithm: torch2ebm.Algorithm,
) -> None:
    """2**120 times a gradient in the output of about 0.1 is a float32, and 2**14 times that is not."""
    net = linear()
    scaled = Scaled(algorithm, 2.0**120, net)
    before = scaled.standing()
    scaled.backward(*far_away())
    assert torch.isfinite(scaled.delivered[0]).all() and not torch.isfinite(net[0].weight.grad).all()
    assert not scaled.finish()
    assert_same(scaled.standing(), before)
    assert scaled.scaler.get_scale() == 2.0**119
    twin = Scaled(algorithm, 2.0**10, copy.deepcopy(net))
    batch = batches()[0]
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert scaled.step(*batch) and twin.step(*batch)
    assert_same(scaled.standing(), twin.standing())
    assert not same_bits(net, linear_of(before))


def linear_of(standing: dict[str, Any]) -> nn.Sequential:
    net = linear()
    net.load_state_dict(standing["parameters"])
    return net


@every_algorithm
def test_the_scaler_comes_down_to_where_steps_are_made(algorithm: torch2ebm.Algorithm) -> None:
    """Skipped steps leave weights, momentum and schedule; the first that is made is that of a scaler set right."""
    x, y = far_away()
    scaled, twin = (Scaled(algorithm, scale, linear()) for scale in (2.0**120, 2.0**100))
    before = scaled.standing()
    skipped = 0
    while not scaled.step(x, y):
        assert_same(scaled.standing(), before)
        skipped += 1
    assert 3 < skipped < 20
    assert twin.step(x, y)
    assert_same(scaled.standing(), twin.standing())


def test_accumulated_gradients_of_which_one_overflows_are_skipped_together() -> None:
    scaled = Scaled(ALGORITHMS["PredictiveCoding"], 2.0**120, linear())
    before = scaled.standing()
    scaled.backward(*far_away())
    x, y = batches()[1]
    scaled.scaler.scale(F.cross_entropy(in_bfloat16(scaled.model, x), y)).backward()
    assert not scaled.finish()
    assert_same(scaled.standing(), before)


# ---- the negative twins


def rooted(y: Tensor, labels: Tensor) -> Tensor:
    """Finite (0), with a gradient that is not: the root's slope at 0."""
    return (y - y.detach()).sqrt().mean()


def without_a_scaler(algorithm: torch2ebm.Algorithm, factor: float) -> tuple[Scaled, Callable[[], None]]:
    scaled = Scaled(algorithm, 1.0)

    def step() -> None:
        x, y = batches()[0]
        (factor * rooted(scaled.model(x), y)).backward()
        scaled.optimizer.step()

    return scaled, step


@pytest.mark.parametrize("algorithm", OVERFLOWING.values(), ids=OVERFLOWING)
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_a_loss_without_a_finite_gradient_is_an_error_in_backward(
    algorithm: torch2ebm.Algorithm, factor: float
) -> None:
    """No factor above one: nothing can have overflowed."""
    net = without_statistics()
    scaled = Scaled(algorithm, 1.0, net)
    before = scaled.standing()
    x, y = batches()[0]
    with pytest.raises(NonFiniteError, match="the loss, backward"):
        (factor * rooted(scaled.model(x), y)).backward()
    assert_same(scaled.standing(), before)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.isfinite(F.cross_entropy(scaled.model(x), y))  # and the next step works
    scaled.step(x, y)
    assert same_bits(net, stepped(algorithm, x, y))


def stepped(algorithm: torch2ebm.Algorithm, x: Tensor, y: Tensor) -> nn.Module:
    twin = Scaled(algorithm, 1.0, without_statistics())
    twin.step(x, y)
    return twin.net


@every_algorithm
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_factor_above_one_and_no_scaler_is_an_error_in_the_step(
    algorithm: torch2ebm.Algorithm, with_closure: bool
) -> None:
    """Nobody has skipped: the step is refused, and the batch statistics are as before the forward."""
    scaled, x, y = Scaled(algorithm, 1.0), *batches()[0]
    before = copy.deepcopy(scaled.net.state_dict())

    def closure() -> Tensor:
        scaled.optimizer.zero_grad()
        loss = scaled_by(100.0, rooted(scaled.model(x), y))
        loss.backward()
        return loss

    with pytest.raises(NonFiniteError, match=r"'0.weight', optimizer.step.*scaler.step\(optimizer\)"):
        scaled.optimizer.step(closure) if with_closure else (closure(), scaled.optimizer.step())
    assert_same(scaled.net.state_dict(), before)
    scaled.step(x, y)
    twin = Scaled(algorithm, 1.0)
    twin.step(x, y)
    assert_same(scaled.standing(), twin.standing())


def test_gradients_that_are_set_to_zero_are_forgiven() -> None:
    scaled, x, y = Scaled(ALGORITHMS["PredictiveCoding"], 1.0), *batches()[0]
    scaled_by(100.0, rooted(scaled.model(x), y)).backward()
    scaled.optimizer.zero_grad()
    F.cross_entropy(scaled.model(x), y).backward()
    scaled.optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in scaled.net.parameters())


@every_algorithm
def test_under_a_scaler_what_is_no_overflow_is_an_error_once_the_scale_has_come_down(
    algorithm: torch2ebm.Algorithm,
) -> None:
    """A scaler of 2**3 skips three times; at a scale of one there is nothing to blame but the loss."""
    scaled, x, y = Scaled(algorithm, 2.0**3), *batches()[0]
    before = dict(copy.deepcopy(scaled.net).named_parameters())
    for scale in (8.0, 4.0, 2.0):
        assert scaled.scaler.get_scale() == scale
        scaled.optimizer.zero_grad()
        scaled.scaler.scale(rooted(scaled.model(x), y)).backward()
        assert not scaled.finish()
    scaled.optimizer.zero_grad()
    with pytest.raises(NonFiniteError, match="the loss, backward"):
        scaled.scaler.scale(rooted(scaled.model(x), y)).backward()
    assert_same(dict(scaled.net.named_parameters()), before)


@every_algorithm
def test_under_a_scaler_a_loss_that_is_infinite_itself_is_an_error_at_once(algorithm: torch2ebm.Algorithm) -> None:
    scaled, (x, _) = Scaled(algorithm, 2.0**3), batches()[0]
    before = copy.deepcopy(scaled.net.state_dict())
    loss = (1e30 * scaled.model(x)).square().mean()
    assert loss.isinf()
    with pytest.raises(NonFiniteError, match="the loss, backward"):
        scaled.scaler.scale(loss).backward()
    assert_same(scaled.net.state_dict(), before)


WITH_ALGEBRA: dict[str, torch2ebm.Algorithm] = {
    "PredictiveCoding()": torch2ebm.PredictiveCoding(),
    "conjugate gradients": torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorConjugateGradient()),
    "Anderson": torch2ebm.PredictiveCoding(solver=torch2ebm.AndersonErrorDescent(20, lr=0.1)),
    "lr='auto'": torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent(20, lr="auto")),
    "ImplicitSGD": torch2ebm.ImplicitSGD(alpha=0.1),
}


@pytest.mark.filterwarnings(
    "ignore::torch2ebm.errors.NotSettledWarning"
)  # ImplicitSGD's tol is below bfloat16's digits
@pytest.mark.parametrize("algorithm", WITH_ALGEBRA.values(), ids=WITH_ALGEBRA)
def test_an_algorithm_with_algebra_of_its_own_learns_the_same_under_autocast(algorithm: torch2ebm.Algorithm) -> None:
    """To the digits of bfloat16: eight bits, so half a percent an operation."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    x, y = torch.randn(16, 8), torch.randint(3, (16,))

    def gradients(loss: Callable[..., Tensor]) -> list[Tensor]:
        twin = copy.deepcopy(net)
        model = torch2ebm.convert(twin)
        torch2ebm.EnergyOptimizer(torch.optim.SGD(twin.parameters(), lr=0.1), model, algorithm)
        loss(model, x, y).backward()
        return [p.grad for p in twin.parameters() if p.grad is not None]

    single = gradients(lambda model, x, y: F.cross_entropy(model(x), y))
    for got, expected in zip(gradients(loss_in_bfloat16), single, strict=True):
        assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("memory", [1, 3])
def test_mixing_of_past_iterates_keeps_its_digits_under_autocast(memory: int) -> None:
    solver = torch2ebm.AndersonErrorDescent(5, memory=memory)
    rows = [torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) for seed in range(2 * memory + 2)]
    history = AndersonHistory(rows[: memory + 1], rows[memory + 1 :])
    single = solver._next(history)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (rows[0] @ rows[1].t()).dtype == torch.bfloat16
        assert torch.equal(solver._next(history), single)
