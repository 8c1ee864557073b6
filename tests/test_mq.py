"""The MQ optimizer against an explicit loop, and as any torch optimizer."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import attached
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ConfigurationError

STEPS = 12


def gradients_of(shape: tuple[int, ...], seed: int, steps: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1 * (n + 1) for n in range(steps)]


def by_loop(weight: Tensor, gradients: list[Tensor], alpha: float, r: float, minimum: float) -> list[Tensor]:
    """Alonso 2023, entry by entry, in Python's floats: G = -gradient, v starts at alpha, N at 1."""
    entries, v, n, course = weight.flatten().tolist(), alpha, 1, []
    for gradient in gradients:
        G = [-g for g in gradient.flatten().tolist()]
        entries = [w + (alpha / (v + r) + minimum) * g for w, g in zip(entries, G, strict=True)]
        rho = min(n / (n + 1), 0.9999)
        v = rho * v + (1 - rho) * sum(map(abs, G)) / len(G)
        n += 1
        course.append(torch.tensor(entries, dtype=torch.float64).reshape(weight.shape))
    return course


def test_every_step_is_that_of_the_explicit_loop() -> None:
    shapes = [(3, 4), (5,)]
    parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    supplied = [gradients_of(shape, seed) for seed, shape in enumerate(shapes)]
    courses = [by_loop(p.detach().clone(), g, 0.02, 1e-3, 0.005) for p, g in zip(parameters, supplied, strict=True)]
    optimizer = torch2ebm.MQ(parameters, lr=0.02, r=1e-3, minimum_rate=0.005)
    for step in range(STEPS):
        for parameter, gradients in zip(parameters, supplied, strict=True):
            parameter.grad = gradients[step].clone()
        optimizer.step()
        for parameter, course in zip(parameters, courses, strict=True):
            torch.testing.assert_close(parameter.detach(), course[step], rtol=1e-13, atol=1e-14)


def test_the_published_constants_are_the_defaults() -> None:
    parameter = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    gradients = gradients_of((3, 2), 0)
    course = by_loop(parameter.detach().clone(), gradients, 1e-3, 1e-6, 0.001)
    optimizer = torch2ebm.MQ([parameter], lr=1e-3)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), course[-1], rtol=1e-13, atol=1e-14)


def test_the_memory_ends_at_its_largest() -> None:
    """After N = 9999 the running mean forgets: rho = N / (N + 1) would weigh the last gradient less."""
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch2ebm.MQ([parameter], lr=0.5)
    parameter.grad = torch.ones(2, dtype=torch.float64)
    optimizer.step()
    state = optimizer.state[parameter]
    state["step"] = 20_000
    before = state["magnitude"].item()
    parameter.grad = torch.full((2,), 3.0, dtype=torch.float64)
    optimizer.step()
    assert state["magnitude"].item() == pytest.approx(0.9999 * before + 0.0001 * 3.0, rel=1e-14)


def test_the_rate_is_one_a_tensor_and_no_two_share_it() -> None:
    """Negative twin: over both tensors together the mean would be another."""
    small, large = (nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))
    optimizer = torch2ebm.MQ([small, large], lr=0.1)
    for parameter, size in ((small, 1e-3), (large, 10.0)):
        parameter.grad = torch.full((4,), size, dtype=torch.float64)
    optimizer.step()
    assert optimizer.state[small]["magnitude"].item() == pytest.approx((0.1 + 1e-3) / 2, rel=1e-14)
    assert optimizer.state[large]["magnitude"].item() == pytest.approx((0.1 + 10.0) / 2, rel=1e-14)


