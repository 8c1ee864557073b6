"""Whether an optimizer, a model and an algorithm belong together, and how each is attached."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer

from torch2ebm.algorithms.base import Algorithm, check_algorithm
from torch2ebm.errors import AttachmentError
from torch2ebm.model.energy_model import EnergyModel
from torch2ebm.potentials.energy_check import check_energy_gradients
from torch2ebm.reports.progress_line import Progress

WHERE: Final = "EnergyOptimizer(optimizer, model, algorithm)"


def check_parts(optimizer: object, model: object, algorithm: object, monitor: object, wrapper: type[Optimizer]) -> None:
    """Raises :class:`AttachmentError` for what is no optimizer, no algorithm or no monitor, and for another order.

    Energies of the user's own are held against their gradients: :class:`EnergyGradientError`.
    """
    kinds = [_kind(part) for part in (optimizer, model, algorithm)]
    if kinds != ["optimizer", "model", "algorithm"] and sorted(kinds) == ["algorithm", "model", "optimizer"]:
        raise AttachmentError(
            WHERE,
            f"a {type(optimizer).__name__} as the optimizer, a {type(model).__name__} as the model and a "
            f"{type(algorithm).__name__} as the algorithm",
            "the optimizer, then the model, then the algorithm",
            f"Write EnergyOptimizer({', '.join(_names_of(optimizer, model, algorithm))}).",
        )
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, wrapper):
        raise AttachmentError(
            WHERE,
            f"{type(optimizer).__name__} as the optimizer",
            "a torch.optim.Optimizer that is not wrapped yet",
            "Pass the optimizer itself, for example torch.optim.Adam(net.parameters()).",
        )
    check_algorithm(WHERE, algorithm, AttachmentError)
    check_energy_gradients(getattr(algorithm, "energies", {}))
    if monitor is not None and not callable(monitor):
        raise AttachmentError(
            WHERE,
            f"{monitor!r} as the monitor",
            "a function of (name, value, step)",
            "For example SummaryWriter().add_scalar.",
        )
    if isinstance(monitor, Progress):
        raise AttachmentError(
            WHERE,
            "a Progress as the monitor",
            "a function of (name, value, step)",
            f"It watches the steps of a relaxation: {type(algorithm).__name__}(on_step=Progress()), where it has that.",
        )


def _kind(part: object) -> str:
    kinds = {"optimizer": Optimizer, "model": nn.Module, "algorithm": Algorithm}
    return next((name for name, kind in kinds.items() if isinstance(part, kind)), "")


def _names_of(*parts: object) -> Iterator[str]:
    for kind in ("optimizer", "model", "algorithm"):
        part = next(part for part in parts if _kind(part) == kind)
        yield repr(part) if kind == "algorithm" else kind


def unwrapped(model: nn.Module) -> EnergyModel:
    """The converted model inside the wrappers that are known."""
    inner: Any = model
    while not isinstance(inner, EnergyModel):
        inner = getattr(inner, "_orig_mod", None) or (
            getattr(inner, "module", None) if isinstance(inner, nn.Module) else None
        )
        if not isinstance(inner, nn.Module):
            raise AttachmentError(
                WHERE,
                f"a {type(model).__name__}",
                "a model made by torch2ebm.convert, or a wrapper of one",
                "Convert it first: torch2ebm.convert(net).",
            )
    return inner


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All that it steps, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def attach(wrapper: Any, model: EnergyModel, algorithm: Algorithm, replace: bool) -> None:
    """Attach it alone, in the place of others, or beside others that step other parameters by the same algorithm.

    Raises:
        AttachmentError: where it steps no parameter of the model, and where it cannot stand beside those attached.
    """
    conversion = model.torch2ebm
    if conversion.attached and not replace:
        gc.collect()  # a trainer that is gone keeps its optimizer until its cycles are collected
    others = conversion.holders
    own, models = set(map(id, parameters_of(wrapper))), set(map(id, conversion.trained_parameters().values()))
    if not others or replace:
        if not own & (models | set(map(id, algorithm.learned.values()))):
            raise _of_others(wrapper.optimizer, model)
        for other in others:
            other.detach()
        conversion.attach(algorithm, wrapper)
    else:
        _check_beside(wrapper, others, own, algorithm)
        conversion.attach_beside(wrapper)
    wrapper._steps.watch(wrapper.optimizer)


def _check_beside(wrapper: Any, others: list[Any], own: set[int], algorithm: Algorithm) -> None:
    taken = {id(p) for other in others if isinstance(other, Optimizer) for p in parameters_of(other)}
    attached = wrapper.model.torch2ebm.algorithm
    fits = algorithm == attached and bool(taken) and not own & taken
    if fits and not algorithm.weights_move:
        return
    reason = "Another optimizer may stand beside it with other parameters and the same algorithm."
    if fits:
        reason = f"The weights of {type(algorithm).__name__} move together: one optimizer with several groups has both."
    raise AttachmentError(
        "EnergyOptimizer(model)",
        f"a model with {attached!r} attached",
        "a model without an algorithm",
        "Call detach() on the optimizer that is attached, or on the model; to take its place, as where a notebook's "
        f"cell runs again, pass replace=True. {reason}",
    )


def _of_others(optimizer: Optimizer, model: EnergyModel) -> AttachmentError:
    module = type(model.torch2ebm.module).__name__
    return AttachmentError(
        WHERE,
        f"a {type(optimizer).__name__} that steps no parameter of this {module}",
        "an optimizer of the model's parameters",
        "A copy has parameters of its own: make the optimizer of the model that you train, for example "
        f"torch.optim.{type(optimizer).__name__}(model.parameters(), ...), after every copy and replacement.",
    )
