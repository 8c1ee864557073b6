"""What a module that is run as a whole reads beside its arguments, put back for each further evaluation.

A node whose inside cannot be followed is the module itself, called again. What its code has counted, appended or drawn
by Python since the module's own run would make it another function.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from torch2ebm.isolation.interrupts import Change, within
from torch2ebm.isolation.module_state import AttributeSnapshot, identical, is_lazy


class OpaqueState:
    """Attributes, buffers and the generators of Python and NumPy, as a call of the module finds them.

    Attributes:
        moves: Whether the call has changed any of it, so that no program can stand for the next.
    """

    def __init__(self, module: nn.Module, changing: Collection[str] | None) -> None:
        """``changing`` are the names of the buffers that calls may change, in ``module``; None is all of them."""
        self.module, self._attributes = module, AttributeSnapshot(module.modules())
        self._copies = [(part, name, buffer.detach().clone()) for part, name, buffer in _buffers_of(module, changing)]
        self._python, self._numpy = random.getstate(), np.random.get_state()
        self.moves = False

    def called(self) -> None:
        """The call is over: forget the buffers that it has left as they were."""
        self._copies = [
            (part, name, copy)
            for part, name, copy in self._copies
            if (buffer := part._buffers.get(name)) is None or not identical(buffer, copy)
        ]
        drawn = random.getstate() != self._python or not _same_state(np.random.get_state(), self._numpy)
        self.moves = drawn or bool(self._copies or self._attributes.changed())

    def again(self, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Call the module as it was then, and leave it as it is now."""
        now = OpaqueState(self.module, ())
        return within([Change(self._restore, now._restore)], lambda: function(*args, **kwargs))

    def _restore(self) -> None:
        self._attributes.restore()
        for part, name, copy in self._copies:
            # another tensor each time: autograd graphs have saved the one before
            part._buffers[name] = copy.clone()
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def _buffers_of(module: nn.Module, names: Collection[str] | None) -> Iterator[tuple[nn.Module, str, Tensor]]:
    if names is not None and not names:
        return
    for path, part in module.named_modules():
        # a scripted module keeps its own where Python cannot put others
        for name, buffer in part._buffers.items() if isinstance(part._buffers, dict) else ():
            known = names is None or (f"{path}.{name}" if path else name) in names
            if known and buffer is not None and not buffer.is_meta and not is_lazy(buffer):
                yield part, name, buffer


def _same_state(ours: Any, theirs: Any) -> bool:
    return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in zip(ours, theirs, strict=True))
