"""MNIST and its relatives from the files that people have: IDX, gzipped or not, or one npz."""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch2ebm.errors import ConfigurationError

# The third byte of a file says what its numbers are. All are big-endian.
DTYPES: Mapping[int, str] = MappingProxyType(
    {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
)
GZIP = b"\x1f\x8b"
# The name of each part without its ending. MNIST's own site had the hyphen, many copies have a point.
FILES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "train_images": ("train-images-idx3-ubyte", "train-images.idx3-ubyte"),
        "train_labels": ("train-labels-idx1-ubyte", "train-labels.idx1-ubyte"),
        "test_images": ("t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte"),
        "test_labels": ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"),
    }
)
COMPLETE = "Download it again; a file is complete when its size is what its header says."


@dataclass(frozen=True, eq=False)
class Mnist:
    """Images and labels as they are stored; ``images.unsqueeze(1) / 255`` is what a convolution takes.

    Attributes:
        train_images: ``[train, height, width]``, uint8 from 0 (paper) to 255 (ink).
        train_labels: ``[train]``, int64, the class of each image.
        test_images: ``[test, height, width]``, as ``train_images``.
        test_labels: ``[test]``, as ``train_labels``.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def read_idx(path: str | PathLike[str]) -> Tensor:
    """One IDX file, gzipped or not, as a tensor of the shape and the dtype that its header names.

    The format (LeCun, Cortes and Burges, *The MNIST database*): two zero bytes, a code of the dtype, the number of
    dimensions, the sizes as 32-bit integers, then the numbers, row by row; everything big-endian. Codes are 8 uint8,
    9 int8, 11 int16, 12 int32, 13 float32 and 14 float64. Whether a file is gzipped is seen in its first bytes.

    Raises:
        ConfigurationError: for a file that is missing, no IDX file, of an unknown dtype, or not of the length that
            its header announces.

    Example:
        >>> import tempfile, pathlib, torch2ebm
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "labels-idx1-ubyte")
        ...     _ = file.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3]) + bytes([5, 0, 4]))
        ...     torch2ebm.read_idx(file)
        tensor([5, 0, 4], dtype=torch.uint8)
    """
    file = Path(path)
    where = f"read_idx('{file}')"
    content = _content(file, where)
    dtype, sizes = _header(content, where)
    start = 4 + 4 * len(sizes)
    announced = math.prod(sizes) * dtype.itemsize
    if len(content) - start != announced:
        raise ConfigurationError(
            where, f"{len(content) - start} bytes of numbers", f"{announced}, for {sizes} of {dtype.name}", COMPLETE
        )
    numbers = np.frombuffer(content, dtype, offset=start).reshape(sizes)
    return torch.from_numpy(numbers.astype(dtype.newbyteorder("=")))  # a copy: torch is native-endian, and may write


def load_mnist(path: str | PathLike[str]) -> Mnist:
    """MNIST, or a data set in its format (Fashion-MNIST, KMNIST, ...), from a folder of its four files or from an npz.

    Args:
        path: A folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
            ``t10k-labels-idx1-ubyte``, each with or without ``.gz``; or an npz file with the arrays
            ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``.

    Raises:
        ConfigurationError: for a file or an array that is missing or unreadable, and for images and labels that do
            not belong together.

    Example:
        >>> import tempfile, pathlib, numpy, torch2ebm
        >>> images, labels = numpy.zeros((3, 28, 28), "uint8"), numpy.array([5, 0, 4], "uint8")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "mnist.npz")
        ...     numpy.savez(file, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
        ...     mnist = torch2ebm.load_mnist(file)
        >>> mnist.train_images.shape, mnist.test_labels
        (torch.Size([3, 28, 28]), tensor([5, 0, 4]))
    """
    place = Path(path)
    where = f"load_mnist('{place}')"
    if not place.exists():
        raise ConfigurationError(where, "nothing there", "a folder of IDX files, or an npz file", "Look at the path.")
    parts = _from_folder(place, where) if place.is_dir() else _from_npz(place, where)
    for split in ("train", "test"):
        _check_split(where, split, parts[f"{split}_images"], parts[f"{split}_labels"])
    return Mnist(**{name: part.long() if name.endswith("labels") else part for name, part in parts.items()})


def _content(file: Path, where: str) -> bytes:
    """The bytes of the file, unpacked."""
    try:
        stored = file.read_bytes()
    except OSError as error:
        raise ConfigurationError(where, str(error), "a file that can be read", "Look at the path.") from error
    try:
        return gzip.decompress(stored) if stored.startswith(GZIP) else stored
    except (EOFError, OSError, zlib.error) as error:
        raise ConfigurationError(where, f"damaged gzip data: {error}", "a complete file", COMPLETE) from error


def _header(content: bytes, where: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The dtype of the numbers and their sizes."""
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ConfigurationError(
            where,
            f"a file that begins with {content[:4].hex(' ') or 'nothing'}",
            "an IDX file, which begins with two zero bytes, a dtype code and the number of dimensions",
            "Look at what the file is: a page that a download was answered with, or another archive, perhaps.",
        )
    code, dimensions = content[2], content[3]
    if code not in DTYPES:
        known = ", ".join(f"{known:#04x} {np.dtype(dtype).name}" for known, dtype in DTYPES.items())
        raise ConfigurationError(where, f"dtype code {code:#04x}", f"one of {known}", "Look at what the file is.")
    if len(content) < 4 + 4 * dimensions:
        raise ConfigurationError(
            where, f"{len(content)} bytes", f"a header of {4 + 4 * dimensions} for {dimensions} dimensions", COMPLETE
        )
    return np.dtype(DTYPES[code]), struct.unpack_from(f">{dimensions}I", content, 4)


def _from_folder(folder: Path, where: str) -> dict[str, Tensor]:
    found = {part: _file_of(folder, names) for part, names in FILES.items()}
    missing = [FILES[part][0] for part, file in found.items() if file is None]
    if missing:
        raise ConfigurationError(
            where,
            f"a folder without {', '.join(missing)}",
            "the four files of the data set, each with or without .gz",
            "Look for them in a folder below (torchvision puts them in MNIST/raw), or download them.",
        )
    return {part: read_idx(file) for part, file in found.items() if file is not None}


def _file_of(folder: Path, names: tuple[str, str]) -> Path | None:
    candidates = (folder / f"{name}{ending}" for ending in ("", ".gz") for name in names)
    return next((file for file in candidates if file.is_file()), None)


def _from_npz(file: Path, where: str) -> dict[str, Tensor]:
    wanted = [field.name for field in fields(Mnist)]
    try:
        # the stream is ours to close: numpy leaves a damaged archive open
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            names = list(archive)
            parts = {name: torch.from_numpy(archive[name]) for name in wanted if name in names}
    except (OSError, EOFError, AttributeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigurationError(
            where, f"no npz of numbers: {error}", "a folder of IDX files, or an npz file", COMPLETE
        ) from error
    missing = [name for name in wanted if name not in parts]
    if missing:
        raise ConfigurationError(
            where,
            f"an npz without {', '.join(missing)}; it has {', '.join(names)}",
            f"the arrays {', '.join(wanted)}",
            "Save it again with these names: numpy.savez(file, train_images=..., ...).",
        )
    return parts


def _check_split(where: str, split: str, images: Tensor, labels: Tensor) -> None:
    if images.ndim == 3 and labels.ndim == 1 and len(images) == len(labels):
        return
    raise ConfigurationError(
        where,
        f"{split} images {tuple(images.shape)} and labels {tuple(labels.shape)}",
        "images [n, height, width] and labels [n], as many of one as of the other",
        "Take both from the same data set and the same split.",
    )
