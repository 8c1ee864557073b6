"""``torch2ebm.report``: one HTML page of one run, to look at in a browser or a notebook."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from torch2ebm.compare import GradientComparison, check_loss, check_trainable, check_whole, compare
from torch2ebm.engine.results import Relaxation
from torch2ebm.errors import AttachmentError, ConfigurationError, NoStateError
from torch2ebm.model.arguments import of_batch
from torch2ebm.model.energy_model import EnergyModel
from torch2ebm.optimizer import EnergyOptimizer
from torch2ebm.pages.run_page import run_page
from torch2ebm.pages.skeleton import framed, written
from torch2ebm.wrapper.attaching import unwrapped

WHERE = "torch2ebm.report"


@dataclass(frozen=True, repr=False)
class Report:
    """One run as a page: what relaxed and how, and where it was measured, how far the gradients are from backprop's.

    Attributes:
        module: Class of the module.
        algorithm: The algorithm with its settings, as text.
        relaxation: What the slider moves through.
        comparison: Angles to backprop; None where no loss and batch were given.
        page: The page, as text.
    """

    module: str
    algorithm: str
    relaxation: Relaxation
    comparison: GradientComparison | None = None
    page: str = field(default="", compare=False)

    def __repr__(self) -> str:
        angle = "" if self.comparison is None else f", angle={self.comparison.overall[''].angle:.3g} degrees"
        return f"Report({self.module}, {self.algorithm.partition('(')[0]}, steps={self.relaxation.steps}{angle})"

    def _repr_html_(self) -> str:
        return framed(self.page)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The page as text, written to the file where a path is given. It loads nothing, so you can send it by mail.

        Raises:
            ConfigurationError: for a path that is none.
        """
        return written(self.page, path)


def report(run: nn.Module | EnergyOptimizer, loss_fn: Callable[..., Tensor] | None = None, batch: Any = None) -> Report:
    """A page of the last backward: the graph coloured by errors, a slider over the steps, curves, and what was run.

    With a loss and a batch the page also has the angle of each gradient to that of backprop, as :func:`compare`
    measures it, at the weights as they are now: call it before ``optimizer.step()``. The run itself keeps neither its
    batch nor its loss. Algorithms without an energy for each step, for example ``ZeroDivergence``, have no slider.

    Args:
        run: A converted model after a backward by an algorithm, a wrapper of one, or its ``EnergyOptimizer``.
        loss_fn: ``loss_fn(output, target)``, or ``loss_fn(output)`` where ``batch`` is a dict.
        batch: ``(inputs, target)``, inputs being a tensor, a tuple of positional or a dict of keyword arguments; or a
            dict of keyword arguments.

    Returns:
        The report. ``to_html("run.html")`` writes the page, and a notebook shows it.

    Raises:
        ConfigurationError: for what is no converted model, a loss without a batch, a batch of another form, or a loss
            that is no function from output (and target) to one number.
        NoStateError: before the first backward by an algorithm, or after the next forward.
        ShardingError: for angles of a module that ``fully_shard`` has sharded.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model, loss = torch2ebm.convert(net), torch.nn.functional.cross_entropy
        >>> model.attach(torch2ebm.PredictiveCoding())
        >>> batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> loss(model(batch[0]), batch[1]).backward()
        >>> report = torch2ebm.report(model, loss, batch)
        >>> report.comparison.overall[""].angle < 30
        True
        >>> report.to_html().startswith("<!DOCTYPE html>")
        True
    """
    model = _model_of(run)
    conversion = model.torch2ebm
    module = type(conversion.module).__name__
    if (loss_fn is None) != (batch is None):
        missing, given = ("batch", "loss_fn") if batch is None else ("loss_fn", "batch")
        raise ConfigurationError(
            f"{WHERE}({missing}=...)",
            f"None beside a {given}",
            "both, for the angles to backprop, or neither",
            "Write torch2ebm.report(model, loss_fn, batch).",
        )
    if loss_fn is not None:
        check_loss(WHERE, loss_fn, 1 if isinstance(batch, Mapping) else 2)
        of_batch(WHERE, batch, loss_fn)
        check_whole(WHERE, model)
        check_trainable(WHERE, model)
    algorithm = conversion.algorithm
    try:
        state = conversion.state
    except NoStateError as error:
        raise NoStateError(
            f"{WHERE}({module})",
            "a model without a backward by an algorithm" if algorithm is None else "no backward since the last forward",
            "a model after loss.backward()",
            "Attach an EnergyOptimizer, call loss.backward(), and ask for the report before the next forward.",
        ) from error
    comparison = None
    if loss_fn is not None and algorithm is not None:
        comparison = compare(model, loss_fn, batch, {"": algorithm})
    page = run_page(module, repr(algorithm), state, comparison)
    return Report(module, repr(algorithm), state.relaxation, comparison, page)


def _model_of(run: object) -> EnergyModel:
    if isinstance(run, EnergyOptimizer):
        return run.model
    if isinstance(run, nn.Module):
        try:
            return unwrapped(run)
        except AttachmentError:
            pass
    raise ConfigurationError(
        f"{WHERE}(run)",
        f"a {type(run).__name__}" if not isinstance(run, type) else f"the class {run.__name__}",
        "a model made by torch2ebm.convert, or its EnergyOptimizer, after a backward",
        "Convert the module, attach an algorithm and call loss.backward(): torch2ebm.report(model).",
    )
