"""compile=True: recorded programs compute what the eager engine does, whatever changes in between."""

import contextlib
import copy
import math
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._inductor
from helpers import in_threads
from solvers_list import ROWS
from torch import Tensor, nn
from torch.nn import functional as F

import torch2ebm
from torch2ebm.errors import CompilationWarning
from torch2ebm.graph.energy_graph import Node
from torch2ebm.isolation.random_numbers import Draws, Repeated, UnknownDrawError
from torch2ebm.programs import record
from torch2ebm.programs.program import Program
from torch2ebm.programs.record import NotRecordableError, record_program

Make = Callable[..., torch2ebm.Algorithm]
Losses = Callable[[int], Callable[[Tensor], Tensor]]

ALGORITHMS: list[tuple[str, Make]] = [
    ("strict", lambda **c: torch2ebm.PredictiveCoding(4, 0.01, **c)),
    ("errors", lambda **c: torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent(3, 0.1), **c)),
]
LONG: list[tuple[str, Make]] = [  # with more steps, of which the last ones repeat: these are compiled
    ("strict", lambda **c: torch2ebm.PredictiveCoding(8, 0.01, **c)),
    ("errors", lambda **c: torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent(7, 0.1), **c)),
]
SOLVERS = [*(row.recorded for row in ROWS), torch2ebm.GradientDescent(60, 0.2, tol=1e-4)]
by_algorithm = pytest.mark.parametrize("make", [make for _, make in ALGORITHMS], ids=[name for name, _ in ALGORITHMS])
by_long_algorithm = pytest.mark.parametrize("make", [make for _, make in LONG], ids=[name for name, _ in LONG])


@pytest.fixture
def recorded_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run as they were recorded: what they compute does not hang on a compiler."""
    monkeypatch.setattr(Program, "compile", lambda self: None)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every function that is traced."""
    count: list[int] = []
    traced = record._traced
    monkeypatch.setattr(record, "_traced", lambda *a: count.append(1) or traced(*a))
    return count


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12),
        nn.Tanh(),
        nn.Dropout(0.4),
        nn.Linear(12, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(inplace=True),
        nn.Linear(12, 12),
        nn.Softplus(),
        nn.Linear(12, 4),
    ).double()


def inputs(step: int, batch: int = 5) -> Tensor:
    return torch.randn(batch, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def cross_entropy(step: int) -> Callable[[Tensor], Tensor]:
    return lambda output: F.cross_entropy(output, (torch.arange(len(output)) + step) % 4)


def squared(step: int) -> Callable[[Tensor], Tensor]:
    return lambda output: (output - torch.sin(torch.arange(4.0) + step)).square().mean()


def trained(
    net: nn.Module,
    algorithm: torch2ebm.Algorithm,
    batches: Iterator[Tensor] | None = None,
    losses: Losses = cross_entropy,
    steps: int = 5,
) -> tuple[list[dict[str, Tensor]], torch2ebm.EnergyModel]:
    """The gradients of every step of a short training, in which inputs, targets and weights change."""
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.05), model, algorithm)
    found = []
    torch.manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        losses(step)(model(inputs(step) if batches is None else next(batches))).backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        optimizer.step()
    return found, model


def assert_same(ours: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], tolerance: float = 1e-11) -> None:
    assert len(ours) == len(expected)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.keys() == theirs.keys()
        whole = max(float(gradient.norm()) for gradient in theirs.values())
        for name, gradient in theirs.items():
            assert (mine[name] - gradient).norm() <= tolerance * whole, name


