"""``torch2ebm.check``: what there is to know of a module before you train it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torch2ebm.common.nested import leaves_of
from torch2ebm.common.text import html_text
from torch2ebm.engine.call import Call
from torch2ebm.errors import ConfigurationError
from torch2ebm.graph.energy_graph import EnergyGraph
from torch2ebm.graph.granularity import Granularity
from torch2ebm.graph.lone_node import ALONE, FINER, lone_node
from torch2ebm.model.arguments import as_arguments
from torch2ebm.model.energy_model import EnergyModel, convert
from torch2ebm.reports.findings import Finding, findings_frame

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, repr=False)
class CheckReport:
    """What :func:`check` has found. ``print`` it.

    Attributes:
        nodes: The names of the value nodes, parents before children.
        table: The nodes as a text table.
        findings: What there is to know; none of it keeps the module from being trained.
        batch_size: The size of the dimension that is taken for the batch: see ``batch_dim`` of :func:`convert`.
    """

    nodes: tuple[str, ...]
    table: str
    findings: tuple[Finding, ...]
    batch_size: int

    def of_kind(self, kind: str) -> tuple[Finding, ...]:
        """The findings of one kind, for example ``"opaque"``."""
        return tuple(finding for finding in self.findings if finding.kind == kind)

    def to_dataframe(self) -> DataFrame:
        """The findings as a table: ``kind``, ``place``, ``text`` and ``remedy``.

        Raises:
            ConfigurationError: if pandas is not installed (``pip install torch2ebm[pandas]``).
        """
        return findings_frame(self.findings)

    def __repr__(self) -> str:
        kinds = ", ".join(sorted({finding.kind for finding in self.findings})) or "nothing to report"
        return f"CheckReport({len(self.nodes)} nodes, a batch of {self.batch_size}: {kinds}); print it to see all"

    def _repr_html_(self) -> str:
        return html_text(str(self))

    def __str__(self) -> str:
        counted = f"{len(self.nodes)} nodes, a batch of {self.batch_size}"
        found = [str(finding) for finding in self.findings] or ["nothing to report"]
        return "\n".join([self.table, "", counted, *found])


def check(module: nn.Module, example_inputs: Any, nodes: Granularity = "auto") -> CheckReport:
    """Look at a module without training it: its nodes, what is opaque, random or without a gradient, and where.

    The module runs twice on the example. Parameters, buffers, attributes and generators are left as they were.

    Args:
        module: Any module, or a converted model.
        example_inputs: A tuple is positional, a dict is keywords, a tensor is one positional.
        nodes: As for :func:`convert`.

    Returns:
        The report. A module that cannot be converted at all raises what :func:`convert` raises.

    Raises:
        ConfigurationError: without example inputs.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3))
        >>> report = torch2ebm.check(net, torch.randn(5, 4))
        >>> report.nodes
        ('0', '2')
        >>> [finding.place for finding in report.of_kind("random")]
        ["node '0'"]
    """
    if example_inputs is None:
        raise ConfigurationError(
            "torch2ebm.check(module, example_inputs)", "None", "an input that the module takes", "Pass one batch."
        )
    if isinstance(module, EnergyModel):
        module = module.torch2ebm.module
    args, kwargs = as_arguments(example_inputs)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = convert(module, nodes, example_inputs)
        conversion = model.torch2ebm
        first = conversion.looked_at(args, kwargs)
        sequences = len(conversion.captures.entries)
    findings = [
        *_of_graph(model.graph, module),
        *_of_run(first, conversion.batch.dim),
        *_branches(sequences),
        *(Finding("warning", type(each.message).__name__, str(each.message), "") for each in told if _is_news(each)),
    ]
    return CheckReport(tuple(model.nodes), model.torch2ebm.summary(), tuple(findings), first.batch_size)


def _is_news(told: warnings.WarningMessage) -> bool:
    """Whether a warning says what no other finding says."""
    return "torch2ebm" not in str(told.category.__module__)


def _of_graph(graph: EnergyGraph, module: nn.Module) -> Iterator[Finding]:
    for path, reason in graph.opaque.items():
        yield Finding(
            "opaque",
            f"module '{path}'" if path else "the whole module",
            f"{reason}, so it is one node.",
            "Inside of it gradients are backpropagation's; convert its parts on their own if they should relax.",
        )
    for name, parameter in module.named_parameters():
        if name not in graph.parameters:
            yield Finding(
                "no gradient",
                f"parameter '{name}'",
                "no output depends on it.",
                "It stays as it is, as in plain torch; leave it out, or look for a detach().",
            )
        elif not parameter.requires_grad:
            yield Finding("no gradient", f"parameter '{name}'", "it is frozen.", "Its node relaxes all the same.")
    for node in graph.nodes.values():
        if node.random:
            yield Finding(
                "random", f"node '{node.name}'", "it draws random numbers.", "One draw serves a whole inference."
            )
        if node.batch_statistics:
            yield Finding(
                "batch statistics",
                f"node '{node.name}'",
                "it normalises by the statistics of the batch.",
                "Samples of one batch depend on one another; model.eval() takes the running statistics.",
            )
    if lone := lone_node(graph):
        yield Finding("one node", f"node '{lone}'", ALONE, FINER)
    if graph.held:
        yield Finding(
            "held",
            "forward",
            f"{len(graph.held)} results stay with somebody after it: a hook, or an attribute.",
            "Each is an output on which the loss may act; keep a detach() of it if it is for looking only.",
        )


def _of_run(call: Call, batch_dim: int) -> Iterator[Finding]:
    for place, what in call.run.values_read.items():
        yield Finding(
            "value",
            place,
            f"Python reads a value ({what}).",
            "While values relax it stays what the feed-forward pass has made of it; torch.where follows instead.",
        )
    sizes = {leaf.shape[0] for leaf in leaves_of(call.run.output) if isinstance(leaf, Tensor) and leaf.ndim}
    if sizes and batch_dim == 0 and call.batch_size not in sizes:
        yield Finding(
            "batch",
            "output",
            f"no output has {call.batch_size} rows, the first dimension of the first input.",
            "The loss is weighted by the number of samples: tell which dimension counts them, convert(batch_dim=...).",
        )


def _branches(sequences: int) -> Iterator[Finding]:
    if sequences > 1:
        yield Finding(
            "branches",
            "forward",
            "two runs on the same input ran other operations.",
            "Each sequence has a graph of its own; a call that takes another branch than the one before costs more.",
        )
