"""The step size of a solver: measured where it is ``"auto"``, and told where a fixed one raises the energy."""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch2ebm.common.checks import AUTO
from torch2ebm.common.text import listed
from torch2ebm.common.users_code import users_level
from torch2ebm.engine.results import InferenceState, Relaxation, StepSize
from torch2ebm.errors import StepSizeWarning
from torch2ebm.inference.base import Inference
from torch2ebm.inference.error_inference import ErrorInference
from torch2ebm.inference.solver import Solver
from torch2ebm.inference.steepness import Stability, measured_stability
from torch2ebm.inference.value_inference import ValueInference
from torch2ebm.potentials.node_energies import NodeEnergies

EVERY = 10  # calls that one measurement serves: a step of 1 / lambda is stable until lambda has doubled
PRODUCTS = 3  # lambda to a fifth or better on chains and residual nets of 20 to 200 layers
ACCURATE = 30, 1e-2  # most products, and the bound, of a figure that is told
RISE = 1e-2  # of the fall: steps across kinks of ReLU leave less
BACK = 1.05  # how much longer a shortened step becomes after a call without a rise
STIFF = 0.05  # steps times step size, below which an error of curvature 1 has hardly moved
MOVED = 0.5  # progress of the median node, from which on steps are no cause
ROUNDING = 100.0  # of a sum over all samples, in units of the dtype's epsilon


class _Memory:
    """The last measurement for one solver on one graph, and what was told of it."""

    def __init__(self) -> None:
        self.stability: Stability | None = None
        self.calls = 0  # since it was measured
        self.share = 1.0  # of the step that it gives, where the curvature grows on the way
        self.rises, self.next_look = 0, 1  # calls whose energy rose, and which of them to measure
        self.told = False

    def corrected(self, rose: bool) -> None:
        """Shorter after a call that raised the energy although the step was measured on it; back little by little."""
        if not rose:
            self.share = min(1.0, BACK * self.share)
        elif self.calls > 1:
            self.calls = EVERY  # the measurement is old
        else:
            self.share /= 2


def auto_rate(solver: Solver[Any], inference: Inference) -> Tensor | None:
    """The step size as a tensor, which recorded programs take as an input; None where the solver has a fixed one.

    For :meth:`Solver.start`. Measured on this call, or carried from the calls before.
    """
    if solver.lr != AUTO:
        return None
    memory = _memory(solver, inference)
    found, cost = memory.stability, 0.0
    if found is None or memory.calls >= EVERY:
        found = _measured(solver, inference, PRODUCTS, tol=0.0, exact=False)
        cost = found.backprops
    used = memory.share * solver.good_step(found)
    # carried on once the call has gone well: one that is refused leaves all as before
    inference.step_size = StepSize(used, solver.largest_step(found), cost, found)
    return torch.tensor(used, dtype=torch.float64)


def descend(
    inference: ValueInference | ErrorInference, slot: str, gradient: Tensor, lr: float | str, rate: Tensor | None
) -> None:
    """A step down the gradient: by the measured ``rate``, else by the number ``lr``."""
    if rate is None:
        inference.move(slot, gradient, -float(lr))
    else:
        inference.move(slot, gradient * rate, -1.0)


def look_at_rises(solver: Solver[Any], inference: Inference, relaxation: Relaxation) -> None:
    """Tell once of a graph that a fixed step size raises the energy; shorten an automatic one where it does."""
    if not solver.coordinates or solver.samples:  # noise raises an energy, whatever the step
        return
    rise = _largest_rise(relaxation.energy)
    fall = relaxation.energy[0] - min(relaxation.energy)
    if not solver.descends and relaxation.energy[-1] <= relaxation.energy[0]:
        rise = 0.0  # it goes up and down on its way
    memory = _memory(solver, inference)
    if solver.lr == AUTO:
        correct(solver, inference, rise > RISE * fall)
    elif relaxation.beta > 0 and not memory.told and rise > _rounding(inference, relaxation):
        _tell_rise(solver, inference, relaxation, memory, rise > RISE * fall)


def look_at_stiffness(solver: Solver[Any], inference: Inference, state: InferenceState) -> None:
    """Tell once of a graph that the largest stable step, for one steep direction, moves nothing else.

    Numbers that are known say whether it may be so; only then is the progress of the nodes looked at, once.
    """
    relaxation = state.relaxation
    if inference.step_size is None or solver.steps == AUTO or relaxation.converged or relaxation.beta <= 0:
        return
    lr = inference.step_size.used
    if relaxation.steps * lr < STIFF:
        key = ("stiff", type(solver), solver.steps, inference.carried_under)
        tell = _tell_short_chains if solver.samples else _tell_stiffness
        inference.graph.once(key, lambda: tell(solver, state, lr))


