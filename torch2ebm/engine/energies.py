"""Energies of a node, one small class each: how far its value is from its prediction."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torch2ebm.common.setting_names import NamedSettings
from torch2ebm.engine.precision import Precision
from torch2ebm.errors import ConfigurationError
from torch2ebm.isolation.torch_modes import in_own_precision


def gaussian_energy(error: Tensor) -> Tensor:
    """Half the squared error of each sample, shape ``[batch]`` (Millidge et al. 2022)."""
    return 0.5 * error.square().flatten(1).sum(1) if error.ndim > 1 else 0.5 * error.square()


def gaussian_energy_of_batch(error: Tensor) -> Tensor:
    """Half the squared error summed over samples, shape ``[]``, in one pass over the data."""
    flat = error.reshape(-1)
    return 0.5 * flat.dot(flat)


class Energy(NamedSettings, ABC):
    """phi(value, prediction) of one node: zero, and smallest, where the value is the prediction.

    All three methods take the error (value minus prediction) beside the prediction: near the prediction a difference of
    values would lose it to rounding (Goemaere et al. 2025). Both have the shape of the node's value, for example
    ``[batch, features]``. Write a subclass as a frozen dataclass: ``compile=True`` compares its settings.

    A tensor among its settings that requires a gradient learns: ``loss.backward()`` fills its ``.grad``, and your
    optimizer moves it. So do the parameters of a module among them.

    Attributes:
        observed: Whether the value is data, for a node that is clamped to it: the energy is then a negative
            log-likelihood, which need not be zero or smallest anywhere. A free node takes none of these.
        entrywise: Whether it is a sum over entries of what each costs alone. Only then a part of a value can be given.
        has_kinks: Whether a derivative jumps where the value is the prediction, so that a value may rest on the jump.

    Example:
        Half the squared error, written out. The examples of the methods go on from it.

        >>> import torch
        >>> from torch2ebm.extend import Energy
        >>> class HalfSquares(Energy):
        ...     def of_samples(self, error, prediction):
        ...         return (0.5 * error**2).flatten(1).sum(1)
        ...     def of_batch(self, error, prediction):
        ...         return self.of_samples(error, prediction).sum()
        ...     def gradients(self, error, prediction):
        ...         return error, error
        >>> energy = HalfSquares()
        >>> error, prediction = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.zeros(2, 2)
    """

    @abstractmethod
    def of_samples(self, error: Tensor, prediction: Tensor) -> Tensor:
        """Energy of each sample: what ``model.state.energy`` shows.

        Args:
            error: Value minus prediction, shape ``[batch, ...]``.
            prediction: In the same shape.

        Returns:
            Shape ``[batch]``.

        Example:
            >>> energy.of_samples(error, prediction)
            tensor([2.5000, 4.5000])
        """

    @abstractmethod
    def of_batch(self, error: Tensor, prediction: Tensor) -> Tensor:
        """Energy summed over samples: what a relaxation's history shows, in every step.

        Args:
            error: Value minus prediction, of any shape.
            prediction: In the same shape.

        Returns:
            A tensor of no dimension.

        Example:
            >>> energy.of_batch(error, prediction)
            tensor(7.)
        """

    @abstractmethod
    def gradients(self, error: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """dphi/dvalue and -dphi/dprediction, of the energy summed over samples: what moves the values.

        ``EnergyOptimizer`` checks them against :meth:`of_batch` once, by differences at random values, and raises
        :class:`EnergyGradientError` where they do not agree. Nothing checks them while training. A test by
        ``torch.autograd.grad`` does: with the prediction at hand, ``error`` is ``value - prediction``.

        Args:
            error: Value minus prediction, of any shape.
            prediction: In the same shape.

        Returns:
            Both in the shape of the value. For a function of the error alone they are one and the same; return the same
            tensor twice then.

        Example:
            >>> own, back = energy.gradients(error, prediction)
            >>> value, mu = error.clone().requires_grad_(), prediction.clone().requires_grad_()
            >>> of_value, of_mu = torch.autograd.grad(energy.of_batch(value - mu, mu), [value, mu])
            >>> torch.allclose(own, of_value), torch.allclose(back, -of_mu)
            (True, True)
        """

    observed: bool = False
    has_kinks: ClassVar[bool] = False
    entrywise: ClassVar[bool] = False

    def of_parameters(self, error: Tensor, prediction: Tensor) -> Tensor:
        """What the energy's own parameters learn from: :meth:`of_batch`, with what is constant in the values.

        Args:
            error: Value minus prediction, at the end of a relaxation.
            prediction: In the same shape.

        Returns:
            A tensor of no dimension.

        Example:
            >>> energy.of_parameters(error, prediction)
            tensor(7.)
        """
        return self.of_batch(error, prediction)

    def precision_at_rest(self) -> float | Tensor:
        """The second derivative in the value where it is the prediction; 1 where that is no constant.

        A nudge is measured, and a solver's first step is taken, in units of it. Where errors come to rest does not
        depend on it.

        Returns:
            A number, or a tensor that broadcasts against the node's value.

        Example:
            >>> energy.precision_at_rest()
            1.0
        """
        return 1.0

    def check(self, where: str, prediction: Tensor | None = None) -> None:
        """Raise a :class:`ConfigurationError` for what is no energy; called at attach, and in a graph's first forward.

        Args:
            where: What the message names, for example ``"the energy of node '0'"``.
            prediction: The node's, in a forward; None at attach.

        Example:
            >>> energy.check("the energy of node '0'")
        """
        return None


@dataclass(frozen=True, eq=False)
class Gaussian(Energy):
    """``precision / 2 * |value - prediction|^2``: what a node has unless another energy is given.

    A precision that requires a gradient learns: a :class:`Precision`, which stays positive, or a parameter of yours.
    Its gradient is that of ``1/2 pi |e|^2 - 1/2 log pi``. The energy that is shown is without the logarithm, which
    moves no value.

    Args:
        precision: Inverse variance pi, a number or a tensor that broadcasts against the node's value; or a
            :class:`Precision`, which may be a full matrix.

    Raises:
        ConfigurationError: for a precision that is not positive and finite everywhere, also once training has made it
            so, and for a tensor that was computed from others that require a gradient.

    Example:
        >>> import torch, torch2ebm
        >>> torch2ebm.Gaussian(precision=4.0).of_samples(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
        tensor([10.])
    """

    precision: float | Tensor | Precision = 1.0

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        """A full matrix joins entries."""
        return not self._is_matrix

    def __post_init__(self) -> None:
        check_precision("Gaussian(precision=...)", self.precision)

    def of_samples(self, error: Tensor, prediction: Tensor) -> Tensor:
        return gaussian_energy(self._rooted(error))

    def of_batch(self, error: Tensor, prediction: Tensor) -> Tensor:
        return gaussian_energy_of_batch(self._rooted(error))

    def gradients(self, error: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_matrix:
            with in_own_precision(error):
                turned = error @ self._like(error)
            return turned, turned
        weighted = error * self._like(error)
        return weighted, weighted

    def of_parameters(self, error: Tensor, prediction: Tensor) -> Tensor:
        energy = self.of_batch(error, prediction)
        if isinstance(self.precision, Precision):
            return energy - self.precision.half_log_determinant(error)
        if isinstance(self.precision, Tensor):
            logarithms: Tensor = self._like(error).log().expand_as(error)
            return energy - 0.5 * logarithms.sum()
        return energy

    def precision_at_rest(self) -> float | Tensor:
        """Of a matrix the diagonal."""
        number = precision_now(self.precision)
        return number.diagonal() if self._is_matrix and isinstance(number, Tensor) else number

    def check(self, where: str, prediction: Tensor | None = None) -> None:
        """That the precision fits the node's value."""
        number = precision_now(self.precision)
        if prediction is None or not isinstance(number, Tensor):
            return
        shape, value = tuple(number.shape), tuple(prediction.shape)
        fits = value[-1:] == shape[:1] if self._is_matrix else _broadcasts(shape, value)
        if not fits:
            expected = (
                "one row for each entry of its last dimension" if self._is_matrix else "one that broadcasts to it"
            )
            raise ConfigurationError(
                f"{where}, its precision",
                f"shape {shape} for a value of shape {value}",
                expected,
                "Look at model.summary() for the shapes.",
            )

    def __repr__(self) -> str:
        shown = repr(self.precision)
        if isinstance(self.precision, Tensor) and self.precision.requires_grad:
            # no numbers: a setting that is written down is the same before and after training
            shown = f"a parameter of shape {tuple(self.precision.shape)}"
        return f"Gaussian(precision={shown})"

    @property
    def _is_matrix(self) -> bool:
        return isinstance(self.precision, Precision) and self.precision.is_matrix

    def _like(self, error: Tensor) -> Any:
        number = self.precision() if isinstance(self.precision, Precision) else self.precision
        return number.to(error) if isinstance(number, Tensor) else number

    def _rooted(self, error: Tensor) -> Tensor:
        if isinstance(self.precision, Precision) and self.precision.is_matrix:
            with in_own_precision(error):
                turned: Tensor = error @ self.precision.factor().to(error)  # |L^T e|^2 = e^T P e
            return turned
        rooted: Tensor = error * self._like(error) ** 0.5
        return rooted


@dataclass(frozen=True)
class Categorical(Energy):
    """KL(softmax(value) || softmax(prediction)): for a node whose prediction are logits.

    Predictive coding beyond Gaussian distributions (Pinchetti et al. 2022). A shift of all logits costs nothing. With
    ``observed=True`` the value is data, one-hot or probabilities, and no logits: the energy is the cross entropy
    ``-sum value * log_softmax(prediction)``.

    Args:
        dim: The dimension of the classes; all others but the batch are summed over.
        observed: Whether the value is data, for a node that is clamped to it.

    Example:
        >>> import torch, torch2ebm
        >>> torch2ebm.Categorical().of_samples(torch.ones(1, 3), torch.tensor([[0.0, 1.0, 2.0]]))
        tensor([0.])
    """

    dim: int = -1
    observed: bool = False

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update({"observed": False, **state})  # a pickle of torch2ebm 0.1 has dim alone

    def of_samples(self, error: Tensor, prediction: Tensor) -> Tensor:
        divergence = self._divergence(error, prediction)
        return divergence.flatten(1).sum(1) if divergence.ndim > 1 else divergence

    def of_batch(self, error: Tensor, prediction: Tensor) -> Tensor:
        return self._divergence(error, prediction).sum()

    def gradients(self, error: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        if self.observed:
            value, log_likelihood = error + prediction, torch.log_softmax(prediction, self.dim)
            return -log_likelihood, value - value.sum(self.dim, keepdim=True) * log_likelihood.exp()
        probability, ratio = self._probability(error, prediction)
        divergence = (probability * ratio).sum(self.dim, keepdim=True)
        return probability * (ratio - divergence), probability * -torch.expm1(-ratio)  # p - q without cancellation

    def _probability(self, error: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """p of the value, and log p - log q, q being that of the prediction."""
        of_prediction = torch.log_softmax(prediction, self.dim)
        # log p - log q = error - log sum q exp(error); from the error, since the value may equal the prediction
        ratio = error - torch.logsumexp(of_prediction + error, self.dim, keepdim=True)
        return (of_prediction + ratio).exp(), ratio

    def _divergence(self, error: Tensor, prediction: Tensor) -> Tensor:
        if self.observed:
            return -((error + prediction) * torch.log_softmax(prediction, self.dim)).sum(self.dim)
        probability, ratio = self._probability(error, prediction)
        return (probability * ratio).sum(self.dim)


def precision_of(energy: Energy | None) -> float | Tensor:
    """:meth:`Energy.precision_at_rest`, without a gradient; 1 where no energy was given."""
    if energy is None:
        return 1.0
    with torch.no_grad():
        return energy.precision_at_rest()


def precision_now(precision: float | Tensor | Precision) -> float | Tensor:
    """The number, tensor or matrix that it is at the moment, without a gradient."""
    if isinstance(precision, Precision):
        with torch.no_grad():
            number: Tensor = precision()
            return number
    return precision.detach() if isinstance(precision, Tensor) else precision


def check_precision(where: str, precision: object, trained: bool = False) -> None:
    """Raise :class:`ConfigurationError` unless it is positive and finite everywhere.

    Args:
        where: What the message names.
        precision: A number, a tensor or a :class:`Precision`.
        trained: Whether an optimizer has moved it since it was given.
    """
    if isinstance(precision, Tensor) and precision.requires_grad and not precision.is_leaf:
        raise ConfigurationError(
            where,
            "a tensor computed from others that require a gradient, whose graph is of this moment",
            "a number, a tensor, a parameter or a Precision",
            "Give a torch2ebm.Precision(), which is positive whatever its parameters are, and its parameters to your "
            "optimizer.",
        )
    number = precision_now(precision) if isinstance(precision, (Tensor, Precision)) else precision
    if isinstance(number, Tensor):
        positive = number.diagonal() if isinstance(precision, Precision) and precision.is_matrix else number
        legal = bool(torch.isfinite(number).all() & (positive > 0).all())
    else:
        number_like = isinstance(number, (int, float)) and not isinstance(number, bool)
        legal = number_like and math.isfinite(number) and number > 0  # type: ignore[operator,arg-type]
    if not legal:
        raise ConfigurationError(
            where, _illegal(number), "a finite number above 0, or a tensor of them", _remedy(trained)
        )


def _broadcasts(shape: tuple[int, ...], value: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(value), strict=False)
    return len(shape) <= len(value) and all(size in (1, own) for size, own in pairs)


def _illegal(number: object) -> str:
    if not isinstance(number, Tensor) or number.numel() <= 4:
        return repr(number)
    bad = ~(torch.isfinite(number) & (number > 0))
    return f"{int(bad.sum())} of {number.numel()} entries that are not, the first of them {number[bad][0].item():.4g}"


def _remedy(trained: bool) -> str:
    if not trained:
        return "Choose another."
    return "Take a torch2ebm.Precision(), which stays positive, or a smaller learning rate for this parameter."
