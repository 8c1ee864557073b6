"""Which settings learn: eleven networks, each trained in the same loop by backprop and by local learning.

``python benchmarks/learning.py [--rows resnet,gpt] [--settings backprop,default] [--seeds 3]`` trains what is asked for
and prints the table. Each run is stored as it ends, in ``results/learning.jsonl``, and is not done again: stop it when
you like, and go on by the same command. ``--table`` prints what is stored, and trains nothing. Remove the file where
the library has changed: a stored run does not know by which version it was made.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from learning_rows import ROWS, Row
from reporting import arguments_of, this_machine
from torch import Tensor, nn

import torch2ebm

Relative, PredictiveCoding = torch2ebm.Relative, torch2ebm.PredictiveCoding


@dataclass(frozen=True)
class Setting:
    """An algorithm under the name that the command line takes."""

    name: str
    algorithm: torch2ebm.Algorithm
    head_only: bool = False  # a control: all but the last block stay as they were made


SETTINGS: Sequence[Setting] = (
    Setting("backprop", torch2ebm.Backprop()),
    Setting("head", torch2ebm.Backprop(), head_only=True),
    Setting("z-il", torch2ebm.ZeroDivergence()),
    Setting("default", PredictiveCoding()),
    *(Setting(f"both={r}", PredictiveCoding(nudging=Relative(r, largest_error=r))) for r in (0.3, 1.0)),
    *(Setting(f"r={r}", PredictiveCoding(nudging=Relative(r))) for r in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
    Setting("strict-.1", PredictiveCoding(steps=20, lr=0.1)),
    Setting("strict-.01", PredictiveCoding(steps=20, lr=0.01)),
    Setting("strict-auto", PredictiveCoding(steps=20, lr="auto")),
    Setting(
        "errors-auto", PredictiveCoding(solver=torch2ebm.ErrorDescent(steps="auto", lr="auto"), nudging=Relative(0.1))
    ),
    Setting("error-descent", PredictiveCoding(solver=torch2ebm.ErrorDescent(steps=20, lr=0.1))),
    Setting("fixed-prediction", torch2ebm.FixedPrediction(steps=20, lr=0.1)),
)


@dataclass(frozen=True)
class Run:
    """One network, trained once.

    Attributes:
        score: Of the test data: percent of right classes, or the mean loss; NaN where the training diverged.
        seconds: Of the processor, for the training; the programs here run on one thread.
        steps: Mean number of inference steps; NaN where the algorithm has none.
        settled: Mean share of samples that came to rest.
        on_kinks: Mean share of samples that rest on a kink.
        sigma_squared: The curvature at the first, the middle and the last batch; empty where it was not measured.
        angles: Between the gradient and that of backprop on the same batch, in degrees, at the same three.
        told: Kinds of the warnings.
    """

    row: str
    setting: str
    seed: int
    protocol: Mapping[str, Any]
    score: float
    seconds: float
    steps: float = math.nan
    settled: float = math.nan
    on_kinks: float = math.nan
    sigma_squared: Sequence[float] = ()
    angles: Sequence[float] = ()
    told: Sequence[str] = ()


class Training:
    """The loop that every setting shares."""

    def __init__(self, row: Row, setting: Setting, seed: int) -> None:
        self.row, self.setting, self.seed = row, setting, seed
        self.train, self.targets, self.test, self.test_targets = row.data()
        torch.manual_seed(seed)
        self.net = row.build()
        trained = [p for name, p in self.net.named_parameters() if self._trains(name)]
        self.model = torch2ebm.convert(self.net)
        adam = torch.optim.Adam(trained, lr=row.lr)
        self.optimizer = torch2ebm.EnergyOptimizer(adam, self.model, setting.algorithm)
        self.batches = row.epochs * math.ceil(len(self.train) / row.batch)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda i: max(1 - i / self.batches, 0.0))
        self.relaxations: list[Any] = []
        self.angles: list[float] = []
        self.watched = {0, self.batches // 2, self.batches - 1}

    def _trains(self, name: str) -> bool:
        if self.setting.head_only and not name.startswith(tuple(self.row.head)):
            self.net.get_parameter(name).requires_grad_(False)
            return False
        return True

    def run(self) -> float:
        generator = torch.Generator().manual_seed(self.seed)
        done = 0
        for _ in range(self.row.epochs):
            for batch in torch.randperm(len(self.train), generator=generator).split(self.row.batch):
                self._step(self.train[batch], self.targets[batch], done in self.watched)
                done += 1
        return self.score()

    def _step(self, x: Tensor, y: Tensor, watched: bool) -> None:
        plain = self._backprop(x, y) if watched and not self.setting.head_only else None
        self.optimizer.zero_grad()
        self.row.loss(self.row.output(self.model, x), y).backward()
        state = self.model.state
        if state is not None and state.relaxation is not None:
            self.relaxations.append(state.relaxation)
        if plain is not None:
            self.angles.append(_angle(_flat(self.net), plain))
        self.optimizer.step()
        self.schedule.step()

    def _backprop(self, x: Tensor, y: Tensor) -> Tensor:
        net = copy.deepcopy(self.net)
        net.zero_grad()
        self.row.loss(self.row.output(net, x), y).backward()
        return _flat(net)

    def score(self) -> float:
        self.net.eval()
        with torch.no_grad():
            outputs = torch.cat([self.row.output(self.net, part) for part in self.test.split(500)])
        if self.row.score == "loss":
            return float(self.row.loss(outputs, self.test_targets))
        return 100 * float((outputs.argmax(-1) == self.test_targets).double().mean())


def _flat(net: nn.Module) -> Tensor:
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in net.parameters()])


def _angle(one: Tensor, other: Tensor) -> float:
    cosine = torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0)
    return math.degrees(math.acos(max(-1.0, min(1.0, float(cosine)))))


def trained(row: Row, setting: Setting, seed: int) -> Run:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        training = Training(row, setting, seed)
        began = time.process_time()
        try:
            score = training.run()
        except torch2ebm.errors.DivergenceError:
            score = math.nan
        seconds = time.process_time() - began
    found = training.relaxations
    measured = [r.sigma_squared for r in found if r.sigma_squared is not None]
    return Run(
        row.name,
        setting.name,
        seed,
        row.protocol,
        score,
        seconds,
        _mean([r.steps for r in found if r.steps]),
        _mean([r.settled for r in found if r.settled is not None]),
        _mean([r.on_kinks for r in found if r.on_kinks is not None]),
        [measured[0], measured[len(measured) // 2], measured[-1]] if measured else [],
        training.angles,
        sorted({w.category.__name__ for w in told if w.category.__module__.startswith("torch2ebm")}),
    )


def _mean(numbers: Sequence[float]) -> float:
    return statistics.fmean(numbers) if numbers else math.nan


# ---- what is stored, and the table of it

STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # 97.5 % of Student's t, by the number of seeds


COLUMNS = (
    "network and data",
    "setting",
    "score",
    "to backprop, same seeds",
    "s",
    "steps",
    "settled, on kinks",
    "sigma² first, middle, last",
    "degrees to backprop",
)


def stored(path: Path) -> dict[tuple[str, str, int], Run]:
    lines = path.read_text().splitlines() if path.exists() else []
    runs = [Run(**{name: part for name, part in json.loads(line).items() if name != "machine"}) for line in lines]
    protocols = {row.name: row.protocol for row in ROWS}
    return {(r.row, r.setting, r.seed): r for r in runs if protocols.get(r.row) == r.protocol}


def interval(numbers: Sequence[float]) -> str:
    """The mean, and half the width of its interval of 95 % by Student's t."""
    if len(numbers) == 1:
        return f"{numbers[0]:.2f}"
    half = STUDENT.get(len(numbers), 1.96) * statistics.stdev(numbers) / math.sqrt(len(numbers))
    return f"{statistics.fmean(numbers):.2f} ± {half:.2f}"


