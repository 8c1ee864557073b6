"""How doctests are collected, and how calls are checked in the tests of capture.

The example of a method goes on from the example of its class.
"""

import doctest
from pathlib import Path

import pytest
from _pytest.doctest import DoctestItem

CHECKED = Path(__file__).parent / "tests" / "capture"


@pytest.fixture(autouse=True)
def _calls_held_against_the_module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second call of an attached model is held against the plain module, as ``check_every=2`` does."""
    if request.path.parent == CHECKED:
        from torch2ebm.model.conversion import Conversion

        monkeypatch.setattr(Conversion, "check_every_by_default", 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, DoctestItem):
            _begin_with_the_class(item.dtest)


def _begin_with_the_class(test: doctest.DocTest) -> None:
    owner, _, method = test.name.removeprefix(f"{test.globs['__name__']}.").rpartition(".")
    said = getattr(test.globs.get(owner), "__doc__", None)
    if not (method and said and test.docstring):
        return
    test.docstring = f"{said}\n\n{test.docstring}"
    test.examples = doctest.DocTestParser().get_examples(test.docstring)
    if test.lineno is not None:
        test.lineno -= said.count("\n") + 2
