"""One node's share of the proximal objective, twice differentiable between the node's own borders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from torch2ebm.engine.call import Call, at_least_single
from torch2ebm.errors import UnsupportedError
from torch2ebm.graph.energy_graph import Node
from torch2ebm.implicit.dense_layers import DenseLayer
from torch2ebm.isolation.torch_modes import in_own_precision


class LocalTerm(ABC):
    """``<u, value> + energy`` of one node, ``u`` what its readers send.

    A node without trainable parameters has no energy, and its prediction for a value. That of a dense layer is moved
    by the layer's coordinates, ``own``: subclasses say which these are.

    Attributes:
        own: The coordinates, a leaf; None where there are none.
        error: Value minus prediction.
        energy: What the error costs, no dimension.
        values: By slot.
    """

    error: Tensor
    energy: Tensor
    values: tuple[Tensor, ...]

    def __init__(
        self,
        call: Call,
        layers: Mapping[str, DenseLayer],
        alpha: float,
        node: Node,
        inputs: list[Tensor],
        own: Tensor | None,
    ) -> None:
        self.node, self.inputs, self.alpha = node, inputs, alpha
        self.own = None if own is None else own.detach().requires_grad_()
        if self.own is None:
            with torch.enable_grad():
                evaluated = call.evaluate(node, inputs)
                self.predictions = self.values = tuple(map(widened, evaluated.predictions))
            return
        found = layers[node.name].evaluate(call, inputs)
        self.has_bias = layers[node.name].has_bias
        with torch.enable_grad():
            self.predictions = tuple(map(widened, found.evaluated.predictions))
            self.rows = found.rows.to(self.own.dtype)
            # one row a sample, whatever the shape of the prediction
            with in_own_precision(self.own):
                value = self._displaced(self.own, self.predictions[0].reshape(len(self.rows), -1))
            self.values = (value.reshape(self.predictions[0].shape),)

    @abstractmethod
    def _displaced(self, own: Tensor, prediction: Tensor) -> Tensor:
        """The value, shape ``[batch, fan_out]``; sets ``error`` and ``energy``."""

    @abstractmethod
    def step(self) -> tuple[Tensor, Tensor]:
        """The change of weight and bias, shapes ``[fan_out, fan_in]`` and ``[fan_out]``."""

    @abstractmethod
    def conditioned(self, gradient: Tensor) -> Tensor:
        """The inverse Hessian of the energy alone, applied to a gradient."""

    def _wrt(self) -> list[Tensor]:
        return self.inputs if self.own is None else [self.own, *self.inputs]

    def differentiated(self, cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """The gradient in ``s``, and in each value read."""
        pairs = zip(cotangents, self.values, strict=True)
        self.received = [torch.zeros_like(v) if c is None else c.detach() for c, v in pairs]
        self.received = [received.reshape(v.shape) for received, v in zip(self.received, self.values, strict=True)]
        self.received = [received.requires_grad_() for received in self.received]
        with torch.enable_grad():
            share = sum((u * value).sum() for u, value in zip(self.received, self.values, strict=True))
            share = share if self.own is None else share + self.energy
        self.gradients: Sequence[Tensor | None] = [None] * len(self._wrt())
        if self._wrt() and isinstance(share, Tensor):
            with in_own_precision(share):
                self.gradients = torch.autograd.grad(share, self._wrt(), create_graph=True, allow_unused=True)
        found = [None if g is None else g.detach() for g in self.gradients]
        return (None, found) if self.own is None else (found[0], found[1:])

    def pushed(
        self, direction: Tensor | None, along: Sequence[Tensor | None]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """How the values move, and the share's own second derivative (in ``s``, then in each value read)."""
        directions = [*along] if self.own is None else [direction, *along]
        pairs = [
            (gradient, towards.to(gradient.dtype))
            for gradient, towards in zip(self.gradients, directions, strict=True)
            if gradient is not None and gradient.requires_grad and towards is not None
        ]
        wrt = [*self.received, *self._wrt()]
        found: Sequence[Tensor | None] = [None] * len(wrt)
        if pairs:
            gradients, towards = zip(*pairs, strict=True)
            where = f"node '{self.node.name}' ({self.node.description})"
            with twice_differentiable(where), in_own_precision(gradients[0]):
                found = torch.autograd.grad(gradients, wrt, towards, retain_graph=True, allow_unused=True)
        count = len(self.received)
        return found[:count], self._aligned(found[count:])

    def pulled(self, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Cotangents of the values to ``s`` (None where there is none) and to the values read."""
        return self._aligned(pulled(self.values, cotangents, self._wrt()))

    def _aligned(self, found: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        return [None, *found] if self.own is None else found


def widened(prediction: Tensor) -> Tensor:
    """In the precision that values are kept in, on the same autograd graph."""
    return prediction.float() if prediction.dtype in (torch.float16, torch.bfloat16) else prediction


def pulled(
    values: Sequence[Tensor], cotangents: Sequence[Tensor | None], wrt: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    pairs = [(v, c) for v, c in zip(values, cotangents, strict=True) if c is not None and v.requires_grad]
    if not pairs or not wrt:
        return [None] * len(wrt)
    outputs, directions = zip(*pairs, strict=True)
    with in_own_precision(outputs[0]):
        return torch.autograd.grad(outputs, wrt, directions, retain_graph=True, allow_unused=True)


def deliver(messages: dict[str, Tensor], node: Node, sent: Sequence[Tensor | None]) -> None:
    for slot, message in zip(node.reads, sent, strict=True):
        if message is not None:
            message = at_least_single(message)
            messages[slot] = messages[slot] + message if slot in messages else message


def added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


@contextmanager
def twice_differentiable(where: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not any(hint in str(error) for hint in ("not implemented", "once_differentiable", "marked with @once")):
            raise
        raise UnsupportedError(
            where,
            f"an operation without a second derivative: {str(error).strip().splitlines()[0]}",
            "one that can be differentiated twice, which Newton's method needs",
            "Write it with differentiable operations, or use PredictiveCoding.",
        ) from error
