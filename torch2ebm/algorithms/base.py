"""The contract that every algorithm fulfils: one forward, one backward, settings and nothing else."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch2ebm.engine.call import Call
from torch2ebm.engine.results import LocalGradients
from torch2ebm.loss.output_loss import OutputLoss


class Algorithm(ABC):
    """From one call and its loss to local gradients.

    An algorithm holds its settings and nothing of a call, so one object serves many models. Those of the library are
    frozen dataclasses: ``dataclasses.replace(algorithm, lr=0.2)`` is the same algorithm with another setting.

    Attributes:
        partition: The granularity that ``nodes="auto"`` takes for it.
        reevaluates_loss: Whether it needs the loss at predictions that have moved. If not, any loss will do.
        defines_output: Whether ``model(x)`` is what ``forward`` relaxes to, under ``no_grad`` too, and not the
            module's own output.
        has_input_gradients: Whether inputs may require a gradient (a converted tail of a larger net).
        weights_move: Whether ``optimizer.step()`` makes further steps, on ``LocalGradients.later``.
        loss_reduction: ``"mean"``: the loss is a mean over the batch, and inference uses the sum over samples, so a
            sample relaxes the same alone or in a batch. ``"sum"``: the loss enters the energy as it is written.
            None: taken from the loss as it was computed.
    """

    partition: ClassVar[str] = "layer"
    reevaluates_loss: ClassVar[bool] = True
    defines_output: ClassVar[bool] = False
    has_input_gradients: ClassVar[bool] = True
    weights_move: ClassVar[bool] = False
    loss_reduction: str | None = None  # no ClassVar: most algorithms make a field of it

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        own = vars(cls).get("backward")  # not getattr: an inherited one was adapted where its own class was made
        if inspect.isfunction(own) and _is_of_0_1(own):
            warnings.warn(
                f"{cls.__qualname__}.backward(call, loss, retain_graph) is the form of torch2ebm 0.1. Write "
                "backward(call, kept, loss, retain_graph): kept is what forward returned. This form goes with the "
                "next version.",
                DeprecationWarning,
                stacklevel=2,
            )
            cls.backward = _without_kept(own)  # type: ignore[method-assign]

    @abstractmethod
    def forward(self, call: Call) -> Any:
        """The feed-forward pass: fill ``call`` so that it has an output.

        Returns what ``backward`` needs beside the call, for example an equilibrium; None for nothing.
        """

    @abstractmethod
    def backward(self, call: Call, kept: Any, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        """Local gradients, without writing anything anywhere.

        ``kept`` is what ``forward`` returned. With ``retain_graph`` the call may be asked again.
        """

    def with_steps(self, steps: int) -> Algorithm:
        """The same algorithm with another number of inference steps; itself, if it has none."""
        return self

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
    return list(inspect.signature(backward).parameters)[1:] == ["call", "loss", "retain_graph"]


def _without_kept(backward: Callable[..., LocalGradients]) -> Callable[..., LocalGradients]:
    @functools.wraps(backward)
    def of_0_2(self: Algorithm, call: Call, kept: Any, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        return backward(self, call, loss, retain_graph)

    return of_0_2
