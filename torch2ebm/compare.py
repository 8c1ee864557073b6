"""Gradients of energy-based algorithms held against autograd's, parameter by parameter."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch2ebm.algorithms.base import Algorithm, check_algorithm
from torch2ebm.common.checks import check_steps, takes
from torch2ebm.common.text import aligned, data_frame, html_table, short_table
from torch2ebm.errors import ConfigurationError, LossIndependentError, NoSignalWarning, PartitionError, ShardingError
from torch2ebm.isolation.module_state import plain_autograd, untouched
from torch2ebm.model.arguments import called, check_not_meta, of_batch
from torch2ebm.model.energy_model import EnergyModel, convert
from torch2ebm.pages.comparison_page import comparison_page
from torch2ebm.pages.skeleton import written
from torch2ebm.reports.agreement import Agreement, agreement
from torch2ebm.reports.plots import plot_comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Gradients = Mapping[str, Tensor]
_HEADER = ("parameter", "algorithm", "cosine", "angle [deg]", "relative error", "norm ratio", "same sign")


@dataclass(frozen=True, repr=False)
class GradientComparison:
    """Each algorithm's gradients against autograd's.

    Attributes:
        algorithms: Names, in the order given.
        parameters: Names of the parameters that autograd gives a gradient, in the module's order.
        steps: The inference steps looked at, empty when not asked for.
        agreement: Algorithm, then parameter, to :class:`Agreement`.
        overall: Algorithm to the :class:`Agreement` of all parameters as one vector.
        along: Algorithm, then number of inference steps, then parameter, to :class:`Agreement`.
    """

    algorithms: tuple[str, ...]
    parameters: tuple[str, ...]
    steps: tuple[int, ...]
    agreement: Mapping[str, Mapping[str, Agreement]]
    overall: Mapping[str, Agreement] = field(default_factory=dict)
    along: Mapping[str, Mapping[int, Mapping[str, Agreement]]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return short_table(self._title(), _HEADER[1:], [row[1:] for row in self._overall()])

    def _repr_html_(self) -> str:
        return html_table(self._title(), _HEADER, [*self._overall(), *self._rows()])

    def _title(self) -> str:
        along = f", also after {', '.join(map(str, self.steps))} steps" if self.steps else ""
        return f"GradientComparison with autograd, {len(self.parameters)} parameters{along}; table() has them all"

    def _overall(self) -> list[list[str]]:
        return [_row("(all)", name, self.overall[name]) for name in self.overall]

    def _rows(self) -> list[list[str]]:
        return [
            _row(parameter, name, self.agreement[name][parameter])
            for parameter in self.parameters
            for name in self.algorithms
        ]

    def table(self) -> str:
        """Aligned text: one row a parameter and algorithm; with ``steps``, one more table of mean angles."""
        table = aligned(_HEADER, [*self._rows(), *self._overall()], left=2)
        return table + "\n\n" + self._table_along() if self.steps else table

    def _table_along(self) -> str:
        rows = [
            [name, *(f"{_mean(a.angle for a in self.along[name][step].values()):.2f}" for step in self.steps)]
            for name in self.algorithms
        ]
        return aligned(["mean angle [deg] after", *(f"{step} step{'s' * (step != 1)}" for step in self.steps)], rows)

    def to_dict(self) -> dict[str, Any]:
        """Algorithm, then parameter, then measure, to a number; with ``steps`` also under ``"along"``."""
        result: dict[str, Any] = {name: _numbers(self.agreement[name]) for name in self.algorithms}
        if self.steps:
            result["along"] = {
                name: {step: _numbers(self.along[name][step]) for step in self.steps} for name in self.algorithms
            }
        return result

    def to_dataframe(self) -> DataFrame:
        """A tidy table, one row a parameter, algorithm and step.

        Its columns are ``parameter``, ``algorithm``, ``step`` and the measures of :class:`Agreement`. ``step`` is
        missing (``<NA>``) for an algorithm as it was given, and a number of steps where ``steps`` were looked at.

        Raises:
            ConfigurationError: if pandas is not installed (``pip install torch2ebm[pandas]``).
        """
        measures = tuple(each.name for each in fields(Agreement))
        return data_frame(("parameter", "algorithm", "step", *measures), self._measured())

    def _measured(self) -> Iterator[tuple[Any, ...]]:
        for name in self.algorithms:
            given: list[tuple[int | None, Mapping[str, Agreement]]] = [(None, self.agreement[name])]
            for step, found in [*given, *self.along.get(name, {}).items()]:
                yield from ((parameter, name, step, *astuple(found[parameter])) for parameter in self.parameters)

    def plot(self, path: str | os.PathLike[str] | None = None, *, ax: Any = None) -> Figure:
        """Angle and relative error per parameter, one kind of point an algorithm. Needs matplotlib.

        Parameters are categories: no line joins them. Inference steps are joined. An error of exactly zero lies below a
        break of the logarithmic axis, an infinite one above a break.

        Args:
            path: Picture file, in the format of its suffix; None writes none.
            ax: Axes of yours to draw into: a pair, for the angle and for the relative error. With ``steps``, also four,
                in the order of ``subplots(2, 2)``: angle, angle along the steps, error, error along the steps. Their
                limits, scale, ticks, labels and legend are set anew, and nothing outside of them is touched. Hence none
                may share an axis with others, but for the x-axis of a column.

        Returns:
            The figure: a new one, which a notebook shows, or that of ``ax``.

        Raises:
            ConfigurationError: if matplotlib is not installed, for what is no path of a picture, for another number of
                axes, or for axes that are shared with others.
        """
        return plot_comparison(self, path, ax=ax)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One page that loads nothing from elsewhere: sorted tables with bars, and curves where steps were asked for.

        The text, written to the file where a path is given. Raises :class:`ConfigurationError` for a path that is none.
        """
        return written(comparison_page(self), path)


