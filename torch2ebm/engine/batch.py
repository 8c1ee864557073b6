"""Which dimension of which input counts the samples: told, found by a run with another batch size, or guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch2ebm.common.nested import leaves_of, map_leaves
from torch2ebm.errors import BatchDimensionError, ConfigurationError

BatchDim = int | Mapping[str, int] | None


@dataclass(frozen=True)
class BatchDimension:
    """One dimension of one input.

    Attributes:
        dim: The dimension, negative from the end.
        argument: The name of the argument; empty for the first tensor that has this dimension.
        known: ``"told"``, ``"found"`` by a second run, or ``"guessed"``.
    """

    dim: int = 0
    argument: str = ""
    known: str = "guessed"

    def __str__(self) -> str:
        return f"batch: dimension {self.dim} of {self.argument or 'the first input'} ({self.known})"

    @staticmethod
    def told(batch_dim: BatchDim) -> BatchDimension:
        """Raises :class:`ConfigurationError` unless it is a dimension, or one argument's."""
        named = batch_dim if isinstance(batch_dim, Mapping) else {"": batch_dim}
        (argument, dim), *others = named.items() or [("", None)]
        if others or not isinstance(argument, str) or not isinstance(dim, int) or isinstance(dim, bool):
            raise ConfigurationError(
                "torch2ebm.convert(batch_dim=...)",
                repr(batch_dim),
                "a whole number, or one argument with its dimension",
                "For example batch_dim=1, or batch_dim={'x': 0}.",
            )
        return BatchDimension(dim, argument, "told")

    def of(self, tensors: Sequence[Tensor], names: Callable[[], Mapping[int, str]], output: Any) -> Batch:
        """The batch of one call. A guess goes by an input with as many rows as the output, where there is one."""
        counted = self._counted(tensors, names)
        found = 1 if counted is None else counted.shape[self.dim]
        inputs, outputs = _shapes(tensors), _shapes(leaves_of(output))
        if self.known == "guessed" and outputs and all(shape[0] != found for shape in outputs):
            rows = {shape[0] for shape in inputs}
            found = next((shape[0] for shape in outputs if shape[0] in rows), found)
        beside = () if counted is None else tuple(size for size in counted.shape if size != found)
        return Batch(found, self.known, inputs, outputs, beside)

    def _counted(self, tensors: Sequence[Tensor], names: Callable[[], Mapping[int, str]]) -> Tensor | None:
        by_id = names() if self.argument else {}
        named = [tensor for tensor in tensors if not self.argument or by_id.get(id(tensor)) == self.argument]
        tensor = next((t for t in named if t.ndim and -t.ndim <= self.dim < t.ndim), None)
        if tensor is None and self.known == "told":
            raise BatchDimensionError(
                "model(...)",
                f"no input{self.argument and f' {self.argument!r}'} with a dimension {self.dim}",
                "the batch dimension that convert was told",
                "Pass another batch_dim to torch2ebm.convert.",
            )
        return tensor


GUESSED = BatchDimension()


