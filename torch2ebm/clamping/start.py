"""Where values begin that do not begin at the feed-forward pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch2ebm.engine.call import at_least_single
from torch2ebm.engine.results import InferenceState
from torch2ebm.inference.base import Inference
from torch2ebm.inference.error_inference import ErrorInference
from torch2ebm.inference.value_inference import ValueInference

INFERRED, NUDGED, NUDGED_BACK = "inferred", "nudged", "nudged back"  # the phases whose values are kept


def begin_at(inference: Inference, starts: Mapping[str, Tensor]) -> None:
    """Put values where they begin, before the first step; what follows from them is predicted again.

    Args:
        inference: The values, or the errors, where the feed-forward pass has left them.
        starts: By hidden slot, in the shape of the value.
    """
    changed: set[str] = set()
    for node in inference.graph.hidden_nodes if starts else ():
        if not changed.isdisjoint(node.reads):
            predictions = [at_least_single(p) for p in inference.evaluate(node, requires_grad=False).predictions]
            changed.update(node.slots)
        else:
            predictions = [inference.values[slot] for slot in node.slots]
        for slot, prediction in zip(node.slots, predictions, strict=True):
            inference.values[slot] = prediction
            if slot in starts:
                changed.add(slot)
                _put(inference, slot, starts[slot].to(prediction), prediction)


def kept_start(inference: Inference, kind: str, *phases: str) -> Mapping[str, Tensor]:
    """By slot, where the values of the batch before have ended; nothing where there is none that fits.

    Args:
        inference: The values, or the errors, where the feed-forward pass has left them.
        kind: ``"feedforward"``, ``"last"`` or ``"average"``.
        phases: Whose values; the first that is there.
    """
    shapes = {slot: value.shape for slot, value in inference.values.items()}
    return inference.call.memory.start(kind, phases, shapes)


def ended_at(state: InferenceState) -> dict[str, Tensor]:
    """Where the values have ended, by slot. Those that no error has reached are not among them: they follow."""
    hidden = {slot for node in state.graph.hidden_nodes for slot in node.slots}
    return {
        slot: state.predictions[slot].detach() + error.detach() * state.error_unit
        for slot, error in state.errors.items()
        if slot in hidden
    }


def _put(inference: Inference, slot: str, value: Tensor, prediction: Tensor) -> None:
    inference.values[slot] = value.detach().clone()
    if isinstance(inference, ErrorInference):
        inference.errors[slot] = torch.sub(value.detach(), prediction)
    elif isinstance(inference, ValueInference):
        inference.moved.add(slot)
