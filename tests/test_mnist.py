"""IDX files and npz archives, written here byte by byte, come back as they were; damaged ones are refused."""

import dataclasses
import gzip
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import torch2ebm
from torch2ebm.errors import ConfigurationError

# code, struct's format of one number, torch's dtype, numbers that another byte order or signedness would change
KINDS = [
    (0x08, "B", torch.uint8, [0, 1, 200, 255]),
    (0x09, "b", torch.int8, [-128, -1, 0, 127]),
    (0x0B, "h", torch.int16, [-32768, -2, 258, 32767]),
    (0x0C, "i", torch.int32, [-(2**31), -3, 16909060, 2**31 - 1]),
    (0x0D, "f", torch.float32, [-1.5, 0.0, 3.25, math.inf]),
    (0x0E, "d", torch.float64, [-1e300, 0.1, 1 / 3, math.pi]),
]
FOLDER = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(sizes: Sequence[int], numbers: Sequence[float], code: int = 0x08, form: str = "B") -> bytes:
    """The format by its definition: big-endian throughout, the last index fastest."""
    header = bytes([0, 0, code, len(sizes)]) + b"".join(struct.pack(">I", size) for size in sizes)
    return header + b"".join(struct.pack(f">{form}", number) for number in numbers)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def parts(train: int = 3, test: int = 2) -> list[bytes]:
    """Four files of images of 2 by 3 pixels; every number is another."""
    return [
        idx([train, 2, 3], range(train * 6)),
        idx([train], [9 - i for i in range(train)]),
        idx([test, 2, 3], range(100, 100 + test * 6)),
        idx([test], [5 + i for i in range(test)]),
    ]


def fill(folder: Path, contents: Sequence[bytes], names: Sequence[str] = FOLDER) -> Path:
    for name, content in zip(names, contents, strict=True):
        written(folder / name, gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def arrays() -> dict[str, np.ndarray]:
    images = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    labels = np.array([7, 1], dtype=np.uint8)
    return {"train_images": images, "train_labels": labels, "test_images": images + 50, "test_labels": labels - 1}


def refusal(path: Path, reader=torch2ebm.read_idx) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        reader(path)
    assert str(path) in caught.value.where
    assert all((caught.value.got, caught.value.expected, caught.value.remedy))
    return caught.value


# one file


@pytest.mark.parametrize(("code", "form", "dtype", "numbers"), KINDS)
def test_every_dtype_of_the_format_is_read_big_endian(tmp_path, code, form, dtype, numbers):
    tensor = torch2ebm.read_idx(written(tmp_path / "file", idx([4], numbers, code, form)))
    assert tensor.dtype == dtype
    assert tensor.tolist() == numbers  # exact: every number has a representation in its format


@pytest.mark.parametrize("sizes", [(), (1,), (5,), (2, 3), (2, 3, 4), (2, 1, 3, 2), (0, 28, 28)])
def test_the_last_index_is_the_fastest(tmp_path, sizes):
    count = math.prod(sizes)
    tensor = torch2ebm.read_idx(written(tmp_path / "file", idx(sizes, range(count))))
    assert tensor.shape == torch.Size(sizes)
    assert tensor.flatten().tolist() == list(range(count))


@pytest.mark.parametrize("name", ["file.gz", "file"])
def test_gzip_is_seen_in_the_bytes_not_in_the_name(tmp_path, name):
    path = written(tmp_path / name, gzip.compress(idx([2, 2], [1, 2, 3, 4])))
    assert torch2ebm.read_idx(path).tolist() == [[1, 2], [3, 4]]
    plain = written(tmp_path / "plain.gz", idx([1], [6]))
    assert torch2ebm.read_idx(plain).tolist() == [6]


def test_the_tensor_is_the_callers_own(tmp_path):
    path = written(tmp_path / "file", idx([3], [1, 2, 3]))
    tensor = torch2ebm.read_idx(str(path))
    tensor += 1
    assert tensor.tolist() == [2, 3, 4]
    assert torch2ebm.read_idx(path).tolist() == [1, 2, 3]


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"<html>not found</html>", b"\0\1\x08\1" + bytes(5)])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    assert "two zero bytes" in refusal(written(tmp_path / "file", content)).expected


@pytest.mark.parametrize("code", [0x00, 0x07, 0x0A, 0x0F])
def test_an_unknown_dtype_is_refused_by_name(tmp_path, code):
    error = refusal(written(tmp_path / "file", idx([1], [0], code)))
    assert f"{code:#04x}" in error.got
    assert "0x0b int16" in error.expected


@pytest.mark.parametrize("missing", [1, 3, 6])
def test_a_truncated_file_is_refused_with_both_lengths(tmp_path, missing):
    error = refusal(written(tmp_path / "file", idx([2, 3], range(6))[:-missing]))
    assert f"{6 - missing} bytes" in error.got
    assert error.expected.startswith("6,")


def test_trailing_bytes_are_refused(tmp_path):
    error = refusal(written(tmp_path / "file", idx([2, 3], range(7))))
    assert "7 bytes" in error.got