def compare(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: Any,
    algorithms: Sequence[Algorithm] | Mapping[str, Algorithm],
    steps: Sequence[int] | None = None,
) -> GradientComparison:
    """Hold the gradients of several algorithms against autograd's on one batch.

    Generators, buffers, ``.grad`` and attachments are left as they are; every algorithm sees the same dropout masks.

    Args:
        model: A converted model, or a module, which then is converted.
        loss_fn: ``loss_fn(output, target)``, or ``loss_fn(output)`` where ``batch`` is a dict.
        batch: ``(inputs, target)``, inputs being a tensor, a tuple of positional or a dict of keyword arguments; or a
            dict of keyword arguments.
        algorithms: Algorithms, or a mapping from names to them.
        steps: Also compare after each of these numbers of inference steps, for algorithms that have steps.

    Returns:
        Per parameter and algorithm the cosine, angle in degrees, relative error, norm ratio and sign agreement.

    Raises:
        ConfigurationError: for an empty list of algorithms, what is no list of algorithms, a batch of another form,
            or a loss that is no function from output (and target) to one number.
        ShardingError: for a module that ``fully_shard`` has sharded.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
        >>> batch = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
        >>> loss = torch.nn.functional.cross_entropy
        >>> comparison = torch2ebm.compare(net, loss, batch, [torch2ebm.ZeroDivergence()])
        >>> comparison.agreement["ZeroDivergence"]["0.weight"].angle < 1e-6
        True
    """
    named, counts = _named(algorithms), _counts(steps)
    converted = model if isinstance(model, EnergyModel) else convert(model)
    check_whole("torch2ebm.compare", converted)
    check_loss("torch2ebm.compare", loss_fn, 1 if isinstance(batch, Mapping) else 2)
    args, kwargs, loss_of = of_batch("torch2ebm.compare", batch, loss_fn)
    check_not_meta(converted.torch2ebm.module)
    trainable = check_trainable("torch2ebm.compare", converted)
    device = next(iter(trainable.values())).device

    def gradients(call: Callable[[], Any]) -> Gradients:
        with ExitStack() as stack:
            stack.enter_context(plain_autograd())
            stack.enter_context(untouched(converted, device))
            found = torch.autograd.grad(
                whole_loss("torch2ebm.compare", loss_of(call())), list(trainable.values()), allow_unused=True
            )
        return {name: g for name, g in zip(trainable, found, strict=True) if g is not None}

    def of(algorithm: Algorithm) -> Gradients:
        ours = gradients(lambda: converted.torch2ebm.run(algorithm, args, kwargs))
        return {name: ours.get(name, torch.zeros_like(r)) for name, r in reference.items()}

    def after(algorithm: Algorithm, steps: int) -> Gradients:
        with warnings.catch_warnings():
            # few steps are what is looked at
            warnings.simplefilter("ignore", NoSignalWarning)
            return of(algorithm.with_steps(steps))

    def each(ours: Gradients) -> Mapping[str, Agreement]:
        return {name: agreement(ours[name], r) for name, r in reference.items()}

    module = converted.torch2ebm.module
    reference = gradients(lambda: called(converted.torch2ebm.feedforward, module, args, kwargs))
    found = {name: of(algorithm) for name, algorithm in named.items()}
    return GradientComparison(
        tuple(named),
        tuple(reference),
        counts,
        {name: each(ours) for name, ours in found.items()},
        {name: agreement(_joined(ours), _joined(reference)) for name, ours in found.items()},
        {name: {n: each(after(a, n)) for n in counts} for name, a in named.items()} if counts else {},
    )


