"""Whether parameters, predictions and gradients are finite, and the error that names the first that is not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from torch2ebm.errors import NonFiniteError
from torch2ebm.state import Call, LocalGradients, OutputLoss


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


def check_local_gradients(gradients: LocalGradients, loss: OutputLoss) -> None:
    if _sum_is_finite(gradients.parameters.values()):
        return
    for delivered in loss.delivered.values():
        if not all_finite(delivered):
            raise _non_finite("the loss, backward", delivered)
    check_gradients(gradients.parameters)


def check_gradients(gradients: Mapping[str, Tensor]) -> None:
    """One pass over the data; a sum that merely overflows is looked at again, one by one."""
    if _sum_is_finite(gradients.values()):
        return
    for name, gradient in gradients.items():
        if not all_finite(gradient):
            raise _non_finite(f"gradient of parameter '{name}', backward", gradient)


def _non_finite(where: str, tensor: Tensor) -> NonFiniteError:
    return NonFiniteError(
        where,
        count_bad(tensor),
        "finite numbers",
        "Look at the input, the target, the learning rate and the parameters; nothing was changed.",
    )
