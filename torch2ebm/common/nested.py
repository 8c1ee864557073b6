"""Nested arguments and results: the leaves of tuples, lists, dicts, dataclasses and slices.

A leaf is whatever is none of these containers: a tensor, a number, a string. ``torch.utils._pytree`` does the same for
containers that are registered with it; this is quicker for the flat argument lists of ordinary calls, and it looks
into slices, which may hold tensors too (``x[:n]``).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import count
from typing import Any

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list


class ResultReference:
    """Stands on a tape, among the arguments of an operation, for what an earlier one returned."""

    __slots__ = ("index",)

    def __init__(self, index: Any) -> None:  # hashable
        self.index = index


# Leaves by their exact type: one lookup in place of the isinstance checks below. Others end there as leaves, too.
_ATOMS = frozenset([torch.Tensor, torch.nn.Parameter, ResultReference, int, float, bool, str, type(None)])


def leaves_of(structure: Any) -> Iterator[Any]:
    """All leaves, in order. A ``torch.Size`` is one leaf: a shape is compared as a whole."""
    if type(structure) in _ATOMS:
        yield structure
    elif isinstance(structure, (tuple, list)) and not isinstance(structure, torch.Size):
        for part in structure:
            yield from leaves_of(part)
    # before dataclasses: an output of transformers is both, and only as a mapping leaves out its fields that are None
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
            plain = type(structure) in (list, immutable_list)  # the latter in graphs of torch.fx
            return parts if plain else _with_parts(structure, enumerate(parts))
        # a named tuple takes its fields as arguments, every other kind of tuple takes one sequence
        return type(structure)(*parts) if hasattr(structure, "_fields") else _as_tuple(structure, parts)
    if type(structure) in (dict, immutable_dict):
        return {key: map_leaves(function, part) for key, part in structure.items()}
    if isinstance(structure, MutableMapping):
        return _with_parts(structure, [(key, map_leaves(function, part)) for key, part in structure.items()])
    if isinstance(structure, Mapping):
        return type(structure)({key: map_leaves(function, part) for key, part in structure.items()})  # type: ignore[call-arg]
    if isinstance(structure, slice):
        return slice(function(structure.start), function(structure.stop), function(structure.step))
    if _is_record(structure):
        made = copy.copy(structure)
        for field in dataclasses.fields(structure):
            # past __setattr__: it may be frozen; and no dataclasses.replace, whose __init__ checks what it is given
            object.__setattr__(made, field.name, map_leaves(function, getattr(structure, field.name)))
        return made
    return function(structure)


def _with_parts(structure: Any, parts: Iterable[tuple[Any, Any]]) -> Any:
    """A container of some class of its own, whose constructor nobody knows, with other parts."""
    made = copy.copy(structure)
    for key, part in parts:
        made[key] = part
    return made


def template_of(structure: Any) -> Any:
    """The same structure with each leaf replaced by its number, from 0; two structures are alike if these are equal."""
    number = count()
    return map_leaves(lambda leaf: next(number), structure)


def fill(template: Any, leaves: Sequence[Any]) -> Any:
    """The structure of a template around other leaves."""
    return map_leaves(leaves.__getitem__, template)


def signature(structure: Any) -> Hashable:
    """What two structures must have in common to be served by one recorded program.

    That is their containers, each tensor's kind (not its numbers), and every other leaf by value.
    """
    if isinstance(structure, torch.Tensor):
        # Strides: compiled code is made for them. The negative bit: x.conj().imag differs from x.imag in nothing else,
        # since torch defers the sign to whoever reads. Whether a gradient is required: it decides what was recorded.
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
    return type(structure), structure  # the type too: 1, 1.0 and True are equal and have one hash


def attributes_of(thing: Any) -> Any:
    """What the behaviour of an object may depend on, as a structure: its fields or, of no dataclass, its attributes."""
    return thing if _is_record(thing) else getattr(thing, "__dict__", thing)


def settings_of(thing: Any) -> Hashable:
    """What is the same in two objects that one program serves: the class and its attributes, tensors by their kinds."""
    return type(thing), signature(attributes_of(thing))


def _as_tuple(original: Any, parts: list[Any]) -> Any:
    """A plain tuple, or one of torch's own result types (of ``max``, ``topk``), which take one sequence."""
    return tuple(parts) if type(original) is tuple else type(original)(parts)


def _is_record(structure: Any) -> bool:
    return dataclasses.is_dataclass(structure) and not isinstance(structure, type)
