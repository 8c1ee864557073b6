"""Real operations, continued to complex arguments: they stand in for a module's and a loss's while a nudge is complex.

Linear operations act on the real and the imaginary part separately. The losses are written out without conjugation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode, resolve_name

from torch2ebm.common.nested import leaves_of, map_leaves
from torch2ebm.equilibrium.hopfield import HopfieldGraph
from torch2ebm.errors import NoEquilibriumError
from torch2ebm.graph.activations import HOLOMORPHIC

TorchFunction = Callable[..., Any]


class HolomorphicOperations(TorchFunctionMode):
    """While it is entered, operations on complex tensors are the holomorphic continuations of those on real ones.

    Raises :class:`NoEquilibriumError` at an operation that has none.
    """

    def __torch_function__(
        self, func: TorchFunction, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # on real numbers the continuation is the operation itself
        if not any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in leaves_of((args, kwargs))):
            return func(*args, **kwargs)
        if func in _REFUSED:
            raise _no_continuation(func, "it is not holomorphic")
        continued = _CONTINUED.get(func)
        if continued is not None:
            return continued(*args, **kwargs)
        try:
            if func in _LINEAR:
                return _by_parts(func, args, kwargs)
            if func in _PRODUCTS:
                args = map_leaves(_complex, args)  # torch multiplies no complex matrix by a real one
            return func(*args, **kwargs)
        # torch's own refusal, for most operations that have no complex kernel
        except (RuntimeError, TypeError) as error:
            raise _no_continuation(func, str(error).splitlines()[0]) from error


def check_holomorphic(hopfield: HopfieldGraph) -> None:
    """Raise :class:`NoEquilibriumError` where an activation has no continuation to complex numbers."""
    found = [f"'{s.name}' ({s.kind})" for s in hopfield.states.values() if s.kind not in HOLOMORPHIC]
    if found:
        raise NoEquilibriumError(
            "Holomorphic(beta, points)",
            f"{', '.join(found)}, not holomorphic",
            f"activations among {', '.join(sorted(HOLOMORPHIC))}",
            "Take one of these, or Symmetric(beta).",
        )


def _no_continuation(function: TorchFunction, reason: str) -> NoEquilibriumError:
    return NoEquilibriumError(
        "Holomorphic(beta, points)",
        f"{resolve_name(function) or getattr(function, '__name__', function)} of complex states: {reason}",
        "holomorphic operations, in the model and in the loss",
        "Take Symmetric(beta), or a loss such as cross_entropy or mse_loss.",
    )


def _complex(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.to(torch.promote_types(leaf.dtype, torch.complex64))
    return leaf


def _by_parts(function: TorchFunction, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """A real linear or affine operation: what is added to it belongs to the real part alone."""
    value, *rest = args if args else (kwargs["input"],)
    others = {name: each for name, each in kwargs.items() if name != "input"}
    real = function(value.real, *rest, **others)
    # f(x + iy) = f(x) + i (f(y) - f(0)): the bias, or running mean, is in f(0)
    nothing = function(torch.zeros_like(value.imag), *rest, **others)
    return torch.complex(real, function(value.imag, *rest, **others) - nothing)


def _softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return torch.log1p(torch.exp(beta * input)) / beta  # torch turns linear above `threshold`, which is not holomorphic


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    return input * torch.sigmoid(input)


def _reduced(losses: Tensor, reduction: str, count: int | None = None) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (losses.numel() if count is None else count)


def _mse_loss(input: Tensor, target: Tensor, *_: Any, reduction: str = "mean", **__: Any) -> Tensor:
    return _reduced((input - target) ** 2, reduction)  # z^2, not |z|^2


def _log_softmax(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    dimension = 1 if dim is None else dim
    largest = input.real.amax(dimension, keepdim=True).detach()  # keeps exp in range, and cancels
    shifted = input - largest
    return shifted - shifted.exp().sum(dimension, keepdim=True).log()


def _softmax(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    return _log_softmax(input, dim).exp()


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    # refused and not ignored: another loss would be nudged
    if weight is not None or label_smoothing:
        raise _no_continuation(functional.cross_entropy, "class weights and label smoothing are not written out")
    dimension = 1 if input.ndim > 1 else 0
    logarithms = _log_softmax(input, dimension)
    if target.is_floating_point():
        losses = -(logarithms * target).sum(dimension)
        return _reduced(losses, reduction)
    return _nll_loss(logarithms, target, None, None, ignore_index, None, reduction)


def _nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Tensor:
    if weight is not None:
        raise _no_continuation(functional.nll_loss, "class weights are not written out")
    dimension, kept = 1 if input.ndim > 1 else 0, target != ignore_index
    # gather refuses the negative index of an ignored target; any class will do, as it is multiplied by 0
    chosen = input.gather(dimension, target.where(kept, 0).unsqueeze(dimension)).squeeze(dimension)
    # a mean over the targets that count
    return _reduced(-chosen * kept, reduction, int(kept.sum()))


def _binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *_: Any, reduction: str = "mean", **more: Any
) -> Tensor:
    if weight is not None or more.get("pos_weight") is not None:
        raise _no_continuation(functional.binary_cross_entropy_with_logits, "weights are not written out")
    # -y log sigmoid(z) - (1 - y) log(1 - sigmoid(z)) = softplus(z) - y z
    return _reduced(_softplus(input) - input * target, reduction)


# a function and a method of one name are two objects, which a mode sees as two
_CONTINUED: Mapping[TorchFunction, TorchFunction] = {
    functional.softplus: _softplus,
    functional.silu: _silu,
    functional.mse_loss: _mse_loss,
    functional.cross_entropy: _cross_entropy,
    functional.nll_loss: _nll_loss,
    functional.log_softmax: _log_softmax,
    functional.softmax: _softmax,
    torch.log_softmax: _log_softmax,
    torch.softmax: _softmax,
    Tensor.log_softmax: _log_softmax,
    Tensor.softmax: _softmax,
    functional.binary_cross_entropy_with_logits: _binary_cross_entropy_with_logits,
}
# real parameters, which torch does not combine with complex inputs; batch_norm is affine in evaluation
_LINEAR = frozenset(
    [
        *(functional.linear, functional.conv1d, functional.conv2d, functional.conv3d, functional.batch_norm),
        *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
        *(torch.conv1d, torch.conv2d, torch.conv3d, functional.interpolate, functional.upsample),
        *(functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d),
        *(functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d),
    ]
)
_PRODUCTS = frozenset([torch.matmul, torch.mm, torch.bmm, torch.einsum, torch.addmm, Tensor.matmul, Tensor.__matmul__])
# what a model or a loss would rather use; the engine itself takes conjugates and maximum norms of complex numbers
_REFUSED = frozenset(
    [
        *(torch.abs, Tensor.abs, Tensor.__abs__, torch.norm, Tensor.norm),
        *(functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss),
    ]
)
