"""How doctests are collected: the example of a method goes on from the example of its class."""

import doctest

import pytest
from _pytest.doctest import DoctestItem


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
