"""Text tables."""

from __future__ import annotations

from collections.abc import Iterator

from torch2ebm.common.text import aligned
from torch2ebm.engine.results import InferenceState
from torch2ebm.graph.energy_graph import EnergyGraph


def node_table(graph: EnergyGraph, state: InferenceState | None = None) -> str:
    """One row a node, then what there is to know of the last relaxation."""
    rows = []
    signal = {} if state is None else state.signal
    progress = {} if state is None else state.progress
    for node in graph.nodes.values():
        size = sum(parameter.numel() for parameter in node.parameters.values())
        reads = ", ".join(node.parents) or "(input)"
        kind = "output" if node.is_output else ""
        shape = " ".join(str(graph.shapes.get(slot, "?")) for slot in node.slots)
        learns = [f"{progress[node.name]:.2g}" if node.name in progress else ""] if progress else []
        learns += [signal.get(node.name, "?")] if signal else []
        rows.append([node.name, node.description, reads, kind, str(node.level), shape, f"{size:,}", *learns])
    header = [
        "node",
        "function",
        "reads",
        "",
        "level",
        "shape",
        "parameters",
        *(["progress"] if progress else []),
        *(["signal"] if signal else []),
    ]
    opaque = [f"module '{path}' is one node: it {reason}" for path, reason in graph.opaque.items()]
    return "\n".join([aligned(header, rows, left=4), *opaque, *(_remarks(state) if state is not None else ())])


def _remarks(state: InferenceState) -> Iterator[str]:
    if state.loss_weight is not None:
        terms = f", a mean of {state.loss_terms:.4g} terms: each pulls with 1 over their number"
        yield f"weight of a sample's loss in the energy: {state.loss_weight:.4g}{terms if state.loss_terms > 1 else ''}"
    yield from troubles(state)
    if regime := ", ".join(_regime(state)):
        yield f"regime: {regime}"


def troubles(state: InferenceState) -> Iterator[str]:
    """What went wrong in the last relaxation, and what to take instead."""
    if state.unreached:
        yield f"no error has reached {', '.join(state.unreached)}: their gradients are exactly zero; take more steps"
    if lost := state.without_signal:
        yield f"rounding outweighs the errors in {', '.join(lost)}: take a solver of errors, or nothing set"
    energy = state.relaxation.energy
    if energy and energy[-1] > energy[0]:
        yield f"the energy rose from {energy[0]:.4g} to {energy[-1]:.4g}; take a smaller step size"


def _regime(state: InferenceState) -> Iterator[str]:
    """What kind of gradient the last relaxation has given, and how near to rest it came."""
    last = state.relaxation
    if last.regime:
        yield last.regime
    if last.sigma_squared is not None:
        yield f"r = beta sigma^2 = {last.beta:.3g} * {last.sigma_squared:.3g} = {last.r:.3g}"
    residuals = state.relative_residual
    if residuals is not None and len(residuals):
        median, worst = float(residuals.median()), float(residuals.max())
        yield f"residual over |e|: {median:.1e} (median), {worst:.1e} (worst sample)"
    if last.settled is not None:
        yield f"{last.settled:.0%} of the samples settled"
