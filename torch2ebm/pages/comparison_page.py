"""The page of a comparison of gradients: angles by algorithm and parameter, and along the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch2ebm.pages.skeleton import Bar, Cell, Panel, chart, curves, page, table
from torch2ebm.reports.agreement import Agreement
from torch2ebm.reports.plots import Compared

RIGHT_ANGLE = 90.0
_MEASURES = ("angle [degrees]", "relative error", "length / backprop's", "same sign [%]")


class ComparedOverall(Compared, Protocol):
    """With the agreement of all parameters as one vector."""

    @property
    def overall(self) -> Mapping[str, Agreement]: ...


def comparison_page(compared: ComparedOverall) -> str:
    """The page as text."""
    charts = _charts(compared)
    panels = [
        Panel(
            "All parameters together",
            "The angle between an algorithm's gradient and backprop's: 0 degrees is the same direction, at 90 degrees "
            "a small step does not lower the loss, and beyond it raises it.",
            table(("algorithm", *_MEASURES), ([name, *_cells(a)] for name, a in compared.overall.items())),
        )
    ]
    if charts:
        captions = {"angle": "Mean angle to backprop's gradient", "error": "Mean relative error"}
        drawn = [f"<div>{chart(key, captions[key], compared.algorithms)}</div>" for key in charts]
        panels.append(
            Panel(
                "Along the steps of inference",
                "Errors begin at the output and need steps to reach the first layers, so that gradients agree better "
                "the longer an algorithm relaxes.",
                f'<div class="two">{"".join(drawn)}</div>',
            )
        )
    panels.append(
        Panel(
            "Each parameter",
            "One row for each weight or bias and algorithm; click a header to sort, for example to see the largest "
            "angle first.",
            table(("parameter", "algorithm", *_MEASURES), parameter_rows(compared), text_columns=2),
        )
    )
    return page(
        "Local gradients beside backprop's",
        "Backprop computes how the loss changes with each weight. These algorithms find a change of their own for each "
        "weight from what its layer sees; the page shows how far the two agree on one batch.",
        panels,
        {"run": None, "charts": charts},
    )


def parameter_rows(compared: Compared) -> list[list[Cell]]:
    """Parameter, algorithm and the measures, by parameter in the module's order."""
    return [
        [parameter, name, *_cells(compared.agreement[name][parameter])]
        for parameter in compared.parameters
        for name in compared.algorithms
    ]


def one_algorithms_table(compared: ComparedOverall) -> str:
    """The table where one algorithm was compared, whose name says nothing."""
    (name,) = compared.algorithms
    rows = [[parameter, *_cells(compared.agreement[name][parameter])] for parameter in compared.parameters]
    return table(("parameter", *_MEASURES), [["all as one vector", *_cells(compared.overall[name])], *rows])


def _cells(a: Agreement) -> list[Cell]:
    angle = Bar(a.angle, f"{a.angle:.2f}", a.angle / RIGHT_ANGLE)
    return [angle, a.relative_error, a.norm_ratio, 100 * a.sign_agreement]


def _charts(compared: Compared) -> dict[str, Any]:
    if not compared.along:
        return {}

    def mean(measure: Callable[[Agreement], float]) -> dict[str, Sequence[float]]:
        return {
            name: [_mean([measure(a) for a in compared.along[name][step].values()]) for step in compared.steps]
            for name in compared.algorithms
        }

    order = sorted(range(len(compared.steps)), key=compared.steps.__getitem__)
    steps = [compared.steps[i] for i in order]
    angle, error = (
        {name: [line[i] for i in order] for name, line in mean(measure).items()}
        for measure in (lambda a: a.angle, lambda a: a.relative_error)
    )
    return {
        "angle": curves(steps, angle, "steps of inference", "mean angle [degrees]", least=1.0),
        "error": curves(steps, error, "steps of inference", "mean relative error", logarithmic=True),
    }


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else float("nan")
