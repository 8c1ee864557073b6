"""Pictures of a graph: the text for Graphviz, modules collapsed to boxes, shapes, formats, and hostile names."""

import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from graphlib import TopologicalSorter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn
from zoo import PROBLEMS, Problem

import torch2ebm
from torch2ebm.errors import ConfigurationError
from torch2ebm.reports.dot import rendered
from torch2ebm.reports.drawing import layout
from torch2ebm.reports.outline import Box, outline_of

DRAWN = [p for p in PROBLEMS if p.name in ("mlp", "resnet", "gpt", "siamese")]
DEPTHS = (None, 0, 1, 2, 3)
HOSTILE = ['say "hi"', "<b>&amp;</b>", "back\\", "new\nline", "\\N", "$x_1^2$", "\\", "}]; n0 -> n0 [", "ünï"]
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz")
needs_matplotlib = pytest.mark.usefixtures("matplotlib")


@pytest.fixture
def matplotlib() -> None:
    pytest.importorskip("matplotlib")


@pytest.fixture
def no_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


without_dot = pytest.mark.usefixtures("no_graphviz")


def converted(problem: Problem, nodes: str = "layer") -> torch2ebm.EnergyModel:
    return torch2ebm.convert(problem.build().double(), nodes, example_inputs=problem.inputs(2))


def named(*names: str) -> torch2ebm.EnergyModel:
    layers = nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in names))
    return torch2ebm.convert(nn.Sequential(layers, nn.Linear(4, 2)), example_inputs=torch.randn(5, 4))


def texts(dot: str) -> list[str]:
    """What each string of a text for Graphviz says, by the rules of its language."""
    found = (re.sub(r"\\(.)", lambda sign: "\n" if sign[1] == "n" else sign[1], each) for each in STRING.findall(dot))
    return [each.replace("&amp;", "&") for each in found]


def lines_of(dot: str) -> list[tuple[str, str]]:
    outside = STRING.sub('""', dot)
    return re.findall(r"^\s*(n\d+) -> (n\d+);$", outside, re.MULTILINE)


@pytest.mark.parametrize("problem", DRAWN, ids=lambda p: p.name)
def test_the_text_has_a_line_for_each_node_that_another_reads(problem: Problem) -> None:
    model = converted(problem)
    dot = model.draw().dot
    labels = dict(re.findall(r'^\s*(n\d+) \[label="([^"\\]*)\\n', dot, re.MULTILINE))
    assert sorted(labels.values()) == sorted(model.nodes)
    found = {(labels[parent], labels[child]) for parent, child in lines_of(dot)}
    assert found == {(parent, node.name) for node in model.nodes.values() for parent in node.parents}


def test_each_module_around_nodes_is_one_frame_inside_of_that_around_it() -> None:
    model = converted(next(p for p in DRAWN if p.name == "gpt"))
    around: list[str] = []
    found: dict[str, list[str]] = {}
    titles = []
    for line in model.draw().dot.splitlines():
        if "subgraph" in line:
            around.append("")
        elif line.strip().startswith("label="):
            around[-1] = STRING.findall(line)[0].split(":")[0]
            titles.append(STRING.findall(line)[0])
        elif line.strip() == "}" and around:
            around.pop()
        elif node := re.match(r'\s*n\d+ \[label="([^"\\]*)', line):
            found[node[1]] = list(around)
    prefixes = {name: name.split(".")[:-1] for name in model.nodes}
    assert found == {n: [".".join(parts[: i + 1]) for i in range(len(parts))] for n, parts in prefixes.items()}
    assert titles[:3] == ["blocks: ModuleList", "blocks.0: GPTBlock", "blocks.0.attention: SelfAttention"]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("nodes", ["layer", "op"])
@pytest.mark.parametrize("problem", DRAWN, ids=lambda p: p.name)
def test_boxes_hold_every_node_once_and_their_lines_are_those_of_the_nodes(
    problem: Problem, nodes: str, depth: int | None
) -> None:
    graph = converted(problem, nodes).graph
    boxes = outline_of(graph, depth).boxes
    assert sorted(name for box in boxes.values() for name in box.nodes) == sorted(graph.nodes)
    for box in boxes.values():
        deep = [name for name in box.nodes if depth is not None and name.count(".") >= depth]
        assert len(box.nodes) == 1 or deep == list(box.nodes)
        if deep and depth:
            assert {".".join(name.split(".")[:depth]) for name in deep} == {box.name}
    holder = {name: key for key, box in boxes.items() for name in box.nodes}
    expected = {(holder[p], holder[n]) for n, node in graph.nodes.items() for p in node.parents}
    assert {(key, c) for key, box in boxes.items() for c in box.children} == {(a, b) for a, b in expected if a != b}
    order = list(TopologicalSorter({key: box.children for key, box in boxes.items()}).static_order())  # no circle
    assert len(order) == len(boxes)
    assert all(boxes[child].level < box.level for box in boxes.values() for child in box.children)


