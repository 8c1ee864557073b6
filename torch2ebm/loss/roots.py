"""What backward is called on: each scalar is told, so that the loss is known and nothing that was computed on the way.

A vector of losses is one scalar, too: the sum of its entries, each with the gradient that it was given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torch2ebm.common.nested import leaves_of

BACKWARDS: Mapping[Callable[..., Any], str] = {
    Tensor.backward: "gradient",
    torch.autograd.backward: "grad_tensors",
    torch.autograd.grad: "grad_outputs",
}  # and the argument that is the gradient of what each is called on
_SIGNATURES = {function: inspect.signature(function) for function in BACKWARDS}


class Taping(Protocol):
    """What this file asks of taped tensors."""

    def is_taped(self, leaf: Any, /) -> bool: ...

    def plain(self, structure: Any, /) -> Any: ...

    def weighted(self, losses: Tensor, weights: Tensor, /) -> Tensor: ...


def run_backward(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], taping: Taping) -> Any:
    """Call one of :data:`BACKWARDS` on what may be taped."""
    signature = _SIGNATURES[func]
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    of = next(iter(signature.parameters))
    roots = list(leaves_of(arguments.pop(of)))
    given = list(leaves_of(arguments.pop(BACKWARDS[func], None)))
    given += [None] * (len(roots) - len(given))
    if arguments.pop("is_grads_batched", False):
        return _one_by_one(roots, given, arguments)
    if func is torch.autograd.grad:
        roots, given = _with_scalars(roots, given, taping)
    asked = [(root._scalar, gradient) for root, gradient in zip(roots, given, strict=True) if hasattr(root, "_scalar")]
    try:
        for scalar, gradient in asked:
            scalar.asked = True if gradient is None else taping.plain(gradient).detach()
        return _run(func, of, roots, given, arguments, taping)
    finally:
        for scalar, _ in asked:
            scalar.asked = None


def _run(
    func: Callable[..., Any], of: str, roots: list[Any], given: list[Any], arguments: dict[str, Any], taping: Taping
) -> Any:
    single = func is Tensor.backward
    if any(each is not None for each in given):
        arguments[BACKWARDS[func]] = taping.plain(given[0] if single else given)
    if any(taping.is_taped(leaf) for leaf in leaves_of(arguments)):
        with torch._C.DisableTorchFunctionSubclass():  # asked for by itself, and an alias would be another tensor
            return func(**{of: roots[0] if single else roots}, **arguments)
    # hooks, and what is recomputed inside, see torch as ever
    return func(**{of: taping.plain(roots[0] if single else roots)}, **arguments)


def _with_scalars(roots: Sequence[Any], given: Sequence[Any], taping: Taping) -> tuple[list[Any], list[Any]]:
    """For a vector of losses the scalar that its gradient makes of it, whose largest entry stands outside."""
    pairs = []
    for root, gradient in zip(roots, given, strict=True):
        if taping.is_taped(root) and root.ndim == 1 and root.numel() > 1 and isinstance(gradient, Tensor):
            largest = gradient.detach().abs().max()
            weights = gradient.detach() / torch.where(largest == 0, 1, largest)
            pairs.append((taping.weighted(root, weights), largest))
        else:
            pairs.append((root, gradient))
    return [root for root, _ in pairs], [gradient for _, gradient in pairs]


def _one_by_one(roots: Sequence[Any], given: Sequence[Any], arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Rows of a Jacobian: torch would run them through one backward, which a relaxation is no linear function of."""
    keep = bool(arguments.pop("retain_graph", None))
    count = next(len(each) for each in given if each is not None)
    rows = []
    for row in range(count):
        of_row = [None if each is None else each[row] for each in given]
        retain = keep or row + 1 < count
        rows.append(torch.autograd.grad(roots, grad_outputs=of_row, retain_graph=retain, **arguments))
    return tuple([None if each[0] is None else torch.stack(each) for each in zip(*rows, strict=True)])
