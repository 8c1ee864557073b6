"""The free values of a linear Gaussian network, given the clamped ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torch2ebm.errors import ConfigurationError


@dataclass(frozen=True, eq=False)
class Posterior:
    """The free values of a linear Gaussian network, given the clamped ones.

    Attributes:
        mean: Node name to value where F is smallest, clamped entries included, shape ``[batch, features]``.
        error: Node name to value minus prediction there, in this shape; of an input with a prior minus its mean.
        energy: F there, the smallest there is, of each sample, shape ``[batch]``.
        free: Node name to which of its entries are free, shape ``[features]``.
        hessian: Second derivative of F in the free entries, node after node, shape ``[free, free]``. It is the
            posterior's precision, and the same for every sample.

    Example:
        >>> import torch
        >>> from torch2ebm import theory
        >>> net = theory.LinearGaussian([torch.eye(2), torch.eye(2)])
        >>> found = net.posterior({"input": torch.zeros(1, 2), "1": torch.ones(1, 2)})
        >>> found.mean["0"], found.energy  # half-way: two errors of 1/2 in two features
        (tensor([[0.5000, 0.5000]], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
        >>> found.condition_number
        1.0
    """

    mean: Mapping[str, Tensor]
    error: Mapping[str, Tensor]
    energy: Tensor
    free: Mapping[str, Tensor]
    hessian: Tensor

    @cached_property
    def covariance(self) -> Tensor:
        """Of the free entries, in the order of :attr:`hessian`, shape ``[free, free]``."""
        found: Tensor = torch.linalg.inv(self.hessian)
        return found

    @cached_property
    def spectrum(self) -> Tensor:
        """Eigenvalues of :attr:`hessian`, ascending, shape ``[free]``."""
        found: Tensor = torch.linalg.eigvalsh(self.hessian)
        return found

    @property
    def condition_number(self) -> float:
        """The largest eigenvalue of :attr:`hessian` over its smallest; 1 where nothing is free."""
        return float(self.spectrum[-1] / self.spectrum[0]) if len(self.spectrum) else 1.0

    def covariance_of(self, node: str, other: str | None = None) -> Tensor:
        """The block of the covariance that belongs to a node, or to two.

        Args:
            node: Whose entries are the rows.
            other: Whose entries are the columns; the same node without it.

        Returns:
            Shape ``[features, features of the other]``; a clamped entry has zeros.

        Raises:
            ConfigurationError: for a name that no node has.
        """
        rows, columns = self._entries(node), self._entries(other or node)
        free = torch.cat(list(self.free.values()))
        whole = self.hessian.new_zeros(len(free), len(free))
        whole[free.nonzero(), free.nonzero()[:, 0]] = self.covariance
        return whole[rows, columns]

    def _entries(self, node: str) -> slice:
        check_known("posterior.covariance_of", [node], self.free)
        return slices({name: len(mask) for name, mask in self.free.items()})[node]


def slices(sizes: Mapping[str, int]) -> dict[str, slice]:
    found, start = {}, 0
    for name, size in sizes.items():
        found[name], start = slice(start, start + size), start + size
    return found


def check_known(
    where: str, names: Mapping[str, object] | Sequence[str], known: Mapping[str, object] | Sequence[str]
) -> None:
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ConfigurationError(
            where, ", ".join(map(repr, wrong)), f"names among {', '.join(known)}", "Look at .sizes."
        )
