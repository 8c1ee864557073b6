"""One thing to know of a module, or of a module with a batch, and what you can do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING

from torch2ebm.common.text import data_frame

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Finding:
    """One thing to know of a module.

    Attributes:
        kind: What :func:`torch2ebm.check` finds: ``"opaque"``, ``"no gradient"``, ``"random"``,
            ``"batch statistics"``, ``"value"``, ``"branches"``, ``"one node"``, ``"held"``, ``"batch"`` or
            ``"warning"``. :func:`torch2ebm.diagnose` has kinds of its own; see :class:`Diagnosis`.
        place: The submodule, parameter, node or line of code that it is about.
        text: What was found.
        remedy: What you can do, and what follows if you do nothing.
    """

    kind: str
    place: str
    text: str
    remedy: str

    def __str__(self) -> str:
        return " ".join(part for part in (f"[{self.kind}] {self.place}: {self.text}", self.remedy) if part)


def findings_frame(findings: Iterable[Finding]) -> DataFrame:
    """One row a finding. Raises :class:`ConfigurationError` if pandas is not installed."""
    return data_frame([each.name for each in fields(Finding)], map(astuple, findings))
