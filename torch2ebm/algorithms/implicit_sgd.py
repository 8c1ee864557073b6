"""Implicit SGD by inference: relax the values on the proximal objective, then take the smallest step to them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.common.checks import check_positive, check_tolerance
from torch2ebm.common.users_code import users_level
from torch2ebm.engine.call import Call
from torch2ebm.engine.results import InferenceState, LocalGradients, Relaxation
from torch2ebm.engine.signal import Cures, tell_where_there_is_no_signal
from torch2ebm.errors import ConfigurationError, NonFiniteError, NotSettledWarning
from torch2ebm.implicit.dense_layers import DenseLayer, dense_layers
from torch2ebm.implicit.local_terms import LocalTerm
from torch2ebm.implicit.newton import Minimum, is_finite, minimise
from torch2ebm.implicit.objective import ProximalObjective, ProximalPoint
from torch2ebm.implicit.parameter_steps import ParameterPoint
from torch2ebm.inference.base import LOSS
from torch2ebm.loss.output_loss import OutputLoss

TOLERANCES = {torch.float64: 1e-10}  # by the precision that values are kept in
COARSE = 1e-5  # in single precision rounding leaves about a tenth of this of a gradient of order one
SEVERAL_MINIMA = 1.0  # an alpha above it is also reached from smaller ones,
CONTINUATION = 4.0  # each so many times the one before
MAX_STEPS = 100
_CURES = Cures(flat="the loss has no slope at this output, or the last layer reads nothing but zeros.")
PATIENCE = 20  # Newton steps in values; most batches take 4 to 15


@dataclass(frozen=True)
class ImplicitSGD(Algorithm):
    """The exact step of implicit SGD, found by inference (Alonso et al. 2022, theorem on the proximal operator).

    ``theta+ = argmin L(theta') + |theta' - theta|^2 / (2 alpha)``, that is ``theta - alpha grad L(theta+)``. The values
    of the dense layers relax on L plus, for each layer, what it would cost its parameters to produce its value; the
    output's value is free too. Then the layers take that smallest step, and a feed-forward pass reproduces the values.

    ``.grad`` is ``-(theta+ - theta)``: use it with ``torch.optim.SGD(params, lr=1.0)``, without momentum. The step
    size is ``alpha``. What is no part of the loss (accumulation, a gradient scaler) scales ``.grad`` and nothing else.
    The loss is taken as it is written: L of a batch is one function, whether a mean or a sum over samples.

    Every trainable parameter has to be the weight or bias of a dense layer (``nn.Linear``) that one node reads, with
    one row of inputs a sample. Between such layers anything goes that can be differentiated twice. Values may come to
    rest on a kink at 0 (ReLU and its like); the residual is then that of the best subgradient. Where ``alpha`` is
    large the objective has several minima: above 1 the lower one is taken of that to which descent from the
    feed-forward pass leads, and that on the branch which leaves it as ``alpha`` grows.
    Where no value has such a kink and 20 Newton steps on the values do not reach ``tol``, it goes on from there in the
    changes of the parameters, on the same objective. Rounding, a kink elsewhere, or kinks in a batch larger than a
    layer's fan-in can stop it before: a ``NotSettledWarning`` says so once, ``state.relaxation`` of every batch.

    Args:
        alpha: Step size of implicit SGD.
        tol: Largest entry of ``grad L(theta+) + (theta+ - theta) / alpha`` to reach. None: 1e-10 in double and 1e-5
            in single precision. A ``tol`` that is not met gives ``relaxation.converged = False``.
        max_steps: Most Newton steps.

    Raises:
        ConfigurationError: for an ``alpha`` that is not positive and finite, a negative ``tol``, fewer than one step.
        DenseLayerError: during backward, naming the nodes that are no dense layer.
        UnsupportedError: during backward, for an operation without a second derivative.

    Example:
        >>> import torch, torch2ebm
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=1.0)
        >>> optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.ImplicitSGD(alpha=0.5))
        >>> torch.nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
        >>> optimizer.step()
        >>> model.state.relaxation.converged
        True
    """

    partition = "preactivation"
    has_input_gradients = False  # .grad is a step of parameters and no gradient: none for an input to pass on
    loss_reduction = "sum"  # L is relaxed as written, also where it is a mean

    alpha: float = 0.1
    tol: float | None = None
    max_steps: int = field(default=MAX_STEPS, kw_only=True)

    def __post_init__(self) -> None:
        check_positive("ImplicitSGD", alpha=self.alpha)
        if self.tol is not None:
            check_tolerance("ImplicitSGD", self.tol)
        if not isinstance(self.max_steps, int) or isinstance(self.max_steps, bool) or self.max_steps < 1:
            got = repr(self.max_steps)
            raise ConfigurationError("ImplicitSGD(max_steps=...)", got, "a whole number, 1 or more", "Choose another.")

    def forward(self, call: Call) -> None:
        call.feedforward(keep_graph=False)  # values move: every node is evaluated anew, twice differentiable

    def backward(self, call: Call, kept: None, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        layers = dense_layers(call)
        direct = self._minimum(ProximalObjective(call, loss, layers, self.alpha).start())
        # one that met the tolerance before one that did not, then the lower objective
        minimum = min(
            [direct, *self._followed(call, loss, layers)], key=lambda found: (not found.converged, found.point.value)
        )
        tol = self._tolerance(minimum.point.values.values())
        relaxation = _report(minimum, tol)
        if relaxation.converged is False:
            call.graph.once("ImplicitSGD at rest", lambda: self._told_that_it_moves(relaxation))
        found = _local_gradients(call, loss.scale, layers, _point(minimum).terms, relaxation)
        call.graph.once(
            ("signal", ImplicitSGD),
            lambda: tell_where_there_is_no_signal("ImplicitSGD", found.state, found.parameters, cures=_CURES),
        )
        return found

    def _minimum(self, start: ProximalPoint | ParameterPoint, tol: float | None = None) -> Minimum:
        tol = self._tolerance(start.values.values()) if tol is None else tol
        if isinstance(start, ParameterPoint):
            return minimise(start, tol, self.max_steps)
        found = minimise(start, tol, min(self.max_steps, PATIENCE) if start.is_smooth else self.max_steps)
        if found.converged or not start.is_smooth or found.steps == self.max_steps:
            return found
        # the same place in coordinates that do not turn with the layers before
        return found.then(
            minimise(ParameterPoint.at(cast(ProximalPoint, found.point)), tol, self.max_steps - found.steps)
        )

    def _followed(self, call: Call, loss: OutputLoss, layers: Mapping[str, DenseLayer]) -> Iterator[Minimum]:
        """Where there may be several minima: the one on the branch that leaves the feed-forward pass as alpha grows."""
        alphas = [self.alpha]  # largest first
        while alphas[-1] > SEVERAL_MINIMA:
            alphas.append(alphas[-1] / CONTINUATION)
        point: ProximalPoint | ParameterPoint = ProximalObjective(call, loss, layers, alphas[-1]).start()
        for following in alphas[-2::-1]:
            # coarse on the way: it is only the next alpha's start
            found = _point(self._minimum(point, COARSE))
            point = found.under(ProximalObjective(call, loss, layers, following))
        if len(alphas) > 1:
            yield self._minimum(point)

    def _told_that_it_moves(self, relaxation: Relaxation) -> bool:
        """Once a graph: later batches say it in their report. Who asks for few steps gets what those lead to."""
        ran_out = relaxation.steps >= self.max_steps
        if ran_out and self.max_steps < MAX_STEPS:
            return False
        why = f"all {self.max_steps} steps are done" if ran_out else "rounding or a kink lets no step lead down"
        remedy = f"Take max_steps={4 * self.max_steps}" if ran_out else f"Take a tol above {relaxation.residual:.0e}"
        warnings.warn(
            NotSettledWarning(
                f"ImplicitSGD(alpha={self.alpha:g}) is not at rest, so .grad is not the implicit step: {why}, and the "
                f"proximal objective's gradient is {relaxation.residual:.1e}, above tol={relaxation.tol:.0e}. "
                f"{remedy}, or a smaller alpha. state.relaxation.converged says it of every batch."
            ),
            stacklevel=users_level(),
        )
        return True

    def with_steps(self, steps: int) -> ImplicitSGD:
        return replace(self, max_steps=steps)

    def _tolerance(self, values: Iterable[Tensor]) -> float:
        if self.tol is not None:
            return self.tol
        # the coarsest dtype among the values says what can be reached
        return max((TOLERANCES.get(value.dtype, COARSE) for value in values), default=COARSE)


def _local_gradients(
    call: Call, scale: float, layers: Mapping[str, DenseLayer], terms: Sequence[LocalTerm], relaxation: Relaxation
) -> LocalGradients:
    gradients: dict[str, Tensor] = {}
    predictions: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    for term in terms:
        predictions.update({s: p.detach() for s, p in zip(term.node.slots, term.predictions, strict=True)})
        if term.own is not None:
            slot = term.node.slots[0]
            errors[slot] = term.error.detach().reshape(predictions[slot].shape)
            step = layers[term.node.name].gradients(*term.step())
            gradients.update(
                {name: _as_gradient(change, scale, call.parameters[name]) for name, change in step.items()}
            )
    state = InferenceState(call.graph, call.batch_size, predictions, errors, relaxation=relaxation)
    return LocalGradients(gradients, [None] * len(call.tensors), state)  # see has_input_gradients


def _as_gradient(change: Tensor, scale: float, parameter: Tensor) -> Tensor:
    # minus: SGD(lr=1.0) subtracts .grad, and shall land on theta+ = theta + change
    return (-scale * change).to(parameter.dtype)


def _point(minimum: Minimum) -> ProximalPoint | ParameterPoint:
    return cast("ProximalPoint | ParameterPoint", minimum.point)


def _report(minimum: Minimum, tol: float) -> Relaxation:
    """Raises :class:`NonFiniteError` where the loss at the start, or the gradient at the end, is no number."""
    energy = tuple(sum(parts.values()) for parts in minimum.history)
    remedy = "Look for NaN or infinity in the input, the target and the parameters."
    if not math.isfinite(energy[0]):
        got, where = f"energy {energy[0]}", "the loss, feed-forward pass (inference step 0)"
        raise NonFiniteError(where, got, "a finite number", remedy)
    # an infinity that an activation hides from the loss
    if not minimum.converged and not (math.isfinite(minimum.point.residual) and is_finite(minimum.point)):
        got, where = f"a gradient of {minimum.point.residual}", f"ImplicitSGD, inference step {minimum.steps}"
        raise NonFiniteError(where, got, "finite numbers", remedy)
    names = [name for name in minimum.history[0] if name != LOSS]
    return Relaxation(
        minimum.steps,
        minimum.converged if tol > 0 else None,
        minimum.point.residual,
        energy,
        {name: tuple(parts[name] for parts in minimum.history) for name in names},
        tuple(parts[LOSS] for parts in minimum.history),
        tol=tol,
    )
