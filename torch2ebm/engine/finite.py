"""Whether parameters, predictions and gradients are finite, and the error that names the first that is not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from torch2ebm.engine.call import Call
from torch2ebm.errors import NonFiniteError


def all_finite(tensor: Tensor) -> bool:
    """One pass over the data; the sum may overflow where no entry is infinite, hence the second look."""
    return math.isfinite(tensor.detach().sum()) or bool(torch.isfinite(tensor).all())


def _sum_is_finite(tensors: Iterable[Tensor]) -> bool:
    """Never true where an entry is NaN or infinite; one number a device goes to the host."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor.detach().sum(dtype=_wide(tensor.dtype)))
    return all(math.isfinite(torch.stack(sums).sum()) for sums in by_device.values())


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    """Half precisions would overflow in a sum, and tensors of one precision can be stacked."""
    return None if dtype == torch.float64 else torch.float32


def count_bad(tensor: Tensor) -> str:
    bad = int((~torch.isfinite(tensor)).sum())
    return f"{bad} of {tensor.numel()} elements NaN or infinite"


def check_standing(tensors: Mapping[str, Tensor]) -> None:
    """Parameters and buffers are finite; one pass over the data where they are."""
    if _sum_is_finite(tensors.values()):
        return
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise _non_finite(f"{kind} '{name}', feed-forward pass", tensor)


def check_predictions(call: Call) -> None:
    if all(all_finite(call.values[slot]) for slot in call.graph.output_slots):
        return
    for node in call.graph.nodes.values():
        for slot in node.slots:
            if not all_finite(call.values[slot]):
                raise _non_finite(f"prediction of node '{node.name}', feed-forward pass", call.values[slot])


def first_bad(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first that is not finite. One pass over the data; a sum that merely overflows is seen again."""
    if _sum_is_finite(tensors.values()):
        return None
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
    """What a backward under a factor above one left to a gradient scaler must not reach a step."""
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
