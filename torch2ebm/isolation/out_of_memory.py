"""The error for memory that has run out, with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torch2ebm.errors import OutOfMemoryError

# What a plain RuntimeError says: torch's CPU allocator, which has no class for it ("can't allocate memory"; "not enough
# memory" on Windows), and CUDA calls beside torch's own allocator ("CUDA error: out of memory").
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def means_no_memory(error: Exception) -> bool:
    """Whether an error of torch or Python says that memory has run out."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY))


@contextmanager
def exhausted_memory_named(where: str, algorithm: object) -> Iterator[None]:
    """Turn an error of torch or Python that means "no memory" into one that says what to do."""
    try:
        yield
    except OutOfMemoryError:  # named already, by a section inside of this one; it is a RuntimeError, too
        raise
    except (RuntimeError, MemoryError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if not means_no_memory(error):
            raise
        raise OutOfMemoryError(
            f"{where}, {algorithm!r}",
            first.removesuffix("."),
            "memory for the values, predictions and errors of every node",
            "Take a smaller batch (with gradients accumulated, the result is the same), fewer inference steps, or "
            "coarser nodes (nodes='children'); nothing was changed.",
        ) from error
