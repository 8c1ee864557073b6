"""Steps that do what nobody meant: on gradients that no algorithm has made, or past the EnergyOptimizer."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torch2ebm.common.users_code import users_level
from torch2ebm.errors import PlainBackwardWarning, WrappedStepWarning
from torch2ebm.wrapper.attaching import parameters_of


class StepsTold:
    """The steps of one EnergyOptimizer and of the optimizer inside; each mistake is told once."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper: weakref.ref[Any] = weakref.ref(wrapper)
        self._told_of_plain = self._told_of_wrapped = self._is_own = False
        self._answers: int | None = None  # of the backwards that the step before was made on
        self._used: tuple[weakref.ref[Tensor], int] | None = None  # a gradient of that step
        self._handle: Any = None
        # those of torch but L-BFGS evaluate the closure first; of others it is seen in their first step
        self.may_move_before_closure = not type(wrapper.optimizer).__module__.startswith("torch.optim")
        self._has_moved_before: bool | None = None  # None until a closure was called

    def watch(self, optimizer: Optimizer) -> None:
        """Look at the wrapped optimizer's own steps."""
        held = weakref.ref(self)

        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            steps = held()
            if steps is not None:
                steps._made_by_wrapped()

        if hasattr(optimizer, "_optimizer_step_post_hooks"):  # not in what never ran Optimizer.__init__
            self._handle = optimizer.register_step_post_hook(stepped)

    def end(self) -> None:
        """Look no more."""
        if self._handle is not None:
            self._handle.remove()

    def closure_called(self, moved: bool) -> None:
        """Note whether the weights have moved in this step already, as in sharpness-aware minimisation."""
        self._has_moved_before = bool(self._has_moved_before) or moved

    @contextmanager
    def own(self) -> Iterator[None]:
        """Inside, steps of the wrapped optimizer are the EnergyOptimizer's."""
        before, self._is_own = self._is_own, True
        try:
            yield
        finally:
            self._is_own = before

    def made(self) -> None:
        """The EnergyOptimizer has made a step."""
        wrapper = self._wrapper()
        if wrapper is None:
            return
        forwards, gradient = wrapper.model.torch2ebm.forwards, _a_gradient(wrapper)
        suspected = not self._told_of_plain and not self._is_answered(wrapper) and self._is_new(gradient)
        if suspected and any(p.grad is not None and bool(p.grad.any()) for p in wrapper.model.parameters()):
            self._told_of_plain = True
            warnings.warn(_plain_backward(wrapper.algorithm), stacklevel=users_level())
        if self._has_moved_before is not None:
            self.may_move_before_closure &= self._has_moved_before
        self._answers = forwards.answers
        self._used = None if gradient is None else (weakref.ref(gradient), gradient._version)

    def _is_answered(self, wrapper: Any) -> bool:
        """Whether a backward of the model came since the step before, or none has to."""
        return not _is_attached(wrapper) or wrapper.model.torch2ebm.forwards.answers != (self._answers or 0)

    def _is_new(self, gradient: Tensor | None) -> bool:
        """Whether it is another one than in the step before: two steps may be made on one backward."""
        if gradient is None:
            return False
        return self._used is None or self._used[0]() is not gradient or self._used[1] != gradient._version

    def _made_by_wrapped(self) -> None:
        wrapper = self._wrapper()
        if self._is_own or wrapper is None or not _is_attached(wrapper):
            return
        wrapper.model.torch2ebm.forwards.stepped()
        if not self._told_of_wrapped:
            self._told_of_wrapped = True
            warnings.warn(_wrapped_step(wrapper), stacklevel=users_level())


def _is_attached(wrapper: Any) -> bool:
    return any(holder is wrapper for holder in wrapper.model.torch2ebm.holders)


def _a_gradient(wrapper: Any) -> Tensor | None:
    return next((p.grad for p in parameters_of(wrapper) if p.grad is not None), None)


def _plain_backward(algorithm: object) -> PlainBackwardWarning:
    return PlainBackwardWarning(
        f"optimizer.step(): the gradients are not {type(algorithm).__name__}'s, since no backward came through the "
        "converted model since the last step. Call model(x), the converted model that this optimizer was given, in "
        "your loop, and not the module that you converted (net(x)), a part of it, or what another torch2ebm.convert of "
        "it has returned."
    )


def _wrapped_step(wrapper: Any) -> WrappedStepWarning:
    return WrappedStepWarning(
        f"{type(wrapper.optimizer).__name__}.step(): got a step of the optimizer inside of an EnergyOptimizer; "
        f"expected one of the EnergyOptimizer, which makes the further steps of {type(wrapper.algorithm).__name__}, if "
        "it has any, checks the gradients and reports to the monitor. Call step() on what EnergyOptimizer(...) has "
        "returned, or detach() that first."
    )
