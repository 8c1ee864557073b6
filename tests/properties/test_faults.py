"""A step that is cut short has not been, or has been whole: interruptions and exhausted memory.

Run as a script, this file is the process that is interrupted, or that finds no memory.
"""

import contextlib
import copy
import gc
import linecache
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from algorithms_list import taken_by
from helpers import same
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

import torch2ebm
from torch2ebm.errors import NodeEvaluationError, OutOfMemoryError, Torch2EBMError
from torch2ebm.isolation.interrupts import Change, InterruptsDeferred, undone_by, within
from torch2ebm.isolation.torch_modes import Modes


@pytest.fixture(autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """Whoever starts the tests in the background hands on a SIGINT that is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


PACKAGE = Path(torch2ebm.__file__).parent.parts
POINTS = 40

ALGORITHMS = taken_by(__file__)
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
LABELS = torch.tensor([0, 1, 2, 0, 1])


class Counting(nn.Module):
    """A buffer that every evaluation writes, so that each has to be put back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x


class Training:
    """A net with buffers and dropout, two good steps done; a hook on a weight, which relaxation suspends.

    The first step is captured. The second is the first whose run is cut at the nodes, and is held against these.
    """

    def __init__(self, algorithm: torch2ebm.Algorithm, hidden: int = 8) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Dropout(0.2), nn.Linear(hidden, 3), Counting()
        )
        self.net.train(not algorithm.defines_output)  # in train mode batch norm has no equilibrium
        self.model = torch2ebm.convert(self.net)
        self.inner = torch.optim.Adam(self.net.parameters(), lr=0.01)
        self.optimizer = torch2ebm.EnergyOptimizer(self.inner, self.model, algorithm)
        self.x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
        self.net[0].weight.register_hook(lambda gradient: gradient * 1)
        self.step()
        self.step()
        self.optimizer.zero_grad()

    def backward(self) -> Tensor:
        loss = F.cross_entropy(self.model(self.x), LABELS)
        loss.backward()
        return loss

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def snapshot(self) -> dict[str, Any]:
        """Weights, buffers, gradients and the optimizer's state."""
        return {
            "net": copy.deepcopy(self.net.state_dict()),
            "grad": [None if p.grad is None else p.grad.clone() for p in self.net.parameters()],
            "optimizer": copy.deepcopy(self.inner.state_dict()),
        }


def assert_next_step_works(training: Training, algorithm: torch2ebm.Algorithm) -> None:
    """It is that of a twin that was never interrupted; the generators are no part of the promise."""
    twin = Training(algorithm)
    for each in (training, twin):
        torch.manual_seed(3)
        each.step()
    assert same(training.snapshot(), twin.snapshot())


# Where autograd enters a backward, before anything is done or guarded: as in the user's own lines after the forward, an
# interruption leaves buffers as the forward has moved them, which is what plain torch leaves.
ENTRY = {("backward.py", "backward"), ("open_forwards.py", "without_a_trace"), ("tape.py", "arrived")}

# Lines that only open or close a guard. A with is traced once more before its end runs, and raising there would leave
# it out; a signal cannot: CPython looks for one after calls and jumps back, which a guard covers.
GUARDS = ("with ", "try:")


class InterruptedAt:
    """Raises KeyboardInterrupt at the n-th line of torch2ebm's own that runs; counts them all with n = 0."""

    def __init__(self, line: int = 0) -> None:
        self.line, self.lines, self.where = line, 0, ""

    def __enter__(self) -> "InterruptedAt":
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self.before)

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if path.parts[: len(PACKAGE)] != PACKAGE or (path.name, frame.f_code.co_name) in ENTRY:
            return None
        if event == "line" and not linecache.getline(str(path), frame.f_lineno).strip().startswith(GUARDS):
            self.lines += 1
            if self.lines == self.line:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self.trace


class InterruptedInRecorderAt(InterruptedAt):
    """The same at the n-th line of what torch calls for each operation on a recorded tensor."""

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        return super().trace(frame, event, argument) if frame.f_code.co_name == "__torch_function__" else None


PUSHED_AND_POPPED = {
    torch.overrides.__file__,
    _python_dispatch.__file__,
    torch.autograd.grad_mode.__file__,
    contextlib.__file__,
}