class Left(nn.Module):
    """``block`` is entered twice, with a layer of the root in between, or one after the other."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
        self.middle, self.between = nn.Linear(4, 4), between

    def forward(self, x: Tensor) -> Tensor:
        x = self.block["first"](x)
        x = self.middle(x) if self.between else x
        x = self.block["second"](x)
        return x if self.between else self.middle(x)


@pytest.mark.parametrize(
    ("between", "boxes"), [(True, ["block", "middle", "block"]), (False, ["block", "middle"])], ids=["left", "not"]
)
def test_a_module_that_is_left_and_entered_again_has_two_boxes(between: bool, boxes: list[str]) -> None:
    graph = torch2ebm.convert(Left(between), example_inputs=torch.randn(2, 4)).graph
    assert [box.name for box in outline_of(graph, 1).boxes.values()] == boxes


def test_shapes_are_those_of_the_captured_values_in_both_drawings() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)))
    model = torch2ebm.convert(net, example_inputs=torch.randn(5, 4))
    assert [box.shapes for box in outline_of(model.graph).boxes.values()] == [("(5, 8)",), ("(5, 6)",), ("(5, 3)",)]
    # of a module what leaves it
    assert [box.shapes for box in outline_of(model.graph, 1).boxes.values()] == [("(5, 8)",), ("(5, 3)",)]
    assert '"0\\nLinear > Tanh\\n(5, 8)"' in model.draw().dot and "batch included" in model.draw().dot
    assert layout(model.graph).items["0"].shapes == "(5, 8)"
    assert '"2\\nSequential, 2 nodes\\n(5, 3)"' in model.draw(depth=1).dot


def test_no_depth_is_the_largest_one_and_zero_is_one_box() -> None:
    model = converted(next(p for p in DRAWN if p.name == "gpt"))
    assert model.draw(depth=9).dot == model.draw().dot
    (box,) = model.draw(depth=0).outline.boxes.values()
    assert isinstance(box, Box) and box.name == "GPT" and len(box.nodes) == len(model.nodes)


@pytest.mark.parametrize("depth", [-1, 1.5, "1", True])
def test_an_illegal_depth_is_refused(depth: object) -> None:
    with pytest.raises(ConfigurationError, match=r"model.draw\(depth=...\)"):
        named("a").draw(depth=depth)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_a_name_whatever_is_in_it(name: str) -> None:
    model = named("before", name, "after")
    dot, plain = model.draw().dot, named("before", "plain", "after").draw().dot
    shown = name.replace("\n", "\\n")
    assert f"0.{shown}\nLinear\n(5, 4)" in texts(dot)
    assert lines_of(dot) == lines_of(plain) and len(texts(dot)) == len(texts(plain))
    assert STRING.sub("", dot) == STRING.sub("", plain)
    layout(model.graph)


@needs_dot
def test_graphviz_shows_hostile_names_as_they_are() -> None:
    drawing = ElementTree.fromstring(named(*HOSTILE).draw()._repr_svg_())
    written = ("".join(each.itertext()) for each in drawing.iter() if each.tag.endswith("}text"))
    found = {each.replace("\N{NO-BREAK SPACE}", " ") for each in written}
    assert {f"0.{name}".replace("\n", "\\n") for name in HOSTILE} <= found


@needs_dot
def test_graphviz_draws_the_formats_that_it_has(tmp_path: Path) -> None:
    model = named("a", "b")
    for suffix, begins in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("json", b"{"), ("DOT", b"digraph")):
        model.draw(tmp_path / f"graph.{suffix}", depth=1)
        assert (tmp_path / f"graph.{suffix}").read_bytes().startswith(begins)
    assert b"0: Sequential, 2 nodes" in (tmp_path / "graph.svg").read_bytes()


@without_dot
@needs_matplotlib
def test_without_graphviz_matplotlib_draws(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = named("a", "b", *HOSTILE)
    for depth in (None, 1):
        for suffix, begins in (("svg", b"<?xml"), ("png", b"\x89PNG")):
            model.draw(tmp_path / f"graph.{suffix}", depth=depth)
            assert (tmp_path / f"graph.{suffix}").read_bytes().startswith(begins)
        assert "<svg" in model.draw(depth=depth)._repr_svg_()
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ConfigurationError, match=r"graph\.json.*svg.*install Graphviz"):
        model.draw(tmp_path / "graph.json")
    assert not (tmp_path / "graph.json").exists()


@without_dot
def test_the_text_needs_nothing_and_the_error_names_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model = named("a")
    model.draw(tmp_path / "graph.gv")
    assert (tmp_path / "graph.gv").read_text(encoding="utf-8") == model.draw().dot
    for draw in (lambda: model.draw(tmp_path / "graph.svg"), lambda: model.draw()._repr_svg_()):
        with pytest.raises(ConfigurationError, match=r"Install Graphviz, or run pip install torch2ebm\[plot\]"):
            draw()
    assert repr(model.draw()) == "GraphPicture(Sequential: 2 nodes, 2 boxes)"


class Dense(nn.Module):
    """Each of ``count`` layers reads all before it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(layer(torch.stack(seen).sum(0)))
        return seen[-1]


