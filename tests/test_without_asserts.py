"""``python -OO`` takes asserts and docstrings out: everything computes and refuses as before."""

import ast
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

import torch2ebm

PACKAGE = Path(torch2ebm.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}


def meaningful(source: str, properties: set[str]) -> Iterator[int]:
    """Lines of asserts that do more than tell the type checker what a name or a plain attribute holds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert) and not _only_for_types(node.test, properties):
            yield node.lineno


def _only_for_types(test: ast.expr, properties: set[str]) -> bool:
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return all(_only_for_types(each, properties) for each in test.values)
    if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id in ("isinstance", "callable"):
        return all(_is_plain(each, properties) for each in test.args)
    if isinstance(test, ast.Compare) and [type(each) for each in test.ops] == [ast.IsNot]:
        of_none = isinstance(test.comparators[0], ast.Constant) and test.comparators[0].value is None
        return of_none and _is_plain(test.left, properties)
    return False


def _is_plain(found: ast.expr, properties: set[str]) -> bool:
    """Whether reading it runs no code of anybody's."""
    if isinstance(found, ast.Attribute):
        return found.attr not in properties and _is_plain(found.value, properties)
    return isinstance(found, ast.Name)


def properties_of(sources: list[str]) -> set[str]:
    """The names of all properties."""
    return {
        node.name
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(each, ast.Name) and each.id == "property" for each in node.decorator_list)
    }


PROPERTIES = properties_of([path.read_text() for path in SOURCES.values()]) & {"graph", "state", "nodes", "made"}


@pytest.mark.parametrize("name", SOURCES)
def test_no_assert_carries_meaning(name: str) -> None:
    assert list(meaningful(SOURCES[name].read_text(), PROPERTIES)) == []


MEANINGFUL = ("f()", "x > 0", "self.graph is not None", "isinstance(f(), int)", "x", "(y := 1) is not None")


@pytest.mark.parametrize("test", MEANINGFUL)
def test_an_assert_that_carries_meaning_is_seen(test: str) -> None:
    assert list(meaningful(f"assert {test}", {"graph"})) == [1]
    assert list(meaningful("assert self.records is not None and isinstance(x, int)", {"graph"})) == []


SMOKE = """
import sys, tempfile, pathlib, warnings
import torch, torch2ebm
import torch.nn.functional as F
from torch import nn
from torch2ebm import errors

torch.set_num_threads(1)
X, LABELS = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6), torch.tensor([0, 1, 2, 0])

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()

CODING = torch2ebm.PredictiveCoding
ALGORITHMS = [
    torch2ebm.Backprop(), torch2ebm.ZeroDivergence(), torch2ebm.FixedPrediction(4, 0.1), CODING(4, 0.1),
    CODING(solver=torch2ebm.ErrorDescent(4)), torch2ebm.IncrementalPredictiveCoding(4, 0.02),
    torch2ebm.ProximalInferenceLearning(0.1), torch2ebm.ImplicitSGD(0.1), torch2ebm.ContrastiveHebbian(),
    torch2ebm.EquilibriumPropagation(feedback=0.3), torch2ebm.CoupledLearning(feedback=0.1),
    torch2ebm.RecurrentBackprop(feedback=0.3),
]

def refused(kind, function):
    try:
        function()
    except kind as error:
        return
    raise SystemExit(f"{kind.__name__} was not raised")

for algorithm in ALGORITHMS:
    module = net()
    model = torch2ebm.convert(module)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(module.parameters(), lr=0.05), model, algorithm)
    refused(errors.NotCapturedError, lambda: model.captured_by)
    refused(errors.NoStateError, lambda: model.state)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(X)
        F.mse_loss(output, F.one_hot(LABELS, 3).double()).backward()
        optimizer.step()
    print(type(algorithm).__name__, repr([float(p.detach().sum()) for p in module.parameters()]))
    refused(errors.UnknownNameError, lambda: model.state.error["no such"])
    refused(errors.AttachmentError, lambda: torch2ebm.EnergyOptimizer(optimizer.optimizer, model, algorithm))
    refused(errors.CheckpointError, lambda: optimizer.load_state_dict({"torch2ebm": 3}))
    repr(model.state), repr(model.graph), model.summary(), torch2ebm.check(module, X)

refused(errors.UnknownSettingError, lambda: CODING(T=3))
refused(errors.ConfigurationError, lambda: CODING(steps=0))
refused(errors.ConfigurationError, lambda: torch2ebm.convert(net(), nodes=["no such"]))
refused(errors.ConfigurationError, lambda: torch2ebm.read_idx("/dev/null"))
print(torch2ebm.compare(net(), F.cross_entropy, (X, LABELS), ALGORITHMS[1:3]).table())
from torch2ebm.cli import main
for code, argv in ((0, ["--help"]), (2, []), (2, ["graph", "nowhere:net", "--input-shape", "4,6"])):
    if main(argv) != code:
        raise SystemExit(f"{argv} returned another code")
"""


@pytest.mark.slow
def test_without_asserts_and_docstrings_the_numbers_and_the_refusals_are_the_same() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-OO", "-W", "error", "-c", SMOKE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    threads, plain = torch.get_num_threads(), io.StringIO()
    try:
        with redirect_stdout(plain), redirect_stderr(io.StringIO()):
            exec(SMOKE, {"__name__": "smoke"})
    finally:
        torch.set_num_threads(threads)
    assert "IncrementalPredictiveCoding [" in plain.getvalue()
    assert done.stdout.split("usage:")[0] == plain.getvalue().split("usage:")[0]
