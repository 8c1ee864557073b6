"""The line of a long relaxation: when it is written, on a clock and a stream of the test's own, and what it costs."""

import io
from collections.abc import Callable
from pathlib import Path
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


class Writer:
    def write(self, text: str) -> None: ...


def closed_stream() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize(
    "settings",
    [
        *(
            {name: wrong}
            for name in ("after", "every")
            for wrong in (-1.0, float("nan"), float("inf"), "2", True, None)
        ),
        *({"stream": wrong} for wrong in ("x", 3, Writer(), closed_stream(), io.StringIO, io.BytesIO(), True)),
        *({"clock": wrong} for wrong in (5, None, Clock)),
    ],
)
def test_illegal_settings_are_refused_at_once(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ConfigurationError, match=rf"Progress\({name}=...\).*got .*; expected"):
        Progress(**settings)


def test_a_stream_for_reading_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with (tmp_path / "a.txt").open() as stream, pytest.raises(ConfigurationError, match=r"reading alone"):
        Progress(stream=stream)


class Plain:
    """Takes text, and cannot say whether it is a terminal."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, text: str) -> None:
        self.lines.append(text)

    def flush(self) -> None: ...


def test_a_stream_that_does_not_say_is_no_terminal() -> None:
    clock, out = Clock(), Plain()
    progress = Progress(after=2.0, stream=out, clock=clock)  # type: ignore[arg-type]
    assert run(progress, clock, [0, 3.0, 61.0, 62.0]) == [3]
    assert out.lines == ["step 3, energy 12.5, residual 2.50e-01, 1:01\n"]


class Gone(Terminal):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("kind", [Terminal, Gone])
def test_a_terminal_that_goes_does_not_end_a_relaxation(kind: type[Terminal]) -> None:
    clock, out = Clock(), kind()
    progress = Progress(after=1.0, every=0.0, stream=out, clock=clock)
    progress.wants(1, False)
    progress(step(1))
    if kind is Terminal:
        out.close()
    run(progress, clock, [0, 100.0, 200.0])
    progress.closed()


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


# how relaxations end


class Ends:
    """Looks on, breaks off a step, and is told of ends."""

    def __init__(self, at: int, error: BaseException | None) -> None:
        self.at, self.error, self.ends = at, error, 0
        self.steps: list[int] = []

    def __call__(self, step: torch2ebm.InferenceStep) -> None:
        self.steps.append(step.step)
        if step.step == self.at and self.error is not None:
            raise self.error

    def closed(self) -> None:
        self.ends += 1


def trained(on_step: Any, **settings: Any) -> None:
    model = attached(net(), torch2ebm.PredictiveCoding(steps=5, lr=0.1, on_step=on_step, **settings))
    F.cross_entropy(model(X), Y).backward()


def inferred(on_step: Any) -> None:
    torch2ebm.convert(net(), example_inputs=X).infer(
        X,
        clamp={"output": torch.zeros(6, 3).double()},
        solver=torch2ebm.GradientDescent(steps=5, lr=0.1),
        on_step=on_step,
    )


def drawn(on_step: Any) -> None:
    sampler = torch2ebm.Langevin(steps=5, burn_in=0, lr=0.01, generator=torch.Generator().manual_seed(0))
    torch2ebm.convert(net(), example_inputs=X).infer(
        X, clamp={"output": torch.zeros(6, 3).double()}, solver=sampler, on_step=on_step
    )


each_loop = pytest.mark.parametrize("loop", [trained, inferred, drawn])


@each_loop
@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), RuntimeError("mine")], ids=repr)
def test_who_looks_on_is_told_once_that_a_relaxation_has_ended(
    loop: Callable[[Any], None], error: BaseException | None
) -> None:
    ends = Ends(3, error)
    if error is None:
        loop(ends)
    else:
        with pytest.raises(type(error)):
            loop(ends)
    assert ends.steps == list(range(1, 6 if error is None else 4)) and ends.ends == 1


def test_each_phase_has_an_end() -> None:
    ends = Ends(0, None)
    trained(ends, nudging=torch2ebm.Symmetric(0.1))
    assert ends.steps == [*range(1, 6)] * 2 and ends.ends == 2


@each_loop
def test_ctrl_c_leaves_no_line(loop: Callable[[Any], None]) -> None:
    out, clock = Terminal(), Clock()

    class Interrupted(Progress):
        def __call__(self, step: torch2ebm.InferenceStep, /) -> None:
            super().__call__(step)
            if step.step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop(Interrupted(after=0.0, every=0.0, stream=out, clock=clock))
    *_, line, blank, end = out.getvalue().split("\r")
    assert line.startswith("step 3") and blank == " " * len(line) and end == ""


def test_attributes_that_are_no_methods_are_not_called() -> None:
    class Numbers(Ends):
        wants, closed = 3, True  # type: ignore[assignment]

    looks = Numbers(0, None)
    trained(looks)
    assert looks.steps == [1, 2, 3, 4, 5]


@each_loop
@pytest.mark.parametrize("wrong", [Progress, list, 3, "print", lambda: None, lambda step, more: None])
def test_what_no_step_can_be_shown_to_is_refused(loop: Callable[[Any], None], wrong: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"(PredictiveCoding|model.infer)\(on_step=...\): got .*expected a fun"
    ):
        loop(wrong)


def test_a_class_is_told_its_parentheses() -> None:
    with pytest.raises(ConfigurationError, match=r"the class Progress.*Progress\(\)"):
        trained(Progress)
    trained(lambda *steps: None)  # takes one as well
