"""``python website/result_pictures.py`` draws the pictures of ``docs/plots.md`` anew. It needs Graphviz."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import torch2ebm
from torch2ebm.reports.dot import has_dot
from torch2ebm.reports.plots import plot_energy, plot_error_map

TARGET = Path(__file__).parents[1] / "docs" / "pictures"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ResidualMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(20, 16), nn.Sequential(Block(16), Block(16)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def main() -> None:
    if not has_dot():
        raise SystemExit("Install Graphviz: the pages show what it draws.")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "torch2ebm"})
    warnings.simplefilter("ignore", torch2ebm.errors.NoSignalWarning)  # of few steps: that is what is shown
    torch.manual_seed(0)
    net = ResidualMLP().double()
    x, y = torch.randn(64, 20).double(), torch.randint(0, 4, (64,))
    model = torch2ebm.convert(net, example_inputs=x)
    model.draw(TARGET / "graph.svg")
    model.draw(TARGET / "graph_collapsed.svg", depth=2)
    strict = torch2ebm.PredictiveCoding(steps=20, lr=0.1)
    algorithms = [torch2ebm.ZeroDivergence(), torch2ebm.PredictiveCoding(), strict]
    names = ("ZeroDivergence()", "PredictiveCoding()", "PredictiveCoding(steps=20, lr=0.1)")
    comparison = torch2ebm.compare(model, F.cross_entropy, (x, y), dict(zip(names, algorithms, strict=True)))
    _write(comparison.plot(), "comparison.svg")
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    model.attach(strict)
    F.cross_entropy(model(x), y).backward()
    plot_energy({names[2]: model.state.relaxation.energy}, ax=left)
    plot_error_map(model.state, ax=right)
    _write(figure, "energies.svg")


def _write(figure: Figure, name: str) -> None:
    figure.savefig(TARGET / name, metadata={"Date": None})


if __name__ == "__main__":
    main()