def _tell_short_chains(solver: Solver[Any], state: InferenceState, lr: float) -> bool:
    """Progress says nothing of draws, whose gradients do not vanish: the time of a chain does."""
    time = state.relaxation.steps * lr
    said = (
        f'{type(solver).__name__}({solver.steps}, lr="auto"): chains end near where they begin. One steep direction '
        f"of the energy allows steps of {lr:.2g}, and {state.relaxation.steps} of them make a time of {time:.2g}. A "
        "value that nothing but its own precision of 1 holds forgets its start in about 1: draws are too narrow there, "
        "and gradients are of such draws. Take more steps, or a smaller factor in the loss and smaller precisions."
    )
    warnings.warn(StepSizeWarning(said), stacklevel=users_level())
    return True


def _tell_stiffness(solver: Solver[Any], state: InferenceState, lr: float) -> bool:
    progress = state.progress
    if not progress or statistics.median(progress.values()) >= MOVED:
        return True
    behind = [name for name, share in progress.items() if share < MOVED]
    said = (
        f'{type(solver).__name__}({solver.steps}, lr="auto"): the energy is stiff. Its largest curvature is '
        f"{1 / lr:.2g} times that of an error alone (its condition number, or more), so a stable step is {lr:.2g}, and "
        f"{state.relaxation.steps} of them leave {listed(behind)} at {statistics.median(progress.values()):.1g} of the "
        "way in the median: gradients there are that much too small. The loss is too strong for so few steps, by a "
        "factor in it, for example. Take PredictiveCoding() with nothing set, or nudging=Relative(0.1); "
        "torch2ebm.diagnose(model, loss_fn, batch) has the condition number. state.progress says it of every batch."
    )
    warnings.warn(StepSizeWarning(said), stacklevel=users_level())
    return True


def _memory(solver: Solver[Any], inference: Inference) -> _Memory:
    if inference.carried_under is None:
        return _Memory()
    energies = NodeEnergies(inference.energies)
    key = ("step size", type(solver), solver.lr, inference.carried_under, energies, inference.call.frozen_statistics)
    return inference.graph.once(key, _Memory)


def _measured(solver: Solver[Any], inference: Inference, products: int, tol: float, exact: bool) -> Stability:
    return measured_stability(
        inference.call, inference.loss, inference.energies, solver.coordinates, products, tol, exact
    )


def correct(solver: Solver[Any], inference: Inference, rose: bool) -> None:
    """Let an automatic step size learn from the call: whether it has raised the energy."""
    found = None if inference.step_size is None else inference.step_size.measured
    if not isinstance(found, Stability):
        return
    memory = _memory(solver, inference)
    if found is not memory.stability:
        memory.stability, memory.calls = found, 0
        _tell_unsafe(solver, memory)
    memory.calls += 1
    memory.corrected(rose)


def _largest_rise(energy: Sequence[float]) -> float:
    """The most that any energy lies above an earlier one."""
    return max(after - before for before, after in zip(itertools.accumulate(energy, min), energy, strict=True))


def _rounding(inference: Inference, relaxation: Relaxation) -> float:
    dtype = next(iter(inference.history[0].values())).dtype
    return ROUNDING * torch.finfo(dtype).eps * max(abs(each) for each in relaxation.energy)


def _tell_rise(solver: Solver[Any], inference: Inference, relaxation: Relaxation, memory: _Memory, much: bool) -> None:
    """Only here is measured. A small rise that the step size does not explain is looked at more and more seldom."""
    memory.rises += 1
    if not much and memory.rises < memory.next_look:
        return
    memory.next_look *= EVERY
    products, tol = ACCURATE
    found = _measured(solver, inference, products, tol, exact=True)
    largest, good, lr = solver.largest_step(found), solver.good_step(found), float(solver.lr)
    if not much and lr < largest:
        return  # a step across a kink of ReLU, for example
    memory.told = True
    steps = list(itertools.pairwise(relaxation.energy))
    step = max(range(len(steps)), key=lambda each: steps[each][1] - steps[each][0])
    rise = f"the energy rises, from {steps[step][0]:.4g} to {steps[step][1]:.4g} in step {step + 1}"
    if math.isnan(largest):
        said = _unsafe(found)
    elif lr >= largest:
        said = f'The largest step that does not raise it is {largest:.3g}; lr="auto" measures it and takes {good:.3g}.'
    else:
        said = (
            f"Steps up to {largest:.3g} are stable at the feed-forward pass, and the curvature grows on the way; "
            f'lr="auto" begins with {good:.3g} and takes less where the energy rises.'
        )
    warnings.warn(StepSizeWarning(f"{type(solver).__name__}(lr={lr:g}): {rise}. {said}"), stacklevel=users_level())


def _tell_unsafe(solver: Solver[Any], memory: _Memory) -> None:
    assert memory.stability is not None
    if not memory.told and math.isnan(solver.largest_step(memory.stability)):
        memory.told = True
        name = type(solver).__name__
        said = f'{name}(lr="auto"): {_unsafe(memory.stability)}'
        warnings.warn(StepSizeWarning(said), stacklevel=users_level())


def _unsafe(found: Stability) -> str:
    return (
        f"beta times the curvature of the loss is {found.r:.3g} here, and from 1 on no step is known to be stable. "
        'Take a smaller nudge, for example nudging=Relative(0.1), or ErrorDescent(lr="auto").'
    )
