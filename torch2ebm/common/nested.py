"""Nested arguments and results: the leaves of tuples, lists, dicts, dataclasses and slices.

Quicker than a pytree for the flat argument lists of ordinary calls, and it looks into slices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch


class ResultReference:
    """Stands on a tape, among the arguments of an operation, for what an earlier one returned."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


# most leaves, known at once
_ATOMS = frozenset([torch.Tensor, torch.nn.Parameter, ResultReference, int, float, bool, str, type(None)])


def leaves_of(structure: Any) -> Iterator[Any]:
    """All leaves, in order. A ``torch.Size`` is one."""
    if type(structure) in _ATOMS:
        yield structure
    elif isinstance(structure, (tuple, list)) and not isinstance(structure, torch.Size):
        for part in structure:
            yield from leaves_of(part)
    elif isinstance(structure, Mapping):
        for part in structure.values():
            yield from leaves_of(part)
    elif isinstance(structure, slice):
        yield from (structure.start, structure.stop, structure.step)
    elif _is_record(structure):
        for field in dataclasses.fields(structure):
            yield from leaves_of(getattr(structure, field.name))
    else:
        yield structure


def map_leaves(function: Callable[[Any], Any], structure: Any) -> Any:
    """The same structure with ``function`` applied to every leaf."""
    if type(structure) in _ATOMS:
        return function(structure)
    if isinstance(structure, (tuple, list)) and not isinstance(structure, torch.Size):
        parts = [map_leaves(function, part) for part in structure]
        if isinstance(structure, list):
            return parts
        return type(structure)(*parts) if hasattr(structure, "_fields") else _as_tuple(structure, parts)
    if isinstance(structure, dict):
        mapped = {key: map_leaves(function, part) for key, part in structure.items()}
        return mapped if type(structure) is dict else type(structure)(mapped)
    if isinstance(structure, slice):
        return slice(function(structure.start), function(structure.stop), function(structure.step))
    if _is_record(structure):
        return dataclasses.replace(
            structure,
            **{f.name: map_leaves(function, getattr(structure, f.name)) for f in dataclasses.fields(structure)},
        )
    return function(structure)


def template_of(structure: Any) -> Any:
    """The same structure with the number of each leaf in its place; two structures are alike if these are equal."""
    number = count()
    return map_leaves(lambda leaf: next(number), structure)


def fill(template: Any, leaves: Sequence[Any]) -> Any:
    """The structure of a template around other leaves."""
    return map_leaves(leaves.__getitem__, template)


def signature(structure: Any) -> Hashable:
    """What is the same in two structures that one program serves: shape, kinds of tensors, all other leaves."""
    if isinstance(structure, torch.Tensor):
        layout = structure.shape, structure.stride(), structure.is_neg()
        return *layout, structure.dtype, structure.device, structure.requires_grad
    if isinstance(structure, ResultReference):
        return ResultReference, structure.index
    if isinstance(structure, (tuple, list)) and not isinstance(structure, torch.Size):
        return type(structure), *map(signature, structure)
    if isinstance(structure, Mapping):
        return type(structure), *((key, signature(part)) for key, part in structure.items())
    if isinstance(structure, slice):
        return slice, signature((structure.start, structure.stop, structure.step))
    if _is_record(structure):
        return type(structure), *(signature(getattr(structure, field.name)) for field in dataclasses.fields(structure))
    return type(structure), structure


def attributes_of(thing: Any) -> Any:
    """What the behaviour of an object may depend on, as a structure: its fields or, of no dataclass, its attributes."""
    return thing if _is_record(thing) else getattr(thing, "__dict__", thing)


def settings_of(thing: Any) -> Hashable:
    """What is the same in two objects that one program serves: the class and its attributes, tensors by their kinds."""
    return type(thing), signature(attributes_of(thing))


def _as_tuple(original: Any, parts: list[Any]) -> Any:
    """A plain tuple, or one of torch's own result types (``max``, ``topk``), which take a sequence."""
    return tuple(parts) if type(original) is tuple else type(original)(parts)


def _is_record(structure: Any) -> bool:
    return dataclasses.is_dataclass(structure) and not isinstance(structure, type)
