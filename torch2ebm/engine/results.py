"""The results of one backward: the relaxation's report, values and errors of every node, and local gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch2ebm.common.text import MOST_ROWS, data_frame, html_table, short_table
from torch2ebm.engine.call import at_least_single
from torch2ebm.engine.energies import Energy, gaussian_energy
from torch2ebm.engine.per_node import PerNode
from torch2ebm.engine.progress import progress_of
from torch2ebm.errors import BatchDimensionError, NoStateError
from torch2ebm.graph.energy_graph import EnergyGraph

if TYPE_CHECKING:
    from pandas import DataFrame

_HEADER = ("node", "value", "|error|", "energy")


OUTWEIGHED = 1.5  # an error of so many times its rounding is as much noise as signal (measured on five networks)
ROUNDING = 4.0  # what a value and its prediction may differ by, in units of the dtype's epsilon times their size


@dataclass(frozen=True)
class StepSize:
    """The step size of a relaxation.

    Attributes:
        used: What the steps were made with.
        largest: The largest stable one, where it was measured on this call or carried from those before; else NaN.
        backprops: What this call has spent on measuring it.
        measured: What it was made of.
    """

    used: float
    largest: float = math.nan
    backprops: float = 0.0
    measured: object = None


@dataclass(frozen=True, repr=False)
class Relaxation:
    """How a relaxation went.

    Attributes:
        steps: Inference steps done.
        converged: Whether ``residual`` is at most the solver's ``tol``; None where no ``tol`` was asked for.
        residual: Largest absolute entry of the last step's driving term (dF/dv for values), over nodes and samples;
            NaN where no step was made one by one.
        sample_residual: The same for each sample, shape ``[batch]``; None where a value has no batch dimension.
        tol: What the solver was asked for; 0 for nothing.
        beta: The nudge of this phase.
        angle: Its angle in the complex plane, in radians, where ``beta`` is its size (Holomorphic).
        settled: Share of the samples whose residual is at most ``tol``, where the solver tells them apart, else None.
        on_kinks: Share of the samples that rest where the gradient jumps (ReLU, max-pooling).
        sigma_squared: The curvature that a relative nudge was divided by, or that the relaxation met; None for neither.
        curvature_cost: What this call has spent on measuring it, in backprops; 0 where it was carried.
        lr: The step size that was used, measured where the solver has ``lr="auto"``; None for a solver without one.
        largest_lr: The largest stable step size, where ``lr="auto"`` has measured it; else None.
        lr_cost: What this call has spent on measuring it, in backprops; 0 where it was carried.
        update: How an equilibrium algorithm moved the values: ``"synchronous"``, ``"damped"``, ``"sequential"`` or
            ``"anderson"``.
        is_backprop: Whether it was one step along the gradient from errors of zero: each hidden error is then a step
            size times backprop's, and the output's is backprop's own. No inference has taken place.
        is_relative: Whether the residual is that over |e| already.
        slot_residual: By slot, what ``sample_residual`` is the largest of; empty where it is not told apart.
        at_minimum: Which samples rest in a minimum of the energy and in no saddle, shape ``[batch]``; None where nobody
            has looked. One free phase of 16 is looked at, of ``AndersonMixing`` and of updates of your own, and of
            ``AndersonErrorDescent`` relaxations 1, 10, 100 and so on.
        energy: F, summed over samples, at the start of every step and at the end, in units of lambda times the loss.
        node_energy: The share of each node with a value; ``loss`` is the rest.
        loss: lambda times the loss summed over samples.

    Example:
        >>> from torch2ebm.extend import Relaxation
        >>> Relaxation(steps=20, converged=True, residual=1e-5, tol=1e-4).converged
        True
    """

    steps: int = 0
    converged: bool | None = None
    residual: float = 0.0
    energy: tuple[float, ...] = ()
    node_energy: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    loss: tuple[float, ...] = ()
    sample_residual: Tensor | None = field(default=None, compare=False)  # == of tensors is no bool
    tol: float = 0.0
    beta: float = 1.0
    angle: float = 0.0
    update: str = ""
    settled: float | None = None
    on_kinks: float | None = None
    sigma_squared: float | None = None
    curvature_cost: float = 0.0
    lr: float | None = None
    largest_lr: float | None = None
    lr_cost: float = 0.0
    is_backprop: bool = False
    is_relative: bool = False
    slot_residual: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    at_minimum: Tensor | None = field(default=None, compare=False)

    @property
    def regime(self) -> str:
        """What kind of gradient this is, in words; empty where neither the steps nor the curvature say it.

        The nudge in units of the curvature, r, tells: backprop's gradient for r -> 0, a clamped output for r ->
        infinity (Millidge et al. 2022). One step of error descent is no inference, whatever r is.
        """
        if self.is_backprop:
            return "backprop with hidden step sizes"
        if self.r is None:
            return ""
        size = abs(self.r)
        return (
            "near backprop" if size <= 0.3 else "near a clamped output" if size > 3 else "between backprop and clamped"
        )

    @property
    def median_residual(self) -> float | None:
        """That of the samples; None where a value has no batch dimension. The worst one is ``residual``."""
        return None if self.sample_residual is None else float(self.sample_residual.double().median())

    @property
    def r(self) -> float | None:
        """The nudge in units of the curvature, ``beta * sigma_squared``; None where that is not known."""
        return None if self.sigma_squared is None else self.beta * self.sigma_squared

    def __repr__(self) -> str:
        parts = [f"steps={self.steps}", f"converged={self.converged}", f"residual={self.residual:.3g}"]
        parts += [f"energy={self.energy[0]:.4g} -> {self.energy[-1]:.4g}"] if self.energy else []
        parts += [f"beta={self.beta:.4g}"] * (self.beta != 1.0) + [f"update={self.update!r}"] * bool(self.update)
        parts += [] if self.sigma_squared is None else [f"sigma_squared={self.sigma_squared:.4g}", f"r={self.r:.4g}"]
        parts += [] if self.settled is None else [f"settled={self.settled:.0%}"]
        parts += [f"regime={self.regime!r}"] * bool(self.regime)
        return f"Relaxation({', '.join(parts)})"

    def to_dataframe(self) -> DataFrame:
        """The energies as a table, one row a step and node: the columns ``step``, ``node`` and ``energy``.

        Step 0 is the start. The node ``(loss)`` is lambda times the loss, so that the energies of a step sum to F.

        Raises:
            ConfigurationError: if pandas is not installed (``pip install torch2ebm[pandas]``).
        """
        return data_frame(("step", "node", "energy"), self._steps())

    def _steps(self) -> Iterator[tuple[int, str, float]]:
        curves = {**self.node_energy, **({"(loss)": self.loss} if self.loss else {})}
        for step in range(max(map(len, curves.values()), default=0)):
            yield from ((step, name, curve[step]) for name, curve in curves.items())

    @property
    def sample_converged(self) -> Tensor | None:
        """Which samples met ``tol``, shape ``[batch]``; None where no ``tol`` was asked for."""
        return None if self.sample_residual is None or not self.tol else self.sample_residual <= self.tol


@dataclass(frozen=True, eq=False, repr=False)
class InferenceState:
    """The values of the last backward, ``model.state``: one frozen result, without any ``grad_fn``.

    Attributes:
        graph: The graph that the names belong to.
        batch_size: Samples of the call.
        predictions: Prediction by slot.
        errors: By slot, in the shape of its value, to be multiplied by ``error_unit``; a missing one is zero.
        error_unit: What brings ``errors`` to the units of the energy: -``OutputLoss.unit`` for deltas of a sweep.
        relaxation: How the relaxation went.
        unreached: Nodes whose error is exactly zero since no error has reached them yet (too few steps):
            the gradients of their parameters are exactly zero.
        moment: Which entry of the relaxation's energies these values belong to: the last, and the one before it under
            ``IncrementalPredictiveCoding``, whose values move once more.
        rounding: By slot, the length of what rounding has brought into its error; a missing one is 0.
        energies: Energy by node; a missing one is Gaussian of precision 1.
        phases: One relaxation for each nudged phase; the first of them, whose values these are, is ``relaxation``.
        feedforward_distance: |equilibrium - feed-forward| / |feed-forward| of the outputs; None without a free phase.
        loss_weight: lambda, the weight of a sample's own loss in the energy, beside half its squared errors. It is 1
            for a mean over the batch. It is 1 over the batch size where a mean is taken as it is written
            (``loss_reduction="sum"``). A nudging's ``beta`` comes on top. None before a backward.
        loss_terms: How many terms (tokens, pixels, features) a mean in the loss takes of each sample: each of them
            pulls on its prediction with 1 over their number. 1 where the mean is over samples alone, or not known.

    Example:
        >>> import torch
        >>> from torch2ebm.extend import InferenceState, call_and_loss, reverse_sweep
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
        >>> deltas = reverse_sweep(call, loss.delivered).deltas
        >>> state = InferenceState(call.graph, call.batch_size, call.values, deltas, error_unit=-loss.unit)
        >>> state.error["0"].shape, state.energy["0"].shape
        (torch.Size([5, 8]), torch.Size([5]))
    """

    graph: EnergyGraph
    batch_size: int
    predictions: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    error_unit: float = 1.0
    relaxation: Relaxation = Relaxation()
    unreached: tuple[str, ...] = ()
    energies: Mapping[str, Energy] = field(default_factory=dict)
    phases: tuple[Relaxation, ...] = ()
    feedforward_distance: float | None = None
    loss_weight: float | None = None
    loss_terms: float = 1.0
    rounding: Mapping[str, Tensor] = field(default_factory=dict)
    moment: int = -1

    def __repr__(self) -> str:
        names = list(self.graph.nodes)
        return short_table(self._title(), _HEADER, [self._row(name) for name in names[:MOST_ROWS]], total=len(names))

    def _repr_html_(self) -> str:
        return html_table(self._title(), _HEADER, [self._row(name) for name in self.graph.nodes])

    def _title(self) -> str:
        return f"InferenceState of {self.batch_size} samples, {len(self.graph.nodes)} nodes; {self.relaxation!r}"

    def _row(self, name: str) -> list[str]:
        slots = self.graph.nodes[name].slots
        shapes = " ".join(str(list(self.predictions[slot].shape)) for slot in slots if slot in self.predictions)
        try:
            error = float(sum(self._error(slot).abs().double().square().sum() for slot in slots) ** 0.5)
            energy = f"{float(_sum_of(self.energy[name])):.4g}"
        except BatchDimensionError:
            energy = "?"  # not per sample
        except NoStateError:
            return [name, shapes, "?", "?"]  # ran away
        return [name, shapes, f"{error:.4g}", energy]

    @property
    def without_signal(self) -> tuple[str, ...]:
        """Nodes whose errors are rounding more than anything else: the gradients of their parameters are noise.

        So are those of nodes that get messages from such nodes alone. An optimizer as Adam scales noise to full steps.
        A solver that stores errors, for example ``ErrorConjugateGradient``, keeps their digits.
        """
        lost: set[str] = set()
        readers: dict[str, set[str]] = {}  # of a node, those with an error
        for node in reversed(list(self.graph.nodes.values())):
            sends = self._has_error(node.name) == "error"
            from_lost = bool(readers.get(node.name)) and readers[node.name] <= lost
            if not node.is_output and sends and (from_lost or self._is_rounding(node.slots)):
                lost.add(node.name)
            for slot in node.reads if sends else ():
                readers.setdefault(self.graph.owner[slot].name, set()).add(node.name)
        return tuple(node.name for node in self.graph.hidden_nodes if node.name in lost)

    @property
    def relative_residual(self) -> Tensor | None:
        """The residual of each sample over the largest entry of its hidden errors, shape ``[batch]``.

        About 1 where relaxation has hardly begun, 0 at rest. None where no step was measured, or a value has no batch
        dimension. A solver whose own residual is relative already, for example ``ErrorConjugateGradient``, is shown as
        it is.
        """
        residual = self.relaxation.sample_residual
        if residual is None or self.relaxation.is_relative:
            return residual
        slots = [slot for node in self.graph.hidden_nodes for slot in node.slots if slot in self.errors]
        errors = [self._error(slot).reshape(self.batch_size, -1).abs().amax(1) for slot in slots]
        if not errors:
            return None
        largest = torch.stack([error.double() for error in errors]).amax(0)
        return torch.where(largest > 0, residual.to(largest) / largest, 0.0)

    @property
    def progress(self) -> Mapping[str, float]:
        """How far the error of each hidden node has come towards what its readers ask of it, in the median sample.

        ``|pi e| / (|pi e| + |dF/dv|)``, by largest entries: 1 at rest, near 0 where most steps are still to be made.
        Empty where no step was measured. What the readers ask for moves too, until they are at rest.
        """
        return progress_of(self.graph, self._error, self.relaxation, self.energies, self.batch_size)

    @property
    def signal(self) -> Mapping[str, str]:
        """What each node learns from: ``"error"``, or nothing, and why.

        ``"not reached"``: no error has come that far. ``"rounding"``: see :attr:`without_signal`. ``"zero"``: every
        error is exactly zero. :meth:`EnergyModel.summary` has it as a column.
        """
        lost = self.without_signal
        found = {name: "rounding" if name in lost else self._has_error(name) for name in self.graph.nodes}
        return {**found, **dict.fromkeys(self.unreached, "not reached")}

    def _has_error(self, name: str) -> str:
        errors = (self.errors[slot] for slot in self.graph.nodes[name].slots if slot in self.errors)
        return "error" if any(bool(error.any()) for error in errors) else "zero"

    @property
    def value(self) -> Mapping[str, Any]:
        """Value of each node, shape of its prediction; for an output the prediction plus its error."""
        return PerNode(self.graph, lambda slot: self._prediction(slot) + self._error(slot))

    @property
    def prediction(self) -> Mapping[str, Any]:
        """Prediction of each node at the values of its parents."""
        return PerNode(self.graph, self._prediction)

    @property
    def error(self) -> Mapping[str, Any]:
        """Value minus prediction; for an output -dL/dmu, L being lambda times the loss summed over samples."""
        return PerNode(self.graph, self._error)

    @property
    def energy(self) -> Mapping[str, Any]:
        """Energy of each node and sample, shape ``[batch]``: half the squared error unless another energy was given.

        For an output, whose energy is the loss itself, this is half the squared loss gradient: the loss of
        a summed half squared error. Raises :class:`BatchDimensionError` for a value without a batch dimension.
        """
        return PerNode(self.graph, self._energy)

    def scalars(self) -> dict[str, float]:
        """Numbers to watch, summed over samples: ``energy/<node>``, and from a relaxation also ``energy`` (their sum
        with the loss), ``loss`` (lambda times it), ``relaxation/steps`` and ``relaxation/residual``.
        """
        last = self.relaxation
        if self.feedforward_distance is not None:
            steps = {"relaxation/steps": float(last.steps), "relaxation/residual": last.residual}
            return {**steps, "feedforward_distance": self.feedforward_distance}
        # an algorithm that does not relax: the energies of its errors
        if not last.node_energy:
            return {f"energy/{name}": float(_sum_of(energy)) for name, energy in self.energy.items()}
        return {
            **{f"energy/{name}": column[self.moment] for name, column in last.node_energy.items()},
            "energy": last.energy[self.moment],
            "loss": last.loss[self.moment],
            "relaxation/steps": float(last.steps),
            "relaxation/residual": last.residual,
        }

    def to_dataframe(self) -> DataFrame:
        """The energies as a table, one row a step and node: ``phase``, ``step``, ``node`` and ``energy``.

        A phase is a relaxation, counted from 0 as in ``phases``. See :meth:`Relaxation.to_dataframe`.

        Raises:
            ConfigurationError: if pandas is not installed (``pip install torch2ebm[pandas]``).
        """
        phases = enumerate(self.phases or (self.relaxation,))
        rows = ((phase, *row) for phase, relaxation in phases for row in relaxation._steps())
        return data_frame(("phase", "step", "node", "energy"), rows)

    def _is_rounding(self, slots: Sequence[str]) -> bool:
        """Whether rounding outweighs the errors."""
        lengths = [(float(self._error(slot).norm()), float(self.rounding.get(slot, 0.0))) for slot in slots]
        return any(error > 0 for error, _ in lengths) and all(
            error <= OUTWEIGHED * rounding for error, rounding in lengths
        )

    def _prediction(self, slot: str) -> Tensor:
        if slot not in self.predictions:
            raise NoStateError(
                f"state of '{self.graph.owner[slot].name}'",
                "a relaxation that ran away",
                "one that ended in finite numbers",
                "Look at state.relaxation.energy, and take a smaller step size.",
            )
        # without a grad_fn, which would keep the call's graph alive
        return self.predictions[slot].detach()

    def _error(self, slot: str) -> Tensor:
        if slot not in self.errors:
            return torch.zeros_like(self._prediction(slot))  # no error has reached it
        # kept in the scale of .grad, as the last pass left it; the unit makes it value minus prediction
        return at_least_single(self.errors[slot]) * self.error_unit

    def _energy(self, slot: str) -> Tensor:
        error = self._error(slot)
        if error.ndim == 0 or error.shape[0] != self.batch_size:
            raise BatchDimensionError(
                f"state.energy['{self.graph.owner[slot].name}']",
                f"a value of shape {tuple(error.shape)}",
                f"a leading batch dimension of {self.batch_size}",
                "Use state.error, or make it part of a larger node.",
            )
        # the energy of an output is that of a unit Gaussian: none can be given for it
        energy = self.energies.get(self.graph.owner[slot].name)
        if energy is None:
            return gaussian_energy(error)
        return energy.of_samples(error, self._prediction(slot).to(error)).detach()  # its own parameters may require one


def _sum_of(energy: Tensor | tuple[Tensor, ...]) -> Tensor:
    return sum((each.sum() for each in energy), torch.zeros(())) if isinstance(energy, tuple) else energy.sum()


@dataclass(frozen=True, eq=False)
class LocalGradients:
    """What an algorithm hands to autograd, in the scale of the user's loss.

    Attributes:
        parameters: By qualified name, in the parameter's shape, as ``.grad`` shall be: the gradient of the loss as it
            was written, and no sum over samples of it. A missing one stays without a gradient.
        inputs: One for each of ``Call.tensors``; None for one that requires no gradient.
        state: What ``model.state`` shows.
        learned: Of the energies' own parameters, by node and name, for example ``"0.precision.log"``.
        later: Further gradients of an algorithm whose weights move with the values: each is asked for, in
            ``optimizer.step()``, once the weights have moved on the one before.

    Example:
        >>> import torch
        >>> from torch2ebm.extend import InferenceState, LocalGradients, call_and_loss, reverse_sweep
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
        >>> swept = reverse_sweep(call, loss.delivered)
        >>> state = InferenceState(call.graph, call.batch_size, call.values, swept.deltas, -loss.unit)
        >>> inputs = call.input_gradients(swept.gradients.clamped)
        >>> LocalGradients(swept.gradients.parameters, inputs, state).parameters["0.bias"].shape
        torch.Size([8])
    """

    parameters: Mapping[str, Tensor]
    inputs: Sequence[Tensor | None]
    state: InferenceState
    later: Iterator[LocalGradients] | None = None
    learned: Mapping[str, Tensor] = field(default_factory=dict)
