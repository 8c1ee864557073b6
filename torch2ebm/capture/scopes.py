"""Where an operation is called from: the submodules whose code is on the stack, and the user's line."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from types import CodeType, FrameType

import torch
from torch import nn

from torch2ebm.common.users_code import is_users
from torch2ebm.isolation.forward_mode import entered_here


class Scopes:
    """The calls of submodules of one run.

    Args:
        modules: id of each submodule to its path.
        outermost: The code at which the walk up the stack ends.
    """

    def __init__(self, modules: Mapping[int, str], outermost: CodeType) -> None:
        self._modules, self._outermost = modules, outermost
        self._frames: list[FrameType] = []  # kept: an address may be used again
        self._labels: dict[int, str] = {}
        self._labelled: Counter[str] = Counter()

    def above(self, frame: FrameType | None) -> tuple[tuple[tuple[str, str], ...], str]:
        """A label and the path of each call that ``frame`` is inside of, outermost first, and the user's line."""
        found: list[tuple[str, FrameType]] = []
        place = ""
        while frame is not None and frame.f_code is not self._outermost:
            code = frame.f_code
            if not place and is_users(code.co_filename):
                place = f"{code.co_filename}:{frame.f_lineno}"
            receiver = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            if isinstance(receiver, nn.Module) and (path := self._modules.get(id(receiver))):
                if found and found[-1][0] == path:
                    found.pop()  # one call has several frames, and its outermost, __call__, stands for it
                found.append((path, frame))
            frame = frame.f_back
        return tuple([(self._label(path, frame), path) for path, frame in reversed(found)]), place

    def _label(self, path: str, frame: FrameType) -> str:
        """The path, with a number where it is called again."""
        label = self._labels.get(id(frame))
        if label is None:
            self._frames.append(frame)
            count = self._labelled[path]
            self._labelled[path] += 1
            label = self._labels[id(frame)] = f"{path}@{count}" if count else path
        return label

    def forget(self) -> None:
        """Let the frames go, and what their variables hold."""
        self._frames.clear()


# Transforms of torch.func and forward mode: inside of them tensors stand for others, and autograd is not alone.

_OF_TRANSFORMS = "_functorch"


def transforming() -> bool:
    """Whether a transform is under way, such as ``torch.func.grad``, or a level of forward mode."""
    return torch._C._functorch.peek_interpreter_stack() is not None or entered_here()


def outside_of_transforms(outermost: CodeType) -> FrameType | None:
    """The frame that has called the outermost transform; of forward mode, which has none, the caller's own."""
    frame: FrameType | None = sys._getframe(1)
    found = frame
    while frame is not None and frame.f_code is not outermost:
        if _OF_TRANSFORMS in frame.f_code.co_filename:
            found = frame.f_back
        frame = frame.f_back
    return found
