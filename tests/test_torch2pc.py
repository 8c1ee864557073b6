"""Torch2PC's call: all figures of the real one, and what its README promises."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import graphs as oracles
from torch import Tensor, nn
from torch.nn import functional as F

from torch2ebm.errors import ConfigurationError, NodeEvaluationError, NonFiniteError
from torch2ebm.torch2pc import PCInfer

ERROR_TYPES = ("Strict", "FixedPred", "Exact")
TOLERANCE = 1e-12  # float64; the values are of order one


# The real Torch2PC ----------------------------------------------------------------------------------------------------


def _load() -> dict[str, dict[str, np.ndarray]]:
    runs: dict[str, dict[str, np.ndarray]] = {}
    with np.load(Path(__file__).parent / "data" / "torch2pc_reference.npz") as archive:
        for key in archive.files:
            run, array = key.rsplit("/", 1)
            runs.setdefault(run, {})[array] = archive[key]
    return runs


REFERENCE = _load()


def _mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(12, 9), nn.Tanh()), nn.Sequential(nn.Linear(9, 7), nn.Tanh()), nn.Linear(7, 4)
    )


def _conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten()),
        nn.Sequential(nn.Linear(12, 8), nn.ReLU()),
        nn.Linear(8, 5),
    )


def _flat() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


BUILDERS = {"mlp": _mlp, "conv": _conv, "flat": _flat}


def _results(returned: tuple, model: nn.Module) -> dict[str, Tensor]:
    vhat, loss, dLdy, v, epsilon = returned
    assert len(vhat) == len(v) == len(epsilon)
    found = {"loss": loss, "dLdy": dLdy}
    found |= {f"grad{i}": parameter.grad for i, parameter in enumerate(model.parameters())}
    for name, entries in (("vhat", vhat), ("v", v), ("epsilon", epsilon)):
        found |= {f"{name}{i}": entry for i, entry in enumerate(entries) if entry is not None}
    return found


def test_the_reference_has_all_runs():
    assert len(REFERENCE) == 18


@pytest.mark.parametrize("run", REFERENCE)
def test_every_array_of_every_run_is_that_of_torch2pc(run):
    name, error_type, eta, n = run.split("/")
    expected = {key: torch.from_numpy(array) for key, array in REFERENCE[run].items()}
    model = BUILDERS[name]().double()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(expected.pop(f"param{i}"))
    x, y = expected.pop("x"), expected.pop("y")
    loss = nn.MSELoss() if y.is_floating_point() else nn.CrossEntropyLoss()
    found = _results(
        PCInfer(model, loss, x, y, error_type, float(eta.removeprefix("eta")), int(n.removeprefix("n"))), model
    )
    assert found.keys() == expected.keys()  # None, and nothing else, where Torch2PC has None
    for key, array in expected.items():
        torch.testing.assert_close(found[key], array, rtol=0, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


# Problems of our own --------------------------------------------------------------------------------------------------


def _problem(batch: int = 6) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(5, 7), nn.Tanh()), nn.Sequential(nn.Linear(7, 6), nn.Softplus()), nn.Linear(6, 4)
    ).double()
    return model, torch.randn(batch, 5, dtype=torch.float64), torch.randint(4, (batch,))


def _coupled() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Batch norm, dropout, writes in place, children without parameters, one of them first."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.4),
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()), nn.Linear(8, 3), nn.Identity(),
    ).double()  # fmt: skip
    return model, torch.randn(7, 2, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def _close(found, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(list(found), list(expected), rtol=0, atol=tolerance)


def test_strict_is_the_oracle_but_for_sign_and_staleness():
    """Values and errors against explicit code; the oracle's errors are of one step later."""
    model, x, y = _problem()
    layers, parameters = list(model), [list(layer.parameters()) for layer in model]
    args = (layers, parameters, x, lambda output: F.cross_entropy(output, y))
    _, _, _, v, epsilon = PCInfer(model, F.cross_entropy, x, y, "Strict", eta=0.2, n=4)
    final, stale = oracles.strict(*args, steps=4, lr=0.2), oracles.strict(*args, steps=3, lr=0.2)
    _close(v[1:-1], final.values[:-1])
    _close([-entry for entry in epsilon[1:]], stale.errors)


