"""The contract that every algorithm fulfils: one forward, one backward, settings and nothing else."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor

from torch2ebm.common.setting_names import NamedSettings
from torch2ebm.engine.call import Call
from torch2ebm.engine.results import LocalGradients
from torch2ebm.errors import ConfigurationError
from torch2ebm.inference.solver import Solver
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.potentials.energy_parameters import learned_by


class Algorithm(NamedSettings, ABC):
    """From one call and its loss to local gradients.

    An algorithm holds its settings and nothing of a call, so one object serves many models. Write it as a frozen
    dataclass, as those of the library are. ``dataclasses.replace(algorithm, lr=0.2)`` is then the same algorithm with
    another setting, two with the same settings are equal, and ``repr`` shows them. It is pickled with the model, so its
    class has to be importable.

    Attributes:
        partition: The granularity that ``nodes="auto"`` takes for it: one of those of ``torch2ebm.convert``.
        reevaluates_loss: Whether it needs the loss at predictions that have moved. If not, any loss will do.
        defines_output: Whether ``model(x)`` is what ``forward`` relaxes to, under ``no_grad`` too, and not the
            module's own output.
        has_input_gradients: Whether inputs may require a gradient (a converted tail of a larger net).
        free_inputs: Names of the inputs that are values of their own, ``"input"`` or the arguments' names: what the
            caller passes is then their prediction.
        weights_move: Whether ``optimizer.step()`` makes further steps, on ``LocalGradients.later``.
        loss_reduction: ``"mean"``: the loss is a mean over the batch, and inference uses the sum over samples, so a
            sample relaxes the same alone or in a batch. ``"sum"``: the loss enters the energy as it is written.
            None: taken from the loss as it was computed.

    Example:
        Backpropagation by one reverse sweep. The examples of the methods go on from it.

        >>> from dataclasses import dataclass
        >>> import torch, torch2ebm
        >>> from torch2ebm.extend import Algorithm, InferenceState, LocalGradients, call_and_loss, reverse_sweep
        >>> @dataclass(frozen=True)
        ... class Sweep(Algorithm):
        ...     reevaluates_loss = False
        ...     def forward(self, call):
        ...         call.feedforward(keep_graph=True)
        ...     def backward(self, call, kept, loss, retain_graph):
        ...         swept = reverse_sweep(call, loss.delivered, retain_graph)
        ...         state = InferenceState(call.graph, call.batch_size, call.values, swept.deltas, -loss.unit)
        ...         inputs = call.input_gradients(swept.gradients.clamped)
        ...         return LocalGradients(swept.gradients.parameters, inputs, state)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model, sgd = torch2ebm.convert(net), torch.optim.SGD(net.parameters(), lr=0.1)
        >>> optimizer = torch2ebm.EnergyOptimizer(sgd, model, Sweep())
        >>> x = torch.randn(5, 4)
        >>> model(x).square().mean().backward()
        >>> (expected,) = torch.autograd.grad(net(x).square().mean(), net[0].weight)
        >>> torch.allclose(net[0].weight.grad, expected, atol=1e-6)
        True
    """

    partition: ClassVar[str] = "layer"
    reevaluates_loss: ClassVar[bool] = True
    defines_output: ClassVar[bool] = False
    has_input_gradients: ClassVar[bool] = True
    weights_move: ClassVar[bool] = False
    free_inputs: tuple[str, ...] = ()  # a property, where settings decide
    loss_reduction: str | None = None  # no ClassVar: most algorithms make a field of it

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        own = getattr(cls, "backward", None)  # a mixin's too
        if inspect.isfunction(own) and _is_of_0_1(own):
            warnings.warn(
                f"{cls.__qualname__}.backward(call, loss, retain_graph) is the form of torch2ebm 0.1. Write "
                "backward(call, kept, loss, retain_graph): kept is what forward returned. This form goes with the "
                "next version.",
                DeprecationWarning,
                stacklevel=3,  # past abc's own __new__, to the line of the class
            )
            cls.backward = _without_kept(own)  # type: ignore[method-assign]

    @abstractmethod
    def forward(self, call: Call) -> Any:
        """The forward pass: fill ``call`` so that it has an output. ``model(x)`` runs it.

        Args:
            call: An empty call. ``call.feedforward(keep_graph=...)`` fills it, and as a rule is all that is needed.

        Returns:
            What :meth:`backward` needs beside the call, for example an equilibrium; None for nothing. It is never
            written on the call or on the algorithm, since several forwards may be open at once.

        Raises:
            ConfigurationError: for settings that do not fit this graph, for example a name that no node has.
            UnsupportedError: for a graph for which the algorithm has no meaning.

        Example:
            >>> call, loss = call_and_loss(net, x, lambda output: output.square().mean())
            >>> print(Sweep().forward(call), call.output()[0].shape)
            None torch.Size([5, 3])
        """

    @abstractmethod
    def backward(self, call: Call, kept: Any, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        """Local gradients, without writing anything anywhere. ``loss.backward()`` runs it.

        Args:
            call: The call that :meth:`forward` has filled.
            kept: What it returned.
            loss: The loss of this backward. ``loss.delivered`` is its gradient at the model's output, and
                ``loss.gradients(predictions)`` what it is elsewhere.
            retain_graph: Whether this call may be asked again; if not, its values and passes may be used up.

        Returns:
            Gradients of parameters and inputs in the scale of the user's loss: multiply dF/dtheta of an energy that is
            summed over samples by ``loss.scale``. And the state that ``model.state`` shows.

        Raises:
            DivergenceError: where a relaxation runs away. Nothing has been written then.
            NonFiniteError: where an energy is no number at the start.

        Example:
            >>> call, loss = call_and_loss(net, x, lambda output: output.square().mean())
            >>> found = Sweep().backward(call, None, loss, retain_graph=False)
            >>> found.parameters["0.bias"].shape, found.state.error["2"].shape
            (torch.Size([8]), torch.Size([5, 3]))
        """

    def with_steps(self, steps: int) -> Algorithm:
        """The same algorithm with another number of inference steps. ``compare(..., steps=[1, 10])`` asks for it.

        Args:
            steps: The other number.

        Returns:
            A copy, for example ``dataclasses.replace(self, steps=steps)``; itself, if it has no steps.

        Raises:
            ConfigurationError: for fewer than one step.

        Example:
            >>> Sweep().with_steps(3)
            Sweep()
            >>> torch2ebm.PredictiveCoding(steps=20).with_steps(3).solver.steps
            3
        """
        return self

    @property
    def learned(self) -> Mapping[str, Tensor]:
        """Parameters of its own, which the user's optimizer moves: those of its ``energies``, where it has such.

        ``loss.backward()`` fills their ``.grad`` with ``LocalGradients.learned``, by the same names.

        Example:
            >>> precision = torch2ebm.Precision()
            >>> list(torch2ebm.PredictiveCoding(precisions={"0": precision}).learned), dict(Sweep().learned)
            (['0.precision.log'], {})
        """
        return learned_by(getattr(self, "energies", {}))

    # Copies and pickles hold the settings alone: recorded programs belong to the graphs of one process.

    def __getstate__(self) -> Mapping[str, Any]:
        return _settings(self) if dataclasses.is_dataclass(self) else dict(self.__dict__)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        if not dataclasses.is_dataclass(self):
            self.__dict__.update(state)
            return
        names = {field.name for field in dataclasses.fields(self) if field.init}
        if not state.keys() <= names:  # torch2ebm 0.1 pickled every attribute, also those that are no settings
            state = self._settings_of_0_1(state)
        # by __init__, so that settings are checked and what follows from them is made
        self.__init__(**{name: value for name, value in state.items() if name in names})

    @classmethod
    def _settings_of_0_1(cls, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the settings that the attributes in a pickle of torch2ebm 0.1 stand for."""
        return state


