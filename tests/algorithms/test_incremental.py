"""Incremental predictive coding: weights that move with the values, against plain loops on the written-out energy."""

import copy

import pytest
import torch
from helpers import relative_error, scaled_by
from oracles.energy import EnergyProblem, gradient
from oracles.graphs import Dag, SkipDag, backprop, cross_entropy, skip_dag
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ConfigurationError, NumericalError

NAMES = [vertex.name for vertex in skip_dag().vertices]
MAKE = [
    pytest.param(lambda p: torch.optim.SGD(p, lr=0.02), id="SGD"),
    pytest.param(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), id="momentum"),
    pytest.param(lambda p: torch.optim.Adam(p, lr=0.003), id="Adam"),
]


def labels(output: Tensor) -> Tensor:
    return torch.arange(len(output)) % output.shape[1]


def mean_loss(output: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, labels(output))


def by_formula(steps: int, lr: float, make, batches: int = 1) -> dict[str, Tensor]:
    """Values and weights at once, each on the gradient of F at the state that both see."""
    dag = skip_dag()
    parameters = {name: value.clone().requires_grad_() for name, value in dag.parameters.items()}
    optimizer = make(list(parameters.values()))
    for _ in range(batches):
        values = EnergyProblem(Dag(dag.vertices, _detached(parameters), dag.inputs), cross_entropy).feedforward()
        for _ in range(steps):
            now = EnergyProblem(Dag(dag.vertices, _detached(parameters), dag.inputs), cross_entropy)
            slope = gradient(now.of_values, values)
            for name, g in now.parameter_gradients(values).items():
                parameters[name].grad = g / len(dag.inputs["x"])  # the scale of the mean loss
            optimizer.step()
            values = {name: value - lr * slope[name] for name, value in values.items()}
    return _detached(parameters)


def _detached(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in parameters.items()}


def trained(steps: int, lr: float, make, batches: int = 1, **settings) -> torch2ebm.EnergyModel:
    model = torch2ebm.convert(SkipDag(), nodes=NAMES)
    algorithm = torch2ebm.IncrementalPredictiveCoding(steps, lr, **settings)
    optimizer = torch2ebm.EnergyOptimizer(make(model.parameters()), model, algorithm)
    for _ in range(batches):
        optimizer.zero_grad()
        mean_loss(model(skip_dag().inputs["x"])).backward()
        optimizer.step()
    return model


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # few steps reach few levels
@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_weights_are_those_of_the_formula(steps: int, make) -> None:
    ours = dict(trained(steps, 0.2, make, batches=3).named_parameters())
    for name, expected in by_formula(steps, 0.2, make, batches=3).items():
        torch.testing.assert_close(ours[name].detach(), expected, rtol=1e-10, atol=1e-13)


def energies_by_formula(steps: int, lr: float, rate: float) -> list[float]:
    """F at the start of every step, at the weights of then, and where the last move of the values leads."""
    dag = skip_dag()
    parameters = _detached(dag.parameters)
    values = EnergyProblem(dag, cross_entropy).feedforward()
    found = []
    for step in range(steps + 1):
        now = EnergyProblem(Dag(dag.vertices, parameters, dag.inputs), cross_entropy)
        found.append(float(now.of_values(values)))
        slope = gradient(now.of_values, values)
        learned = now.parameter_gradients(values)
        if step < steps - 1:  # the report of a step comes before its weights move
            parameters = {n: p - rate * learned[n] / len(dag.inputs["x"]) for n, p in parameters.items()}
        values = {name: value - lr * slope[name] for name, value in values.items()}
    return found


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # few steps reach few levels
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_report_has_the_energy_of_every_step_and_of_the_end(steps: int) -> None:
    model = torch2ebm.convert(SkipDag(), nodes=NAMES)
    algorithm = torch2ebm.IncrementalPredictiveCoding(steps, 0.2)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(model.parameters(), lr=0.02), model, algorithm)
    mean_loss(model(skip_dag().inputs["x"])).backward()
    first = model.state.relaxation
    assert first.steps == 1 and first.energy == pytest.approx(energies_by_formula(1, 0.2, 0.02), rel=1e-12)
    assert first.residual > 0 and bool((first.sample_residual > 0).all())
    optimizer.step()
    last = model.state.relaxation
    assert last.steps == steps and last.energy == pytest.approx(energies_by_formula(steps, 0.2, 0.02), rel=1e-12)
    for nodes, loss, energy in zip(zip(*last.node_energy.values(), strict=True), last.loss, last.energy, strict=True):
        assert sum(nodes) + loss == pytest.approx(energy, rel=1e-12)
    scalars = model.state.scalars()  # of the values that are shown: those of the last gradient
    assert scalars["energy"] == last.energy[-2] and scalars["loss"] == last.loss[-2]


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # which is what it shows
def test_one_step_teaches_the_output_alone() -> None:
    model = trained(1, 0.2, lambda p: torch.optim.SGD(p, lr=0.1))
    before = dict(SkipDag().named_parameters())
    reference = backprop(SkipDag(), (skip_dag().inputs["x"],), mean_loss)
    for name, parameter in model.named_parameters():
        if name.startswith("output."):
            torch.testing.assert_close(parameter.detach(), before[name].detach() - 0.1 * reference[name])
        else:
            assert torch.equal(parameter, before[name])
    assert model.state.unreached == tuple(NAMES[:-1])
    assert trained(2, 0.2, lambda p: torch.optim.SGD(p, lr=0.1)).state.unreached == ()


