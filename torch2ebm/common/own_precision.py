"""Autocast is for the user's forward: algebra of the package's own on what that computed keeps its precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def in_own_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, on the device of a tensor: products of single precision are made in single precision."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
