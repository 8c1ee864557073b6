"""The one loop that drives every solver, with its energy curve, convergence report and divergence check."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch2ebm.common.checks import AUTO, takes
from torch2ebm.engine.call import at_least_single
from torch2ebm.engine.draws import MeanGradients
from torch2ebm.engine.energies import Gaussian
from torch2ebm.engine.results import ROUNDING, LocalGradients, Relaxation, StepSize
from torch2ebm.errors import ConfigurationError, DivergenceError, NonFiniteError
from torch2ebm.inference.base import LOSS, Inference
from torch2ebm.inference.error_inference import ErrorInference
from torch2ebm.inference.history import energies
from torch2ebm.inference.runs import EagerRun, ProgramRun
from torch2ebm.inference.settling import CEILING, Settling, tell_ceiling
from torch2ebm.inference.solver import REMEDY, Form, Rest, Solver, tolerance
from torch2ebm.inference.step_size import correct, look_at_rises, look_at_stiffness
from torch2ebm.inference.value_inference import ValueInference
from torch2ebm.programs.cache import Programs

RISE = 1e3  # an energy that has risen by so many times its start is no overshoot any more
WATCHED = 100  # steps between two looks at the energy; each waits for the device


@dataclass(frozen=True, eq=False)
class InferenceStep:
    """Where a relaxation is after one of its steps: what ``PredictiveCoding(on_step=...)`` is called with.

    All tensors are copies, without a graph, and yours to keep.

    Attributes:
        step: How many steps have been made, from 1.
        beta: The nudge of this phase.
        value: Node name to value, of the nodes that have one; a tuple for a node of several slots.
        error: Node name to value minus prediction, in the same shapes.
        energy: F, summed over samples: what ``relaxation.energy[step]`` will be.
        node_energy: The share of each of these nodes.
        loss: The rest: ``beta`` times the loss.
        residual: As :attr:`Relaxation.residual`, after this step; NaN where it was not measured. Without a ``tol`` only
            the last step is measured.
        last: Whether the relaxation ends here.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model, seen = torch2ebm.convert(net), []
        >>> model.attach(torch2ebm.PredictiveCoding(steps=3, on_step=seen.append))
        >>> torch.nn.functional.mse_loss(model(torch.randn(5, 4)), torch.randn(5, 3)).backward()
        >>> [step.step for step in seen], seen[-1].value["0"].shape
        ([1, 2, 3], torch.Size([5, 8]))
    """

    step: int
    beta: float
    value: Mapping[str, Any]
    error: Mapping[str, Any]
    energy: float
    node_energy: Mapping[str, float]
    loss: float
    residual: float = math.nan
    last: bool = False


OnStep = Callable[[InferenceStep], object]


def is_wanted(on_step: OnStep | None, step: int, last: bool) -> bool:
    """Whether a step is to be shown. An object with ``wants(step, last)`` is asked, and what it passes over is free."""
    wants = getattr(on_step, "wants", None)
    return on_step is not None and (not callable(wants) or bool(wants(step, last)))


@contextmanager
def shown_to(on_step: OnStep | None) -> Iterator[None]:
    """Around the steps of a relaxation: an object with ``closed()`` is told of their end, by an error as well."""
    try:
        yield
    finally:
        tell_end(on_step)


def tell_end(on_step: OnStep | None) -> None:
    """Tell an object that has a method ``closed()`` that there are no more steps."""
    closed = getattr(on_step, "closed", None)  # of a file it is no method
    if callable(closed):
        closed()


def check_on_step(where: str, on_step: object) -> None:
    """Refuse what no step can be shown to: no function, a class, or a function of other arguments."""
    if on_step is None or (callable(on_step) and not isinstance(on_step, type) and takes(on_step, 1)):
        return
    got, remedy = f"{on_step!r:.80}", "For example torch2ebm.monitor.Progress()."
    if isinstance(on_step, type):
        got, remedy = f"the class {on_step.__name__}", f"Write the parentheses, {on_step.__name__}(): an object of it."
    elif callable(on_step):
        got, remedy = f"a function of {inspect.signature(on_step)}", "Give it one argument."
    raise ConfigurationError(f"{where}(on_step=...)", got, "a function of one InferenceStep", remedy)


def relax(
    solver: Solver[Form],
    inference: Form,
    beta: float = 1.0,
    programs: Programs | None = None,
    on_step: OnStep | None = None,
) -> LocalGradients:
    """Relax, take the local gradients where the relaxation ends, and check both.

    Args:
        solver: How the values, or the errors, move.
        inference: What they are: ``solver.inference(call, loss, energies, retain_call)``.
        beta: The nudge that the report shows. The loss has it already (:class:`NudgedLoss`).
        programs: Where recorded steps are kept, under ``compile=True``; None records none.
        on_step: Called after every step; each call costs one evaluation of all nodes more. One that has a method
            ``wants(step, last)`` is asked first. A method ``closed()`` of it is called at the end, after errors too.

    Returns:
        The local gradients, whose ``state.relaxation`` has steps, residual, convergence and the energy of every step.

    Raises:
        NonFiniteError: where the first energy is no number.
        DivergenceError: where a later one is none, or has risen a thousandfold.

    Example:
        >>> import torch, torch2ebm
        >>> from torch2ebm.extend import ValueInference, call_and_loss, relax
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> call, loss = call_and_loss(net, torch.randn(5, 4), lambda output: output.square().mean())
        >>> found = relax(torch2ebm.GradientDescent(steps=10, lr=0.1), ValueInference(call, loss))
        >>> found.state.relaxation.steps, len(found.state.relaxation.energy)
        (10, 11)
    """
    if solver.samples:
        programs = None  # a program would have the same noise in every batch
    from_feedforward = not (isinstance(inference, ErrorInference) and inference.errors)
    run = EagerRun(solver, inference) if programs is None else ProgramRun(programs, solver, inference)
    draws, heat = MeanGradients(), heat_of(solver, inference)
    lr = inference.step_size.used if inference.step_size else getattr(solver, "lr", None)
    tol = tolerance(solver)
    if solver.steps == AUTO:
        inference.still_below = ROUNDING
    most = CEILING if solver.steps == AUTO else int(solver.steps)
    steps, rest, settling = 0, Rest(math.inf, False), Settling(inference, tol)
    with shown_to(on_step):
        while steps < most:
            # a maximum over all values costs a pass: without a tolerance only the last step is reported
            measured = tol > 0 or steps == most - 1
            inference.measuring = measured and not solver.relative_residual  # which has a measure of its own
            steps += run.advance(1 if on_step else _steps_unwatched(tol, most, steps))
            if solver.is_draw(steps):
                draws.add(_gradients_here(inference))
            if measured:
                rest = run.rest()
                if solver.steps == AUTO:
                    rest = settling.seen(rest)
            ends = rest.reached or steps >= most or (steps % WATCHED == 0 and _has_run_away(inference, heat))
            if on_step and is_wanted(on_step, steps, ends):
                run.show()
                on_step(step_of(inference, steps, beta, rest.residual if measured else math.nan, ends))
            if ends:
                break
    # before the report: the last pass adds the final energy to the history
    gradients = run.local_gradients()
    if draws.count:
        gradients = draws.of(gradients)
    try:
        relaxation = report(inference, steps, rest, tol, beta, solver.remedy, heat)
    except DivergenceError:
        correct(solver, inference, rose=True)
        raise
    relaxation = replace(
        _with_step_size(relaxation, inference.step_size, lr),
        is_backprop=solver.one_step_is_backprop and steps == 1 and from_feedforward,
        is_relative=solver.relative_residual or solver.steps == AUTO,
    )
    look_at_rises(solver, inference, relaxation)
    if solver.steps == AUTO and not rest.reached:
        tell_ceiling(solver, inference, rest)
    state = replace(gradients.state, relaxation=relaxation, phases=(relaxation,))
    look_at_stiffness(solver, inference, state)
    return replace(gradients, state=state)


def _gradients_here(inference: Inference) -> LocalGradients:
    """The local gradients at the values as they are, which go on from there."""
    moving = inference.moving()
    found = inference.local_gradients()
    inference.history.pop()  # the energy here is that of the next step's start
    inference.restore(moving)
    return found


def step_of(
    inference: Inference, steps: int, beta: float, residual: float = math.nan, last: bool = False
) -> InferenceStep:
    """Where a relaxation is now. Nothing of it moves, and no count of it goes on."""
    call, values = inference.call, dict[str, Tensor]()
    value: dict[str, Any] = {}
    error: dict[str, Any] = {}
    energy: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    for node in inference.graph.nodes.values():
        with torch.no_grad():
            predicted = call.evaluate(node, [values[slot] for slot in node.reads]).predictions
        if node.is_output:
            outputs.update(zip(node.slots, predicted, strict=True))
            continue
        predictions = [at_least_single(each) for each in predicted]
        pairs = [_value_and_error(inference, *each) for each in zip(node.slots, predictions, strict=True)]
        moved, errors = [v for v, _ in pairs], [e for _, e in pairs]
        values.update((slot, v.to(p.dtype)) for slot, v, p in zip(node.slots, moved, predicted, strict=True))
        value[node.name], error[node.name] = _one_or_all(moved), _one_or_all(errors)
        phi = inference.energies.get(node.name, Gaussian())
        with torch.no_grad():  # its own parameters may require one
            energy[node.name] = sum(float(phi.of_batch(*pair)) for pair in zip(errors, predictions, strict=True))
    loss = float(inference.loss.gradients(outputs)[0])
    return InferenceStep(steps, beta, value, error, loss + sum(energy.values()), energy, loss, residual, last)


def _value_and_error(inference: Inference, slot: str, prediction: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(inference, ValueInference):
        return inference.values[slot], inference.values.minus(slot, prediction)
    found = inference.errors.get(slot) if isinstance(inference, ErrorInference) else None
    error = torch.zeros_like(prediction) if found is None else found.clone()
    return prediction + error, error


def _one_or_all(slots: list[Tensor]) -> Any:
    return slots[0] if len(slots) == 1 else tuple(slots)


def _steps_unwatched(tol: float, most: int, steps: int) -> int:
    """How many steps may be taken before the residual or the energy is read."""
    # the last step is measured and hence a step, or program, of its own
    return 1 if tol > 0 else max(1, min(most - 1 - steps, WATCHED - steps % WATCHED))


def _with_step_size(relaxation: Relaxation, measured: StepSize | None, lr: float | None) -> Relaxation:
    if measured is None:
        return replace(relaxation, lr=lr)
    largest = None if math.isnan(measured.largest) else measured.largest
    return replace(relaxation, lr=lr, largest_lr=largest, lr_cost=measured.backprops)


def heat_of(solver: Solver[Any], inference: Inference) -> float:
    """What the noise of a sampler brings to the energy, up to a factor: its temperature for each entry."""
    return solver.temperature * sum(value.numel() for value in inference.values.values()) if solver.temperature else 0.0


def _has_run_away(inference: Inference, heat: float) -> bool:
    """Whether the last energy is past what :func:`report` lets through: the steps that are left would be wasted."""
    first, last = (float(sum(inference.history[i].values())) for i in (0, -1))
    return not (math.isfinite(last) and last <= _ceiling(first, heat))


def _ceiling(first: float, heat: float) -> float:
    return first + RISE * (abs(first) + heat) + 1.0  # + 1: the energy may start at zero; abs: it may be negative


def report(
    inference: Inference,
    steps: int,
    rest: Rest,
    tol: float,
    beta: float = 1.0,
    remedy: str = REMEDY,
    heat: float = 0.0,
) -> Relaxation:
    """How the relaxation went. Raises :class:`NonFiniteError` or :class:`DivergenceError` where it went wrong."""
    names = [node.name for node in inference.graph.hidden_nodes]
    table = energies(inference.history, [*names, LOSS])
    loss = table.pop(LOSS)
    total = tuple(sum(column) for column in zip(loss, *table.values(), strict=True))
    check_energies(total, {**table, "the loss": loss}, remedy, heat)
    return Relaxation(
        steps,
        rest.reached if tol > 0 else None,
        rest.residual,
        total,
        table,
        loss,
        rest.of_samples,
        tol=tol,
        beta=beta,
        slot_residual=dict(inference.driving),
        settled=rest.settled,
        on_kinks=rest.on_kinks,
        at_minimum=rest.at_minimum,
        # 1 + beta sigma^2 is the largest curvature there is; what was met is a lower bound
        sigma_squared=None if rest.stretch is None else max(rest.stretch - 1, 0.0) / abs(beta),
    )


def check_energies(
    total: tuple[float, ...], parts: Mapping[str, tuple[float, ...]], remedy: str = REMEDY, heat: float = 0.0
) -> None:
    """Raise :class:`NonFiniteError` for a start, :class:`DivergenceError` for a later energy, that went wrong."""
    ceiling = _ceiling(total[0], heat)
    # not (finite and <=): NaN compares false with everything
    bad = next((step for step, energy in enumerate(total) if not (math.isfinite(energy) and energy <= ceiling)), None)
    if bad is None:
        return
    broken = (name for name, column in parts.items() if not math.isfinite(column[bad]))
    # the part that is no number, else the largest one
    where = next(broken, max(parts, key=lambda name: parts[name][bad]))
    if not math.isfinite(total[0]):
        raise NonFiniteError(
            f"{where}, feed-forward pass (inference step 0)",
            f"energy {total[0]}",
            "a finite number",
            "Look for NaN or infinity in the input, the target and the parameters.",
        )
    raise DivergenceError(
        f"{where}, inference step {bad}",
        f"energy {total[bad]:.4g} after {total[0]:.4g} at the start",
        "an energy that falls",
        remedy,
        total[: bad + 1],
    )
