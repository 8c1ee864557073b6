"""Between forward and backward nothing may change: inputs, parameters, buffers that forward has read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torch2ebm.engine.call import Call
from torch2ebm.engine.standing import versions_of
from torch2ebm.errors import ChangedSinceForwardError


class Unchanged:
    """What a call has read, as it was when its forward ended.

    Autograd refuses a tensor that was written in place where it has saved it. A relaxation reads everything again, so
    it refuses everything that was written. Writes by ``.data`` leave no trace in a tensor's version: for algorithms
    that evaluate nodes again, parameters are known by the norm of their first row as well.

    Args:
        call: A call whose forward has ended.
        contents: Whether parameters are known by their norms too.
        moving: By name the buffers that forwards change, such as running statistics: these may change.
    """

    def __init__(self, call: Call, contents: bool, moving: Mapping[str, Tensor]) -> None:
        self.parameters, self.moving = call.parameters, moving
        self.versions = versions_of(self.parameters.values())
        self.norms = _norms(self._measured()) if contents else []
        self.modes = {path: _modes(call.graph.module.get_submodule(path)) for path in call.graph.opaque}

    def check(self, call: Call) -> None:
        """Raise :class:`ChangedSinceForwardError` with the name of what is another now."""
        for name, before, now in zip(
            self.parameters, self.versions, versions_of(self.parameters.values()), strict=True
        ):
            if before != now:
                raise _changed(f"parameter '{name}'")
        moving = {id(self.moving[name]) for name in call.graph.changing_buffers if name in self.moving}
        for name, (tensor, version) in zip(call.graph.constants, call.run.originals, strict=True):
            if id(tensor) not in moving and not tensor.is_inference() and tensor._version != version:
                raise _changed(_called(name, tensor, call))
        if self.norms:
            measured = self._measured()
            for name, norm, norm_now in zip(measured, self.norms, _norms(measured), strict=True):
                # to rounding: another number of threads adds in another order
                if abs(norm - norm_now) > 1e-5 * abs(norm):
                    raise _changed(f"parameter '{name}'")
        for path, modes in self.modes.items():
            if _modes(call.graph.module.get_submodule(path)) != modes:
                raise _changed(f"the mode (train or eval) of module '{path}'")

    def _measured(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.parameters.items() if p.is_floating_point()}


def _changed(name: str) -> ChangedSinceForwardError:
    return ChangedSinceForwardError(
        "loss.backward()",
        f"{name}, changed since model(...) was called",
        "what the forward saw, which inference reads again",
        "Call backward before optimizer.step() and before the next batch is written into the same tensors, or give the "
        "model a copy (x.clone()). A bias counts too, of which autograd alone saves nothing.",
    )


def _called(name: str, tensor: Tensor, call: Call) -> str:
    """What the user calls a constant of the run: a buffer by its path, else the arguments that it is made of."""
    buffer = next((path for path, b in call.graph.module.named_buffers() if b is tensor), None)
    if buffer is not None:
        return f"buffer '{buffer}', which forward has read"
    given = [f"input '{each}'" for each in call.graph.inputs.get(name, ())]
    return f"{' and '.join(given) or 'a tensor'}, which forward has read"


def _norms(tensors: Mapping[str, Tensor]) -> list[float]:
    if not tensors:
        return []
    with torch.no_grad():
        rows = [t.detach()[(0,) * (t.ndim - 1)] if t.ndim else t.detach() for t in tensors.values()]
        return torch.stack([norm.float().cpu() for norm in torch._foreach_norm(rows)]).tolist()


def _modes(module: nn.Module) -> Mapping[str, bool]:
    return {name: part.training for name, part in module.named_modules()}
