"""What must stand still while the values of one batch move: dropout masks, batch statistics, running buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from torch2ebm.interrupts import Change, restored_by


class RandomState:
    """The state of the generators that a node draws from: the CPU's, and the accelerator's it runs on."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        self.states = self._read()

    def _read(self) -> tuple[Tensor, ...]:
        cpu = torch.get_rng_state()
        return (cpu, torch.cuda.get_rng_state(self.cuda)) if self.cuda else (cpu,)

    def restore(self) -> None:
        torch.set_rng_state(self.states[0])
        if self.cuda:
            torch.cuda.set_rng_state(self.states[1], self.cuda)

    def advanced(self) -> bool:
        """Whether anything was drawn since this state was taken."""
        return not all(torch.equal(now, then) for now, then in zip(self._read(), self.states, strict=True))

    def replayed(self) -> Change:
        """Draw the same numbers again, and leave the generators as they are now."""
        now = RandomState(self.cuda or torch.device("cpu"))
        return Change(self.restore, now.restore)


Statistics = list[tuple[Tensor, Tensor]]


class _BatchNormInterceptor(TorchFunctionMode):
    """Hands every batch norm that would use batch statistics to ``replace``, in the order of the calls."""

    def __init__(self, replace: Callable[..., Tensor]) -> None:
        super().__init__()
        self.replace = replace

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.batch_norm:
            call = _batch_norm_arguments(*args, **kwargs)
            if call["training"]:
                return self.replace(**call)
        return func(*args, **kwargs)


def _batch_norm_arguments(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Any]:
    return dict(locals())


def recording_statistics(statistics: Statistics) -> TorchFunctionMode:
    """Run batch norms as they are and append each one's batch mean and (biased) variance to ``statistics``."""

    def replace(**call: Any) -> Tensor:
        batch = call["input"].detach()
        if batch.dtype in (torch.float16, torch.bfloat16):
            batch = batch.float()
        dimensions = [0, *range(2, batch.ndim)]
        variance, mean = torch.var_mean(batch, dimensions, correction=0)
        dtype = mean.dtype if call["weight"] is None else call["weight"].dtype
        statistics.append((mean.to(dtype), variance.to(dtype)))
        return functional.batch_norm(**call)

    return _BatchNormInterceptor(replace)


def frozen_statistics(statistics: Statistics) -> TorchFunctionMode:
    """Run batch norms with the recorded statistics, which then are constants, and leave the running ones alone."""
    remaining = iter(statistics)

    def replace(**call: Any) -> Tensor:
        mean, variance = next(remaining)
        return functional.batch_norm(**{**call, "running_mean": mean, "running_var": variance, "training": False})

    return _BatchNormInterceptor(replace)


class BufferSnapshot:
    """Copies of the buffers that a forward pass changes."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self.copies = [(buffer, buffer.detach().clone()) for buffer in buffers.values()]

    def restore(self) -> None:
        for buffer, copy in self.copies:
            buffer.data.copy_(copy)  # .data: autograd graphs that saved the buffer keep their version of it

    def preserved(self) -> Change:
        return restored_by(self.restore)

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.restore()
            raise


class BufferHistory:
    """The buffers before and after one forward, so that a step that is refused leaves no trace in them."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self.buffers = buffers
        self.before = BufferSnapshot(buffers)
        self.after = self.before
        self._undoing = False

    def forward_ended(self) -> None:
        self.after = BufferSnapshot(self.buffers)

    def undo(self) -> None:
        """Give them their contents from before, unless something else has changed them since."""
        self._undoing |= all(torch.equal(buffer, copy) for buffer, copy in self.after.copies)
        if self._undoing:  # and not finished, where it is called again
            self.before.restore()


def hooks_suspended(parameters: Iterable[Tensor]) -> Change:
    """Keep the hooks of parameters out of the gradients taken inside: they run once, when ``.grad`` is filled."""
    hooked = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]

    def suspend() -> None:
        for parameter, _ in hooked:
            parameter._backward_hooks = None

    def restore() -> None:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks

    return Change(suspend, restore)


def tensors_in_place(module: nn.Module, tensors: Mapping[str, Tensor]) -> Change:
    """Put ``tensors`` where the parameters of these names are, a shared one everywhere it stands."""
    own = {name: parameter for name, parameter in module.named_parameters() if name in tensors}
    places = [
        (registry, key, name)
        for name, parameter in own.items()
        for registry in (each._parameters for each in module.modules())
        for key, entry in registry.items()
        if entry is parameter
    ]

    def replace() -> None:
        for registry, key, name in places:
            registry[key] = tensors[name]  # type: ignore[assignment]

    def restore() -> None:
        for registry, key, name in places:
            registry[key] = own[name]

    return Change(replace, restore)
