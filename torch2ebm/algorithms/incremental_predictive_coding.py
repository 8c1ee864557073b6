"""Incremental predictive coding: weights and values move together, at every inference step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace

import torch
from torch import Tensor

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.common.checks import check_positive, check_reduction, check_steps
from torch2ebm.engine.call import Call, NodePass
from torch2ebm.engine.energies import Energy
from torch2ebm.engine.gradients import GradientSum
from torch2ebm.engine.precision import Precision
from torch2ebm.engine.results import InferenceState, LocalGradients
from torch2ebm.engine.signal import Cures, steps_to_reach, tell_where_there_is_no_signal
from torch2ebm.errors import ConfigurationError
from torch2ebm.graph.energy_graph import Node
from torch2ebm.inference.history import Collected
from torch2ebm.inference.relaxation import report
from torch2ebm.inference.solver import Rest
from torch2ebm.inference.value_inference import ValueInference
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.potentials.energy_parameters import as_they_are, by_parameter, check_at_forward, check_learned
from torch2ebm.potentials.node_energies import NodeEnergies, check_free, check_names, node_energies

# where weights decay, a gradient is not zero, though it knows nothing of the loss
_CURES = Cures(learned="which learn nothing of the loss", behind=1)


@dataclass(frozen=True, repr=False)
class IncrementalPredictiveCoding(Algorithm):
    """Values and weights descend the energy together (iPC; Salvatori et al. 2022).

    ``loss.backward()`` does the first of ``steps`` inference steps and fills ``.grad`` with the local gradients of
    that moment. ``optimizer.step()`` then makes the wrapped optimizer's step, and ``steps - 1`` more: each on the
    gradients of its own inference step, at the values and the weights as they then are. The loop stays as it is; the
    optimizer counts ``steps`` steps a batch, and ``.grad`` is left as the first one saw it. After several backwards
    (accumulation) all batches relax side by side and their gradients add up. What is done to ``.grad`` between
    backward and step, clipping say, is done to the first step's only.

    The first gradient is taken where values still are the feed-forward pass, so ``steps=1`` teaches the output alone;
    an error reaches one level more at each step. ``state.relaxation.energy`` has the energy at the start of each step,
    at the weights of then, and where the values' last move has led; ``state.value`` and ``state.error`` are those that
    the last gradient was taken at. Divide a learning rate that suits backprop by about ``steps``.

    Args:
        steps: Inference steps, and steps of the optimizer, a batch.
        lr: Step size of the values.
        precisions: Node name to precision, a number or a tensor that broadcasts against the node's value; 1 elsewhere.
            A :class:`Precision` learns in your optimizer, one step for each inference step.
        energies: Node name to energy; Gaussian elsewhere.
        loss_reduction: ``"mean"`` for a loss that is a mean over the batch, ``"sum"`` to take it as it is written.

    Raises:
        ConfigurationError: for an illegal setting; in backward under a gradient scaler's factor above 1, which only
            the first step would be rid of.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.01)
        >>> optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.IncrementalPredictiveCoding(steps=5, lr=0.5))
        >>> torch.nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
        >>> optimizer.step()
        >>> model.state.relaxation.steps
        5
    """

    weights_move = True  # the optimizer asks for LocalGradients.later

    steps: int = 20
    lr: float = 0.1
    precisions: InitVar[Mapping[str, float | Tensor | Precision] | None] = field(default=None, kw_only=True)
    energies: Mapping[str, Energy] = field(default_factory=NodeEnergies, kw_only=True)
    loss_reduction: str = field(default="mean", kw_only=True)

    def __post_init__(self, precisions: Mapping[str, float | Tensor | Precision] | None) -> None:
        check_steps("IncrementalPredictiveCoding", self.steps)
        check_positive("IncrementalPredictiveCoding", lr=self.lr)
        check_reduction("IncrementalPredictiveCoding", self.loss_reduction)
        # a precision is a Gaussian energy
        energies = node_energies("IncrementalPredictiveCoding", precisions or {}, self.energies or {})
        object.__setattr__(self, "energies", energies)

    def __repr__(self) -> str:
        energies = f", energies={dict(self.energies)!r}" if self.energies else ""
        return (
            f"IncrementalPredictiveCoding(steps={self.steps}, lr={self.lr}{energies}, "
            f"loss_reduction={self.loss_reduction!r})"
        )

    def forward(self, call: Call) -> None:
        check_names("IncrementalPredictiveCoding", self.energies, call.graph)
        check_free("IncrementalPredictiveCoding", self.energies)
        call.feedforward(keep_graph=False)
        check_at_forward("IncrementalPredictiveCoding", self.energies, call)

    def backward(self, call: Call, kept: None, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        _check_factor(loss)
        inference = ValueInference(call, loss, self.energies, retain_call=retain_graph)
        steps = self._steps(inference)
        return replace(next(steps), later=steps)

    def with_steps(self, steps: int) -> IncrementalPredictiveCoding:
        return replace(self, steps=steps)

    # lazy: the optimizer moves the weights between two steps
    def _steps(self, inference: ValueInference) -> Iterator[LocalGradients]:
        for step in range(1, self.steps + 1):
            if step > 1:
                check_learned("IncrementalPredictiveCoding", self.energies)  # the optimizer has moved them
            # what model.state shows: the first step's after backward, the last one's after optimizer.step()
            shown = step in (1, self.steps)
            inference.measuring = shown
            found = _Step(inference).taken(self.lr, step, shown)
            if step == self.steps:
                self._tell(inference.call, found)
            yield found

    def _tell(self, call: Call, last: LocalGradients) -> None:
        distances = steps_to_reach(call.graph, last.state.errors)
        late = tuple(name for name in call.graph.nodes if distances.get(name, 0) >= self.steps)
        call.graph.once(
            ("signal", IncrementalPredictiveCoding, self.steps),
            lambda: tell_where_there_is_no_signal(
                "IncrementalPredictiveCoding", replace(last.state, unreached=late), last.parameters, cures=_CURES
            ),
        )


class _Step:
    """One inference step: gradients of values and parameters at the same state, then all values move."""

    def __init__(self, inference: ValueInference) -> None:
        self.inference, self.call, self.graph = inference, inference.call, inference.graph
        self.gradients = GradientSum()
        self.predictions: dict[str, Tensor] = {}
        self.errors: dict[str, Tensor] = {}
        self.messages: dict[str, Tensor] = {}
        self.unreached: list[str] = []
        self.collected = Collected()  # of the energies' own parameters

    def taken(self, lr: float, step: int, shown: bool) -> LocalGradients:
        self.inference.begin_sweep()
        self._outputs()
        for node in reversed(self.graph.hidden_nodes):
            # after the first step any weight may have moved, by momentum or decay, without an error
            reached = step > 1 or self.inference.is_active(node)
            own = self._hidden(node) if reached else self._unreached(node)
            # moved only now: its children and itself have been evaluated at the old value
            for slot, gradient in self.inference.completed(node, own, self.messages):
                self.inference.move(slot, gradient, -lr)
        return self._result(step, shown)

    def _hidden(self, node: Node) -> Sequence[Tensor | None]:
        evaluated = self.inference.evaluate(node, requires_grad=True)
        errors = self.inference.subtract(node, evaluated.predictions)
        own, cotangents = self.inference.pulls_into_history(node, errors, evaluated.predictions)
        self._learn(node, errors, evaluated.predictions)
        self._send(evaluated, errors, cotangents)
        return own

    def _unreached(self, node: Node) -> Sequence[Tensor | None]:
        """Its value is the prediction still: its error is exactly zero."""
        # nodes come in reverse order; the report has them in that of the graph
        self.unreached.insert(0, node.name)
        self.gradients.add_zeros(self.call, node)
        values = [self.inference.values[slot] for slot in node.slots]
        self._learn(node, [torch.zeros_like(value) for value in values], values)
        self.predictions.update(zip(node.slots, values, strict=True))
        return [None] * len(node.slots)

    def _learn(self, node: Node, errors: Sequence[Tensor], predictions: Sequence[Tensor]) -> None:
        energy = self.inference.energies.get(node.name)
        self.collected.add_energy(node.name, energy, errors, predictions, self.inference.loss.scale)

    def _outputs(self) -> None:
        passes = [self.inference.evaluate(node, requires_grad=True) for node in self.graph.output_nodes]
        # all outputs together: one loss reads them
        errors = self.inference.output_errors(passes)
        for evaluated in passes:
            own = [errors.get(slot) for slot in evaluated.node.slots]
            self._send(evaluated, own, own)

    def _send(self, evaluated: NodePass, errors: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]) -> None:
        for slot, prediction, error in zip(evaluated.node.slots, evaluated.predictions, errors, strict=True):
            self.predictions[slot] = prediction.detach()
            if error is not None:
                self.errors[slot] = error
        # one product for parents and parameters: both read the state before the move
        products = self.gradients.add(self.call, evaluated, cotangents, evaluated.inputs)
        self.inference.add_messages(evaluated, products, self.messages)

    def _rest(self) -> Rest:
        return Rest(float(self.inference.residual()), False, self.inference.residual_of_samples())

    def _end(self) -> None:
        """The energy where the values have come to, as a line of the history."""
        self.inference.begin_sweep()
        self.inference.output_errors([self.inference.evaluate(n, requires_grad=False) for n in self.graph.output_nodes])
        for node in self.graph.hidden_nodes:
            if self.inference.is_active(node):
                predictions = self.inference.evaluate(node, requires_grad=False).predictions
                self.inference.pulls_into_history(node, self.inference.subtract(node, predictions), predictions)

    def _result(self, step: int, shown: bool) -> LocalGradients:
        # dF/dtheta = -(dmu/dtheta)^T pi e (Salvatori et al. 2022), in the scale of the loss
        scale = -self.inference.loss.scale
        rest = self._rest()
        if shown:
            self._end()
        relaxation, values = report(self.inference, step, rest, tol=0.0), self.inference.values
        if shown:
            self.inference.history.pop()  # the next step begins with this line, at the weights of then
        state = InferenceState(
            self.graph,
            self.call.batch_size,
            self.predictions,
            self.errors,
            relaxation=relaxation,
            unreached=tuple(self.unreached),
            energies=as_they_are(self.inference.energies),
            phases=(relaxation,),
            moment=-2 if shown else -1,
            rounding={s: values.rounding(s, self.predictions[s]).norm() for s in self.errors if s in values},
        )
        clamped = {name: gradient * scale for name, gradient in self.gradients.clamped.items()}
        parameters = {name: gradient * scale for name, gradient in self.gradients.parameters.items()}
        learned = by_parameter(self.inference.energies, self.collected.of_energies)
        return LocalGradients(parameters, self.call.input_gradients(clamped), state, learned=learned)


def _check_factor(loss: OutputLoss) -> None:
    # A gradient scaler unscales .grad once, before the first step; the later steps' gradients it never sees.
    if loss.factor > 1.0:
        raise ConfigurationError(
            "loss.backward()",
            f"a loss with an outer factor of {loss.factor:g}",
            "at most 1 under IncrementalPredictiveCoding",
            "Use bfloat16 without a gradient scaler, and put a factor into the learning rate.",
        )
