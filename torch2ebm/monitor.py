"""What is told how each step went: functions of your own, and ready objects for TensorBoard, W&B, a file, a line."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import Tensor

from torch2ebm.common.checks import check_steps, require
from torch2ebm.compare import compare
from torch2ebm.errors import ConfigurationError
from torch2ebm.model.energy_model import EnergyModel
from torch2ebm.reports.progress_line import Progress

__all__ = ["CSVFile", "Monitor", "Progress", "Several", "StepDetails", "StepMonitor", "TensorBoard", "WeightsAndBiases"]

COLUMNS: Final = ("step", "name", "value")


class Monitor(Protocol):
    """A function of your own that is told how each step went: ``EnergyOptimizer(..., monitor=...)``.

    ``SummaryWriter.add_scalar`` of TensorBoard fits as it is. What it raises comes out of ``optimizer.step()``, after
    the step has been made.

    Example:
        >>> import torch, torch2ebm
        >>> seen = {}
        >>> def monitor(name, value, step):
        ...     seen[name] = value
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model, sgd = torch2ebm.convert(net), torch.optim.SGD(net.parameters(), lr=0.1)
        >>> optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.PredictiveCoding(), monitor=monitor)
        >>> model(torch.randn(5, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> list(seen)
        ['energy/0', 'energy', 'loss', 'relaxation/steps', 'relaxation/residual']
    """

    def __call__(self, name: str, value: float, step: int, /) -> Any:
        """Called for each number, in every ``optimizer.step()``.

        Args:
            name: ``energy/<node>``, ``energy``, ``loss``, ``relaxation/steps`` or ``relaxation/residual``.
            value: Energies and the loss are summed over samples, in units of lambda times the loss.
            step: How many steps of the optimizer have been made before.
        """


@runtime_checkable
class StepMonitor(Protocol):
    """A monitor that also looks at the model before and after each step of the optimizer.

    :class:`Monitor` is the contract for numbers; this one adds two methods, which ``EnergyOptimizer`` calls where a
    monitor has them. Neither may change weights or ``.grad``.
    """

    def __call__(self, name: str, value: float, step: int, /) -> Any:
        """As :class:`Monitor`."""

    def before_step(self, model: EnergyModel, step: int, /) -> None:
        """Called before weights move. What it raises stops the step."""

    def after_step(self, model: EnergyModel, step: int, /) -> None:
        """Called after weights have moved and all numbers of the step have been told."""


class CSVFile:
    """Writes each number to a file, as a row ``step,name,value``. Every step is on disk when it ends.

    For a column a name: ``pandas.read_csv(path).pivot(index="step", columns="name", values="value")``. Of several
    processes, give it to the first one alone.

    Args:
        path: The file; its folder is made.
        append: Go on with a file that exists, as after a checkpoint.

    Raises:
        ConfigurationError: for what is no path, or if there is such a file already, unless ``append`` is given and it
            begins with this header.

    Example:
        >>> import tempfile, pathlib
        >>> from torch2ebm.monitor import CSVFile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.csv"
        >>> with CSVFile(path) as monitor:
        ...     monitor("loss", 2.5, 0)
        >>> path.read_text().splitlines()
        ['step,name,value', '0,loss,2.5']
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes) or not os.fspath(path):
            raise ConfigurationError(
                "CSVFile(path=...)", f"{path!r:.200}", "the path of a file, as text or a pathlib.Path", "Try 'run.csv'."
            )
        self.path = Path(path)
        goes_on = self.path.exists() and self.path.stat().st_size > 0
        if goes_on:
            self._check(append)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", newline="", encoding="utf-8", buffering=1)  # by lines
        self._rows = csv.writer(self._file, lineterminator="\n")
        if not goes_on:
            self._rows.writerow(COLUMNS)

    def _check(self, append: bool) -> None:
        with self.path.open(encoding="utf-8", errors="replace") as file:
            begins = file.readline().strip()
        if not append or begins != ",".join(COLUMNS):
            raise ConfigurationError(
                f"CSVFile({str(self.path)!r})",
                f"a file that exists and begins with {begins[:40]!r}",
                "a path without a file" if not append else f"the header {','.join(COLUMNS)}",
                "Take another path, or append=True to go on with the file of such a monitor.",
            )

    def __call__(self, name: str, value: float, step: int, /) -> None:
        self._rows.writerow((step, name, value))

    def close(self) -> None:
        """Close the file. Nothing is lost without it."""
        self._file.close()

    def __enter__(self) -> CSVFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if "_file" in self.__dict__:
            self.close()


class TensorBoard:
    """Writes each number as a scalar of TensorBoard. Needs ``pip install torch2ebm[tensorboard]``.

    Args:
        log_dir: Folder of the run; None lets TensorBoard choose one in ``runs``.
        settings: Further arguments of ``torch.utils.tensorboard.SummaryWriter``.

    Raises:
        ConfigurationError: if TensorBoard is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike[str] | None = None, **settings: Any) -> None:
        folder = None if log_dir is None else os.fspath(log_dir)
        self.writer = require("torch.utils.tensorboard", "tensorboard").SummaryWriter(folder, **settings)

    def __call__(self, name: str, value: float, step: int, /) -> None:
        self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what waits, and close the files."""
        self.writer.close()


class WeightsAndBiases:
    """Logs each number to a run of W&B, under the step of the optimizer. Needs ``pip install torch2ebm[wandb]``.

    Args:
        run: A run of yours. Without it, one is begun.
        settings: Arguments of ``wandb.init`` for a run that is begun, for example ``project``.

    Raises:
        ConfigurationError: if W&B is not installed, or for settings beside a run of yours.
    """

    def __init__(self, run: Any = None, **settings: Any) -> None:
        if run is not None and settings:
            raise ConfigurationError(
                "WeightsAndBiases(run, ...)",
                f"settings {', '.join(settings)} beside a run",
                "a run, or the settings of a new one",
                "Give these settings to wandb.init.",
            )
        self.run = require("wandb", "wandb").init(**settings) if run is None else run

    def __call__(self, name: str, value: float, step: int, /) -> None:
        self.run.log({name: value}, step=step)  # numbers of one step are joined there

    def close(self) -> None:
        """End the run."""
        self.run.finish()


class Several:
    """Tells several monitors, in their order.

    Raises :class:`ConfigurationError` for what is no function.

    Example:
        >>> from torch2ebm.monitor import Several
        >>> Several(print, print)("loss", 2.5, 0)
        loss 2.5 0
        loss 2.5 0
    """

    def __init__(self, *monitors: Monitor) -> None:
        for monitor in monitors:
            _check_callable("Several(...)", monitor)
        self.monitors = monitors

    def __call__(self, name: str, value: float, step: int, /) -> None:
        for monitor in self.monitors:
            monitor(name, value, step)

    def before_step(self, model: EnergyModel, step: int, /) -> None:
        for monitor in self.monitors:
            if isinstance(monitor, StepMonitor):
                monitor.before_step(model, step)

    def after_step(self, model: EnergyModel, step: int, /) -> None:
        for monitor in self.monitors:
            if isinstance(monitor, StepMonitor):
                monitor.after_step(model, step)


class StepDetails:
    """Every so many steps, also how far weights have moved, and the angle of the gradient to that of backprop.

    It hands on all numbers, and adds

    - ``update/<parameter>``: the norm of the step over the norm of the parameter before it. Without a unit; 0.001 is a
      usual size. Left out where the parameter was zero.
    - ``angle/<parameter>`` and ``angle``: degrees between the local gradient and that of backprop, on ``batch``, after
      the step. 90 where one of the two is zero. As :func:`torch2ebm.compare`, it leaves the training as it is.

    Args:
        monitor: Who is told.
        every: So many steps from one measurement to the next; the first step is measured.
        loss_fn: ``loss_fn(output, target)``, as for :func:`torch2ebm.compare`. Without it there are no angles.
        batch: ``(inputs, target)``, the same one each time, so that angles can be compared over a run.

    Raises:
        ConfigurationError: for a monitor that is no function, an ``every`` that is no whole number of 1 or more, or
            one of ``loss_fn`` and ``batch`` without the other.

    Example:
        >>> import torch, torch2ebm
        >>> from torch2ebm.monitor import StepDetails
        >>> seen = {}
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
        >>> x, loss_fn = torch.randn(5, 4).double(), torch.nn.functional.mse_loss
        >>> batch = x, torch.randn(5, 3).double()
        >>> details = StepDetails(lambda name, value, step: seen.update({name: value}), loss_fn=loss_fn, batch=batch)
        >>> model, sgd = torch2ebm.convert(net), torch.optim.SGD(net.parameters(), lr=0.1)
        >>> optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.ZeroDivergence(), monitor=details)
        >>> loss_fn(model(x), batch[1]).backward()
        >>> optimizer.step()
        >>> [name for name in seen if name.startswith("update")]
        ['update/0.weight', 'update/0.bias', 'update/2.weight', 'update/2.bias']
        >>> seen["angle"] < 1e-6
        True
    """

    def __init__(
        self,
        monitor: Monitor,
        *,
        every: int = 100,
        loss_fn: Callable[..., Tensor] | None = None,
        batch: Any = None,
    ) -> None:
        _check_callable("StepDetails(monitor)", monitor)
        check_steps("StepDetails", every, "every")
        if (loss_fn is None) != (batch is None):
            raise ConfigurationError(
                "StepDetails(loss_fn=..., batch=...)",
                f"a {'batch' if loss_fn is None else 'loss_fn'} alone",
                "both, or neither",
                "Angles need a loss and a batch to be measured on.",
            )
        self.monitor, self.every, self.loss_fn, self.batch = monitor, every, loss_fn, batch
        self._before: dict[str, Tensor] = {}

    def __call__(self, name: str, value: float, step: int, /) -> None:
        self.monitor(name, value, step)

    def before_step(self, model: EnergyModel, step: int, /) -> None:
        if isinstance(self.monitor, StepMonitor):
            self.monitor.before_step(model, step)
        if step % self.every == 0:
            self._before = {name: tensor.detach().clone() for name, tensor in _trained(model).items()}

    def after_step(self, model: EnergyModel, step: int, /) -> None:
        if self._before:
            self._tell_updates(model, step)
            if self.loss_fn is not None:
                self._tell_angles(model, self.loss_fn, step)
        if isinstance(self.monitor, StepMonitor):
            self.monitor.after_step(model, step)

    def _tell_updates(self, model: EnergyModel, step: int) -> None:
        before, self._before = self._before, {}
        for name, tensor in _trained(model).items():
            size = float(torch.linalg.vector_norm(before[name]))
            if size > 0:
                moved = float(torch.linalg.vector_norm(tensor.detach() - before[name]))
                self.monitor(f"update/{name}", moved / size, step)

    def _tell_angles(self, model: EnergyModel, loss_fn: Callable[..., Tensor], step: int) -> None:
        if model.algorithm is None:
            return
        found = compare(model, loss_fn, self.batch, {"": model.algorithm})
        for name, agreement in found.agreement[""].items():
            self.monitor(f"angle/{name}", agreement.angle, step)
        self.monitor("angle", found.overall[""].angle, step)


def _trained(model: EnergyModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _check_callable(where: str, monitor: object) -> None:
    if not callable(monitor) or isinstance(monitor, Progress):
        raise ConfigurationError(
            where, repr(monitor), "a function of (name, value, step)", "For example CSVFile(path)."
        )
