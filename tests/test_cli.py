"""The command line: what it prints, what it writes, and that a mistake is one message and exit code 2."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import needs_processes

from torch2ebm.cli import main
from torch2ebm.demo import DigitNet

pytest.importorskip("matplotlib")
from matplotlib import image

MODELS = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.embedding(x))

class Fixed(nn.Module):
    def forward(self, x):
        return x.tanh()

made = net()
number = 3

def broken():
    raise KeyError("no weights here")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's own, with models in it, as the working directory."""
    (tmp_path / "users_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "users_models", raising=False)
    return tmp_path


def angles(table: str) -> dict[tuple[str, str], str]:
    """(parameter, algorithm) to the text of the angle."""
    rows = [line.split() for line in table.splitlines()]
    return {(row[0], row[1]): row[3] for row in rows if len(row) == 7 and row[6].endswith("%")}


def pictures(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.png") if image.imread(p)[..., :3].std() > 0.02)


def test_demo_prints_accuracies_and_exact_gradients_and_writes_three_pictures(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    parameters = len(list(DigitNet().parameters()))
    before = torch.random.get_rng_state()
    assert main(["demo", "--epochs", "1", "--output", "pictures", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert pictures(folder / "pictures") == ["angles.png", "energy.png", "errors.png"]
    rows = [line.split() for line in printed.splitlines()]
    accuracies = {row[0]: float(row[1].rstrip("%")) for row in rows if len(row) == 2 and row[1].endswith("%")}
    assert accuracies.keys() == {"backpropagation", "ZeroDivergence", "PredictiveCoding"}
    assert min(accuracies.values()) > 30  # one epoch; by chance 10
    exact = [angle for (_, algorithm), angle in angles(printed).items() if algorithm == "ZeroDivergence"]
    assert exact == ["0.00"] * (parameters + 1)  # each of them, and all
    assert f"Report, to open in a browser: {Path('pictures', 'report.html')}" in printed
    page = (folder / "pictures" / "report.html").read_text(encoding="utf-8")
    own = {name: angle for (name, algorithm), angle in angles(printed).items() if algorithm == "PredictiveCoding"}
    assert len(own) == parameters + 1 and all(f">{angle}</span></td>" in page for angle in own.values())
    assert torch.equal(before, torch.random.get_rng_state())


FAILS_ON_RANK_1 = """
import os, sys
from torch2ebm import cli, demo

def full(*arguments):
    raise OSError("the disk is full")

if os.environ["RANK"] == "1":
    demo.train = full
sys.exit(cli.main(sys.argv[1:]))
"""


def torchrun(*argv: str) -> subprocess.CompletedProcess[str]:
    """Two processes; ``--standalone`` has them meet at a free port. The limit is below the demo's own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *argv]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)


@pytest.mark.slow
@needs_processes
def test_demo_under_torchrun_trains_together_and_reports_once(folder: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    done = torchrun("-m", "torch2ebm", "demo", "--epochs", "2")
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    accuracies = [float(row[1].rstrip("%")) for row in rows if len(row) == 2 and row[1].endswith("%")]
    assert len(accuracies) == 3 and min(accuracies) > 30  # two epochs; by chance 10
    assert done.stdout.count("Test accuracy") == done.stdout.count("Pictures: ") == 1
    assert done.stderr.count("| 0/2 [") == 3  # one progress bar a training
    assert pictures(folder / "demo_output") == ["angles.png", "energy.png", "errors.png"]


@pytest.mark.slow
@needs_processes
def test_demo_under_torchrun_ends_where_one_process_fails(folder: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    (folder / "fails.py").write_text(FAILS_ON_RANK_1)
    done = torchrun("fails.py", "demo", "--epochs", "1")
    assert done.returncode != 0
    assert "torch2ebm: the disk is full" in done.stderr
    assert "Test accuracy" not in done.stdout and pictures(folder / "demo_output") == []


@pytest.mark.slow
def test_demo_as_a_user_runs_it_learns_the_digits(folder: Path) -> None:
    command = [sys.executable, "-m", "torch2ebm", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    accuracies = [float(row[1].rstrip("%")) for row in rows if len(row) == 2 and row[1].endswith("%")]
    assert len(accuracies) == 3
    assert min(accuracies) >= 95
    assert (folder / "demo_output" / "report.html").is_file()
    assert pictures(folder / "demo_output") == ["angles.png", "energy.png", "errors.png"]


@pytest.mark.parametrize("factory", ["users_models:net", "users_models:made"])
def test_compare_prints_the_table_and_writes_the_picture(
    factory: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", factory, "--input-shape", "4,6", "--double", "--output", "angles.png"]) == 0
    found = angles(capsys.readouterr().out)
    assert found[("0.weight", "ZeroDivergence")] == "0.00"
    assert found[("0.weight", "FixedPrediction")] == "0.00"
    assert float(found[("0.weight", "PredictiveCoding")]) > 0
    assert pictures(folder) == ["angles.png"]


def test_compare_writes_a_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "users_models:net", "--input-shape", "4,6", "--html", "page.html"]) == 0
    printed = capsys.readouterr().out
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert "Page: page.html" in printed and len(angles(printed)) == 15
    assert all(f">{angle}</span></td>" in page for angle in angles(printed).values())
    assert main(["compare", "users_models:net", "--input-shape", "4,6", "--html", "absent/page.html"]) == 2
    assert "absent" in capsys.readouterr().err


def test_compare_takes_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "users_models:Words", "--input-shape", "3,7", "--input-dtype", "int64", "--double"]) == 0
    assert angles(capsys.readouterr().out)[("embedding.weight", "ZeroDivergence")] == "0.00"


def test_graph_prints_the_nodes_and_draws_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "users_models:net", "--input-shape", "4,6"]) == 0
    printed = capsys.readouterr().out
    assert "Linear > Tanh" in printed
    assert "graph.png" in printed
    assert pictures(folder) == ["graph.png"]


def test_graph_collapses_modules_deeper_than_it_is_told(folder: Path) -> None:
    command = ["graph", "users_models:net", "--input-shape", "4,6", "--output", "graph.dot", "--depth"]
    assert main([*command, "1"]) == 0
    every = (folder / "graph.dot").read_text()
    assert main([*command, "0"]) == 0
    assert "Sequential, " not in every and "nodes\\n(4, " in (folder / "graph.dot").read_text()
    assert main([*command, "-1"]) == 2


def test_graph_cuts_where_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "users_models:net", "--input-shape", "4,6", "--nodes", "op"]) == 0
    assert "Linear > Tanh" not in capsys.readouterr().out


MISTAKES = {
    "no colon": (["graph", "users_models", "--input-shape", "4,6"], "module:name"),
    "no module": (["graph", "no_such_module:net", "--input-shape", "4,6"], "No module named 'no_such_module'"),
    "no attribute": (["graph", "users_models:nothing", "--input-shape", "4,6"], "nothing"),
    "not a module": (["graph", "users_models:number", "--input-shape", "4,6"], "a int"),
    "factory fails": (["graph", "users_models:broken", "--input-shape", "4,6"], "no weights here"),
    "wrong shape": (["graph", "users_models:net", "--input-shape", "4,7"], "(4, 7)"),
    "wrong shape to compare": (["compare", "users_models:net", "--input-shape", "4,7"], "(4, 7)"),
    "no shape": (["compare", "users_models:net"], "--input-shape"),
    "shape of words": (["compare", "users_models:net", "--input-shape", "four,6"], "'four'"),
    "shape of zero": (["compare", "users_models:net", "--input-shape", "0,6"], "'0'"),
    "dtype": (["compare", "users_models:net", "--input-shape", "4,6", "--input-dtype", "int8"], "int8"),
    "nothing to learn": (["graph", "users_models:Fixed", "--input-shape", "4,6"], "Fixed"),
    "unknown node": (["graph", "users_models:net", "--input-shape", "4,6", "--nodes", "nix"], "nix"),
    "too many classes": (["compare", "users_models:net", "--input-shape", "4,6", "--classes", "9"], "--classes"),
    "step size": (["compare", "users_models:net", "--input-shape", "4,6", "--lr", "0"], "lr"),
    "step size to diagnose": (["diagnose", "users_models:net", "--input-shape", "4,6", "--lr", "-1"], "lr"),
    "wrong shape to diagnose": (["diagnose", "users_models:net", "--input-shape", "4,7"], "(4, 7)"),
    "nothing to diagnose": (["diagnose", "users_models:Fixed", "--input-shape", "4,6"], "Fixed"),
    "no folder": (["graph", "users_models:net", "--input-shape", "4,6", "--output", "no/such.png"], "no/such.png"),
    "no format": (["graph", "users_models:net", "--input-shape", "4,6", "--output", "graph.nix"], "graph.nix"),
    "no epochs": (["demo", "--epochs", "0"], "'0'"),
    "no command": ([], "demo"),
    "unknown command": (["dmeo"], "dmeo"),
}


@pytest.mark.parametrize(("argv", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_a_message_and_exit_code_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out


def test_a_missing_package_is_named_before_any_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo", "--epochs", "1"]) == 2
    assert "pip install torch2ebm[demo]" in capsys.readouterr().err


def test_help_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "compare" in capsys.readouterr().out


def test_importing_the_package_imports_no_optional_one() -> None:
    program = "import sys, torch2ebm; sys.exit(any(name in sys.modules for name in ('matplotlib', 'sklearn')))"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_module_runs_as_a_program_and_hands_on_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for factory, code in (("users_models:net", 0), ("nowhere:net", 2)):
        monkeypatch.setattr(sys, "argv", ["torch2ebm", "graph", factory, "--input-shape", "4,6"])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module("torch2ebm", run_name="__main__")
        assert stopped.value.code == code
    printed = capsys.readouterr()
    assert "Linear" in printed.out and "nowhere" in printed.err
