"""Files that a stranger wrote, or that a disk damaged: each is read as it was meant, or refused, in bounded memory."""

import gzip
import io
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torch2ebm
from torch2ebm.errors import ConfigurationError

PARTS = ("train_images", "train_labels", "test_images", "test_labels")
IMAGES, LABELS = np.arange(18, dtype="uint8").reshape(3, 2, 3), np.array([5, 0, 4], "uint8")
BOUND = 8 << 20  # bytes: some chunks, whatever a header announces


def idx(code: int, sizes: tuple[int, ...], numbers: bytes = b"") -> bytes:
    return bytes([0, 0, code, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + numbers


def npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(text: bytes, version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text


def npz(method: int = zipfile.ZIP_STORED, **changed: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in PARTS:
            archive.writestr(f"{name}.npy", changed.get(name, npy(IMAGES if "images" in name else LABELS)))
    return file.getvalue()


def patched(content: bytes, local: int, central: int, change: Callable[[int], int]) -> bytes:
    """One byte of every header of an archive is another."""
    found = bytearray(content)
    for signature, offset in ((b"PK\3\4", local), (b"PK\1\2", central)):
        place = found.find(signature)
        while place >= 0:
            found[place + offset] = change(found[place + offset])
            place = found.find(signature, place + 4)
    return bytes(found)


def refusal(read: Callable[[Any], Any], path: Any) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        read(path)
    assert all((caught.value.got, caught.value.expected, caught.value.remedy))
    return caught.value


def written(folder: Path, content: bytes) -> Path:
    path = folder / "file"
    path.write_bytes(content)
    return path


def peak_of(action: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# IDX


@pytest.mark.parametrize("dimensions", [65, 255])
def test_more_dimensions_than_torch_has_are_refused(tmp_path: Path, dimensions: int) -> None:
    assert (
        f"{dimensions} dimensions"
        in refusal(torch2ebm.read_idx, written(tmp_path, idx(8, (1,) * dimensions, b"\1"))).got
    )


def test_as_many_dimensions_as_torch_has_are_read(tmp_path: Path) -> None:
    assert torch2ebm.read_idx(written(tmp_path, idx(8, (1,) * 64, b"\1"))).ndim == 64


def test_no_numbers_of_sizes_that_overflow_are_refused(tmp_path: Path) -> None:
    refusal(torch2ebm.read_idx, written(tmp_path, idx(8, (0, 2**32 - 1, 2**32 - 1, 2**32 - 1))))


@pytest.mark.parametrize(
    ("announced", "there"),
    [((1,), 64 << 20), ((1 << 28,), 64 << 20), ((2**32 - 1, 2**32 - 1), 32 << 20)],
    ids=["more than announced", "less than announced", "more than any memory"],
)
def test_what_a_packed_file_unpacks_to_is_not_held(tmp_path: Path, announced: tuple[int, ...], there: int) -> None:
    path = written(tmp_path, gzip.compress(idx(8, announced) + bytes(there), 1))
    assert path.stat().st_size < there / 100
    assert peak_of(lambda: refusal(torch2ebm.read_idx, path)) < BOUND


def test_a_packed_file_of_two_members_is_one_file(tmp_path: Path) -> None:
    content = gzip.compress(idx(8, (2,))) + gzip.compress(b"\1\2")
    assert torch2ebm.read_idx(written(tmp_path, content)).tolist() == [1, 2]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
def test_a_pipe_and_a_device_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull), tmp_path):
        assert "regular file" in refusal(torch2ebm.read_idx, path).got


@pytest.mark.parametrize("path", ["a\0b", b"a\0b", None, 3, "a" * 5000, "\udcff", ""], ids=str)
@pytest.mark.parametrize("read", [torch2ebm.read_idx, torch2ebm.load_mnist])
def test_what_is_no_path_is_refused(read: Callable[[Any], Any], path: Any) -> None:
    if path == "" and read is torch2ebm.load_mnist:
        path = "absent"  # the empty path is the current folder
    refusal(read, path)


def test_a_path_of_bytes_is_a_path(tmp_path: Path) -> None:
    assert torch2ebm.read_idx(os.fsencode(written(tmp_path, idx(8, (1,), b"\7")))).tolist() == [7]


# npz


BROKEN_HEADERS = {
    "huge": b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 1000), }\n",
    "negative": b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 2, 3), }\n",
    "over 63 bits": b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999999, 2, 3), }\n",
    "a float": b"{'descr': '|u1', 'fortran_order': False, 'shape': (3.0, 2, 3), }\n",
    "a bool": b"{'descr': '|u1', 'fortran_order': False, 'shape': (True, 2, 3), }\n",
    "a list": b"{'descr': '|u1', 'fortran_order': False, 'shape': [3, 2, 3], }\n",
    "a call": b"{'descr': '|u1', 'fortran_order': False, 'shape': (__import__('os').getpid(), 2, 3), }\n",
    "no dtype": b"{'descr': 'no such', 'fortran_order': False, 'shape': (3, 2, 3), }\n",
    "a record": b"{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (3, 2, 3), }\n",
    "objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (3, 2, 3), }\n",
    "text": b"{'descr': '<U3', 'fortran_order': False, 'shape': (3, 2, 3), }\n",
    "complex": b"{'descr': '<c16', 'fortran_order': False, 'shape': (3, 2, 3), }\n",
    "a missing key": b"{'descr': '|u1', 'shape': (3, 2, 3), }\n",
    "nested": b"(" * 4000,
    "signs": b"-" * 9000,
    "not closed": b"{'descr': '''",
    "nothing": b"",
}


