"""The page of one run: the graph coloured by the energy of its errors at every step, curves, angles and settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from torch2ebm.engine.results import InferenceState, Relaxation
from torch2ebm.errors import BatchDimensionError, NoStateError
from torch2ebm.pages.comparison_page import ComparedOverall, one_algorithms_table
from torch2ebm.pages.graph_picture import graph_picture
from torch2ebm.pages.skeleton import Panel, chart, curves, facts, page, spans_a_decade
from torch2ebm.reports.plots import DECADES
from torch2ebm.reports.tables import troubles

MOST_STEPS = 250  # on the slider
_MORE = "torch2ebm.report(model, loss_fn, batch)"
# from little to much energy: dark blue, blue, green, yellow, which people with any colour vision can order
COLOURS = (
    (68, 1, 84), (70, 50, 127), (54, 92, 141), (39, 127, 142), (31, 161, 135), (74, 194, 109), (160, 218, 57),
    (253, 231, 37),
)  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Energies of the nodes, a row for each step that the slider has.

    Attributes:
        steps: The number of each step; one entry where there is no slider.
        of_node: Node to its energies, None where one is not known.
        total: The whole energy at each step, empty without a slider.
        loss: The part of the loss.
        last: The number of the last step.
    """

    steps: Sequence[int]
    of_node: Mapping[str, Sequence[float | None]]
    total: Sequence[float] = ()
    loss: Sequence[float] = ()
    last: int = 0

    @property
    def slides(self) -> bool:
        return bool(self.total)

    @property
    def thinned(self) -> bool:
        return self.slides and len(self.steps) <= self.last


def run_page(module: str, settings: str, state: InferenceState, compared: ComparedOverall | None) -> str:
    """The page as text. ``compared`` has one algorithm: that of the run."""
    columns = columns_of(state)
    panels = [
        _relaxation_panel(state, columns),
        Panel(
            "Angle to backprop",
            "For each weight or bias: the angle between its local gradient and the one that backprop computes. "
            "0 degrees is the same direction, at 90 degrees a small step does not lower the loss.",
            f"<p>Not measured, since a run does not keep its batch. Call <code>{_MORE}</code> to measure it.</p>"
            if compared is None
            else one_algorithms_table(compared),
        ),
        Panel(
            "What was run",
            "The settings of the algorithm, and how its relaxation ended.",
            _warnings(state) + facts(_facts(module, settings, state)),
        ),
    ]
    return page(
        f"One learning step of {module}",
        "Each box is a part of the network that predicts its own value from what it reads. Before weights change, "
        "values move away from these predictions, towards what lowers the loss. The distance is the box's error, and "
        "each weight learns from the error of its own box.",
        panels,
        _data(state, columns),
    )


def columns_of(state: InferenceState) -> Columns:
    """The energies at every step, or at evenly many of them; without such, those of the errors at the end."""
    relaxation = state.relaxation
    if not relaxation.energy:
        return Columns((state.relaxation.steps,), {name: (_ended(state, name),) for name in state.graph.nodes})
    last = len(relaxation.energy) - 1
    every = math.ceil(len(relaxation.energy) / MOST_STEPS)
    steps = sorted({*range(0, last, every), last})
    return Columns(
        steps,
        {name: [column[i] for i in steps] for name, column in relaxation.node_energy.items()},
        [relaxation.energy[i] for i in steps],
        [relaxation.loss[i] if relaxation.loss else math.nan for i in steps],  # none of one that ran away
        last,
    )


def _ended(state: InferenceState, name: str) -> float | None:
    try:
        energy = state.energy[name]
    except (BatchDimensionError, NoStateError):
        return None
    return sum(float(each.sum()) for each in (energy if isinstance(energy, tuple) else (energy,)))


def _data(state: InferenceState, columns: Columns) -> dict[str, Any]:
    errors = [total - loss for total, loss in zip(columns.total, columns.loss, strict=True)]
    run = {
        "steps": columns.steps,
        "last": columns.last,
        "names": list(columns.of_node),
        "columns": [*columns.of_node.values(), *([columns.loss] if columns.slides else [])],
        "total": columns.total,
        "errors": errors,
        "loss": columns.loss,
        "range": _range(columns),
        "colours": COLOURS,
    }
    if not columns.slides:
        return {"run": run, "charts": {}}
    lines = {"total": columns.total, "of the errors": errors, "of the loss": columns.loss}
    logarithmic = not any(number < 0 for line in lines.values() for number in line) and spans_a_decade(columns.total)
    drawn = curves(columns.steps, lines, "step of inference", "energy", logarithmic, follows=True)
    return {"run": run, "charts": {"energy": drawn}}


def _range(columns: Columns) -> tuple[float, float]:
    """Of the colours; what is smaller by more decades has the darkest one."""
    energies = [energy for column in [*columns.of_node.values(), columns.loss] for energy in column]
    positive = [energy for energy in energies if energy is not None and 0 < energy < math.inf]
    largest = max(positive, default=0.0)
    return max(min(positive, default=0.0), largest * 10.0**-DECADES), largest


