"""What looks at a call and its loss as an algorithm's backward gets them, and gives no gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.engine.call import Call
from torch2ebm.engine.energies import Energy
from torch2ebm.engine.precision import Precision
from torch2ebm.engine.results import InferenceState, LocalGradients
from torch2ebm.errors import LossNotRecordedError
from torch2ebm.inference.curvature import Curvature, check_measurement, measured_curvature
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.potentials.node_energies import check_free, check_names, node_energies


def given_to(
    lossy: Callable[[Algorithm], Tensor], trained: Sequence[Tensor], loss_reduction: str
) -> tuple[Call, OutputLoss]:
    """The call and the loss that an algorithm's backward would get, for a loss that is computed by way of it."""
    given = Given(loss_reduction)
    with torch.enable_grad():
        loss = lossy(given)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise LossNotRecordedError("loss_fn", got, "a tensor of no dimension", "Reduce the loss to one number.")
        # retained: this backward is over, and the call is about to be used
        torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    return given.found[0]


def curvature_of(
    lossy: Callable[[Algorithm], Tensor],
    trained: Sequence[Tensor],
    *,
    precisions: Mapping[str, float | Tensor | Precision] | None = None,
    energies: Mapping[str, Energy] | None = None,
    loss_reduction: str = "mean",
    products: int = 100,
    tol: float = 1e-8,
) -> Curvature:
    """How curved such a loss is in the errors; the settings are those of ``model.curvature``."""
    check_measurement(loss_reduction, products, tol)
    named = node_energies("model.curvature", precisions or {}, energies or {})
    call, loss = given_to(lossy, trained, loss_reduction)
    check_names("model.curvature", named, call.graph)
    check_free("model.curvature", named)
    return measured_curvature(call, loss, named, products, tol)


class Given(Algorithm):
    """Keeps what ``backward`` is given, and gives no gradient."""

    def __init__(self, loss_reduction: str) -> None:
        self.loss_reduction: str = loss_reduction
        self.found: list[tuple[Call, OutputLoss]] = []

    def forward(self, call: Call) -> None:
        call.feedforward(keep_graph=True)

    def backward(self, call: Call, kept: None, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        self.found.append((call, loss))
        state = InferenceState(call.graph, call.batch_size, call.values, {})
        return LocalGradients({}, [None] * len(call.tensors), state)
