"""What an inference with given and free values has found: one frozen result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch2ebm.common.known_names import KnownNames
from torch2ebm.common.text import MOST_ROWS, data_frame, html_table, short_table
from torch2ebm.engine.results import Relaxation
from torch2ebm.errors import BatchDimensionError

if TYPE_CHECKING:
    from pandas import DataFrame

_HEADER = ("node", "value", "given", "|error|", "energy")


@dataclass(frozen=True, eq=False)
class Found:
    """One value of one node.

    Attributes:
        value: Where it has come to rest, or what was given.
        prediction: What the node makes of the values of its parents.
        error: Value minus prediction; zero for an output that was free.
        energy: phi of each sample, shape ``[batch]``; None for a value without a batch dimension.
        given: ``"given"``, ``"in part"``, ``"tied"``, ``"free"``, or ``"predicted"`` for an output without a value.
    """

    value: Tensor
    prediction: Tensor
    error: Tensor
    energy: Tensor | None
    given: str


@dataclass(frozen=True, eq=False, repr=False)
class Inferred:
    """What :meth:`EnergyModel.infer` has found. No tensor has a ``grad_fn``.

    Attributes:
        value: By the name of a node, and of an input: its value, in its shape. A node of several values has a tuple.
        prediction: What each node makes of the values of its parents. That of a free input is its prior's mean.
        error: Value minus prediction.
        input: The value of the input; a dict by argument where there are several.
        output: What the model returns, with the values found in it: given ones where they were clamped.
        relaxation: How the relaxation went; ``relaxation.converged`` says whether it has come to rest.
        samples: By the name of a free node or input: its draws, shape ``[draws, chains, *value]``. Empty where nothing
            was sampled.

    Example:
        >>> import torch, torch2ebm
        >>> decoder = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))
        >>> model = torch2ebm.convert(decoder, example_inputs=torch.zeros(5, 2))
        >>> image = torch.randn(5, 6)
        >>> found = model.infer(clamp={"output": image}, free=["input"], prior={"input": torch2ebm.Gaussian()})
        >>> found.input.shape, found.energy.shape, found.relaxation.converged
        (torch.Size([5, 2]), torch.Size([5]), True)
    """

    value: Mapping[str, Any]
    prediction: Mapping[str, Any]
    error: Mapping[str, Any]
    input: Any
    output: Any
    relaxation: Relaxation
    samples: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, tuple[Found, ...]] = field(default_factory=dict)

    @cached_property
    def node_energy(self) -> Mapping[str, Tensor]:
        """Energy of each node and sample, shape ``[batch]``.

        Raises:
            BatchDimensionError: where a value has no batch dimension.
        """
        return KnownNames({name: self._energy(name, parts) for name, parts in self.parts.items()})

    @property
    def energy(self) -> Tensor:
        """F of each sample, shape ``[batch]``: the sum of the energies of all nodes.

        Raises:
            BatchDimensionError: where a value has no batch dimension; ``relaxation.energy[-1]`` is F of the batch.
        """
        return torch.stack(list(self.node_energy.values())).sum(0)

    def _energy(self, name: str, parts: tuple[Found, ...]) -> Tensor:
        found = [part.energy for part in parts]
        if any(energy is None for energy in found):
            raise BatchDimensionError(
                f"model.infer(...).energy, node '{name}'",
                f"a value of shape {[tuple(part.value.shape) for part in parts]}",
                "one energy for each sample",
                "Take relaxation.energy[-1], which is that of the batch.",
            )
        return torch.stack([energy for energy in found if energy is not None]).sum(0)

    def __repr__(self) -> str:
        names = list(self.parts)
        return short_table(self._title(), _HEADER, [self._row(name) for name in names[:MOST_ROWS]], total=len(names))

    def _repr_html_(self) -> str:
        return html_table(self._title(), _HEADER, [self._row(name) for name in self.parts])

    def _title(self) -> str:
        return f"Inferred: {self.relaxation!r}"

    def to_dataframe(self) -> DataFrame:
        """A table, one row a node or input: ``node``, ``shape``, ``given``, ``error`` and ``energy``.

        ``error`` is the norm over all entries, ``energy`` the sum over samples, NaN where it is not per sample.
        ``relaxation.to_dataframe()`` has the energies of every step.

        Raises:
            ConfigurationError: if pandas is not installed (``pip install torch2ebm[pandas]``).
        """
        return data_frame(("node", "shape", "given", "error", "energy"), map(self._measured, self.parts))

    def _measured(self, name: str) -> tuple[str, str, str, float, float]:
        parts = self.parts[name]
        error = float(sum(part.error.double().square().sum() for part in parts) ** 0.5)
        energies = [part.energy for part in parts if part.energy is not None]
        energy = float(sum(each.sum() for each in energies)) if len(energies) == len(parts) else math.nan
        shapes = " ".join(str(list(part.value.shape)) for part in parts)
        return name, shapes, ", ".join(dict.fromkeys(part.given for part in parts)), error, energy

    def _row(self, name: str) -> list[str]:
        *words, error, energy = self._measured(name)
        return [*map(str, words), f"{error:.4g}", f"{energy:.4g}" if self._is_of_samples(name) else "?"]

    def _is_of_samples(self, name: str) -> bool:
        return all(part.energy is not None for part in self.parts[name])
