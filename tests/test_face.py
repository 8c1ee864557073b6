"""What ``import torch2ebm`` shows: the public names, the version, and nothing of how the package is built."""

import importlib
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

import torch2ebm
from torch2ebm.cli import main
from torch2ebm.common import version

ROOT = Path(__file__).parents[1]


def version_of_setup() -> str:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    return settings["metadata"]["version"]


def test_tab_shows_the_public_names_alone() -> None:
    importlib.import_module("torch2ebm.demo")  # which sets an attribute of the package
    shown = {name for name in dir(torch2ebm) if not name.startswith("__")}
    assert "demo" in vars(torch2ebm) and shown == set(torch2ebm.__all__)
    assert {"__version__", "__doc__", "__all__"} <= set(dir(torch2ebm))


def test_what_is_shown_is_a_class_a_function_or_a_public_module() -> None:
    modules = {name for name in torch2ebm.__all__ if isinstance(getattr(torch2ebm, name), ModuleType)}
    assert {"errors", "torch2pc"} <= modules <= {"errors", "torch2pc", "extend", "theory"}
    assert all(callable(getattr(torch2ebm, name)) for name in set(torch2ebm.__all__) - modules)
    assert torch2ebm.compare.__name__ == "compare"  # not the module of the same name


def test_a_star_takes_nothing_from_torch() -> None:
    taken: dict[str, object] = {}
    exec("from torch.optim import *\nfrom torch.nn import *\nfrom torch2ebm import *", taken)
    assert taken["Adam"] is torch.optim.Adam
    assert all(taken[name] is getattr(torch2ebm, name) for name in torch2ebm.__all__)
    for of_torch in (torch.optim, torch.nn):
        assert not {name for name in torch2ebm.__all__ if hasattr(of_torch, name)}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'torch2ebm' has no attribute 'PredictiveCodnig'"):
        torch2ebm.PredictiveCodnig  # noqa: B018
    assert not hasattr(torch2ebm, "__wrapped__")


def test_the_version_is_that_of_setup_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    said = version_of_setup()
    assert re.fullmatch(r"\d+\.\d+\.\d+", said)
    assert torch2ebm.__version__ == said
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"torch2ebm {said}\n"
    assert f"\nversion: {said}\n" in (ROOT / "CITATION.cff").read_text()
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == [said, "0.1.0"]


def test_the_program_prints_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch2ebm", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == f"torch2ebm {version_of_setup()}\n"


def test_the_version_of_an_installation_is_what_it_has_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an installed package stands no ``setup.cfg``, or that of something else."""
    monkeypatch.setattr(metadata, "version", {"torch2ebm": "7.8.9"}.__getitem__)
    monkeypatch.setattr(version, "SOURCES", tmp_path / "setup.cfg")
    assert version.version.__wrapped__() == "7.8.9"
    (tmp_path / "setup.cfg").write_text("[metadata]\nname = another\nversion = 1.2.3\n")
    assert version.version.__wrapped__() == "7.8.9"
    (tmp_path / "setup.cfg").write_text("[metadata]\nname = torch2ebm\nversion = 1.2.3\n")
    assert version.version.__wrapped__() == "1.2.3"


def test_a_bare_copy_of_the_folder_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setattr(version, "SOURCES", tmp_path / "setup.cfg")
    assert version.version.__wrapped__() == "0+unknown"


def test_importing_the_package_reads_no_version() -> None:
    program = "import sys, torch2ebm; assert 'torch2ebm.common.version' not in sys.modules; torch2ebm.__version__"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