# ---- the same numbers


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.StepSizeWarning")  # some steps are too long here
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.usefixtures("recorded_only")
def test_every_solver_keeps_its_numbers_and_its_report(solver: torch2ebm.Solver) -> None:
    expected, eager = trained(network(), torch2ebm.PredictiveCoding(solver=solver))
    ours, model = trained(network(), torch2ebm.PredictiveCoding(solver=solver, compile=True))
    assert_same(ours, expected)
    mine, theirs = model.state.relaxation, eager.state.relaxation
    assert (mine.steps, mine.converged, mine.node_energy.keys()) == (
        theirs.steps,
        theirs.converged,
        theirs.node_energy.keys(),
    )
    assert mine.energy == pytest.approx(theirs.energy, rel=1e-11)
    assert mine.residual == pytest.approx(theirs.residual, rel=1e-8)
    torch.testing.assert_close(mine.sample_residual, theirs.sample_residual)
    for name in eager.nodes:
        torch.testing.assert_close(model.state.value[name], eager.state.value[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"nudging": torch2ebm.Symmetric(0.1)},
        {"precisions": {"0": 2.0, "3": torch.linspace(0.5, 2.0, 12)}},
        {"energies": {"6": torch2ebm.Categorical()}},
        {"loss_reduction": "sum"},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.usefixtures("recorded_only")
def test_nudgings_energies_and_reductions_are_recorded_as_they_are(settings: dict) -> None:
    expected, _ = trained(network(), torch2ebm.PredictiveCoding(8, 0.05, **settings))
    ours, _ = trained(network(), torch2ebm.PredictiveCoding(8, 0.05, **settings, compile=True))
    plain, _ = trained(network(), torch2ebm.PredictiveCoding(8, 0.05))
    assert_same(ours, expected)
    with pytest.raises(AssertionError):
        assert_same(ours, plain, 1e-4)


@by_long_algorithm
def test_compiled_programs_compute_what_the_engine_computes(make: Make, recordings: list[int]) -> None:
    expected, eager = trained(network(), make(), steps=6)
    ours, model = trained(network(), make(compile=True), steps=6)
    assert recordings
    assert_same(ours, expected)
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # a few steps leave little at the first node
@by_long_algorithm
def test_compiled_programs_in_single_precision(make: Make) -> None:
    batches = [inputs(step).float() for step in range(5)]
    expected, _ = trained(network().float(), make(), iter(batches))
    ours, _ = trained(network().float(), make(compile=True), iter(batches))
    assert_same(ours, expected, 1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nudging": torch2ebm.OneSided(0.1)},
        {"damping": 0.3},
        {"update": torch2ebm.GaussSeidel()},
        {"update": torch2ebm.AndersonMixing(3)},
        {"readout": True},
        {"nudging": torch2ebm.Holomorphic(0.1, 4)},
    ],
    ids=str,
)
def test_an_equilibrium_settles_the_same_by_programs(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    if settings:  # the compiler's turn is without
        monkeypatch.setattr(Program, "compile", lambda self: None)
    gradients = []
    for compile in ({}, {"compile": True}):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        algorithm = torch2ebm.EquilibriumPropagation(free_steps=60, feedback=0.3, **settings, **compile)
        gradients.append(trained(net, algorithm, losses=squared)[0])
    assert_same(gradients[1], gradients[0], 1e-9)


# ---- what changes between batches


@pytest.mark.usefixtures("recorded_only")
def test_tensors_of_the_loss_are_those_of_the_batch() -> None:
    """Class weights, targets and a penalty on the parameters all change; a stale one would show."""

    def losses(net: nn.Module) -> Losses:
        def of_step(step: int) -> Callable[[Tensor], Tensor]:
            weight = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64) + step

            def loss(output: Tensor) -> Tensor:
                penalty = 1e-2 * sum(p.square().sum() for p in net.parameters())
                target = (torch.arange(len(output)) + step) % 4
                return (F.cross_entropy(output, target, weight=weight) + output.square().mean()) / (1 + step) + penalty

            return loss

        return of_step

    nets = network(), network()
    expected, _ = trained(nets[0], torch2ebm.PredictiveCoding(6, 0.1), losses=losses(nets[0]))
    ours, _ = trained(nets[1], torch2ebm.PredictiveCoding(6, 0.1, compile=True), losses=losses(nets[1]))
    assert_same(ours, expected)


@pytest.mark.usefixtures("recorded_only")
def test_two_losses_of_the_same_tensors_have_programs_of_their_own() -> None:
    def smoothed(step: int) -> Callable[[Tensor], Tensor]:
        target = torch.arange(5) % 4
        return lambda output: F.cross_entropy(output, target, label_smoothing=0.3 * (step % 2))

    expected, _ = trained(network(), torch2ebm.PredictiveCoding(6, 0.1), losses=smoothed)
    ours, _ = trained(network(), torch2ebm.PredictiveCoding(6, 0.1, compile=True), losses=smoothed)
    assert_same(ours, expected)