def test_strict_takes_gradients_at_the_final_beliefs_with_stale_errors():
    model, x, y = _problem()
    _, _, _, v, epsilon = PCInfer(model, F.cross_entropy, x, y, "Strict", eta=0.2, n=4)
    for layer, below, error in zip(model, v, epsilon[1:], strict=False):
        expected = torch.autograd.grad(layer(below), list(layer.parameters()), error)
        _close((parameter.grad for parameter in layer.parameters()), expected)


@pytest.mark.parametrize("problem", [_problem, _coupled])
def test_exact_is_autograd(problem):
    model, x, y = problem()
    loss_function = F.mse_loss if y.is_floating_point() else F.cross_entropy
    twin, state = copy.deepcopy(model), torch.get_rng_state()
    activations = [x.clone().requires_grad_()]
    for layer in twin:
        activations.append(layer(activations[-1].clone()))
        activations[-1].retain_grad()
    loss = loss_function(activations[-1], y)
    loss.backward()
    torch.set_rng_state(state)
    vhat, Loss, dLdy, v, epsilon = PCInfer(model, loss_function, x, y, "Exact")
    _close([Loss, dLdy, *vhat], [loss.detach(), activations[-1].grad, *(entry.detach() for entry in activations)])
    _close(epsilon[1:], [entry.grad for entry in activations[1:]])
    _close(v[1:], [(entry - entry.grad).detach() for entry in activations[1:]])
    _close(_gradients(model), _gradients(twin))
    assert v[0] is None and epsilon[0] is None


def test_fixed_prediction_at_unit_step_is_exact_after_as_many_steps_as_layers():
    """The stale convention's n = L, and not one step earlier."""
    model, x, y = _problem()
    PCInfer(model, F.cross_entropy, x, y, "Exact")
    exact = _gradients(model)
    PCInfer(model, F.cross_entropy, x, y, "FixedPred", eta=1, n=len(model))
    _close(_gradients(model), exact)
    PCInfer(model, F.cross_entropy, x, y, "FixedPred", eta=1, n=len(model) - 1)
    assert not torch.allclose(_gradients(model)[0], exact[0])


def test_the_loss_is_taken_as_it_is_written():
    """Strict with a mean and with a summed loss are two different relaxations, not multiples of each other."""
    model, x, y = _problem()
    PCInfer(model, nn.CrossEntropyLoss(), x, y, "Strict", n=50)
    mean = _gradients(model)
    PCInfer(model, nn.CrossEntropyLoss(reduction="sum"), x, y, "Strict", n=50)
    assert not torch.allclose(_gradients(model)[0], len(x) * mean[0], rtol=1e-3)


# vinit ----------------------------------------------------------------------------------------------------------------


def test_vinit_of_vhat_is_no_vinit():
    model, x, y = _problem()
    plain = PCInfer(model, F.cross_entropy, x, y, "Strict")
    expected = _results(plain, model)
    found = _results(PCInfer(model, F.cross_entropy, x, y, "Strict", vinit=plain[0]), model)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_vinit_continues_an_inference_where_another_stopped():
    model, x, y = _problem()
    v = PCInfer(model, F.cross_entropy, x, y, "Strict", n=3)[3]
    before = [entry.clone() for entry in v]
    continued = _results(PCInfer(model, F.cross_entropy, x, y, "Strict", n=4, vinit=v), model)
    whole = _results(PCInfer(model, F.cross_entropy, x, y, "Strict", n=7), model)
    _close(continued.values(), whole.values())
    _close(v, before, tolerance=0)


def test_another_vinit_changes_strict_until_inference_has_converged():
    model, x, y = _problem()
    vhat = PCInfer(model, F.cross_entropy, x, y, "Exact")[0]
    vinit = [None, *(entry + 0.3 * torch.randn_like(entry) for entry in vhat[1:-1]), vhat[-1]]

    def beliefs_and_gradients(n, vinit):
        v = PCInfer(model, F.cross_entropy, x, y, "Strict", eta=0.3, n=n, vinit=vinit)[3]
        return [*v, *_gradients(model)]

    early = zip(beliefs_and_gradients(5, None)[1:3], beliefs_and_gradients(5, vinit)[1:3], strict=True)
    assert all((a - b).abs().max() > 1e-2 for a, b in early)
    _close(beliefs_and_gradients(2000, None), beliefs_and_gradients(2000, vinit), tolerance=1e-10)


