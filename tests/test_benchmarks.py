"""The programs in benchmarks/ run: on tiny cases, with the checks that they make before they measure. No times."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import UNSETTLED
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import contenders  # noqa: E402
import growth  # noqa: E402
import latents  # noqa: E402
import learning  # noqa: E402
import learning_rows  # noqa: E402
import memory  # noqa: E402
import peers  # noqa: E402
import single_precision  # noqa: E402
import speed  # noqa: E402
from arithmetic import node_costs, strict_flops  # noqa: E402
from cases import Case, mlp, residual_mlp_case  # noqa: E402
from contenders import ERRORS, EXACT, FIXED, FULL, REFERENCE, STEPS, STRICT, Contest, Setting  # noqa: E402
from measure import flops  # noqa: E402

from torch2ebm.programs.program import Program  # noqa: E402

WIDTHS, BATCH = (6, 7, 5, 4, 10), 3
TINY = Case("a", "tiny", lambda: mlp(WIDTHS, nn.Tanh), (BATCH, WIDTHS[0]))
CALIBRATED = next(setting for setting in learning.SETTINGS if setting.name == "default")
DOUBLE = Setting(dtype=torch.float64)
PART = speed.Part(TINY, (EXACT, FIXED, STRICT, ERRORS), peers=True, targets={EXACT.name: 1.5})


def test_every_algorithm_computes_what_its_formulas_say():
    contest = Contest(TINY, [EXACT, FIXED, STRICT, ERRORS], False, DOUBLE)
    differences = contest.checked()
    assert differences.keys() == {EXACT.name, FIXED.name, STRICT.name, ERRORS.name}
    assert max(differences.values()) < 1e-12


def test_a_program_that_computes_something_else_is_found():
    contest = Contest(TINY, [STRICT], False, DOUBLE)
    contest.programs[STRICT.name] = contest.programs[REFERENCE]
    with pytest.raises(contenders.DisagreementError, match="PredictiveCoding is off by"):
        contest.checked()


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # 20 steps reach no further
def test_the_full_sweep_gives_the_very_numbers_of_the_wave_front():
    contest = Contest(residual_mlp_case(30, 4, 2), [STRICT, FULL], False)
    full, waves = (contenders.gradients_of(contest.programs[name]) for name in (FULL.name, STRICT.name))
    assert all(map(torch.equal, full, waves))
    assert not waves[0].any()  # 30 levels up: 20 steps do not get there
    assert all(gradient.any() for gradient in waves[-10:])


def test_the_arithmetic_of_a_chain_is_that_of_its_matrices():
    contest = Contest(TINY, [STRICT], False)
    contest.warmed_up()  # the first call also verifies the graph, the second its cuts
    counted = {name: flops(program) for name, program in contest.programs.items()}
    model = contest.models[STRICT.name]
    graph, costs = model.graph, node_costs(model, contest.x)
    first, *others = [2 * BATCH * fan_in * fan_out for fan_in, fan_out in pairwise(WIDTHS)]
    ends = 3 * first + 3 * sum(others)  # the feed-forward pass, the last one, and the parameters' gradients
    full = ends + STEPS * 2 * sum(others)
    later = sum(2 * sum(others[: len(others) - step]) for step in range(1, len(others)))  # not yet reached
    assert strict_flops(graph, costs, STEPS, wave_front=False) == full
    assert strict_flops(graph, costs, STEPS) == full - later == counted[STRICT.name]
    assert counted[REFERENCE] == 2 * first + 3 * sum(others)


def test_speed_measures_and_prints_every_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = speed.rows_of(PART, rounds=2, torch2pc=_torch2pc(tmp_path))
    names = [row.program for row in rows]
    assert names[:5] == [REFERENCE, EXACT.name, FIXED.name, STRICT.name, ERRORS.name]
    assert names[-3:] == ["Torch2PC Strict", "Torch2PC FixedPred", "Torch2PC Exact"]
    strict = rows[names.index(STRICT.name)]
    assert strict.arithmetic == pytest.approx(strict.counted)
    assert {row.verdict for row in rows if row.program == EXACT.name} <= {"met", "missed"}
    assert speed.speed_table(rows).count("\n") == len(rows) + 1
    speed.draw(rows, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 0


def test_the_table_of_the_readme_has_eager_and_compiled_figures():
    names = [each.name + kind for each in PART.contenders for kind in ("", contenders.COMPILED)]
    rows = [speed.Row("a", "float32", name, REFERENCE, 1.0, 2.0, 1.5, 2.5, arithmetic=7.4) for name in names]
    assert "| 2.00 (1.50 to 2.50) / 2.00 (1.50 to 2.50) |" in speed.readme_table(rows)
    assert speed.readme_table(rows).splitlines()[-1].endswith("| 7.4 |")


def test_inference_beside_pcx_takes_the_same_steps_to_the_same_values(monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(Program, "compile", lambda self: None)
    monkeypatch.setitem(sys.modules, "jax", None)
    eager, compiled, watched, free = latents.rows_of(8, rounds=2)
    assert eager["steps"] == compiled["steps"] == watched["steps"] > free["steps"]
    assert max(compiled["distance"], watched["distance"]) < 1e-5
    assert "PCX: not installed" in capsys.readouterr().out


def test_peers_that_are_not_there_are_left_out_with_a_line(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setitem(sys.modules, "pcx", None)
    net, x, y = Setting().to(TINY)
    assert isinstance(net, nn.Sequential)
    assert peers.peer_programs(net, x, y, STEPS, 0.1) == {}
    printed = capsys.readouterr().out
    assert "PCX: not installed" in printed
    assert "Torch2PC: not installed" in printed


def test_torch2pc_from_a_file_is_held_against_the_library_and_backprop(tmp_path: Path):
    net, x, y = DOUBLE.to(TINY)
    assert isinstance(net, nn.Sequential)
    found = peers.torch2pc_programs(net, x, y, 5, 0.1, _torch2pc(tmp_path))
    assert {name: program.disagreement() for name, program in found.items()} == pytest.approx(
        {"Torch2PC Strict": 0.0, "Torch2PC FixedPred": 0.0, "Torch2PC Exact": 0.0}, abs=1e-12
    )
    with pytest.raises(peers.NotInstalledError, match="no Python file"):
        peers.torch2pc_programs(net, x, y, 5, 0.1, tmp_path / "nothing.py")


def _torch2pc(folder: Path) -> Path:
    """A stand-in for Torch2PC's file: the library's own copy of its call."""
    file = folder / "TorchSeq2PC.py"
    file.write_text("from torch2ebm.torch2pc import PCInfer\n")
    return file


def test_pcx_computes_the_same_gradient():
    pytest.importorskip("pcx")
    net, x, y = Setting().to(TINY)
    assert isinstance(net, nn.Sequential)
    (program,) = peers.pcx_programs(net, x, y, 5, 0.1).values()
    assert program.disagreement() < 1e-4


@pytest.mark.filterwarnings(UNSETTLED)
def test_memory_counts_copies_of_the_values():
    rows = memory.rows_of(memory.Part(TINY, (STRICT, memory.EQUILIBRIUM), compiled=False))
    assert [row.program for row in rows] == [REFERENCE, STRICT.name, memory.EQUILIBRIUM.name]
    values: list[Tensor] = []
    contest = Contest(TINY, [], False)
    x = contest.x
    assert isinstance(contest.net, nn.Sequential)
    for block in contenders.chain_of(contest.net)[:-1]:
        x = block(x)
        values.append(x)
    assert memory.bytes_of_values(contest) == sum(value.nbytes for value in values)
    assert memory.memory_table(rows).count("\n") == len(rows) + 1


def test_what_an_algorithm_refuses_is_left_out_of_the_memory_table():
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 10))

    case = Case("dropout", "what no equilibrium takes", build, (3, 4))
    *_, row = memory.rows_of(memory.Part(case, (memory.EQUILIBRIUM,), compiled=False))
    assert row.copies is None
    assert row.note == "left out: NoEquilibriumError"


def test_growth_is_a_slope_on_logarithmic_axes(tmp_path: Path):
    assert growth.slope((1, 2, 4), (3.0, 12.0, 48.0)) == pytest.approx(2.0)
    found = growth.growth_of("width", (4, 8), rounds=2, base=growth.Size(width=4, depth=3, batch=2, steps=2))
    assert [each.program for each in found][:2] == [REFERENCE, EXACT.name]
    assert all(each.sizes == (4, 8) for each in found)
    assert growth.growth_table(found).count("\n") == len(found) + 1
    growth.draw(found, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 0


def test_without_a_gpu_there_is_a_line_and_no_measurement(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["speed.py", "--device", "cuda", "--quick", "--threads", "1"])
    speed.main()
    assert capsys.readouterr().out == "no GPU: nothing measured on CUDA\n"


def test_backprop_here_is_autograds():
    contest = Contest(TINY, [], False)
    expected = torch.autograd.grad(F.cross_entropy(contest.net(contest.x), contest.y), list(contest.net.parameters()))
    assert all(map(torch.equal, contenders.gradients_of(contest.programs[REFERENCE]), expected))


def tiny(build) -> learning_rows.Row:
    def data() -> learning_rows.Split:
        train, targets, test, test_targets = learning_rows.digits()
        return train[:96], targets[:96], test[:50], test_targets[:50]

    return learning_rows.Row("tiny", build, data, epochs=6, batch=32, lr=1e-2, head=("3.",))


def small_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def test_the_loop_of_learning_is_adam_s_own_with_backprop():
    row = tiny(small_net)
    train, targets, test, test_targets = row.data()
    torch.manual_seed(3)
    net, generator = small_net(), torch.Generator().manual_seed(3)
    adam = torch.optim.Adam(net.parameters(), lr=1e-2)
    steps = 0
    for _ in range(6):
        for batch in torch.randperm(96, generator=generator).split(32):
            adam.param_groups[0]["lr"] = 1e-2 * (1 - steps / 18)
            adam.zero_grad()
            F.cross_entropy(net(train[batch]), targets[batch]).backward()
            adam.step()
            steps += 1
    expected = 100 * float((net(test).argmax(1) == test_targets).double().mean())
    backprop, head, default = (learning.trained(row, setting, 3) for setting in (*learning.SETTINGS[:2], CALIBRATED))
    assert backprop.score == pytest.approx(expected)
    assert backprop.angles == pytest.approx([0.0] * 3, abs=1e-2) and not backprop.sigma_squared
    assert head.score < backprop.score
    assert default.score > 30 and len(default.sigma_squared) == 3 and all(0 < a < 90 for a in default.angles)


def test_what_was_told_while_training_is_kept_by_name():
    rising = learning.Setting("rising", learning.PredictiveCoding(steps=20, lr=9.0, on_divergence="warn"))
    assert "DivergenceWarning" in learning.trained(tiny(small_net), rising, 0).told


def test_what_is_stored_is_not_trained_again(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(learning, "ROWS", [tiny(small_net)])
    monkeypatch.setattr(sys, "argv", ["learning.py", "--seeds", "2", "--out", str(tmp_path), "--settings", "backprop"])
    learning.main()
    assert len((tmp_path / "learning.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    monkeypatch.setattr(learning, "trained", None)  # would be called
    learning.main()
    assert "| tiny | backprop |" in capsys.readouterr().out


@pytest.mark.parametrize("row", learning_rows.ROWS, ids=lambda row: row.name)
def test_each_row_s_last_block_is_there_and_small(row: learning_rows.Row):
    if row.name.startswith("BERT"):
        pytest.importorskip("transformers")
    net = row.build()
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    head = [name for name in sizes if name.startswith(tuple(row.head))]
    assert len(head) == 2 and sum(sizes[name] for name in head) < sum(sizes.values()) / 2


def test_single_precision_is_held_against_double():
    case = single_precision.cases()[0]
    off = single_precision.measured(case)
    assert 0 < off.gradient < 0.1 and not off.named and off.errors.keys() == off.rounding.keys()
    assert all(0 < error < 0.1 for error in off.errors.values())
    exact = single_precision.measured(replace(case, net=case.net.double(), x=case.x.double()))
    assert exact.gradient == 0 and not any(exact.errors.values())
