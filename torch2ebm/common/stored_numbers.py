"""Numbers in files that anybody may have written: headers before bodies, and never more than a header announces."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import torch
from torch import Tensor

from torch2ebm.errors import ConfigurationError, Torch2EBMError, first_line

COMPLETE: Final = "Download it again; a file is complete when its size is what its header says."
CHUNK: Final = 1 << 20  # bytes that are held at a time while a file is checked
MOST_DIMENSIONS: Final = 64  # torch's own limit for an elementwise operation
NUMBERS: Final = "biuf"  # numpy's kinds: bool, int, unsigned int, float


@dataclass(frozen=True)
class StoredNumbers:
    """An array in a file, of which the header has been read and nothing else.

    Attributes:
        where: Who asked, for errors.
        dtype: Of the numbers, with their byte order.
        sizes: Of the array.
        opened: Opens the file where the numbers begin.
        column_major: Whether the first index is the fastest.
    """

    where: str
    dtype: np.dtype[Any]
    sizes: tuple[int, ...]
    opened: Callable[[], AbstractContextManager[IO[bytes]]]
    column_major: bool = False

    @property
    def length(self) -> int:
        """Bytes that the header announces."""
        return math.prod(self.sizes) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The numbers, in memory of their own, in this machine's byte order.

        The file is gone through once before memory is taken, so a damaged one costs none.

        Raises:
            ConfigurationError: where more or fewer bytes are there than announced, or no memory for them.
        """
        self._check_kind()
        with damaged(self.where, "numbers"):
            self._check_length()
            flat = self._filled()
            native = flat if flat.dtype.isnative else flat.byteswap(inplace=True).view(flat.dtype.newbyteorder("="))
            sizes = self.sizes[::-1] if self.column_major else self.sizes
            tensor = torch.from_numpy(native).reshape(sizes)
            return tensor.permute(*reversed(range(len(sizes)))).contiguous() if self.column_major else tensor

    def _check_kind(self) -> None:
        if self.dtype.kind not in NUMBERS or self.dtype.itemsize > 8:
            objects = ", which would run code of the file's (numpy's allow_pickle)" if self.dtype.hasobject else ""
            raise ConfigurationError(
                self.where,
                f"an array of {self.dtype}{objects}",
                "numbers: bool, integers or floating point of at most 8 bytes",
                "Save the array again as numbers, for example array.astype('uint8').",
            )
        if len(self.sizes) > MOST_DIMENSIONS:
            raise ConfigurationError(
                self.where, f"{len(self.sizes)} dimensions", f"at most {MOST_DIMENSIONS}", "Look at what the file is."
            )

    def _check_length(self) -> None:
        left = self.length
        with self.opened() as stream:
            while left and (chunk := stream.read(min(left, CHUNK))):
                left -= len(chunk)
            if left:
                raise self._length_error(f"{self.length - left} bytes of numbers")
            if stream.read(1):  # this also makes an archive check its sums
                raise self._length_error(f"more than {self.length} bytes of numbers")

    def _length_error(self, got: str) -> ConfigurationError:
        return ConfigurationError(
            self.where, got, f"{self.length}, for {self.sizes} of {self.dtype.newbyteorder('=').name}", COMPLETE
        )

    def _filled(self) -> np.ndarray[Any, np.dtype[Any]]:
        flat = np.empty(math.prod(self.sizes), self.dtype)
        if not flat.size:
            return flat
        view, done = flat.view(np.uint8).data, 0
        with self.opened() as stream:
            while done < len(view) and (chunk := stream.read(min(CHUNK, len(view) - done))):
                view[done : done + len(chunk)] = chunk
                done += len(chunk)
        if done < len(view):  # it was longer a moment ago
            raise self._length_error(f"{done} bytes of numbers")
        return flat


def path_of(path: object, where: str) -> Path:
    """The path. Raises :class:`ConfigurationError` for what is no path."""
    try:
        found = Path(os.fsdecode(path))  # type: ignore[arg-type]  # checked here
        os.fspath(found).encode("utf-8", "surrogateescape").index(b"\0")
    except TypeError as error:
        raise ConfigurationError(where, f"a {type(path).__name__}", "the path of a file", "Pass its name.") from error
    except ValueError:  # no null character, as it should be
        return found
    raise ConfigurationError(where, "a path that holds a null character", "the path of a file", "Look at the path.")


@contextmanager
def opened_file(path: Path, where: str) -> Iterator[IO[bytes]]:
    """The file, open for reading. Raises :class:`ConfigurationError` for what is no file: a pipe would never end."""
    try:
        # asked before it is opened, since opening a pipe waits for a writer
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigurationError(where, "no regular file", "a file that can be read", "Look at the path.")
        stream = path.open("rb")
    except OSError as error:
        raise ConfigurationError(where, str(error), "a file that can be read", "Look at the path.") from error
    with stream:
        yield stream


@contextmanager
def damaged(where: str, what: str) -> Iterator[None]:
    """Turn what reading raises into a :class:`ConfigurationError`: decoders raise anything on a damaged file."""
    try:
        yield
    except Torch2EBMError:
        raise
    except MemoryError as error:
        raise ConfigurationError(where, f"no memory for its {what}", "a file that memory holds", COMPLETE) from error
    except Exception as error:
        raise ConfigurationError(where, f"damaged {what}: {first_line(error)}", "a complete file", COMPLETE) from error