def _relaxation_panel(state: InferenceState, columns: Columns) -> Panel:
    numbered = {name: i for i, name in enumerate(columns.of_node)}
    picture = graph_picture(state.graph, numbered, len(numbered) if columns.slides else None)
    graph = (
        '<div><div class="zoom">Graph: <button type="button" id="smaller" aria-label="smaller">&minus;</button>'
        '<button type="button" id="larger" aria-label="larger">+</button>'
        '<button type="button" id="whole">Whole</button></div>'
        f'<div class="scroll graph" tabindex="0" role="region" aria-label="graph">{picture}</div>'
        f"{_legend(columns, not state.graph.nodes.keys() <= columns.of_node.keys())}</div>"
    )
    if not columns.slides:
        return Panel(
            "Errors",
            "The colour of a box is the energy of its error, half its square, summed over the batch. This algorithm "
            "keeps no energy for each step, so the page shows where it ended.",
            graph,
        )
    energy = chart("energy", "Energy", ("total", "of the errors", "of the loss"))
    explained = (
        '<p class="says">Relaxing trades loss against errors: as a rule the total falls until nothing lowers it more. '
        "The dashed line is the step of the slider.</p>"
    )
    return Panel(
        "Relaxation",
        "The colour of a box is the energy of its error, half its square as a rule, summed over the batch. Move the "
        "slider: errors arise at the outputs, below, and travel up, one level a step or faster.",
        f'{_slider(columns)}<div class="two">{graph}<div>{energy}{explained}</div></div>',
    )


def _slider(columns: Columns) -> str:
    last = len(columns.steps) - 1
    numbers = " · ".join(
        f'{name} <output id="{key}"></output>'
        for name, key in (("energy", "total"), ("errors", "errors"), ("loss", "loss"))
    )
    note = (
        f"<p>The slider has {len(columns.steps)} of {columns.last + 1:,} moments: one of every "
        f"{columns.steps[1] - columns.steps[0]} steps, and the last.</p>"
        if columns.thinned
        else ""
    )
    return (
        '<div class="controls"><button type="button" id="play">Play</button>'
        f'<input type="range" id="step" min="0" max="{last}" value="{last}" step="1" aria-label="step of inference">'
        f'<output id="where"></output><span>{numbers}</span></div>{note}'
    )


def _legend(columns: Columns, without_value: bool) -> str:
    low, high = _range(columns)
    energies = [energy for column in [*columns.of_node.values(), columns.loss] for energy in column]
    keys = '<span class="key"><i></i>exactly 0: no error is there</span>'
    if without_value:
        keys += '<span class="key"><i class="open"></i>an output: the loss acts on its prediction</span>'
    if any(energy is not None and energy < 0 for energy in energies):
        keys += '<span class="key"><i class="below"></i>below 0</span>'
    if not high:
        return f'<div class="legend">{keys}</div>'
    stops = ", ".join(f"rgb({red}, {green}, {blue})" for red, green, blue in COLOURS)
    ends = (low, math.sqrt(low) * math.sqrt(high), high)
    numbers = "".join(f"<span>{end:.1e}</span>" for end in ends)
    return (
        f'<div class="legend"><div>energy, on a logarithmic scale</div>'
        f'<div class="ramp" style="background: linear-gradient(to right, {stops})"></div>'
        f'<div class="ends">{numbers}</div>{keys}</div>'
    )


def _warnings(state: InferenceState) -> str:
    found = [*troubles(state), *_unsettled(state.relaxation)]
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    return f'<div class="warnings" role="note"><h3>Look at this</h3><ul>{items}</ul></div>' if found else ""


def _unsettled(relaxation: Relaxation) -> Iterator[str]:
    if relaxation.energy and not relaxation.loss:
        yield "the relaxation ran away, and its batch gave no gradient; take a smaller step size"
    if relaxation.converged is False:
        yield (
            f"the values still move: the residual is {relaxation.residual:.2g}, "
            f"and {relaxation.tol:.2g} was asked for; take more steps"
        )
    if relaxation.at_minimum is not None and not bool(relaxation.at_minimum.all()):
        share = 1 - float(relaxation.at_minimum.double().mean())
        yield f"{share:.0%} of the samples rest in a saddle of the energy, and in no minimum"


def _facts(module: str, settings: str, state: InferenceState) -> Iterator[tuple[str, str, str]]:
    graph, last = state.graph, state.relaxation
    size = sum(parameter.numel() for parameter in graph.parameters.values())
    yield "Network", f"{module}: {len(graph.nodes)} nodes, {size:,} weights", ""
    yield "Algorithm", settings, ""
    yield "Samples", str(state.batch_size), "Each has values and errors of its own; the energies are summed."
    yield "Steps", str(last.steps), "How often all values moved before the weights learned." if last.steps else ""
    if last.energy:
        yield "Energy", f"{last.energy[0]:.4g} → {last.energy[-1]:.4g}", "At the start, and where it ended."
    if last.converged is not None:
        yield "At rest", "yes" if last.converged else "no", _rest(last)
    if last.settled is not None:
        yield "Settled", f"{last.settled:.0%} of the samples", "Their residual is as small as was asked for."
    if last.on_kinks:
        yield "On kinks", f"{last.on_kinks:.0%} of the samples", "They rest where a slope jumps, as that of a ReLU."
    if last.steps and math.isfinite(last.residual):
        yield "Residual", f"{last.residual:.3g}", "How strongly the worst value is still pulled; 0 is at rest."
    if last.lr is not None:
        yield "Step size", f"{last.lr:.4g}", "How far values move in a step."
    if last.steps:
        yield "Nudge", f"beta = {last.beta:.4g}", "How strongly the loss pulls; 1 is its full weight in the energy."
    if last.regime:
        r = "" if last.r is None else f" (r = {last.r:.3g})"
        yield "Regime", f"{last.regime}{r}", "What kind of gradient such a nudge gives."
    if len(state.phases) > 1:
        nudges = ", ".join(f"{phase.beta:.4g}" for phase in state.phases)
        yield "Phases", nudges, "Nudges of all phases; the gradient is made of all, and the page shows the first."


def _rest(relaxation: Relaxation) -> str:
    kink = "" if relaxation.on_kinks is None else ", or a kink"
    return f"What counts as rest: a residual of {relaxation.tol:.2g} or less{kink}."