class InterruptedInTorchAt(InterruptedAt):
    """The same at the n-th line, below torch2ebm's own, of what enters and leaves modes in torch and in contextlib."""

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename in PUSHED_AND_POPPED and event == "line" and below_ours(frame):
            self.lines += 1
            if self.lines == self.line:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self.trace


def below_ours(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith(str(Path(*PACKAGE))):
        frame = frame.f_back
    return frame is not None


def points(lines: int) -> list[int]:
    return sorted({*random.Random(0).sample(range(1, lines + 1), POINTS), lines - 1, lines})


@every_algorithm
def test_an_interruption_at_any_line_up_to_the_gradients_leaves_all_as_before(algorithm: torch2ebm.Algorithm) -> None:
    probe = Training(algorithm)
    with InterruptedAt() as counting:
        probe.backward()
    assert counting.lines > 5 * POINTS
    lines = points(counting.lines)
    training = Training(algorithm)
    before = training.snapshot()
    for line in lines:
        with pytest.raises(KeyboardInterrupt), InterruptedAt(line) as interrupted:
            training.backward()
        changed = [part for part, value in training.snapshot().items() if not same(value, before[part])]
        assert not changed, (interrupted.where, changed)
    assert_next_step_works(training, algorithm)


@pytest.mark.parametrize("name", ["PredictiveCoding", "RecurrentBackprop"])
def test_an_interruption_at_any_line_of_a_first_call_leaves_all_as_before(name: str) -> None:
    """Its run is recorded and captured, from nothing."""

    def first_call(training: Training) -> None:
        torch.manual_seed(0)  # a measurement takes as many products as these dropout masks ask for
        training.model.detach()
        training.optimizer = torch2ebm.EnergyOptimizer(training.inner, torch2ebm.convert(training.net), algorithm)
        training.model = training.optimizer.model
        training.backward()

    algorithm = ALGORITHMS[name]
    probe = Training(algorithm)
    with InterruptedAt() as counting:
        first_call(probe)
    training = Training(algorithm)
    before = training.snapshot()
    for line in points(counting.lines)[::2]:
        with pytest.raises(KeyboardInterrupt), InterruptedAt(line) as interrupted:
            first_call(training)
        changed = [part for part, value in training.snapshot().items() if not same(value, before[part])]
        assert not changed, (interrupted.where, changed)


def test_an_interruption_as_torch_enters_the_recorder_leaves_all_as_before() -> None:
    """At every line, with the compiler loaded, which is kept out there."""
    assert torch.compiler.disable(min)([1, 2]) == 1 and "torch._dynamo" in sys.modules
    training = Training(ALGORITHMS["PredictiveCoding"])
    with InterruptedInRecorderAt() as counting:
        training.backward()
    assert counting.lines >= 4
    training = Training(ALGORITHMS["PredictiveCoding"])
    before = training.snapshot()
    for line in range(1, counting.lines + 1):
        with pytest.raises(KeyboardInterrupt), InterruptedInRecorderAt(line) as interrupted:
            training.backward()
        changed = [part for part, value in training.snapshot().items() if not same(value, before[part])]
        assert not changed, (interrupted.where, changed)
    assert_next_step_works(training, ALGORITHMS["PredictiveCoding"])


@every_algorithm
def test_an_interruption_where_torch_pushes_or_pops_a_mode_leaves_no_mode_behind(
    algorithm: torch2ebm.Algorithm,
) -> None:
    """And all else as before; the modes that the user has entered stay."""
    training = Training(algorithm)
    with InterruptedInTorchAt() as counting:
        training.backward()
    assert counting.lines >= 20
    training = Training(algorithm)
    before = training.snapshot()
    with BaseTorchFunctionMode() as mode, torch.autocast("cpu", enabled=False):
        modes = Modes.now("cpu")
        assert modes.stacks.functions == (mode,)
        for line in sorted(random.Random(0).sample(range(1, counting.lines + 1), 20)):
            with pytest.raises(KeyboardInterrupt), InterruptedInTorchAt(line) as interrupted:
                training.backward()
            changed = [part for part, value in training.snapshot().items() if not same(value, before[part])]
            assert not changed and Modes.now("cpu") == modes, (interrupted.where, changed)
    assert_next_step_works(training, algorithm)


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_modes_are_put_back_whether_one_too_many_or_one_too_few_is_left() -> None:
    with BaseTorchFunctionMode() as function, Nothing() as dispatch, torch.autocast("cpu"):
        modes = Modes.now("cpu")
        assert (modes.stacks.functions, modes.stacks.dispatched) == ((function,), (dispatch,))
        BaseTorchFunctionMode().__enter__()
        Nothing().__enter__()
        torch.set_autocast_enabled("cpu", False)
        torch._C._set_grad_enabled(False)
        for _ in range(2):
            modes.restore()
            assert Modes.now("cpu") == modes
        torch._C._pop_torch_function_stack()
        torch._C._pop_torch_dispatch_stack(None)
        modes.restore()
        assert Modes.now("cpu") == modes
    assert Modes.now("cpu").stacks.functions == () and not torch.is_autocast_enabled("cpu")


def test_what_is_undone_when_an_interruption_comes_in_the_undoing() -> None:
    values, seen = [1, 1], []

    def undo() -> None:
        seen.append(list(values))
        values[0] = 1
        if len(seen) == 1:
            raise KeyboardInterrupt
        values[1] = 1

    changes = [Change(lambda: values.__setitem__(slice(None), [2, 2]), undo)]
    with pytest.raises(KeyboardInterrupt):
        within(changes, lambda: None)
    assert values == [1, 1] and seen[:2] == [[2, 2], [1, 2]]
    assert within(changes, lambda: list(values)) == [2, 2] and values == [1, 1]


class InterruptedAsItEnds(InterruptedAt):
    """Where contextlib's ``__exit__`` begins, before it has closed the generator."""

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if (frame.f_code.co_filename, frame.f_code.co_name) == (contextlib.__file__, "__exit__"):
            raise KeyboardInterrupt
        return self.trace


@pytest.mark.parametrize("guarded", [True, False])
def test_what_contextlib_has_left_open_is_closed_before_it_is_undone(guarded: bool) -> None:
    """The negative twin is undone by nobody, and late: with the traceback."""
    values = [1]

    @contextmanager
    def changed() -> Iterator[None]:
        values[0] = 2
        try:
            yield
        finally:
            values[0] = 3

    def cut_short() -> None:
        with InterruptedAsItEnds(), changed():
            pass

    with pytest.raises(KeyboardInterrupt) as caught:
        undone_by(lambda: values.__setitem__(0, 1), cut_short) if guarded else cut_short()
    assert values == ([1] if guarded else [2])
    caught.value.__traceback__ = None
    del caught
    gc.collect()
    assert values == ([1] if guarded else [3])


def test_an_interruption_in_a_change_is_undone_at_once_and_not_later() -> None:
    """A contextlib generator would be closed with the traceback, and undo what has come in between."""
    values = [1]

    def change() -> None:
        values[0] = 2
        raise KeyboardInterrupt

    try:
        with Change(change, lambda: values.__setitem__(0, 1)):
            pytest.fail("entered")
    except KeyboardInterrupt as error:
        kept, values[0] = error, 3
    del kept
    gc.collect()
    assert values == [3]


@every_algorithm
@pytest.mark.parametrize("seed", range(5))
def test_sigint_inside_the_wrapped_step_is_handled_after_it(algorithm: torch2ebm.Algorithm, seed: int) -> None:
    """A hook of the wrapped optimizer is where the signal arrives; the step ends, then it is raised."""
    training, twin = Training(algorithm), Training(algorithm)
    for each in (training, twin):
        torch.manual_seed(3)
        each.backward()
    training.inner.register_step_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        training.optimizer.step()
    assert signal.getsignal(signal.SIGINT) is handler
    twin.optimizer.step()
    assert same(training.snapshot()["net"], twin.snapshot()["net"])
    assert same(training.snapshot()["optimizer"], twin.snapshot()["optimizer"])


def test_naively_sigint_inside_the_wrapped_step_is_raised_in_it() -> None:
    """The negative twin: the bare optimizer has not stepped when the hook's signal is raised."""
    training = Training(ALGORITHMS["ZeroDivergence"])
    training.backward()
    before = training.snapshot()
    training.inner.register_step_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        training.inner.step()
    assert same(training.snapshot(), before)


@pytest.mark.parametrize("make", [torch.optim.LBFGS, torch.optim.SGD], ids=lambda make: make.__name__)
def test_a_closure_is_interrupted_at_once_and_the_step_undone(make: Callable[..., Any]) -> None:
    training = Training(ALGORITHMS["ZeroDivergence"])
    training.optimizer.detach()
    training.inner = make(training.net.parameters(), lr=0.1)
    training.optimizer = torch2ebm.EnergyOptimizer(training.inner, training.model, ALGORITHMS["ZeroDivergence"])
    calls: list[Tensor] = []

    def closure() -> Tensor:
        training.optimizer.zero_grad()
        if len(calls) == stop:
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the signal waited")
        calls.append(training.backward().detach())
        return calls[-1]

    stop = -1
    training.optimizer.step(closure)
    before = {name: part for name, part in training.snapshot().items() if name != "grad"}
    stop = len(calls) + (3 if make is torch.optim.LBFGS else 0)
    with pytest.raises(KeyboardInterrupt):
        training.optimizer.step(closure)
    assert len(calls) == stop
    after = training.snapshot()
    assert all(same(after[part], value) for part, value in before.items())
    stop = -1
    assert torch.isfinite(training.optimizer.step(closure))


def test_an_error_inside_a_deferred_section_keeps_the_handler_and_the_signal() -> None:
    handler, seen = signal.getsignal(signal.SIGINT), []
    signal.signal(signal.SIGINT, lambda *_: seen.append("outer"))
    try:
        mine = signal.getsignal(signal.SIGINT)
        with pytest.raises(ValueError, match=r"seen \[\]"), InterruptsDeferred():
            raise ValueError(f"seen {signal.raise_signal(signal.SIGINT) or seen}")
        assert seen == ["outer"] and signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("ignored", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_handler_that_is_not_pythons_is_left_alone(ignored: Any) -> None:
    handler = signal.signal(signal.SIGINT, ignored)
    try:
        with InterruptsDeferred():
            assert signal.getsignal(signal.SIGINT) == ignored
        assert signal.getsignal(signal.SIGINT) == ignored
    finally:
        signal.signal(signal.SIGINT, handler)


def test_in_another_thread_a_step_leaves_the_handler_alone() -> None:
    training = Training(ALGORITHMS["ZeroDivergence"])
    training.backward()
    before, seen = training.snapshot(), []
    training.inner.register_step_pre_hook(lambda *_: seen.append(signal.getsignal(signal.SIGINT)))
    thread = threading.Thread(target=training.optimizer.step)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)] and not same(training.snapshot()["net"], before["net"])


