"""Writes through ``.data``, which change a tensor and not its version.

``b.data`` is another tensor on the memory of ``b``, with a version of its own. A watched run keeps it, and counts the
writes to it as writes to ``b``::

    y = h * self.b              # constant 0
    self.b.data.mul_(0.9)       # the version of b stays, that of its alias rises
    return y + self.b           # constant 1
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

_ALIAS, _REPLACE = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]
BEHIND = frozenset([_ALIAS, _REPLACE])
_REPLACED = 1 << 32  # more than the writes to any memory


class Behind:
    """The aliases of one run."""

    def __init__(self) -> None:
        self._aliases: defaultdict[int, list[Tensor]] = defaultdict(list)  # by memory
        self._replaced: Counter[int] = Counter()  # by id: how often a tensor got another memory

    def noticed(self, function: Any, execute: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run an operation; note an alias that it makes, or the memory that it replaces."""
        result = execute(*args, **kwargs)
        if function == _ALIAS and (memory := _memory(result)) is not None:
            self._aliases[memory].append(result)
        elif function == _REPLACE:
            self._replaced[id(args[0])] += 1
        return result

    def version(self, tensor: Tensor) -> int:
        """Rises with each write to the tensor, whichever way it takes."""
        version = 0 if tensor.is_inference() else tensor._version
        if self._replaced:
            version += _REPLACED * self._replaced[id(tensor)]
        if self._aliases and (memory := _memory(tensor)) is not None:
            version += sum(alias._version for alias in self._aliases.get(memory, ()) if alias is not tensor)
        return version


def replaced_parameters(effects: Iterable[tuple[int, Any]]) -> Iterator[str]:
    """Paths of the parameters whose memory forward has replaced: ``self.weight.data = ...``."""
    return (key[1] for _, key in effects if key[0] == _REPLACE and isinstance(key[1], str))


def _memory(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse tensors have none
        return None
