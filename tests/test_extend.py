"""The door for extensions: what it offers is documented, and the page about it needs nothing else."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from torch2ebm import extend

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
MAY_IMPORT = {"dataclasses", "pickle", "torch", "torch.nn", "torch2ebm", "torch2ebm.extend"}
# What is subclassed, and what an extension is handed and calls: complete to the last argument of the last method.
CONTRACTS = ("Algorithm", "Solver", "ValueSolver", "ErrorSolver", "Energy", "Nudging", "Update", "LinearSolver")
CALLED = ("Call", "NodePass", "ValueInference", "ErrorInference", "OutputLoss", "LocalGradients", "GradientSum")
FUNCTIONS = [name for name in extend.__all__ if inspect.isfunction(getattr(extend, name))]


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties, inherited ones too."""
    for name, attribute in inspect.getmembers(kind):
        if not name.startswith("_") and (inspect.isfunction(attribute) or isinstance(attribute, property)):
            yield name, attribute


def arguments(function: Any) -> list[str]:
    if isinstance(function, property):
        return []
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("name", extend.__all__)
def test_every_name_is_there_and_says_what_it_is(name: str) -> None:
    offered = getattr(extend, name)
    assert offered.__doc__ and not offered.__doc__.startswith(f"{name}(")  # a dataclass writes its own signature
    assert f"`{name}`" in extend.__doc__, "the table leaves it out"


def test_nothing_is_offered_beside_these_names() -> None:
    public = {name for name in vars(extend) if not name.startswith("_")}
    assert public == set(extend.__all__)


@pytest.mark.parametrize("name", [*CONTRACTS, *CALLED])
def test_every_method_of_a_contract_explains_each_argument_its_result_and_an_example(name: str) -> None:
    kind = getattr(extend, name)
    assert ">>>" in kind.__doc__
    for method, function in methods(kind):
        said = inspect.getdoc(function) or ""
        assert [each for each in arguments(function) if f"    {each}: " not in said] == [], method
        assert ">>>" in said, method
        returned = None if isinstance(function, property) else inspect.signature(function).return_annotation
        assert returned in (None, "None") or re.search("^(Returns|Yields):$", said, re.M), method


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_explains_each_argument_and_an_example(name: str) -> None:
    said = inspect.getdoc(getattr(extend, name)) or ""
    assert [each for each in arguments(getattr(extend, name)) if f"    {each}: " not in said] == []
    assert ">>>" in said


def test_all_that_is_offered_is_typed() -> None:
    for name in extend.__all__:
        offered = getattr(extend, name)
        functions = [offered] if inspect.isfunction(offered) else [f for _, f in methods(offered)]
        for function in functions:
            if inspect.isfunction(function):
                signature = inspect.signature(function)
                bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
                assert bare == [], (name, function)
                assert signature.return_annotation is not signature.empty, (name, function)


def imports(page: str) -> set[str]:
    """The modules that the Python blocks of a page import from."""
    found = set[str]()
    for block in re.findall(r"^```python[^\n]*\n(.*?)^```", page, re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                found |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module or "")
    return found


def test_the_page_imports_from_the_door_alone() -> None:
    assert "torch2ebm.extend" in imports(PAGE.read_text())
    assert imports(PAGE.read_text()) <= MAY_IMPORT


def test_an_import_of_an_inner_module_would_be_seen() -> None:
    assert imports("```python\nfrom torch2ebm.engine.call import Call\n```\n") == {"torch2ebm.engine.call"}