def test_sizes_that_no_memory_holds_are_compared_before_anything_is_allocated(tmp_path):
    error = refusal(written(tmp_path / "file", idx([2**32 - 1] * 4, [1])))
    assert str((2**32 - 1) ** 4) in error.expected


def test_a_truncated_header_is_refused(tmp_path):
    error = refusal(written(tmp_path / "file", idx([2, 3, 4], [])[:-1]))
    assert (error.got, error.expected) == ("15 bytes", "a header of 16 for 3 dimensions")


@pytest.mark.parametrize("keep", [-1, -9, 12])
def test_a_truncated_gzip_file_is_refused(tmp_path, keep):
    packed = gzip.compress(idx([100], range(100)))
    assert "gzip" in refusal(written(tmp_path / "file.gz", packed[:keep])).got


def test_a_gzip_file_with_a_changed_byte_is_refused(tmp_path):
    packed = bytearray(gzip.compress(idx([100], range(100))))
    packed[-6] ^= 1  # of the checksum
    assert "gzip" in refusal(written(tmp_path / "file.gz", bytes(packed))).got


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent").got
    refusal(tmp_path)


# the data set


@pytest.mark.parametrize("change", [lambda n: n, lambda n: f"{n}.gz", lambda n: n.replace("-idx", ".idx")])
def test_a_folder_holds_its_files_plain_gzipped_or_with_a_point(tmp_path, change):
    mnist = torch2ebm.load_mnist(fill(tmp_path, parts(), [change(name) for name in FOLDER]))
    assert torch.equal(mnist.train_images, torch.arange(18, dtype=torch.uint8).reshape(3, 2, 3))
    assert torch.equal(mnist.test_images, torch.arange(100, 112, dtype=torch.uint8).reshape(2, 2, 3))
    assert mnist.train_labels.tolist() == [9, 8, 7]
    assert mnist.test_labels.tolist() == [5, 6]


def test_images_stay_bytes_and_labels_are_what_cross_entropy_takes(tmp_path):
    mnist = torch2ebm.load_mnist(fill(tmp_path, parts()))
    assert mnist.train_images.dtype == mnist.test_images.dtype == torch.uint8
    assert mnist.train_labels.dtype == mnist.test_labels.dtype == torch.int64
    with pytest.raises(dataclasses.FrozenInstanceError):
        mnist.train_labels = mnist.test_labels


def test_an_npz_gives_what_a_folder_gives(tmp_path):
    expected = arrays()
    np.savez_compressed(tmp_path / "mnist.npz", **expected)
    mnist = torch2ebm.load_mnist(str(tmp_path / "mnist.npz"))
    for name, array in expected.items():
        part: Tensor = getattr(mnist, name)
        assert part.tolist() == array.tolist()
        assert part.dtype == (torch.int64 if name.endswith("labels") else torch.uint8)


def test_all_missing_files_are_named_at_once(tmp_path):
    fill(tmp_path, parts()[:2], FOLDER[:2])
    error = refusal(tmp_path, torch2ebm.load_mnist)
    assert all(name in error.got for name in FOLDER[2:])
    assert not any(name in error.got for name in FOLDER[:2])


def test_missing_arrays_are_named_with_those_that_are_there(tmp_path):
    kept = {name: array for name, array in arrays().items() if name != "test_labels"}
    np.savez(tmp_path / "mnist.npz", **kept)
    error = refusal(tmp_path / "mnist.npz", torch2ebm.load_mnist)
    assert "without test_labels" in error.got
    assert "train_images" in error.got


@pytest.mark.parametrize("split", [0, 2])
def test_images_and_labels_of_different_numbers_are_refused(tmp_path, split):
    contents = parts()
    contents[split + 1] = idx([4], [1, 2, 3, 4])
    error = refusal(fill(tmp_path, contents), torch2ebm.load_mnist)
    assert error.got.startswith("test" if split else "train")
    assert "(4,)" in error.got


def test_images_in_place_of_labels_are_refused(tmp_path):
    contents = parts()
    contents[1] = contents[0]
    assert "labels (3, 2, 3)" in refusal(fill(tmp_path, contents), torch2ebm.load_mnist).got


def test_a_damaged_file_in_the_folder_is_the_one_that_is_named(tmp_path):
    contents = parts()
    contents[2] = contents[2][:-1]
    with pytest.raises(ConfigurationError) as caught:
        torch2ebm.load_mnist(fill(tmp_path, contents))
    assert FOLDER[2] in caught.value.where


def test_an_npz_runs_no_code_of_its_own(tmp_path):
    np.savez(tmp_path / "mnist.npz", **(arrays() | {"test_labels": np.array([print, 1], dtype=object)}))
    assert "allow_pickle" in refusal(tmp_path / "mnist.npz", torch2ebm.load_mnist).got


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\3\4 broken"])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    refusal(written(tmp_path / "mnist.npz", content), torch2ebm.load_mnist)


def test_an_npy_in_place_of_an_npz_is_refused(tmp_path):
    np.save(tmp_path / "mnist.npy", np.zeros(3))
    refusal(tmp_path / "mnist.npy", torch2ebm.load_mnist)


def test_a_path_that_is_not_there_is_refused(tmp_path):
    assert refusal(tmp_path / "absent", torch2ebm.load_mnist).got == "nothing there"