@every_algorithm
def test_a_signal_that_is_deferred_leaves_the_numbers_of_a_step_as_they_are(algorithm: torch2ebm.Algorithm) -> None:
    """To keep its frame would keep what forward has made there, as a hook does that uses it in the loss."""
    training, twin = Training(algorithm), Training(algorithm)
    handle = training.net[0].register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    for each in (twin, training):
        torch.manual_seed(3)
        with pytest.raises(KeyboardInterrupt) if each is training else nullcontext(), InterruptsDeferred():
            each.step()
    assert same(training.snapshot(), twin.snapshot())
    handle.remove()


# ---- signals from outside


class Interrupted:
    """In the process that gets the signals: steps until one comes, then says whether it came between two states."""

    def __init__(self, algorithm: str) -> None:
        self.training, self.twin = Training(ALGORITHMS[algorithm]), Training(ALGORITHMS[algorithm])
        self.steps = 0

    def step(self) -> None:
        self.training.step()

    def once(self) -> bool:
        """Twin and original take the same steps, the twin first; a signal is only let in while the original does."""
        with InterruptsDeferred() as section:
            print("ready", flush=True)  # not before: a signal would come outside of the section
            end = time.monotonic() + 60
            while time.monotonic() < end:
                self.steps += 1
                before = self.twin.snapshot()
                torch.manual_seed(self.steps)
                self.twin.step()
                torch.manual_seed(self.steps)
                try:
                    section.lifted_in(self.step)()
                except KeyboardInterrupt:
                    return self.verdict(before, self.twin.snapshot(), self.training.snapshot())
            raise TimeoutError("no signal, or one that Python has raised where it ignores exceptions")

    def verdict(self, before: dict[str, Any], after: dict[str, Any], found: dict[str, Any]) -> bool:
        """Weights and the optimizer's state both as before or both as after; buffers as before, as after where
        weights are, or as after where the signal came in a line of torch between forward and backward."""
        weights = [name for name, _ in self.training.net.named_parameters()]
        buffers = [name for name, _ in self.training.net.named_buffers()]

        def equal(names: list[str], state: dict[str, Any]) -> bool:
            return all(torch.equal(found["net"][name], state["net"][name]) for name in names)

        stepped = equal(weights, after) and same(found["optimizer"], after["optimizer"]) and equal(buffers, after)
        waiting = equal(weights, before) and same(found["optimizer"], before["optimizer"])
        whole = stepped or (waiting and (equal(buffers, before) or equal(buffers, after)))
        self.training.net.load_state_dict(after["net"])
        self.training.inner.load_state_dict(after["optimizer"])
        # a forward without a backward, which the next error would undo
        self.training.model.torch2ebm.forwards.histories.clear()
        return whole


