"""When parameters are looked at for a NaN or an infinity, which a clamp or a tanh would hide."""

import pytest
import torch
from torch import nn

import torch2ebm
from torch2ebm.engine import standing
from torch2ebm.engine.standing import Standing
from torch2ebm.errors import NonFiniteError


def test_after_the_optimizer_s_own_steps_they_are_looked_at_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    weight, kept = torch.zeros(3), Standing()
    monkeypatch.setattr(standing, "check_standing", lambda tensors: looks.append(kept.steps))
    for _ in range(50):
        kept.check({"weight": weight})
        weight.add_(1)
        kept.stepped()
    assert looks == [0, 1, 2, 4, 8, 16, 32, 48]


def test_what_somebody_else_writes_is_looked_at_before_the_next_forward() -> None:
    weight, kept = torch.zeros(3), Standing()
    for _ in range(5):
        kept.check({"weight": weight})
        weight.add_(1)
        kept.stepped()
    weight[1] = torch.inf
    with pytest.raises(NonFiniteError, match="'weight'"):
        kept.check({"weight": weight})


@pytest.mark.parametrize("before", [0, 5, 20])
def test_a_step_to_infinity_is_found_where_a_tanh_hides_it(before: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))
    model, sgd = torch2ebm.convert(net), torch.optim.SGD(net.parameters(), lr=1e-9)
    optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.ZeroDivergence())

    def step(rate: float) -> None:
        sgd.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (1e3 * model(torch.ones(5, 1))).square().mean().backward()
        net[2].weight.grad = net[2].bias.grad = None  # the output stays finite
        optimizer.step()

    for _ in range(before):
        step(1e-9)
    step(3e38)
    assert torch.isinf(net[0].weight).any() and torch.isfinite(net(torch.ones(5, 1))).all()

    def further() -> None:
        for _ in range(standing.OFTEN):
            step(0.0)

    with pytest.raises(NonFiniteError, match=r"parameter '0\.weight'"):
        further()
