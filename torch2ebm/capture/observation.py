"""What a real run shows of each operation of a trace: the :class:`Capture` that is cut in nodes.

A traced graph says which operations follow one another. It does not say what they make: a tensor or a number, whether
a gradient flows through it, whether random numbers were drawn. So the graph is run once, operation by operation, on
real tensors, and each operation gets a :class:`Fact`. *Live* are results that can carry a gradient, and so an error::

    def forward(self, x):             # x: [5, 4]    live   tensor   else
        n = x.size(0)                 # 5            no     no
        mask = x > 0                  # [5, 4]       no     yes      boolean
        h = self.linear(x)            # [5, 8]       yes    yes
        a, b = h.chunk(2, 1)          # 2 x [5, 4]   yes    no       data: a tuple of tensors
        y = F.dropout(a * mask)       # [5, 4]       yes    yes      random
        return y.reshape(n, 4) + b    # [5, 4]       yes    yes

:mod:`torch2ebm.graph.roles` decides by these facts what each operation is to the energy graph.

The module itself runs first. Its outputs, buffers and gradients (:class:`RealRun`) are what the finished energy graph
is compared with. Both runs start from the same random numbers and buffers, and leave the module as it was.

Warning: the run keeps all intermediate results until its end, since it tells shared memory by its address. A capture
may therefore need more memory than a training step.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch2ebm.capture.in_place_fx import copied, expand_tuples
from torch2ebm.capture.real_run import RealRun, is_live, real_run
from torch2ebm.capture.signature import Signature
from torch2ebm.capture.trace import Settings, Trace, holds, is_scalar, untraceable
from torch2ebm.common.nested import leaves_of, map_leaves
from torch2ebm.errors import CaptureMismatchError, StaleAttributeWarning, UntraceableError
from torch2ebm.isolation.batch_statistics import Statistics, keeping_statistics
from torch2ebm.isolation.module_state import all_parameters_trainable, plain_autograd, untouched
from torch2ebm.isolation.random_numbers import RandomState
from torch2ebm.isolation.torch_modes import entered


@dataclass(frozen=True)
class Fact:
    """What a real run showed of one operation."""

    live: bool  # floating point, and differentiable with respect to parameters or to a node that the user named
    tensor: bool  # exactly one tensor
    random: bool = False  # it drew random numbers
    batch_statistics: bool = False  # it normalised by the mean and variance of the batch
    finite: bool = True  # no infinity and no NaN, as a mask of minus infinities has
    shape: tuple[int, ...] = ()
    data: bool = False  # a tensor, or a structure that holds some: not a shape


class _Observer(fx.Interpreter):
    def __init__(self, module: nn.Module, traced: Trace, device: torch.device) -> None:
        # results are kept: the address of a freed one would be used again, and two would seem to share memory
        super().__init__(module, garbage_collect_values=False, graph=traced.graph)
        self.device, self.leaves = device, traced.leaves
        self.facts: dict[fx.Node, Fact] = {}
        self.outputs: dict[fx.Node, Any] = {}  # of operations with several outputs
        self.storages: dict[fx.Node, set[int]] = {}
        self.wrote: set[fx.Node] = set()  # modules kept whole that wrote their input

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            value = super().run_node(n)
            self.facts[n] = Fact(live=False, tensor=isinstance(value, Tensor), data=_has_data(value))
            return value
        random_before, statistics = RandomState(self.device), Statistics()
        versions = [tensor._version for tensor in self._read(n)]  # torch counts the writes to a tensor
        with entered(keeping_statistics(statistics)):
            value = super().run_node(n)
        if n.op == "call_module" and versions != [tensor._version for tensor in self._read(n)]:
            self.wrote.add(n)
        if n.op == "call_module" and n.target in self.leaves:
            value = map_leaves(_made_live, value)
        self.facts[n] = Fact(
            live=any(is_live(leaf) for leaf in leaves_of(value)),
            tensor=isinstance(value, Tensor),
            random=random_before.advanced(),
            batch_statistics=bool(statistics),
            finite=not (isinstance(value, Tensor) and value.is_floating_point()) or bool(torch.isfinite(value).all()),
            shape=tuple(value.shape) if isinstance(value, Tensor) else (),
            data=_has_data(value),
        )
        if not isinstance(value, Tensor):
            self.outputs[n] = value
        return value

    def _read(self, n: fx.Node) -> list[Tensor]:
        return [value for source in n.all_input_nodes if isinstance(value := self.env.get(source), Tensor)]

    def check_writes(self, writes: Mapping[fx.Node, fx.Node]) -> None:
        """Raise where what was written in place is read later under another name: a view, its base, the input."""
        position = {node: i for i, node in enumerate(self.facts)}
        storage = {node: _storages(value) for node, value in self.env.items() if node in position}
        # the graph's own writes, which by now are new tensors, and modules kept whole, which still write
        for write, written in [*writes.items(), *((n, n.all_input_nodes[0]) for n in self.wrote)]:
            # a copy that protects an input stands between: the module would have written what was copied
            original = written.all_input_nodes[0] if written.target is copied else written
            shared = storage.get(original, set())
            for other in position:
                if position[other] >= position[write] or not shared & storage.get(other, set()):
                    continue
                readers = [user for user in other.users if position.get(user, -1) > position[write]]
                # readers of what the graph itself wrote read the new tensor already; those of its views do not
                if readers and (other is not original or write in self.wrote):
                    raise _aliased(self.module, write, other)


def _storages(value: Any) -> set[int]:
    # tensors without elements all have address 0, and share nothing
    return {leaf.untyped_storage().data_ptr() for leaf in leaves_of(value) if isinstance(leaf, Tensor)} - {0}


def _aliased(module: Any, write: fx.Node, other: fx.Node) -> UntraceableError:
    return UntraceableError(
        f"torch2ebm cannot capture {type(module).__name__}",
        f"{write.format_node()} writes in place what '{other.name}' is read as afterwards",
        "writes in place whose result is read through the tensor that was written",
        "Write to a copy (x = x.clone()), use the form that is not in place, or make the submodule around both one "
        "node with nodes=[...].",
    )


def _has_data(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in leaves_of(value))


def _made_live(value: Any) -> Any:
    """Let a node that the user named have a value of its own, even if no parameter feeds it."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_()
    return value