def be_interrupted(algorithm: str, times: int) -> None:
    interrupted = Interrupted(algorithm)
    for _ in range(times):
        print("whole" if interrupted.once() else "broken", flush=True)
    interrupted.training.step()  # and the next one works
    assert same(interrupted.training.net.state_dict().keys(), interrupted.twin.net.state_dict().keys())


@pytest.mark.parametrize("algorithm", ["PredictiveCoding", "IncrementalPredictiveCoding"])
def test_twenty_signals_from_outside_find_no_step_half_done(algorithm: str) -> None:
    times, generator = 20, random.Random(0)
    with child("interrupted", algorithm, str(times)) as process:
        assert process.stdout is not None
        for _ in range(times):
            assert process.stdout.readline() == "ready\n"
            time.sleep(generator.uniform(0.005, 0.05))  # a few steps and a part of one; nothing depends on which
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "whole\n"
        assert process.wait(timeout=60) == 0


@contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """This file as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# ---- no memory


SAYS = ("memory", "smaller batch", "fewer inference steps", "coarser nodes", "nothing was changed")


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def no_cpu_memory(*_: Any, **__: Any) -> Any:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")


@every_algorithm
@pytest.mark.parametrize("fails", [no_memory, no_cpu_memory])
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_without_memory_the_message_says_what_to_do_and_nothing_has_changed(
    algorithm: torch2ebm.Algorithm, fails: Callable[..., Any], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(algorithm)
    before = training.snapshot()
    with monkeypatch.context() as patch:
        if part == "forward":
            patch.setattr(torch.nn.functional, "linear", fails)
            patch.setattr(torch._C._nn, "linear", fails)
            patch.setattr(torch2ebm.Node, "evaluate", _evaluated_with(fails))
        else:
            patch.setattr(type(algorithm), "backward", fails)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            training.backward()
    assert type(caught.value) is OutOfMemoryError and isinstance(caught.value, Torch2EBMError)
    message = str(caught.value)
    where = "model(...)" if part == "forward" else "loss.backward()"
    assert [words for words in (*SAYS, where, type(algorithm).__name__) if words not in message] == []
    assert same(training.snapshot(), before)
    assert_next_step_works(training, algorithm)


def _evaluated_with(fails: Callable[..., Any]) -> Callable[..., Any]:
    """A node whose function finds no memory, in the node's own handling of what its function raises."""
    real = torch2ebm.Node.evaluate
    return lambda node, arguments: real(replace(node, function=fails), arguments)


