"""Which tensor is which in one run: parameters, results of hot operations, constants; and the keys made of them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.capture.behind import Behind
from torch2ebm.capture.functions import moved_by, tensors_of
from torch2ebm.capture.run import Constant, Cuts, Hot, Number, Run
from torch2ebm.common.nested import leaves_of, signature, template_of
from torch2ebm.isolation.module_state import identical
from torch2ebm.isolation.torch_modes import Ambient

_EXACT = frozenset(
    [bool, type(None), str, bytes, complex, torch.dtype, torch.device, torch.layout, torch.memory_format]
)
_ZERO = (int, "0")  # one object: keys are compared at each operation
_ONE_TENSOR = signature(0)  # the template of an output that is one tensor
_REMEMBERED = 4096  # tuples, at most
_CONSTANT = 1 << 40  # constants count down from here, results from -1: one integer tells all

Settings = tuple[tuple[Any, ...], Sequence[Any], Sequence[Any]]  # the tuple, its part of a key, its numbers


class Identities(ABC):
    """Who is who among the tensors of one run.

    Args:
        paths: id of each parameter to its path.
        start: The modes in which the run begins.
        inputs: From the id of each tensor among the arguments to its name.
        cuts: Those of the graph that the run is expected to have.
        tuples: id of tuples of numbers that are known, which they are kept with, to what they are in a key.
    """

    def __init__(
        self,
        paths: Mapping[int, str],
        start: Ambient,
        inputs: Callable[[], Mapping[int, str]],
        cuts: Cuts | None = None,
        tuples: dict[int, Settings] | None = None,
    ) -> None:
        self.run = Run(records=[]) if cuts is None else Run(records=None, effects=set(cuts.effects))
        self.paths, self.start, self._named, self.cuts = paths, start, inputs, cuts
        self.recording = cuts is None
        self.tuples = {} if tuples is None else tuples
        self.lost: dict[str, str] = {}  # path of a module that cannot be followed, to the reason
        self._numbers: dict[int, int] = {}  # id -> number
        self._known: dict[tuple[int, int], int] = {}  # (id, version) -> constant
        self._alive: list[Any] = []  # an address that is free may be used again
        self._behind = Behind()
        self._substitutes: dict[int, Tensor] = {}
        self._originals: list[tuple[Tensor, int]] = []
        self._origins: dict[int, frozenset[str]] = {}
        self._without_gradient: set[int] = set()  # ids of results that were made while gradients were off

    @abstractmethod
    def _innermost(self) -> str:
        """The path of the submodule whose call is under way."""

    @functools.cached_property
    def inputs(self) -> Mapping[int, str]:
        return self._named()

    def _any_hot(self, args: Any, kwargs: Any) -> bool:
        return any(id(leaf) in self._numbers or id(leaf) in self.paths for leaf in tensors_of((args, kwargs)))

    def _scan(self, parts: Iterable[Any], key: list[Any], numbers: list[Any], found: list[tuple[int, Tensor]]) -> bool:
        hot = False
        for part in parts:
            kind = type(part)
            if kind is Tensor or kind is nn.Parameter or isinstance(part, Tensor):
                number = self._numbers.get(id(part))
                if number is not None:
                    key.append(~number)
                    hot = True
                elif (path := self.paths.get(id(part))) is not None:
                    key += (path, Tensor)  # a string among the arguments is no path
                    hot = True
                else:
                    found.append((len(key), part))
                    key.append(None)
            elif kind is int or kind is float:
                if part == 0 or part - part != 0:
                    key.append(_ZERO if part == 0 and kind is int else (kind, repr(part)))
                else:
                    key.append(kind)
                    numbers.append(part)
            elif kind in _EXACT:
                key.append(part)
            elif kind is tuple and (known := self.tuples.get(id(part))) is not None:
                key += known[1]
                numbers += known[2]
            elif kind is tuple or kind is list or isinstance(part, (tuple, list)):
                if kind is tuple and self.recording:
                    self._remember(part)
                key.append("(")
                hot |= self._scan(part, key, numbers, found)
                key.append(")")
            elif isinstance(part, dict):
                key.append(("{", *part))
                hot |= self._scan(part.values(), key, numbers, found)
                key.append("}")
            elif kind is slice:
                key.append(slice)
                hot |= self._scan((part.start, part.stop, part.step), key, numbers, found)
            else:
                key.append(getattr(part, "__code__", kind))
                # a generator as it is before the operation draws from it
                numbers.append(part.clone_state() if kind is torch.Generator else part)
        return hot

    def _remember(self, numbers: tuple[Any, ...]) -> None:
        """A tuple of numbers is a setting mostly, such as a stride, and the same object in each run."""
        if len(self.tuples) < _REMEMBERED and all(type(each) is int for each in numbers):
            key: list[Any] = []
            varying: list[Any] = []
            self._scan([list(numbers)], key, varying, [])
            self.tuples[id(numbers)] = numbers, key, varying

    def _constant(self, tensor: Tensor) -> int:
        version = self._behind.version(tensor)
        known = self._known.get((id(tensor), version))
        if known is not None:
            return _CONSTANT - known
        place = self._known[id(tensor), version] = len(self.run.constants)
        self._alive.append(tensor)
        self._originals.append((tensor, version))
        copied = self.recording or (self.cuts is not None and place in self.cuts.copied)
        value = tensor.detach()
        self.run.constants.append(value.clone() if copied else value)
        if tensor.requires_grad and self.start.grad:
            self.run.external[place] = tensor
            leaf = self.run.external_leaves[place] = self.run.constants[place].requires_grad_()
            if self.recording:
                self._check_known(tensor, self._innermost())
            else:
                self._substitutes[id(tensor)] = leaf
                self._known[id(leaf), leaf._version] = place
        if self.recording:
            self._name(tensor)
        return _CONSTANT - place

    def _name(self, tensor: Tensor) -> None:
        """Note for the next constant which arguments it is made of."""
        names, own = self._origins.get(id(tensor), frozenset[str]()), self.inputs.get(id(tensor))
        self.run.origins.append(names | {own} if own else names)
        self.run.names.append(own)

    def _current(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            while (following := self._substitutes.get(id(leaf))) is not None:
                leaf = following
        return leaf

    def _number(self, tensor: Tensor) -> int:
        number = len(self.run.hot)
        self.run.hot.append(tensor)
        self._numbers[id(tensor)] = number
        self._alive.append(tensor)
        return number

    def _reference(self, tensor: Tensor) -> Hot | Constant:
        number = self._numbers.get(id(tensor))
        if number is not None:
            return Hot(number)
        if (path := self.paths.get(id(tensor))) is not None:
            return Hot(path)
        for (address, _), place in reversed(self._known.items()):
            if address == id(tensor):
                return Constant(place)
        return Constant(_CONSTANT - self._constant(tensor))

    def _described(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments with what stands for each leaf, the numbers counted as :meth:`_scan` finds them."""
        counted = [0]

        def of(part: Any) -> Any:
            kind = type(part)
            if isinstance(part, Tensor):
                return self._reference(part)
            if kind is int or kind is float:
                if part == 0 or part - part != 0:
                    return part
                counted[0] += 1
                return Number(counted[0] - 1)
            if kind in _EXACT:
                return part
            if isinstance(part, (tuple, list)):
                made = [of(each) for each in part]
                return made if isinstance(part, list) else tuple(made)
            if isinstance(part, dict):
                return {name: of(each) for name, each in part.items()}
            if kind is slice:
                return slice(of(part.start), of(part.stop), of(part.step))
            counted[0] += 1
            return Number(counted[0] - 1)

        return tuple(of(each) for each in args), {name: of(each) for name, each in kwargs.items()}

    def _changed_constants(self) -> Iterator[int]:
        """Those that forward has changed since it read them; where it is recorded, by ways that nobody sees too."""
        # training does not read the statistics that a batch norm moves
        moved = {each.place for record in self.run.records or () for each in moved_by(record)}
        for i, (tensor, version) in enumerate(self._originals):
            copy = self.run.constants[i]
            plain = (
                self.recording
                and i not in moved
                and tensor.layout is torch.strided
                and not (tensor.is_nested or tensor.is_quantized)
            )
            unseen = plain and not tensor.is_meta and not identical(tensor.detach(), copy.detach())
            if unseen or self._behind.version(tensor) != version:
                yield i

    def _output_key(self, output: Any) -> Any:
        leaves: list[Any] = []
        for leaf in leaves_of(output):
            if isinstance(leaf, Tensor):
                leaf = self._current(leaf)
                number = self._numbers.get(id(leaf))
                leaves.append(~number if number is not None else self.paths.get(id(leaf)))
            else:
                leaves.append(type(leaf))
        structure = _ONE_TENSOR if type(output) is Tensor else signature(template_of(output))
        return structure, tuple(leaves)

    def _check_known(self, tensor: Tensor, path: str) -> None:
        """Notice a tensor that something unseen has made of hot ones."""
        if id(tensor) in self._without_gradient and tensor.grad_fn is not None:
            # its operations were seen, as they are inside of a custom function's forward, and its backward was not
            self.lost[path] = "applies a custom autograd function by an apply that was kept from before"
            return
        if not tensor.requires_grad or id(tensor) in self._numbers or id(tensor) in self.paths:
            return
        if self._comes_from_hot(tensor):
            reason = "computes with parameters what torch2ebm cannot see, outside of torch's own operations"
            self.lost.setdefault(path, reason)
            self._number(tensor)  # whoever reads it is not to blame

    def _comes_from_hot(self, tensor: Tensor) -> bool:
        hot = {t.grad_fn for t in self.run.hot if t.grad_fn is not None}
        hot_leaves = set(self.paths) | {id(t) for t in self.run.leaves.values()}
        pending, seen = [tensor.grad_fn], set()
        while pending:
            each = pending.pop()
            if each is None or each in seen:
                continue
            seen.add(each)
            variable = getattr(each, "variable", None)
            if each in hot or (variable is not None and id(variable) in hot_leaves):
                return True
            pending += [following for following, _ in each.next_functions]
        return False
