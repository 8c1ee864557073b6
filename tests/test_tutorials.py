"""What people read runs: the tutorials as scripts, and every Python block of the README and the pages, in order.

A block of another language is no Python; one that opens with ```` ```python no-run ```` is shown only.
"""

import os
import re
import subprocess
import sys
import textwrap
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
import torch
from helpers import COMPILERS_OWN_WARNINGS, GATHERS_ON_CPU, LIGHTNINGS_OWN_WARNINGS, forget_accelerator
from torch import distributed

import torch2ebm
from torch2ebm.errors import ShardingError

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
from matplotlib import image

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FRAMEWORKS = {"lightning": ["lightning"], "huggingface": ["transformers", "accelerate"], "accelerate": ["accelerate"]}
BLOCK = re.compile(r"^(?P<indent> *)```python(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```[ \t]*$", re.M | re.S)


def blocks(page: Path) -> list[CodeType]:
    """The blocks to run, each at its own line numbers, so that a traceback points into the page."""
    text = page.read_text(encoding="utf-8")
    return [
        compile("\n" * text.count("\n", 0, match.start("code")) + textwrap.dedent(match["code"]), str(page), "exec")
        for match in BLOCK.finditer(text)
        if "no-run" not in match["info"].split()
    ]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def test_there_are_tutorials_and_blocks():
    assert TUTORIALS
    assert len(blocks(ROOT / "docs" / "torch2pc.md")) == 3


def test_blocks_are_found_and_marked_ones_are_left_out(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "```diff\n+ a\n```\n```python\nb = 1\n```\n- item\n\n  ```python\n  c = 2\n  ```\n"
        "```python no-run\nd(\n```\n```python title=x\ne = 3\n```\n```pycon\n>>> f\n```\n"
    )
    namespace: dict[str, object] = {}
    for block in blocks(page):
        exec(block, namespace)
    assert {name: namespace[name] for name in namespace if not name.startswith("__")} == {"b": 1, "c": 2, "e": 3}


LONG = ("from_bogacz", "speed")  # pages that train for many seconds


@pytest.mark.parametrize(
    "page", [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in PAGES], ids=named
)
@pytest.mark.filterwarnings(*LIGHTNINGS_OWN_WARNINGS, *COMPILERS_OWN_WARNINGS)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for framework in FRAMEWORKS.get(page.stem, ()):
        pytest.importorskip(framework)
    forget_accelerator()
    monkeypatch.chdir(tmp_path)  # a block may write files
    module = ModuleType(f"blocks_of_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses and pickle look their module up
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            for number, block in enumerate(blocks(page)):
                with refused(page.stem, number):
                    exec(block, module.__dict__)
        finally:
            if distributed.is_available() and distributed.is_initialized():
                distributed.destroy_process_group()


def refused(page: str, block: int) -> AbstractContextManager[Any]:
    """Inside, a block is refused where the page says that an old torch cannot run it."""
    if (page, block) == ("distributed", 1) and not GATHERS_ON_CPU:
        return pytest.raises(ShardingError, match="cannot gather")
    return nullcontext()


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=named)
def test_a_tutorial_is_cells_that_use_public_names(tutorial: Path):
    text = tutorial.read_text(encoding="utf-8")
    compile(text, str(tutorial), "exec")
    assert "\n# %% [markdown]\n" in text
    assert "\n# %%\n" in text
    used = set(re.findall(r"\btorch2ebm\.([A-Za-z_]\w*)", text)) - {"torch2pc"}
    assert used
    assert used <= set(torch2ebm.__all__)


FAST = ("1_first_network",)
RUN = [pytest.param(path, marks=[pytest.mark.slow] * (path.stem not in FAST)) for path in TUTORIALS]


@pytest.mark.parametrize("tutorial", RUN, ids=named)
def test_a_tutorial_runs_and_draws(tutorial: Path, tmp_path: Path):
    """Its own asserts hold what its text says."""
    pictures = tmp_path / "pictures"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TUTORIAL_OUTPUT": str(pictures), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, str(tutorial)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    written = sorted(pictures.glob("*.png"))
    assert written
    assert all(image.imread(picture).std() > 0.01 for picture in written)  # not blank
    assert list(tmp_path.iterdir()) == [pictures]  # and nothing beside
