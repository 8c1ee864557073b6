"""Nodes that are one dense layer, which the identities of Alonso et al. 2022 ask for, and the rows that it reads.

For such a node ``prediction = a @ weight.T + bias + (what is free of the node's parameters)``, one row ``a`` a sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch2ebm.common.nested import leaves_of
from torch2ebm.engine.call import Call, NodePass
from torch2ebm.errors import DenseLayerError
from torch2ebm.graph.energy_graph import Node
from torch2ebm.isolation.torch_modes import entered


@dataclass(frozen=True, eq=False)
class DensePass:
    """One evaluation of a node that is a dense layer.

    Attributes:
        evaluated: The node's prediction, with its autograd graph.
        rows: What the layer reads, shape ``[batch, fan_in]``, on the same autograd graph as the prediction.
    """

    evaluated: NodePass
    rows: Tensor


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """A node whose trainable parameters are the weight, and perhaps the bias, of one dense layer.

    Attributes:
        node: The node.
        weight: Qualified name of the weight.
        bias: Qualified name of the bias; None where there is none, or none that is trained.
        transposed: Whether the weight is stored as ``[fan_in, fan_out]``, as in ``x @ weight``.
        fan_in: Entries of a row.
        fan_out: Entries of the prediction of one sample.
    """

    node: Node
    weight: str
    bias: str | None
    transposed: bool
    fan_in: int
    fan_out: int

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    def evaluate(self, call: Call, inputs: Sequence[Tensor]) -> DensePass:
        """The node at other values of its parents; with leaves as inputs, derivatives in these can be taken."""
        evaluated, watch = _watched(call, self.node, inputs)
        return DensePass(evaluated, watch.product[0])

    def gradients(self, of_weight: Tensor, of_bias: Tensor) -> dict[str, Tensor]:
        """By name, as the parameters are stored, from the shapes ``[fan_out, fan_in]`` and ``[fan_out]``."""
        found = {self.weight: of_weight.t() if self.transposed else of_weight}
        return found if self.bias is None else {**found, self.bias: of_bias}


def dense_layers(call: Call) -> dict[str, DenseLayer]:
    """Every node with trainable parameters as the dense layer that it is, by name; run after the feed-forward pass.

    Nodes without trainable parameters are left out. A layer is recognised by what its node does with its parameters,
    and held against the local rule: a cotangent ``c`` of the prediction, pulled back, has to give ``c^T a`` for the
    weight and the sum of ``c`` over samples for the bias.

    Args:
        call: A call whose feed-forward pass is done.

    Raises:
        DenseLayerError: naming every node that is not such a layer and why: a convolution, parameters of a norm,
            a weight that several nodes read, rows that are not one a sample, several layers in one node.

    Example:
        >>> import torch, torch2ebm
        >>> from torch2ebm.implicit.dense_layers import dense_layers
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net, nodes="preactivation")
        >>> call = model.torch2ebm.new_call((torch.randn(5, 4),), {})
        >>> call.feedforward(keep_graph=False)
        >>> [(layer.weight, layer.fan_in, layer.has_bias) for layer in dense_layers(call).values()]
        [('0.weight', 4, True), ('2.weight', 8, True)]
    """
    readers = Counter(name for node in call.graph.order for name in node.parameters)
    layers: dict[str, DenseLayer] = {}
    problems: list[tuple[str, str]] = []
    for node in call.graph.nodes.values():
        if not _trainable(call, node):
            continue
        try:
            layers[node.name] = _recognised(call, node, readers)
        except _NotDense as reason:
            problems.append((node.name, str(reason)))
    if problems:
        raise DenseLayerError(
            f"dense layers of {type(call.graph.module).__name__}",
            "; ".join(f"{reason} (node '{name}')" for name, reason in problems),
            "one dense layer a node (nn.Linear): its output added to the prediction as it is, one row of inputs a "
            "sample, weight and bias read nowhere else",
            "Use PredictiveCoding or ZeroDivergence, which take any layer, or freeze these parameters "
            "(requires_grad_(False)).",
        )
    return layers


class _NotDense(Exception):  # noqa: N818  it never leaves this file
    """Why a node is no dense layer."""


def _trainable(call: Call, node: Node) -> dict[str, Tensor]:
    return {name: p for name in node.parameters if (p := call.parameters[name]).requires_grad}


def _recognised(call: Call, node: Node, readers: Mapping[str, int]) -> DenseLayer:
    shared = [name for name in _trainable(call, node) if readers[name] > 1]
    if shared:
        raise _NotDense(f"'{shared[0]}' is read by {readers[shared[0]]} nodes")
    inputs = [call.values[slot].detach().requires_grad_() for slot in node.reads]
    evaluated, watch = _watched(call, node, inputs)
    rows, weight = watch.product
    if rows.ndim != 2 or rows.shape[0] != call.batch_size:
        raise _NotDense(
            f"the layer reads inputs of shape {tuple(rows.shape)}, not one row for each of {call.batch_size} samples"
        )
    transposed, fan_out = _checked(call, evaluated, rows, weight, watch.bias)
    return DenseLayer(node, weight, watch.bias, transposed, rows.shape[1], fan_out)


def _checked(call: Call, evaluated: NodePass, rows: Tensor, weight: str, bias: str | None) -> tuple[bool, int]:
    """Hold the node against the local rule; returns whether its weight is stored transposed, and the fan-out."""
    prediction = evaluated.predictions[0]
    if len(evaluated.predictions) > 1 or prediction.numel() % call.batch_size:
        raise _NotDense("the prediction is not one row for each sample")
    numbers = torch.arange(1, prediction.numel() + 1, device=prediction.device, dtype=torch.float64)
    cotangent = numbers.mul(1.7).sin().to(prediction.dtype).reshape(prediction.shape)  # no two alike, nothing drawn
    of_sample = cotangent.reshape(call.batch_size, -1)
    wrt = [call.parameters[name] for name in (weight, bias) if name is not None]
    found = evaluated.pullback([cotangent], wrt)
    expected = of_sample.t() @ rows.detach().to(of_sample.dtype)
    stored = [_equal(found[0], candidate) for candidate in (expected, expected.t())]
    if not any(stored) or (bias is not None and not _equal(found[1], of_sample.sum(0))):
        raise _NotDense("the layer's output enters the prediction through something other than a sum")
    return not stored[0], of_sample.shape[1]


def _equal(ours: Tensor | None, expected: Tensor) -> bool:
    if ours is None or ours.shape != expected.shape:
        return False
    tolerance = torch.finfo(expected.dtype).eps ** 0.5  # far above rounding, far below any real difference
    return bool((ours - expected).abs().max() <= tolerance * expected.abs().max())


_PRODUCTS = {"linear": 1, "matmul": 1, "__matmul__": 1, "mm": 1, "addmm": 2}  # -> which argument is the weight
_SUMS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})
_VIEWS = frozenset({"t", "T", "mT", "transpose", "permute", "swapaxes", "to", "contiguous", "clone"})


def _watched(call: Call, node: Node, inputs: Sequence[Tensor]) -> tuple[NodePass, _ParameterWatch]:
    watch = _ParameterWatch(_trainable(call, node))
    with torch.enable_grad(), entered(watch):
        evaluated = call.evaluate(node, inputs)
    return evaluated, watch


class _ParameterWatch(TorchFunctionMode):
    """What a node does with its trainable parameters, seen by the functions that they are handed to."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.parameters = parameters
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.views: list[Tensor] = []  # kept alive: they are known by their id
        self.products: list[tuple[Tensor, str]] = []
        self.biases: list[str] = []
        self.others: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and any(id(leaf) in self.names for leaf in leaves_of((args, kwargs or {}))):
            self._see(_name(func), args, kwargs or {}, result)
        return result

    def _see(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> None:
        if name in _VIEWS and id(args[0]) in self.names:
            self.names[id(result)] = self.names[id(args[0])]
            self.views.append(result)
            return
        given = list(leaves_of([*args, *kwargs.values()]))
        watched = [self.names[id(leaf)] for leaf in given if id(leaf) in self.names]
        place = _PRODUCTS.get(name)
        if place is not None and place < len(given) and id(given[place]) in self.names:
            weight = self.names[id(given[place])]
            self.products.append((given[place - 1], weight))
            self.biases += [other for other in watched if other != weight]
        elif name in _SUMS:
            self.biases += watched
        else:
            self.others.append(f"'{watched[0]}' is used by {name}")

    @property
    def product(self) -> tuple[Tensor, str]:
        """The rows and the name of the weight of the one dense layer; raises where there is not one."""
        if self.others:
            raise _NotDense(self.others[0])
        if len(self.products) != 1 or len(self.biases) > 1:
            raise _NotDense(
                f"{len(self.products)} products with a trainable weight and {len(self.biases)} trainable biases"
            )
        rows, weight = self.products[0]
        unused = self.parameters.keys() - {weight, *self.biases}
        if unused:
            raise _NotDense(f"'{min(unused)}' is part of no dense layer")
        return rows, weight

    @property
    def bias(self) -> str | None:
        return self.biases[0] if self.biases else None


def _name(function: Callable[..., Any]) -> str:
    """The function's own name: ``T`` for the getter of that attribute, ``linear`` for ``aten.linear.default``."""
    name: str = getattr(function, "__name__", repr(function))
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return name.split(".")[0]
