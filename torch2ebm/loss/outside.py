"""What scales a loss outside of the user's code: gradient scalers, and trainers that accumulate gradients.

A gradient scaler's factor and a trainer's division for accumulation are there for the gradients' sake. They are no part
of the loss, so they scale gradients and leave the energy alone: two batches of 5 then are one of 10. In the operation
itself nothing tells ``loss / 2`` of a trainer from that of a user, for whom it is part of the loss as all else. What
tells them apart is who multiplies, so this file looks at the name of the calling module, here and nowhere else. A loop
of your own says it by ``EnergyOptimizer(..., accumulation=2)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SCALING_MODULES = (
    "torch.amp.grad_scaler",
    "torch.distributed.fsdp.sharded_grad_scaler",
    "lightning.pytorch.loops",
    "pytorch_lightning.loops",
    "accelerate.accelerator",
    "transformers.trainer",
)  # each, and what stands below it

_MULTIPLY = frozenset([torch.mul, Tensor.mul, Tensor.mul_])
_DIVIDE = frozenset([torch.div, Tensor.div, Tensor.div_])
_SCALING = _MULTIPLY | _DIVIDE


def factor_outside(function: Any, args: Sequence[Any], caller: str) -> float | Tensor | None:
    """What a gradient scaler or a trainer multiplies the first argument by; None for any other operation.

    ``caller`` is the name of the module that the operation stands in.
    """
    if function not in _SCALING or len(args) != 2 or not _scales(caller):
        return None
    factor = args[1].detach() if isinstance(args[1], Tensor) else args[1]
    return factor if function in _MULTIPLY else 1 / factor


def _scales(caller: str) -> bool:
    return any(caller == name or caller.startswith(f"{name}.") for name in SCALING_MODULES)
