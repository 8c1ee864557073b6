"""The IDX format: two zero bytes, a code of the dtype, the number of dimensions, the sizes, then the numbers."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Final

import numpy as np

from torch2ebm.common.stored_numbers import COMPLETE, StoredNumbers, damaged, opened_file
from torch2ebm.errors import ConfigurationError

# The third byte of a file says what its numbers are. All are big-endian.
DTYPES: Mapping[int, str] = MappingProxyType(
    {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
)
GZIP: Final = b"\x1f\x8b"


def idx_file(path: Path, where: str) -> StoredNumbers:
    """What an IDX file holds, gzipped or not, by its header alone.

    Raises:
        ConfigurationError: for a file that is missing, no IDX file, of an unknown dtype, or of another length than
            its header announces, where the length can be seen without reading.
    """
    with damaged(where, "gzip data"), _content(path, where) as stream:
        dtype, sizes = _header(stream, where)
    start = 4 + 4 * len(sizes)

    @contextmanager
    def numbers() -> Iterator[IO[bytes]]:
        with damaged(where, "gzip data"), _content(path, where) as stream:
            stream.read(start)
            yield stream

    stored = StoredNumbers(where, dtype, sizes, numbers)
    _check_size(path, where, start, stored)
    return stored


@contextmanager
def _content(path: Path, where: str) -> Iterator[IO[bytes]]:
    """The file, unpacked as it is read."""
    with opened_file(path, where) as stream:
        packed = stream.read(len(GZIP)) == GZIP
        stream.seek(0)
        if not packed:
            yield stream
            return
        with gzip.GzipFile(fileobj=stream) as unpacked:
            yield unpacked  # type: ignore[misc]  # it has all that is used of IO


def _header(stream: IO[bytes], where: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The dtype of the numbers and their sizes."""
    start = stream.read(4)
    if len(start) < 4 or start[:2] != b"\0\0":
        raise ConfigurationError(
            where,
            f"a file that begins with {start.hex(' ') or 'nothing'}",
            "an IDX file, which begins with two zero bytes, a dtype code and the number of dimensions",
            "Look at what the file is: a page that a download was answered with, or another archive, perhaps.",
        )
    code, dimensions = start[2], start[3]
    if code not in DTYPES:
        known = ", ".join(f"{known:#04x} {np.dtype(dtype).name}" for known, dtype in DTYPES.items())
        raise ConfigurationError(where, f"dtype code {code:#04x}", f"one of {known}", "Look at what the file is.")
    sizes = stream.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise ConfigurationError(
            where, f"{4 + len(sizes)} bytes", f"a header of {4 + 4 * dimensions} for {dimensions} dimensions", COMPLETE
        )
    return np.dtype(DTYPES[code]), struct.unpack(f">{dimensions}I", sizes)


def _check_size(path: Path, where: str, start: int, stored: StoredNumbers) -> None:
    """Of a file that is not packed, the length is known before anything is read."""
    with opened_file(path, where) as stream:
        if stream.read(len(GZIP)) == GZIP:
            return
        there = os.fstat(stream.fileno()).st_size - start
    if there != stored.length:
        expected = f"{stored.length}, for {stored.sizes} of {stored.dtype.name}"
        raise ConfigurationError(where, f"{there} bytes of numbers", expected, COMPLETE)