def _settings(algorithm: Any) -> dict[str, Any]:
    return {field.name: getattr(algorithm, field.name) for field in dataclasses.fields(algorithm) if field.init}


def _is_of_0_1(backward: Callable[..., Any]) -> bool:
    """Three arguments without a default, whatever their names: the fourth, ``kept``, came with 0.2."""
    parameters = list(inspect.signature(backward).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(each.kind not in positional for each in parameters):
        return False
    return sum(each.default is inspect.Parameter.empty for each in parameters) == 3


def _without_kept(backward: Callable[..., LocalGradients]) -> Callable[..., LocalGradients]:
    @functools.wraps(backward)
    def of_0_2(self: Algorithm, call: Call, kept: Any, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        return backward(self, call, loss, retain_graph)

    del of_0_2.__wrapped__  # its signature would be taken for the old one where slots=True makes the class again
    return of_0_2


def check_algorithm(where: str, algorithm: object, kind: type[ConfigurationError] = ConfigurationError) -> None:
    """Raise an error of that kind for what is no algorithm: its name, its class, a solver, a list of algorithms."""
    if isinstance(algorithm, Algorithm):
        return
    example = "an algorithm object, for example torch2ebm.PredictiveCoding()"
    got, remedy = f"{algorithm!r} as the algorithm", "Pass one, with its settings."
    if isinstance(algorithm, str):
        known = {each.__name__.lower(): each.__name__ for each in _kinds(Algorithm)}
        near = difflib.get_close_matches(algorithm.lower().replace("_", ""), known, 1, 0.5)
        name = known[near[0]] if near else "PredictiveCoding"
        got, remedy = (
            f"the text {algorithm!r} as the algorithm",
            f"Write torch2ebm.{name}(), an object and not its name.",
        )
    elif isinstance(algorithm, type):
        got = f"the class {algorithm.__name__} as the algorithm"
        remedy = f"Write the parentheses, {algorithm.__name__}(): an object, not the class."
    elif isinstance(algorithm, Solver):
        remedy = f"A solver belongs to an algorithm: torch2ebm.PredictiveCoding(solver={algorithm!r})."
    elif isinstance(algorithm, (list, tuple)):
        remedy = "Pass one algorithm; torch2ebm.compare takes several."
    raise kind(where, got, example, remedy)


def _kinds(base: Any) -> Iterator[type]:
    for each in base.__subclasses__():
        yield each
        yield from _kinds(each)
