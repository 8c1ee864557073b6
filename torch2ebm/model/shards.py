"""Modules whose parameters ``fully_shard`` has spread over processes: whole for a pass, gradients to the shards."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.errors import ShardingError
from torch2ebm.isolation.interrupts import restored_by

_FSDP = "torch.distributed.fsdp"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class Shards:
    """What of a module is sharded, if anything; its parameters as the optimizer knows them, by name.

    Raises :class:`ShardingError` for what cannot be gathered and scattered again.
    """

    def __init__(self, module: nn.Module) -> None:
        fsdp = sys.modules.get(_FSDP)  # who has sharded anything has imported it
        _check_wrappers(module, fsdp)
        self.modules: list[Any] = (
            [] if fsdp is None else [m for m in module.modules() if isinstance(m, fsdp.FSDPModule)]
        )
        _check_streams(module, self.modules)
        self.parts: dict[str, Any] = {}
        self._depth = 0
        self._release()
        before = dict(module.named_parameters())
        with self.gathered():
            whole = dict(module.named_parameters()) if self.modules else {}
        self.parts = {name: before[name] for name, parameter in whole.items() if parameter is not before[name]}
        self._whole = {name: whole[name] for name in self.parts}
        for name, part in self.parts.items():
            _check_part(module, name, part, self._whole[name])

    def covers(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether all that learns among these is sharded, and so synchronised."""
        return bool(self.parts) and all(name in self.parts for name, p in parameters.items() if p.requires_grad)

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, the module is an ordinary one with whole parameters. One all-gather a sharded module."""
        return nullcontext() if not self.modules or self._depth else self._gathered()

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        self._release()  # what a plain forward has left gathered may be from before an optimizer step
        self._depth += 1
        with restored_by(self._release), self._hooks_out():
            for module in self.modules:
                module.unshard()
            yield

    def _release(self) -> None:
        self._depth = 0
        for module in self.modules:
            module.reshard()

    @contextmanager
    def _hooks_out(self) -> Iterator[None]:
        """Without the hooks that gather before each module's forward and release after it; others stay."""
        hooked = [(module, name, getattr(module, name)) for module in self.modules for name in _HOOKS]

        def restore() -> None:
            for module, name, hooks in hooked:
                setattr(module, name, hooks)

        with restored_by(restore):
            for module, name, hooks in hooked:
                others = [(key, hook) for key, hook in hooks.items() if not _is_of_fsdp(hook)]
                setattr(module, name, OrderedDict(others))
            yield

    def in_place_of(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """What autograd and optimizers know instead of these."""
        return [self.parts.get(name, parameter) for name, parameter in parameters.items()]

    def scattered(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over processes, to each its shard. One reduce-scatter a parameter; a missing gradient is zero."""
        found = dict(gradients)
        for name, part in self.parts.items():
            if part.requires_grad:
                gradient = gradients.get(name)
                found[name] = _mean_shard(torch.zeros_like(self._whole[name]) if gradient is None else gradient, part)
        return found


def _mean_shard(gradient: Tensor, part: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial

    mesh = part.device_mesh
    summands = DTensor.from_local(gradient.contiguous(), mesh, [Partial("avg")] * mesh.ndim, run_check=False)
    return summands.redistribute(placements=part.placements)


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_FSDP)


def _check_wrappers(module: nn.Module, fsdp: Any) -> None:
    wrapper = getattr(fsdp, "FullyShardedDataParallel", None)
    if wrapper is not None and any(isinstance(each, wrapper) for each in module.modules()):
        raise ShardingError(
            "torch2ebm.convert(module)",
            "a module inside FullyShardedDataParallel, which keeps flattened parameters",
            "one sharded by torch.distributed.fsdp.fully_shard, or not sharded",
            "Shard it by fully_shard, then convert it.",
        )


def _check_streams(module: nn.Module, sharded: Sequence[nn.Module]) -> None:
    """On a CPU, where torch 2.6 makes shards that nothing can gather, its own forward included."""
    on_cpu = any(parameter.device.type == "cpu" for each in sharded for parameter in each.parameters())
    if on_cpu and not hasattr(torch.cpu.Stream, "record_event"):
        raise ShardingError(
            f"torch2ebm.convert({type(module).__name__})",
            f"shards on a CPU, which fully_shard of torch {torch.__version__} cannot gather",
            "shards on an accelerator, or a newer torch",
            "Update torch (2.13 can), or use torch.nn.parallel.DistributedDataParallel.",
        )


def _check_part(module: nn.Module, name: str, part: Any, whole: Tensor) -> None:
    """A policy that casts or offloads, or a second kind of parallelism, shows in the gathered parameter."""
    if type(whole) is nn.Parameter and whole.dtype == part.dtype and whole.device.type == part.device.type:
        return
    raise ShardingError(
        f"torch2ebm.convert({type(module).__name__}), parameter '{name}'",
        f"{part.dtype} on {part.device.type} in shards and {whole.dtype} on {whole.device.type}, a "
        f"{type(whole).__name__}, when gathered",
        "the same dtype and device, a Parameter",
        "Call fully_shard without a MixedPrecisionPolicy or OffloadPolicy, on a module that is not tensor-parallel; "
        "torch.autocast around the forward computes in lower precision.",
    )
