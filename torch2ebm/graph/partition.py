"""Which operations of a captured graph make one value node: one rule for every granularity.

Words: a *live* operation is differentiable in a real run; a *tip* is the operation whose result is a node's value.
An operation joins the node of its consumers if they agree on one, else it becomes a tip: acyclic by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from torch2ebm.capture.observation import Capture
from torch2ebm.graph.activations import activation_kind
from torch2ebm.graph.granularity import Granularity
from torch2ebm.graph.named_nodes import check_apart, check_learnable, check_order, interleaved
from torch2ebm.graph.operations import called_module, parameters_of
from torch2ebm.graph.roles import Roles, output_node


@dataclass(frozen=True)
class Group:
    """The live operations of one node-to-be, in the order of the graph; the last one is the tip."""

    tip: fx.Node
    members: tuple[fx.Node, ...]
    root: fx.Node | None  # the parameterised or named operation that gives the node its name


class Partition:
    """Groups of live operations, in an order in which each finds its inputs computed."""

    def __init__(self, capture: Capture, roles: Roles, granularity: Granularity) -> None:
        self.capture, self.roles, self.granularity = capture, roles, granularity
        self.position = {node: i for i, node in enumerate(capture.graph.nodes)}
        self.returned = set(output_node(capture.graph).all_input_nodes)
        self.parts: dict[fx.Node, list[fx.Node]] = {}
        for node, producer in roles.live.items():
            self.parts.setdefault(producer, []).append(node)
        self.producers = list(self.parts)
        self.readers = {producer: self._readers(producer) for producer in self.producers}
        self._check_names()
        self.roots = {producer for producer in self.producers if self._is_root(producer)}
        self.before_a_root = self._before_a_root()

    def groups(self) -> list[Group]:
        tips = self._tips()
        # minus infinity in a mask is no place for a value to move from, so such an operation joins its reader
        tips = {
            tip for tip in tips if self.capture.facts[tip].finite or not self.readers[tip] or tip in self.roles.sites
        }
        while True:
            owner = self._owners(tips)
            groups = self._grouped(owner)
            ordered, stuck = self._ordered(groups, owner)
            if not stuck:
                return ordered
            # a shape is read across nodes in both directions: what it is the shape of becomes a value of its own
            found = {self.roles.live[node] for group in stuck for node in self._read_once(group)}
            if found <= tips:
                raise interleaved(self.roles.sites[group.tip].name for group in stuck if group.tip in self.roles.sites)
            tips |= found

    # which operations end a node

    def _tips(self) -> set[fx.Node]:
        if self.granularity == "op":
            return set(self.producers)
        if self.granularity == "preactivation":
            return set(self.roots)
        if self.granularity == "activation":
            return self._around_activations()
        dominator = self._post_dominators()
        return {root if self._is_named(root) else self._extended(root, dominator) for root in self.roots}

    def _around_activations(self) -> set[fx.Node]:
        """Activations and what they read, each a node of its own, and the last operations that have parameters: what
        follows these (a loss, a softmax) is no value that could relax."""
        found = {producer for producer in self.producers if self._is_activation(producer)}
        last = self.roots - self.before_a_root
        named = {root for root in self.roots if self._is_named(root)}
        read = {self.roles.live[source] for node in found for source in node.all_input_nodes}
        return found | last | read | named

    def _is_activation(self, producer: fx.Node) -> bool:
        sources, target = producer.all_input_nodes, producer.target
        if len(sources) != 1 or sources[0] not in self.roles.live:
            return False
        return activation_kind(target) is not None

    def _extended(self, root: fx.Node, dominator: dict[fx.Node, fx.Node | None]) -> fx.Node:
        """The last operation that every path from ``root`` passes before another root begins."""
        tip = root
        while (following := dominator[tip]) is not None and following not in self.roots:
            between = self._between(tip, following)
            if between & self.roots:
                break
            if tip in self.before_a_root and any(self._is_returned(p) for p in (tip, *between)):
                break
            tip = following
        return tip

    def _between(self, start: fx.Node, end: fx.Node) -> set[fx.Node]:
        found: set[fx.Node] = set()
        pending = list(self.readers[start])
        while pending:
            producer = pending.pop()
            if producer is not end and producer not in found:
                found.add(producer)
                pending += self.readers[producer]
        return found

    def _post_dominators(self) -> dict[fx.Node, fx.Node | None]:
        """The first operation on all paths to the end; None is the end itself."""
        dominator: dict[fx.Node, fx.Node | None] = {}
        depth: dict[fx.Node | None, int] = {None: 0}
        for producer in reversed(self.producers):
            candidates: list[fx.Node | None] = [*self.readers[producer]] or [None]
            common = candidates[0]
            for candidate in candidates[1:]:
                other: fx.Node | None = candidate
                while common is not other:
                    if depth[common] >= depth[other]:
                        assert common is not None
                        common = dominator[common]
                    else:
                        assert other is not None
                        other = dominator[other]
            dominator[producer] = common
            depth[producer] = depth[common] + 1
        return dominator

    def _owners(self, tips: set[fx.Node]) -> dict[fx.Node, fx.Node]:
        owner: dict[fx.Node, fx.Node] = {}
        for producer in reversed(self.producers):
            owners = {owner[reader] for reader in self.readers[producer]}
            joins = len(owners) == 1 and producer not in tips
            if joins and self._is_returned(producer):
                # a returned value that goes on through parameters stays a value; else both are one prediction
                joins = producer not in self.before_a_root
            owner[producer] = owners.pop() if joins else producer
        return owner

    # facts about operations

    def _readers(self, producer: fx.Node) -> list[fx.Node]:
        """Live operations that read ``producer``, also through what is computed again inside them."""
        readers: dict[fx.Node, None] = {}
        pending = [user for part in self.parts[producer] for user in part.users]
        while pending:
            user = pending.pop(0)
            if user in self.roles.live and self.roles.live[user] is not producer:
                readers[self.roles.live[user]] = None
            elif user in self.roles.repeated:
                pending += user.users
        return list(readers)

    def _check_names(self) -> None:
        sites = self.roles.sites
        if not isinstance(self.granularity, str):
            check_apart(self.capture.module, self.capture.leaves, sites)
            check_learnable(self.capture.leaves, sites, self.producers)
        check_order(self.producers, self.readers, sites)

    def _is_root(self, producer: fx.Node) -> bool:
        if producer in self.roles.sites:
            return True
        if self.granularity == "module" and called_module(producer, self.capture.module):
            return True
        if any(True for _ in parameters_of(producer, self.capture.module)):
            return True
        return any(
            source in self.roles.repeated and self.capture.facts[source].live for source in producer.all_input_nodes
        )

    def _is_named(self, producer: fx.Node) -> bool:
        return producer in self.roles.sites

    def _is_returned(self, producer: fx.Node) -> bool:
        return any(part in self.returned for part in self.parts[producer])

    def _before_a_root(self) -> set[fx.Node]:
        """Producers with a root somewhere downstream."""
        found: set[fx.Node] = set()
        for producer in reversed(self.producers):
            if any(reader in self.roots or reader in found for reader in self.readers[producer]):
                found.add(producer)
        return found

    # groups and their order

    def _grouped(self, owner: dict[fx.Node, fx.Node]) -> list[Group]:
        members: dict[fx.Node, list[fx.Node]] = {}
        for node, producer in self.roles.live.items():
            members.setdefault(owner[producer], []).append(node)
        return [
            Group(tip, tuple(nodes), next((node for node in nodes if node in self.roots), None))
            for tip, nodes in members.items()
        ]

    def live_sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """The live operations that ``node`` reads, directly or through operations that are not live."""
        for source in node.all_input_nodes:
            if source in self.roles.live:
                yield source
            elif source.op.startswith("call"):
                yield from self.live_sources(source)

    def _read_once(self, group: Group) -> Iterator[fx.Node]:
        """What is fixed by the feed-forward pass is made of, where the group reads it or what it computes of it."""
        pending, seen = list(group.members), set[fx.Node]()
        while pending:
            for source in pending.pop().all_input_nodes:
                if source in self.roles.once:
                    yield from self.live_sources(source)
                elif source in self.roles.repeated and source not in seen:
                    seen.add(source)
                    pending.append(source)

    def _ordered(self, groups: list[Group], owner: dict[fx.Node, fx.Node]) -> tuple[list[Group], list[Group]]:
        """Groups so that random draws come in the module's own order; the second list is what is stuck in a cycle."""
        by_tip = {group.tip: group for group in groups}
        needs = {
            group.tip: {owner[self.roles.live[s]] for node in group.members for s in self.live_sources(node)}
            - {group.tip}
            for group in groups
        }
        urgency = self._urgency(groups, needs)
        ordered: list[Group] = []
        done: set[fx.Node] = set()
        pending = sorted(by_tip, key=lambda tip: urgency[tip])
        while ready := next((tip for tip in pending if needs[tip] <= done), None):
            pending.remove(ready)
            done.add(ready)
            ordered.append(by_tip[ready])
        return ordered, [by_tip[tip] for tip in pending]

    def _urgency(self, groups: list[Group], needs: dict[fx.Node, set[fx.Node]]) -> dict[fx.Node, tuple[int, int]]:
        """The position of the first random draw in a group or in one that needs it; then its own position."""
        never = len(self.position)
        draws = {
            group.tip: min((self.position[n] for n in group.members if self.capture.facts[n].random), default=never)
            for group in groups
        }
        for group in sorted(groups, key=lambda group: -self.position[group.tip]):
            for needed in needs[group.tip]:
                draws[needed] = min(draws[needed], draws[group.tip])
        return {tip: (draw, self.position[tip]) for tip, draw in draws.items()}
