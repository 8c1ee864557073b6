"""The wings of the package, and the one direction of the imports between them and inside of them."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import torch2ebm

PACKAGE = Path(torch2ebm.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "extending.md"

# Each wing may import itself and what stands before it.
WINGS = (
    "errors",
    "common",
    "theory",
    "isolation",
    "capture",
    "graph",
    "memory",
    "engine",
    "potentials",
    "loss",
    "programs",
    "inference",
    "solvers",
    "equilibrium",
    "implicit",
    "clamping",
    "algorithms",
    "reports",
    "pages",
    "analysis",
    "model",
    "diagnosis",
    "wrapper",
)
STRANGERS = ({"solvers", "equilibrium", "implicit"}, {"algorithms", "reports"})  # none of these imports another
ROOMS = 15  # files in a wing that has become too large

MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imported(source: str) -> Iterator[str]:
    """The package's own modules that a file imports, wherever in the file, without the leading ``torch2ebm.``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch2ebm":
            inside = node.module.removeprefix("torch2ebm").removeprefix(".")
            for alias in node.names:
                whole = f"{inside}.{alias.name}".removeprefix(".")
                yield whole if whole in MODULES else inside
        elif isinstance(node, ast.Import):
            yield from (
                name.name.removeprefix("torch2ebm.") for name in node.names if name.name.startswith("torch2ebm")
            )


def wing_of(module: str) -> str:
    return module.split(".")[0]


def against_the_arrows(module: str, source: str) -> list[str]:
    """What a file imports and may not."""
    own = wing_of(module)
    if own not in WINGS:  # at the top: may import everything
        return []
    before = set(WINGS[: WINGS.index(own) + 1])
    for group in STRANGERS:
        before -= group - {own} if own in group else set()
    return [each for each in imported(source) if wing_of(each) not in before]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    assert against_the_arrows(module, MODULES[module].read_text()) == []


def test_an_import_against_the_arrows_is_seen() -> None:
    """The negative twins: upwards, between strangers, inside a function, and of the public face."""
    assert against_the_arrows("graph.build", "from torch2ebm.engine.call import Call") == ["engine.call"]
    assert against_the_arrows("solvers.momentum", "import torch2ebm.equilibrium.updates") == ["equilibrium.updates"]
    assert against_the_arrows("loss.tape", "def late():\n    from torch2ebm.model import backward") == [
        "model.backward"
    ]
    assert against_the_arrows("common.rows", "from torch2ebm import convert") == [""]
    assert against_the_arrows("model.backward", "from torch2ebm.graph.energy_graph import Node") == []


def test_no_circle() -> None:
    imports = {
        module: {each for each in imported(path.read_text()) if each in MODULES} for module, path in MODULES.items()
    }
    TopologicalSorter(imports).prepare()
    with pytest.raises(CycleError):
        TopologicalSorter({**imports, "errors": {"model.backward"}}).prepare()


def table() -> str:
    """The wings in their order, by what they say of themselves."""
    rows = []
    for wing in WINGS[1:]:  # behind `errors`, which is a file
        said = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text())) or ""
        purpose, may_import = (" ".join(part.split()).removesuffix(".") for part in said.split("May import "))
        rows.append(f"| `{wing}` | {purpose} | {may_import} |")
    return "\n".join(rows)


def test_the_page_for_contributors_has_this_table_of_the_wings() -> None:
    assert table() in PAGE.read_text(), f"docs/extending.md needs this table:\n{table()}"


def test_every_folder_is_a_wing_of_few_rooms_that_says_what_it_is_for() -> None:
    folders = {path.parent.name for path in MODULES.values() if path.parent != PACKAGE}
    assert folders == set(WINGS) - {"errors"}
    for folder in folders:
        assert len(list((PACKAGE / folder).glob("*.py"))) <= ROOMS
        said = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text()))
        assert said is not None and "May import" in said, folder
