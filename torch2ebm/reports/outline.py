"""What a picture of an energy graph shows, however it is drawn: boxes, the lines between them, and their modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter

from torch2ebm.errors import ConfigurationError
from torch2ebm.graph.energy_graph import EnergyGraph, Node


@dataclass(frozen=True)
class Box:
    """A node, or all nodes of a collapsed module.

    Attributes:
        name: Path of the node or of the module.
        kind: ``"node"``, ``"module"``, or ``"output"`` for what holds an output of the model.
        description: What the node computes; of a module its class and how many nodes are in it.
        shapes: Shapes of the values that others read, as captured, the batch included.
        module: Path of the module that it stands in, its parts from the outside inwards.
        nodes: Names of the nodes.
        inputs: Names of the model's inputs that it reads.
        children: Keys of the boxes that read from it.
        level: Longest path, in lines, to a box that nothing reads.
    """

    name: str
    kind: str
    description: str
    shapes: tuple[str, ...]
    module: tuple[str, ...]
    nodes: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    level: int = 0


@dataclass(frozen=True)
class Outline:
    """The boxes of a picture.

    Attributes:
        title: What the picture is of.
        boxes: By key; boxes after those that they read from.
        classes: Path of a module that boxes stand in, its parts, to the name of its class.
        collapsed: Whether some box is a module.
    """

    title: str
    boxes: Mapping[str, Box]
    classes: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    collapsed: bool = False


def check_depth(where: str, depth: object) -> None:
    """Raise :class:`ConfigurationError` for what is neither None nor a whole number, 0 or more."""
    legal = depth is None or (isinstance(depth, int) and not isinstance(depth, bool) and depth >= 0)
    if not legal:
        raise ConfigurationError(
            f"{where}(depth=...)",
            repr(depth),
            "None, or a whole number, 0 or more",
            "1 shows the module's own children, 2 what is in them; None shows every node.",
        )


def note(outline: Outline) -> str:
    """What stands below the picture."""
    has_shapes = any(box.shapes for box in outline.boxes.values())
    return f"{outline.title}; shapes as captured, batch included" if has_shapes else outline.title


def outline_of(graph: EnergyGraph, depth: int | None = None) -> Outline:
    """The boxes of a graph; modules deeper than ``depth`` are one box each.

    A module that is left and entered again has a box for each stay, so that no line leads back.
    """
    members = _members(graph, depth)
    box_of = {name: key for key, names in members.items() for name in names}
    children = {key: _children(graph, key, names, box_of) for key, names in members.items()}
    level: dict[str, int] = {}
    for key in TopologicalSorter(children).static_order():  # children first
        level[key] = max((level[child] + 1 for child in children[key]), default=0)
    reads = inputs_of(graph)
    boxes = {}
    for key in reversed(list(TopologicalSorter(children).static_order())):
        inputs = tuple(dict.fromkeys(i for name in members[key] for i in reads[name]))
        box = _box(graph, members[key], box_of, depth)
        boxes[key] = replace(box, inputs=inputs, children=children[key], level=level[key])
    held = {box.module[:end] for box in boxes.values() for end in range(1, len(box.module) + 1)}
    modules = dict(graph.module.named_modules(remove_duplicate=False))
    classes = {path: type(modules[".".join(path)]).__name__ for path in sorted(held)}
    collapsed = any(_inside(graph.nodes[box.nodes[0]], depth) is not None for box in boxes.values())
    title = f"{type(graph.module).__name__}: {len(graph.nodes)} nodes"
    return Outline(title, boxes, classes, collapsed)


def inputs_of(graph: EnergyGraph) -> dict[str, tuple[str, ...]]:
    """Node to the names of the inputs that it reads, as they are or as what is made of them alone."""
    computed = {name for node in graph.order for name in node.exports}
    return {
        name: tuple(dict.fromkeys(i for c in node.constants if c not in computed for i in graph.inputs.get(c, ())))
        for name, node in graph.nodes.items()
    }


def _parts(node: Node) -> tuple[str, ...]:
    return tuple(node.name.partition("->")[0].split("."))  # an arrow: a link of a levelled graph


def _inside(node: Node, depth: int | None) -> tuple[str, ...] | None:
    """The module whose box the node is in; None for one that has a box of its own."""
    parts = _parts(node)
    return parts[:depth] if depth is not None and len(parts) > depth else None


def _members(graph: EnergyGraph, depth: int | None) -> dict[str, list[str]]:
    """Key of each box to its nodes. Each node joins the last box of its module from which no line leads to it."""
    members: dict[str, list[str]] = {}
    stays: dict[tuple[str, ...], list[str]] = {}
    after: dict[str, set[str]] = {}
    box_of: dict[str, str] = {}
    for name, node in graph.nodes.items():
        module = _inside(node, depth)
        before = {box_of[parent] for parent in node.parents}
        open_stays = [] if module is None else stays.setdefault(module, [])
        key = next((key for key in reversed(open_stays) if not _leads(key, before - {key}, after)), None)
        if key is None:
            key = _unused(name if module is None else f"{'.'.join(module)} ({len(open_stays) + 1})", members)
            members[key], after[key] = [], set()
            open_stays.append(key)
        members[key].append(name)
        box_of[name] = key
        for parent in before - {key}:
            after[parent].add(key)
    return members


def _leads(start: str, ends: set[str], after: Mapping[str, set[str]]) -> bool:
    """Whether a path of lines leads from a box to one of the others."""
    seen, waiting = {start}, [start]
    while waiting:
        new = after[waiting.pop()] - seen
        seen |= new
        waiting.extend(new)
    return not seen.isdisjoint(ends)


def _unused(key: str, taken: Iterable[str]) -> str:
    while key in taken:
        key += "'"
    return key


def _children(graph: EnergyGraph, key: str, names: Sequence[str], box_of: Mapping[str, str]) -> tuple[str, ...]:
    found = dict.fromkeys(box_of[child] for name in names for child in graph.nodes[name].children)
    return tuple(child for child in found if child != key)


def _box(graph: EnergyGraph, names: Sequence[str], box_of: Mapping[str, str], depth: int | None) -> Box:
    first = graph.nodes[names[0]]
    module = _inside(first, depth)
    held = [graph.nodes[name] for name in names]
    is_output = any(node.is_output for node in held)
    leaving = [
        slot
        for node in held
        for slot in node.slots
        if node.is_output or any(box_of[c] != box_of[node.name] and slot in graph.nodes[c].reads for c in node.children)
    ]
    shapes = tuple(str(graph.shapes[slot]) for slot in leaving if slot in graph.shapes)
    if module is None:
        within = _containers(graph, _parts(first)[:-1])
        return Box(first.name, "output" if is_output else "node", first.description, shapes, within, tuple(names))
    kind = type(graph.module.get_submodule(".".join(module))).__name__
    count = f"{len(names)} node{'s' * (len(names) != 1)}"
    name = ".".join(module) or kind
    description = f"{kind}, {count}" if module else count
    return Box(
        name, "output" if is_output else "module", description, shapes, _containers(graph, module[:-1]), tuple(names)
    )


def _containers(graph: EnergyGraph, parts: tuple[str, ...]) -> tuple[str, ...]:
    """As much of a path as modules have."""
    module = graph.module
    for i, part in enumerate(parts):
        children = dict(module.named_children())
        if part not in children:
            return parts[:i]
        module = children[part]
    return parts
