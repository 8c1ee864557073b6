"""A precision that learns: positive whatever its parameters are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torch2ebm.errors import ConfigurationError
from torch2ebm.isolation.torch_modes import in_own_precision


class Precision(nn.Module):
    """The precision of a Gaussian energy, learned by your own optimizer (Friston 2005; Millidge et al. 2021).

    Hand it to a node, and its parameters to your optimizer, beside those of the net. Each ``loss.backward()`` then
    fills their ``.grad`` with the derivative of ``1/2 pi |e|^2 - 1/2 log pi``, per entry of the value, at the end of
    the relaxation. It is in the scale of all other gradients: that of your loss. The optimum is ``pi = n / sum |e|^2``.

    Take a nudging of a fixed strength with it, for example ``OneSided(1.0)``: the errors that it measures are as long
    as the nudge makes them. In the difference of two phases (``Symmetric``) the logarithm cancels.

    Args:
        features: Nothing for one number; a size, or a shape, for a number for each entry. It broadcasts against the
            node's value ``[batch, ...]`` from the last dimension on.
        full: A matrix over the last dimension, of ``features`` rows.
        start: The precision to begin with; a multiple of the identity where it is a matrix.

    Attributes:
        log: Logarithm of the precision, a parameter of shape ``features``; of a matrix that of the diagonal of its
            Cholesky factor.
        below: Of a matrix, its Cholesky factor's entries below the diagonal, ``[features, features]``; None otherwise.

    Raises:
        ConfigurationError: for a ``start`` that is not positive and finite, an illegal size, or a matrix without one.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model, precision = torch2ebm.convert(net), torch2ebm.Precision(8)
        >>> adam = torch.optim.Adam([*net.parameters(), *precision.parameters()], lr=0.01)
        >>> coding = torch2ebm.PredictiveCoding(
        ...     solver=torch2ebm.ErrorConjugateGradient(),
        ...     nudging=torch2ebm.OneSided(1.0),
        ...     precisions={"0": precision},
        ... )
        >>> optimizer = torch2ebm.EnergyOptimizer(adam, model, coding)
        >>> torch.nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
        >>> optimizer.step()
        >>> precision.log.grad.shape, bool((precision() > 1).all())  # small errors: the precision rises
        (torch.Size([8]), True)
    """

    below: nn.Parameter | None

    def __init__(self, features: int | Sequence[int] | None = None, *, full: bool = False, start: float = 1.0) -> None:
        super().__init__()
        shape = _shape(features, full)
        number = isinstance(start, (int, float)) and not isinstance(start, bool)
        if not (number and math.isfinite(start) and start > 0):
            raise ConfigurationError(
                "Precision(start=...)", repr(start), "a finite number above 0", "For example Precision(start=1.0)."
            )
        # of P = L L^T the diagonal of L is the root
        self.log = nn.Parameter(torch.full(shape, math.log(start) * (0.5 if full else 1.0)))
        self.below = nn.Parameter(torch.zeros(*shape, *shape)) if full else None

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix over the last dimension of the value."""
        return self.below is not None

    def forward(self) -> Tensor:
        """The precision: of shape ``features``, or a matrix ``[features, features]``."""
        if self.below is None:
            return self.log.exp()
        with in_own_precision(self.log):
            factor = self.factor()
            return factor @ factor.T

    def factor(self) -> Tensor:
        """Lower Cholesky factor L of the matrix P = L L^T, ``[features, features]``; of no matrix, the root."""
        if self.below is None:
            return (0.5 * self.log).exp()
        return self.below.tril(-1) + torch.diag(self.log.exp())

    def half_log_determinant(self, error: Tensor) -> Tensor:
        """Half the logarithm of the determinant, summed over all entries of an error ``[batch, ...]``."""
        if self.below is None:
            return 0.5 * self.log.to(error).expand_as(error).sum()
        return self.log.to(error).sum() * (error.numel() // len(self.log))

    def extra_repr(self) -> str:
        # no numbers: a setting that is written down is the same before and after training
        return f"{tuple(self.log.shape)}{', full=True' if self.is_matrix else ''}"


def _shape(features: int | Sequence[int] | None, full: bool) -> tuple[int, ...]:
    sizes = () if features is None else (features,) if isinstance(features, int) else tuple(features)
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    if not whole or (full and len(sizes) != 1):
        raise ConfigurationError(
            "Precision(features, full)",
            f"features={features!r}, full={full!r}",
            "one size for a matrix" if full else "a size, a shape, or nothing for one number",
            "For example Precision(8), or Precision(8, full=True).",
        )
    return sizes
