"""The line of a long relaxation: when it is written, on a clock and a stream of the test's own, and what it costs."""

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import attached
from torch import nn

import torch2ebm
from torch2ebm.errors import ConfigurationError
from torch2ebm.inference import relaxation
from torch2ebm.monitor import Progress, Several

X, Y = torch.linspace(-1, 1, 24).reshape(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(number: int, **more: Any) -> torch2ebm.InferenceStep:
    return torch2ebm.InferenceStep(number, 1.0, {}, {}, 12.5, {}, 12.5, **more)


def run(progress: Progress, clock: Clock, seconds: list[float], residual: float = 0.25) -> list[int]:
    """A relaxation whose steps end at these times after its first; which of them were shown."""
    shown, begun = [], clock.now
    for number, time in enumerate(seconds, 1):
        clock.now = begun + time
        if progress.wants(number, number == len(seconds)):
            progress(step(number, residual=residual))
            shown.append(number)
    return shown


def test_a_short_relaxation_writes_nothing() -> None:
    clock, out = Clock(), Terminal()
    assert run(Progress(after=2.0, stream=out, clock=clock), clock, [0, 0.5, 1.0, 1.9]) == []
    assert out.getvalue() == ""


def test_a_long_one_writes_a_line_in_place_not_too_often_and_takes_it_away() -> None:
    clock, out = Clock(), Terminal()
    progress = Progress(after=2.0, every=0.5, stream=out, clock=clock)
    assert run(progress, clock, [0, 1.0, 2.0, 2.4, 2.5, 75.0, 76.0]) == [3, 5, 6]
    lines = out.getvalue().split("\r")
    assert lines[1:4] == [
        f"step {n}, energy 12.5, residual 2.50e-01, {t}" for n, t in ((3, "0:02"), (5, "0:02"), (6, "1:15"))
    ]
    assert lines[4:] == [" " * len(lines[3]), ""] and "\n" not in out.getvalue()


def test_a_shorter_line_covers_a_longer_one_and_what_was_not_measured_is_left_out() -> None:
    clock, out = Clock(), Terminal()
    progress = Progress(after=0.0, every=0.0, stream=out, clock=clock)
    progress.wants(1, False)
    progress(step(1000, residual=0.5))
    progress(step(1))
    first, second = out.getvalue().split("\r")[1:]
    assert second.rstrip() == "step 1, energy 12.5, 0:00" and len(second) == len(first)


def test_each_relaxation_has_its_own_time_and_one_that_was_broken_off_leaves_no_line() -> None:
    clock, out = Clock(), Terminal()
    progress = Progress(after=2.0, stream=out, clock=clock)
    run(progress, clock, [0, 5.0])
    assert out.getvalue() == ""
    progress.wants(1, False)
    clock.now += 3
    assert progress.wants(2, False)
    progress(step(2))
    begins = len(out.getvalue())
    assert not progress.wants(1, False)  # the next one
    assert set(out.getvalue()[begins:]) == {"\r", " "}


def test_what_is_no_terminal_gets_a_line_a_minute() -> None:
    clock, out = Clock(), io.StringIO()
    progress = Progress(after=2.0, stream=out, clock=clock)
    assert run(progress, clock, [0, 3.0, 59.0, 61.0, 100.0, 125.0, 126.0]) == [4, 6]
    assert out.getvalue().splitlines() == [
        f"step {n}, energy 12.5, residual 2.50e-01, {t}" for n, t in ((4, "1:01"), (6, "2:05"))
    ]
    assert "\r" not in out.getvalue()


def test_a_line_is_no_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    clock, out = Clock(), Terminal()
    run(Progress(after=0.0, stream=out, clock=clock), clock, [0, 1.0, 2.0])
    assert max(map(len, out.getvalue().split("\r"))) == 19


@pytest.mark.parametrize("settings", [{"after": -1.0}, {"every": float("nan")}, {"after": "2"}])
def test_illegal_seconds_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"Progress\((after|every)=...\)"):
        Progress(**settings)


