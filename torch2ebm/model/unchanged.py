"""Between forward and backward nothing may change: inputs, parameters, buffers that forward has read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from torch2ebm.engine.call import Call
from torch2ebm.errors import ChangedSinceForwardError


class Unchanged:
    """What a call has read, as it was when its forward ended.

    Autograd refuses a tensor that was written in place where it has saved it. A relaxation reads everything again, so
    it refuses everything that was written. Writes by ``.data`` leave no trace in a tensor's version: for algorithms
    that evaluate nodes again, parameters are known by the norm of their first row as well.

    Args:
        call: A call whose forward has ended.
        contents: Whether parameters are known by their norms too.
    """

    def __init__(self, call: Call, contents: bool) -> None:
        module = call.graph.module
        self.versions = [*_parameters(call)]
        self.constants = [*_constants(call, module)]
        self.parameters = [p for p in call.parameters.values() if p.is_floating_point()] if contents else []
        self.names = [name for name, p in call.parameters.items() if p.is_floating_point()] if contents else []
        self.norms = _norms(self.parameters)
        self.modes = {path: _modes(module.get_submodule(path)) for path in call.graph.opaque}

    def check(self, call: Call) -> None:
        """Raise :class:`ChangedSinceForwardError` with the name of what is another now."""
        for name, tensor, version in self.versions:
            if tensor._version != version:
                raise _changed(f"parameter '{name}'")
        for name, tensor, version in self.constants:
            if tensor._version != version:
                raise _changed(_called(name, tensor, call))
        for name, before, now in zip(self.names, self.norms, _norms(self.parameters), strict=True):
            # to rounding: another number of threads adds in another order
            if abs(before - now) > 1e-5 * abs(before):
                raise _changed(f"parameter '{name}'")
        for path, modes in self.modes.items():
            if _modes(call.graph.module.get_submodule(path)) != modes:
                raise _changed(f"the mode (train or eval) of module '{path}'")


def _changed(name: str) -> ChangedSinceForwardError:
    return ChangedSinceForwardError(
        "loss.backward()",
        f"{name}, changed since model(...) was called",
        "what the forward saw, which inference reads again",
        "Call backward before optimizer.step() and before the next batch is written into the same tensors, or give the "
        "model a copy (x.clone()).",
    )


def _parameters(call: Call) -> Iterator[tuple[str, Tensor, int]]:
    return ((name, p, p._version) for name, p in call.parameters.items() if not p.is_inference())


def _constants(call: Call, module: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Inputs, and what forward has read besides; not what each forward moves, such as running statistics."""
    moved = call.graph.changing_buffers
    moving = {id(b) for name, b in module.named_buffers() if name in moved} if moved else set()
    for name, (tensor, version) in zip(call.graph.constants, call.run.originals, strict=True):
        if id(tensor) not in moving and not tensor.is_inference():
            yield name, tensor, version


def _called(name: str, tensor: Tensor, call: Call) -> str:
    """What the user calls a constant of the run: a buffer by its path, else the arguments that it is made of."""
    buffer = next((path for path, b in call.graph.module.named_buffers() if b is tensor), None)
    if buffer is not None:
        return f"buffer '{buffer}', which forward has read"
    given = [f"input '{each}'" for each in call.graph.inputs.get(name, ())]
    return f"{' and '.join(given) or 'a tensor'}, which forward has read"


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    if not tensors:
        return []
    with torch.no_grad():
        rows = [tensor.detach()[(0,) * (tensor.ndim - 1)] if tensor.ndim else tensor.detach() for tensor in tensors]
        return torch.stack([norm.float().cpu() for norm in torch._foreach_norm(rows)]).tolist()


def _modes(module: nn.Module) -> Mapping[str, bool]:
    return {name: part.training for name, part in module.named_modules()}
