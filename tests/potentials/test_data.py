"""Energies of data: what a clamped output costs, against the likelihoods of torch and a dense minimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch2ebm
from torch2ebm import Bernoulli, Categorical, FunctionEnergy, Poisson
from torch2ebm.errors import ConfigurationError
from torch2ebm.extend import Energy

ROWS: dict[str, tuple[Energy, Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "Bernoulli": (
        Bernoulli(observed=True),
        lambda drawn: (drawn > 0).double(),
        lambda mu, y: F.binary_cross_entropy_with_logits(mu, y, reduction="sum"),
    ),
    "Poisson": (
        Poisson(observed=True),
        lambda drawn: drawn.exp().round(),
        lambda mu, y: F.poisson_nll_loss(mu, y, reduction="sum"),
    ),
    "Categorical": (
        Categorical(observed=True),
        lambda drawn: F.one_hot(drawn.argmax(1), 3).double(),
        lambda mu, y: F.cross_entropy(mu, y, reduction="sum"),
    ),
    "a function": (
        FunctionEnergy(lambda y, mu: F.softplus(mu) - y * mu, observed=True),
        lambda drawn: (drawn > 0).double(),
        lambda mu, y: F.binary_cross_entropy_with_logits(mu, y, reduction="sum"),
    ),
}


def decoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return ROWS[name][1](torch.randn(5, 3, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("name", ROWS)
def test_hidden_values_rest_where_the_likelihood_says(name: str) -> None:
    energy, _, likelihood = ROWS[name]
    net, y, x = decoder(), data(name), torch.zeros(5, 2).double()
    found = torch2ebm.convert(net).infer(x, clamp={"output": y}, energies={"2": energy}, tol=1e-9)
    value = net[:2](x).detach().requires_grad_()
    settings = {"max_iter": 1000, "tolerance_grad": 1e-12, "tolerance_change": 1e-16, "line_search_fn": "strong_wolfe"}
    lbfgs = torch.optim.LBFGS([value], **settings)

    def total() -> Tensor:
        lbfgs.zero_grad()
        whole = 0.5 * ((value - net[:2](x)) ** 2).sum() + likelihood(net[2](value), y)
        whole.backward()
        return whole

    lbfgs.step(total)
    torch.testing.assert_close(found.value["0"], value.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.energy.sum(), total().detach(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    "question",
    [
        {"clamp": {"0": torch.zeros(5, 4).double()}},
        {"clamp": {"output": torch.ones(5, 3).double()}, "mask": {"output": torch.ones(5, 3).bool().tril()}},
    ],
    ids=["free", "in part"],
)
def test_a_value_that_moves_takes_no_energy_of_data(name: str, question: dict[str, Any]) -> None:
    model = torch2ebm.convert(decoder())
    with pytest.raises(ConfigurationError, match="whose value is data"):
        model.infer(torch.zeros(5, 2).double(), energies={"2": ROWS[name][0]}, **question)
