"""The tutorials as pages. ``python website/tutorials.py`` runs those that have changed, and keeps what comes out.

A tutorial that has not been run is a page of its text and code.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "tutorial_output" / "site"
CELL = re.compile(r"^# %%(?P<kind>.*)\n", re.M)
PICTURE = re.compile(r"^picture: (?P<path>.*)$", re.M)
SHOWN = 4000  # characters of what a cell prints


@dataclass(frozen=True)
class Cell:
    """A piece of a tutorial: its text or code, and the line on which it begins."""

    is_text: bool
    content: str
    line: int


def scripts() -> list[Path]:
    return sorted((ROOT / "tutorials").glob("*.py"), key=lambda path: int(path.stem.split("_")[0]))


def cells(path: Path) -> list[Cell]:
    source = path.read_text(encoding="utf-8")
    starts = [*CELL.finditer(source)]
    ends = [*(start.start() for start in starts[1:]), len(source)]
    return [
        Cell("[markdown]" in start["kind"], source[start.end() : end], source.count("\n", 0, start.end()))
        for start, end in zip(starts, ends, strict=True)
    ]


def page(path: Path, repository: str, colab: str) -> str:
    """The tutorial in Markdown, with what it printed and drew when it was run.

    Args:
        path: Its script.
        repository: The address of the sources.
        colab: The address at which Colab opens its notebook.
    """
    kept = outputs(path)
    parts = [text(cell) if cell.is_text else _code(cell, kept.get(cell.line, ""), path) for cell in cells(path)]
    title, *below = parts[0].split("\n", 1)
    links = f"[Open in Colab]({colab}) · [Download the notebook]({path.stem}.ipynb)"
    address = f"{repository}/blob/main/tutorials/{path.name}"
    end = f"This page is made from [`tutorials/{path.name}`]({address})."
    return "\n\n".join([title, links, *(part.strip("\n") for part in below), *parts[1:], "---", end])


def pictures(path: Path) -> Sequence[Path]:
    return sorted(folder(path).glob("*.png"))


def text(cell: Cell) -> str:
    return "\n".join(re.sub(r"^# ?", "", line) for line in cell.content.strip().splitlines())


def _code(cell: Cell, output: str, path: Path) -> str:
    shown = f"```python\n{cell.content.strip()}\n```"
    drawn = [Path(match["path"]).name for match in PICTURE.finditer(output)]
    printed = PICTURE.sub("", output).strip("\n")
    if len(printed) > SHOWN:
        printed = printed[:SHOWN] + "\n..."
    if printed.strip():
        shown += f"\n\n```text\n{printed}\n```"
    return shown + "".join(f"\n\n![what this cell draws]({path.stem}/{name})" for name in drawn)


def folder(path: Path) -> Path:
    """Named after the text, so that a tutorial that has changed has not been run."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return KEPT / f"{path.stem}-{digest}"


def outputs(path: Path) -> dict[int, str]:
    kept = folder(path) / "printed.json"
    if not kept.exists():
        return {}
    return {int(line): output for line, output in json.loads(kept.read_text(encoding="utf-8")).items()}


def run(path: Path) -> dict[int, str]:
    """What each cell prints, in one namespace; pictures go where ``TUTORIAL_OUTPUT`` says."""
    namespace = {"__name__": "__main__", "__file__": str(path)}
    printed = {}
    for cell in cells(path):
        if not cell.is_text:
            with redirect_stdout(io.StringIO()) as output:
                exec(compile("\n" * cell.line + cell.content, str(path), "exec"), namespace)
            printed[cell.line] = output.getvalue()
    return printed


def main(arguments: Sequence[str]) -> None:
    if arguments:
        path = Path(arguments[0])
        printed = run(path)
        (folder(path) / "printed.json").write_text(json.dumps(printed, indent=1), encoding="utf-8")
        return
    for path in scripts():
        if not outputs(path):
            print("running", path.name, flush=True)
            folder(path).mkdir(parents=True, exist_ok=True)
            environment = {**os.environ, "TUTORIAL_OUTPUT": str(folder(path))}
            subprocess.run([sys.executable, __file__, str(path)], cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
