"""Curves that people give to be drawn, and their names in a legend, whatever these are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch2ebm.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def curves_of(where: str, curves: object) -> dict[str, list[float]]:
    """Names to numbers.

    Args:
        where: The argument that was given, for the error.
        curves: A mapping from names to tuples, lists, arrays or tensors of numbers.

    Raises:
        ConfigurationError: for what is no such mapping.
    """
    if not isinstance(curves, Mapping):
        raise _fault(where, f"{curves!r:.80}, which is no mapping")
    return {str(name): _numbers(where, name, curve) for name, curve in curves.items()}


def _numbers(where: str, name: object, curve: Any) -> list[float]:
    each = curve.tolist() if hasattr(curve, "tolist") else curve  # of an array, or a tensor on any device
    if isinstance(each, (str, bytes, Mapping)) or not isinstance(each, Iterable):
        raise _fault(where, f"{curve!r:.80} for {name!r}")
    each = list(each)
    if strange := [number for number in each if isinstance(number, (str, bytes))]:
        raise _fault(where, f"{strange[0]!r:.80} in the curve {name!r}")
    try:
        return [float(number) for number in each]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _fault(where, f"a curve {name!r} of something else: {error}") from error


def _fault(where: str, got: str) -> ConfigurationError:
    remedy = 'For example {"PredictiveCoding": model.state.relaxation.energy}.'
    return ConfigurationError(where, got, "a mapping from names to sequences of numbers", remedy)


def name_lines(place: Any, axes: Axes, lines: Sequence[Any], **how: Any) -> None:
    """A legend of a figure or of axes: what has been drawn there before, and these lines, each name as it is."""
    before = [each for each in axes.get_legend_handles_labels()[0] if each not in lines]
    # matplotlib leaves out what begins with an underscore, and reads mathematics between dollars
    stand_ins = [f"{number}" for number in range(len(lines))]
    legend = place.legend([*before, *lines], [*(str(each.get_label()) for each in before), *stand_ins], **how)
    for text, line in zip(legend.get_texts()[len(before) :], lines, strict=True):
        text.set_text(line.get_label())
        text.set_parse_math(False)