@pytest.mark.parametrize(("count", "hasty"), [(30, True), (6, False)])
def test_dot_is_hurried_where_there_are_many_lines(count: int, hasty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def recorded(command: list[str], **more: object) -> None:
        commands.append(command)
        raise subprocess.TimeoutExpired(command, 1.0)

    monkeypatch.setattr(shutil, "which", lambda program: program)
    monkeypatch.setattr(subprocess, "run", recorded)
    text = torch2ebm.convert(Dense(count), example_inputs=torch.zeros(3, 2)).draw().dot
    assert (len(lines_of(text)) > 300) == hasty
    assert rendered(text, "svg") is None
    assert [("-Gmclimit=0.1" in command) for command in commands] == [hasty]


@needs_matplotlib
def test_matplotlib_draws_where_dot_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(command: list[str], **more: object) -> None:
        raise subprocess.TimeoutExpired(command, 1.0)

    model = named("a", "b")
    monkeypatch.setattr(shutil, "which", lambda program: program)
    monkeypatch.setattr(subprocess, "run", slow)
    assert "<svg" in model.draw()._repr_svg_()
    model.draw(tmp_path / "graph.png")
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match=r"dot that fails or takes too long, and no matplotlib"):
        model.draw()._repr_svg_()


@needs_dot
def test_graphviz_draws_a_dense_graph_whole() -> None:
    model = torch2ebm.convert(Dense(28), example_inputs=torch.zeros(3, 2))
    drawing = rendered(model.draw().dot, "svg")
    assert drawing is not None
    drawn = [each for each in ElementTree.fromstring(drawing).iter() if each.get("class") == "edge"]
    assert len(drawn) == 28 * 27 // 2 + 1  # one from the input, to the layer that reads nothing else


@without_dot
@pytest.mark.parametrize("module", ["matplotlib", "matplotlib.backend_bases"])
def test_a_suffix_of_nothing_is_told_first_where_neither_is_installed(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in (module, "matplotlib.backend_bases", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, each, None)
    with pytest.raises(ConfigurationError, match=r"suffix 'xyz'; expected one of dot, gv, svg"):
        named("a").draw(tmp_path / "graph.xyz")
    with pytest.raises(ConfigurationError, match=r"neither the program dot nor matplotlib"):
        named("a").draw(tmp_path / "graph.svg")
    assert not list(tmp_path.iterdir())


@needs_matplotlib
@pytest.mark.parametrize("suffix", ["nix", "x11", "xlib", "gtk", "", "png -o"])
def test_what_is_no_format_is_refused_with_and_without_graphviz(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = named("a")
    for path in (None, ""):
        if path is not None:
            monkeypatch.setenv("PATH", path)
        with pytest.raises(ConfigurationError, match=r"expected.*svg|one of .*svg"):
            model.draw(tmp_path / f"graph.{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_model_that_has_seen_nothing_has_no_picture() -> None:
    with pytest.raises(torch2ebm.errors.NotCapturedError):
        torch2ebm.convert(nn.Linear(2, 2)).draw()
