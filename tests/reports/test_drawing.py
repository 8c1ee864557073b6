"""The picture of an energy graph: where things are placed, and that a file with ink in it comes out."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import PROBLEMS, Problem

import torch2ebm
from torch2ebm.reports.drawing import Layout, layout

pytest.importorskip("matplotlib")
from matplotlib import image

DRAWN = [p for p in PROBLEMS if p.name in ("mlp", "resnet", "gpt", "unet", "siamese", "densenet", "unrolled_lstm")]
CUTS = ("layer", "op")
TOUCH = 1e-9  # of float64 coordinates in inches

cases = pytest.mark.parametrize("problem", DRAWN, ids=lambda p: p.name)
cuts = pytest.mark.parametrize("nodes", CUTS)


def converted(problem: Problem, nodes: str) -> torch2ebm.EnergyModel:
    return torch2ebm.convert(problem.build().double(), nodes, example_inputs=problem.inputs(2))


def placed(problem: Problem, nodes: str) -> tuple[Layout, torch2ebm.EnergyModel]:
    model = converted(problem, nodes)
    return layout(model.graph), model


def test_all_problems_drawn_here_exist() -> None:
    assert len(DRAWN) == 7


@cuts
@cases
def test_children_are_below_their_parents_and_a_row_is_a_level(problem: Problem, nodes: str) -> None:
    drawing, model = placed(problem, nodes)
    row = {name: drawing.items[name].row for name in model.nodes}
    assert all(row[parent] < row[node.name] for node in model.nodes.values() for parent in node.parents)
    lowest = max(row.values())
    assert {name: lowest - r for name, r in row.items()} == dict(model.graph.levels)


@cuts
@cases
def test_no_two_things_of_a_row_share_a_place(problem: Problem, nodes: str) -> None:
    drawing, _ = placed(problem, nodes)
    rows: dict[int, list[tuple[float, float]]] = {}
    for key, item in drawing.items.items():
        width = 0.0 if item.kind == "bend" else drawing.box_width
        rows.setdefault(item.row, []).append((drawing.x[key], width))
    for row in rows.values():
        for (left, a), (right, b) in pairwise(sorted(row)):
            assert right - left > (a + b) / 2 + TOUCH


@cuts
@cases
def test_every_edge_is_a_path_of_lines_from_row_to_row(problem: Problem, nodes: str) -> None:
    drawing, model = placed(problem, nodes)
    after: dict[str, list[str]] = {}
    for start, end in drawing.lines:
        assert drawing.items[end].row == drawing.items[start].row + 1
        after.setdefault(start, []).append(end)

    def reached(key: str) -> set[str]:
        ends = after.get(key, [])
        boxes = {end for end in ends if drawing.items[end].kind != "bend"}
        return boxes.union(*(reached(end) for end in ends if drawing.items[end].kind == "bend"))

    assert all(reached(node.name) == set(node.children) for node in model.nodes.values())


def test_a_chain_is_a_straight_line() -> None:
    drawing, model = placed(DRAWN[0], "layer")
    assert len({round(drawing.x[name], 9) for name in model.nodes}) == 1


def test_the_boxes_between_the_ends_of_a_residual_connection_are_in_line() -> None:
    drawing, model = placed(next(p for p in DRAWN if p.name == "gpt"), "layer")
    assert max(drawing.x[name] for name in model.nodes) - min(drawing.x[name] for name in model.nodes) < 0.01  # inches
    assert sum(item.kind == "bend" for item in drawing.items.values()) > 0


def test_inputs_and_outputs_are_marked() -> None:
    drawing, _ = placed(next(p for p in DRAWN if p.name == "siamese"), "layer")
    (read,) = [key for key, item in drawing.items.items() if item.kind == "input"]
    assert drawing.items[read].name == "x"  # of which both branches read a part
    assert len([end for start, end in drawing.lines if start == read]) == 2
    assert drawing.items["head"].kind == "output"


class Positions(nn.Module):
    """Reads the contents of one input, the shape of another, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        scale = torch.arange(4) * like.shape[1]
        return self.second(torch.tanh(self.first(2 * x)) * scale)


def test_only_what_is_made_of_an_input_s_contents_is_drawn_as_an_input() -> None:
    model = torch2ebm.convert(Positions(), example_inputs=(torch.ones(2, 3), torch.ones(2, 5)))
    boxes = [item.name for item in layout(model.graph).items.values() if item.kind == "input"]
    assert boxes == ["x"]


@pytest.fixture
def no_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


def ink(path: Path) -> np.ndarray:
    pixels = image.imread(path)[..., :3]
    assert pixels.std() > 0.02, "a blank picture"
    return pixels


@pytest.mark.usefixtures("no_graphviz")
@cases
def test_the_picture_is_a_png_that_grows_with_the_graph(problem: Problem, tmp_path: Path) -> None:
    heights = []
    for nodes in CUTS:
        model = converted(problem, nodes)
        model.draw(str(tmp_path / f"{nodes}.png"))
        pixels = ink(tmp_path / f"{nodes}.png")
        heights.append(pixels.shape[0])
        assert pixels.shape[0] > 60 * (model.graph.depth + 1)
    assert heights == sorted(heights)


@pytest.mark.usefixtures("no_graphviz")
def test_drawing_knows_nothing_of_pyplot(tmp_path: Path) -> None:
    """In a process of its own: another test of this one may have imported it."""
    drawing = """
import sys, torch, torch2ebm
net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
torch2ebm.convert(net, example_inputs=torch.zeros(2, 4)).draw(sys.argv[1])
from torch2ebm.reports import plots
plots.plot_energy({"mine": (3.0, 2.0)})
sys.exit("matplotlib.pyplot" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", drawing, str(tmp_path / "graph.svg")], check=True)
    assert (tmp_path / "graph.svg").read_text().startswith("<?xml")


def test_a_suffix_that_is_no_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(torch2ebm.Torch2EBMError, match=r"graph\.nix.*png"):
        converted(DRAWN[0], "layer").draw(str(tmp_path / "graph.nix"))


@pytest.mark.usefixtures("no_graphviz")
def test_without_matplotlib_the_message_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = torch2ebm.convert(nn.Linear(2, 2), example_inputs=torch.randn(1, 2))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(torch2ebm.Torch2EBMError, match=r"pip install torch2ebm\[plot\]"):
        model.draw(str(tmp_path / "graph.png"))