def table(runs: Mapping[tuple[str, str, int], Run]) -> list[str]:
    by_cell: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs.values():
        by_cell[run.row, run.setting].append(run)
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for row in ROWS:
        base = {run.seed: run.score for run in by_cell.get((row.name, "backprop"), [])}
        for setting in SETTINGS:
            if cell := by_cell.get((row.name, setting.name)):
                lines.append(_line(row, setting, cell, base))
    return lines


def _line(row: Row, setting: Setting, cell: Sequence[Run], base: Mapping[int, float]) -> str:
    gaps = [run.score - base[run.seed] for run in cell if run.seed in base]
    parts = [
        row.name,
        setting.name,
        interval([run.score for run in cell]),
        interval(gaps) if gaps and setting.name != "backprop" else "",
        f"{_mean([run.seconds for run in cell]):.0f}",
        _shown(_mean([run.steps for run in cell]), ".1f"),
        ", ".join(filter(None, [_shown(_mean([getattr(r, n) for r in cell]), ".2f") for n in ("settled", "on_kinks")])),
        ", ".join(f"{_mean(each):.3g}" for each in zip(*[run.sigma_squared for run in cell], strict=False)),
        ", ".join(f"{_mean(each):.1f}" for each in zip(*[run.angles for run in cell], strict=False)),
    ]
    return f"| {' | '.join(parts)} |"


def _shown(number: float, form: str) -> str:
    return "" if math.isnan(number) else format(number, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="parts of names of networks, with commas between; else all")
    parser.add_argument("--settings", default="backprop,head,default", help=", ".join(s.name for s in SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print what is stored")
    chosen = arguments_of(parser)
    path = chosen.out / "learning.jsonl"
    names = chosen.settings.split(",")
    rows = [row for row in ROWS if any(part.lower() in row.name.lower() for part in chosen.rows.split(","))]
    settings = [setting for setting in SETTINGS if setting.name in names or chosen.settings == "all"]
    done = stored(path)
    for seed in range(0 if chosen.table else chosen.seeds):
        for row in rows:
            for setting in settings:
                if (row.name, setting.name, seed) not in done:
                    run = trained(replace(row, epochs=1) if chosen.quick else row, setting, seed)
                    done[row.name, setting.name, seed] = run
                    with path.open("a") as file:
                        file.write(json.dumps(asdict(run) | {"machine": str(this_machine())}) + "\n")
                    print(
                        f"{run.score:8.3f} {run.seconds:5.0f} s  seed {seed}  {setting.name:16}  {row.name}", flush=True
                    )
    print("\n".join(table(done)))


if __name__ == "__main__":
    main()
