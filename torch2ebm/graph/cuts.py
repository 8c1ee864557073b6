"""Where a watched run of the module is cut, so that it leaves what the nodes of an energy graph would have made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from torch import fx

from torch2ebm.capture.observation import Capture
from torch2ebm.capture.run import Cuts, Hot, Record
from torch2ebm.common.nested import leaves_of
from torch2ebm.graph.roles import Roles


def cuts_of(
    capture: Capture,
    roles: Roles,
    bodies: Mapping[str, Iterable[fx.Node]],
    slots: Mapping[fx.Node, str],
    read: Iterable[fx.Node],
    exports: Mapping[fx.Node, str],
) -> Cuts:
    """The cuts of a graph; to be followed only where nothing but a composition of its nodes gives what they make.

    Args:
        capture: The recorded run that the graph was made of.
        roles: What each operation is to the graph.
        bodies: Name of each node to its operations, in order.
        slots: The operations whose results are values or outputs, to their nodes.
        read: Those of them that other nodes read.
        exports: Operations whose results nodes read as constants, to their names.
    """
    random = {name: draws for name, body in bodies.items() if (draws := draws_of(capture, body))}
    number_of = {node: number for number, node in capture.trace.node_of.items()}
    if _hidden(capture, roles, bodies, number_of, (*slots, *exports)):
        return _cuts(capture, random, {}, {}, {}, frozenset()).to_follow()
    handed_on = {number_of[node]: node.name for node in read}
    kept = {number_of[node]: node.name for node in slots if number_of[node] not in handed_on}
    exported = {number_of[node]: name for node, name in exports.items()}
    assert capture.run.records is not None
    rewritten = _rewritten(capture.run.records, {*handed_on, *kept, *exported})
    cuts = _cuts(capture, random, handed_on, kept, exported, rewritten, _normalised(capture, bodies))
    # a leaf would also come between operations of the node itself
    inside = any(user in bodies[slots[node]] for node in read for user in node.users)
    # autograd leads a view whose base is written later through that write
    hidden = not rewritten.isdisjoint(kept) or not rewritten.isdisjoint(_views(capture.run.records))
    return cuts.to_follow() if inside or hidden else cuts


def _cuts(
    capture: Capture,
    random: Mapping[str, Sequence[int]],
    slots: Mapping[int, str],
    kept: Mapping[int, str],
    exports: Mapping[int, str],
    rewritten: frozenset[int],
    normalised: Mapping[int, str] = MappingProxyType({}),
) -> Cuts:
    run = capture.run
    assert run.records is not None
    return Cuts(
        run.records,
        tuple(run.sequence),
        run.returned,
        [tuple(numbers) for numbers in run.numbers],
        slots,
        kept,
        rewritten,
        exports,
        frozenset(i for draws in random.values() for i in draws),
        normalised,
        run.copied,
        frozenset(run.opaque),
        frozenset(capture.held),
        frozenset(run.effects),
        tuple(run.origins),
        tuple(run.names),
    )


def _normalised(capture: Capture, bodies: Mapping[str, Iterable[fx.Node]]) -> dict[int, str]:
    return {
        capture.trace.operations[node]: name
        for name, body in bodies.items()
        for node in body
        if capture.facts[node].batch_statistics
    }


def _hidden(
    capture: Capture,
    roles: Roles,
    bodies: Mapping[str, Iterable[fx.Node]],
    number_of: Mapping[fx.Node, int],
    wanted: Iterable[fx.Node],
) -> bool:
    """Whether something that nodes hand on is no result that the run can be cut at."""
    if any(node not in number_of for node in wanted) or _shared(capture, roles, bodies.values()):
        return True
    # a view of what was written later leads past the leaf
    return any(node.meta.get("taken_again") for node in capture.graph.nodes)


def _shared(capture: Capture, roles: Roles, bodies: Iterable[Iterable[fx.Node]]) -> bool:
    """Whether nodes share a computation on parameters: the run makes it once, and the first pullback would free it."""
    seen: set[fx.Node] = set()
    for body in bodies:
        prepared = {node for node in body if node in roles.repeated and capture.facts[node].live}
        if seen & prepared:
            return True
        seen |= prepared
    return False


def draws_of(capture: Capture, body: Iterable[fx.Node]) -> list[int]:
    """The operations of the run, in order, that draw random numbers for a node."""
    assert capture.run.records is not None
    operations = {capture.trace.operations[node] for node in body if node in capture.trace.operations}
    return sorted(i for i in operations if capture.run.records[i].random)


def _rewritten(records: Sequence[Record], slots: Iterable[int]) -> frozenset[int]:
    """Results that forward writes in place after they are values, itself or through a view."""
    base: dict[int, int] = {}
    born: dict[int, int] = {}
    found: set[int] = set()
    for i, record in enumerate(records):
        for target in record.wrote:
            if isinstance(target, Hot) and isinstance(target.place, int):
                written = base.get(target.place, target.place)
                found |= {n for n in slots if n in born and base.get(n, n) == written}
        for number in _numbers(record.results):
            born[number] = i
            source = record.sources.get(number)
            if source is not None and isinstance(source.place, int):
                base[number] = base.get(source.place, source.place)
    return frozenset(found)


def _views(records: Sequence[Record]) -> set[int]:
    """Results that are views, and not what an operation has written in place and returned."""
    return {number for record in records if not record.wrote for number in record.sources}


def _numbers(results: object) -> Iterable[int]:
    return (leaf for leaf in leaves_of(results) if isinstance(leaf, int) and not isinstance(leaf, bool))