@dataclass(frozen=True)
class Batch:
    """How many samples a call has, and what may speak against it.

    Attributes:
        size: The number of samples.
        known: As for :class:`BatchDimension`.
        inputs: The shapes of the inputs that have one.
        outputs: Those of the outputs.
        beside: The other sizes of the input whose dimension counts.
    """

    size: int
    known: str
    inputs: tuple[tuple[int, ...], ...] = ()
    outputs: tuple[tuple[int, ...], ...] = ()
    beside: tuple[int, ...] = ()

    def check(self, targets: Sequence[int]) -> None:
        """Raise :class:`BatchDimensionError` where outputs, or targets of so many rows, have another size."""
        if self.known == "told":  # it may be any dimension of the output, or a part of one
            if self.outputs and all(
                shape[0] in self.beside and all(n % self.size for n in shape) for shape in self.outputs
            ):
                raise self._contradicted(f"an output of shape {self.outputs[0]}")
            return
        # rows of another dimension's size: that is the batch. Of a size of their own: forward has chosen them.
        within = {size for shape in self.inputs for size in shape[1:]}
        if self.outputs and all(shape[0] % self.size and shape[0] in within for shape in self.outputs):
            raise self._contradicted(f"an output of shape {self.outputs[0]}")
        other = within | {size for shape in self.outputs for size in shape[1:-1]}
        other -= {shape[0] for shape in self.outputs}
        for rows in targets:
            if rows != self.size and rows in other:
                raise self._contradicted(f"a target of {rows} rows")

    def _contradicted(self, what: str) -> BatchDimensionError:
        known = "told for" if self.known == "told" else f"{self.known} from"
        return BatchDimensionError(
            "loss.backward()",
            f"a batch of {self.size}, {known} inputs of shapes {list(self.inputs)}, and {what}",
            "one number of samples in all of them, which decides how strongly the loss pulls",
            "Tell which dimension counts samples: torch2ebm.convert(net, batch_dim=1), or batch_dim={'x': 0} for an "
            "argument.",
        )


def _shapes(leaves: Any) -> tuple[tuple[int, ...], ...]:
    return tuple([tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0]])


# a second run


def candidates(tensors: Sequence[Tensor], output: Any) -> list[int]:
    """The dimensions of the first input that an output has, too: where it is one, no second run is needed."""
    first = next((tensor for tensor in tensors if tensor.ndim), None)
    kept = {size for leaf in _floating(leaves_of(output)) for size in leaf.shape}
    return [] if first is None else [dim for dim, size in enumerate(first.shape) if size in kept]


def find_batch_dimension(
    run: Callable[..., Any],
    tensors: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dims: Sequence[int],
) -> BatchDimension:
    """The dimension without whose first entry the module computes the same for all others.

    Where several are such, for example in a net that treats all tokens alike, it is the one that stands first in the
    output. Where none is, dimension 0 remains a guess.
    """
    first = next(tensor for tensor in tensors if tensor.ndim)
    outputs = _tensors(run(*args, **kwargs))
    found: list[tuple[int, int]] = []
    for dim in dims:
        place = _place_of_samples(run, args, kwargs, first, dim, outputs)
        if place == 0:
            return BatchDimension(dim, known="found")
        if place is not None:
            found.append((place, dim))
    return BatchDimension(min(found)[1], known="found") if found else BatchDimension()


def _place_of_samples(
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    first: Tensor,
    dim: int,
    outputs: Sequence[Tensor],
) -> int | None:
    """The dimension of the outputs that this one becomes, where the others' results do without its first entry."""
    size = first.shape[dim]
    if size < 2:
        return None
    fewer = map_leaves(lambda leaf: _without_first(leaf, dim, size), (args, dict(kwargs)))
    try:
        others = _tensors(run(*fewer[0], **fewer[1]))
    except Exception:  # whatever the module makes of an input that does not fit
        return None
    if len(others) != len(outputs):
        return None
    places = [_dropped(before, after, size) for before, after in zip(outputs, others, strict=True)]
    return next((place for place in places if place is not None), None)


def _without_first(leaf: Any, dim: int, size: int) -> Any:
    if not isinstance(leaf, Tensor) or size not in leaf.shape:
        return leaf
    own = dim if leaf.ndim > dim and leaf.shape[dim] == size else list(leaf.shape).index(size)
    return leaf.detach().narrow(own, 1, size - 1).clone()


def _dropped(before: Tensor, after: Tensor, size: int) -> int | None:
    for place in range(before.ndim):
        if before.shape[place] != size:
            continue
        rest = before.narrow(place, 1, size - 1)
        if rest.shape == after.shape and torch.allclose(rest, after, rtol=1e-3, atol=1e-5):
            return place
    return None


def _tensors(output: Any) -> list[Tensor]:
    return list(_floating(leaves_of(output)))


def _floating(leaves: Iterator[Any]) -> Iterator[Tensor]:
    return (leaf.detach() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