@pytest.mark.parametrize("error_type", ["FixedPred", "Exact"])
def test_only_strict_looks_at_vinit(error_type):
    model, x, y = _problem()
    expected = _results(PCInfer(model, F.cross_entropy, x, y, error_type), model)
    vinit = [torch.randn(6, width, dtype=torch.float64) for width in (5, 7, 6, 4)]
    found = _results(PCInfer(model, F.cross_entropy, x, y, error_type, vinit=vinit), model)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# What it leaves behind ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error_type", ERROR_TYPES)
def test_grad_is_overwritten_and_accumulates_nothing(error_type):
    model, x, y = _problem()
    PCInfer(model, F.cross_entropy, x, y, error_type)
    first = _gradients(model)
    PCInfer(model, F.cross_entropy, x, y, error_type)
    assert all(torch.equal(a, b) for a, b in zip(_gradients(model), first, strict=True))


@pytest.mark.parametrize("error_type", ERROR_TYPES)
def test_results_are_tensors_of_their_own(error_type):
    """An optimizer that clips ``.grad`` in place, or a user who moves ``v``, changes nothing else."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 2)).double()
    x, y = torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64)
    vhat, _, dLdy, v, epsilon = PCInfer(model, F.mse_loss, x, y, error_type)
    kept = [entry.clone() for entry in (*vhat, dLdy, *epsilon[1:], x)]
    assert not any(entry.requires_grad for entry in (*vhat, dLdy, *epsilon[1:], *v[1:]))
    for parameter in model.parameters():
        parameter.grad.zero_()
    for entry in v:
        if entry is not None:
            entry.add_(1)
    _close([*vhat, dLdy, *epsilon[1:], x], kept, tolerance=0)


@pytest.mark.parametrize("error_type", ERROR_TYPES)
def test_weights_buffers_and_generator_move_as_in_one_forward_pass(error_type):
    model, x, y = _coupled()
    twin, state, given = copy.deepcopy(model), torch.get_rng_state(), x.clone()
    twin(x)
    expected_next = torch.rand(1)
    torch.set_rng_state(state)
    PCInfer(model, F.mse_loss, x, y, error_type, n=5)
    assert torch.equal(torch.rand(1), expected_next)
    assert torch.equal(x, given)
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
    assert int(model[2].num_batches_tracked) == 1


@pytest.mark.parametrize("error_type", ERROR_TYPES)
def test_hooks_flags_and_modes_are_untouched(error_type):
    model, x, y = _problem()
    model[0][0].weight.requires_grad_(False)
    model[1].eval()
    calls = []
    handle = model[1].register_forward_hook(lambda *_: calls.append(1))
    attributes = [set(vars(module)) for module in model.modules()]
    PCInfer(model, F.cross_entropy, x, y, error_type)
    assert calls and handle.id in model[1]._forward_hooks and len(model[1]._forward_hooks) == 1
    assert [parameter.requires_grad for parameter in model.parameters()] == [False] + [True] * 5
    assert model[0][0].weight.grad is None and model[0][0].bias.grad is not None
    assert model.training and not model[1].training
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not x.requires_grad and x.grad is None


def test_dropout_masks_stay_those_of_the_forward_pass_while_beliefs_move():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    vhat, _, _, _, epsilon = PCInfer(model, F.mse_loss, x, y, "Strict", n=30)
    dropped = vhat[2] == 0
    kept_error = epsilon[1][dropped]  # no message comes through a dropped unit: its belief stays the prediction
    assert dropped.any() and torch.equal(kept_error, torch.zeros_like(kept_error))
    assert (epsilon[1][~dropped] != 0).all()


def test_a_shared_layer_sums_the_gradients_of_its_uses():
    torch.manual_seed(6)
    shared = nn.Linear(4, 4).double()
    model = nn.Sequential(shared, nn.Tanh(), shared)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    expected = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
    vhat, *_ = PCInfer(model, F.mse_loss, x, y, "Exact")
    assert len(vhat) == 4
    _close(_gradients(model), expected)


@pytest.mark.parametrize("error_type", ERROR_TYPES)
def test_integer_inputs_have_no_error(error_type):
    model = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    x, y = torch.randint(9, (4, 2)), torch.tensor([0, 1, 1, 0])
    vhat, _, _, _, epsilon = PCInfer(model, F.cross_entropy, x, y, error_type)
    assert torch.equal(vhat[0], x) and epsilon[0] is None
    assert model[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("error_type", ERROR_TYPES)
def test_one_layer_is_backpropagation_under_no_grad_too(error_type):
    model = nn.Sequential(nn.Linear(3, 2)).double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    expected = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
    with torch.no_grad():
        PCInfer(model, F.mse_loss, x, y, error_type, n=2)
    _close(_gradients(model), expected)


# Refusals -------------------------------------------------------------------------------------------------------------


class _Reversed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x)


def _refusals():
    good = [torch.zeros(6, width, dtype=torch.float64) for width in (5, 7, 6, 4)]
    yield "a network that is no Sequential", {"model": nn.Linear(5, 4).double()}, "nn.Sequential"
    yield "a forward of its own", {"model": _Reversed(nn.Linear(5, 4)).double()}, "own forward"
    yield "no layers", {"model": nn.Sequential()}, "with layers"
    yield "inputs that are no tensor", {"X": [[0.0] * 5]}, "a tensor"
    for error_type in ("strict", "Fixed", "", None):
        yield f"ErrType {error_type!r}", {"ErrType": error_type}, "Strict"
    for eta in (0, -0.1, float("nan"), float("inf"), "0.1", None):
        yield f"eta {eta!r}", {"eta": eta}, "eta"
    for n in (0, -1, 2.0, True, None):
        yield f"n {n!r}", {"n": n}, r"n=\.\.\."
    yield "vinit too short", {"vinit": good[:-1]}, "3 entries"
    yield "vinit too long", {"vinit": [*good, good[-1]]}, "5 entries"
    yield "vinit empty", {"vinit": []}, "0 entries"
    yield "vinit of another shape", {"vinit": [good[0], good[1][:, :6], *good[2:]]}, r"\(6, 6\)"
    yield "vinit with a hole", {"vinit": [*good[:2], None, good[3]]}, "None"
    yield "vinit of another batch", {"vinit": [entry[:3] for entry in good]}, r"\(3, 5\)"
    yield "a loss a sample", {"LossFun": nn.CrossEntropyLoss(reduction="none")}, r"shape \(6,\)"
    yield "a detached loss", {"LossFun": lambda output, y: F.cross_entropy(output.detach(), y)}, "detach"
    yield "a number for a loss", {"LossFun": lambda output, y: 0.5}, "float"


REFUSALS = list(_refusals())


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS])
def test_refusals_say_what_is_wrong_before_anything_changes(change, message):
    model, x, y = _problem()
    model[1].extend([nn.BatchNorm1d(6).double(), nn.Dropout()])  # a buffer and a generator that could have moved
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    arguments = {"model": model, "LossFun": F.cross_entropy, "X": x, "Y": y, "ErrType": "Strict", "eta": 0.1, "n": 20}
    with pytest.raises(ConfigurationError, match=message):
        PCInfer(**(arguments | change))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_exact_looks_neither_at_eta_nor_at_n():
    model, x, y = _problem()
    expected = _results(PCInfer(model, F.cross_entropy, x, y, "Exact"), model)
    found = _results(PCInfer(model, F.cross_entropy, x, y, "Exact", eta=0, n=0), model)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_layer_that_fails_or_returns_a_tuple_is_named():
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    with pytest.raises(NodeEvaluationError, match=r"node '1' \(Linear\)"):
        PCInfer(nn.Sequential(nn.Linear(3, 5), nn.Linear(4, 2)), F.mse_loss, x, y, "Strict")
    with pytest.raises(NodeEvaluationError, match="one floating point tensor, and this one tuple"):
        PCInfer(nn.Sequential(nn.LSTM(3, 2), nn.Linear(2, 2)), F.mse_loss, x, y, "Strict")


def test_a_divergence_is_an_error_and_leaves_grad_alone():
    model, x, y = _problem()
    with pytest.raises(NonFiniteError, match="smaller eta"):
        PCInfer(model, F.cross_entropy, x, y, "Strict", eta=1e3, n=500)
    assert all(parameter.grad is None for parameter in model.parameters())
