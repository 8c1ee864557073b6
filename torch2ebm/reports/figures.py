"""Packages that only pictures and tutorials need, imported when they are used."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final

from torch2ebm.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Okabe and Ito's colours, which people with any colour vision can tell apart
PALETTE: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "*")
MOST_PIXELS: Final = 60_000  # Agg refuses 2 ** 16 a side


def require(module: str, extra: str) -> ModuleType:
    """The imported module. Raises :class:`ConfigurationError` that names the extra to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"import {module}", str(error), "an optional package of torch2ebm", f"Run pip install torch2ebm[{extra}]."
        ) from error


def new_figure(width: float, height: float) -> Figure:
    """A figure of that many inches that no global registry knows of."""
    figure: Figure = require("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")
    return figure


def save(figure: Figure, path: str) -> None:
    """Write the file. Raises :class:`ConfigurationError` for a suffix that is no format of matplotlib."""
    formats, suffix = figure.canvas.get_supported_filetypes(), Path(path).suffix[1:].lower()
    if suffix not in formats:
        raise ConfigurationError("path", repr(path), f"a file ending in one of {', '.join(formats)}", "Try .png.")
    figure.savefig(path, dpi=min(150.0, MOST_PIXELS / max(figure.get_size_inches())))