def test_a_run_goes_on_from_its_state_dict_as_if_nothing_had_been() -> None:
    whole = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    half = nn.Parameter(whole.detach().clone())
    gradients = gradients_of((3, 4), 2)
    first, second = torch2ebm.MQ([whole], lr=0.03), torch2ebm.MQ([half], lr=0.03)
    for step, gradient in enumerate(gradients):
        if step == STEPS // 2:
            file = io.BytesIO()
            torch.save(second.state_dict(), file)
            file.seek(0)
            second = torch2ebm.MQ([half], lr=1.0)
            second.load_state_dict(torch.load(file, weights_only=True))
        for parameter, optimizer in ((whole, first), (half, second)):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(whole, half)
    assert second.param_groups[0]["lr"] == 0.03


def test_a_closure_runs_with_gradients_and_its_result_comes_back() -> None:
    net = nn.Linear(3, 1).double()
    twin = copy.deepcopy(net)
    x = torch.randn(4, 3, dtype=torch.float64)
    optimizer = torch2ebm.MQ(net.parameters(), lr=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    expected = twin(x).square().mean()
    gradient = torch.autograd.grad(expected, twin.weight)[0]
    assert torch.equal(optimizer.step(closure), expected)
    course = by_loop(twin.weight.detach(), [gradient], 0.01, 1e-6, 0.001)
    torch.testing.assert_close(net.weight.detach(), course[0], rtol=1e-13, atol=1e-14)


def test_a_parameter_without_a_gradient_stays() -> None:
    moved, still = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch2ebm.MQ([moved, still], lr=0.01)
    moved.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(still, torch.ones(2)) and (moved < 1).all()
    assert still not in optimizer.state


def test_groups_and_schedulers_set_the_rate() -> None:
    one, two = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    optimizer = torch2ebm.MQ([{"params": [one], "lr": 0.1}, {"params": [two]}], lr=0.2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    supplied = gradients_of((3,), 4, 2)
    for gradient in supplied:
        one.grad, two.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        scheduler.step()
    for parameter, lr in ((one, 0.1), (two, 0.2)):
        first, second = (g.tolist() for g in supplied)
        v = 0.5 * lr + 0.5 * sum(map(abs, first)) / 3
        expected = [
            -(lr / (lr + 1e-6) + 0.001) * a - (0.5 * lr / (v + 1e-6) + 0.001) * b
            for a, b in zip(first, second, strict=True)
        ]
        torch.testing.assert_close(parameter.tolist(), expected, rtol=1e-13, atol=1e-14)


def test_it_steps_local_gradients() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(2, 4, dtype=torch.float64), torch.tensor([0, 2])
    twin = attached(copy.deepcopy(net), torch2ebm.PredictiveCoding(steps=3, lr=0.5))
    F.cross_entropy(twin(x), y).backward()
    model = torch2ebm.convert(net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch2ebm.EnergyOptimizer(
        torch2ebm.MQ(net.parameters(), lr=0.02), model, torch2ebm.PredictiveCoding(steps=3, lr=0.5)
    )
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    for name, gradient in ((n, p.grad) for n, p in twin.named_parameters()):
        expected = by_loop(before[name], [gradient], 0.02, 1e-6, 0.001)[0]
        torch.testing.assert_close(net.get_parameter(name).detach(), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ["lr", "r", "minimum_rate"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "a", None])
def test_an_illegal_rate_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=rf"MQ\({name}=") as caught:
        torch2ebm.MQ([nn.Parameter(torch.zeros(2))], **{"lr": 0.1, name: value})
    assert repr(value) in str(caught.value)
    with pytest.raises(ConfigurationError, match=rf"parameter group\({name}="):
        torch2ebm.MQ([{"params": [nn.Parameter(torch.zeros(2))], name: value}], lr=0.1)


def test_a_sparse_gradient_is_refused_before_anything_moves() -> None:
    dense, table = nn.Parameter(torch.ones(2)), nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    dense.grad = torch.ones(2)
    with pytest.raises(ConfigurationError, match="sparse=False"):
        torch2ebm.MQ([dense, *table.parameters()], lr=0.1).step()
    assert torch.equal(dense, torch.ones(2))
