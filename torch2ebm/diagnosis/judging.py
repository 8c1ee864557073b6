"""What one backward of an algorithm on the batch says against its settings, and what cures it: each cure is tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.common.text import listed
from torch2ebm.diagnosis.report import Advice
from torch2ebm.diagnosis.settings import (
    VALUES,
    calibrated,
    has_lr,
    has_setting,
    relaxes,
    step_size,
    with_lr,
)
from torch2ebm.diagnosis.spectrum import Spectrum
from torch2ebm.diagnosis.subject import Trial
from torch2ebm.errors import (
    BatchDimensionError,
    DivergenceError,
    LossReductionError,
    NonFiniteError,
    Torch2EBMError,
)
from torch2ebm.reports.findings import Finding

HALVINGS = 12  # of a step size, until the energy falls in every step
CALIBRATED = "PredictiveCoding() with nothing set"
SMALLER = "Take a smaller lr, or a solver that needs none."
_KINDS: tuple[tuple[type[Torch2EBMError], str], ...] = (
    (LossReductionError, "loss"),
    (BatchDimensionError, "batch"),
    (DivergenceError, "step size"),
    (NonFiniteError, "not finite"),
)


@dataclass(frozen=True)
class Bounds:
    """What settings are judged by.

    Attributes:
        values: The energy's Hessian in the values, where it is known.
        errors: In the errors.
        steps: Until an error of descent on values has come to every node.
        levels: The longest path from a value to the output.
        reduction: What ``loss_reduction`` has to be; empty where any will do.
        unreachable: Nodes that backprop's error does not reach either.
    """

    values: Spectrum | None
    errors: Spectrum | None
    steps: int
    levels: int
    reduction: str
    unreachable: tuple[str, ...]

    def stable(self, algorithm: Algorithm) -> float:
        """The step size from which on the descent of an algorithm runs away; infinite for none."""
        step = step_size(algorithm)
        spectrum = self.values if step is not None and step.of == VALUES else self.errors
        if step is None or spectrum is None or spectrum.largest <= 0:
            return math.inf
        return 2 / spectrum.largest * step.lr / step.effective


def levels_not_reached(trial: Trial, bounds: Bounds) -> tuple[str, ...]:
    """Nodes that have too few steps, and not those that no step would reach."""
    if trial.state is None:
        return ()
    if trial.algorithm.weights_move:  # the first of its steps is all that a backward does
        hidden = [node.name for node in trial.state.graph.hidden_nodes if node.name not in bounds.unreachable]
        return tuple(hidden) if 0 < getattr(trial.algorithm, "steps", bounds.steps) < bounds.steps else ()
    return tuple(name for name in trial.state.unreached if name not in bounds.unreachable)


def without_signal(trial: Trial, bounds: Bounds) -> tuple[str, ...]:
    """Nodes whose errors are the rounding of values, or so small that their values have swallowed them."""
    if trial.state is None:
        return ()
    state, lost = trial.state, set(trial.state.without_signal)
    beyond = {*bounds.unreachable, *state.unreached, *levels_not_reached(trial, bounds)}
    swallowed = {n.name for n in state.graph.hidden_nodes if n.name not in beyond and _is_zero(state.error[n.name])}
    return tuple(node.name for node in state.graph.hidden_nodes if node.name in lost | swallowed)


def _is_zero(error: Any) -> bool:
    return not any(bool(each.any()) for each in (error if isinstance(error, tuple) else (error,)))


def faults(trial: Trial, bounds: Bounds) -> Iterator[Finding]:
    """What is wrong with the settings, by this backward."""
    if isinstance(trial.error, DivergenceError):
        yield Finding("step size", "the relaxation", f"{trial.error}{_above(trial, bounds)}", SMALLER)
        return
    if trial.error is not None:
        yield found_by(trial.error)
        return
    lost = levels_not_reached(trial, bounds)
    if lost:
        steps = getattr(getattr(trial.algorithm, "solver", trial.algorithm), "steps", None)
        yield Finding(
            "levels",
            f"nodes {listed(lost, 6)}",
            f"no error reaches {'it' if len(lost) == 1 else 'them'} in {steps} steps: one level a step.",
            f"Take at least {bounds.steps} steps, or a solver of errors, for which one step reaches all.",
        )
    noise = without_signal(trial, bounds)
    if noise:
        yield Finding(
            "signal",
            f"nodes {listed(noise, 6)}",
            "errors are the rounding of values, and gradients noise, which Adam scales to full steps.",
            f"Take {CALIBRATED}, or a solver of errors: it stores them, and keeps their digits.",
        )
    yield from _of_step_size(trial, bounds)


def _of_step_size(trial: Trial, bounds: Bounds) -> Iterator[Finding]:
    above, rise = _above(trial, bounds), trial.rise if relaxes(trial.algorithm) else 0.0
    rises = f" The energy rises by {100 * rise:.3g}% of its start in one step." if rise else ""
    if above or rises:
        yield Finding("step size", "the relaxation", f"{rises}{above}".strip(), SMALLER)


def _above(trial: Trial, bounds: Bounds) -> str:
    """What there is to say of a step size that no relaxation stands for long."""
    step, stable = step_size(trial.algorithm), bounds.stable(trial.algorithm)
    if step is None or step.lr <= stable:
        return ""
    return f" lr = {step.lr:g} is above {stable:.3g}, from which on descent on {step.of} runs away."


def found_by(error: Torch2EBMError) -> Finding:
    """What an error of the library's says of the settings."""
    kind = next((name for kind, name in _KINDS if isinstance(error, kind)), "refused")
    return Finding(kind, type(error).__name__, str(error), "")