# in a relaxation


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that were evaluated to be shown."""
    seen: list[int] = []
    plain = relaxation.step_of

    def counted(inference: Any, steps: int, *more: Any, **named: Any) -> Any:
        seen.append(steps)
        return plain(inference, steps, *more, **named)

    monkeypatch.setattr(relaxation, "step_of", counted)
    return seen


def test_steps_that_are_not_shown_are_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out, seen = Clock(), Terminal(), evaluations(monkeypatch)

    def tick() -> float:
        clock.now += 1.0  # each look
        return clock.now

    progress = Progress(after=10.0, every=5.0, stream=out, clock=tick)
    model = attached(net(), torch2ebm.PredictiveCoding(steps=30, lr=0.1, on_step=progress))
    F.cross_entropy(model(X), Y).backward()
    assert 1 < len(seen) < 8 and seen[0] > 8
    assert f"step {seen[-1]}, energy {model.state.relaxation.energy[seen[-1]]:.6g}" in out.getvalue()
    quiet = attached(net(), torch2ebm.PredictiveCoding(steps=30, lr=0.1, on_step=Progress(stream=out, clock=Clock())))
    del seen[:]
    F.cross_entropy(quiet(X), Y).backward()
    assert seen == []
    plain = attached(net(), torch2ebm.PredictiveCoding(steps=30, lr=0.1))
    F.cross_entropy(plain(X), Y).backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, model.get_parameter(name).grad)


def test_a_step_knows_its_residual_and_whether_it_is_the_last() -> None:
    seen: list[torch2ebm.InferenceStep] = []
    solver = torch2ebm.GradientDescent(steps=500, lr=0.3, tol=1e-3)
    model = attached(net(), torch2ebm.PredictiveCoding(solver=solver, on_step=seen.append))
    F.cross_entropy(model(X), Y).backward()
    found = model.state.relaxation
    assert found.converged and 1 < len(seen) == found.steps < 500
    assert [each.last for each in seen] == [False] * (found.steps - 1) + [True]
    assert seen[-1].residual == found.residual <= 1e-3 and all(each.residual > 1e-3 for each in seen[:-1])


@pytest.mark.parametrize("compile", [False, True])
def test_infer_shows_the_steps_of_what_is_free(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch2ebm.programs.program.Program, "compile", lambda self: None)
    model, seen = torch2ebm.convert(net(), example_inputs=X), []
    solver = torch2ebm.GradientDescent(steps=7, lr=0.1)
    given = {"output": torch.eye(3).double()[Y], "0": torch.zeros(6, 5).double()}
    found = model.infer(X, clamp=given, solver=solver, on_step=seen.append, compile=compile)
    assert [each.step for each in seen] == list(range(1, 8)) and seen[-1].last
    assert [each.energy for each in seen] == pytest.approx(list(found.relaxation.energy[1:]), rel=1e-12)
    assert set(seen[-1].value) == {"2"}
    torch.testing.assert_close(seen[-1].value["2"], found.value["2"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[-1].error["2"], found.error["2"], rtol=1e-12, atol=1e-12)
    own = 0.5 * found.error["2"].square().sum()
    assert seen[-1].node_energy == {"2": pytest.approx(float(own), rel=1e-12)}
    assert seen[-1].loss == pytest.approx(seen[-1].energy - float(own), rel=1e-12)


def test_a_sampler_shows_its_steps_and_draws_the_same() -> None:
    model, seen = torch2ebm.convert(net(), example_inputs=X), []

    def drawn(**more: Any) -> torch.Tensor:
        noise = torch.Generator().manual_seed(3)
        sampler = torch2ebm.Langevin(temperature=0.5, steps=6, burn_in=1, lr=0.01, generator=noise)
        return model.infer(X, clamp={"output": torch.zeros(6, 3).double()}, solver=sampler, **more).value["0"]

    assert torch.equal(drawn(on_step=seen.append), drawn())
    assert [each.step for each in seen] == [1, 2, 3, 4, 5, 6] and [each.last for each in seen] == [False] * 5 + [True]


def test_a_line_is_no_monitor() -> None:
    model = torch2ebm.convert(net())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    algorithm = torch2ebm.PredictiveCoding()
    with pytest.raises(torch2ebm.errors.AttachmentError, match=r"PredictiveCoding\(on_step=Progress\(\)\)"):
        torch2ebm.EnergyOptimizer(sgd, model, algorithm, monitor=Progress())
    with pytest.raises(ConfigurationError, match=r"Several"):
        Several(print, Progress())


def test_what_is_no_function_is_refused_before_anything_moves() -> None:
    with pytest.raises(ConfigurationError, match=r"model.infer\(on_step=...\)"):
        torch2ebm.convert(net(), example_inputs=X).infer(X, on_step=3)
