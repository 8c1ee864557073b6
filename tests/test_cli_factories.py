"""Factories that exit, print, fail or stand in a file: the command line survives them all and says what happened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torch2ebm.cli import main

pytest.importorskip("matplotlib")

MODELS = """
import os, sys, torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

def exits(): sys.exit(0)
def exits_with_words(): sys.exit("no weights")
def empty(): raise ValueError()
def interrupted(): raise KeyboardInterrupt

class Own(BaseException): pass
def own(): raise Own("of its own")

class Mute(Exception):
    def __str__(self): raise RuntimeError("no words")
def mute(): raise Mute()

def needs(width): return net()

def loud():
    print("loading weights")
    return net()

def moves():
    os.makedirs("elsewhere", exist_ok=True)
    os.chdir("elsewhere")
    return net()

class Loud(nn.Sequential):
    def forward(self, x):
        print("forward of", len(x))
        return super().forward(x)

def loud_forward(): return Loud(*net())

class Exits(nn.Linear):
    def forward(self, x): sys.exit(0)

def exits_in_forward(): return Exits(6, 3)

class Fails(nn.Linear):
    def forward(self, x): raise LookupError("not today")

def fails_in_forward(): return Fails(6, 3)

class Wrapped:
    def __init__(self, logits): self.logits = logits

class Answers(nn.Sequential):
    def forward(self, x): return {"logits": super().forward(x), "other": x}

