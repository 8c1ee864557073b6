"""``torch2ebm.diagnose``, the doctor: what a model, a loss and a batch need, and whether settings give it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from torch2ebm.algorithms.base import Algorithm, check_algorithm
from torch2ebm.algorithms.predictive_coding import PredictiveCoding
from torch2ebm.compare import check_loss, check_trainable, check_whole, whole_loss
from torch2ebm.diagnosis.examination import Examination
from torch2ebm.diagnosis.report import Advice, Diagnosis
from torch2ebm.diagnosis.subject import WHERE, Subject
from torch2ebm.errors import LossIndependentError
from torch2ebm.graph.granularity import Granularity
from torch2ebm.model.arguments import check_not_meta, of_batch
from torch2ebm.model.energy_model import EnergyModel, convert

__all__ = ["Advice", "Diagnosis", "diagnose"]


def diagnose(
    model: nn.Module, loss_fn: Callable[..., Tensor], batch: Any, algorithm: Algorithm | None = None
) -> Diagnosis:
    """Look at a model, its loss and one batch: what inference needs, what is wrong, and what to take instead.

    The module runs a few dozen times: the curvatures of loss and energy are measured, the settings are tried, and so
    is every advice, so that it holds on this batch. Parameters, buffers, ``.grad``, generators, modes, attachments and
    ``model.state`` are as before, also where the loss raises.

    Args:
        model: Any module, or a converted model.
        loss_fn: ``loss_fn(output, target)``, or ``loss_fn(output)`` where ``batch`` is a dict.
        batch: ``(inputs, target)``, inputs being a tensor, a tuple of positional or a dict of keyword arguments; or a
            dict of keyword arguments.
        algorithm: The settings to judge. Without it those that are attached to the model, else ``PredictiveCoding()``.

    Returns:
        The diagnosis. ``print`` it; ``ok`` says whether something is wrong.

    Raises:
        ConfigurationError: for a batch of another form, or a loss that is no function from output (and target) to one
            number.
        PartitionError: for a model without trainable parameters.
        UntraceableError: for a module that cannot be converted, as :func:`convert` does.
        ShardingError: for a module that ``fully_shard`` has sharded.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh(),
        ...                           torch.nn.Linear(8, 3))
        >>> batch, loss = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])), torch.nn.functional.cross_entropy
        >>> diagnosis = torch2ebm.diagnose(net, loss, batch, torch2ebm.PredictiveCoding(steps=1))
        >>> diagnosis.ok, diagnosis.levels_not_reached
        (False, ('0',))
        >>> [advice.take for advice in diagnosis.advice]
        ['steps=2']
        >>> torch2ebm.diagnose(net, loss, batch).ok
        True
    """
    check_loss(WHERE, loss_fn, 1 if isinstance(batch, Mapping) else 2)
    of_batch(WHERE, batch, loss_fn)
    attached = model.torch2ebm.algorithm if isinstance(model, EnergyModel) else None
    judged = algorithm if algorithm is not None else attached or PredictiveCoding()
    check_algorithm(f"{WHERE}(algorithm=...)", judged)
    subject = Subject(_of_its_own(model, judged, batch), batch, loss_fn)
    check_trainable(WHERE, subject.model)
    loss, finite_output, reference = subject.plain()
    with suppress(LossIndependentError):  # that is a finding
        whole_loss(WHERE, loss)
    known = model.torch2ebm.batch if isinstance(model, EnergyModel) else None
    return Examination(subject, judged, loss, reference, finite_output, known).diagnosis(subject.batch_size)


def _of_its_own(model: nn.Module, algorithm: Algorithm, batch: Any) -> EnergyModel:
    """Another converted model of the same module: what is attached to the user's, and its state, stay as they are."""
    nodes: Granularity = "auto"
    told = None
    if isinstance(model, EnergyModel):
        check_whole(WHERE, model)
        nodes = model.torch2ebm.granularity
        told = model.torch2ebm.batch if model.torch2ebm.batch.known == "told" else None
    module = model.torch2ebm.module if isinstance(model, EnergyModel) else model
    if isinstance(module, nn.Module):
        check_not_meta(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch2ebm.check says what they say
        own = convert(
            module,
            algorithm.partition if nodes == "auto" else nodes,
            dict(batch) if isinstance(batch, Mapping) else batch[0],
            None if told is None else {told.argument: told.dim} if told.argument else told.dim,
        )
    check_whole(WHERE, own)
    return own