@by_algorithm
@pytest.mark.usefixtures("recorded_only")
def test_nothing_is_recorded_after_the_third_batch(make: Make, recordings: list[int]) -> None:
    net = network()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.05), model, make(compile=True))
    counts = []
    for step in range(6):
        (2.0**step * cross_entropy(step)(model(inputs(step)))).backward()  # as a gradient scaler's factor moves
        optimizer.step()
        counts.append(len(recordings))
    assert counts[0] + counts[1] > 0
    assert counts[2:] == [counts[2]] * 4


@by_long_algorithm
def test_nothing_is_compiled_after_the_third_batch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []

    def counting(module: nn.Module, *_: object) -> Callable[..., Any]:
        asked.append(module)
        return module.forward

    monkeypatch.setattr(torch._inductor, "compile", counting)
    net = network()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.05), model, make(compile=True))
    counts = []
    for step in range(6):
        cross_entropy(step)(model(inputs(step))).backward()
        optimizer.step()
        counts.append(len(asked))
    assert counts[2] > 0
    assert counts[2:] == [counts[2]] * 4


@by_algorithm
@pytest.mark.usefixtures("recorded_only")
def test_a_last_smaller_batch_and_the_other_mode_have_programs_of_their_own(make: Make) -> None:
    def pooled() -> nn.Sequential:
        layers = network()  # a view has the size of its batch written into its program
        return nn.Sequential(*layers[:6], nn.Unflatten(1, (3, 4)), nn.AvgPool1d(1), nn.Flatten(), *layers[6:])

    sizes = [5, 5, 3, 5, 3, 3]
    expected, eager = trained(pooled(), make(), iter(inputs(i, n) for i, n in enumerate(sizes)), steps=6)
    ours, model = trained(pooled(), make(compile=True), iter(inputs(i, n) for i, n in enumerate(sizes)), steps=6)
    assert_same(ours, expected)
    evaluated = []
    for each in (eager, model):
        each.eval().zero_grad()
        cross_entropy(0)(each(inputs(0))).backward()
        evaluated.append({name: p.grad for name, p in each.named_parameters()})
    assert_same(evaluated[1:], evaluated[:1])


@by_algorithm
@pytest.mark.usefixtures("recorded_only")
def test_shapes_that_change_with_every_batch_are_recorded_a_few_times_then_run_as_they_are(
    make: Make, recordings: list[int]
) -> None:
    sizes = [*range(2, 16), *range(2, 16)]
    batches = [inputs(i, n) for i, n in enumerate(sizes)]
    expected, _ = trained(network(), make(), iter(batches), steps=len(sizes))
    with pytest.warns(CompilationWarning, match="kinds of batches") as warned:
        ours, _ = trained(network(), make(compile=True), iter(batches), steps=len(sizes))
    assert len(warned) == 1
    assert_same(ours, expected)
    once = len(recordings)
    trained(network(), make(compile=True), iter([inputs(i, 5) for i in range(4)]), steps=4)
    assert once <= 8 * (len(recordings) - once)


# ---- what cannot be recorded


class ThroughNumPy(nn.Module):
    """A part that leaves torch: no program can repeat it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(6, 8), Standardised(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.scale(self.first(x))))


class Standardised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Divided.apply(x)


class Divided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.scale = float(x.abs().max())
        return x / ctx.scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / ctx.scale


@pytest.mark.parametrize("make", [torch2ebm.ZeroDivergence, lambda **c: torch2ebm.FixedPrediction(5, 0.3, **c)])
def test_algorithms_of_one_sweep_have_no_programs(make: Make, recordings: list[int]) -> None:
    """Their forward is the module's own run, and their sweep walks what it has left."""
    expected, _ = trained(network(), make(), steps=4)
    ours, _ = trained(network(), make(compile=True), steps=4)
    assert_same(ours, expected, 0.0)
    assert not recordings


