"""An answer: the module run, what is free relaxed, and what was found by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch2ebm.clamping.asking import check_determined, check_parts, check_something_moves
from torch2ebm.clamping.inferred import Found, Inferred
from torch2ebm.clamping.inputs import Inputs
from torch2ebm.clamping.places import Places
from torch2ebm.clamping.relaxing import Answer, Clamped
from torch2ebm.clamping.sampling import carried, in_chains, repeated
from torch2ebm.common.checks import check_choice, check_positive
from torch2ebm.common.known_names import KnownNames
from torch2ebm.common.nested import map_leaves
from torch2ebm.common.users_code import users_level
from torch2ebm.engine.call import Call
from torch2ebm.engine.energies import Energy
from torch2ebm.errors import ConfigurationError, NotSettledWarning, Torch2EBMError
from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.inference.relaxation import OnStep, check_on_step
from torch2ebm.inference.solver import Solver
from torch2ebm.isolation.module_state import untouched
from torch2ebm.memory.last_values import FEEDFORWARD, LAST, STARTS
from torch2ebm.potentials.energy_check import check_energy_gradients
from torch2ebm.potentials.energy_parameters import check_at_forward, tensors_of
from torch2ebm.potentials.node_energies import NodeEnergies, check_free, check_names, node_energies
from torch2ebm.programs.cache import Programs
from torch2ebm.solvers import ErrorConjugateGradient, Langevin

Run = Callable[[tuple[Any, ...], Mapping[str, Any]], Call]
TOL, STEPS = 1e-3, 200  # of the solver that is taken where none is given


def question_settings(
    solver: Solver[Any] | None,
    tol: float | None,
    precisions: Mapping[str, float | Tensor],
    energies: Mapping[str, Energy],
) -> tuple[Solver[Any], NodeEnergies]:
    """The solver, and the energies by node. Raises :class:`ConfigurationError` for what is neither."""
    named = node_energies("model.infer", precisions, energies)
    check_energy_gradients(named)
    return _chosen(solver, tol), named


def _chosen(solver: Solver[Any] | None, tol: float | None) -> Solver[Any]:
    if tol is not None:
        check_positive("model.infer", tol=tol)
    if solver is None:
        return ErrorConjugateGradient(tol=TOL if tol is None else tol, steps=STEPS)
    if not isinstance(solver, Solver):
        raise ConfigurationError(
            "model.infer(solver=...)", repr(solver), "a solver object", "For example ErrorConjugateGradient(tol=1e-4)."
        )
    return solver if tol is None else replace(solver, tol=tol)  # type: ignore[type-var]


def start_of(start: Mapping[str, Any] | str) -> tuple[Mapping[str, Any], str]:
    """Where named values begin, and where all others do. Raises :class:`ConfigurationError` for another word."""
    if isinstance(start, str):
        check_choice("model.infer", "start", start, STARTS)
        return {}, start
    if not isinstance(start, Mapping):
        raise ConfigurationError(
            "model.infer(start=...)", type(start).__name__, "a mapping of names, or a word", f"For example {LAST!r}."
        )
    return start, FEEDFORWARD


def _with_noise(solver: Langevin, device: torch.device) -> Langevin:
    """A generator for a sampler that was given none: torch's own is as before at the end, but for this one number."""
    if solver.generator is not None:
        return solver
    seed = int(torch.randint(2**62, ()))
    return replace(solver, generator=torch.Generator(device).manual_seed(seed))


@dataclass(frozen=True)
class How:
    """How an answer is found.

    Attributes:
        solver: How values relax, or are drawn.
        energies: By node.
        start: Where values begin that have no start of their own.
        programs: Where recorded steps are kept; None records none.
        on_step: Called after every step.
    """

    solver: Solver[Any]
    energies: Mapping[str, Energy]
    start: str = FEEDFORWARD
    programs: Programs | None = None
    on_step: OnStep | None = None

    def __post_init__(self) -> None:
        check_on_step("model.infer", self.on_step)


