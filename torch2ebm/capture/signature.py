"""The arguments of a call, in two parts: its tensors in order, and everything else.

Tensors are inputs of a captured graph. Everything else (numbers, strings, None, the structure) is written into the
graph, so another value there needs another capture.
"""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.common.nested import fill, leaves_of, template_of
from torch2ebm.errors import ConfigurationError


class _TensorLeaf:
    """Stands for a tensor among the leaves of a call's arguments."""

    def __repr__(self) -> str:
        return "<tensor>"


TENSOR = _TensorLeaf()


@dataclass(frozen=True)
class Signature:
    """What a capture is specialised to: the structure of the arguments and every argument that is no tensor."""

    leaves: tuple[Any, ...]
    structure: Any  # a template of (args, kwargs)

    @property
    def key(self) -> tuple[Any, ...]:
        """What two calls must have in common to be served by one capture."""
        # the types too: 1, True and 1.0 are equal and have one hash, and are not the same argument
        return self.structure, tuple((type(leaf), leaf) for leaf in self.leaves)

    def unflatten(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        remaining = iter(tensors)
        args, kwargs = fill(self.structure, [next(remaining) if leaf is TENSOR else leaf for leaf in self.leaves])
        return args, kwargs

    def names(self, module: nn.Module) -> Iterator[str]:
        """A name for each tensor, after the argument that holds it."""
        args, kwargs = self.structure
        parameters = inspect.signature(module.forward).parameters.values()
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        positional += [f"input_{i}" for i in range(len(positional), len(args))]  # those that *args takes
        for name, argument in [*zip(positional, args, strict=False), *kwargs.items()]:
            places = list(leaves_of(argument))
            for i, place in enumerate(places):
                if self.leaves[place] is TENSOR:
                    yield re.sub(r"\W", "_", name if len(places) == 1 else f"{name}_{i}")


def flatten_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], Signature]:
    """The tensors of a call in order, and the signature that puts them back."""
    structure = (args, dict(kwargs))
    leaves = list(leaves_of(structure))
    markers = tuple(TENSOR if isinstance(leaf, Tensor) else _checked(leaf) for leaf in leaves)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], Signature(markers, template_of(structure))


PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, slice, type(Ellipsis))
PLAIN_OF_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)


def _checked(leaf: Any) -> Any:
    """An argument that is no tensor becomes part of the graph, so it has to be comparable by value."""
    if not isinstance(leaf, (*PLAIN, *PLAIN_OF_TORCH)):
        raise ConfigurationError(
            "model(...)",
            f"an argument of type {type(leaf).__name__}",
            "tensors, numbers, strings, None, and tuples, lists or dicts of them",
            "Pass its tensors as a tuple or dict; turn arrays into tensors.",
        )
    return leaf


def with_signature_of(shown: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """The function ``method`` with the signature of the bound method ``shown``, for callers that inspect it.

    One is the Hugging Face Trainer, which passes a model the columns that its ``forward`` names.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    signature = inspect.signature(shown)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [own, *signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


def assumed_signature(module: nn.Module) -> Signature:
    """What ``convert`` traces without an example: arguments without a default are tensors, the others are left out."""
    required = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    positional = [p.name for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = {p.name: p.name for p in required if p.kind is p.KEYWORD_ONLY}
    structure = (tuple(positional), keywords)
    return Signature((TENSOR,) * len(list(leaves_of(structure))), template_of(structure))