def test_a_later_step_without_memory_undoes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(ALGORITHMS["IncrementalPredictiveCoding"])
    torch.manual_seed(3)
    training.backward()
    before = training.snapshot()
    monkeypatch.setattr(torch2ebm.Node, "evaluate", _evaluated_with(no_memory))
    with pytest.raises(OutOfMemoryError, match=r"optimizer\.step\(\)"):
        training.optimizer.step()
    monkeypatch.undo()
    assert same(training.snapshot(), before)
    twin = Training(ALGORITHMS["IncrementalPredictiveCoding"])
    torch.manual_seed(3)
    twin.backward()  # its forward has moved the buffers, its step is given up
    for each in (training, twin):
        torch.manual_seed(4)
        each.step()
    assert same(training.snapshot(), twin.snapshot())


def test_batch_size_finders_and_pickle_know_the_error() -> None:
    """accelerate and Lightning look for the words in the one argument."""
    error = OutOfMemoryError("model(...)", "CUDA out of memory. Tried", "memory", "Take less.")
    assert len(error.args) == 1 and " out of memory" in error.args[0]
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.remedy == "Take less."


def test_another_error_of_an_operation_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(ALGORITHMS["ZeroDivergence"])
    with pytest.raises(NodeEvaluationError):
        training.model(torch.randn(5, 7))


