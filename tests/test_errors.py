"""Every error class has a row in docs/errors.md, and every row is a class."""

import inspect
import pickle
import re
from pathlib import Path

import pytest

from torch2ebm import errors

PAGE = Path(__file__).parent.parent / "docs" / "errors.md"
CLASSES = {
    name: found
    for name, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, BaseException) and found.__module__ == errors.__name__
}


def rows() -> dict[str, list[str]]:
    """From the class that a row begins with to its cells."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = {re.match(r"`(\w+)`", row[0])[1]: row for row in cells}
    assert len(found) == len(lines)
    return found


def test_the_page_has_one_row_a_class_with_cause_and_cure() -> None:
    listed = rows()
    assert listed.keys() == CLASSES.keys()
    assert [name for name, cells in listed.items() if len(cells) != 3 or not all(cells)] == []


@pytest.mark.parametrize("name", sorted(name for name, found in CLASSES.items() if not issubclass(found, Warning)))
def test_every_error_belongs_to_a_family_and_survives_another_process(name: str) -> None:
    found = CLASSES[name]
    assert issubclass(found, errors.Torch2EBMError)
    error = found("here", "this", "that", "Do so.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is found and str(again) == str(error) == "here: got this; expected that. Do so."
    assert (again.where, again.got, again.expected, again.remedy) == ("here", "this", "that", "Do so.")
