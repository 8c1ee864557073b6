"""What the files around the package say of it agrees: workflows, recipe, extras, links, changelog."""

import ast
import re
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEXTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "torch2ebm").rglob("*.py")]
ACTION = re.compile(r"(actions|pypa)/[\w-]+@[\w./-]+|[\w.-]+/[\w.-]+@[0-9a-f]{40}")
ADDRESS = re.compile(r"https://(?:github\.com/torch2ebm|torch2ebm\.github\.io)[\w./-]*")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def setup() -> ConfigParser:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    return settings


def lines(settings: ConfigParser, section: str, option: str) -> list[str]:
    return settings[section][option].split("\n")[1:]


def pythons(settings: ConfigParser) -> list[str]:
    said = (
        line.removeprefix("Programming Language :: Python :: ") for line in lines(settings, "metadata", "classifiers")
    )
    return [version for version in said if re.fullmatch(r"3\.\d+", version)]


# ---- workflows


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_few_rights_limits_and_known_actions(path: Path) -> None:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert found["permissions"] == {}  # each job asks for its own
    for name, job in found["jobs"].items():
        assert job["permissions"], name
        assert 0 < job["timeout-minutes"] <= 90
        assert set([job["needs"]] if "needs" in job else []) <= found["jobs"].keys()
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            if "uses" in step:
                assert ACTION.fullmatch(step["uses"]), step
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_the_actions_that_are_refused() -> None:
    """The negative twin: somebody else's action needs a hash."""
    assert not ACTION.fullmatch("somebody/action@v1") and not ACTION.fullmatch("actions/checkout")
    assert ACTION.fullmatch("somebody/action@" + "0" * 40)


def test_what_the_workflows_make_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+)(?: [a-z-]+)*:", (ROOT / "Makefile").read_text(), re.M))
    targets |= {"test-all"}  # shares its line with another
    used = {name for path in WORKFLOWS for name in re.findall(r"run: make ([\w-]+)", path.read_text())}
    assert used and used <= targets


def test_the_matrix_has_every_python_that_the_package_promises(setup: ConfigParser) -> None:
    matrix = read(".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == pythons(setup)
    assert setup["options"]["python_requires"] == f">={matrix['python'][0]}"
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    left = {
        (system, python, torch)
        for system in matrix["os"]
        for python in matrix["python"]
        for torch in matrix["torch"]
        if not any(
            excluded.items() <= {"os": system, "python": python, "torch": torch}.items()
            for excluded in matrix["exclude"]
        )
    }
    assert {(system, python, "newest") for system in matrix["os"] for python in matrix["python"]} <= left
    assert all((system, matrix["python"][0], "oldest") in left for system in matrix["os"])


def test_the_oldest_torch_is_the_one_that_is_required(setup: ConfigParser) -> None:
    (required,) = [line for line in lines(setup, "options", "install_requires") if line.startswith("torch")]
    oldest = required.removeprefix("torch>=")
    assert f"torch=={oldest}.0" in (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert f"torch=={oldest}.0" in (ROOT / "Makefile").read_text()


def test_only_the_release_may_publish_and_it_holds_no_token() -> None:
    release = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert "secrets." not in release and "password" not in release
    jobs = yaml.safe_load(release)["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and jobs["publish"]["environment"]["name"] == "pypi"
    assert jobs["build"]["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_the_files_of_the_platform_are_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


# ---- packages


def test_the_recipe_asks_for_what_the_package_asks_for(setup: ConfigParser) -> None:
    recipe = read("recipe/recipe.yaml")
    assert recipe["context"]["version"] == setup["metadata"]["version"]
    assert f">={recipe['context']['python_min']}" == setup["options"]["python_requires"]
    asked = {line.replace(" ", "").replace("pytorch", "torch") for line in recipe["requirements"]["run"]}
    asked.remove("python>=${{python_min}}")
    assert asked == set(lines(setup, "options", "install_requires"))
    assert recipe["build"]["python"]["entry_points"] == lines(setup, "options.entry_points", "console_scripts")
    assert recipe["about"]["summary"] == setup["metadata"]["description"]
    assert recipe["about"]["license"] == setup["metadata"]["license_expression"]


def test_every_extra_that_is_named_exists(setup: ConfigParser) -> None:
    named = {
        extra
        for path in TEXTS
        for group in re.findall(r"pip install [\"']?torch2ebm\[([a-z,]+)\]", path.read_text(encoding="utf-8"))
        for extra in group.split(",")
    }
    for path in (ROOT / "torch2ebm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "require" and len(node.args) == 2:
                extra = node.args[1]
                assert isinstance(extra, ast.Constant), ast.unparse(node)
                named.add(extra.value)
    assert {"demo", "plot", "ode"} <= named <= set(setup["options.extras_require"])


def test_every_address_of_the_project_begins_as_in_setup(setup: ConfigParser) -> None:
    urls = dict(line.split(" = ") for line in lines(setup, "metadata", "project_urls"))
    assert setup["metadata"]["url"] == urls["Source"]
    homes = (urls["Source"], urls["Documentation"].removesuffix("/"))
    files = [*TEXTS, ROOT / "recipe" / "recipe.yaml", *(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff"]
    found = {address for path in files for address in ADDRESS.findall(path.read_text(encoding="utf-8"))}
    assert found and all(address.startswith(homes) for address in found)


# ---- words


def test_a_change_that_breaks_says_before_and_after() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- (BREAKING.*(?:\n  .*)*)", text, re.M)
    assert entries
    assert [entry for entry in entries if not ("  - Before: " in entry and "  - After" in entry)] == []
