"""The pictures of gradients and energies: files with ink, and the numbers that stand behind points and lines."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch2ebm
from torch2ebm.errors import ConfigurationError
from torch2ebm.reports import plots

pytest.importorskip("matplotlib")
from matplotlib import image

STEPS = 12
NAN, INF = float("nan"), float("inf")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(6, 4)).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator).double(), torch.randint(4, (8,), generator=generator)


def relaxed() -> torch2ebm.InferenceState:
    model = torch2ebm.convert(net())
    algorithm = torch2ebm.PredictiveCoding(steps=STEPS, lr=0.1)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, algorithm)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    return model.state


def compared(steps: list[int] | None = None) -> torch2ebm.GradientComparison:
    algorithms = [torch2ebm.ZeroDivergence(), torch2ebm.PredictiveCoding(steps=STEPS, lr=0.1)]
    return torch2ebm.compare(net(), F.cross_entropy, batch(), algorithms, steps=steps)


def assert_picture(path: Path) -> None:
    pixels = image.imread(path)[..., :3]
    height, width = pixels.shape[:2]
    assert 300 < height < 3000
    assert 300 < width < 3000
    assert pixels.std() > 0.02, "a blank picture"


def lines(axes: Any) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def test_the_comparison_has_points_for_each_algorithm_over_the_parameters(tmp_path: Path) -> None:
    comparison = compared()
    figure = comparison.plot(str(tmp_path / "angles.png"))
    assert_picture(tmp_path / "angles.png")
    angles, errors = figure.axes
    expected = {n: [comparison.agreement[n][p].angle for p in comparison.parameters] for n in comparison.algorithms}
    assert lines(angles) == expected
    expected = {n: [comparison.agreement[n][p].relative_error for p in comparison.parameters] for n in lines(errors)}
    assert lines(errors) == expected
    assert [label.get_text() for label in errors.get_xticklabels()] == list(comparison.parameters)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(comparison.algorithms)
    assert len({line.get_marker() for line in angles.get_lines()}) == 2


def test_parameters_are_categories_without_a_line_and_steps_have_one() -> None:
    panels = np.reshape(compared(steps=[2, 6, 20]).plot().axes, (2, 2))
    styles = [[{line.get_linestyle() for line in panel.get_lines()} for panel in column] for column in panels.T]
    assert styles == [[{"None"}, {"None"}], [{"-"}, {"-"}]]
    assert all(line.get_marker() not in ("None", "") for panel in panels.flat for line in panel.get_lines())


def test_steps_that_were_looked_at_add_two_panels(tmp_path: Path) -> None:
    comparison = compared(steps=[2, 6, 20])
    figure = comparison.plot(str(tmp_path / "angles.png"))
    assert_picture(tmp_path / "angles.png")
    along = figure.axes[1]
    means = [np.mean([a.angle for a in comparison.along["PredictiveCoding"][n].values()]) for n in (2, 6, 20)]
    assert len(figure.axes) == 4
    assert lines(along)["PredictiveCoding"] == pytest.approx(means)
    assert list(along.get_lines()[0].get_xdata()) == [2, 6, 20]


@pytest.mark.parametrize(("curve", "scale"), [((8.0, 5.0, 4.0), "linear"), ((90.0, 5.0, 1.0), "log")])
def test_the_energy_axis_is_logarithmic_where_it_spans_decades(
    curve: tuple[float, ...], scale: str, tmp_path: Path
) -> None:
    figure = plots.plot_energy({"PredictiveCoding": curve}, str(tmp_path / "energy.png"))
    assert_picture(tmp_path / "energy.png")
    assert figure.axes[0].get_yscale() == scale
    assert lines(figure.axes[0]) == {"PredictiveCoding": list(curve)}


def test_an_energy_that_reaches_zero_has_a_linear_axis(tmp_path: Path) -> None:
    figure = plots.plot_energy({"PredictiveCoding": (5.0, 0.0)}, str(tmp_path / "energy.png"))
    assert figure.axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("of", [lambda state: state, lambda state: state.relaxation], ids=["state", "relaxation"])
def test_the_error_map_shows_the_wave_front(of: Callable[[Any], Any], tmp_path: Path) -> None:
    state = relaxed()
    figure = plots.plot_error_map(of(state), str(tmp_path / "errors.png"))
    assert_picture(tmp_path / "errors.png")
    shown = figure.axes[0].get_images()[0].get_array()
    hidden = list(state.graph.hidden_nodes)
    assert shown.shape == (len(hidden), STEPS + 1)
    # one level a step: a node is without error (masked, hence grey) until the step that is its level
    first = [int(np.argmin(np.ma.getmaskarray(np.ma.masked_invalid(row)))) for row in shown]
    assert first == [node.level for node in hidden]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [node.name for node in hidden]


def test_many_nodes_have_labels_that_can_be_read(tmp_path: Path) -> None:
    relaxation = torch2ebm.Relaxation(node_energy={f"layers.{i}": (0.0, 1.0, 2.0) for i in range(100)})
    figure = plots.plot_error_map(relaxation, str(tmp_path / "errors.png"))
    assert_picture(tmp_path / "errors.png")
    assert len(figure.axes[0].get_yticks()) <= plots.MOST_LABELS


def test_a_report_without_energies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(torch2ebm.Torch2EBMError, match="PredictiveCoding"):
        plots.plot_error_map(torch2ebm.Relaxation(), str(tmp_path / "errors.png"))
    with pytest.raises(torch2ebm.Torch2EBMError, match="plot_energy"):
        plots.plot_energy({}, str(tmp_path / "energy.png"))
    assert not list(tmp_path.iterdir())


# curves of every kind

NOT_CURVES = [None, (1.0, 2.0), 3.0, "abc", {"a": 3.0}, {"a": None}, {"a": "12"}, {"a": ["1", "2"]}, {"a": [1j]}]
NOT_CURVES += [{"a": {0: 1.0}}, {"a": [[1.0, 2.0]]}, {"a": torch.tensor(1.0)}, {"a": torch.ones(2, 2)}]


@pytest.mark.parametrize("wrong", NOT_CURVES, ids=str)
@pytest.mark.parametrize("function", ["plot_energy", "plot_error_map"])
def test_what_is_no_mapping_to_numbers_is_refused(function: str, wrong: Any) -> None:
    given = torch2ebm.Relaxation(node_energy=wrong) if function == "plot_error_map" else wrong
    with pytest.raises(
        ConfigurationError, match=rf"^{function}\((curves|state)=...\): got .*expected a mapping from names"
    ):
        getattr(plots, function)(given)


@pytest.mark.parametrize("wrong", [None, (1.0,), {"a": (1.0, 2.0)}, torch2ebm.Relaxation, "state"], ids=str)
def test_what_has_no_relaxation_has_no_map(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"plot_error_map\(state=...\): got .*expected model.state"):
        plots.plot_error_map(wrong)


def test_each_refusal_of_nothing_has_its_own_words() -> None:
    for curves, got in (({}, "no curves"), ({"mine": ()}, "no finite energy in mine"), ({"a": (NAN, INF)}, "in a")):
        with pytest.raises(ConfigurationError, match=rf"plot_energy.*got .*{got}.*relaxation.energy"):
            plots.plot_energy(curves)
    for energies in ({}, {"a": ()}, {"a": (0.0, NAN)}, {"a": (INF,)}, {"a": (-1.0,)}):
        with pytest.raises(ConfigurationError, match=r"plot_error_map.*no finite energies above zero"):
            plots.plot_error_map(torch2ebm.Relaxation(node_energy=energies))
    with pytest.raises(ConfigurationError, match=r"plot_error_map.*curves of 2 and of 3 steps"):
        plots.plot_error_map(torch2ebm.Relaxation(node_energy={"a": (1.0, 2.0, 3.0), "b": (1.0, 2.0)}))


@pytest.mark.parametrize("kind", [tuple, list, np.array, torch.tensor, iter], ids=lambda kind: kind.__name__)
def test_sequences_of_every_kind_are_curves(kind: Callable[[Any], Any]) -> None:
    figure = plots.plot_energy({"mine": kind([4.0, 2.0, 1.0]), "short": (3.0,)})
    assert lines(figure.axes[0]) == {"mine": [4.0, 2.0, 1.0], "short": [3.0]}


def test_energies_that_are_no_numbers_do_not_decide_on_the_axis() -> None:
    for curve, scale in (((4.0, NAN, 3.0, INF), "linear"), ((NAN, 90.0, 1.0), "log")):
        figure = plots.plot_energy({"mine": curve})
        assert figure.axes[0].get_yscale() == scale
        figure._repr_png_()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["_a", "$x$", "$\\bad{$", "__", "a\nb", "ünï"])
def test_a_name_stands_in_the_legend_as_it_is(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        energy = plots.plot_energy({name: (2.0, 1.0), "b": (2.0, 1.5)})
        both = torch2ebm.compare(net(), F.cross_entropy, batch(), {name: torch2ebm.ZeroDivergence()}).plot()
        mapped = plots.plot_error_map(torch2ebm.Relaxation(node_energy={name: (0.0, 1.0)}))
        for figure in (energy, both, mapped):
            figure._repr_png_()  # type: ignore[attr-defined]
    assert [text.get_text() for text in energy.axes[0].get_legend().get_texts()] == [name, "b"]
    assert [text.get_text() for text in both.legends[0].get_texts()] == [name]
    assert [text.get_text() for text in mapped.axes[0].get_yticklabels()] == [name]


def test_a_second_plot_into_the_same_axes_keeps_the_names_of_the_first() -> None:
    axes = plots.plot_energy({"first": (2.0, 1.0)}).axes[0]
    plots.plot_energy({"second": (3.0, 1.5)}, ax=axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["first", "second"]


def test_the_map_marks_what_is_infinite_and_what_is_no_number() -> None:
    figure = plots.plot_error_map(torch2ebm.Relaxation(node_energy={"a": (NAN, 1.0, 4.0), "b": (0.0, INF, -2.0)}))
    axes = figure.axes[0]
    shown = np.ma.masked_invalid(axes.get_images()[0].get_array())
    assert shown.mask.tolist() == [[True, False, False], [True, False, True]]
    assert shown.compressed().tolist() == [1.0, 4.0, 4.0]
    marks = {each.get_label(): each.get_offsets().tolist() for each in axes.collections}
    assert marks == {"infinite": [[1.0, 1.0]], "not a number (NaN)": [[0.0, 0.0]]}
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["0 or below", "infinite", "not a number (NaN)"]
    assert axes.get_xlim() == (-0.5, 2.5) and axes.get_ylim() == (1.5, -0.5)
    figure._repr_png_()  # type: ignore[attr-defined]
    plain = plots.plot_error_map(torch2ebm.Relaxation(node_energy={"a": (0.0, 1.0)}))
    assert [text.get_text() for text in plain.legends[0].get_texts()] == ["no error: exactly 0"]
    assert not plain.axes[0].collections
