"""The step size of a solver: measured where it is ``"auto"``, and told where a fixed one raises the energy."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch2ebm.common.checks import AUTO
from torch2ebm.common.users_code import users_level
from torch2ebm.engine.node_energies import NodeEnergies
from torch2ebm.engine.results import Relaxation, StepSize
from torch2ebm.errors import StepSizeWarning
from torch2ebm.inference.base import Inference
from torch2ebm.inference.error_inference import ErrorInference
from torch2ebm.inference.solver import Solver
from torch2ebm.inference.steepness import Stability, measured_stability
from torch2ebm.inference.value_inference import ValueInference

EVERY = 10  # calls that one measurement serves: a step of 1 / lambda is stable until lambda has doubled
PRODUCTS = 3  # lambda to a fifth or better on chains and residual nets of 20 to 200 layers
ACCURATE = 30, 1e-2  # most products, and the bound, of a figure that is told
ROUNDING = 100.0  # of a sum over all samples, in units of the dtype's epsilon


class _Memory:
    """The last measurement for one solver on one graph, and what was told of it."""

    def __init__(self) -> None:
        self.stability: Stability | None = None
        self.calls = 0  # since it was measured
        self.rises = 0  # calls whose energy rose
        self.told = False


def auto_rate(solver: Solver[Any], inference: Inference) -> Tensor | None:
    """The step size as a tensor, which recorded programs take as an input; None where the solver has a fixed one.

    For :meth:`Solver.start`. Measured on this call, or carried from the calls before.
    """
    if solver.lr != AUTO:
        return None
    memory = _memory(solver, inference)
    cost = 0.0
    if memory.stability is None or memory.calls >= EVERY:
        memory.stability, memory.calls = _measured(solver, inference, PRODUCTS, tol=0.0, exact=False), 0
        cost = memory.stability.backprops
        _tell_unsafe(solver, memory)
    memory.calls += 1
    inference.step_size = StepSize(solver.good_step(memory.stability), solver.largest_step(memory.stability), cost)
    return torch.tensor(inference.step_size.used, dtype=torch.float64)


def descend(
    inference: ValueInference | ErrorInference, slot: str, gradient: Tensor, lr: float | str, rate: Tensor | None
) -> None:
    """A step down the gradient: by the measured ``rate``, else by the number ``lr``."""
    if rate is None:
        inference.move(slot, gradient, -float(lr))
    else:
        inference.move(slot, gradient * rate, -1.0)


def look_at_rises(solver: Solver[Any], inference: Inference, relaxation: Relaxation) -> None:
    """Tell once of a graph that a fixed step size raises the energy; measure an automatic one anew where it does."""
    if not solver.coordinates:
        return
    step = _first_rise(relaxation.energy, inference)
    if step is None or (not solver.descends and relaxation.energy[-1] <= relaxation.energy[0]):
        return
    memory = _memory(solver, inference)
    if solver.lr == AUTO:
        memory.calls = EVERY
        return
    if not memory.told and memory.rises % EVERY == 0:  # a rise that lr does not explain is measured now and then
        products, tol = ACCURATE
        found = _measured(solver, inference, products, tol, exact=True)
        memory.told = _told(solver, relaxation, step, found)
    memory.rises += 1


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


def _first_rise(energy: Sequence[float], inference: Inference) -> int | None:
    """The first step that left a higher energy than rounding does."""
    dtype = next(iter(inference.history[0].values())).dtype
    slack = ROUNDING * torch.finfo(dtype).eps * max(abs(each) for each in energy)
    pairs = itertools.pairwise(energy)
    return next((step for step, (before, after) in enumerate(pairs, 1) if after > before + slack), None)


def _told(solver: Solver[Any], relaxation: Relaxation, step: int, found: Stability) -> bool:
    largest, good = solver.largest_step(found), solver.good_step(found)
    name, lr = type(solver).__name__, float(solver.lr)
    rise = f"{name}(lr={lr:g}): the energy rises, from {relaxation.energy[step - 1]:.4g} to "
    rise += f"{relaxation.energy[step]:.4g} in step {step}."
    if math.isnan(largest):
        said = _unsafe(found)
    elif lr >= largest:
        said = f'The largest step that does not raise it is {largest:.3g}; lr="auto" measures it and takes {good:.3g}.'
    elif lr > good or relaxation.energy[-1] > relaxation.energy[0]:
        said = (
            f"Steps up to {largest:.3g} are stable at the feed-forward pass, and the curvature grows on the way; "
            f'lr="auto" takes {good:.3g}, and a smaller nudge keeps the values nearer.'
        )
    else:
        return False
    warnings.warn(StepSizeWarning(f"{rise} {said}"), stacklevel=users_level())
    return True


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
