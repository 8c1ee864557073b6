"""Checks that parameters, predictions and gradients are finite; the error names the first that is not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from torch2ebm.engine.call import Call
from torch2ebm.errors import NonFiniteError


def all_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite. Their sum decides in one pass; only where it is not finite is each entry read."""
    tensor = summable(tensor)
    return _is_finite(tensor.sum(dtype=_wide(tensor.dtype))) or bool(torch.isfinite(tensor).all())


def _sum_is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether the sum of all entries is finite, which it cannot be with a NaN or an infinity among them."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        tensor = summable(tensor)
        total = tensor.sum(dtype=_wide(tensor.dtype))
        by_device.setdefault(tensor.device, []).append(total.abs() if total.is_complex() else total)
    # one number for each device goes to the host: each transfer waits for what is queued there
    return all(_is_finite(torch.stack(sums).sum()) for sums in by_device.values())


def summable(tensor: Tensor) -> Tensor:
    """The entries of a tensor in a form that torch can sum: of sparse ones the values, of eight bits in more."""
    tensor = tensor.dequantize() if tensor.is_quantized else tensor.detach()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _is_finite(number: Tensor) -> bool:
    return math.isfinite(abs(number.detach().item()))


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype to sum in: float16 overflows at 65504, and float64 must not be rounded to infinity."""
    if dtype.is_complex:
        return None
    return None if dtype == torch.float64 else torch.float32


def count_bad(tensor: Tensor) -> str:
    tensor = summable(tensor)
    bad = int((~torch.isfinite(tensor)).sum())
    return f"{bad} of {tensor.numel()} elements NaN or infinite"


def check_standing(tensors: Mapping[str, Tensor]) -> None:
    """Raise :class:`NonFiniteError` for a parameter or buffer with a NaN or an infinity."""
    if _sum_is_finite(tensors.values()):
        return
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise _non_finite(f"{kind} '{name}', feed-forward pass", tensor)


def check_predictions(call: Call, of_outputs: bool = True) -> None:
    """Raise :class:`NonFiniteError` where an output is not finite, with the node in which that began.

    Without ``of_outputs``, one that begins in the output itself is let pass: forward may mask by minus infinity, or
    return what no loss reads. If the loss does read it, its gradient tells.
    """
    if all(all_finite(call.values[slot]) for slot in call.graph.output_slots):
        return
    # in topological order: the first bad prediction is where it began, the later ones only inherit it
    for node in call.graph.nodes.values():
        for slot in node.slots if of_outputs or not node.is_output else ():
            if not all_finite(call.values[slot]):
                raise _non_finite(f"prediction of node '{node.name}', feed-forward pass", call.values[slot])


def first_bad(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first that is not finite. One pass over the data; a sum that merely overflows is seen again."""
    if _sum_is_finite(tensors.values()):
        return None
    # none, where the sum overflowed over finite entries
    return next((name for name, tensor in tensors.items() if not all_finite(tensor)), None)


def check_delivered(delivered: Mapping[str, Tensor]) -> None:
    bad = first_bad(delivered)
    if bad is not None:
        raise _non_finite("the loss, backward", delivered[bad])


def check_gradients(gradients: Mapping[str, Tensor]) -> None:
    bad = first_bad(gradients)
    if bad is not None:
        raise _non_finite(f"gradient of parameter '{bad}', backward", gradients[bad])


def check_unskipped(gradients: Mapping[str, Tensor]) -> None:
    """Raise where infinite gradients, left to a gradient scaler to skip, reach ``optimizer.step()`` all the same."""
    bad = first_bad(gradients)
    if bad is not None:
        raise _non_finite(
            f"gradient of parameter '{bad}', optimizer.step()",
            gradients[bad],
            "Step with scaler.step(optimizer), which skips; without a scaler look at the input, the target and the "
            "factor that the loss was multiplied by. Nothing was changed.",
        )


def _non_finite(
    where: str,
    tensor: Tensor,
    remedy: str = "Look at the input, the target, the learning rate and the parameters; nothing was changed.",
) -> NonFiniteError:
    return NonFiniteError(where, count_bad(tensor), "finite numbers", remedy)