def test_with_slow_weights_a_batch_moves_them_by_the_sum_of_strict_s_gradients() -> None:
    """Salvatori et al. 2022: alpha -> 0. The t-th gradient is that of predictive coding after t value steps."""
    steps, lr = 6, 0.2
    total: dict[str, Tensor] = {}
    for done in range(steps):
        problem = EnergyProblem(skip_dag(), cross_entropy)
        values = problem.feedforward()
        for _ in range(done):
            slope = gradient(problem.of_values, values)
            values = {name: value - lr * slope[name] for name, value in values.items()}
        for name, g in problem.parameter_gradients(values).items():
            total[name] = total.get(name, 0) + g / 4
    before = {name: p.detach().clone() for name, p in SkipDag().named_parameters()}

    def distance(alpha: float) -> float:
        model = trained(steps, lr, lambda p: torch.optim.SGD(p, lr=alpha))
        moved = {name: (before[name] - p.detach()) / alpha for name, p in model.named_parameters()}
        return relative_error(moved, total)

    assert distance(1e-4) < 1e-2
    assert distance(1e-3) / distance(1e-4) == pytest.approx(10, rel=0.2)  # first order in alpha
    assert distance(1.0) > 0.1


def test_weights_that_wait_for_the_end_of_inference_are_another_result() -> None:
    """The negative twin: one step on strict predictive coding's gradient is not the incremental rule."""
    ours = dict(trained(6, 0.2, lambda p: torch.optim.SGD(p, lr=0.05)).named_parameters())
    module = SkipDag()
    model = torch2ebm.convert(module, nodes=NAMES)
    algorithm = torch2ebm.PredictiveCoding(6, 0.2)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(module.parameters(), lr=0.05), model, algorithm)
    mean_loss(model(skip_dag().inputs["x"])).backward()
    optimizer.step()
    before = dict(SkipDag().named_parameters())
    other = {name: p.detach() - before[name].detach() for name, p in module.named_parameters()}
    moved = {name: p.detach() - before[name].detach() for name, p in ours.items()}
    assert relative_error(moved, other) > 0.5


def test_accumulated_batches_relax_side_by_side() -> None:
    """Two half batches with half the loss each are the whole batch."""
    x = skip_dag().inputs["x"]

    def run(parts: int) -> dict[str, Tensor]:
        model = torch2ebm.convert(SkipDag(), nodes=NAMES)
        algorithm = torch2ebm.IncrementalPredictiveCoding(5, 0.2)
        inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer = torch2ebm.EnergyOptimizer(inner, model, algorithm, accumulation=parts)
        for _ in range(2):
            optimizer.zero_grad()
            for part, target in zip(x.chunk(parts), labels(torch.zeros(4, 3)).chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(part), target) / parts).backward()
            optimizer.step()
        return {name: p.detach() for name, p in model.named_parameters()}

    for name, expected in run(1).items():
        torch.testing.assert_close(run(2)[name], expected, rtol=1e-11, atol=1e-13)