@dataclass(frozen=True, eq=False)
class Capture:
    """The graph of one module in one mode for one signature, with what a real run showed. It is verified later."""

    module: nn.Module
    graph: fx.Graph
    constants: Mapping[str, Tensor]  # tensors that forward made while it was traced: the first placeholders
    leaves: frozenset[str]  # submodules kept whole
    signature: Signature
    facts: Mapping[fx.Node, Fact]
    reference: RealRun
    settings: Settings  # plain attributes whose values are written into the graph
    captured_by: str  # "fx" or "export"


def capture(module: nn.Module, traced: Trace, signature: Signature, tensors: Sequence[Tensor]) -> Capture:
    """Run the module and its trace once on ``tensors``; generators and buffers are restored afterwards."""
    device = tensors[0].device if tensors else torch.device("cpu")
    with plain_autograd(), untouched(module, device):
        tensors = [tensor.detach().clone() for tensor in tensors]
        # the module first: if it refuses the inputs, that is what the user should read, and not what the trace says
        reference = real_run(module, signature, tensors)
        settings = _kept_by_forward(traced.settings)
    _warn_of_kept(module, reference.kept, traced.leaves)
    with plain_autograd(), untouched(module, device):
        observer = _Observer(module, traced, device)
        with all_parameters_trainable(module):
            try:
                observer.run(*[constant.to(device) for constant in traced.constants.values()], *tensors)
            except Exception as error:
                raise untraceable(module, "", error) from error
    observer.check_writes(traced.writes)  # before the tuples are taken apart: it knows the traced operations alone
    expand_tuples(traced.graph, observer.outputs, observer.facts, _fact_of_part)
    return Capture(
        module,
        traced.graph,
        traced.constants,
        traced.leaves,
        signature,
        observer.facts,
        reference,
        settings,
        traced.captured_by,
    )


def _warn_of_kept(module: nn.Module, kept: frozenset[str], whole: frozenset[str]) -> None:
    """Warn where forward leaves tensors in attributes, which a graph in its place does not set.

    A submodule kept whole runs as it is, and sets its own.
    """
    stale = sorted(path for path in kept if not any(path.startswith(f"{name}.") for name in whole))
    if stale:
        warnings.warn(
            f"{type(module).__name__}.forward leaves tensors in its attributes {stale}. Under an algorithm a graph "
            "runs in the place of forward, and they keep what the last plain forward left in them. Return them from "
            "forward, or make each a buffer (register_buffer).",
            StaleAttributeWarning,
            stacklevel=2,
        )


def _kept_by_forward(settings: Settings) -> Settings:
    """Those that a run of forward leaves as they are.

    A list that it appends to, or a None that it replaces, is no part of the graph. Raises
    :class:`CaptureMismatchError` for a number, a flag or a string that it changes.
    """
    for module, name, value in settings:
        if is_scalar(value) and not holds(module, name, value):
            raise CaptureMismatchError(
                f"{type(module).__name__}.forward",
                f"a forward that changes its attribute '{name}'",
                "a forward that changes nothing but buffers",
                "Make the attribute a buffer (register_buffer), or make that submodule one node with nodes=[...].",
            )
    return tuple(setting for setting in settings if holds(*setting))


def _fact_of_part(value: Any) -> Fact:
    tensor = isinstance(value, Tensor)
    return Fact(live=is_live(value), tensor=tensor, shape=tuple(value.shape) if tensor else (), data=_has_data(value))