def advice_for(trial: Trial, bounds: Bounds, tried: Callable[[Algorithm], Trial]) -> Iterator[Advice]:
    """Cures, one after the other, each with those before it, until nothing is wrong any more."""
    now = trial
    for cure in (_reduction, _steps, _lr):
        found = cure(now, bounds, tried)
        if found is not None:
            advice, now = found
            yield advice
    wrong = list(faults(now, bounds))
    if not wrong:
        return
    better = tried(calibrated(now.algorithm, bounds.reduction))
    kinds = ", ".join(dict.fromkeys(each.kind for each in wrong))
    if better.algorithm != now.algorithm and not list(faults(better, bounds)):
        why = f"no step size and no number of steps to set; without what is wrong here ({kinds})"
        yield Advice(CALIBRATED, why, better.algorithm)


_Cured = tuple[Advice, Trial] | None


def _reduction(trial: Trial, bounds: Bounds, tried: Callable[[Algorithm], Trial]) -> _Cured:
    if not isinstance(trial.error, LossReductionError) or not has_setting(trial.algorithm, "loss_reduction"):
        return None
    algorithm = replace(trial.algorithm, loss_reduction="sum")  # type: ignore[type-var]
    again = tried(algorithm)
    if isinstance(again.error, LossReductionError):
        return None
    why = "the loss is a sum over samples; or divide it by the number of samples"
    return Advice("loss_reduction='sum'", why, algorithm), again


def _steps(trial: Trial, bounds: Bounds, tried: Callable[[Algorithm], Trial]) -> _Cured:
    if not levels_not_reached(trial, bounds):
        return None
    for steps in dict.fromkeys((bounds.steps, bounds.levels, bounds.levels + 1)):  # rounding may stop some paths
        again = tried(trial.algorithm.with_steps(steps))
        if again.error is None and not levels_not_reached(again, bounds):
            why = f"an error goes one level a step, and the first node is {bounds.steps} from the output"
            return Advice(f"steps={steps}", f"at least; {why}", again.algorithm), again
    return None


def _lr(trial: Trial, bounds: Bounds, tried: Callable[[Algorithm], Trial]) -> _Cured:
    ran_away = isinstance(trial.error, DivergenceError)
    if not has_lr(trial.algorithm) or not (ran_away or any(_of_step_size(trial, bounds))):
        return None
    step = step_size(trial.algorithm)
    first = bounds.stable(trial.algorithm) / 2
    lr = _rounded(first) if math.isfinite(first) else _lr_of(trial.algorithm)
    if step is not None and lr >= step.lr:  # the curvature grows on the way: the energy says so
        lr = _rounded(step.lr / 2)
    for _ in range(HALVINGS):
        again = tried(with_lr(trial.algorithm, lr))
        if again.error is None and not any(_of_step_size(again, bounds)):
            why = "at most: with it the energy falls in every step on this batch, and no direction overshoots"
            return Advice(f"lr={lr:g}", why, again.algorithm), again
        lr = _rounded(lr / 2)
    return None


def _lr_of(algorithm: Algorithm) -> float:
    number = getattr(getattr(algorithm, "solver", algorithm), "lr", 1.0)
    return _rounded(float(number) / 2)


def _rounded(lr: float) -> float:
    """Down to two digits."""
    scale = 10.0 ** (math.floor(math.log10(lr)) - 1)
    return float(f"{math.floor(lr / scale + 1e-9) * scale:.2g}")
