"""numpy's npz: a zip archive of arrays, each with a header before its numbers."""

from __future__ import annotations

import ast
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from torch2ebm.common.stored_numbers import StoredNumbers, damaged, opened_file
from torch2ebm.errors import ConfigurationError

MAGIC: Final = b"\x93NUMPY"
LONGEST_HEADER: Final = 10_000  # numpy's own bound: an array of numbers needs about a hundred bytes
METHODS: Final = (
    zipfile.ZIP_STORED,
    zipfile.ZIP_DEFLATED,
)  # numpy's two; others unpack with as much memory as they say
LENGTHS: Final = {1: "<H", 2: "<I", 3: "<I"}  # of the header, by the version of the format


def npz_names(path: Path, where: str) -> list[str]:
    """The names of the arrays in an archive."""
    with damaged(where, "npz archive"), opened_file(path, where) as stream, zipfile.ZipFile(stream) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def npz_file(path: Path, names: Sequence[str], where: str) -> dict[str, StoredNumbers]:
    """What an archive holds under these names, by the headers alone.

    Raises:
        ConfigurationError: for a file that is no archive, and for a header that announces no array.
    """
    return {name: _stored(path, f"{name}.npy", f"{where}, array '{name}'") for name in names}


def _stored(path: Path, member: str, where: str) -> StoredNumbers:
    with _opened(path, member, where) as stream:
        dtype, sizes, column_major = _header(stream, where)

    @contextmanager
    def numbers() -> Iterator[IO[bytes]]:
        with _opened(path, member, where) as stream:
            _header(stream, where)
            yield stream

    return StoredNumbers(where, dtype, sizes, numbers, column_major)


@contextmanager
def _opened(path: Path, member: str, where: str) -> Iterator[IO[bytes]]:
    # the stream is ours to close: a damaged archive would be left open
    with damaged(where, "npz archive"), opened_file(path, where) as stream, zipfile.ZipFile(stream) as archive:
        names = set(archive.namelist())
        found = archive.getinfo(member if member in names else member.removesuffix(".npy"))
        if found.compress_type not in METHODS:
            raise ConfigurationError(
                where,
                f"packing method {found.compress_type}",
                f"{' or '.join(map(str, METHODS))}: stored or deflated, as numpy writes it",
                "Save the arrays with numpy.savez_compressed.",
            )
        with archive.open(found) as numbers:
            yield numbers


def _header(stream: IO[bytes], where: str) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    start = stream.read(len(MAGIC) + 2)
    version = start[-2] if start[:-2] == MAGIC else None
    if version not in LENGTHS:
        raise ConfigurationError(
            where,
            f"an array that begins with {start.hex(' ') or 'nothing'}",
            f"numpy's {MAGIC.hex(' ')} and a version of 1, 2 or 3",
            "Save the arrays with numpy.savez.",
        )
    size = LENGTHS[version]
    (length,) = struct.unpack(size, stream.read(struct.calcsize(size)))
    if length > LONGEST_HEADER:
        raise ConfigurationError(
            where, f"a header of {length} bytes", f"at most {LONGEST_HEADER}", "Save the array again as numbers."
        )
    text = stream.read(length).decode("utf-8" if version == 3 else "latin-1")
    return _announced(text, where)


def _announced(text: str, where: str) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """The header is a dictionary of literals: it is read as such, and nothing in it is run."""
    try:
        header = ast.literal_eval(re.sub(r"(\d)L\b", r"\1", text.strip()))  # Python 2 wrote long numbers as 3L
        descr, order, shape = header["descr"], header["fortran_order"], header["shape"]
        legal = isinstance(descr, str) and isinstance(order, bool) and isinstance(shape, tuple)
        if legal and all(type(size) is int and 0 <= size < 2**63 for size in shape):
            return np.dtype(descr), shape, order
        said = text.strip()
    except Exception as error:  # a parser raises what a damaged text makes it
        said = f"{text.strip()[:80]} ({type(error).__name__})"
    raise ConfigurationError(
        where,
        f"the header {said[:200]}",
        "a dictionary of descr, fortran_order and shape, the sizes whole numbers, 0 or more",
        "Save the arrays with numpy.savez.",
    )
