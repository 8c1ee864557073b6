"""The site: every public name has its place, what pages name exists, links lead somewhere, and the build is strict."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import torch2ebm
from torch2ebm import extend
from torch2ebm.cli import _parser

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
THEORY = sorted((ROOT / "docs" / "theory").glob("*.md"))
OBJECT = re.compile(r"^::: torch2ebm\.([\w.]+)$", re.M)
NAMED = re.compile(r"`((?:torch2ebm|tests|benchmarks|tutorials|docs|website)/[\w./-]*)(?:::(\w+))?`")
ON_OTHER_PAGES = {"errors", "extend", "theory", "torch2pc", "Torch2EBMError"}  # modules, and a class of errors


def tool(name: str) -> ModuleType:
    """A module of website/, which needs neither torch nor mkdocs."""
    specification = importlib.util.spec_from_file_location(f"website_{name}", ROOT / "website" / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    return module


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- pages


def test_every_public_name_stands_once_in_the_reference() -> None:
    pages = (ROOT / "docs" / "reference").glob("*.md")
    found = [name for page in pages for name in OBJECT.findall(page.read_text(encoding="utf-8"))]
    assert len(found) == len(set(found))
    assert set(torch2ebm.__all__) - ON_OTHER_PAGES <= set(found)
    own = {name for name in extend.__all__ if name not in {*torch2ebm.__all__, *vars(torch2ebm.errors)}}
    assert {f"extend.{name}" for name in own} <= set(found)
    assert "errors" in found
    for name in found:
        owner: object = torch2ebm
        for part in name.split("."):
            owner = getattr(owner, part)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_what_a_page_names_of_the_repository_exists(page: Path) -> None:
    for path, test in NAMED.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), test


def test_a_page_of_theory_has_equation_code_and_tests() -> None:
    letters = [page for page in THEORY if page.stem != "index"]
    assert [page.stem for page in letters] == list("abcde")
    for page in letters:
        text = page.read_text(encoding="utf-8")
        paths = NAMED.findall(text)
        assert "$$" in text and "arxiv.org" in text
        assert any(path.startswith("torch2ebm/") for path, _ in paths)
        assert sum(bool(test) for _, test in paths) >= 4


def test_the_page_of_the_command_line_has_its_commands_and_options() -> None:
    text = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    (commands,) = [action.choices for action in _parser()._actions if isinstance(action.choices, dict)]
    options = {
        option
        for parser in (_parser(), *commands.values())
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and option != "--help"
    }
    assert set(commands) <= set(re.findall(r"^\| `(\w+)` \|", text, re.M))
    assert options == set(re.findall(r"`(--[\w-]+)`", text))


# ---- how pages are made


def test_links_out_of_the_documents_are_led_on() -> None:
    text = (
        "[a](../tutorials/1.py) ![b](../benchmarks/results/p.png) [c](loss.md#x) [d](../CITATION.cff) [e](#here) "
        "[f](https://a.b/c) `[g](../tutorials/1.py)` [h](../absent.md)\n```\n[i](../tutorials/1.py)\n```\n"
    )
    places = {"tutorials/1.py": "tutorials/1.md", "benchmarks/results/p.png": "benchmarks/results/p.png"}
    places["docs/loss.md"] = "loss.md"
    led = tool("links").led(text, "docs/theory/a.md", "theory/a.md", {}, "https://r")
    assert led == text  # ../ is docs/ from there, which has none of these
    led = tool("links").led(text, "docs/a.md", "a.md", places, "https://r")
    assert led == (
        "[a](tutorials/1.md) ![b](benchmarks/results/p.png) [c](loss.md#x) [d](https://r/blob/main/CITATION.cff) "
        "[e](#here) [f](https://a.b/c) `[g](../tutorials/1.py)` [h](../absent.md)\n```\n[i](../tutorials/1.py)\n```\n"
    )


def test_a_block_that_no_test_runs_opens_as_all_others() -> None:
    text = "```python no-run\na\n```\n\n  ```python no-run\n  b\n  ```\n`python no-run`\n```text no-run\n```"
    shown = "```python\na\n```\n\n  ```python\n  b\n  ```\n`python no-run`\n```text no-run\n```"
    assert tool("links").shown(text) == shown


def test_a_tutorial_is_cut_where_its_cells_are(tmp_path: Path) -> None:
    tutorials = tool("tutorials")
    source = tmp_path / "1_x.py"
    source.write_text("# ---\n# %% [markdown]\n# # Title\n#\n# text\n\n# %%\na = 2\nprint(a)\n# %%\nprint(a * 3)\n")
    cells = tutorials.cells(source)
    assert [cell.is_text for cell in cells] == [True, False, False]
    printed = tutorials.run(source)
    assert list(printed.values()) == ["2\n", "6\n"]
    assert [source.read_text().splitlines()[line] for line in printed] == ["a = 2", "print(a * 3)"]
    page = tutorials.page(source, "https://r", "https://c")
    links = "[Open in Colab](https://c) · [Download the notebook](1_x.ipynb)"
    assert page.startswith(f"# Title\n\n{links}\n\ntext\n\n```python\na = 2\nprint(a)\n```")
    assert "```text" not in page  # nothing has been kept
    code = tutorials._code(cells[1], "2\npicture: x/y.png\n", source)
    assert code.endswith("```\n\n```text\n2\n```\n\n![what this cell draws](1_x/y.png)")


def test_the_table_of_settings_is_that_of_the_results(tmp_path: Path) -> None:
    choose = tool("choose")
    results = tmp_path / "learning.jsonl"
    rows = [("net", "backprop", 90.0, 2.0), ("net", "backprop", 91.0, 2.0), ("net", "backprop", 92.0, 2.0)]
    rows += [("net", "default", 90.5, 7.0), ("gpt", "backprop", 2.5, 1.0), ("gpt", "default", 2.25, 3.0)]
    line = '{{"row": "{}", "setting": "{}", "score": {}, "seconds": {}}}\n'
    results.write_text("".join(line.format(*row) for row in rows))
    table = choose.table(results).splitlines()
    assert table[0] == "| network and data | backprop | default | time |"
    assert table[2:] == ["| net | 91.0 | 90.5 (1) | 3.5 |", "| gpt | 2.500 (1) | 2.250 (1) | 3.0 |"]
    every = choose.every(results).splitlines()
    assert every[0] == "| setting | net | gpt |"
    assert every[2:] == ["| `backprop` | 91.0 | 2.500 (1) |", "| `default` | 90.5 (1) | 2.250 (1) |"]
    page = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    assert (
        choose.MARK in page
        and choose.EVERY in page
        and "| network and data | backprop | default |" in choose.filled(page)
    )
    assert all(f"*{name}*" in page for name in choose.SETTINGS.values() if name[0] not in "br")  # explained there


def test_the_tables_take_new_settings_seeds_that_ran_again_and_trainings_that_diverged(tmp_path: Path) -> None:
    choose = tool("choose")
    results = tmp_path / "learning.jsonl"
    rows = [("backprop", seed, 90.0) for seed in range(3)] + [("newest", 0, "NaN"), ("newest", 1, 80.0)]
    rows += [("backprop", 0, 93.0), ("strict-.1", 0, "NaN")]
    line = '{{"row": "net, data", "setting": "{}", "seed": {}, "score": {}, "seconds": 1}}\n'
    results.write_text("".join(line.format(*row) for row in rows))
    assert choose.table(results).splitlines()[2] == "| net, data | 91.0 |  |  | diverged |"
    assert choose.every(results).splitlines()[2:] == [
        "| `backprop` | 91.0 |",
        "| `strict-.1` | diverged |",
        "| `newest` | 80.0 (1), 1 diverged |",
    ]
    folded = [row for row in choose.filled(f"{choose.MARK}\n\n{choose.EVERY}\n").splitlines() if "`strict-auto`" in row]
    assert folded and folded[0].startswith("    | ")  # of the committed results, in no column of the first table


def test_every_picture_of_the_gallery_is_drawn_by_the_code_that_it_names() -> None:
    gallery = tool("gallery")
    pictures = [picture for section in gallery.SECTIONS.values() for picture in section]
    assert len({picture.place for picture in pictures}) == len(pictures) > 15
    tutorials = {path.stem for path in (ROOT / "tutorials").glob("*.py")}
    assert tutorials == {Path(picture.source).stem for picture in pictures if picture.source.startswith("tutorials/")}
    for picture in pictures:
        name = Path(picture.place).name
        source = (ROOT / picture.source).read_text(encoding="utf-8")
        assert name in source or picture.source.startswith("benchmarks/"), picture
        if picture.source.startswith("benchmarks/"):
            assert (ROOT / picture.place).exists(), picture
        if picture.source.startswith("website/"):
            assert (ROOT / "docs" / picture.place).exists(), picture


def test_a_picture_that_the_site_has_not_is_told() -> None:
    gallery = tool("gallery")
    text = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    page = gallery.filled(text, {"pictures/relaxation.svg"}, "https://r")
    assert "](pictures/relaxation.svg)" in page and page.count("![") == 1
    lines = [line for line in page.splitlines() if line.endswith("(Not drawn in this build.)")]
    assert len(lines) == sum(map(len, gallery.SECTIONS.values())) - 1
    assert "[`benchmarks/solvers.py`](https://r/blob/main/benchmarks/solvers.py)" in page


def test_a_formula_that_is_not_drawn_is_told(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("latex2mathml")
    formulas = tool("formulas")
    assert "<mfrac>" in formulas.drawn(r'a <span class="arithmatex">\(\frac{a}{b}\)</span>')
    assert not caplog.records
    formulas.drawn(r'<div class="arithmatex">\[\nocommand a\]</div>')
    assert "nocommand" in caplog.text


def test_the_roles_of_docstrings_are_known() -> None:
    """What website/roles.py does not know would stand on the page as it is."""
    known = {"class", "func", "meth", "attr", "mod", "data", "exc"}
    for path in (ROOT / "torch2ebm").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for text in (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)):
            assert set(re.findall(r"(?<![\w:]):([a-z]+):`", text or "")) <= known, path


# ---- the build, where the extra docs is installed


def built(folder: Path, source: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The environment may be another than that of the tests: TORCH2EBM_DOCS_PYTHON names its Python."""
    python = os.environ.get("TORCH2EBM_DOCS_PYTHON", sys.executable)
    needed = "import mkdocs, material, mkdocstrings, latex2mathml"
    if subprocess.run([python, "-c", needed], capture_output=True).returncode:
        pytest.skip("the extra docs is not installed")
    command = [python, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    done = built(tmp_path / "site")
    assert done.returncode == 0, done.stderr[-4000:]
    pages = {str(page.relative_to(tmp_path / "site")) for page in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "choose/index.html", "reference/model/index.html", "changelog/index.html"} <= pages
    assert {f"tutorials/{path.stem}/index.html" for path in (ROOT / "tutorials").glob("*.py")} <= pages
    names = {page.relative_to(ROOT / "docs").with_suffix("") for page in PAGES if page.stem != "index"}
    assert {f"{name}/index.html" for name in names} <= pages
    found = (tmp_path / "site" / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "torch2ebm.PredictiveCoding" in found
    formulas = (tmp_path / "site" / "theory" / "a" / "index.html").read_text(encoding="utf-8")
    assert "<math" in formulas and "arithmatex" not in formulas
    for page in pages - {"404.html"}:
        text = (tmp_path / "site" / page).read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]* (?:src|href)="(https?:[^"]*)"', text)
        assert loaded == [], page  # nothing comes from elsewhere
        assert not re.search(r"<(?:p|li)>\s*```", text), page  # a block that Markdown has not taken for one
        assert 'data-md-component="source"' not in text, page  # which would ask GitHub


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["[nowhere](absent.md)", "[no place](loss.md#absent)", "::: torch2ebm.Absent", "[up](../absent.py)"]
)
def test_a_broken_link_stops_the_build(line: str, tmp_path: Path) -> None:
    left = shutil.ignore_patterns(".git", ".venv*", "site", "*_output", "*cache*", "__pycache__", "tests")
    shutil.copytree(ROOT, tmp_path / "source", ignore=left)
    page = tmp_path / "source" / "docs" / "start.md"
    page.write_text(page.read_text(encoding="utf-8") + f"\n\n{line}\n", encoding="utf-8")
    done = built(tmp_path / "site", tmp_path / "source")
    assert done.returncode != 0 and "absent" in done.stderr.lower()