@pytest.mark.parametrize("name", BROKEN_HEADERS)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_header_that_announces_no_array_of_numbers_is_refused(tmp_path: Path, name: str, version: int) -> None:
    content = npz(train_images=header(BROKEN_HEADERS[name], version) + bytes(18))
    assert peak_of(lambda: refusal(torch2ebm.load_mnist, written(tmp_path, content))) < BOUND


BROKEN_ARRAYS = {
    "no array": b"hello",
    "empty": b"",
    "a version of its own": b"\x93NUMPY\x09\x00v\x00",
    "a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(1000),
    "a header that ends": header(b"{'descr': '|u1'")[:14],
    "no text": header(b"\xff\xfe{", 3),
    "more numbers": npy(IMAGES) + b"\1",
    "fewer numbers": npy(IMAGES)[:-1],
}


@pytest.mark.parametrize("name", BROKEN_ARRAYS)
def test_an_array_that_is_no_array_is_refused_by_name(tmp_path: Path, name: str) -> None:
    error = refusal(torch2ebm.load_mnist, written(tmp_path, npz(test_images=BROKEN_ARRAYS[name])))
    assert "test_images" in error.where


def test_an_array_of_another_size_is_refused_before_any_number_is_read(tmp_path: Path) -> None:
    """The bodies are damaged too: the error is the header's."""
    shapes = header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (7,), }\n")
    assert "labels (7,)" in refusal(torch2ebm.load_mnist, written(tmp_path, npz(train_labels=shapes))).got


@pytest.mark.parametrize(
    "content",
    [
        patched(npz(), 8, 10, lambda _: 99),
        patched(npz(), 8, 10, lambda _: zipfile.ZIP_LZMA),
        patched(npz(), 8, 10, lambda _: zipfile.ZIP_BZIP2),
        patched(npz(), 6, 8, lambda flags: flags | 1),
        patched(npz(), 14, 16, lambda byte: byte ^ 255),
        npz()[:-40],
    ],
    ids=["unknown method", "no lzma", "no bzip2", "encrypted", "another sum", "truncated"],
)
def test_a_damaged_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    refusal(torch2ebm.load_mnist, written(tmp_path, content))


