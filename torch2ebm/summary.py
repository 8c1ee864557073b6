"""Text tables."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torch2ebm.graph import EnergyGraph
from torch2ebm.state import InferenceState


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns padded to their widest entry; the first ``left`` columns aligned left, the others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def node_table(graph: EnergyGraph, state: InferenceState | None = None) -> str:
    """One row a node: level, name, function, parents, shape of the value (after a backward), parameters."""
    rows = []
    for node in graph.nodes.values():
        size = sum(parameter.numel() for parameter in node.parameters.values())
        kind = "output" if node.is_output else ""
        rows.append(
            [
                node.name,
                node.description,
                ", ".join(node.parents) or "(input)",
                kind,
                str(node.level),
                _shape(state, node.name),
                f"{size:,}",
            ]
        )
    table = aligned(["node", "function", "reads", "", "level", "shape", "parameters"], rows, left=4)
    if state is not None and state.unreached:
        table += (
            f"\nno error has reached {', '.join(state.unreached)}: their gradients are exactly zero; take more steps"
        )
    return table


def _shape(state: InferenceState | None, name: str) -> str:
    if state is None:
        return "?"
    value = state.prediction[name]
    return " ".join(str(tuple(v.shape)) for v in ((value,) if isinstance(value, Tensor) else value))
