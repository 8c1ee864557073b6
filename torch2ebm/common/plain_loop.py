"""Whether a loop trains what it has not been told how to train: backwards come through, and weights move after them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


class PlainLoop:
    """Watches results of a function until a backward through them was followed by a change of its parameters.

    A backward alone is no training: a saliency map, an attack on the input. A change alone is none either: an average
    of weights, a checkpoint that is loaded.
    """

    def __init__(self) -> None:
        self._at_backward: list[int] | None = None  # versions of the parameters
        self._over = False

    def end(self) -> None:
        """Watch no more."""
        self._over = True

    def trains(self, parameters: Iterable[Tensor]) -> bool:
        """Whether parameters have moved since a backward; True once, and then no more."""
        if self._over or self._at_backward is None or self._at_backward == _versions(parameters):
            return False
        self._over = True
        return True

    def watch(self, results: Iterable[object], parameters: Callable[[], Sequence[Tensor]]) -> None:
        """Note when a backward reaches one of the results."""
        if self._over or self._at_backward is not None:
            return
        held = weakref.ref(self)

        def reached(gradients: object) -> None:
            watching = held()
            if watching is not None:
                watching._at_backward = _versions(parameters())

        for result in results:
            # hooks on the node and not on the tensor, which would then warn when it is saved
            if type(result) is Tensor and result.grad_fn is not None and not _is_transformed(result):
                result.grad_fn.register_prehook(reached)


def _versions(parameters: Iterable[Tensor]) -> list[int]:
    return [-1 if parameter.is_inference() else parameter._version for parameter in parameters]


def _is_transformed(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))  # of torch.func
