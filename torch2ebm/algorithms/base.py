"""The contract between an algorithm and everything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch2ebm.engine.call import Call
from torch2ebm.engine.results import LocalGradients
from torch2ebm.loss.output_loss import OutputLoss


class Algorithm(ABC):
    """From one call and its loss to local gradients.

    An algorithm holds its settings and nothing of a call, so one object serves many models.

    Attributes:
        partition: The granularity that ``nodes="auto"`` takes for it.
        reevaluates_loss: Whether it needs the loss at predictions that have moved. If not, any loss will do.
        defines_output: Whether ``model(x)`` is what ``forward`` relaxes to, under ``no_grad`` too, and not the
            module's own output.
        has_input_gradients: Whether inputs may require a gradient (a converted tail of a larger net).
        weights_move: Whether ``optimizer.step()`` makes further steps, on ``LocalGradients.later``.
        loss_reduction: ``"mean"``: the loss is a mean over the batch, and inference uses the sum over samples, so a
            sample relaxes the same alone or in a batch. ``"sum"``: the loss enters the energy as it is written.
            None: taken from the loss as it was recorded.
    """

    partition: ClassVar[str] = "layer"
    reevaluates_loss: ClassVar[bool] = True
    defines_output: ClassVar[bool] = False
    has_input_gradients: ClassVar[bool] = True
    weights_move: ClassVar[bool] = False
    loss_reduction: str | None = None

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
