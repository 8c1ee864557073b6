"""The built wheel in a fresh environment that has torch and numpy, and nothing of the extras."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from email import message_from_string
from email.message import Message
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "torch2ebm", "tests", "tutorials")
OPTIONAL = ("matplotlib", "pandas", "sklearn", "transformers", "scipy", "torchdiffeq", "tqdm", "hypothesis", "pytest")

STEP = f"""
import importlib.util, os, pathlib, sys
import torch, torch2ebm

assert pathlib.Path(torch2ebm.__file__).is_relative_to(sys.prefix), torch2ebm.__file__
assert [name for name in {OPTIONAL} if importlib.util.find_spec(name)] == []
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
model = torch2ebm.convert(net)
optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.5), model, torch2ebm.PredictiveCoding())
x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
losses = []
for _ in range(20):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 2, losses
assert "n0 -> n1;" in model.draw().dot
os.environ["PATH"] = ""  # no Graphviz either
try:
    model.draw("graph.png")
except torch2ebm.errors.ConfigurationError as error:
    assert "pip install torch2ebm[plot]" in str(error), error
else:
    raise AssertionError("there was matplotlib, or Graphviz")
assert "</html>" in torch2ebm.report(model).to_html("run.html")  # style and script are in the wheel, too
print(model.summary())
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves folders behind; nothing comes from the network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "source")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, folder / "source", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def required_by(*names: str) -> Iterator[Distribution]:
    """The installed distributions of these names, and what they require without an extra."""
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            assert name not in names  # a requirement of another platform
            continue
        yield found
        of_all = [line for line in found.requires or () if "extra ==" not in line]
        waiting += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in of_all]


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With links to torch, numpy and what they require, and with the wheel installed."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    for each in required_by("torch", "numpy"):
        tops = {file.parts[0] for file in each.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(each.locate_file(top))))
    options = ("install", "--no-index", "--quiet", wheel)
    run(sys.executable, "-m", "pip", "--python", python_of(folder), *options, cwd=folder)  # which checks requirements
    return folder


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(archive.read(name).decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    information = {name for name in names if ".dist-info/" in name}
    kinds = ("*.py", "*.css", "*.js")
    sources = {str(path.relative_to(ROOT)) for kind in kinds for path in (ROOT / "torch2ebm").rglob(kind)}
    assert names - information == {*sources, "torch2ebm/py.typed"}
    assert any(name.endswith("/LICENSE") for name in information)


def test_the_wheel_asks_for_torch_and_numpy_alone(wheel: Path) -> None:
    found = metadata_of(wheel)
    required = found.get_all("Requires-Dist", [])
    assert sorted(line for line in required if "extra" not in line) == ["numpy", "torch>=2.6"]
    extras = {"demo", "plot", "ode", "pandas", "tensorboard", "wandb", "tutorials", "browser", "docs", "test"}
    assert extras == set(found.get_all("Provides-Extra", []))
    assert found["Requires-Python"] == ">=3.10" and found["Name"] == "torch2ebm"
    assert str(found.get_payload()).strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_the_wheel_says_its_licence_and_where_the_project_is(wheel: Path) -> None:
    found = metadata_of(wheel)
    assert found["License-Expression"] == "MIT" and found["License-File"] == "LICENSE" and "License" not in found
    assert not [line for line in found.get_all("Classifier", []) if line.startswith("License")]  # PEP 639: one or other
    urls = dict(line.split(", ", 1) for line in found.get_all("Project-URL", []))
    assert {"Documentation", "Source", "Issues", "Changelog"} <= urls.keys()
    assert all(url.startswith("https://") for url in urls.values())


def test_without_extras_a_net_learns_and_a_picture_names_what_to_install(environment: Path) -> None:
    printed = run(python_of(environment), "-I", "-W", "error", "-c", STEP, cwd=environment)
    assert "Linear" in printed


def test_the_command_of_the_wheel_is_there_and_has_the_version_of_the_sources(environment: Path) -> None:
    command = python_of(environment).with_name("torch2ebm")
    assert "compare" in run(command, "--help", cwd=environment)
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert run(command, "--version", cwd=environment) == f"torch2ebm {settings['metadata']['version']}\n"
