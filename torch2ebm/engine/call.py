"""Value and error buffers of one call, and the frozen result that a backward leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch2ebm.capture.run import Run
from torch2ebm.graph.energy_graph import EnergyGraph, Node
from torch2ebm.isolation.batch_statistics import (
    Statistics,
    frozen_statistics,
    keeping_statistics,
    live_statistics,
    statistics_of,
)
from torch2ebm.isolation.interrupts import within
from torch2ebm.isolation.module_state import BufferSnapshot, nothing_packed
from torch2ebm.isolation.random_numbers import Draws, RandomState, Repeated
from torch2ebm.isolation.torch_modes import entered
from torch2ebm.memory.last_values import CallMemory

_ENGINE = torch.autograd.Variable._execution_engine  # what torch.autograd.grad calls; its checks cost 20 us a node


@dataclass(frozen=True, slots=True, eq=False)
class NodePass:
    """One evaluation of a node whose inputs are leaves: the autograd graph of this node, and of no other.

    Attributes:
        node: What was evaluated.
        inputs: One leaf for each of ``node.reads``, in the shape of the value that it stands for.
        predictions: One for each of ``node.slots``, for example ``[batch, features]``.

    Example:
        The examples of the methods go on from this one.

        >>> import torch
        >>> from torch2ebm.extend import call_and_loss
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
        >>> last = call.passes["2"]
        >>> last.inputs[0].shape, last.predictions[0].shape
        (torch.Size([5, 8]), torch.Size([5, 3]))
    """

    node: Node
    inputs: tuple[Tensor, ...]
    predictions: tuple[Tensor, ...]

    def pullback(
        self, cotangents: Sequence[Tensor | None], wrt: Sequence[Tensor], retain_graph: bool = False
    ) -> Sequence[Tensor | None]:
        """Vector-Jacobian products of this node: ``J^T cotangent``.

        Args:
            cotangents: One for each slot, in the shape of its prediction; None is zero.
            wrt: Leaves to differentiate with respect to: ``inputs``, parameters, clamped inputs.
            retain_graph: Whether the pass will be used again.

        Returns:
            One product for each of ``wrt``, in its shape, summed over the batch for a parameter. None is zero.

        Example:
            >>> (message,) = last.pullback([torch.ones(5, 3)], last.inputs)
            >>> torch.allclose(message, torch.ones(5, 3) @ net[2].weight)
            True
        """
        more = _leaves_beside(wrt, self.inputs) if self.node.group_norm else []
        return pull_back(self.predictions, cotangents, [*wrt, *more], retain_graph)[: len(wrt)]


def _leaves_beside(wrt: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Torch 2.13's group norm crashes, in channels_last on a CPU, where its input's gradient is not wanted too."""
    return [each for each in inputs if each.requires_grad and all(each is not other for other in wrt)]


def pull_back(
    predictions: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    wrt: Sequence[Tensor],
    retain_graph: bool = False,
) -> Sequence[Tensor | None]:
    """J^T of the predictions, of one node or of several, applied to one cotangent each (None: zero)."""
    pairs = [
        (prediction, cotangent if cotangent.dtype == prediction.dtype else cotangent.to(prediction.dtype))
        for prediction, cotangent in zip(predictions, cotangents, strict=True)
        if cotangent is not None and prediction.requires_grad
    ]
    if not pairs or not wrt:
        return (None,) * len(wrt)
    outputs, directions = zip(*pairs, strict=True)
    found: tuple[Tensor | None, ...] = _ENGINE.run_backward(
        outputs, directions, retain_graph, False, tuple(wrt), allow_unreachable=True, accumulate_grad=False
    )
    return found