def check_trainable(where: str, model: EnergyModel) -> dict[str, nn.Parameter]:
    """The parameters that learn. Raises :class:`PartitionError` for a model without any."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise PartitionError(
            f"{where}({type(model.torch2ebm.module).__name__})",
            "a model without trainable parameters",
            "at least one trainable parameter",
            "It has nothing to learn; unfreeze some of it.",
        )
    return trainable


def check_whole(where: str, model: EnergyModel) -> None:
    if model.torch2ebm.shards.modules:
        raise ShardingError(
            f"{where}({type(model.torch2ebm.module).__name__})",
            "a module sharded by fully_shard, in which torch.autograd.grad finds no gradients",
            "a module with whole parameters",
            f"{where.rpartition('.')[2].capitalize()} before fully_shard, or on a copy that is not sharded.",
        )


def _joined(gradients: Gradients) -> Tensor:
    return torch.cat([gradient.detach().double().flatten() for gradient in gradients.values()])


def _row(parameter: str, name: str, a: Agreement) -> list[str]:
    measures = [f"{a.cosine:.6f}", f"{a.angle:.2f}", f"{a.relative_error:.2e}", f"{a.norm_ratio:.4f}"]
    return [parameter, name, *measures, f"{100 * a.sign_agreement:.1f}%"]


def _named(algorithms: Sequence[Algorithm] | Mapping[str, Algorithm]) -> dict[str, Algorithm]:
    where = "torch2ebm.compare(algorithms=...)"
    if isinstance(algorithms, (Algorithm, type, str)) or not isinstance(algorithms, Iterable):
        if not isinstance(algorithms, Algorithm):
            check_algorithm(where, algorithms)
        raise ConfigurationError(
            where, repr(algorithms), "algorithms in a list or a dict", f"Put it in a list: [{algorithms!r}]."
        )
    named = dict(algorithms) if isinstance(algorithms, Mapping) else {}
    each: Iterable[Any] = named.values() if isinstance(algorithms, Mapping) else algorithms
    for algorithm in each:
        check_algorithm(where, algorithm)
        if not isinstance(algorithms, Mapping):
            name = type(algorithm).__name__
            named[name if name not in named else repr(algorithm)] = algorithm
    if not named:
        raise ConfigurationError(
            where,
            repr(algorithms),
            "at least one algorithm object, in a list or a dict",
            "For example [torch2ebm.ZeroDivergence(), torch2ebm.PredictiveCoding()].",
        )
    return named


def _counts(steps: Sequence[int] | None) -> tuple[int, ...]:
    if isinstance(steps, int) or not isinstance(steps, (Iterable, type(None))):
        raise ConfigurationError(
            "torch2ebm.compare(steps=...)", repr(steps), "numbers of steps in a list", f"Write steps=[{steps!r}]."
        )
    counts = tuple(steps or ())
    for count in counts:
        check_steps("torch2ebm.compare", count)
    return counts


def check_loss(where: str, loss_fn: object, arguments: int) -> None:
    """Refuse a loss that has been computed already, a class of losses, and what takes other arguments."""
    form = "loss_fn(output, target)" if arguments == 2 else "loss_fn(output)"
    if isinstance(loss_fn, Tensor) or not callable(loss_fn):
        what = f"a loss of shape {tuple(loss_fn.shape)}" if isinstance(loss_fn, Tensor) else f"{loss_fn!r:.80}"
        got, remedy = f"{what}, which is no function", "Pass the function itself: torch.nn.functional.cross_entropy."
    elif isinstance(loss_fn, type):
        got = f"the class {loss_fn.__name__}"
        remedy = f"Write the parentheses, {loss_fn.__name__}(): an object, not the class."
    elif not takes(loss_fn, arguments):
        got = f"a function of {inspect.signature(loss_fn)}"
        remedy = "It gets the output and the target; with a dict of keyword arguments as the batch, the output alone."
    else:
        return
    raise ConfigurationError(f"{where}(loss_fn=...)", got, form, remedy)


def whole_loss(where: str, loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a loss of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ConfigurationError(
            f"{where}(loss_fn=...)", got, "one number, as a tensor", "Reduce the loss: reduction='mean'."
        )
    if not loss.requires_grad:
        raise LossIndependentError(
            f"{where}(loss_fn=...)",
            "a loss that depends on no parameter",
            "a loss computed from the model's output",
            "Look for a detach() in the loss function.",
        )
    return loss


def _numbers(agreements: Mapping[str, Agreement]) -> dict[str, dict[str, float]]:
    return {parameter: asdict(a) for parameter, a in agreements.items()}


def _mean(numbers: Any) -> float:
    values = list(numbers)
    return sum(values) / len(values) if values else math.nan
