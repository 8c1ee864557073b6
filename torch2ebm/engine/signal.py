"""Where nothing is learned, told once: no error has come, or rounding is all that is left, or a gradient is zero.

Said of the first batch of a graph. A later one costs nothing, and ``state.signal`` says it when it is asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch2ebm.common.text import listed
from torch2ebm.common.users_code import users_level
from torch2ebm.engine.results import ROUNDING, InferenceState
from torch2ebm.errors import NoSignalWarning, NotSettledWarning
from torch2ebm.graph.energy_graph import EnergyGraph

SWALLOWED = 250.0  # in units of rounding: what a step of 1 / 250 makes rounding of
DOCTOR = "torch2ebm.diagnose(model, loss_fn, batch) prints what to take and why."


@dataclass(frozen=True)
class Cures:
    """What the users of an algorithm can do; the defaults are those of relaxing values or errors.

    Attributes:
        late: Where errors have not come; ``{steps}`` stands for the steps that they need.
        rounding: Where errors are rounding.
        flat: Why every error can be zero.
        learned: What is learned where no error has come.
        behind: After how many steps an error has left the output.
    """

    late: str = "take {steps} steps or more, or PredictiveCoding() with nothing set."
    rounding: str = "Take PredictiveCoding() with nothing set, or a solver of errors."
    flat: str = "the loss has no slope at this output."
    learned: str = "whose gradients are exactly zero"
    behind: int = 0


def tell_where_there_is_no_signal(
    where: str,
    state: InferenceState,
    gradients: Mapping[str, Tensor],
    graph: EnergyGraph | None = None,
    cures: Cures = Cures(),
) -> bool:
    """One warning with all that there is to say; nothing where every parameter of the loss learns.

    Args:
        where: The algorithm's name.
        state: The state of the batch.
        gradients: What its parameters got, by name.
        graph: The graph whose nodes these are; that of the state if None.
        cures: What to do.

    Returns:
        True, to be kept by :meth:`EnergyGraph.once`.
    """
    found = list(_findings(state, gradients, state.graph if graph is None else graph, cures))
    if found:
        warnings.warn(NoSignalWarning(f"{where}: {' '.join([*found, DOCTOR])}"), stacklevel=users_level())
    return True


def tell_of_kinks(where: str, state: InferenceState) -> bool:
    """One warning where values may rest on the jump of an energy; returns True, as the other one."""
    names = [name for name, energy in state.energies.items() if energy.has_kinks]
    if names and state.relaxation.on_kinks != 0:  # None where the solver does not tell
        said = (
            f"{where}: values of {listed(names)} may rest where the energy's derivative jumps, at an error of zero. "
            "The gradients of the node's weights are then not those of the equilibrium. Huber(delta, precision) with "
            "precision=1/(scale*delta) is Laplace(scale) with the jump rounded off."
        )
        warnings.warn(NotSettledWarning(said), stacklevel=users_level())
    return True


def _findings(
    state: InferenceState, gradients: Mapping[str, Tensor], graph: EnergyGraph, cures: Cures
) -> Iterator[str]:
    steps = steps_to_reach(graph, state.errors)
    if steps and not any(bool(error.any()) for error in state.errors.values()):
        yield f"every error is exactly zero, and so are all gradients: {cures.flat}"
        return
    if all(_is_rounding(state, slot) for node in graph.output_nodes for slot in node.slots):
        return  # a loss at its minimum, a divergence from a copy for example: nothing is to be learned
    late = [name for name in state.unreached if name in steps]
    if late:
        needed = max(steps[name] for name in late) + cures.behind
        yield (
            f"no error has reached {listed(late)}, {cures.learned}. Errors travel one level a step: "
            f"{cures.late.format(steps=needed)}"
        )
    # who computes in double precision knows why
    single = any(tensor.dtype != torch.float64 for tensor in state.predictions.values())
    small = {*state.without_signal, *_swallowed(state, graph)} if single else set()
    if lost := [name for name in small if name in steps and name not in late]:
        # what is that small there is rounded away before it
        before = min(steps[name] for name in lost)
        zero = steps.keys() - _with_error(state, graph, steps) - set(late)
        lost = [name for name in graph.nodes if name in lost or (name in zero and steps[name] > before)]
        yield f"rounding outweighs the errors in {listed(lost)}, and their gradients are noise. {cures.rounding}"
    if still := _without_gradient(graph, gradients, _with_error(state, graph, steps)):
        yield (
            f"the gradients of {listed(still)} are exactly zero, though errors have reached their nodes: units that "
            "are all off, for example. Nodes before them learn nothing either."
        )


def _is_rounding(state: InferenceState, slot: str, times: float = 1.0) -> bool:
    error, prediction = state.errors.get(slot), state.predictions.get(slot)
    if error is None or prediction is None or not error.numel():
        return True
    size = float(prediction.abs().max()) + 1.0
    return float(error.abs().max()) * abs(state.error_unit) <= times * ROUNDING * torch.finfo(error.dtype).eps * size


def _swallowed(state: InferenceState, graph: EnergyGraph) -> Iterator[str]:
    """Nodes without an error next to one whose error is so small that a step of a part of it moves no value."""
    for node in graph.nodes.values():
        small = all(state.rounding.get(slot) and _is_rounding(state, slot, SWALLOWED) for slot in node.slots)
        if small and any(bool(state.errors[slot].any()) for slot in node.slots if slot in state.errors):
            parents = {graph.owner[slot] for slot in node.reads}
            yield from (each.name for each in parents if not _with_error(state, graph, [each.name]))


def _with_error(state: InferenceState, graph: EnergyGraph, names: Collection[str]) -> set[str]:
    """Nodes that an error has reached: where none has, the cause is further on, or it has been rounded away."""
    slots = {name: [slot for slot in graph.nodes[name].slots if slot in state.errors] for name in names}
    return {name for name in names if any(bool(state.errors[slot].any()) for slot in slots[name])}


def _without_gradient(graph: EnergyGraph, gradients: Mapping[str, Tensor], nodes: Collection[str]) -> list[str]:
    found: dict[str, None] = {}
    for node in graph.nodes.values():
        read = [name for name in node.parameters if name in gradients]
        # one alone can be used to no effect: an RNN's recurrent weights in a sequence of one step
        if node.name in nodes and not any(bool(gradients[name].any()) for name in read):
            found.update(dict.fromkeys(read))
    return list(found)


def steps_to_reach(graph: EnergyGraph, errors: Collection[str]) -> dict[str, int]:
    """After how many steps an error that travels one edge a step has reached each node; those it never reaches miss.

    Args:
        graph: The graph.
        errors: Slots that have an error; of the outputs, those that the loss depends on.
    """
    found = {node.name: 0 for node in graph.output_nodes if any(slot in errors for slot in node.slots)}
    front = list(found)
    while front:
        following = []
        for name in front:
            for slot in graph.nodes[name].reads:
                parent = graph.owner[slot].name
                if parent not in found:
                    found[parent] = found[name] + 1
                    following.append(parent)
        front = following
    return found
