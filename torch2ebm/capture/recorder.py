"""A run that is recorded: each hot operation as it ran, with what stands for its arguments and results."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch2ebm.capture.functions import (
    GRADIENTS,
    apart,
    draws_from_its_own,
    is_among,
    makes_tensors,
    named_in_place,
    share_memory,
    tensors_of,
    with_hook,
    writes_its_first,
)
from torch2ebm.capture.identities import Identities, Settings
from torch2ebm.capture.run import Constant, Cuts, Hot, Record
from torch2ebm.capture.scopes import Scopes
from torch2ebm.common.nested import map_leaves
from torch2ebm.isolation.random_numbers import RandomState
from torch2ebm.isolation.torch_modes import Ambient


class Seen(NamedTuple):
    """One operation that is about to run."""

    position: int  # how many were before
    function: Any
    execute: Callable[..., Any]  # runs it
    args: Any
    kwargs: Any
    key: tuple[Any, ...]
    numbers: list[Any]
    ambient: Ambient


class Recorder(Identities):
    """Records operations, from the start or from where a run has left the sequence that was expected.

    Args:
        paths: id of each parameter to its path.
        device: Type of the device that autocast is looked at for.
        modules: id of each submodule to its path.
        inputs: From the id of each tensor among the arguments to its name.
        outermost: The code of the function that runs the module.
        cuts: Those of the graph that the run is expected to have.
        passive: Functions that are known to return no tensor; more are added as they are met.
        tuples: As in :class:`Identities`.
    """

    def __init__(
        self,
        paths: Mapping[int, str],
        device: torch.device,
        modules: Mapping[int, str],
        inputs: Callable[[], Mapping[int, str]],
        outermost: CodeType,
        cuts: Cuts | None = None,
        passive: set[Any] | None = None,
        tuples: dict[int, Settings] | None = None,
    ) -> None:
        Identities.__init__(self, paths, Ambient.now(device.type), inputs, cuts, tuples)
        self.device, self.modules = device, modules
        self.passive = set() if passive is None else passive
        self.buffers: Callable[[], Iterable[Tensor]] = tuple  # the module's own
        self._stack = Scopes(modules, outermost)
        self._calls: list[str] = []

    @abstractmethod
    def _handed_on(self, result: Tensor) -> Tensor:
        """The result of an operation as a run that is followed goes on with it."""

    def _deviate(self, constants: int) -> None:
        """Another sequence than expected: record from here on, with what was known so far.

        Args:
            constants: How many the expected sequence had until then.
        """
        self.recording, self.run.cuts = True, self.cuts
        self.run.as_recorded(constants)
        for tensor, _ in self._originals[constants:]:
            self._name(tensor)

    def _recorded(self, seen: Seen) -> Any:
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

    def _innermost(self) -> str:
        """The submodule whose call is under way; by the stack, where the run was told of calls from the middle on."""
        if self._calls:
            return self._calls[-1]
        scopes, _ = self._scopes()
        return scopes[-1][1] if scopes else ""

    def _scopes(self) -> tuple[tuple[tuple[str, str], ...], str]:
        return self._stack.above(sys._getframe(1))
