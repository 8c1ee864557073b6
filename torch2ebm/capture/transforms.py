"""Transforms of ``torch.func`` and forward mode: inside of them tensors stand for others, and autograd is not alone."""

from __future__ import annotations

import sys
from types import CodeType, FrameType

import torch
from torch.autograd import forward_ad

_OF_TRANSFORMS = "_functorch"


def transforming() -> bool:
    """Whether a transform is under way, such as ``torch.func.grad``, or a level of forward mode."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def outside_of_transforms(outermost: CodeType) -> FrameType | None:
    """The frame that has called the outermost transform; of forward mode, which has none, the caller's own."""
    frame: FrameType | None = sys._getframe(1)
    found = frame
    while frame is not None and frame.f_code is not outermost:
        if _OF_TRANSFORMS in frame.f_code.co_filename:
            found = frame.f_back
        frame = frame.f_back
    return found
