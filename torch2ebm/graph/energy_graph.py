"""The energy graph: value nodes, their functions, and how they compose to the model. Plain data, no forward magic."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torch2ebm.capture.run import Cuts, Run
from torch2ebm.common.known_names import KnownNames
from torch2ebm.common.nested import map_leaves
from torch2ebm.common.text import html_table, short_table
from torch2ebm.errors import NodeEvaluationError, Torch2EBMError

Made = TypeVar("Made")
_HEADER = ("node", "function", "reads", "level")


def identity(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of a node: a submodule and its path, or a function (of a tensor method the name)."""

    name: str
    target: Any


@dataclass(frozen=True, eq=False, repr=False)
class Node:
    """One value node: its prediction is ``function(*values read, *constants)``.

    Most nodes have one value. A node whose function returns several tensors (an LSTM, a chunk) has one *slot* for
    each that others read. A node without children is an output: the loss acts on its prediction, and it has no value
    that could move.

    Attributes:
        name: Path of the module that gave the node its parameters, or of the operation.
        parents: Names of the nodes whose values it reads; clamped inputs are not nodes.
        children: Names of the nodes that read its value.
        function: The prediction: a tensor, or a tuple of them (slots, then exports).
        parameters: Qualified name to parameter, the module's own objects.
        level: Longest path, in edges, to an output.
        slots: Names of its values.
        reads: Names of the slots that it reads, in the order of the function's arguments.
        constants: Names of the further arguments: clamped inputs, and what the feed-forward pass fixes.
        exports: Names of what else its function returns for others to read as constants.
        random: Whether it draws random numbers.
        batch_statistics: Whether it normalises with the statistics of the batch.
        group_norm: Whether it normalises groups of channels.
        operations: What its predictions are made of, in order.

    Example:
        The examples of the methods go on from this one.

        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net, example_inputs=torch.randn(5, 4))
        >>> node = model.nodes["2"]
        >>> node.parents, node.level, list(node.parameters)
        (('0',), 0, ['2.weight', '2.bias'])
    """

    name: str
    parents: tuple[str, ...]
    children: tuple[str, ...]
    function: Callable[..., Any]
    parameters: Mapping[str, nn.Parameter]
    level: int
    slots: tuple[str, ...]
    reads: tuple[str, ...]
    constants: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    random: bool = False
    batch_statistics: bool = False
    group_norm: bool = False
    description: str = ""
    operations: tuple[Operation, ...] = ()

    def __repr__(self) -> str:
        reads = ", ".join(self.parents) or "(input)"
        size = sum(parameter.numel() for parameter in self.parameters.values())
        return f"Node({self.name!r}, {self.description}, reads {reads}, level {self.level}, {size:,} parameters)"

    @property
    def is_output(self) -> bool:
        """Whether no node reads its value: the loss acts on its prediction.

        Example:
            >>> node.is_output, model.nodes["0"].is_output
            (True, False)
        """
        return not self.children

    def evaluate(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """The node's function. :meth:`Call.evaluate` calls it with what the call has fixed; use that.

        Args:
            arguments: A value for each of ``reads``, then one for each of ``constants``.

        Returns:
            The predictions of all slots, then the exports.

        Raises:
            NodeEvaluationError: where the function fails on them, by a wrong shape as a rule.

        Example:
            >>> [prediction.shape for prediction in node.evaluate([torch.zeros(5, 8)])]
            [torch.Size([5, 3])]
        """
        try:
            result = self.function(*arguments)
        except (torch.OutOfMemoryError, Torch2EBMError):
            raise
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            shapes = ", ".join(
                f"{n} {_described(a)}" for n, a in zip((*self.reads, *self.constants), arguments, strict=True)
            )
            raise NodeEvaluationError(
                f"node '{self.name}' ({self.description})",
                shapes or "no arguments",
                "arguments that its function takes",
                f"The function said: {str(error).strip().splitlines()[0]}. Check shape, dtype and device of the input.",
            ) from error
        return result if isinstance(result, tuple) else (result,)


def _described(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"{tuple(argument.shape)} {str(argument.dtype).removeprefix('torch.')} on {argument.device}"
    return repr(argument)


@dataclass(frozen=True)
class OutputReference:
    """Where one leaf of the model's output comes from."""

    slot: str | None = None  # a prediction that the loss may act on
    constant: str | None = None  # something fixed by the feed-forward pass
    literal: Any = None


def filled(output: Any, leaves: Sequence[Any], references: Sequence[OutputReference]) -> Any:
    """The module's own output, with the leaves that are predictions in the place of its own."""
    pairs = iter(zip(leaves, references, strict=True))  # those after the output's are held elsewhere

    def of(leaf: Any) -> Any:
        ours, reference = next(pairs)
        return leaf if reference.slot is None else ours

    return map_leaves(of, output)


class EnergyGraph:
    """Value nodes in topological order, their levels, and their composition to the model.

    What algorithms and solvers work on; it knows nothing of losses or of autograd.

    Attributes:
        nodes: Name to :class:`Node`, parents before children.
        order: The nodes in evaluation order, those with no path to an output (whose gradient is zero) included.
        depth: Largest level of a node that has a value.
        shapes: Shape of each slot for the input that the graph was captured with.
        changing_buffers: Buffers that a forward pass changes (running statistics).
        parameters: Those that some output depends on, by qualified name, each once, in the module's order.
        clamp: From the constants of a run to everything that depends on them alone, by name.
        inputs: Name of each tensor that ``clamp`` makes to the names of the arguments that it is made of.
        constants: Name of each constant of a run.
        held: Results of a run that are further outputs, since somebody may hold them and use them in the loss.
        opaque: Path of each module that is one operation, since it cannot be looked into, to the reason.
        draws: Name of a node that draws random numbers to the operation of a run with which it begins to.
        cuts: Where a run of the module is cut so that it leaves what the nodes would; None for a levelled graph.
        owner: Slot to its node.
        hidden_nodes: The nodes that have a value, parents before children.
        output_nodes: The nodes whose prediction the loss reads.
        output_slots: Their slots, in the order of the model's output.

    Example:
        The examples of the methods go on from this one.

        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> graph = torch2ebm.convert(net, example_inputs=torch.randn(5, 4)).graph
        >>> [node.name for node in graph.hidden_nodes], [node.name for node in graph.output_nodes]
        (['0'], ['2'])
    """

    def __init__(
        self,
        module: nn.Module,
        order: Iterable[Node],
        clamp: Callable[[Run], dict[str, Any]],
        outputs: tuple[OutputReference, ...],
        changing_buffers: tuple[str, ...] = (),
        shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        inputs: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
        cuts: Cuts | None = None,
        constants: tuple[str, ...] = (),
        held: tuple[int, ...] = (),
        opaque: Mapping[str, str] = MappingProxyType({}),
        draws: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.inputs, self.cuts, self.constants, self.draws = inputs, cuts, constants, draws
        self.held, self.opaque = held, opaque
        self.module, self.changing_buffers, self.shapes = module, changing_buffers, shapes
        self.clamp, self.outputs = clamp, outputs
        self.order, self.nodes = _linked(tuple(order), {o.slot for o in outputs if o.slot is not None})
        self.owner = MappingProxyType({slot: node for node in self.nodes.values() for slot in node.slots})
        self.output_slots = tuple(dict.fromkeys(o.slot for o in outputs if o.slot is not None))
        self.output_nodes = tuple(node for node in self.nodes.values() if node.is_output)
        self.hidden_nodes = tuple(node for node in self.nodes.values() if not node.is_output)
        used = {name for node in self.nodes.values() for name in node.parameters}
        self.parameters = {name: parameter for name, parameter in module.named_parameters() if name in used}
        self.depth = max((node.level for node in self.hidden_nodes), default=0)
        self._made: dict[Hashable, Any] = {}

    def __repr__(self) -> str:
        return short_table(self._title(), _HEADER, self._rows(), left=3)

    def _repr_html_(self) -> str:
        return html_table(self._title(), _HEADER, self._rows())

    def _title(self) -> str:
        size = sum(parameter.numel() for parameter in self.parameters.values())
        nodes = f"{len(self.nodes)} nodes, {len(self.hidden_nodes)} with a value"
        return f"EnergyGraph of {type(self.module).__name__}: {nodes}, depth {self.depth}, {size:,} parameters"

    def _rows(self) -> list[list[str]]:
        return [
            [node.name, node.description, ", ".join(node.parents) or "(input)", str(node.level)]
            for node in self.nodes.values()
        ]

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Compute something once for this graph, and cache it.

        Args:
            key: Names what is computed; begin it with a name of your own.
            make: Computes it.

        Returns:
            What ``make`` returned the first time.

        Example:
            >>> graph.once(("my algorithm", "count"), lambda: len(graph.nodes))
            2
        """
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    @property
    def levels(self) -> Mapping[str, int]:
        """Node name to its level: the longest path, in edges, to an output.

        Example:
            >>> graph.levels
            {'0': 1, '2': 0}
        """
        return {name: node.level for name, node in self.nodes.items()}

    def output(self, predictions: Mapping[str, Tensor], constants: Mapping[str, Any]) -> list[Any]:
        """The leaves of the model's output.

        Args:
            predictions: By output slot.
            constants: What the feed-forward pass fixed, by name.

        Returns:
            For one output tensor a list of this one.

        Example:
            >>> graph.output({graph.output_slots[0]: torch.zeros(1, 3)}, {})
            [tensor([[0., 0., 0.]])]
        """
        leaves = []
        for reference in self.outputs:
            if reference.slot is not None:
                leaves.append(predictions[reference.slot])
            else:
                leaves.append(reference.literal if reference.constant is None else constants[reference.constant])
        return leaves

    def levelled(self) -> EnergyGraph:
        """The same model, ``k - 1`` identity nodes on every edge that spans ``k`` levels (Salvatori et al. 2022).

        Returns:
            Another graph; a chain has as many nodes there as here.

        Example:
            >>> len(graph.levelled().nodes)
            2
        """
        order: list[Node] = []
        for node in self.order:
            reads = []
            for slot in node.reads:
                read = slot
                span = self.owner[slot].level - node.level if node.name in self.nodes else 1
                for step in range(span - 1):
                    link = f"{slot}->{node.name}.{step}"
                    if all(link != other.name for other in order):
                        order.append(Node(link, (), (), identity, {}, 0, (link,), (read,), description="identity"))
                    read = link
                reads.append(read)
            order.append(replace(node, reads=tuple(reads)))
        return EnergyGraph(
            self.module,
            order,
            self.clamp,
            self.outputs,
            self.changing_buffers,
            inputs=self.inputs,
            constants=self.constants,
            held=self.held,
            opaque=self.opaque,
            draws=self.draws,
        )


def _linked(order: tuple[Node, ...], returned: set[str]) -> tuple[tuple[Node, ...], Mapping[str, Node]]:
    """Fill in parents, children and levels; keep apart the nodes without a path to an output."""
    owner = {slot: node.name for node in order for slot in node.slots}
    children: dict[str, dict[str, None]] = {node.name: {} for node in order}
    level: dict[str, int] = {}
    for node in reversed(order):
        levels = [level[child] + 1 for child in children[node.name]]
        if levels or not returned.isdisjoint(node.slots):
            level[node.name] = max(levels, default=0)
            for slot in node.reads:
                children[owner[slot]][node.name] = None
    position = {node.name: i for i, node in enumerate(order)}
    linked = tuple(
        replace(
            node,
            parents=tuple(dict.fromkeys(owner[slot] for slot in node.reads)),
            children=tuple(sorted(children[node.name], key=position.__getitem__)),
            level=level.get(node.name, 0),
        )
        for node in order
    )
    return linked, MappingProxyType(KnownNames({node.name: node for node in linked if node.name in level}))
