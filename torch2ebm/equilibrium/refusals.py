"""Refuses modules that have no equilibrium or would not settle at it, with all reasons at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from torch2ebm.errors import NoEquilibriumError, PartitionError
from torch2ebm.graph.activations import activation_kind, is_activation, operation_name
from torch2ebm.graph.energy_graph import EnergyGraph, Node, Operation

_NORMALISING = frozenset(["layer_norm", "group_norm", "rms_norm", "instance_norm"])
_RECURRENT = frozenset(
    ["rnn_tanh", "rnn_relu", "lstm", "gru", "rnn_tanh_cell", "rnn_relu_cell", "lstm_cell", "gru_cell"]
)
_LINEAR = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
# derivative zero everywhere, or none
_WHOLE_NUMBERS = frozenset(["round", "floor", "ceil", "trunc", "sign", "heaviside", "argmax", "argmin", "one_hot"])
# not refused, since they settle for some weights; the warning of an unsettled phase names them
_WATCHED = ("max_pool", "adaptive_max_pool", "softmax", "scaled_dot_product_attention", "multi_head_attention")


def check_cut(graph: EnergyGraph) -> None:
    """Raise :class:`PartitionError` unless every activation is a node of its own."""
    for node in graph.nodes.values():
        larger = [operation for operation in node.operations if activation_kind(operation.target)]
        if node.reads and larger and not is_activation(node) and not _cut_by_partition(node, larger):
            raise PartitionError(
                f"node '{node.name}' ({node.description})",
                "a node with an activation inside",
                "nodes that are cut around the activations",
                "Convert with nodes='auto', which asks the algorithm, or with nodes='activation'.",
            )
        for operation in node.operations:
            opaque: nn.Module | None = getattr(operation.target, "opaque_module", None)
            if opaque is not None and not isinstance(opaque, _LINEAR):
                raise PartitionError(
                    f"node '{node.name}'",
                    f"a {type(opaque).__name__} kept whole, whose activations cannot be seen",
                    "nodes that are cut around the activations",
                    "Convert with nodes='auto', or with nodes='activation'.",
                )


def _cut_by_partition(node: Node, larger: Sequence[Operation]) -> bool:
    """Whether the partition itself left the activation in: no state feeds it, or its bounds are tensors."""
    return not node.reads or bool(node.constants)


def refuse(graph: EnergyGraph) -> None:
    """Raise :class:`NoEquilibriumError` with every part of the module that a relaxation cannot settle."""
    found = [problem for node in graph.nodes.values() for problem in _problems(node)]
    if found:
        raise NoEquilibriumError(
            "equilibrium of the module",
            "; ".join(dict.fromkeys(found)),
            "parts with an energy: linear maps, convolutions, pooling, sums, activations without parameters",
            "Use model.eval() for batch norm and dropout, leave the part out, or take PredictiveCoding, whose values "
            "need no equilibrium of the module.",
        )


def _problems(node: Node) -> Iterator[str]:
    if node.random:
        yield f"'{node.name}' ({node.description}) draws random numbers, so each step would have another energy"
    if node.batch_statistics:
        yield f"'{node.name}' ({node.description}) normalises by the batch, whose statistics move with the states"
    for operation in node.operations:
        yield from _problem(node, operation)


def _problem(node: Node, operation: Operation) -> Iterator[str]:
    name = operation_name(operation.target)
    where = f"'{operation.name}' ({name})"
    if name in _RECURRENT:
        yield f"{where} has a state and an order in time of its own"
    elif name == "prelu":
        yield f"{where} is an activation with parameters, whose share the energy would miss"
    # only where states feed it: of clamped inputs it is a constant
    elif node.reads and name in _NORMALISING:
        yield f"{where} normalises each sample by its own states, and does not settle in a loop"
    elif node.reads and name in _WHOLE_NUMBERS:
        yield f"{where} makes whole numbers of states, through which no feedback comes"


def watched_operations(node: Node) -> Iterator[str]:
    """Operations that may settle or not: max-pooling and softmax."""
    for operation in node.operations:
        if operation_name(operation.target).startswith(_WATCHED):
            yield operation.name
