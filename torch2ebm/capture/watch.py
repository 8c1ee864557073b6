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

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from torch2ebm.capture.behind import BEHIND, Behind
from torch2ebm.capture.custom_functions import inside_custom_function, untold
from torch2ebm.capture.functions import (
    PASSIVE,
    VALUES,
    hung_on_autograd,
    makes_tensors,
    runs_elsewhere,
    tensors_of,
)
from torch2ebm.capture.held import held_elsewhere
from torch2ebm.capture.identities import Settings
from torch2ebm.capture.recorder import Recorder, Seen
from torch2ebm.capture.run import Cuts, ModuleCall, Run
from torch2ebm.capture.scopes import outside_of_transforms, transforming
from torch2ebm.common.nested import map_leaves
from torch2ebm.isolation.module_state import is_lazy
from torch2ebm.isolation.opaque_state import OpaqueState
from torch2ebm.isolation.random_numbers import RandomState
from torch2ebm.isolation.torch_modes import Ambient


class Watch(Recorder, TorchFunctionMode):
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
        Recorder.__init__(self, paths, device, modules, inputs, Watch.watching.__code__, cuts, passive, tuples)
        TorchFunctionMode.__init__(self)
        self.lazy, self._others = lazy, others
        self.opaque = dict(opaque or {})
        self.suspended = False
        self._type = device.type
        self.custom = False  # whether a custom autograd function was applied
        self.changing: Callable[[str], Sequence[str]] = lambda path: ()  # the buffers that a submodule changes
        self.blind = False  # whether one was before anybody was told
        self.deviates: Callable[[], Any] = bool  # called where a run turns out to be another than expected

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
        return self._recorded(Seen(index, function, execute, args, kwargs, key, numbers, ambient))

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
            return self._recorded(Seen(index, function, done, args, kwargs, key, numbers, ambient))
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

    # what cannot be followed

    def _transformed(self, execute: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Inside of a transform of torch.func tensors stand for others: what has called it is one operation."""
        scopes, _ = self._stack.above(outside_of_transforms(Watch.watching.__code__))
        self.lost[scopes[-1][1] if scopes else ""] = "takes a transform of torch.func or forward mode inside of forward"
        if not self.recording:
            self._deviate(len(self.run.constants))
            self.deviates()
        return execute(*args, **kwargs)

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
