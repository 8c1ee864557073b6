"""Wraps a loss function that the tape cannot record, so that it is called again as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torch2ebm.common.nested import leaves_of
from torch2ebm.errors import LossNotRecordedError
from torch2ebm.loss.operations import function_name, terms_averaged
from torch2ebm.loss.tape import Operation
from torch2ebm.loss.taped_tensor import plain, put_on_tape


class EnergyLoss:
    """The explicit form of a loss, for one that the tape cannot follow.

    The loss function is called on ordinary tensors, and again whenever the prediction has moved, whatever it does
    inside (NumPy, compiled code, custom autograd functions).

    Args:
        loss_fn: From the model's output, and whatever else it is called with, to a loss of no dimension.

    Raises:
        LossNotRecordedError: when called, if the loss has a dimension.

    Example:
        >>> import torch, torch2ebm
        >>> criterion = torch2ebm.EnergyLoss(torch.nn.functional.cross_entropy)
        >>> criterion(torch.zeros(2, 4), torch.tensor([0, 1]))
        tensor(1.3863)
    """

    def __init__(self, loss_fn: Callable[..., Tensor]) -> None:
        self.loss_fn = loss_fn

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        # ordinary tensors: nothing inside is recorded, only the call as one entry
        loss = self.loss_fn(*plain(args), **plain(kwargs))
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise LossNotRecordedError(
                f"EnergyLoss({function_name(self.loss_fn)})",
                got,
                "a tensor of no dimension",
                "Reduce it to one number.",
            )
        given = {**getattr(self.loss_fn, "keywords", {}), **kwargs}  # those of a functools.partial
        # the only signs of a sum that an unrecorded function shows
        summed = getattr(self.loss_fn, "reduction", given.get("reduction")) == "sum"
        shapes = [tuple(leaf.shape) for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)]
        terms = terms_averaged(self.loss_fn, args, kwargs)
        # writes=True: what it does inside is unknown, so a replay hands it copies of the outputs
        sizes = shapes[0] if summed and shapes else ()
        operation = Operation(self.loss_fn, args, kwargs, writes=True, whole=True, summed=sizes, terms=terms)
        return put_on_tape(operation, loss)  # type: ignore[no-any-return]