def test_an_archive_that_unpacks_to_more_than_it_announces_is_not_held(tmp_path: Path) -> None:
    content = npz(zipfile.ZIP_DEFLATED, train_images=npy(IMAGES) + bytes(64 << 20))
    path = written(tmp_path, content)
    assert peak_of(lambda: refusal(torch2ebm.load_mnist, path)) < BOUND


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_packing_that_says_itself_how_much_memory_it_takes_is_refused(tmp_path: Path, method: int) -> None:
    assert f"method {method}" in refusal(torch2ebm.load_mnist, written(tmp_path, npz(method))).got


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("dtype", ["uint8", ">i2", "<i8", "float32", ">f8", "bool"])
def test_every_packing_order_and_dtype_gives_the_numbers(tmp_path: Path, method: int, dtype: str) -> None:
    images = np.asfortranarray(np.arange(18).reshape(3, 2, 3).astype(dtype))
    mnist = torch2ebm.load_mnist(written(tmp_path, npz(method, train_images=npy(images))))
    assert mnist.train_images.tolist() == images.tolist()
    assert mnist.train_images.is_contiguous() and str(mnist.train_images.dtype) == f"torch.{images.dtype.name}"


# labels


@pytest.mark.parametrize(
    "labels",
    [[0.9, 1.0, 2.0], [0.0, np.nan, 1.0], [np.inf, 0.0, 1.0], np.array([2**63 + 5, 0, 1], "uint64"), [0, -1, 2]],
    ids=str,
)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, labels: Any) -> None:
    error = refusal(torch2ebm.load_mnist, written(tmp_path, npz(train_labels=npy(np.array(labels)))))
    assert "train_labels" in error.got and "whole number" in error.expected


@pytest.mark.parametrize("labels", [[0.0, 1.0, 9.0], [True, False, True], np.array([7, 0, 1], "uint64")], ids=str)
def test_whole_numbers_of_any_kind_are_labels(tmp_path: Path, labels: Any) -> None:
    mnist = torch2ebm.load_mnist(written(tmp_path, npz(train_labels=npy(np.array(labels)))))
    assert mnist.train_labels.tolist() == [int(label) for label in labels]
    assert mnist.train_labels.dtype == torch.int64


# any bytes


WHOLE = [idx(8, (3, 2, 3), bytes(range(18))), idx(0x0D, (2,), struct.pack(">2f", 1.5, 2.0)), idx(8, ())]
FILES = [*WHOLE, *(gzip.compress(each, mtime=0) for each in WHOLE)]
ARCHIVES = [npz(method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]


@st.composite
def damaged(draw: Any, originals: list[bytes]) -> bytes:
    """A file with some of its bytes changed, taken out, doubled or cut off, or bytes that never were a file."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 4))):
        if not content:
            break
        place, kind = draw(st.integers(0, len(content) - 1)), draw(st.sampled_from("change insert remove double cut"))
        if kind == "c":
            content[place] = draw(st.integers(0, 255))
        elif kind == "i":
            content[place:place] = draw(st.binary(max_size=8))
        elif kind == "r":
            del content[place : place + draw(st.integers(1, 16))]
        elif kind == "d":
            content[place:place] = content[place : place + draw(st.integers(1, 16))]
        else:
            del content[place:]
    return bytes(content) if draw(st.integers(0, 9)) else draw(st.binary(max_size=64))


def reads_or_refuses(read: Callable[[Any], Any], path: Path, content: bytes) -> None:
    path.write_bytes(content)

    def attempt() -> None:
        with suppress(ConfigurationError):
            read(path)

    assert peak_of(attempt) < BOUND


FUZZ = settings(
    deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
few = settings(FUZZ, max_examples=100)
many = settings(FUZZ, max_examples=2500)


@few
@given(content=damaged(FILES))
def test_any_bytes_are_an_idx_file_or_refused(tmp_path: Path, content: bytes) -> None:
    reads_or_refuses(torch2ebm.read_idx, tmp_path / "file", content)


@few
@given(content=damaged(ARCHIVES))
def test_any_bytes_are_an_archive_or_refused(tmp_path: Path, content: bytes) -> None:
    reads_or_refuses(torch2ebm.load_mnist, tmp_path / "file", content)


@pytest.mark.slow
@many
@given(content=damaged(FILES))
def test_many_bytes_are_an_idx_file_or_refused(tmp_path: Path, content: bytes) -> None:
    reads_or_refuses(torch2ebm.read_idx, tmp_path / "file", content)


@pytest.mark.slow
@many
@given(content=damaged(ARCHIVES))
def test_many_bytes_are_an_archive_or_refused(tmp_path: Path, content: bytes) -> None:
    reads_or_refuses(torch2ebm.load_mnist, tmp_path / "file", content)
