"""An energy that is written as one function; its derivatives come from autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torch2ebm.engine.energies import Energy
from torch2ebm.errors import ConfigurationError, first_line
from torch2ebm.isolation.torch_modes import in_own_precision
from torch2ebm.potentials.energy_parameters import tensors_of

SHAPES = ((3, 4), (3, 4, 5), (2, 2, 3, 3), (6,))  # [batch, ...], to try a function on


@dataclass(frozen=True)
class FunctionEnergy(Energy):
    """Any function of value and prediction, differentiated by autograd.

    ``phi(value, prediction)`` returns the energy of each sample, shape ``[batch]``, or of each entry, in the shape of
    the value; entries are summed. Nothing else is taken, a mean over the batch for one.

    A value starts at its prediction and stays there until an error arrives. So phi has to be stationary where the value
    is the prediction, whatever that is. It need not be zero there. What it is there is subtracted from the energies
    that are shown, since it moves no value. The parameters of phi, if it is a module, learn in your optimizer, and for
    them it counts: ``0.5 * pi * error**2 - 0.5 * log(pi)`` is learned as it stands.

    Args:
        phi: The function, of two tensors in the shape of the node's value ``[batch, ...]``. Make a module of it where
            it holds tensors.
        of_error: Whether phi takes the error alone, value minus prediction. In float32 a small error then keeps its
            digits, which ``value - prediction`` loses.
        observed: Whether the value is data, for a node that is clamped to it: then phi need be stationary nowhere.

    Raises:
        ConfigurationError: for what is no function; and at attach, or in a forward, for a phi that returns another
            shape, no number, mixes samples or is not stationary at the prediction.

    Example:
        >>> import torch, torch2ebm
        >>> def log_cosh(value, prediction):
        ...     return (value - prediction).cosh().log()
        >>> energy = torch2ebm.FunctionEnergy(log_cosh)
        >>> error, prediction = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 5.0]])
        >>> energy.of_samples(error, prediction), energy.gradients(error, prediction)[0]
        (tensor([0.4338]), tensor([[0.7616, 0.0000]]))
        >>> outlier = torch2ebm.FunctionEnergy(lambda error: error.abs() ** 1.5, of_error=True)
        >>> outlier.of_samples(error, prediction)
        tensor([1.])
    """

    phi: Callable[..., Tensor]
    of_error: bool = False
    observed: bool = False

    def __post_init__(self) -> None:
        if not callable(self.phi) or isinstance(self.phi, type):
            raise ConfigurationError(
                "FunctionEnergy(phi)", repr(self.phi), "a function of tensors", "For example lambda value, mu: ..."
            )

    def of_samples(self, error: Tensor, prediction: Tensor) -> Tensor:
        return self._of_samples(error, prediction) - self._shift(error, prediction)

    def of_batch(self, error: Tensor, prediction: Tensor) -> Tensor:
        return self.of_samples(error, prediction).sum()

    def gradients(self, error: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            if self.of_error:
                leaf = error.detach().requires_grad_()
                slope = _slopes(self._of_samples(leaf, prediction.detach()), [leaf])[0]
                return slope, slope
            value = (error + prediction).detach().requires_grad_()
            mu = prediction.detach().requires_grad_()
            own, against = _slopes(self._of(value, mu), [value, mu])
            return own, -against

    def of_parameters(self, error: Tensor, prediction: Tensor) -> Tensor:
        return self._of_samples(error, prediction).sum()

    def check(self, where: str, prediction: Tensor | None = None) -> None:
        """Hold phi against what an energy has to be, at a prediction, or on numbers of several shapes and domains.

        Raises:
            ConfigurationError: where it is none; without a prediction, if it is none in every domain that it knows.
        """
        if prediction is not None:
            try:
                self._check_at(where, 0.1 * (1 + prediction.abs()), prediction)
            except _SaysNothingError as nothing:
                raise _failed(where, tuple(prediction.shape), nothing.__cause__ or nothing) from nothing.__cause__
            return
        found: list[ConfigurationError] = []
        for value, mu in _tried(tensors_of(self)):
            try:
                self._check_at(where, value - mu, mu)
            except _SaysNothingError:
                continue
            except ConfigurationError as error:
                # other shapes a function may fit by chance, with the tensors that it holds
                found += [error] if mu.ndim == 2 else []
            else:
                return
        if found:
            raise found[0]

    def _check_at(self, where: str, error: Tensor, prediction: Tensor) -> None:
        try:
            energy, slopes = self._of_samples(error, prediction), self.gradients(error, prediction)
        except ConfigurationError:
            raise
        except Exception as problem:  # whatever a function raises outside of its domain or shape
            raise _SaysNothingError from problem
        if not _finite(energy, *slopes):
            raise _no_number(where, "near the prediction")
        self._check_samples(where, error, prediction)
        if self.observed:
            return
        at_rest = self.gradients(torch.zeros_like(error), prediction)
        if not _finite(*at_rest):
            raise _no_number(where, "where the value is the prediction")
        size = max(float(slope.abs().max()) for slope in slopes)
        for derivative, slope in zip(("dphi/dvalue", "dphi/dprediction"), at_rest, strict=True):
            if bool((slope.abs() > 10 * torch.finfo(error.dtype).eps ** 0.5 * size).any()):
                raise _not_at_rest(where, derivative, float(slope.abs().max()))

    def _check_samples(self, where: str, error: Tensor, prediction: Tensor) -> None:
        with torch.enable_grad():
            leaf, mu = error.detach().requires_grad_(), prediction.detach().requires_grad_()
            slopes = _slopes(self._of_samples(leaf, mu)[:1], [leaf, mu])
        if any(bool(slope[1:].any()) for slope in slopes):
            raise ConfigurationError(
                where,
                "a function in which the energy of one sample depends on another sample",
                "independent samples",
                "Sum or average over the features of a sample, and not over the batch.",
            )

    def _of(self, value: Tensor, prediction: Tensor) -> Tensor:
        with in_own_precision(value):
            return _of_samples(self.phi(value, prediction), value)

    def _of_samples(self, error: Tensor, prediction: Tensor) -> Tensor:
        if not self.of_error:
            return self._of(error + prediction, prediction)
        with in_own_precision(error):
            return _of_samples(self.phi(error), error)

    def _shift(self, error: Tensor, prediction: Tensor) -> Tensor | float:
        """What phi is where the value is the prediction."""
        if self.observed:
            return 0.0
        return self._of_samples(torch.zeros_like(error), prediction).detach()


def _of_samples(found: object, value: Tensor) -> Tensor:
    shape = tuple(value.shape)
    if isinstance(found, Tensor) and tuple(found.shape) == shape:
        return found.flatten(1).sum(1) if found.ndim > 1 else found
    if isinstance(found, Tensor) and value.ndim and tuple(found.shape) == shape[:1]:
        return found
    got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise ConfigurationError(
        "FunctionEnergy(phi)",
        f"{got} for values of shape {shape}",
        f"the energy of each sample, shape {shape[:1]}, or of each entry, shape {shape}",
        "Sum over the features of a sample, for example (...).flatten(1).sum(1), and not over the batch.",
    )


def _slopes(energy: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not energy.requires_grad:  # a constant
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(energy.sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if part is None else part for leaf, part in zip(leaves, found, strict=True)]


class _SaysNothingError(Exception):
    """The function is not made for these numbers, or for their shape."""


def _failed(where: str, shape: tuple[int, ...], problem: BaseException) -> ConfigurationError:
    return ConfigurationError(
        where,
        f"a function that fails with {type(problem).__name__}: {first_line(problem)}",
        f"an energy of values and predictions of shape {shape}",
        "Call it on two tensors of this shape; it must not write on them.",
    )


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(each).all()) for each in tensors)


def _tried(own: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Values and predictions: all numbers, positive ones, parts, distributions; shapes of its tensors first."""
    generator = torch.Generator().manual_seed(0)  # the user's generators stay as they are
    device = own[0].device if own else torch.device("cpu")
    suited = [(3, *tensor.shape) for tensor in own if tensor.ndim == 1]
    for shape in (*suited, *SHAPES):
        normals = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for _ in range(2)]
        for domain in (lambda x: x, torch.exp, torch.sigmoid, lambda x: x.softmax(-1), lambda x: -x.exp()):
            value, prediction = map(domain, normals)
            yield value, prediction


def _no_number(where: str, at: str) -> ConfigurationError:
    return ConfigurationError(
        where,
        f"a function that is not finite, or has no finite derivative, {at}",
        "finite numbers at every value of the node",
        "Take a function that is smooth at an error of zero, and defined for what the node predicts.",
    )


def _not_at_rest(where: str, derivative: str, size: float) -> ConfigurationError:
    return ConfigurationError(
        where,
        f"a function whose {derivative} is up to {size:.3g} where the value is the prediction",
        "zero there: values start at their predictions, and rest there until an error arrives",
        "Take a function that is smallest where the value is the prediction, for example a divergence; for data on a "
        "clamped node pass observed=True.",
    )