class Call:
    """What one forward call leaves for its backward.

    It belongs to the call, never to the module, so several forwards may be open at once. An algorithm gets a call, and
    makes none.

    Attributes:
        graph: The nodes, and how they compose to the model.
        run: The module's own run, which this call is about.
        tensors: Those from outside that require a gradient (an input, or what forward made of it before any
            parameter), as leaves.
        external: The same by name.
        batch_size: Size of the first dimension of the first input.
        device: That of the first input.
        values: The feed-forward value of every slot; with ``keep_graph`` each is a leaf that its readers share.
        parameters: The tensors that stand for the graph's parameters, in this call (``torch.func.functional_call``
            puts others in their place, which then are ``swapped``).
        environment: Clamped inputs and what else the feed-forward pass fixed, by name.
        passes: With ``keep_graph``, the evaluation of every node.
        memory: Where the values of the model's calls before have ended.
        frozen_statistics: Whether later evaluations keep the batch statistics of the feed-forward pass.

    Example:
        The examples of the methods go on from this one.

        >>> import torch
        >>> from torch2ebm.extend import call_and_loss
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x = torch.randn(5, 4)
        >>> call, loss = call_and_loss(net, x, lambda output: output.square().mean())
        >>> (hidden,) = call.graph.nodes["0"].slots
        >>> call.values[hidden].shape, list(call.parameters)
        (torch.Size([5, 8]), ['0.weight', '0.bias', '2.weight', '2.bias'])
    """

    def __init__(
        self,
        graph: EnergyGraph,
        run: Run,
        device: torch.device,
        batch_size: int = 1,
        swapped: Mapping[str, Tensor] = MappingProxyType({}),
        given: Mapping[str, Tensor] = MappingProxyType({}),
        memory: CallMemory | None = None,
    ) -> None:
        self.graph, self.run, self.device, self.batch_size = graph, run, device, batch_size
        self.memory = CallMemory() if memory is None else memory
        self.given = given  # constants beside those of the run: data in the place of values
        self.parameters: Mapping[str, Tensor] = {**graph.parameters, **swapped}
        self.swapped = swapped
        self.external = {graph.constants[place]: leaf for place, leaf in run.external_leaves.items()}
        self.tensors = list(self.external.values())
        self.values: dict[str, Tensor] = {}
        self.passes: dict[str, NodePass] = {}
        self.environment: dict[str, Any] = {}
        self.frozen_statistics = False
        self._random: dict[str, RandomState] = {}
        self._draws: dict[str, list[Tensor]] = {}
        self._statistics: dict[str, Statistics] = {}
        self._batches: dict[str, list[tuple[Tensor, Tensor | None]]] = {}  # of which no statistics were taken yet

    # the feed-forward pass

    def feedforward(
        self, keep_graph: bool, cut: bool = True, keep_draws: bool = False, freeze_statistics: bool = False
    ) -> None:
        """Take the feed-forward values of every node from the module's own run, which has just been.

        Args:
            keep_graph: Whether ``passes`` keeps the autograd graph of every node, for sweeps at these values.
            cut: Whether the graph ends at each node. Without it, it runs through all nodes; only backprop wants that.
            keep_draws: Whether later evaluations take the random numbers themselves, and not the generator's state.
            freeze_statistics: Whether batch norms keep the statistics of this pass, as constants, in later evaluations.
                Samples are then independent, but the limit of small nudges is not backprop.

        Example:
            >>> call.feedforward(keep_graph=False)
            >>> torch.allclose(call.values[hidden], net[:2](x))
            True
        """
        drawn = keep_draws and bool(self.graph.draws)
        self.frozen_statistics = freeze_statistics
        with torch.enable_grad():
            self.environment = {**self.graph.clamp(self.run), **self.given}
            if self.run.followed and self.graph.cuts is not None and cut and not drawn:
                self._adopt(keep_graph)
            else:
                # the module's own run has moved the buffers already
                buffers = dict(self.graph.module.named_buffers()) if self.graph.changing_buffers else {}
                moved = BufferSnapshot({name: buffers[name] for name in self.graph.changing_buffers if name in buffers})
                # a checkpoint that runs this again finds a run to adopt, which saves other tensors
                once = self.graph.cuts is not None and self.graph.cuts.complete and not self.run.followed
                # inside of an autograd function torch switches forward mode off
                with nothing_packed() if once else nullcontext(), forward_ad._set_fwd_grad_enabled(True):
                    within([moved.preserved()], lambda: self._compose(keep_graph, cut, drawn))

    def _adopt(self, keep_graph: bool) -> None:
        """Take what the run has left where it was cut."""
        run = self.run
        self.environment.update(run.exports)
        self._random = {node: run.random[first] for node, first in self.graph.draws.items()}
        for node in self.graph.order:
            inputs = tuple([self.values[slot] for slot in node.reads])
            if node.operations:
                predictions = tuple([run.predictions[slot] for slot in node.slots])
                leaves: Sequence[Tensor] = [run.leaves[slot] for slot in node.slots]
            else:  # an output that follows a value
                predictions = tuple(node.evaluate(inputs))
                leaves = [prediction.detach().requires_grad_(keep_graph) for prediction in predictions]
            for slot, leaf in zip(node.slots, leaves, strict=True):
                self.values[slot] = leaf if keep_graph else leaf.detach()
            if keep_graph and node.name in self.graph.nodes:
                self.passes[node.name] = NodePass(node, inputs, predictions)
            if node.batch_statistics and self.frozen_statistics:
                self._batches[node.name] = run.normalised[node.name]
        run.released()

    def _compose(self, keep_graph: bool, cut: bool, keep_draws: bool) -> None:
        """Evaluate every node once, in order, with the random numbers that the run has drawn."""
        if keep_draws:
            self._draws = {node.name: [] for node in self.graph.order if node.random}
        for node in self.graph.order:
            inputs = tuple(self.values[slot] for slot in node.reads)
            arguments = [*inputs, *[self.environment[name] for name in node.constants]]
            results = self._first_evaluation(node, arguments, self.frozen_statistics)
            predictions = tuple(results[: len(node.slots)])
            self.environment.update(zip(node.exports, _detached(results[len(node.slots) :]), strict=True))
            for slot, prediction in zip(node.slots, predictions, strict=True):
                self.values[slot] = prediction.detach().requires_grad_(keep_graph) if cut else prediction
            if keep_graph and cut and node.name in self.graph.nodes:
                self.passes[node.name] = NodePass(node, inputs, predictions)

    def _first_evaluation(self, node: Node, arguments: Sequence[Any], freeze_statistics: bool) -> Sequence[Any]:
        """Evaluate, and keep what later evaluations have to repeat."""
        if not node.random and not (node.batch_statistics and freeze_statistics):
            return node.evaluate(arguments)
        changes = []
        if node.random:
            state = self._state_before(node)
            self._random[node.name] = state or RandomState(self.device)
            if state is not None:
                changes.append(state.replayed())
        if node.name in self._draws:
            changes.append(entered(Draws(self._draws[node.name])))
        if node.batch_statistics and freeze_statistics:
            changes.append(entered(keeping_statistics(self._statistics.setdefault(node.name, []))))
        return within(changes, lambda: node.evaluate(arguments))

    def _state_before(self, node: Node) -> RandomState | None:
        """The generators as the run had them where it began to draw for this node."""
        first = self.graph.draws.get(node.name)
        return None if first is None else self.run.random.get(first)

    def output(self) -> list[Any]:
        """The leaves of the model's output, at the values as they are.

        Returns:
            For one output tensor a list of this one, for example of shape ``[batch, classes]``.

        Example:
            >>> [leaf.shape for leaf in call.output()]
            [torch.Size([5, 3])]
        """
        return self.graph.output(self.values, self.environment)

    @property
    def couples_samples(self) -> bool:
        """Whether a node's prediction for one sample depends on the values of others: live batch statistics.

        Example:
            >>> call.couples_samples
            False
        """
        return not self.frozen_statistics and any(node.batch_statistics for node in self.graph.nodes.values())

    # later evaluations

    def evaluate(self, node: Node, inputs: Sequence[Tensor]) -> NodePass:
        """The node again at other values: the same dropout masks, the batch statistics of these values.

        Args:
            node: One of ``graph.nodes``.
            inputs: A value for each of ``node.reads``; leaves that require a gradient, where one is wanted for them.

        Returns:
            The pass, with a graph of its own where gradients are enabled.

        Raises:
            NodeEvaluationError: where the node's function fails on these inputs.

        Example:
            >>> evaluated = call.evaluate(call.graph.nodes["2"], [torch.zeros(5, 8)])
            >>> torch.allclose(evaluated.predictions[0], net[2].bias)
            True
        """
        if node.group_norm:
            inputs = [each if each.requires_grad else each.detach().requires_grad_() for each in inputs]
        arguments = [*inputs, *[self.environment[name] for name in node.constants]]
        if not node.random and not node.batch_statistics:
            results = node.evaluate(arguments)
        else:
            changes = []
            if node.name in self._draws:
                changes.append(entered(Repeated(self._draws[node.name])))
            elif node.random:
                changes.append(self._random[node.name].replayed())
            if node.batch_statistics:
                kept = self._statistics_of(node) if self.frozen_statistics else None
                changes.append(entered(live_statistics() if kept is None else frozen_statistics(kept)))
            results = within(changes, lambda: node.evaluate(arguments))
        return NodePass(node, tuple(inputs), tuple(results[: len(node.slots)]))

    def _statistics_of(self, node: Node) -> Statistics:
        """Those of the feed-forward pass; taken of its batches when they are first asked for."""
        if (batches := self._batches.pop(node.name, None)) is not None:
            self._statistics[node.name] = [statistics_of(*each) for each in batches]
        return self._statistics[node.name]

    def forget_draws(self) -> None:
        """Repeat draws by the generators' states, which serves operations that mix their input with what they draw.

        Example:
            >>> call.forget_draws()
        """
        self._draws = {}

    def held(self) -> list[Tensor]:
        """All tensors that later evaluations read and that may be others in the next call.

        Returns:
            Parameters, buffers, clamped inputs, kept draws and batch statistics.

        Example:
            >>> any(tensor is net[0].weight for tensor in call.held())
            True
        """
        named = [*self.parameters.values(), *self.graph.module.buffers()]
        passed = [value for value in self.environment.values() if isinstance(value, Tensor)]
        drawn = [tensor for draws in self._draws.values() for tensor in draws]
        normalising = [node for node in self.graph.order if node.name in {**self._statistics, **self._batches}]
        statistics = [t for node in normalising for pair in self._statistics_of(node) for t in pair]
        return [*named, *passed, *drawn, *statistics]

    def clamped_inputs(self, node: Node) -> dict[str, Tensor]:
        """The clamped leaves that the node reads and that a gradient is wanted for.

        Args:
            node: One of ``graph.nodes``.

        Returns:
            By name; empty where no input of the model requires a gradient.

        Example:
            >>> call.clamped_inputs(call.graph.nodes["0"])
            {}
        """
        return {name: self.external[name] for name in node.constants if name in self.external}

    def input_gradients(self, messages: Mapping[str, Tensor]) -> list[Tensor | None]:
        """From gradients by name to one for each tensor that the caller gave.

        Args:
            messages: By name of the clamped leaf, in its shape and in the scale of ``.grad``: ``GradientSum.clamped``.

        Returns:
            One for each of ``tensors``, in its shape; None for one that nothing reaches.

        Example:
            >>> call.input_gradients({})
            []
        """
        return [messages.get(name) for name in self.external]


def at_least_single(tensor: Tensor, detach: bool = True) -> Tensor:
    """Detached, and in single precision where it was in half: small updates are lost there."""
    tensor = tensor.detach() if detach else tensor
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _detached(results: Sequence[Any]) -> list[Any]:
    return [result.detach() if isinstance(result, Tensor) else result for result in results]
