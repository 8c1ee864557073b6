"""MNIST and its relatives from the files that people have: IDX, gzipped or not, or one npz."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from torch2ebm.common.idx_file import idx_file
from torch2ebm.common.npz_file import npz_file, npz_names
from torch2ebm.common.stored_numbers import StoredNumbers, path_of
from torch2ebm.errors import ConfigurationError

# The name of each part without its ending. MNIST's own site had the hyphen, many copies have a point.
FILES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "train_images": ("train-images-idx3-ubyte", "train-images.idx3-ubyte"),
        "train_labels": ("train-labels-idx1-ubyte", "train-labels.idx1-ubyte"),
        "test_images": ("t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte"),
        "test_labels": ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"),
    }
)
LARGEST_LABEL = 2**53  # up to which every whole number is a number of float64


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

    def __repr__(self) -> str:
        parts = [f"{field.name} {tuple(getattr(self, field.name).shape)}" for field in fields(self)]
        return f"Mnist({', '.join(parts)})"


def read_idx(path: str | PathLike[str]) -> Tensor:
    """One IDX file, gzipped or not, as a tensor of the shape and the dtype that its header names.

    The format (LeCun, Cortes and Burges, *The MNIST database*): two zero bytes, a code of the dtype, the number of
    dimensions, the sizes as 32-bit integers, then the numbers, row by row; everything big-endian. Codes are 8 uint8,
    9 int8, 11 int16, 12 int32, 13 float32 and 14 float64. Whether a file is gzipped is seen in its first bytes.

    The header is read first, and then no more than it announces. A damaged file takes no memory.

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
    where = f"read_idx({_shown(path)})"
    return idx_file(path_of(path, where), where).read()


def load_mnist(path: str | PathLike[str]) -> Mnist:
    """MNIST, or a data set in its format (Fashion-MNIST, KMNIST, ...), from a folder of its four files or from an npz.

    Args:
        path: A folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
            ``t10k-labels-idx1-ubyte``, each with or without ``.gz``; or an npz file with the arrays
            ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``.

    Raises:
        ConfigurationError: for a file or an array that is missing or unreadable, for images and labels that do
            not belong together, and for labels that are no whole numbers, 0 or more.

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
    where = f"load_mnist({_shown(path)})"
    place = path_of(path, where)
    if not _is_there(place, where):
        raise ConfigurationError(where, "nothing there", "a folder of IDX files, or an npz file", "Look at the path.")
    stored = _from_folder(place, where) if place.is_dir() else _from_npz(place, where)
    for split in ("train", "test"):  # by the headers, before any number is read
        _check_split(where, split, stored[f"{split}_images"].sizes, stored[f"{split}_labels"].sizes)
    labels = {name: _labels(where, name, part.read()) for name, part in stored.items() if name.endswith("labels")}
    images = {name: part.read() for name, part in stored.items() if name not in labels}
    return Mnist(**images, **labels)


def _shown(path: object) -> str:
    text = f"'{path}'" if isinstance(path, (str, PathLike)) else repr(path)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _is_there(place: Path, where: str) -> bool:
    try:
        return place.exists()
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise ConfigurationError(where, str(error), "a path that can be read", "Look at the path.") from error


def _from_folder(folder: Path, where: str) -> dict[str, StoredNumbers]:
    found = {part: _file_of(folder, names) for part, names in FILES.items()}
    missing = [FILES[part][0] for part, file in found.items() if file is None]
    if missing:
        raise ConfigurationError(
            where,
            f"a folder without {', '.join(missing)}",
            "the four files of the data set, each with or without .gz",
            "Look for them in a folder below (torchvision puts them in MNIST/raw), or download them.",
        )
    return {part: idx_file(file, f"read_idx({_shown(file)})") for part, file in found.items() if file is not None}


def _file_of(folder: Path, names: tuple[str, str]) -> Path | None:
    candidates = (folder / f"{name}{ending}" for ending in ("", ".gz") for name in names)
    return next((file for file in candidates if file.is_file()), None)


def _from_npz(file: Path, where: str) -> dict[str, StoredNumbers]:
    wanted, names = [field.name for field in fields(Mnist)], npz_names(file, where)
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ConfigurationError(
            where,
            f"an npz without {', '.join(missing)}; it has {', '.join(names[:20])}",
            f"the arrays {', '.join(wanted)}",
            "Save it again with these names: numpy.savez(file, train_images=..., ...).",
        )
    return npz_file(file, wanted, where)


def _check_split(where: str, split: str, images: tuple[int, ...], labels: tuple[int, ...]) -> None:
    if len(images) == 3 and len(labels) == 1 and images[0] == labels[0]:
        return
    raise ConfigurationError(
        where,
        f"{split} images {images} and labels {labels}",
        "images [n, height, width] and labels [n], as many of one as of the other",
        "Take both from the same data set and the same split.",
    )


def _labels(where: str, name: str, numbers: Tensor) -> Tensor:
    """As int64. Raises :class:`ConfigurationError` where this would make another number of one."""
    # float64 holds every number of 32 bits, and what it rounds is out of the range that is allowed
    exact = numbers.double()
    wrong = torch.nonzero(~((exact == exact.floor()) & (exact >= 0) & (exact <= LARGEST_LABEL)))
    if len(wrong):
        first = int(wrong[0])
        raise ConfigurationError(
            where,
            f"{name} with {numbers[first].item()} at {first}",
            "the number of a class: a whole number, 0 or more",
            "Take the labels themselves, and not probabilities or distances.",
        )
    return numbers.long()
