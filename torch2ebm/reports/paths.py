"""The paths of files that people want pictures and pages written to."""

from __future__ import annotations

import os
from pathlib import Path

from torch2ebm.errors import ConfigurationError


def file_of(where: str, path: object, example: str = "run.svg") -> Path:
    """The file that a path names; nothing is written yet, and no folder is made.

    Args:
        where: The function that was given it, for the error.
        path: What was given.
        example: The name of such a file, for the error.

    Raises:
        ConfigurationError: for what is no path, for a folder, or for a file in a folder that does not exist.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    folder = os.path.dirname(text) if isinstance(text, str) else ""
    remedy = f"For example {example!r}."
    if not isinstance(text, str) or not text:
        fault = ""
    elif "\0" in text:
        fault = ", which holds a null character"
    elif os.path.isdir(text):
        fault = ", which is a folder"
    elif folder and not os.path.isdir(folder):
        fault, remedy = ", which is in no folder that exists", f"Make it: Path({folder!r}).mkdir(parents=True)."
    else:
        return Path(text)
    raise ConfigurationError(
        f"{where}(path=...)", f"{path!r:.200}{fault}", "the path of a file in a folder that exists, or None", remedy
    )
