"""Gradient descent on one node after another, from the output back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from torch2ebm.common.checks import check_positive, check_steps, check_tolerance
from torch2ebm.engine.call import NodePass
from torch2ebm.graph.energy_graph import Node
from torch2ebm.inference.base import LOSS
from torch2ebm.inference.solver import ValueSolver
from torch2ebm.inference.value_inference import ValueInference


@dataclass(frozen=True)
class SequentialDescent(ValueSolver):
    """``v <- v - lr / (1 + t) dF/dv`` in reverse order, each node at the values that the moves before have left.

    Sequential inference learning (Alonso et al. 2023): a single step carries the error to all
    nodes, so few steps are enough. A child of several parents is evaluated again for each that moves.

    Args:
        steps: Most inference steps.
        lr: Step size of the first step; step t has ``lr / (1 + t)``, counted from 0.
        tol: Stop when no entry of dF/dv exceeds it in any node or sample; 0 does all steps.

    Raises:
        ConfigurationError: for a step size that is not positive and finite, fewer than one step, a negative ``tol``.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.PredictiveCoding(solver=torch2ebm.SequentialDescent(steps=3, lr=0.5)).solver.steps
        3
    """

    steps: int = 3
    lr: float = 0.1
    tol: float = 0.0

    def __post_init__(self) -> None:
        check_steps("SequentialDescent", self.steps)
        check_positive("SequentialDescent", lr=self.lr)
        check_tolerance("SequentialDescent", self.tol)

    def with_steps(self, steps: int) -> SequentialDescent:
        return replace(self, steps=steps)

    def start(self, inference: ValueInference) -> int:
        return 0  # t, which the step size is divided by

    def step(self, inference: ValueInference, state: int) -> int:
        inference.begin_sweep()
        sweep = _Sweep(inference)
        # first, so that the history has the loss at the values where the step began
        sweep.messages_of_outputs()
        for node in reversed(inference.graph.hidden_nodes):
            messages = sweep.messages_to(node)
            if not messages and not inference.is_active(node):  # e = 0, and nothing pulls
                continue
            # lr / (1 + t), the schedule of Alonso et al. 2023
            for slot, gradient in inference.completed(node, sweep.own_gradients(node), messages):
                inference.move(slot, gradient, -self.lr / (1 + state))
            sweep.has_moved(node)
        return state + 1


class _Sweep:
    """Evaluations and messages at the current values; those of a node are dropped once one of its parents moves."""

    def __init__(self, inference: ValueInference) -> None:
        self.inference = inference
        self.passes: dict[str, NodePass] = {}
        self.sent: dict[str, dict[str, Tensor]] = {}  # by child; outputs, which share a loss, under its name

    def own_gradients(self, node: Node) -> Sequence[Tensor]:
        """dphi/dv of a node; neither it nor its parents have moved in this sweep."""
        errors, predictions = self._errors(node)
        return self.inference.pulls_into_history(node, errors, predictions)[0]

    def messages_to(self, node: Node) -> dict[str, Tensor]:
        """The sum of what all children send to each slot of the node."""
        children = [self.inference.graph.nodes[name] for name in node.children]
        sent = [self._of_child(child) for child in children if not child.is_output]
        # once for all outputs: they share a loss, and have one message dict
        if any(child.is_output for child in children):
            sent.append(self.messages_of_outputs())
        total: dict[str, Tensor] = {}
        for messages in sent:
            # a child's messages are for all of its parents; the others take theirs in their own turn
            for slot in messages.keys() & set(node.slots):
                total[slot] = total[slot] + messages[slot] if slot in total else messages[slot]
        return total

    def has_moved(self, node: Node) -> None:
        for name in node.children:
            # the children predict from it: their predictions, errors and messages are stale
            self.passes.pop(name, None)
            self.sent.pop(LOSS if self.inference.graph.nodes[name].is_output else name, None)

    def _pass_of(self, node: Node) -> NodePass:
        if node.name not in self.passes:
            self.passes[node.name] = self.inference.evaluate(node, requires_grad=True)
        return self.passes[node.name]

    def _errors(self, node: Node) -> tuple[list[Tensor], Sequence[Tensor]]:
        predictions = self._pass_of(node).predictions
        return self.inference.subtract(node, predictions), predictions

    def _of_child(self, child: Node) -> dict[str, Tensor]:
        if child.name not in self.sent:
            messages: dict[str, Tensor] = {}
            if self.inference.is_active(child):
                # not into the history: the energy of a step is that of its start
                cotangents = self.inference.pulls(child, *self._errors(child))[1]
                self.inference.send(self._pass_of(child), cotangents, messages)
            self.sent[child.name] = messages
            self.passes.pop(child.name, None)  # its graph is used up
        return self.sent[child.name]

    def messages_of_outputs(self) -> dict[str, Tensor]:
        if LOSS not in self.sent:
            messages: dict[str, Tensor] = {}
            passes = [self.inference.evaluate(node, requires_grad=True) for node in self.inference.graph.output_nodes]
            before = self.inference.history[-1].get(LOSS)
            errors = self.inference.output_errors(passes)
            if before is not None:  # the energy of a step is that of its start
                self.inference.history[-1][LOSS] = before
            for evaluated in passes:
                self.inference.send(evaluated, [errors.get(slot) for slot in evaluated.node.slots], messages)
            self.sent[LOSS] = messages
        return self.sent[LOSS]
