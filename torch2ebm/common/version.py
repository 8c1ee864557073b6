"""The version of the package. Its one home is ``setup.cfg``."""

from __future__ import annotations

from configparser import ConfigParser
from functools import cache
from importlib import metadata
from pathlib import Path

NAME = "torch2ebm"
SOURCES = Path(__file__).parents[2] / "setup.cfg"  # beside the package in a source tree, absent where it is installed


@cache
def version() -> str:
    """The version that is imported, for example ``"0.2.0"``; ``"0+unknown"`` for a bare copy of the folder."""
    # a source tree first: what an editable installation has noted is the version of the day of its installation
    found = _of_sources(SOURCES)
    if found is not None:
        return found
    try:
        return metadata.version(NAME)
    except metadata.PackageNotFoundError:
        return "0+unknown"


def _of_sources(path: Path) -> str | None:
    """What this ``setup.cfg`` says; None where there is none, or one of another project."""
    settings = ConfigParser(interpolation=None)
    settings.read(path, encoding="utf-8")  # an absent file reads as an empty one
    if settings.get("metadata", "name", fallback=None) != NAME:
        return None
    return settings.get("metadata", "version")
