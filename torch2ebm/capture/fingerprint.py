"""The objects a module consists of, so that a model notices when they are others."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from torch2ebm.errors import ModuleChangedError


@dataclass(frozen=True)
class Fingerprint:
    """The objects a module consists of. Holding them keeps an address from being used again."""

    modules: tuple[nn.Module, ...]
    parameters: tuple[nn.Parameter | None, ...]

    @staticmethod
    def of(module: nn.Module) -> Fingerprint:
        modules = [module]
        for each in modules:  # grows while it is walked; a shared submodule may come twice
            modules += [child for child in each._modules.values() if child is not None]
        parameters = [p for each in modules for p in each._parameters.values()]
        return Fingerprint(tuple(modules), tuple(parameters))

    def same_objects(self, other: Fingerprint) -> bool:
        return (
            len(self.modules) == len(other.modules)
            and len(self.parameters) == len(other.parameters)
            and all(map(operator.is_, self.modules, other.modules))
            and all(map(operator.is_, self.parameters, other.parameters))
        )


def swapped_parameters(
    before: Fingerprint, now: Fingerprint, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """By name the tensors that ``torch.func.functional_call`` has put in the place of ``parameters``.

    Raises :class:`ModuleChangedError` where layers or parameters were really replaced.
    """
    same_layers = len(before.modules) == len(now.modules) and all(map(operator.is_, before.modules, now.modules))
    if not same_layers or len(before.parameters) != len(now.parameters) or not inside_functional_call():
        raise ModuleChangedError(
            f"EnergyModel({type(now.modules[0]).__name__})",
            _changes(before, now),
            "the layers and parameters that torch2ebm.convert saw",
            "Convert the changed module again (fully_shard first, convert after), or detach() the optimizer and attach "
            "one that has the new parameters; change parameters in place (copy_, data) to keep both.",
        )
    names = {id(parameter): name for name, parameter in parameters.items()}
    pairs = zip(before.parameters, now.parameters, strict=True)
    return {names[id(old)]: new for old, new in pairs if old is not None and new is not None and new is not old}


def inside_functional_call() -> bool:
    """Whether ``torch.func.functional_call`` is on the stack: only it may put other tensors in a module's place."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "functional_call" and frame.f_globals["__name__"].startswith("torch."):
            return True
        frame = frame.f_back
    return False


def _changes(before: Fingerprint, now: Fingerprint) -> str:
    known = set(map(id, (*before.modules, *before.parameters)))
    modules = [type(m).__name__ for m in now.modules if id(m) not in known]
    parameters = [str(tuple(p.shape)) for p in now.parameters if p is not None and id(p) not in known]
    found = [f"new layers {', '.join(modules)}"] * bool(modules) + [f"new parameters {', '.join(parameters)}"] * bool(
        parameters
    )
    return (
        " and ".join(found)
        or f"{len(now.modules)} layers and {len(now.parameters)} parameters, in another order or number"
    )
