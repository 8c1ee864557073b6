"""The source distribution holds every file of the repository, so that its own tests run after unpacking."""

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
WRITTEN = {"PKG-INFO", "torch2ebm.egg-info"}  # by the build
EVERYWHERE = ("CITATION.cff", "CHANGELOG.md", "LICENSE", "Makefile", "conftest.py", "constraints.txt", "tests/zoo.py")


def files_of_the_repository() -> set[str]:
    """What git knows; in an unpacked source distribution, which git does not know, what was packed."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "--cached", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    record = next(ROOT.glob("*.egg-info/SOURCES.txt")).read_text(encoding="utf-8")
    return {name for name in record.splitlines() if name.split("/")[0] not in WRITTEN}


FILES = files_of_the_repository()


def built(folder: Path, change: Callable[[Path], None] = lambda source: None) -> set[str]:
    """The files of a source distribution that is built from a copy; nothing comes from the network."""
    source = folder / "source"
    for name in FILES:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    change(source)
    command = [sys.executable, "-c", BUILD, str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}
    return {name for name in names if name.split("/")[0] not in WRITTEN}


def test_the_source_distribution_is_the_repository(tmp_path: Path) -> None:
    names = built(tmp_path)
    assert names == FILES
    assert set(EVERYWHERE) <= names
    for folder in ("benchmarks", "docs", "tests", "torch2ebm", "tutorials"):
        assert any(name.startswith(f"{folder}/") for name in names)


def test_what_the_manifest_does_not_name_is_left_out(tmp_path: Path) -> None:
    """The negative twin: without the manifest, the tests' own helpers are missing."""
    names = built(tmp_path, lambda source: (source / "MANIFEST.in").unlink())
    assert {"tests/zoo.py", "docs/index.md", "CITATION.cff"} <= FILES - names


@pytest.mark.parametrize("name", ["cache.pyc", "notes.txt"])
def test_only_compiled_files_are_left_behind(name: str, tmp_path: Path) -> None:
    found = built(tmp_path, lambda source: (source / "tests" / name).touch() or None)
    assert (f"tests/{name}" in found) == (not name.endswith(".pyc"))
