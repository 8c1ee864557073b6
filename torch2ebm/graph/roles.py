"""What each operation of a capture is to the graph: live, static, repeated in each reader, or fixed once a call."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from torch2ebm.capture.observation import Capture
from torch2ebm.graph.named_nodes import CallSite, call_sites
from torch2ebm.graph.operations import begins_a_layer


@dataclass(frozen=True)
class Roles:
    """Every operation of a captured graph in exactly one role."""

    live: dict[fx.Node, fx.Node]  # -> the producer it belongs to: itself, or that of the tuple it is taken from
    repeated: frozenset[fx.Node]  # fed by parameters alone, or not differentiable: computed again in each reader
    once: tuple[fx.Node, ...]  # shapes, and random draws fed by live tensors: fixed by the feed-forward pass
    static: tuple[fx.Node, ...]  # fed by no live tensor: computed before all nodes
    sites: Mapping[fx.Node, CallSite]  # the named submodules' calls that operations are part of


def assign_roles(capture: Capture) -> Roles:
    facts = capture.facts
    operations = [node for node in capture.graph.nodes if node.op.startswith("call")]
    returned = set(output_node(capture.graph).all_input_nodes)
    from_data = {node for node in capture.graph.nodes if node.op == "placeholder"}
    sites = call_sites(capture)
    producer_of: dict[CallSite, fx.Node] = {}
    live: dict[fx.Node, fx.Node] = {}
    repeated: set[fx.Node] = set()
    once: list[fx.Node] = []
    static: list[fx.Node] = []
    for node in operations:
        sources = node.all_input_nodes
        # a layer on what parameters alone have made (a learned query, a class token) is where data begin
        if node in sites or begins_a_layer(node) or any(s in from_data and facts[s].data for s in sources):
            from_data.add(node)
        fed_by_live = any(s in live or s in once for s in _upstream(node, repeated))
        if facts[node].live and (node in from_data or fed_by_live or facts[node].random or node in returned):
            from_data.add(node)
            whole = producer_of.setdefault(sites[node], node) if node in sites else node
            live[node] = live[sources[0]] if _is_part(node, live, capture) else whole
        elif facts[node].live:
            repeated.add(node)
        elif not fed_by_live and not any(s in repeated for s in sources):
            static.append(node)
        elif _is_kept(node, returned):
            fixed = not facts[node].tensor or facts[node].random or node in returned or not node.users
            reads_tuple = any(s in live and not facts[s].tensor for s in sources)
            if fed_by_live and (fixed or reads_tuple):
                once.append(node)
            else:
                repeated.add(node)
    return Roles(live, frozenset(repeated), tuple(once), tuple(static), sites)


def _upstream(node: fx.Node, repeated: set[fx.Node]) -> Iterator[fx.Node]:
    """The operations that ``node`` reads, those that are computed again seen through."""
    for source in node.all_input_nodes:
        if source in repeated:
            yield from _upstream(source, repeated)
        else:
            yield source


def output_node(graph: fx.Graph) -> fx.Node:
    output: fx.Node = next(node for node in graph.nodes if node.op == "output")
    return output


def _is_part(node: fx.Node, live: dict[fx.Node, fx.Node], capture: Capture) -> bool:
    """Whether ``node`` takes one tensor out of the tuple, or of the fields, that a live operation returned."""
    if node.op != "call_function" or (node.target is not operator.getitem and node.target is not getattr):
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and source in live and not capture.facts[source].tensor


def _is_kept(node: fx.Node, returned: set[fx.Node]) -> bool:
    """Results that nobody reads do not matter: effects are those of forward's own run."""
    return bool(node.users) or node in returned
