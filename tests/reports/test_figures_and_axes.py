"""What a plot gives back and where it draws: figures that notebooks show, and axes of the user's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import torch2ebm
from torch2ebm.reports import plots
from torch2ebm.reports.agreement import Agreement

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ENERGIES = {"a": (0.0, 1.0, 2.0), "b": (1.0, 1.5, 1.2)}
RELAXATION = torch2ebm.Relaxation(node_energy=ENERGIES)


def compared(steps: tuple[int, ...] = ()) -> torch2ebm.GradientComparison:
    each = {"0.weight": Agreement(1.0, 0.0, 0.0, 1.0, 1.0), "0.bias": Agreement(0.9, 25.0, 0.4, 1.0, 1.0)}
    along = {"mine": dict.fromkeys(steps, each)} if steps else {}
    return torch2ebm.GradientComparison(("mine",), tuple(each), steps, {"mine": each}, {}, along)


PLOTS: dict[str, Callable[..., Figure]] = {
    "comparison": lambda *args, **settings: compared().plot(*args, **settings),
    "energy": lambda *args, **settings: plots.plot_energy({"mine": (3.0, 2.0)}, *args, **settings),
    "map": lambda *args, **settings: plots.plot_error_map(RELAXATION, *args, **settings),
}
each_plot = pytest.mark.parametrize("name", PLOTS)


def panels_of(name: str, figure: Figure) -> Any:
    """Axes for it in the left column, and others beside them."""
    axes = figure.subplots(2, 2)
    return axes[:, 0] if name == "comparison" else axes[0, 0]


@each_plot
def test_without_a_path_no_file_is_written_and_a_notebook_shows_the_figure(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    figure: Any = PLOTS[name]()
    assert isinstance(figure, Figure) and not list(tmp_path.iterdir())
    assert figure._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"  # what IPython asks an object for


@each_plot
def test_with_a_path_there_is_a_file_and_the_same_figure(name: str, tmp_path: Path) -> None:
    figure = PLOTS[name](str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG" and isinstance(figure, Figure)
    PLOTS[name](tmp_path / "b.svg")
    assert "<svg" in (tmp_path / "b.svg").read_text()


@each_plot
def test_axes_of_yours_are_drawn_into_and_nothing_beside_them_changes(name: str) -> None:
    figure = Figure()
    axes = panels_of(name, figure)
    others = [each for each in figure.axes if each not in np.ravel(axes)]
    FigureCanvasAgg(figure).draw()
    before = [(each.get_position().bounds, len(each.get_children()), each.get_xlim()) for each in others]
    cells = [each.get_position() for each in np.ravel(axes)]
    found = PLOTS[name](ax=axes)
    FigureCanvasAgg(figure).draw()
    assert found is figure and not figure.legends and not figure.texts
    assert [(each.get_position().bounds, len(each.get_children()), each.get_xlim()) for each in others] == before
    assert all(each.has_data() for each in np.ravel(axes))
    for each in figure.axes:
        if each not in others:
            box = each.get_position()
            assert any(c.x0 - 1e-9 <= box.x0 and box.x1 <= c.x1 + 1e-9 and c.y0 - 1e-9 <= box.y0 for c in cells)


@each_plot
def test_axes_of_a_part_of_a_figure_lead_to_the_whole_one(name: str, tmp_path: Path) -> None:
    figure = Figure(layout="constrained")
    part, _ = figure.subfigures(1, 2)
    assert PLOTS[name](str(tmp_path / "a.png"), ax=panels_of(name, part)) is figure
    assert (tmp_path / "a.png").exists()


def test_four_axes_take_what_is_along_the_steps() -> None:
    figure = Figure()
    axes = figure.subplots(2, 2)
    compared((1, 5)).plot(ax=axes)
    assert [[list(each.get_lines()[0].get_xdata()) for each in row] for row in axes] == [[[0, 1], [1, 5]]] * 2
    assert list(axes[0, 0].get_lines()[0].get_ydata()) == [0.0, 25.0]
    assert list(axes[1, 0].get_lines()[0].get_ydata()) == [0.0, 0.4]
    pair = Figure().subplots(2)
    compared((1, 5)).plot(ax=list(pair))
    assert list(pair[1].get_lines()[0].get_xdata()) == [0, 1]


def test_what_is_no_right_number_of_axes_is_refused() -> None:
    axes = Figure().subplots(2, 3)
    for wrong in (axes[0, 0], axes[0], axes[:, :2], [axes[0, 0]] * 2, [], "axes", (axes[0, 0], 3)):
        with pytest.raises(torch2ebm.errors.ConfigurationError, match=r"plot\(ax=...\).*a pair of axes"):
            compared().plot(ax=wrong)
    with pytest.raises(torch2ebm.errors.ConfigurationError, match="or four"):
        compared((1, 2)).plot(ax=axes)
    for function in ("energy", "map"):
        with pytest.raises(torch2ebm.errors.ConfigurationError, match="one axes"):
            PLOTS[function](ax=axes[0])
    assert not any(each.has_data() for each in axes.flat)


@pytest.mark.parametrize(
    "form",
    [
        lambda axes: {"A": axes[0], "B": axes[1]},
        lambda axes: {"A": axes[0], "B": axes[1]}.values(),
        lambda axes: (each for each in axes),
        lambda axes: [(axes[0],), np.array([axes[1]])],
        tuple,
    ],
    ids=["mosaic", "values", "generator", "nested", "tuple"],
)
def test_axes_in_any_order_that_there_is_are_taken(form: Callable[[Any], Any]) -> None:
    axes = Figure().subplots(2)
    compared().plot(ax=form(axes))
    assert [each.get_ylabel().split()[0] for each in axes] == ["angle", "relative"]
    alone = Figure().subplots()
    plots.plot_energy({"mine": (3.0, 2.0)}, ax=iter([alone]))
    assert alone.has_data()


def test_what_has_no_order_and_what_holds_no_axes_is_refused() -> None:
    import torch

    axes = Figure().subplots(2)
    for wrong in (set(axes), {"A": axes[0], "B": 3}, b"ab", {}, iter([]), torch.tensor(3.0), torch.ones(2)):
        with pytest.raises(torch2ebm.errors.ConfigurationError, match=r"plot\(ax=...\).*a pair of axes"):
            compared().plot(ax=wrong)
    assert not any(each.has_data() for each in axes)


def of_grid(rows: int, columns: int, **shared: Any) -> Any:
    return Figure().subplots(rows, columns, **shared)


SHARED: dict[str, tuple[str, Any, Callable[[Any], Any]]] = {
    "a y-axis with one beside": ("comparison", of_grid(1, 3, sharey=True), lambda axes: axes[:2]),
    "a y-axis of both": ("comparison", of_grid(1, 2, sharey=True), lambda axes: axes),
    "an x-axis with another column": ("comparison", of_grid(2, 2, sharex=True), lambda axes: axes[:, 0]),
    "an x-axis with one below": ("comparison", of_grid(3, 1, sharex=True), lambda axes: axes[:2]),
    "both of a map": ("map", of_grid(2, 2, sharex=True, sharey=True), lambda axes: axes[0, 0]),
    "an x-axis of a map": ("map", of_grid(2, 1, sharex=True), lambda axes: axes[0]),
}


@pytest.mark.parametrize("case", SHARED)
def test_axes_that_others_would_follow_are_refused(case: str) -> None:
    name, grid, given = SHARED[case]
    before = [(each.get_xlim(), each.get_ylim(), each.get_yscale(), list(each.get_xticks())) for each in grid.flat]
    with pytest.raises(torch2ebm.errors.ConfigurationError, match=r"\(ax=...\): got axes that share their [xy]-axis"):
        PLOTS[name](ax=given(grid))
    assert before == [
        (each.get_xlim(), each.get_ylim(), each.get_yscale(), list(each.get_xticks())) for each in grid.flat
    ]
    assert not any(each.has_data() for each in grid.flat)


def test_of_four_axes_each_column_may_have_an_x_axis_of_its_own() -> None:
    wrong = of_grid(2, 2, sharex=True)
    with pytest.raises(torch2ebm.errors.ConfigurationError, match="share their x-axis"):
        compared((1, 5)).plot(ax=wrong)
    for fine in (of_grid(2, 2, sharex="col"), of_grid(2, 2)):
        compared((1, 5)).plot(ax=fine)
        assert [list(each.get_lines()[0].get_xdata()) for each in fine[1]] == [[0, 1], [1, 5]]
    pair = of_grid(2, 2, sharex="col")
    before = [each.get_xlim() for each in pair[:, 1]]
    compared().plot(ax=pair[:, 0])
    assert [each.get_xlim() for each in pair[:, 1]] == before


def test_axes_of_pyplot_serve_and_are_the_only_ones() -> None:
    import matplotlib.pyplot as plt  # here: that plots do without it is looked at elsewhere, in another process

    plt.switch_backend("Agg")
    figure, axes = plt.subplots()
    try:
        assert plots.plot_energy({"mine": (3.0, 2.0)}, ax=axes) is figure
        assert plt.get_fignums() == [figure.number] and plt.gca() is axes
    finally:
        plt.close(figure)