@pytest.mark.parametrize("name", ["strict", "errors"])
def test_a_model_that_cannot_be_recorded_runs_as_it_is_with_one_warning(name: str, recordings: list[int]) -> None:
    make = dict(ALGORITHMS)[name]

    def gradients(algorithm: torch2ebm.Algorithm) -> list[Tensor]:
        torch.manual_seed(0)
        net = ThroughNumPy().double()
        model = torch2ebm.convert(net, nodes=["first", "scale", "last"])
        optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.05), model, algorithm)
        for step in range(4):
            optimizer.zero_grad()
            cross_entropy(step)(model(inputs(step))).backward()
            optimizer.step()
        return [p.grad.clone() for p in net.parameters()]

    expected = gradients(make())
    with pytest.warns(CompilationWarning, match="cannot be recorded") as warned:
        ours = gradients(make(compile=True))
    assert len(warned) == 1
    assert len(recordings) <= 2  # in training: not with every batch
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_draws_that_no_tensor_repeats_are_wound_back() -> None:
    """A random leaky slope is mixed with its input where it is drawn: only the generator can repeat it."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.RReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()

    expected, _ = trained(net(), torch2ebm.PredictiveCoding(6, 0.1))
    with pytest.warns(CompilationWarning, match="rrelu") as warned:
        ours, _ = trained(net(), torch2ebm.PredictiveCoding(6, 0.1, compile=True))
    assert len(warned) == 1
    assert_same(ours, expected)


def annealed(step: int) -> Callable[[Tensor], Tensor]:
    """A tensor that is made anew in each call, of a number of Python's, and a closure's target."""
    target = cross_entropy(step)
    return lambda output: target(output) + torch.tensor(0.1 * step, dtype=output.dtype) * output.square().mean()


@by_algorithm
@pytest.mark.parametrize("inside", [cross_entropy, annealed])
def test_an_energy_loss_of_torch_operations_is_recorded(
    recordings: list[int], recorded_only: None, make: Make, inside: Losses
) -> None:
    def losses(step: int) -> Callable[[Tensor], Tensor]:
        return torch2ebm.EnergyLoss(inside(step))

    expected, _ = trained(network(), make(), losses=losses)
    assert not recordings
    ours, _ = trained(network(), make(compile=True), losses=losses)
    assert recordings
    assert_same(ours, expected)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


CLOSED: dict[str, Callable[[Tensor], Tensor]] = {
    "a branch on a number": lambda o: o.square().mean() if o.square().mean() < 1e9 else o.abs().mean(),
    "a number": lambda o: o.square().mean() * float(o.detach().abs().mean()),
    "a detached weight": lambda o: (o.square() * o.detach().sigmoid()).mean(),
    "a custom function": lambda o: Doubled.apply(o).square().mean(),
    "a custom function beside torch": lambda o: o.square().mean() + Doubled.apply(o).square().mean(),
    "a write in place": lambda o: (o * 1).tanh_().square().mean(),
}


@pytest.mark.parametrize("inside", CLOSED.values(), ids=CLOSED)
def test_an_energy_loss_of_more_runs_as_it_is_with_one_warning(inside: Callable[[Tensor], Tensor]) -> None:
    def losses(step: int) -> Callable[[Tensor], Tensor]:
        return torch2ebm.EnergyLoss(inside)

    expected, _ = trained(network(), torch2ebm.PredictiveCoding(6, 0.01), losses=losses)
    with pytest.warns(CompilationWarning, match="the loss") as warned:
        ours, _ = trained(network(), torch2ebm.PredictiveCoding(6, 0.01, compile=True), losses=losses)
    assert len(warned) == 1
    assert_same(ours, expected, 0.0)


def test_a_loss_that_joins_two_calls_says_once_that_it_is_not_compiled() -> None:
    def gradients(algorithm: torch2ebm.Algorithm) -> list[Tensor]:
        net = network()
        model = torch2ebm.convert(net)
        torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).to(next(net.parameters()))
        for _ in range(2):
            F.mse_loss(model(x), model(x.flip(0))).backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    expected = gradients(torch2ebm.PredictiveCoding(6, 0.1))
    with pytest.warns(CompilationWarning, match="joins several calls") as warned:
        ours = gradients(torch2ebm.PredictiveCoding(6, 0.1, compile=True))
    assert len([each for each in warned if each.category is CompilationWarning]) == 1
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_a_compiler_that_fails_leaves_the_recorded_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Callable[..., object]:
        def run(*tensors: Tensor) -> object:
            tensors[0].zero_()  # half-way through
            raise RuntimeError("the compiler says:\nRuntimeError: no C++ compiler.\n\nSet TORCH_LOGS for more")

        return run

    expected, _ = trained(network(), torch2ebm.PredictiveCoding(8, 0.1))
    monkeypatch.setattr(torch._inductor, "compile", broken)
    with pytest.warns(CompilationWarning, match=r"failed: RuntimeError: no C\+\+ compiler\. The"):
        ours, _ = trained(network(), torch2ebm.PredictiveCoding(8, 0.1, compile=True))
    assert_same(ours, expected)


def test_a_compiler_that_computes_otherwise_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: nn.Module, *_: object) -> Callable[..., object]:
        return lambda *tensors: [1.001 * each if each.is_floating_point() else each for each in module(*tensors)]

    expected, _ = trained(network(), torch2ebm.PredictiveCoding(8, 0.1))
    monkeypatch.setattr(torch._inductor, "compile", wrong)
    with pytest.warns(CompilationWarning, match="other numbers"):
        ours, _ = trained(network(), torch2ebm.PredictiveCoding(8, 0.1, compile=True))
    assert_same(ours, expected)


@pytest.mark.parametrize(("share", "dtype", "believed"), [
    (1e-3, torch.float32, True), (0.05, torch.float32, False), (1e-3, torch.float64, False),
    (1e-3, torch.bfloat16, True), (0.5, torch.bfloat16, False),
])  # fmt: skip
def test_rounding_may_decide_a_few_whole_numbers(
    share: float, dtype: torch.dtype, believed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which entry a max-pool takes, for one."""

    def elsewhere(module: nn.Module, *_: object) -> Callable[..., object]:
        def run(x: Tensor) -> list[Tensor]:
            values, places = module(x)
            return [values, places + (torch.arange(len(places)) < share * len(places))]

        return run

    x = torch.rand(2000, 3, dtype=dtype)
    program, (_, places) = record_program(lambda: x.max(1), [x])
    monkeypatch.setattr(torch._inductor, "compile", elsewhere)
    program.compile()
    with contextlib.nullcontext() if believed else pytest.warns(CompilationWarning, match="other numbers"):
        _, found = program([x])
    assert int((found != places).sum()) == (2 if believed else 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_compiler_that_makes_zeros_is_not_believed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(20, 3).to(dtype)
    program, _ = record_program(lambda: x.exp(), [x])
    monkeypatch.setattr(torch._inductor, "compile", lambda *_: lambda x: [torch.zeros_like(x)])
    program.compile()
    with pytest.warns(CompilationWarning, match="other numbers"):
        assert torch.equal(program([x]), x.exp())


@pytest.mark.parametrize("other", [1.0, float("nan"), float("-inf")])
def test_infinity_less_infinity_is_no_difference(other: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What conjugate gradients start from: a residual of infinity, an energy that is no number."""
    start = torch.tensor([float("inf"), float("nan"), 1.0])
    for found, believed in ((start, True), (torch.tensor([other, float("nan"), 1.0]), False)):
        program, _ = record_program(lambda: start_of(x), [x := torch.zeros(3)])
        monkeypatch.setattr(torch._inductor, "compile", lambda *_, found=found: lambda x: [found.clone()])
        program.compile()
        with contextlib.nullcontext() if believed else pytest.warns(CompilationWarning, match="other numbers"):
            assert torch.equal(program([x]).nan_to_num(), start.nan_to_num())


def start_of(zero: Tensor) -> Tensor:
    return torch.stack([zero[0] + math.inf, zero[1] * math.inf, zero[2] + 1.0])


def test_conjugate_gradients_are_handed_to_the_compiler_and_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are errors here. The compiler is the recorded program itself: it is not what is looked at."""
    handed: list[nn.Module] = []
    monkeypatch.setattr(torch._inductor, "compile", lambda module, *_: handed.append(module) or module)
    solver = torch2ebm.ErrorConjugateGradient(1e-9, 8)
    expected, _ = trained(network(), torch2ebm.PredictiveCoding(solver=solver))
    ours, _ = trained(network(), torch2ebm.PredictiveCoding(solver=solver, compile=True))
    assert handed
    assert_same(ours, expected)


def test_the_literal_schedule_is_not_compiled() -> None:
    with pytest.raises(torch2ebm.errors.ConfigurationError, match="schedule"):
        torch2ebm.ZeroDivergence("levels", compile=True)


@pytest.mark.parametrize("evaluation", [1, 4, 11, 16])
@pytest.mark.usefixtures("recorded_only")
def test_an_interrupted_recording_leaves_no_trace(evaluation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a node is evaluated under the recorder: weights and buffers stay, and the next step records anew."""
    evaluate, count = Node.evaluate, []

    def interrupted(node: Node, arguments: Any) -> Any:
        count.append(1)
        if len(count) == evaluation:
            raise KeyboardInterrupt
        return evaluate(node, arguments)

    net, algorithm = network(), torch2ebm.PredictiveCoding(8, 0.05, compile=True)
    before = copy.deepcopy(net.state_dict())
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.05), model, algorithm)
    loss = cross_entropy(0)(model(inputs(0)))
    with monkeypatch.context() as patch:
        patch.setattr(Node, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loss.backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    optimizer.detach()
    assert_same(trained(net, algorithm)[0], trained(network(), torch2ebm.PredictiveCoding(8, 0.05))[0])


# ---- pieces


def test_a_copy_of_an_algorithm_starts_without_programs(recordings: list[int]) -> None:
    algorithm = torch2ebm.PredictiveCoding(4, 0.05, compile=True)
    trained(network(), algorithm, steps=2)
    for twin in (copy.deepcopy(algorithm), pickle.loads(pickle.dumps(algorithm))):
        before = len(recordings)
        trained(network(), twin, steps=1)
        assert len(recordings) > before
        assert repr(twin) == repr(algorithm)


@pytest.mark.parametrize(
    "module", [nn.Dropout(0.3), nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3), nn.Dropout1d(0.3)], ids=repr
)
def test_draws_are_repeated_from_tensors(module: nn.Module) -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    kept: list[Tensor] = []
    with Draws(kept):
        first = module(x)
    with Repeated(kept):
        assert torch.equal(module(x), first)
    assert not torch.equal(module(x), first)


def test_what_mixes_its_input_with_its_draws_is_no_repeat() -> None:
    kept: list[Tensor] = []
    x = torch.linspace(-1, 1, 6, requires_grad=True)
    with Draws(kept):
        F.rrelu(x, training=True)
    with Repeated(kept), pytest.raises(UnknownDrawError):
        F.rrelu(x, training=True)


def test_a_tensor_from_nowhere_is_refused() -> None:
    known, unknown = torch.ones(2), torch.ones(2)
    with pytest.raises(NotRecordableError, match=r"shape \(2,\)"):
        record_program(lambda: known + unknown, [known])


def test_a_program_runs_on_other_tensors_and_keeps_the_structure() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    program, first = record_program(lambda: {"sum": a + b, "same": a, "number": 3, "both": (a * b, b)}, [a, b])
    assert torch.equal(first["sum"], torch.tensor([4.0, 6.0]))
    c, d = torch.tensor([5.0, 6.0]), torch.tensor([7.0, 8.0])
    found = program([c, d])
    assert torch.equal(found["sum"], c + d)
    assert found["same"] is c
    assert found["number"] == 3
    assert torch.equal(found["both"][0], c * d)
    assert found["both"][1] is d


def test_several_rounds_of_a_program_are_one_program() -> None:
    def state() -> list[Tensor]:
        return [torch.linspace(-1.0, 1.0, 3), torch.ones(3), torch.full((3,), 0.5)]

    weight = torch.tensor([[0.5, 0.2, 0.0], [0.1, -0.4, 0.3], [0.0, 0.6, 0.2]])
    moving = state()

    def round_of(a: Tensor, b: Tensor, still: Tensor) -> Any:
        total = (a @ weight).sum() + b.sum()
        b.add_(a, alpha=0.1)  # in place: the leaf is the input itself
        return (torch.tanh(a @ weight + b), b, still, "a number"), (total, 7)

    program, _ = record_program(lambda: round_of(*moving), [weight, *moving])
    several = program.repeated(3, count=4, first=1)
    assert len(several) == 3 * len(program)
    expected, given, totals = state(), state(), []
    for _ in range(3):
        (*expected, _), (total, _) = round_of(*expected)
        totals.append(total)
    found = several.leaves([weight, *given])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[:3], expected, strict=True))
    assert found[1] is given[1]
    assert torch.equal(given[1], expected[1])
    assert found[2] is given[2]
    assert [found[3], *found[5::2]] == ["a number", 7, 7, 7]
    assert torch.equal(torch.stack(found[4::2]), torch.stack(totals))


def test_rounds_pass_on_what_they_do_not_read() -> None:
    def state() -> list[Tensor]:
        return [torch.linspace(-1.0, 1.0, 3), torch.ones(3), torch.full((3,), 0.5)]

    moving = state()
    program, _ = record_program(lambda: ((moving[1], moving[2], torch.tanh(moving[0])), moving[0].sum()), moving)
    expected, totals = state(), []
    for _ in range(4):
        totals.append(expected[0].sum())
        expected = [expected[1], expected[2], torch.tanh(expected[0])]
    found = program.repeated(4, count=3, first=0).leaves(state())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[:3], expected, strict=True))
    assert torch.equal(torch.stack(found[3:]), torch.stack(totals))


@pytest.mark.usefixtures("recorded_only")
def test_steps_that_repeat_run_several_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    calls: list[int] = []
    leaves = Program.leaves
    monkeypatch.setattr(Program, "leaves", lambda *a: calls.append(1) or leaves(*a))
    expected, eager = trained(copy.deepcopy(net), torch2ebm.PredictiveCoding(40, 0.05), steps=3)
    assert not calls
    found, model = trained(net, torch2ebm.PredictiveCoding(40, 0.05, compile=True), steps=3)
    assert_same(found, expected)
    assert model.state.relaxation.steps == 40
    assert model.state.relaxation.energy == pytest.approx(eager.state.relaxation.energy, rel=1e-11)
    calls.clear()
    F.cross_entropy(model(inputs(9)), torch.arange(5) % 4).backward()
    assert 3 < len(calls) < 20


@pytest.mark.parametrize("steps", [30, 130])
@pytest.mark.usefixtures("recorded_only")
def test_a_relaxation_that_runs_away_is_told_at_the_same_step(steps: int) -> None:
    def energies(algorithm: torch2ebm.Algorithm) -> tuple[float, ...]:
        with pytest.raises(torch2ebm.errors.DivergenceError) as caught:
            trained(network().eval(), algorithm)
        return caught.value.energy

    expected = energies(torch2ebm.PredictiveCoding(steps, 2.2))
    assert energies(torch2ebm.PredictiveCoding(steps, 2.2, compile=True)) == pytest.approx(expected, rel=1e-9)


# ---- other threads


class Waiting(nn.Module):
    """While its run is watched another thread is let go on, and is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.is_watched, self.other = nn.Linear(3, 3), threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        if not self.is_watched.is_set():
            self.is_watched.set()
            self.other.wait(0.3)  # in vain where that is held up until this has ended
        return hidden.tanh()


def test_a_program_is_recorded_while_another_thread_captures_a_model() -> None:
    x, waiting, converted = torch.rand(3), Waiting(), threading.Event()

    def convert() -> None:
        torch2ebm.convert(nn.Sequential(waiting, nn.Linear(3, 2)), example_inputs=torch.rand(3))
        converted.set()

    def function() -> Tensor:
        waiting.other.set()
        converted.wait(0.3)
        return x.exp() + x

    def recorded() -> Tensor:
        waiting.is_watched.wait(10)
        program, _ = record_program(function, [x])
        return program([x])

    _, found = in_threads([convert, recorded])
    assert torch.equal(found, x.exp() + x)
    net = nn.Sequential(waiting, nn.Linear(3, 2))
    assert torch.equal(torch2ebm.convert(net)(x), net[1](waiting.layer(x).tanh()))  # torch is as it was


def test_a_compiled_program_runs_while_another_thread_captures_a_model() -> None:
    x, waiting = torch.rand(3), Waiting()
    program, _ = record_program(lambda: x.exp() + x, [x])
    program.compile()
    program([x])

    def run() -> Tensor:
        waiting.is_watched.wait(10)
        found: Tensor = program([x])
        waiting.other.set()
        return found

    def convert() -> None:
        torch2ebm.convert(nn.Sequential(waiting, nn.Linear(3, 2)), example_inputs=torch.rand(3))

    _, found = in_threads([convert, run])
    assert torch.allclose(found, x.exp() + x)


@pytest.mark.slow
def test_threads_compile_models_of_their_own() -> None:
    """Each converts, records and compiles while the others do, too."""

    def training(make: Make, **settings: Any) -> list[dict[str, Tensor]]:
        net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 4)).double()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).sin().view_as(parameter))
        return trained(net, make(**settings))[0]

    expected = [training(make) for _, make in LONG]
    found = in_threads([partial(training, make, compile=True) for _, make in LONG])
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_no_warning_where_nothing_is_asked_for() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(network(), torch2ebm.PredictiveCoding(4, 0.05), steps=1)
