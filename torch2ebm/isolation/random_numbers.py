"""Random numbers that a node drew, drawn again at later evaluations: one dropout mask for the whole inference.

There are two ways. :class:`RandomState` winds the generator back, which serves every operation.
:class:`Draws` and :class:`Repeated` keep the drawn tensors and hand them out again. Recorded programs need the second
way, because a program cannot wind a generator back; it takes the draws as inputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from torch2ebm.isolation.interrupts import Change

_aten = torch.ops.aten
# Operations whose result is drawn as a whole. Those in _LIKE take shape, dtype and device from their argument.
# bernoulli takes its probabilities from it: the first draw stands, whatever these are later.
_FILLS_IN_PLACE = frozenset(["bernoulli_", "uniform_", "normal_", "exponential_", "random_"])
_LIKE = frozenset(["rand_like", "randn_like", "randint_like", "bernoulli"])


class UnknownDrawError(Exception):
    """An operation draws random numbers in a way that cannot be repeated from tensors."""


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Appends what is drawn inside to ``kept``, a tensor for each draw."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_draw(func, args, kwargs or {}):
            # native_dropout, a fused kernel of accelerators, returns (input * mask / (1 - p), mask)
            drawn = result[1] if func is _aten.native_dropout.default else result
            if isinstance(drawn, Tensor):
                # A clone, as what was filled is written again: dropout on a CPU is empty_like(x).bernoulli_().div_().
                self.kept.append(drawn.detach().clone() if _name(func) in _FILLS_IN_PLACE else drawn.detach())
        return result


class Repeated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands out the draws of before, in order. Raises :class:`UnknownDrawError`."""

    def __init__(self, kept: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: Iterator[Tensor] = iter(kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not is_draw(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        drawn = next(self._kept, None)
        if drawn is None:
            raise UnknownDrawError(f"{func} draws what it did not draw in the feed-forward pass")
        if _name(func) in _FILLS_IN_PLACE:
            return args[0].copy_(drawn)
        if func is _aten.native_dropout.default:
            value, probability = args[0], args[1]
            return value * drawn * (1 / (1 - probability)), drawn
        # rrelu, normal(mean, std) and others return their input mixed with a draw: the result is not what was drawn
        if any(isinstance(argument, Tensor) for argument in args[:1]) and _name(func) not in _LIKE:
            raise UnknownDrawError(f"{func} mixes its input with what it draws")
        return drawn


def _name(function: Any) -> str:
    return str(function.overloadpacket.__name__)


def is_draw(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the call draws random numbers. An operation that could, but has a dropout of zero, does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(function, "tags", ()):
        return False
    # the tag says "may draw": fused attention has it with every dropout_p, 0 included
    for position, argument in enumerate(function._schema.arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(given)
    return True


class RandomState:
    """The state of the generators that a node draws from: the CPU's, and that of the CUDA device it runs on."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        self.states = self._read()

    def _read(self) -> tuple[Tensor, ...]:
        cpu = torch.get_rng_state()
        return (cpu, torch.cuda.get_rng_state(self.cuda)) if self.cuda else (cpu,)

    def restore(self) -> None:
        torch.set_rng_state(self.states[0])
        if self.cuda:
            torch.cuda.set_rng_state(self.states[1], self.cuda)

    def advanced(self) -> bool:
        """Whether anything was drawn since this state was taken."""
        return not all(torch.equal(now, then) for now, then in zip(self._read(), self.states, strict=True))

    def replayed(self) -> Change:
        """Draw the same numbers again, and leave the generators as they are now."""
        now = RandomState(self.cuda or torch.device("cpu"))
        return Change(self.restore, now.restore)


def drawn_from(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation with the generators wound back to its first argument; where kept draws are handed out, not."""

    def drawn(state: RandomState | None, *args: Any, **kwargs: Any) -> Any:
        if state is not None and not any(isinstance(mode, Repeated) for mode in _get_current_dispatch_mode_stack()):
            state.restore()
        return operation(*args, **kwargs)

    drawn.__name__ = drawn.__qualname__ = getattr(operation, "__name__", "drawn")  # as torch.fx writes it
    return drawn


class Generators:
    """The states of all global generators: torch's, Python's and NumPy's."""

    def __init__(self, device: torch.device) -> None:
        self.torch, self.python, self.numpy = RandomState(device), random.getstate(), np.random.get_state()

    def moved_beside_torch(self) -> bool:
        """Whether Python's or NumPy's has drawn since."""
        kind, keys, *rest = np.random.get_state()
        before_kind, before_keys, *before = self.numpy
        return (
            random.getstate() != self.python
            or (kind, rest) != (before_kind, before)
            or not np.array_equal(keys, before_keys)
        )

    def restore(self) -> None:
        self.torch.restore()
        random.setstate(self.python)
        np.random.set_state(self.numpy)
