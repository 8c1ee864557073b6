"""The tutorials as notebooks (nbformat 4.5), with what each cell printed and drew when the site was built.

A tutorial that has not been run is a notebook without outputs. ``python website/notebooks.py FOLDER`` writes them all.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tutorials

# From the repository and not from the registry: a notebook of this site needs the package of this site.
INSTALL = '%pip install -q "torch2ebm[tutorials] @ git+https://github.com/torch2ebm/torch2ebm"'
INSTALL_CELL = f"# Installs torch2ebm and what the tutorials need. Leave it out where you have both.\n{INSTALL}"
WIDTH = 760  # of a picture at most, as the scripts show it
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
COLAB = "https://colab.research.google.com/github"
BRANCH = "notebooks"  # where .github/workflows/docs.yml puts them: Colab opens what stands in a branch


def colab(path: Path, repository: str) -> str:
    """The address at which Colab opens the notebook of a tutorial."""
    return f"{COLAB}/{repository.removeprefix('https://github.com/')}/blob/{BRANCH}/{path.stem}.ipynb"


def notebook(path: Path) -> str:
    """The notebook of a tutorial, as the text of its file."""
    outputs = tutorials.outputs(path)
    cells = [_code("install", INSTALL_CELL, None, [])]
    count = 0
    for number, cell in enumerate(tutorials.cells(path)):
        if cell.is_text:
            cells.append(_cell("markdown", f"text-{number}", tutorials.text(cell)))
            continue
        count += 1
        shown = [*_outputs(outputs[cell.line], path)] if cell.line in outputs else []
        cells.append(_code(f"code-{number}", cell.content.strip(), count if outputs else None, shown))
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _cell(kind: str, name: str, source: str) -> dict[str, Any]:
    return {"cell_type": kind, "id": name, "metadata": {}, "source": source.splitlines(keepends=True)}


def _code(name: str, source: str, count: int | None, outputs: list[dict[str, Any]]) -> dict[str, Any]:
    return {**_cell("code", name, source), "execution_count": count, "outputs": outputs}


def _outputs(printed: str, path: Path) -> Iterator[dict[str, Any]]:
    """What a cell printed, and in its place each picture whose file it named."""
    before = 0
    for match in tutorials.PICTURE.finditer(printed):
        yield from _stream(printed[before : match.start()])
        yield _picture(tutorials.folder(path) / Path(match["path"]).name)
        before = match.end() + 1
    yield from _stream(printed[before:])


def _stream(text: str) -> Iterator[dict[str, Any]]:
    if text.strip():
        yield {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}


def _picture(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    width = min(WIDTH, int.from_bytes(content[16:20], "big"))  # where a PNG has it
    data = {"image/png": base64.b64encode(content).decode(), "text/plain": ["<picture>"]}
    return {"output_type": "display_data", "data": data, "metadata": {"image/png": {"width": width}}}


def main(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in tutorials.scripts():
        (target / f"{path.stem}.ipynb").write_text(notebook(path), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
