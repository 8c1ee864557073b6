"""What every solver is: the contract that the relaxation loop drives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from torch2ebm.common.checks import AUTO
from torch2ebm.common.setting_names import NamedSettings
from torch2ebm.engine.call import Call
from torch2ebm.engine.energies import Energy
from torch2ebm.inference.base import Inference
from torch2ebm.inference.error_inference import ErrorInference
from torch2ebm.inference.steepness import Stability
from torch2ebm.inference.value_inference import ValueInference
from torch2ebm.loss.output_loss import OutputLoss


@dataclass(frozen=True)
class Rest:
    """How near to rest a relaxation is, as its solver measures it.

    Attributes:
        residual: What the report shows, over all samples.
        reached: Whether no further step is needed.
        of_samples: The residual of each sample, shape ``[batch]``; None where a value has no batch dimension.
        settled: Share of the samples that are settled; None where the solver does not tell.
        on_kinks: Share of the samples that rest where the gradient jumps.
        stretch: Largest curvature met, in units of the precisions; None where the solver does not tell.
        at_minimum: Which samples are in no saddle, shape ``[batch]``; None where nobody has looked.

    Example:
        >>> from torch2ebm.extend import Rest
        >>> Rest(residual=0.02, reached=False).reached
        False
    """

    residual: float
    reached: bool
    of_samples: Tensor | None = None
    settled: float | None = None
    on_kinks: float | None = None
    stretch: float | None = None
    at_minimum: Tensor | None = None


TOLERANCE = 0.01  # of steps="auto", where the solver has none: ErrorConjugateGradient's
REMEDY = "Take a smaller step size (lr), or fewer steps."
Form = TypeVar("Form", bound=Inference)


class Solver(NamedSettings, ABC, Generic[Form]):
    """How values relax: :meth:`start`, then :meth:`step` until ``steps`` are done or the residual is at most ``tol``.

    Subclass :class:`ValueSolver` or :class:`ErrorSolver`, as a frozen dataclass: its settings are then compared by
    ``compile=True``, shown by ``repr`` and kept by :meth:`with_steps`. It holds its settings and nothing of a
    relaxation, so one object serves many models. Energy curve, convergence report and divergence check are the loop's.

    Attributes:
        steps: Most inference steps to do; ``"auto"``: as many as it takes.
        tol: Stop once no entry of the driving term (dF/dv, dF/de) exceeds it in any node or sample; 0 never stops.
        lr: Step size, of a solver that has one; ``"auto"`` where it can be measured.
        coordinates: In which the step size is measured: ``"values"``, ``"errors"``, ``"local errors"``; empty where it
            is not.
        descends: Whether a stable step never raises the energy.
        temperature: What a step adds noise for; 0 for none.
        samples: Whether its steps draw values, and do not lead to rest; gradients are then the mean over the draws.
        remedy: What to try where it diverges, for the error that says so.

    Example:
        The examples of the methods go on from this one.

        >>> import torch, torch2ebm
        >>> from torch2ebm.extend import ValueInference, call_and_loss
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
        >>> solver = torch2ebm.GradientDescent(steps=20, lr=0.1)
        >>> isinstance(solver, torch2ebm.Solver), solver.steps, solver.tol
        (True, 20, 0.0)
    """

    steps: int | str
    tol: float
    lr: float | str
    temperature: float = 0.0
    remedy: ClassVar[str] = REMEDY
    # whether one step is along the whole gradient in the errors, which from errors of zero is backprop's
    one_step_is_backprop: ClassVar[bool] = False
    relative_residual: ClassVar[bool] = False  # whether its measure is that over |e|
    coordinates: ClassVar[str] = ""
    descends: ClassVar[bool] = True
    samples: ClassVar[bool] = False

    @abstractmethod
    def inference(self, call: Call, loss: OutputLoss, energies: Mapping[str, Energy], retain_call: bool) -> Form:
        """What this solver moves: values, or errors.

        Args:
            call: The call, after its feed-forward pass.
            loss: Its loss, nudged where a nudging asks for it.
            energies: Energy of each node, by name; a node without one has a Gaussian of precision 1.
            retain_call: Whether the call keeps its values, for another phase from the same start.

        Returns:
            What :meth:`start` and :meth:`step` are given.

        Example:
            >>> type(solver.inference(call, loss, {}, retain_call=True)).__name__
            'ValueInference'
        """

    @abstractmethod
    def with_steps(self, steps: int) -> Solver[Form]:
        """The same solver with another number of steps; :func:`torch2ebm.compare` asks for it.

        Args:
            steps: The other number.

        Returns:
            A copy: ``dataclasses.replace(self, steps=steps)``.

        Raises:
            ConfigurationError: for fewer than one step, where the solver checks its settings.

        Example:
            >>> solver.with_steps(3)
            GradientDescent(steps=3, lr=0.1, tol=0.0)
        """

    def is_draw(self, step: int) -> bool:
        """Whether the values after so many steps are a draw.

        Args:
            step: How many steps have been made, from 1.

        Returns:
            False for a solver that does not sample.

        Example:
            >>> torch2ebm.Langevin(burn_in=10, thinning=5).is_draw(15), solver.is_draw(15)
            (True, False)
        """
        return False

    def largest_step(self, stability: Stability) -> float:
        """The largest stable step size at the feed-forward pass.

        Args:
            stability: What was measured in this solver's ``coordinates``.

        Returns:
            That of gradient descent, 2 over the largest eigenvalue; NaN where no step is known to be stable.

        Example:
            >>> from torch2ebm.inference.steepness import Stability
            >>> solver.largest_step(Stability(steepest=4.0))
            0.5
        """
        return 2 / stability.steepest

    def good_step(self, stability: Stability) -> float:
        """The step size that ``lr="auto"`` takes.

        Args:
            stability: What was measured in this solver's ``coordinates``.

        Returns:
            That of gradient descent, 1 over the largest eigenvalue.

        Example:
            >>> from torch2ebm.inference.steepness import Stability
            >>> solver.good_step(Stability(steepest=4.0))
            0.25
        """
        return 1 / stability.steepest

    @abstractmethod
    def start(self, inference: Form) -> Any:
        """The solver's own state for one relaxation.

        Args:
            inference: The values, or errors, before the first step. They are read here, and not moved.

        Returns:
            Whatever the first :meth:`step` needs: None, or a momentum of every slot. Under ``compile=True`` it has to
            be made of tensors, numbers, tuples, lists, dicts and dataclasses.

        Example:
            >>> inference = ValueInference(call, loss)
            >>> print(solver.start(inference))
            None
        """

    @abstractmethod
    def step(self, inference: Form, state: Any) -> Any:
        """Move everything once, in place, by :meth:`ValueInference.move` or :meth:`ErrorInference.move`.

        Args:
            inference: What moves. One pass over its sweep is one step.
            state: What :meth:`start` or the step before returned.

        Returns:
            The next state. Under ``compile=True`` no number may be taken out of a tensor on the way.

        Raises:
            NodeEvaluationError: where a node's function fails at the values that have been reached.

        Example:
            >>> inference = ValueInference(call, loss)
            >>> [slot], before = list(inference.values), dict(inference.values)
            >>> state = solver.step(inference, solver.start(inference))
            >>> torch.equal(inference.values[slot], before[slot])
            False
        """

    def rest(self, inference: Form, state: Any) -> Rest:
        """How near to rest the relaxation is after a step. Override it for a solver with a measure of its own.

        Args:
            inference: What moves; ``inference.residual()`` is the largest entry of the last sweep's gradients.
            state: What the last :meth:`step` returned.

        Returns:
            The residual, and whether it is at most ``tol``.

        Example:
            >>> inference = ValueInference(call, loss)
            >>> inference.measuring = True
            >>> state = solver.step(inference, solver.start(inference))
            >>> solver.rest(inference, state).reached
            False
        """
        residual = float(inference.residual())  # waits for the device
        return Rest(residual, residual <= tolerance(self), inference.residual_of_samples())


def tolerance(solver: Solver[Any]) -> float:
    """What :meth:`Solver.rest` compares with: with ``steps="auto"`` of ``|pi e|``, and then never zero."""
    return solver.tol if solver.steps != AUTO else solver.tol or TOLERANCE


class ValueSolver(Solver[ValueInference]):
    """A solver that moves values, by :meth:`ValueInference.sweep` as a rule.

    Example:
        Gradient descent, written out. The example of the method goes on from it.

        >>> from dataclasses import dataclass, replace
        >>> import torch
        >>> from torch2ebm.extend import ValueSolver, call_and_loss, relax
        >>> @dataclass(frozen=True)
        ... class Descent(ValueSolver):
        ...     steps: int = 20
        ...     lr: float = 0.1
        ...     tol: float = 0.0
        ...     def with_steps(self, steps):
        ...         return replace(self, steps=steps)
        ...     def start(self, inference):
        ...         return None
        ...     def step(self, inference, state):
        ...         for slot, gradient in inference.sweep():
        ...             inference.move(slot, gradient, rate=-self.lr)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
    """

    def inference(
        self, call: Call, loss: OutputLoss, energies: Mapping[str, Energy], retain_call: bool
    ) -> ValueInference:
        """The values of one call, which :meth:`step` moves; see :meth:`Solver.inference`.

        Args:
            call: The call, after its feed-forward pass.
            loss: Its loss, nudged where a nudging asks for it.
            energies: Energy of each node, by name.
            retain_call: Whether the call keeps its values.

        Returns:
            The values where the feed-forward pass left them.

        Example:
            >>> inference = Descent().inference(call, loss, {}, retain_call=True)
            >>> energy = relax(Descent(steps=30), inference).state.relaxation.energy
            >>> energy[-1] < energy[0]
            True
        """
        return ValueInference(call, loss, energies, retain_call)


class ErrorSolver(Solver[ErrorInference]):
    """A solver that moves errors, by :meth:`ErrorInference.total_sweep`: a value is its prediction plus its error.

    Errors are stored as they are, so float32 keeps small ones (Goemaere et al. 2025).

    Example:
        The example of the method goes on from this one.

        >>> import torch, torch2ebm
        >>> from torch2ebm.extend import ErrorSolver, call_and_loss, relax
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
        >>> isinstance(torch2ebm.ErrorDescent(), ErrorSolver)
        True
    """

    def inference(
        self, call: Call, loss: OutputLoss, energies: Mapping[str, Energy], retain_call: bool
    ) -> ErrorInference:
        """The errors of one call, which :meth:`step` moves; see :meth:`Solver.inference`.

        Args:
            call: The call, after its feed-forward pass.
            loss: Its loss, nudged where a nudging asks for it.
            energies: Energy of each node, by name.
            retain_call: Whether the call keeps its values.

        Returns:
            Errors that are all zero.

        Example:
            >>> solver = torch2ebm.ErrorDescent(steps=5)
            >>> relax(solver, solver.inference(call, loss, {}, retain_call=True)).state.relaxation.steps
            5
        """
        return ErrorInference(call, loss, energies, retain_call)