def test_gradients_given_up_make_no_step() -> None:
    model = torch2ebm.convert(SkipDag(), nodes=NAMES)
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = torch2ebm.EnergyOptimizer(inner, model, torch2ebm.IncrementalPredictiveCoding(5, 0.2))
    mean_loss(model(skip_dag().inputs["x"])).backward()
    optimizer.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_is_no_part_of_the_model_has_one_step() -> None:
    head = nn.Linear(3, 3).double()
    model = torch2ebm.convert(SkipDag(), nodes=NAMES)
    inner = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.05)
    optimizer = torch2ebm.EnergyOptimizer(inner, model, torch2ebm.IncrementalPredictiveCoding(5, 0.2))
    before = head.weight.detach().clone()
    mean_loss(head(model(skip_dag().inputs["x"]))).backward()
    gradient = head.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(head.weight.detach(), before - 0.05 * gradient)
    assert torch.equal(head.weight.grad, gradient)


def test_a_later_step_that_fails_leaves_weights_and_state_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch2ebm.convert(SkipDag(), nodes=NAMES)
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = torch2ebm.EnergyOptimizer(inner, model, torch2ebm.IncrementalPredictiveCoding(5, 0.2))

    def batch() -> None:
        optimizer.zero_grad()
        mean_loss(model(skip_dag().inputs["x"])).backward()

    batch()
    optimizer.step()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict())
    batch()
    step, calls = type(inner).step, []

    def poisoned(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            with torch.no_grad():
                next(iter(model.parameters())).fill_(torch.nan)
        return result

    monkeypatch.setattr(inner, "step", poisoned.__get__(inner))
    with pytest.raises(NumericalError):
        optimizer.step()
    assert len(calls) == 3
    monkeypatch.undo()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for index, entry in state["state"].items():
        assert all(torch.equal(after["state"][index][key], value) for key, value in entry.items())
    batch()
    optimizer.step()  # and the next one works


def test_a_gradient_scaler_s_factor_is_refused() -> None:
    model = torch2ebm.convert(SkipDag(), nodes=NAMES)
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    torch2ebm.EnergyOptimizer(inner, model, torch2ebm.IncrementalPredictiveCoding(5, 0.2))
    with pytest.raises(ConfigurationError, match="outer factor of 65536"):
        scaled_by(65536.0, mean_loss(model(skip_dag().inputs["x"]))).backward()
    assert all(p.grad is None for p in model.parameters())


def test_it_learns_a_task_in_the_unchanged_loop() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(128, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = torch2ebm.convert(net)
    algorithm = torch2ebm.IncrementalPredictiveCoding(steps=8, lr=0.5)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.Adam(net.parameters(), lr=5e-3), model, algorithm)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (net(x).argmax(1) == y).float().mean() > 0.95


# The monitor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm",
    [torch2ebm.PredictiveCoding(4, 0.1), torch2ebm.IncrementalPredictiveCoding(4, 0.1), torch2ebm.ZeroDivergence()],
    ids=lambda a: type(a).__name__,
)
@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # few steps reach few levels
def test_a_monitor_gets_each_node_s_energy_every_step(algorithm: torch2ebm.Algorithm) -> None:
    written: list[tuple[str, float, int]] = []
    model = torch2ebm.convert(SkipDag(), nodes=NAMES)
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = torch2ebm.EnergyOptimizer(inner, model, algorithm, monitor=lambda *each: written.append(each))
    for step in range(3):
        optimizer.zero_grad()
        mean_loss(model(skip_dag().inputs["x"])).backward()
        optimizer.step()
        found = {name: value for name, value, at in written if at == step}
        assert {f"energy/{name}" for name in NAMES[:-1]} <= found.keys()
        for name in NAMES[:-1]:
            assert found[f"energy/{name}"] == pytest.approx(float(model.state.energy[name].sum()), rel=1e-9, abs=1e-15)
        if not isinstance(algorithm, torch2ebm.ZeroDivergence):
            nodes = sum(found[f"energy/{name}"] for name in NAMES[:-1])
            assert found["energy"] == pytest.approx(nodes + found["loss"], rel=1e-9)
            assert found["relaxation/steps"] == 4 and found["relaxation/residual"] > 0
    assert {at for _, _, at in written} == {0, 1, 2}
