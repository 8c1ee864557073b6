"""The places in a user's forward that cannot be captured, all of them at once."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch2ebm.capture.real_run import run_once
from torch2ebm.capture.signature import PLAIN, PLAIN_OF_TORCH, Signature
from torch2ebm.common.nested import leaves_of
from torch2ebm.isolation.torch_modes import entered


@dataclass(frozen=True)
class Problem:
    """One place in the user's code that cannot be followed."""

    scope: str
    place: str
    line: str
    reason: str

    def __str__(self) -> str:
        return f"{self.scope or 'forward'} ({self.place}) `{self.line}`: {self.reason}"


HERE = str(Path(__file__).parents[1])  # the package, whose own frames are none of the user's
TORCH = str(Path(torch.__file__).parent)


def is_users(filename: str) -> bool:
    """Whether a file is neither torch's nor ours."""
    return not any(Path(filename).is_relative_to(directory) for directory in (HERE, TORCH))


def users_level() -> int:
    """The ``stacklevel`` with which a warning of the caller points to the user's line.

    A constant would not do: how many frames of torch's lie between depends on its version and on wrappers.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and not is_users(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    return level


def _receiver(frame: FrameType) -> Any:
    """What a method was called on, whatever its author calls ``self``."""
    return frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_argcount else None


def problem_of(module: nn.Module, error: BaseException) -> Problem:
    """The innermost place of the user's code on the way to ``error``, and the submodule that it belongs to."""
    # traceback frames run from the outermost in, so the last one that is the user's wins
    names = {id(each): name for name, each in module.named_modules()}
    scope, place, line = "", "unknown place", ""
    frames = list(traceback.walk_tb(error.__traceback__))
    for (frame, _), summary in zip(frames, traceback.extract_tb(error.__traceback__), strict=True):
        if is_users(summary.filename):
            place, line = f"{summary.filename}:{summary.lineno}", summary.line or ""
            scope = names.get(id(_receiver(frame)), scope)
    return Problem(scope, place, line, _reason(error))


def _reason(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # by name: the classes of export's symbolic shapes load sympy, and differ between versions
    if "DataDependent" in type(error).__name__ or "data-dependent" in first:
        return "needs the value of a tensor (a branch on it, an index, .item() or a size made of it)"
    if "numpy" in first:
        return f"leaves torch for numpy ({first})"
    return first


_NUMBER = "turns a tensor's value into a Python number"
# Keys as a TorchFunctionMode is given them. torch.equal and Tensor.equal are two functions; branches call __bool__.
NEED_A_VALUE: Mapping[Any, str] = {
    Tensor.__bool__: "branches on a tensor's value",
    torch.is_nonzero: "branches on a tensor's value",
    torch.equal: "branches on tensors' values (equal)",
    torch.allclose: "branches on tensors' values (allclose)",
    Tensor.equal: "branches on tensors' values (equal)",
    Tensor.allclose: "branches on tensors' values (allclose)",
    Tensor.__contains__: "branches on a tensor's value (in)",
    Tensor.item: "calls .item()",
    Tensor.tolist: "calls .tolist()",
    Tensor.numpy: "leaves torch for numpy",
    Tensor.__array__: "leaves torch for numpy",
    Tensor.__int__: _NUMBER,
    Tensor.__float__: _NUMBER,
    Tensor.__complex__: _NUMBER,
    Tensor.__index__: _NUMBER,
}


class _Watch(TorchFunctionMode):
    """Notes where a run needs a tensor's value in Python."""

    def __init__(self, module: nn.Module, whole: frozenset[str]) -> None:
        super().__init__()
        self.names = {id(each): name for name, each in module.named_modules()}
        self.whole = whole
        self.found: dict[tuple[str, str], Problem] = {}  # by scope and place

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in NEED_A_VALUE:
            self._note(NEED_A_VALUE[func])
        return func(*args, **(kwargs or {}))

    def _note(self, reason: str) -> None:
        # 2: past this method and __torch_function__, whose frames are the package's own and would end the walk
        frames = list(_frames_of_forward(sys._getframe(2)))
        users = [frame for frame in frames if is_users(frame.f_code.co_filename)]
        scopes = [self.names.get(id(_receiver(frame))) for frame in frames]
        if not users or not self.whole.isdisjoint(scopes) or _in_torchs_own_layer(frames):
            return
        # the innermost frame that runs a method of a submodule; helpers in between have no submodule
        scope = next((name for frame in users if (name := self.names.get(id(_receiver(frame)))) is not None), "")
        summary = traceback.extract_stack(users[0], limit=1)[0]
        problem = Problem(scope, f"{summary.filename}:{summary.lineno}", summary.line or "", reason)
        self.found.setdefault((scope, problem.place), problem)


def _frames_of_forward(frame: FrameType | None) -> Iterator[FrameType]:
    """From the innermost out to where this package called the module."""
    while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(HERE):
        yield frame
        frame = frame.f_back


def _in_torchs_own_layer(frames: Sequence[FrameType]) -> bool:
    """Whether the innermost code is a layer of ``torch.nn``. Tracing keeps it whole, so what it does is no problem."""
    for frame in frames:
        file = Path(frame.f_code.co_filename)
        if is_users(str(file)):
            return False
        # torch/nn/modules: module.py (Module.__call__) and container.py (Sequential) only pass calls on
        if file.parent.name == "modules" and file.name not in ("module.py", "container.py"):
            return True
    return False


def problems_in_a_run(
    module: nn.Module, signature: Signature, tensors: Sequence[Tensor], whole: frozenset[str] = frozenset()
) -> list[Problem]:
    """Every place that needs a tensor's value in Python, and outputs that hold no tensors, in the order of a real run.

    Of a branch only the side that ``tensors`` take is seen. What happens inside of ``whole`` submodules does not count.
    """
    watch = _Watch(module, whole)
    with entered(watch):
        reference = run_once(module, signature, tensors)
    allowed = (Tensor, *PLAIN, *PLAIN_OF_TORCH)
    odd = {type(leaf).__name__ for leaf in leaves_of(reference.outputs) if not isinstance(leaf, allowed)}
    return [*watch.found.values(), *(_odd_output(module, name) for name in sorted(odd))]


def _odd_output(module: nn.Module, name: str) -> Problem:
    file, (lines, number) = inspect.getsourcefile(type(module)), inspect.getsourcelines(type(module).forward)
    return Problem(
        "", f"{file}:{number}", lines[0].strip(), f"returns a {name}, which holds no tensors that can be seen"
    )