def answered(run: Run, inputs: Inputs, how: How) -> Inferred:
    """Run the module, relax what is free, and say what was found.

    Args:
        run: From arguments to a call that no algorithm has filled; the module and its generators are left as they were.
        inputs: What the module is called with.
        how: The solver, the energies, and where values begin.

    Raises:
        ConfigurationError: for a question that contradicts itself, before anything is relaxed.
    """
    bound = inputs.bound
    call = run(bound.args, bound.kwargs)
    if isinstance(how.solver, Langevin):
        how = replace(how, solver=_with_noise(how.solver, call.device))
    with untouched(call.graph.module, call.device):
        return _answered(run, call, inputs, how)


def tell_unsettled(where: str, solver: Solver[Any], answer: Answer) -> None:
    """One warning where the steps were too few; a solver without a tolerance has been asked for its steps alone."""
    relaxation = answer.relaxation
    if relaxation.converged is False:
        warnings.warn(
            NotSettledWarning(
                f"{where}: values still move after {relaxation.steps} steps, by a residual of "
                f"{relaxation.residual:.2g} where {relaxation.tol:.2g} was asked for. Take more steps, for example "
                f"solver={solver.with_steps(4 * relaxation.steps)!r}, a larger tol, or another start."
            ),
            stacklevel=users_level(),
        )


def check_priors(where: str, energies: Mapping[str, Energy], inputs: Inputs) -> None:
    """Raises :class:`ConfigurationError` for the energy of an input that is free: that is its prior."""
    twice = sorted(energies.keys() & inputs.energies.keys())
    if twice:
        raise ConfigurationError(
            f"{where}(precisions=..., energies=...)",
            f"an energy of {twice[0]!r}, a free input",
            "energies of nodes",
            f"Give it as prior={{{twice[0]!r}: energy}}; its prediction is zero, or the second of a pair.",
        )


def _answered(run: Run, call: Call, inputs: Inputs, how: How) -> Inferred:
    question, solver, energies = inputs.question, how.solver, how.energies
    call.feedforward(keep_graph=False)
    places = Places.of(call.graph, call.run.output, inputs.places, frozenset(inputs.fixed))
    energies = NodeEnergies(places.by_node(f"{question.where}(precisions=..., energies=...)", energies))
    check_names(question.where, energies, call.graph, outputs=True)
    check_priors(question.where, energies, inputs)
    pattern = question.pattern(places, call.values, call.batch_size)
    starts = question.starts(places, pattern, call.values, call.batch_size)
    whole = [name for name in energies if all(map(pattern.is_whole, call.graph.nodes[name].slots))]
    check_free(question.where, energies, whole)
    check_at_forward(question.where, energies, call)
    check_parts(question.where, pattern, call.graph, {**energies, **inputs.energies})
    check_something_moves(question.where, pattern, places)
    undecided = {n: each for n, each in inputs.energies.items() if solver.samples or not inputs.begun.get(n)}
    check_determined(question.where, pattern, places, undecided, call.values)
    if how.start != FEEDFORWARD:
        starts = _named_starts(call, inputs, starts)
    chains = solver.chains if isinstance(solver, Langevin) else 1
    if isinstance(solver, Langevin):
        pattern, starts = repeated(pattern, starts, call.batch_size, chains)
        call = beside_each_other(run, call, inputs, chains, {**energies, **inputs.energies})
        pattern = replace(pattern, carried=carried(call.graph, pattern))
    together, recorded = {**energies, **inputs.energies}, how.programs is not None
    answer = Clamped.of(call, pattern, together, starts, how.start, recorded).relaxed(solver, how.programs, how.on_step)
    tell_unsettled(question.where, solver, answer)
    return _result(call, answer, inputs, chains, places.also)


