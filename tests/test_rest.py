"""``benchmarks/rest.py``: its oracle, and the fewest steps that it finds. No times."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import peers_at_rest
import rest

import torch2ebm

CASE = rest.Case.of(depth=4, width=6, batch=3)


def test_at_the_feedforward_pass_the_energy_is_the_loss_and_there_is_no_error() -> None:
    values, value = [], CASE.x.double()
    for layer in CASE.layers[:-1]:
        value = torch.tanh(torch.nn.functional.linear(value, layer.weight.double(), layer.bias.double())).detach()
        values.append(value)
    loss = rest.half_squared_error(CASE.net.double()(CASE.x.double()), CASE.y.double()) * len(CASE.x)
    CASE.net.float()
    energy, residual = CASE.judged(values)
    assert (
        energy == pytest.approx(float(loss.detach()), rel=1e-9) and residual > 1e6
    )  # the loss pulls on what has no error


def test_the_fewest_steps_come_to_rest_and_one_less_does_not() -> None:
    equilibrium = rest.equilibrium_of(CASE)
    relaxing = rest.ours(lambda n: torch2ebm.ErrorDescent(n, 0.3))(CASE.layers, CASE.x, CASE.y)
    found = rest.measured("ErrorDescent", "", relaxing, CASE, equilibrium)
    assert found is not None and found.residual <= rest.RESIDUAL
    assert found.energy == pytest.approx(equilibrium, rel=rest.CLOSE)
    _, before = CASE.judged(peers_at_rest.torch_values(relaxing.values(relaxing.until(found.steps - 1))))
    assert before > rest.RESIDUAL


def test_a_recorded_program_is_timed_at_the_eager_steps_and_rests_in_the_same_place() -> None:
    equilibrium = rest.equilibrium_of(CASE)
    making = [rest.ours(lambda n: torch2ebm.ErrorDescent(n, 0.3), form) for form in (rest.EAGER, rest.RECORDED)]
    eager, recorded = (rest.measured("", "", make(CASE.layers, CASE.x, CASE.y), CASE, equilibrium) for make in making)
    assert eager is not None and recorded is not None and eager.steps == recorded.steps
    assert recorded.energy == pytest.approx(eager.energy, rel=1e-6)
    assert recorded.residual == pytest.approx(eager.residual, rel=1e-3)


def test_a_step_that_is_too_large_does_not_come_to_rest() -> None:
    relaxing = rest.ours(lambda n: torch2ebm.ErrorDescent(n, 1.9))(CASE.layers, CASE.x, CASE.y)
    with pytest.raises(torch2ebm.errors.DivergenceError):
        rest.measured("ErrorDescent", "", relaxing, CASE, rest.equilibrium_of(CASE))


@pytest.mark.parametrize("make", [peers_at_rest.pcx(0.1), peers_at_rest.jpc(), peers_at_rest.fabric(0.1)])
def test_a_peer_that_is_not_there_says_so(make: peers_at_rest.Making, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(peers_at_rest.NotInstalledError):
        make(CASE.layers, CASE.x, CASE.y)
