"""Where in the user's code something happens."""

from __future__ import annotations

import functools
import sys
import traceback
from pathlib import Path

import torch

HERE = str(Path(__file__).parents[1])  # the package, whose own frames are none of the user's
TORCH = str(Path(torch.__file__).parent)


@functools.cache
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


def first_place(error: BaseException) -> str:
    """The innermost line of the user's code on the way to ``error``."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno} `{frames[-1].line}`" if frames else "an operation"
