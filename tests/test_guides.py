"""The pages for people who come from another library: every example has its block, and our lines are counted."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("from_*.md"))
ROW = re.compile(r"^\| `(?P<name>\w+)`[^|]*\| (?P<theirs>\d+) \| (?P<ours>\d+) \|$", re.M)
SECTION = re.compile(r"^### `(?P<name>\w+)`\n(?P<body>.*?)(?=^##|\Z)", re.M | re.S)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def lines(body: str) -> int:
    """Lines with code in all blocks, without imports and comments."""
    code = [line.strip() for block in BLOCK.findall(body) for line in block.splitlines()]
    return sum(1 for line in code if line and not line.startswith(("#", "import ", "from ")))


def test_the_lines_of_a_body_are_counted() -> None:
    body = "text\n```python\nimport torch\n\n# a comment\na = 1\nif a:\n    b = 2\n```\n```\nno code\n```\n"
    assert lines(body) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_example_of_theirs_has_a_block_of_ours_of_so_many_lines(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    told = {row["name"]: int(row["ours"]) for row in ROW.finditer(text)}
    assert told == {section["name"]: lines(section["body"]) for section in SECTION.finditer(text)}
    assert told and all(int(row["theirs"]) > 0 for row in ROW.finditer(text))
