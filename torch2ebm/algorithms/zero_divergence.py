"""Z-IL: predictive coding that equals backpropagation, since it reads each level at the right step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.common.checks import check_choice, check_positive
from torch2ebm.engine.call import Call, NodePass
from torch2ebm.engine.gradients import GradientSum, Swept
from torch2ebm.engine.results import InferenceState, LocalGradients
from torch2ebm.engine.reverse_sweep import reverse_sweep
from torch2ebm.errors import ConfigurationError
from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.loss.output_loss import OutputLoss

SCHEDULES = ("reverse", "levels")


@dataclass(frozen=True, repr=False)
class ZeroDivergence(Algorithm):
    """Exact gradients by local inference on any computational graph (Z-IL; Salvatori et al. 2022, Song et al. 2020).

    Also Torch2PC's Exact. Any loss will do, since the loss is needed at the feed-forward prediction only.

    Args:
        schedule: ``"levels"`` is the published schedule on the levelled graph: at step t all errors are computed, the
            nodes of level t take their parameters' gradients, then all values move at once. ``"reverse"`` (default)
            visits the nodes in reverse topological order, which gives the same numbers at the cost of one backprop.
        gamma: Step size of the values. Only 1 is exact; else a node of level d has gamma^d times backprop's gradient.
        compile: Changes nothing: the forward pass is the module's own run, and the sweep walks what it has left.

    Raises:
        ConfigurationError: for an unknown schedule, a ``gamma`` that is not positive and finite, or ``compile=True``
            with ``schedule="levels"``.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.ZeroDivergence(schedule="levels")
        ZeroDivergence(schedule='levels', gamma=1.0)
    """

    reevaluates_loss = False  # the output is read at step 0, at its feed-forward prediction

    schedule: str = "reverse"
    gamma: float = field(default=1.0, kw_only=True)
    compile: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_choice("ZeroDivergence", "schedule", self.schedule, SCHEDULES)
        check_positive("ZeroDivergence", gamma=self.gamma)
        if self.compile and self.schedule != "reverse":
            got, remedy = f"schedule={self.schedule!r}", "The literal schedule is there to be looked at, not for speed."
            raise ConfigurationError("ZeroDivergence(compile=True)", got, "schedule='reverse'", remedy)

    def __repr__(self) -> str:
        compiled = ", compile=True" if self.compile else ""
        return f"ZeroDivergence(schedule={self.schedule!r}, gamma={self.gamma!r}{compiled})"

    def forward(self, call: Call) -> None:
        call.feedforward(keep_graph=True)

    def backward(self, call: Call, kept: None, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        if self.schedule == "levels":
            # levelled: on a skip over k levels k - 1 identities hold a message back until its level is due
            return by_levels(call, call.graph.levelled(), loss.delivered, loss.unit, self.gamma)
        swept = self._reverse(call, loss.delivered, retain_graph)
        # minus: a delta is -e
        state = InferenceState(call.graph, call.batch_size, call.values, swept.deltas, -loss.unit)
        return LocalGradients(swept.gradients.parameters, call.input_gradients(swept.gradients.clamped), state)

    # pickles of 0.1 hold this bound method by its name
    def _reverse(self, call: Call, delivered: Mapping[str, Tensor], retain_graph: bool) -> Swept:
        return reverse_sweep(call, delivered, retain_graph, self.gamma)


def by_levels(
    call: Call, graph: EnergyGraph, delivered: Mapping[str, Tensor], unit: float, gamma: float
) -> LocalGradients:
    """The literal schedule of Salvatori et al. 2022; exact where ``graph`` is levelled.

    Everything is in the scale of the user's loss. The loss acts at level 0, at step 0, hence at the feed-forward
    prediction: the output's error is the delivered gradient throughout.
    """
    gradients = GradientSum()
    values = _feedforward_values(call, graph)
    moved: set[str] = set()
    # of the step at which each level is read; a step later its values have moved on
    errors_at_level: dict[str, Tensor] = {}
    for step in range(graph.depth + 1):
        changes: dict[str, Tensor] = {}
        for node in graph.nodes.values():
            if not node.is_output and moved.isdisjoint((*node.slots, *node.reads)):
                continue  # neither it nor its parents have moved: its error is exactly zero
            inputs = [values[slot].detach().requires_grad_() for slot in node.reads]  # leaves: no graph crosses a node
            with torch.enable_grad():
                # through the batch statistics: backprop differentiates them too, so frozen ones would not be exact
                evaluated = call.evaluate(node, inputs)
            own = _errors(evaluated, values, delivered)
            if node.level == step:
                # dL/dtheta = -(dmu/dtheta)^T e (Salvatori et al. 2022)
                gradients.add(call, evaluated, [None if e is None else -e for e in own], retain_graph=True)
                errors_at_level.update({slot: e for slot, e in zip(node.slots, own, strict=True) if e is not None})
            for slot, message in zip(node.reads, evaluated.pullback(own, inputs), strict=True):
                if message is not None:
                    changes[slot] = changes[slot] + message if slot in changes else message
            # an output has no value of its own that could move
            for slot, error in () if node.is_output else zip(node.slots, own, strict=True):
                if error is not None:
                    changes[slot] = changes[slot] - error if slot in changes else -error
        for slot, change in changes.items():  # v <- v + gamma (sum_c J_c^T e_c - e), all at once
            values[slot] = values[slot] + gamma * change
        moved.update(changes)
    # nodes without a path to the loss: zero, as the other schedule gives
    for node in graph.hidden_nodes:
        gradients.add_zeros(call, node)
    # without the identities of the levelling, which the user does not know
    errors = {slot: e for slot, e in errors_at_level.items() if slot in call.graph.owner}
    state = InferenceState(call.graph, call.batch_size, call.values, errors, unit)
    return LocalGradients(gradients.parameters, call.input_gradients(gradients.clamped), state)


def _feedforward_values(call: Call, graph: EnergyGraph) -> dict[str, Tensor]:
    values = {slot: value.detach() for slot, value in call.values.items()}
    # in topological order, so that a chain of identities is filled from its start
    for node in graph.nodes.values():
        if node.slots[0] not in values:  # an identity node of the levelling
            values[node.slots[0]] = values[node.reads[0]]
    return values


def _errors(evaluated: NodePass, values: Mapping[str, Tensor], delivered: Mapping[str, Tensor]) -> list[Tensor | None]:
    if evaluated.node.is_output:
        return [-delivered[slot] if slot in delivered else None for slot in evaluated.node.slots]  # e_o = -dL/dmu_o
    slots = zip(evaluated.node.slots, evaluated.predictions, strict=True)
    return [values[slot] - prediction.detach() for slot, prediction in slots]