def beside_each_other(run: Run, call: Call, inputs: Inputs, chains: int, energies: Mapping[str, Energy]) -> Call:
    """A call of several chains: the batch so many times. It has to compute what the one chain does, so many times.

    Raises:
        ConfigurationError: where an input, a precision or a value counts something else than samples.
    """
    size, bound = call.batch_size, inputs.bound
    if chains == 1:
        return call
    args, kwargs = map_leaves(lambda leaf: in_chains(leaf, size, chains), (bound.args, bound.kwargs))
    per_sample = any(t.ndim > 1 and len(t) == size > 1 for energy in energies.values() for t in tensors_of(energy))
    try:
        several = run(args, kwargs)
        several.feedforward(keep_graph=False)
        same = not per_sample and all(_is_repeated(call, several, slot, chains) for slot in call.values)
    except (Torch2EBMError, RuntimeError):
        same = False
    if not same:
        raise ConfigurationError(
            f"Langevin(chains={chains})",
            "inputs, precisions or values of which dimension 0 is not the samples of the batch alone",
            "a module that computes each sample by itself, along dimension 0",
            "Take chains=1 on a batch that has each sample several times.",
        )
    return several


def _is_repeated(one: Call, several: Call, slot: str, chains: int) -> bool:
    value, other = one.values[slot], several.values[slot]
    if value.ndim == 0 or len(value) != one.batch_size or other.shape != (chains * len(value), *value.shape[1:]):
        return False
    if any(node.random for node in one.graph.order):  # other masks
        return True
    return torch.allclose(other, value.repeat(chains, *[1] * (value.ndim - 1)), rtol=1e-3, atol=1e-5)


def _named_starts(call: Call, inputs: Inputs, starts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The starts that somebody has given: a prior's mean gives way to where the input was, and a value stays."""
    found = dict(starts)
    for argument, node in inputs.nodes.items():
        for slot in call.graph.nodes[node].slots if node in inputs.energies else ():
            if node not in inputs.begun:
                found.pop(slot, None)
            else:
                found.setdefault(slot, inputs.bound.arguments[argument])
    return found


def _result(call: Call, answer: Answer, inputs: Inputs, chains: int, also: Mapping[str, str]) -> Inferred:
    graph, found = call.graph, answer.found
    parts = KnownNames({node.name: tuple(found[slot] for slot in node.slots) for node in graph.nodes.values()})

    def of(pick: Callable[[Found], Tensor]) -> Mapping[str, Any]:
        picked = {name: tuple(map(pick, each)) for name, each in parts.items()}
        return KnownNames({name: each[0] if len(each) == 1 else each for name, each in picked.items()}, also)

    value = of(lambda each: each.value)
    given = {name: tensor.detach() for name, tensor in inputs.fixed.items() if name not in value}
    everything = {a: value[inputs.nodes[a]] if a in inputs.nodes else v for a, v in inputs.bound.arguments.items()}
    tensors = [each for each in everything.values() if isinstance(each, Tensor)]
    leaves = [found[o.slot].value if o.slot is not None else None for o in graph.outputs]
    return Inferred(
        KnownNames({**given, **value}, also),
        of(lambda each: each.prediction),
        of(lambda each: each.error),
        tensors[0].detach().clone() if len(tensors) == 1 else everything,
        filled(call.run.output, leaves),
        answer.relaxation,
        samples=_samples(graph, answer.samples, chains, also),
        parts=parts,
    )


def _samples(
    graph: EnergyGraph, drawn: Mapping[str, Tensor], chains: int, also: Mapping[str, str]
) -> Mapping[str, Any]:
    """By node, with a dimension for the chains."""
    found: dict[str, Any] = {}
    for node in graph.nodes.values():
        parts = tuple(
            each.reshape(len(each), chains, -1, *each.shape[2:])
            for slot in node.slots
            if (each := drawn.get(slot)) is not None
        )
        if parts:
            found[node.name] = parts[0] if len(parts) == 1 else parts
    return KnownNames(found, also)


def filled(output: Any, leaves: Sequence[Any]) -> Any:
    """What a model returned, with other tensors in it; None keeps its own."""
    theirs = iter(leaves)  # those after the output's are held elsewhere

    def of(leaf: Any) -> Any:
        ours = next(theirs)
        return ours if ours is not None else leaf.detach() if isinstance(leaf, Tensor) else leaf

    return map_leaves(of, output)