def answers(): return Answers(*net())
"""
LAYERS = "from torch import nn\ndef layer(): return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))\n"
SHAPE = ["--input-shape", "4,6"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factories.py").write_text(MODELS)
    (tmp_path / "at_import.py").write_text("import sys; sys.exit(0)\n")
    deep = tmp_path / "some folder"
    deep.mkdir()
    (deep / "parts.py").write_text(
        "from torch import nn\ndef layer(): return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))\n"
    )
    (deep / "my-net.py").write_text("from parts import layer\nclass Inner:\n    make = staticmethod(layer)\n")
    (deep / "torch.py").write_text(
        "from torch import nn\ndef layer(): return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for name in ("factories", "at_import", "parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


FAILING = {
    "exits": "an exit with code 0",
    "exits_with_words": "an exit with code 'no weights'",
    "empty": "ValueError",
    "own": "Own: of its own",
    "mute": "Mute",
    "needs": "width",
    "exits_in_forward": "an exit with code 0",
    "fails_in_forward": "LookupError: not today",
}


@pytest.mark.parametrize("command", ["graph", "compare"])
@pytest.mark.parametrize("factory", FAILING)
def test_a_factory_that_fails_is_a_message_and_exit_code_2(
    command: str, factory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, f"factories:{factory}", *SHAPE]) == 2
    captured = capsys.readouterr()
    assert FAILING[factory] in captured.err and "--traceback" in captured.err
    assert "Traceback (most recent" not in captured.err and not captured.out


@pytest.mark.parametrize("before", [True, False])
def test_the_whole_traceback_is_shown_where_it_is_asked_for(before: bool, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["graph", "factories:fails_in_forward", *SHAPE]
    assert main(["--traceback", *argv] if before else [*argv, "--traceback"]) == 2
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said and 'raise LookupError("not today")' in said


def test_an_interruption_is_told_as_a_shell_tells_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "factories:interrupted", *SHAPE]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_module_that_exits_when_it_is_imported_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "at_import:net", *SHAPE]) == 2
    assert "__main__" in capsys.readouterr().err


@pytest.mark.parametrize(("factory", "said"), [("loud", "loading weights"), ("loud_forward", "forward of 4")])
@pytest.mark.parametrize("command", ["graph", "compare"])
def test_what_a_model_prints_stays_out_of_the_results(
    command: str, factory: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, f"factories:{factory}", *SHAPE]) == 0
    captured = capsys.readouterr()
    assert (
        said in captured.err and said not in captured.out and "Linear" in captured.out + "Linear" * (command != "graph")
    )
    assert "0.weight" in captured.out or command == "graph"


@pytest.mark.parametrize(
    "factory",
    ["factories.py:net", "./factories.py:net", "some folder/my-net.py:Inner.make", "some folder/torch.py:layer"],
)
def test_a_file_is_a_module(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["graph", factory, *SHAPE]) == 0
    assert "Linear" in capsys.readouterr().out
    assert sys.modules["torch"] is torch  # a file of the same name takes no other's place


@pytest.mark.parametrize(
    ("factory", "said"),
    [("no.py:net", "no file no.py"), ("factories.py:nix", "nix"), ("factories.py", "path.py:name"), (":net", "name")],
)
def test_a_file_or_a_name_that_is_not_there_is_told(
    factory: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["graph", factory, *SHAPE]) == 2
    assert said in capsys.readouterr().err


def test_a_picture_goes_where_it_was_asked_for_when_the_factory_moves(folder: Path) -> None:
    assert main(["graph", "factories:moves", *SHAPE]) == 0
    assert (folder / "graph.png").exists() and not (folder / "elsewhere" / "graph.png").exists()


def test_logits_in_a_dictionary_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "factories:answers", *SHAPE]) == 0
    assert "0.weight" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["demo", "compare", "graph", "diagnose"])
def test_help_shows_the_defaults_and_what_every_option_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    expected = {
        "demo": ["(default: 12)", "(default: demo_output)", "(default: 0)"],
        "compare": ["(default: 20)", "(default: 0.1)", "(default: float32)"],
        "graph": ["(default: auto)", "(default: graph.png)", "(default: float32)"],
        "diagnose": ["(default: cross_entropy)", "(default: float32)"],
    }
    assert all(each in shown for each in expected[command]) and "(default: None)" not in shown
    assert "(default: False)" not in shown


@pytest.mark.parametrize("shape", ["100000,100000,1000,6", "9" * 30 + ",6", ",".join(["1"] * 70 + ["6"])])
def test_an_input_that_cannot_be_is_told(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["compare", "factories:net", "--input-shape", shape])
    captured = capsys.readouterr()
    assert code == 2 or (shape.startswith("1,1") and code == 0)  # 70 dimensions of one are a small input
    assert "Traceback (most recent" not in captured.err


# ---- in processes of their own


def run(*argv: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *argv]
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=100, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_results_that_cannot_be_written_are_told() -> None:
    with open("/dev/full", "w") as full:
        done = run("-m", "torch2ebm", "graph", "factories:net", *SHAPE, stdout=full)
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -P came with 3.11")
def test_a_safe_path_has_no_file_of_this_folder_in_front(folder: Path) -> None:
    (folder / "colorsys.py").write_text("print('SHADOWED')")
    done = run("-P", "-m", "torch2ebm", "graph", "colorsys:nothing", *SHAPE, stdout=subprocess.PIPE)
    assert done.returncode == 2 and "SHADOWED" not in done.stdout + done.stderr
    other = run("-m", "torch2ebm", "graph", "colorsys:nothing", *SHAPE, stdout=subprocess.PIPE)
    assert "SHADOWED" in other.stderr


HUGGING_FACE = """
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

def classifier():
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=16, **sizes))

def language_model(use_cache=True):
    sizes = dict(n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, use_cache=use_cache, **sizes))

def without_cache(): return language_model(False)
"""


@pytest.mark.parametrize("command", ["graph", "compare"])
@pytest.mark.parametrize("factory", ["classifier", "language_model", "without_cache"])
def test_models_of_hugging_face_are_taken_and_their_cache_is_named(
    command: str, factory: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    (folder / "hugging.py").write_text(HUGGING_FACE)
    argv = [command, f"hugging.py:{factory}", "--input-shape", "3,5", "--input-dtype", "int64"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert ("use_cache = False" in captured.err) == (factory == "language_model")
    assert any(name in captured.out for name in ("classifier", "transformer.wte"))
    sys.modules.pop("hugging", None)
