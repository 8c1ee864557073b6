"""The module's own run, watched: every operation on what depends on parameters, in the order of the run.

The module runs as it always does, and its output is its own. A function mode sees each operation. *Hot* is a parameter
and whatever is computed from one. An operation that reads nothing hot belongs to the data: it is left alone, and its
result is a *constant* of the run where a hot operation reads it::

    def forward(self, x):                       # x                                        constant 0
        mask = x > 0                            # reads nothing hot: not watched
        h = self.linear(x)                      # F.linear(x, weight, bias)                operation 0
        h = torch.where(mask, h, h.mean())      # mask: constant 1                         operations 1, 2
        return h.reshape(len(x), 4)             # len(x), 4: numbers of the run            operation 3

The operations, and how they hang together, are the run's *sequence*. Numbers are no part of it, apart from zeros,
infinities and NaN: another batch size, temperature or dropout rate is the same sequence with other numbers.

A run that is given the :class:`Cuts` of a graph with the same sequence is cut at the graph's nodes while it goes: the
result of a node's last operation is handed on as a leaf of autograd. A run whose sequence turns out to be another one
goes on uncut.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from torch2ebm.capture.behind import BEHIND, Behind
from torch2ebm.capture.custom_functions import inside_custom_function, untold
from torch2ebm.capture.functions import (
    GRADIENTS,
    PASSIVE,
    VALUES,
    apart,
    draws_from_its_own,
    hung_on_autograd,
    is_among,
    makes_tensors,
    moved_by,
    named_in_place,
    runs_elsewhere,
    share_memory,
    tensors_of,
    with_hook,
    writes_its_first,
)
from torch2ebm.capture.held import held_elsewhere
from torch2ebm.capture.run import Constant, Cuts, Hot, ModuleCall, Number, Record, Run
from torch2ebm.capture.scopes import Scopes
from torch2ebm.capture.transforms import outside_of_transforms, transforming
from torch2ebm.common.nested import leaves_of, map_leaves, signature, template_of
from torch2ebm.isolation.module_state import identical, is_lazy
from torch2ebm.isolation.opaque_state import OpaqueState
from torch2ebm.isolation.random_numbers import RandomState
from torch2ebm.isolation.torch_modes import Ambient

_EXACT = frozenset(
    [bool, type(None), str, bytes, complex, torch.dtype, torch.device, torch.layout, torch.memory_format]
)
_ZERO = (int, "0")  # one object: keys are compared at each operation
_ONE_TENSOR = signature(0)  # the template of an output that is one tensor
_REMEMBERED = 4096  # tuples, at most
_CONSTANT = 1 << 40  # constants count down from here, results from -1: one integer tells all


Settings = tuple[tuple[Any, ...], Sequence[Any], Sequence[Any]]  # the tuple, its part of a key, its numbers


class _Seen(NamedTuple):
    """One operation that is about to run."""

    position: int  # how many were before
    function: Any
    execute: Callable[..., Any]  # runs it
    args: Any
    kwargs: Any
    key: tuple[Any, ...]
    numbers: list[Any]
    ambient: Ambient


class Watch(TorchFunctionMode):
    """Watches one run.

    Args:
        paths: id of each parameter to its path.
        device: Type of the device that autocast is looked at for.
        cuts: Those of the graph that the run is expected to have.
        others: Cuts of other graphs, for a run that takes another branch on the way.
        opaque: Paths of modules that are known to be opaque, each with the reason.
        modules: id of each submodule to its path.
        inputs: From the id of each tensor among the arguments to its name.
        passive: Functions that are known to return no tensor; more are added as they are met.
        tuples: id of tuples of numbers that are known, which they are kept with, to what they are in a key.
        lazy: Whether some parameters have not been made yet.
    """

    def __init__(
        self,
        paths: Mapping[int, str],
        device: torch.device,
        modules: Mapping[int, str],
        inputs: Callable[[], Mapping[int, str]],
        cuts: Cuts | None = None,
        others: Sequence[Cuts] = (),
        opaque: Mapping[str, str] | None = None,
        passive: set[Any] | None = None,
        tuples: dict[int, Settings] | None = None,
        lazy: bool = False,
    ) -> None:
        super().__init__()
        self.lazy = lazy
        self.passive = set() if passive is None else passive
        self.tuples = {} if tuples is None else tuples
        self.run = Run(records=[]) if cuts is None else Run(records=None, effects=set(cuts.effects))
        self.paths, self.modules, self._named, self.cuts, self._others = paths, modules, inputs, cuts, others
        self.device = device
        self.opaque = dict(opaque or {})
        self.suspended = False
        self._type = device.type
        self.start = Ambient.now(device.type)
        self.recording = cuts is None
        self._numbers: dict[int, int] = {}  # id -> number
        self._known: dict[tuple[int, int], int] = {}  # (id, version) -> constant
        self._alive: list[Any] = []  # an address that is free may be used again
        self._behind = Behind()
        self._substitutes: dict[int, Tensor] = {}
        self._originals: list[tuple[Tensor, int]] = []
        self._origins: dict[int, frozenset[str]] = {}
        self._stack = Scopes(modules, Watch.watching.__code__)
        self.custom = False  # whether a custom autograd function was applied
        self.buffers: Callable[[], Iterable[Tensor]] = tuple  # the module's own
        self.changing: Callable[[str], Sequence[str]] = lambda path: ()  # the buffers that a submodule changes
        self.blind = False  # whether one was before anybody was told
        self.deviates: Callable[[], Any] = bool  # called where a run turns out to be another than expected
        self._without_gradient: set[int] = set()  # ids of results that were made while gradients were off
        self.lost: dict[str, str] = {}  # path of a module that cannot be followed, to the reason
        self._calls: list[str] = []

    @functools.cached_property
    def inputs(self) -> Mapping[int, str]:
        return self._named()

    # what torch tells

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.suspended or func in PASSIVE or func in self.passive:
            if func in VALUES and self.recording and not self.suspended and self._any_hot(args, kwargs):
                self.run.values_read.setdefault(self._scopes()[1], func.__name__)
            result = func(*args, **kwargs)
            if self.suspended or not isinstance(result, Tensor) or func in PASSIVE:
                return result
            self.passive.discard(func)  # x.type() tells the type, x.type(dtype) makes a tensor
            return self._seen(func, lambda *a, **k: result, args, kwargs)
        if self.lazy and any(is_lazy(leaf) for leaf in tensors_of((args, kwargs))):
            return func(*args, **kwargs)  # a lazy module makes its parameters
        return self._seen(func, func, args, kwargs)

    def applied(self, function: Any, apply: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A custom autograd function is one operation, its backward its own."""
        if self.suspended:
            return apply(function, *args, **kwargs)
        self.custom = True
        if function is CheckpointFunction:  # apply(run, preserve, *args): run as it is, for the sake of its operations
            return args[0](*args[2:])
        return self._unseen(function, lambda *a, **k: self._hidden(apply, (function, *a), k), args, kwargs)

    def called(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A submodule is called; where it is opaque, this is an operation."""
        path = self.modules.get(id(module))
        if path is None or self.suspended:
            return call(module, *args, **kwargs)
        reason = self.opaque.get(path)
        if reason is None and runs_elsewhere(module):
            reason = f"is a {type(module).__name__}, whose operations run outside of Python"
        if reason is None and hung_on_autograd(module):
            reason = "has backward hooks, which run with its own backward"
        if reason is not None and (any(True for _ in module.parameters()) or self._any_hot(args, kwargs)):
            self.run.opaque[path] = reason
            state = OpaqueState(module, None if self.recording else self.changing(path))
            return self._unseen(ModuleCall(path), self._whole(call, module), (state, *args), kwargs)
        if not self.recording:
            return call(module, *args, **kwargs)
        caller = self._innermost()
        for leaf in tensors_of((args, kwargs)):
            self._check_known(leaf, caller)
        self._calls.append(path)
        try:
            result = call(module, *args, **kwargs)
        finally:
            self._calls.pop()
        for leaf in tensors_of(result):
            self._check_known(leaf, path)
        return result

    def _whole(self, call: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
        def run(state: OpaqueState, *args: Any, **kwargs: Any) -> Any:
            try:
                return self._hidden(call, (module, *args), kwargs)
            finally:
                state.called()

        return run

    def _any_hot(self, args: Any, kwargs: Any) -> bool:
        return any(id(leaf) in self._numbers or id(leaf) in self.paths for leaf in tensors_of((args, kwargs)))

    def _unseen(self, function: Any, execute: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """What torch does not tell of: unlike in ``__torch_function__`` this mode is still entered."""
        self.suspended = True
        try:
            return self._seen(function, execute, args, kwargs)
        finally:
            self.suspended = False

    def _hidden(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with untold(), torch._C.DisableTorchFunction():  # dynamo would trace this mode, too
            return function(*args, **kwargs)

    # one operation

    def _seen(self, function: Any, execute: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        if self._substitutes:
            args, kwargs = map_leaves(self._current, (args, kwargs))
        parts: list[Any] = [function]
        numbers: list[Any] = []
        found: list[tuple[int, Tensor]] = []
        hot = self._scan(args, parts, numbers, found)
        if kwargs:
            parts.append(tuple(kwargs))
            hot |= self._scan(kwargs.values(), parts, numbers, found)
        if not hot and type(function) is not ModuleCall:
            return self._cold(function, execute, args, kwargs)
        if (found or self.recording) and transforming():
            return self._transformed(execute, args, kwargs)
        run = self.run
        known = len(run.constants)
        for place, tensor in found:
            parts[place] = self._constant(tensor)
        if found and run.external_leaves and not self.recording:
            args, kwargs = map_leaves(self._current, (args, kwargs))
        ambient = self.start
        # by parts: this is asked for each operation
        if torch.is_grad_enabled() is not ambient.grad or torch.is_autocast_enabled(self._type) or ambient.autocast:
            ambient = Ambient.now(self._type)
            if ambient != self.start:
                parts.append(ambient)
        index, key = len(run.sequence), tuple(parts)
        if not self.recording:
            if self._expected(index, key):
                return self._followed(index, function, execute, args, kwargs, key, numbers, ambient)
            if (index, key) in run.effects:
                return self._behind.noticed(function, execute, args, kwargs)
            self._deviate(known)
            self.deviates()
            # the forward of a custom function runs without gradients; so does much else
            self.blind = self.start.grad and not ambient.grad and inside_custom_function()
        return self._recorded(_Seen(index, function, execute, args, kwargs, key, numbers, ambient))

    def _scan(self, parts: Iterable[Any], key: list[Any], numbers: list[Any], found: list[tuple[int, Tensor]]) -> bool:
        hot = False
        for part in parts:
            kind = type(part)
            if kind is nn.Parameter and (path := self.paths.get(id(part))) is not None:
                key += (path, Tensor)  # a string among the arguments is no path
                hot = True
            elif kind is Tensor or isinstance(part, Tensor):
                number = self._numbers.get(id(part))
                if number is not None:
                    key.append(~number)
                    hot = True
                elif (path := self.paths.get(id(part))) is not None:
                    key += (path, Tensor)
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

    def _cold(self, function: Any, execute: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        if function in BEHIND:
            return self._behind.noticed(function, execute, args, kwargs)
        if not self.recording:
            return execute(*args, **kwargs)
        result = execute(*args, **kwargs)
        names: frozenset[str] = frozenset()
        for leaf in tensors_of((args, kwargs)):
            names |= self._origins.get(id(leaf), frozenset())
            if id(leaf) in self.inputs:
                names |= {self.inputs[id(leaf)]}
        for leaf in tensors_of(result):
            self._alive.append(leaf)
            self._origins[id(leaf)] = self._origins.get(id(leaf), frozenset()) | names
        return result

    # a run that is as expected

    def _expected(self, index: int, wanted: tuple[Any, ...]) -> bool:
        cuts = self.cuts
        if cuts is None:
            return False
        if index < len(cuts.sequence) and cuts.sequence[index] == wanted:
            return True
        for other in self._others:
            there = index < len(other.sequence) and other.sequence[index] == wanted
            if there and cuts.same_until(other, index, len(self.run.hot), len(self.run.constants)):
                self.cuts, self.run.effects = other, set(other.effects)
                return True
        return False

    def _followed(
        self,
        index: int,
        function: Any,
        execute: Callable[..., Any],
        args: Any,
        kwargs: Any,
        key: tuple[Any, ...],
        numbers: list[Any],
        ambient: Ambient,
    ) -> Any:
        cuts, run = self.cuts, self.run
        assert cuts is not None
        if function is Tensor.register_hook:
            return self._hooked(args, kwargs, key, numbers)
        if index in cuts.random:
            run.random[index] = RandomState(self.device)
        if index in cuts.normalised:
            batch = args[0] if args else kwargs["input"]
            weight = args[3] if len(args) > 3 else kwargs.get("weight")
            run.normalised.setdefault(cuts.normalised[index], []).append((batch.detach(), weight))
        result = execute(*args, **kwargs)
        one = type(result) is Tensor
        if not one and not makes_tensors(function, result):
            return result
        if type(result) in (tuple, list) and len(result) != len(cuts.records[index].results):  # as of unbind
            self._deviate(len(run.constants))
            done = lambda *_, **__: result  # noqa: E731
            return self._recorded(_Seen(index, function, done, args, kwargs, key, numbers, ambient))
        # the objects of the cuts: nothing new is left for Python's collector
        run.sequence.append(cuts.sequence[index])
        run.numbers.append(numbers or cuts.numbers[index])
        if one:
            return self._handed_on(result)
        if result is None:  # __setitem__
            self._handed_on(args[0])
            return None
        return map_leaves(lambda leaf: self._handed_on(leaf) if isinstance(leaf, Tensor) else leaf, result)

    def _handed_on(self, result: Tensor) -> Tensor:
        """The result, or where it is a node's value a leaf in its place."""
        assert self.cuts is not None
        cuts, run, number = self.cuts, self.run, len(self.run.hot)
        if number not in cuts.noted:
            self._numbers[id(result)] = number
            run.hot.append(result)
            return result
        known_before = id(result) in self._numbers
        self._number(result)
        if (export := cuts.exports.get(number)) is not None:
            run.exports[export] = result.detach().clone() if number in cuts.rewritten else result.detach()
        slot = cuts.slots.get(number)
        if slot is None:
            if (slot := cuts.kept.get(number)) is not None:
                run.predictions[slot], run.leaves[slot] = result, result.detach().requires_grad_()
            return result
        leaf = run.leaves[slot] = result.detach().requires_grad_()
        # torch takes a view's autograd graph anew once its base is written, and a leaf may not be written in place
        rewritten = number in cuts.rewritten
        run.predictions[slot] = result.clone() if rewritten and result._is_view() else result
        handed = leaf.clone() if rewritten else leaf
        self._numbers[id(handed)] = number
        self._alive.append(handed)
        run.hot[number] = handed
        if known_before:  # written in place: whoever has the tensor from before has to read the leaf as well
            self._substitutes[id(result)] = handed
        return handed

    def _writable(self, tensor: Any) -> Any:
        """A leaf may not be written in place, and no cut was known to be: the run has left the expected sequence."""
        if not any(tensor is leaf for leaf in self.run.leaves.values()):
            return tensor
        number = self._numbers[id(tensor)]
        written: Tensor = tensor.clone()
        self._numbers[id(written)] = number
        self._alive.append(written)
        self.run.hot[number] = self._substitutes[id(tensor)] = written
        return written

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

    def _hooked(self, args: Any, kwargs: Any, key: tuple[Any, ...], numbers: list[Any]) -> Any:
        """A hook on a gradient: an operation between the tensor and all who read it from now on."""
        tensor = args[0]
        hooked = tensor.view_as(tensor)
        handle = hooked.register_hook(*args[1:], **kwargs)
        self.run.sequence.append(key)
        self.run.numbers.append(numbers)
        handed = self._handed_on(hooked) if not self.recording else hooked
        if self.recording:
            self._number(hooked)
        self._substitutes[id(tensor)] = handed
        self._numbers[id(tensor)] = self._numbers[id(handed)]
        return handle

    # a run that is recorded

    def _deviate(self, constants: int) -> None:
        """Another sequence than expected: record from here on, with what was known so far.

        Args:
            constants: How many the expected sequence had until then.
        """
        self.recording, self.run.cuts = True, self.cuts
        self.run.as_recorded(constants)
        for tensor, _ in self._originals[constants:]:
            self._name(tensor)

    def _recorded(self, seen: _Seen) -> Any:
        index, function, execute, args, kwargs, key, numbers, ambient = seen
        if function in GRADIENTS:
            self.lost[self._innermost()] = "takes a gradient inside of forward"
        scopes, place = self._scopes()
        if function is Tensor.register_hook:
            described = self._described(args, kwargs)
            source = described[0][0]
            handle = self._hooked(args, kwargs, key, numbers)
            self._append(with_hook, described, len(self.run.hot) - 1, {len(self.run.hot) - 1: source}, (), False,
                         ambient, scopes, place)  # fmt: skip
            return handle
        if self._without_gradient:
            for leaf in tensors_of((args, kwargs)):
                self._check_known(leaf, self._innermost())
        if self.cuts is not None and args and writes_its_first(function):
            args = (self._writable(args[0]), *args[1:])
        described = self._described(args, kwargs)
        given = [leaf for leaf in tensors_of((kwargs.get("out"), args, kwargs)) if not leaf.is_inference()]
        versions = [tensor._version for tensor in given]
        state = RandomState(self.device)
        result = self._behind.noticed(function, execute, args, kwargs)
        if type(result) is not Tensor and not makes_tensors(function, result):
            if result is None:
                self.run.effects.add((index, key))
            elif result is not NotImplemented:
                self.passive.add(function)
            return result
        random = state.advanced() or draws_from_its_own(numbers)
        if random:
            self.run.random[index] = state
        changed = apart([t for t, version in zip(given, versions, strict=True) if t._version != version])
        wrote = tuple(dict.fromkeys(self._reference(tensor) for tensor in changed))
        if not wrote and named_in_place(function) and args and result is args[0]:
            wrote = (self._reference(result),)  # detach_ and its like change no content
        only_constants = bool(wrote) and all(isinstance(each, Constant) for each in wrote)
        plain = isinstance(result, Tensor) and not result.requires_grad
        if only_constants and plain and is_among(result, changed) and (self.start.grad or self._is_buffer(result)):
            self.run.effects.add((index, key))
            return result  # a buffer that takes a statistic: an effect, and data for whoever reads it
        sources: dict[int, Hot] = {}
        result_numbers = self._registered(result, args, kwargs, sources)
        if self.start.grad:
            update = self._without_gradient.difference_update if ambient.grad else self._without_gradient.update
            # a write leaves a tensor the history that it has
            update(id(leaf) for leaf in tensors_of((result, changed)) if ambient.grad or leaf.grad_fn is None)
        self.run.sequence.append(key)
        self.run.numbers.append(numbers)
        self._append(function, described, result_numbers, sources, wrote, random, ambient, scopes, place)
        return result

    def _is_buffer(self, tensor: Tensor) -> bool:
        """Whether it is a buffer of the module, or a part of one, and no new tensor that takes what parameters made."""
        return any(share_memory(tensor, buffer) for buffer in self.buffers())

    def _append(
        self,
        function: Any,
        described: tuple[Any, Any],
        results: Any,
        sources: Mapping[int, Hot],
        wrote: tuple[Hot | Constant, ...],
        random: bool,
        ambient: Ambient,
        scopes: tuple[tuple[str, str], ...],
        place: str,
    ) -> None:
        assert self.run.records is not None
        there = None if ambient == self.start else ambient
        self.run.records.append(Record(function, *described, results, sources, wrote, random, there, scopes, place))

    def _registered(self, result: Any, args: Any, kwargs: Any, sources: dict[int, Hot]) -> Any:
        """The result with a number in place of each tensor. What was written in place gets a new number."""
        if result is None:  # __setitem__
            return self._number_of(args[0], args, kwargs, sources)
        return map_leaves(
            lambda leaf: self._number_of(leaf, args, kwargs, sources) if isinstance(leaf, Tensor) else None, result
        )

    def _number_of(self, tensor: Tensor, args: Any, kwargs: Any, sources: dict[int, Hot]) -> int:
        source = next((r for t in tensors_of((args, kwargs)) if share_memory(t, tensor) and
                       isinstance(r := self._reference(t), Hot)), None)  # fmt: skip
        number = self._number(tensor)
        if source is not None:
            sources[number] = source
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

    def _innermost(self) -> str:
        """The submodule whose call is under way; by the stack, where the run was told of calls from the middle on."""
        if self._calls:
            return self._calls[-1]
        scopes, _ = self._scopes()
        return scopes[-1][1] if scopes else ""

    def _scopes(self) -> tuple[tuple[tuple[str, str], ...], str]:
        return self._stack.above(sys._getframe(1))

    # what cannot be followed

    def _transformed(self, execute: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Inside of a transform of torch.func tensors stand for others: what has called it is one operation."""
        scopes, _ = self._stack.above(outside_of_transforms(Watch.watching.__code__))
        self.lost[scopes[-1][1] if scopes else ""] = "takes a transform of torch.func or forward mode inside of forward"
        if not self.recording:
            self._deviate(len(self.run.constants))
            self.deviates()
        return execute(*args, **kwargs)

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

    # the run as a whole

    def watching(self, function: Callable[[], Any]) -> Run:
        """Run it."""
        with self:
            output = function()
        self._finish(output)
        del output  # a reference more than those that count
        if self.start.grad:
            self.run.kept = held_elsewhere(self.run, self._numbers, self.cuts)
            if self.run.matched and self.cuts is not None and not self.run.kept.keys() <= self.cuts.held:
                self.run.matched = self.run.followed = False
        return self.run

    def _finish(self, output: Any) -> None:
        run = self.run
        if self.recording:
            for leaf in tensors_of(output):
                self._check_known(leaf, "")
        # who wrote in place into a leaf, in a run that has left its cuts, holds the leaf
        left = self.recording and self.cuts is not None and self._substitutes
        run.output = output = map_leaves(self._current, output) if left else output
        run.returned = self._output_key(output)
        run.copied = frozenset(self._changed_constants())
        if not self.recording and self.cuts is not None:
            same = len(run.sequence) == len(self.cuts.sequence) and run.returned == self.cuts.output
            if not same or not run.copied <= self.cuts.copied:
                self._deviate(len(self.run.constants))
            run.matched, run.cuts = same and not self.recording, self.cuts
            run.followed = run.matched and self.cuts.complete
        run.originals = [(t, 0 if t.is_inference() else t._version) for t, _ in self._originals]
        self._originals.clear()
        self._stack.forget()
        self._alive.clear()
        self._behind = Behind()  # what it keeps would count as kept by somebody
        self._substitutes.clear()

    def _changed_constants(self) -> Iterator[int]:
        """Those that forward has changed since it read them; where it is recorded, by ways that nobody sees too."""
        moved = {
            each.place for record in self.run.records or () for each in moved_by(record)
        }  # and not read in training
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
