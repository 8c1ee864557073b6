"""What another run of the recorded operations shows of each: the :class:`Capture` that is cut in nodes.

A recorded graph says which operations follow one another. It does not say what they make: whether a gradient flows
through it, whether random numbers were drawn. So the operations run once more, one by one, on the run's own constants,
and each gets a :class:`Fact`. *Live* are results that can carry a gradient, and so an error::

    def forward(self, x):             # x: [5, 4]    live   tensor   else
        mask = x > 0                  # a constant: it reads nothing that depends on a parameter
        h = self.linear(x)            # [5, 8]       yes    yes
        a, b = h.chunk(2, 1)          # 2 x [5, 4]   yes    no       data: a tuple of tensors
        y = F.dropout(a * mask)       # [5, 4]       yes    yes      random
        return y.reshape(5, 4) + b    # [5, 4]       yes    yes

:mod:`torch2ebm.graph.roles` decides by these facts what each operation is to the energy graph.

All parameters require a gradient meanwhile: whether an operation can learn must not depend on what is frozen now.
Warning: the results of all operations are kept until the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch2ebm.capture.functions import draws_from_its_own
from torch2ebm.capture.recording import Place, Trace, traced
from torch2ebm.capture.run import Run
from torch2ebm.common.nested import leaves_of
from torch2ebm.common.users_code import first_place
from torch2ebm.errors import UntraceableError, first_line
from torch2ebm.isolation.batch_statistics import Statistics, keeping_statistics
from torch2ebm.isolation.module_state import (
    all_parameters_trainable,
    plain_autograd,
    untouched,
)
from torch2ebm.isolation.out_of_memory import means_no_memory
from torch2ebm.isolation.random_numbers import RandomState
from torch2ebm.isolation.torch_modes import entered


@dataclass(frozen=True)
class Fact:
    """What a run showed of one operation."""

    live: bool  # floating point, and differentiable with respect to parameters
    tensor: bool  # exactly one tensor
    random: bool = False  # it drew random numbers
    batch_statistics: bool = False  # it normalised by the mean and variance of the batch
    finite: bool = True  # no infinity and no NaN, as a mask of minus infinities has
    shape: tuple[int, ...] = ()
    data: bool = False  # a tensor, or a structure that holds some: not a number


@dataclass(frozen=True, eq=False)
class Capture:
    """The graph of one sequence of operations, with what a run showed.

    Attributes:
        module: The module whose run it was.
        trace: The graph, and how it hangs together with the run.
        leaves: Submodules that become one node each.
        facts: By the graph's nodes.
        run: The recorded run, without its tensors.
        varying: Numbers that are inputs of the graph.
        held: Results that somebody may hold after the run, and use in the loss: further outputs.
    """

    module: nn.Module
    trace: Trace
    leaves: frozenset[str]
    facts: Mapping[fx.Node, Fact]
    run: Run
    varying: frozenset[Place]
    held: tuple[int, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        return self.trace.graph

    def inputs(self, run: Run) -> list[Any]:
        """What the graph's placeholders are in a run of this sequence: constants, then numbers."""
        return [*run.constants, *(run.numbers[i][j] for i, j in self.trace.numbers.values())]


class _Observer(fx.Interpreter):
    def __init__(self, module: nn.Module, trace: Trace, run: Run, device: torch.device) -> None:
        super().__init__(module, garbage_collect_values=False, graph=trace.graph)
        self.device = device
        self.drawing = {node for node, i in trace.operations.items() if draws_from_its_own(run.numbers[i])}
        self.facts: dict[fx.Node, Fact] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            value = super().run_node(n)
            self.facts[n] = Fact(live=False, tensor=isinstance(value, Tensor), data=_has_data(value))
            return value
        before, statistics = RandomState(self.device), Statistics()
        with entered(keeping_statistics(statistics)):
            value = super().run_node(n)
        self.facts[n] = _fact(value, before.advanced() or n in self.drawing, bool(statistics))
        return value


def _fact(value: Any, random: bool, batch_statistics: bool) -> Fact:
    tensor = isinstance(value, Tensor)
    return Fact(
        live=any(is_live(leaf) for leaf in leaves_of(value)),
        tensor=tensor,
        random=random,
        batch_statistics=batch_statistics,
        finite=not (tensor and value.is_floating_point()) or _is_finite(value),
        shape=tuple(value.shape) if tensor else (),
        data=_has_data(value),
    )


def _is_finite(value: Tensor) -> bool:
    # a sum shows it in one pass and without another tensor; it may overflow where the entries are finite
    plain = value.layout is torch.strided and not value.is_nested and value.itemsize > 1
    if plain and math.isfinite(value.detach().sum().item()):
        return True
    if value.layout is not torch.strided and not value.is_nested:
        value = value.to_dense()  # torch looks for infinities in dense tensors alone
    return bool(torch.isfinite(value).all())


def _has_data(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in leaves_of(value))


def is_live(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and (value.is_floating_point() or value.is_complex())


def capture(
    module: nn.Module,
    run: Run,
    leaves: frozenset[str],
    varying: frozenset[Place],
    held: frozenset[int],
    device: torch.device,
) -> Capture:
    """The graph of a recorded run; generators, buffers and attributes are as before.

    Raises:
        UntraceableError: where an operation that forward ran cannot run again.
    """
    further = tuple(sorted(held))
    trace = traced(module, run, varying, further, device.type)
    observer = _Observer(module, trace, run, device)
    made = Capture(module, trace, leaves, observer.facts, run.outline(), varying, further)
    with plain_autograd(), untouched(module, device), all_parameters_trainable(module):
        try:
            observer.run(*made.inputs(run))
        except Exception as error:
            if means_no_memory(error):
                raise
            raise UntraceableError(
                f"torch2ebm cannot capture {type(module).__name__}",
                f"{first_place(error)}: {first_line(error)}, when run again",
                "operations that can run again on the same tensors",
                "Make the submodule concerned one node with nodes=[...].",
            ) from error
    return made