def run_out_of_memory(algorithm: str) -> None:
    """In a process of its own: a limit on its address space, then a batch that does not fit in."""
    training = Training(ALGORITHMS[algorithm], hidden=64)
    before = training.snapshot()
    x = torch.randn(400_000, 4)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 250 * 2**20  # less than three values of 400,000 x 64
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        F.cross_entropy(training.model(x), torch.zeros(len(x), dtype=torch.long)).backward()
    except OutOfMemoryError as error:
        message = str(error)
    else:
        raise AssertionError("there was memory")
    assert same(training.snapshot(), before)
    assert [words for words in SAYS if words not in message] == [], message
    del x
    training.step()
    assert not same(training.snapshot()["net"], before["net"])
    print("survived", flush=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
@pytest.mark.parametrize("algorithm", ["PredictiveCoding", "ZeroDivergence"])
def test_a_process_that_runs_into_its_limit_survives(algorithm: str) -> None:
    with child("memory", algorithm) as process:
        output, _ = process.communicate(timeout=120)
    assert (process.returncode, output) == (0, "survived\n")


# ---- small batches, other types


@every_algorithm
def test_a_batch_of_one_without_batch_statistics_is_a_step(algorithm: torch2ebm.Algorithm) -> None:
    """The gradient of one sample is finite and, where the algorithm is exact, autograd's."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
    x, before = torch.randn(1, 4).double(), copy.deepcopy(net)
    F.cross_entropy(model(x), torch.tensor([1])).backward()
    F.cross_entropy(before(x), torch.tensor([1])).backward()
    torch.testing.assert_close(net[2].bias.grad, before[2].bias.grad, rtol=0.2, atol=0.0)  # the output moves least
    if isinstance(algorithm, torch2ebm.ZeroDivergence):
        for ours, exact in zip(net.parameters(), before.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, exact.grad, rtol=1e-12, atol=1e-15)
    optimizer.step()
    assert not torch.equal(net[2].bias, before[2].bias)


@every_algorithm
@pytest.mark.parametrize(
    "x",
    [torch.ones(5, 4).double(), torch.ones(5, 4).half(), torch.ones(5, 4).long(), torch.ones(5, 4, device="meta"),
     torch.ones(1, 4), torch.ones(0, 4), torch.ones(5, 3), torch.ones(4)],
    ids=["float64", "float16", "int64", "meta", "one sample for a batch norm", "no sample", "narrow", "no batch"],
)  # fmt: skip
def test_an_input_that_does_not_fit_is_a_typed_error_and_changes_nothing(
    algorithm: torch2ebm.Algorithm, x: Tensor
) -> None:
    training = Training(algorithm)
    before = training.snapshot()
    if algorithm.defines_output and x.shape == (1, 4):  # in evaluation mode one sample does fit
        assert training.model(x).shape == (1, 3)
        return
    with pytest.raises(Torch2EBMError):
        training.model(x)
    assert same(training.snapshot(), before)
    assert_next_step_works(training, algorithm)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child of a background job is born ignoring it
    torch.set_num_threads(1)
    {"interrupted": lambda a, n: be_interrupted(a, int(n)), "memory": run_out_of_memory}[sys.argv[1]](*sys.argv[2:])
