"""The tutorials as notebooks: well formed, with what was printed and drawn in its place, and they run."""

import base64
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from test_site import ROOT, tool

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (1200).to_bytes(4, "big") + (400).to_bytes(4, "big")
SOURCE = """# ---
# %% [markdown]
# # Title
#
# text

# %%
a = 2
print(a)

# %%
print(a * 3)
"""


@pytest.fixture
def notebooks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "website"))
    return tool("notebooks")


def read(text: str) -> dict[str, Any]:
    """A notebook, after a look at what format 4.5 asks of it."""
    found = json.loads(text)
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in found["cells"]]
    assert len(names) == len(set(names)) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    for cell in found["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        is_code = cell["cell_type"] == "code"
        assert set(cell) == (keys | {"execution_count", "outputs"} if is_code else keys)
        assert isinstance(cell["source"], list) and "".join(cell["source"]).strip()
        for output in cell.get("outputs", []):
            assert output["output_type"] in ("stream", "display_data")
    return dict(found)


def outputs(found: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [cell["outputs"] for cell in found["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def script(notebooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "1_x.py"
    path.write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(notebooks.tutorials, "KEPT", tmp_path / "kept")
    return path


def test_what_was_printed_and_drawn_stands_in_its_place(notebooks: ModuleType, script: Path) -> None:
    folder = notebooks.tutorials.folder(script)
    folder.mkdir(parents=True)
    (folder / "y.png").write_bytes(PNG + b"y")
    lines = [cell.line for cell in notebooks.tutorials.cells(script) if not cell.is_text]
    printed = {lines[0]: "2\npicture: some/where/y.png\nafter\n", lines[1]: "6\n"}
    (folder / "printed.json").write_text(json.dumps(printed), encoding="utf-8")

    found = read(notebooks.notebook(script))
    assert [cell["cell_type"] for cell in found["cells"]] == ["code", "markdown", "code", "code"]
    assert found["cells"][1]["source"] == ["# Title\n", "\n", "text"]
    assert found["cells"][2]["source"] == ["a = 2\n", "print(a)"]
    assert [cell.get("execution_count") for cell in found["cells"]] == [None, None, 1, 2]
    install, first, second = outputs(found)
    assert install == []
    assert [output["output_type"] for output in first] == ["stream", "display_data", "stream"]
    assert first[0]["text"] == ["2\n"] and first[2]["text"] == ["after\n"] and second[0]["text"] == ["6\n"]
    assert base64.b64decode(first[1]["data"]["image/png"]) == PNG + b"y"
    assert first[1]["metadata"] == {"image/png": {"width": 760}}


def test_a_tutorial_that_was_not_run_is_a_notebook_without_outputs(notebooks: ModuleType, script: Path) -> None:
    found = read(notebooks.notebook(script))
    assert outputs(found) == [[], [], []]
    assert all(cell.get("execution_count") is None for cell in found["cells"])
    script.write_text(SOURCE + "print(a * 4)\n", encoding="utf-8")  # what was kept of an older text is not shown
    assert outputs(read(notebooks.notebook(script))) == [[], [], []]


def test_tutorials_come_in_the_order_of_their_numbers(notebooks: ModuleType) -> None:
    numbers = [int(path.stem.split("_")[0]) for path in notebooks.tutorials.scripts()]
    assert numbers == list(range(1, len(numbers) + 1)) and numbers[-1] >= 10  # by their names, 10 would be first


def test_the_first_cell_installs_what_the_tutorials_need(notebooks: ModuleType) -> None:
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    (address,) = re.findall(r"^url = (\S+)$", setup, re.M)
    for path in notebooks.tutorials.scripts():
        cell = read(notebooks.notebook(path))["cells"][0]
        assert "".join(cell["source"]).endswith(f'%pip install -q "torch2ebm[tutorials] @ git+{address}"')
    assert "\ntutorials =" in setup


def test_a_page_leads_to_its_notebook_and_to_colab(notebooks: ModuleType, script: Path) -> None:
    colab = notebooks.colab(script, "https://github.com/o/r")
    assert colab == "https://colab.research.google.com/github/o/r/blob/notebooks/1_x.ipynb"
    page = notebooks.tutorials.page(script, "https://github.com/o/r", colab)
    assert page.startswith(f"# Title\n\n[Open in Colab]({colab}) · [Download the notebook](1_x.ipynb)\n\ntext\n\n")


def test_the_workflow_puts_them_into_the_branch_that_colab_opens(notebooks: ModuleType) -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["notebooks"]["permissions"] == {"contents": "write"} and jobs["notebooks"]["needs"] == "build"
    (script,) = [step["run"] for step in jobs["notebooks"]["steps"] if "run" in step]
    assert f"--initial-branch={notebooks.BRANCH}\n" in script and f" {notebooks.BRANCH}\n" in script.split("push")[1]
    (uploaded,) = [step["with"]["path"] for step in jobs["build"]["steps"] if "upload-artifact" in step.get("uses", "")]
    assert uploaded == "site/tutorials/*.ipynb"
    assert [name for name, job in jobs.items() if job["permissions"].get("contents") == "write"] == ["notebooks"]


def test_the_schema_of_the_format_takes_them(notebooks: ModuleType) -> None:
    nbformat = pytest.importorskip("nbformat")
    for path in notebooks.tutorials.scripts():
        nbformat.validate(nbformat.reads(notebooks.notebook(path), as_version=4))


@pytest.mark.slow
def test_a_notebook_runs_and_shows_its_pictures(notebooks: ModuleType, tmp_path: Path) -> None:
    """All but the first cell, which needs the network."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    (path,) = [path for path in notebooks.tutorials.scripts() if path.stem.startswith("1_")]
    found = nbformat.reads(notebooks.notebook(path), as_version=4)
    del found.cells[0]
    nbclient.NotebookClient(found, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    data = [output.get("data", {}) for cell in found.cells for output in cell.get("outputs", [])]
    shown = [base64.b64decode(each["image/png"]) for each in data if "image/png" in each]
    written = {file.read_bytes() for file in (tmp_path / "tutorial_output").glob("*.png")}
    assert len(written) > 1 and set(shown) == written
