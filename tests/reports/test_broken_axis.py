"""The axis of relative errors: zero and infinity keep their numbers, in strips of their own behind a break."""

import itertools
import math
import pickle

import numpy as np
import pytest

import torch2ebm
from torch2ebm.reports.agreement import Agreement
from torch2ebm.reports.broken_axis import BrokenLog

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def compared(errors: list[float]) -> torch2ebm.GradientComparison:
    names = tuple(f"layers.{i}.weight" for i in range(len(errors)))
    agreement = {name: Agreement(1.0, 0.0, error, 1.0, 1.0) for name, error in zip(names, errors, strict=True)}
    return torch2ebm.GradientComparison(("mine",), names, (), {"mine": agreement})


def of(errors: list[float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5, 5))
    compared(errors).plot(ax=figure.subplots(2))
    return figure, figure.axes[1]


def labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def heights(axes: Axes, numbers: list[float]) -> list[float]:
    """In pixels."""
    places = axes.transData.transform([(0.0, number) for number in numbers])
    return [float(y) for _, y in places]


def shown(axes: Axes, number: float) -> bool:
    """Whether it is inside of the axes, and more than the radius of a small point away from its ends."""
    (y,) = heights(axes, [number])
    box = axes.get_window_extent()
    return box.y0 + 4 < y < box.y1 - 4


MIXED = [0.0, 2e-16, 1e-3, 0.5, 0.0]


def test_an_error_of_zero_is_drawn_as_the_number_zero_below_all_others() -> None:
    _, axes = of(MIXED)
    (line,) = axes.get_lines()
    assert list(line.get_ydata()) == MIXED
    assert labels(axes)[0] == "0" and axes.get_yticks()[0] == 0.0
    zero, least, more, most = heights(axes, [0.0, 2e-16, 1e-3, 0.5])
    assert zero < least < more < most
    # logarithmic above the break
    assert (most - more) / (more - least) == pytest.approx(math.log10(0.5 / 1e-3) / math.log10(1e-3 / 2e-16))
    assert all(shown(axes, error) for error in MIXED)


def test_between_zero_and_the_decades_there_is_nothing_and_the_spines_end() -> None:
    _, axes = of(MIXED)
    cover = next(patch for patch in axes.patches if patch.get_label() == "_break").get_window_extent()
    zero, least = heights(axes, [0.0, 2e-16])
    assert zero < cover.y0 < cover.y1 < least
    for side in ("left", "right"):
        lower, upper = axes.spines[side].get_bounds()
        assert heights(axes, [lower])[0] == pytest.approx(cover.y1)
        assert heights(axes, [upper])[0] == pytest.approx(axes.get_window_extent().y1)
    assert len(axes.collections) == 4  # two strokes, and the rest of both spines


@pytest.mark.parametrize("errors", [[1e-6, 0.1], [0.3, 0.4], [1e-12], []])
def test_without_zeros_there_is_no_break(errors: list[float]) -> None:
    _, axes = of(errors)
    assert axes.get_yscale() == "log" and not axes.patches and not axes.collections
    assert "0" not in labels(axes)


def test_where_all_errors_are_zero_there_is_no_other_number() -> None:
    _, axes = of([0.0, 0.0])
    assert labels(axes) == ["0"] and list(axes.get_lines()[0].get_ydata()) == [0.0, 0.0]
    assert shown(axes, 0.0)


def test_an_infinite_error_is_above_a_break_and_no_point_is_lost() -> None:
    errors = [0.0, 1e-9, 3.0, math.inf]
    _, axes = of(errors)
    assert labels(axes)[0] == "0" and labels(axes)[-1] == r"$\infty$"
    assert heights(axes, errors) == sorted(heights(axes, errors))
    assert all(shown(axes, error) for error in errors)
    assert len([patch for patch in axes.patches if patch.get_label() == "_break"]) == 2


@pytest.mark.parametrize("errors", [[math.inf], [math.inf, 0.0], [math.inf, 0.3], [0.0, 1e-200, 1e150, math.inf]])
def test_every_mixture_is_inside_of_the_axes(errors: list[float]) -> None:
    _, axes = of(errors)
    assert all(shown(axes, error) for error in errors)


def test_what_is_not_a_number_is_counted_in_words() -> None:
    _, axes = of([0.0, math.nan, 1e-3, math.nan])
    assert [text.get_text() for text in axes.texts] == ["not a number (NaN): 2 of 4"]
    _, axes = of([0.0, 1e-3])
    assert not axes.texts


def test_there_is_ink_where_the_zeros_are_and_none_inside_of_the_break() -> None:
    figure, axes = of(MIXED)
    pixels = _pixels(figure)
    height = pixels.shape[0]
    x = int(axes.transData.transform([(0.0, 0.0)])[0][0])
    zero = height - int(heights(axes, [0.0])[0])
    assert (pixels[zero, x] != 255).any()
    cover = next(patch for patch in axes.patches if patch.get_label() == "_break").get_window_extent()
    box = axes.get_window_extent()
    inside = pixels[height - int(cover.y1) + 1 : height - int(cover.y0) - 1, int(box.x0) + 8 : int(box.x1) - 8]
    assert inside.size and (inside == 255).all()


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("infinite", [True, False])
def test_heights_grow_with_the_numbers_and_lead_back(zero: bool, infinite: bool) -> None:
    scale = BrokenLog(-8.0, 2.0, zero, infinite)
    numbers = [1e-8, 1e-3, 1.0, 99.0]
    np.testing.assert_allclose(scale.number(scale.height(numbers)), numbers, rtol=1e-12)
    whole = [*([0.0] if zero else []), *numbers, *([math.inf] if infinite else [])]
    places = [float(place) for place in scale.height(whole)]
    assert all(a < b for a, b in itertools.pairwise(places))
    assert list(scale.number(scale.height(whole)))[:: len(whole) - 1] == pytest.approx([whole[0], whole[-1]])
    assert math.isnan(float(scale.height(math.nan)))


def test_a_figure_with_a_break_can_be_stored() -> None:
    figure = compared(MIXED).plot()
    again = pickle.loads(pickle.dumps(figure))
    assert list(again.axes[1].get_lines()[0].get_ydata()) == MIXED
    assert again._repr_png_()[:4] == b"\x89PNG"
