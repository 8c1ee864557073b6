"""One examination: what is measured on a batch, in order, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.algorithms.predictive_coding import PredictiveCoding
from torch2ebm.common.text import listed
from torch2ebm.diagnosis.judging import (
    Bounds,
    advice_for,
    faults,
    found_by,
    levels_not_reached,
    without_signal,
)
from torch2ebm.diagnosis.loss_scale import LossScale, reduction_of
from torch2ebm.diagnosis.measuring import Measured, measured_of
from torch2ebm.diagnosis.reach import steps_to_reach_all, without_gradient
from torch2ebm.diagnosis.report import Advice, Diagnosis, regime_of
from torch2ebm.diagnosis.settings import has_setting, relaxes, went_all_the_way
from torch2ebm.diagnosis.subject import Subject, Trial, joined
from torch2ebm.engine.batch import BatchDimension
from torch2ebm.engine.call import Call
from torch2ebm.engine.nudging import OneSided, Relative
from torch2ebm.errors import LossReductionError, Torch2EBMError
from torch2ebm.loss.output_loss import OutputLoss
from torch2ebm.reports.agreement import Agreement, agreement
from torch2ebm.reports.findings import Finding
from torch2ebm.solvers import ErrorConjugateGradient

NOT_CONVEX = 1e-3  # what rounding leaves of an eigenvalue of zero, beside the largest


class Examination:
    """Looks at a model, its loss and one batch, and at the settings of an algorithm.

    Args:
        subject: The model and the batch.
        algorithm: The settings to judge.
        loss: The loss on the batch, as plain torch computes it.
        reference: Backprop's gradients by name; None where none comes.
        finite_output: Whether the output is finite.
        known: The batch dimension that the user's model has; None for a module that is not converted.
    """

    def __init__(
        self,
        subject: Subject,
        algorithm: Algorithm,
        loss: Tensor,
        reference: Mapping[str, Tensor | None],
        finite_output: bool,
        known: BatchDimension | None,
    ) -> None:
        self.subject, self.algorithm, self.loss = subject, algorithm, float(loss)
        self.reference, self.finite_output = reference, finite_output
        self.known = known
        self.problems: list[Finding] = []
        self.notes: list[Finding] = []
        self.advice: list[Advice] = []
        self.first = Trial(algorithm, {})

    def diagnosis(self, batch_size: int) -> Diagnosis:
        """All of it."""
        graph = self.subject.model.graph
        found = Diagnosis(
            type(self.subject.module).__name__,
            self.algorithm,
            str(self.subject.model.torch2ebm.batch),
            batch_size,
            LossScale(self.loss),
            levels=graph.depth,
            steps_to_reach=steps_to_reach_all(graph, graph.output_slots),
            batch_norms=self._batch_norms(),
            without_gradient=without_gradient(self.reference),
        )
        self._tell_of_batch()
        if self._has_numbers() and self._has_errors():
            self.first = self.subject.tried(self.algorithm)
            found = self._measured(replace(found, loss=LossScale(self.loss, self._reduction(batch_size))))
        advice = (*self.advice, *found.advice)
        return replace(found, problems=tuple(self.problems), notes=tuple(self.notes), advice=advice)

    # before anything relaxes

    def _tell_of_batch(self) -> None:
        found = self.subject.model.torch2ebm.batch
        if found.known == "guessed":
            text, remedy = "which dimension counts samples is a guess.", "Tell it: convert(net, batch_dim=...)."
            self.notes.append(Finding("batch", "the input", text, remedy))
        elif found.dim and (self.known is None or self.known.known == "guessed"):
            text = f"dimension {found.dim} of the first input counts samples, and convert(net) alone guesses 0."
            remedy = f"Tell it: convert(net, batch_dim={found.dim}), or pass example_inputs."
            # who has not converted the model yet may still do so
            (self.notes if self.known is None else self.problems).append(Finding("batch", "the input", text, remedy))
            why = "the samples are counted there, as a run without one of them shows"
            self.advice.append(Advice(f"convert(net, batch_dim={found.dim})", why))

    def _has_numbers(self) -> bool:
        gradients = [g for g in self.reference.values() if g is not None]
        if math.isfinite(self.loss) and all(bool(g.isfinite().all()) for g in gradients):
            return True
        if not self.finite_output:
            text, remedy = "the model's output is not finite.", "Look at inputs, weights and the first layers."
        elif not math.isfinite(self.loss):
            text = f"it is {self.loss} though the output is finite."
            remedy = "Look at the target, and at logarithms, roots and divisions in the loss."
        else:
            text, remedy = (
                "its gradient is not finite.",
                "Look at roots and divisions by zero, in the loss and the model.",
            )
        self.problems.append(Finding("not finite", "the loss", text, remedy))
        return False

    def _has_errors(self) -> bool:
        if any(g is not None and bool(g.any()) for g in self.reference.values()):
            return True
        if all(g is None for g in self.reference.values()):
            text = "it depends on no parameter, so every error is zero."
        else:
            text = "its gradient is zero in every parameter, so every error is zero or reaches none of them."
        remedy = "Look for a detach() or an argmax in the loss, a factor of zero, or a model that is dead as a whole."
        self.problems.append(Finding("no error", "the loss", text, remedy))
        return False

    def _reduction(self, batch_size: int) -> str | None:
        dim = self.subject.model.torch2ebm.batch.dim
        return reduction_of(lambda copies: self.subject.of_copies(copies, dim, batch_size))

    def _batch_norms(self) -> tuple[str, ...]:
        norms = [(n, m) for n, m in self.subject.module.named_modules() if isinstance(m, _BatchNorm)]
        return tuple(
            f"{name} ({'training: statistics of the batch' if norm.training else 'evaluation: running statistics'})"
            for name, norm in norms
        )

    # measurements

    def _measured(self, found: Diagnosis) -> Diagnosis:
        beta = self._nudge()
        try:
            with self.subject.left_alone():
                call, loss = self._call_and_loss(found.loss.reduction)
                scale = found.loss
                if scale.reduction is None:  # as it was computed, then
                    scale = replace(scale, reduction="sum" if getattr(loss, "summed", False) else "mean")
                measured = measured_of(call, loss, self.algorithm, scale, beta)
        except Torch2EBMError as error:
            self.problems.append(found_by(error))
            return found
        self._tell_of_loss(measured)
        self._tell_of_reach(measured, found.without_gradient)
        found = replace(
            found,
            loss=measured.scale,
            levels=measured.levels,
            steps_to_reach=measured.steps,
            sigma_squared=measured.sigma_squared,
            lowest=measured.lowest,
            beta=measured.beta,
            r=None if measured.beta is None else measured.beta * measured.sigma_squared,
            values=measured.values,
            errors=measured.errors,
            reach=measured.reach,
        )
        return self._judged(found)

    def _nudge(self) -> float | None:
        """As the relaxation has had it: a relative nudge has a unit of its own where the loss has no curvature."""
        state = self.first.state
        if isinstance(getattr(self.algorithm, "nudging", None), Relative) and state is not None:
            return abs(state.relaxation.beta)
        return None

    def _call_and_loss(self, reduction: str | None) -> tuple[Call, OutputLoss]:
        """As the algorithm weighs it; as the loss is reduced where the algorithm would refuse."""
        told = getattr(self.algorithm, "loss_reduction", None) or "mean"
        try:
            return self.subject.call_and_loss("sum" if reduction == "sum" else told)
        except LossReductionError:
            return self.subject.call_and_loss("sum")

    def _tell_of_loss(self, measured: Measured) -> None:
        scale, beta = measured.scale, measured.beta
        lowest, largest = measured.lowest, measured.sigma_squared
        if not measured.levels:
            text, remedy = "it has no value that could move: the gradient is backprop's.", "Convert a deeper model."
            self.notes.append(Finding("no values", "the model", text, f"{remedy} Or ask for finer nodes."))
        elif -lowest > max(NOT_CONVEX, self._epsilon()) * largest:
            lost = beta is not None and -lowest * beta >= 1
            text = f"it is not convex: curvatures in the errors go from {lowest:.3g} to {largest:.3g}."
            remedy = "Relative(r) with r below 1, the default, keeps a minimum whatever the sign."
            if lost:
                remedy = f"At beta {beta:.3g} the energy has no minimum along some direction. {remedy}"
            (self.problems if lost else self.notes).append(Finding("not convex", "the loss", text, remedy))
        elif largest == 0.0:
            text = "it has no curvature in the errors, so that sigma squared is no unit for a nudge."
            remedy = "Relative(r) makes errors of length r in the steepest sample instead."
            self.notes.append(Finding("no curvature", "the loss", text, remedy))
        if scale.reduction == "":
            text = "it is neither a mean nor a sum over samples, as far as repeating the batch tells."
            remedy = "It is taken as loss_reduction says: 'mean' multiplies it by the number of samples."
            self.notes.append(Finding("loss", "the loss", text, remedy))
        told = has_setting(self.algorithm, "loss_reduction") and self.algorithm.loss_reduction == "sum"
        if scale.reduction == "mean" and told:
            text = "it is a mean over samples, and loss_reduction='sum' takes it as it is written."
            remedy = "Each sample then pulls with 1 over their number, as in Torch2PC; 'mean' does not depend on it."
            self.notes.append(Finding("loss", "the loss", text, remedy))
        if scale.terms > 1:
            text = f"it is a mean over {scale.terms:g} terms of each sample, each of which pulls with 1 over that."
            remedy = f"Relative(r) does not depend on it; for a pull of 1 a term take OneSided({scale.terms:g})."
            self.notes.append(Finding("loss", "the loss", text, remedy))

    def _tell_of_reach(self, measured: Measured, parameters: tuple[str, ...]) -> None:
        reach = measured.reach
        for name in reach.dead:
            text = "it is dead: its derivative is zero in the values that it reads and in its parameters."
            remedy = (
                "Look at its bias, its initialisation, saturation and dropout; what stands before it gets no error."
            )
            self.problems.append(Finding("dead", f"node '{name}'", text, remedy))
        behind = [name for name in reach.unreached if name not in reach.dead]
        if behind:
            text = "backprop's error is zero there."
            remedy = "They stand before a dead node, or before nothing that the loss depends on."
            self.problems.append(Finding("no gradient", f"nodes {listed(behind, 6)}", text, remedy))
        if parameters:
            text = "no gradient by backprop, or one of zeros alone."
            remedy = "Freeze them with requires_grad_(False) if that is what you want; else look for a detach()."
            self.problems.append(Finding("no gradient", f"parameters {listed(parameters, 6)}", text, remedy))
        for name in reach.zeros:
            text, remedy = "all its values are zero.", "It learns, but passes no error on until it has moved."
            self.notes.append(Finding("zeros", f"node '{name}'", text, remedy))
        if reach.idle:
            named = listed([f"'{name}' ({100 * share:.3g}%)" for name, share in reach.idle], 6)
            text = "units that are zero in every sample of the batch, half of the node's or more."
            self.notes.append(Finding("idle units", f"nodes {named}", text, "They get no error on this batch."))

    # settings

    def _judged(self, found: Diagnosis) -> Diagnosis:
        bounds = Bounds(
            found.values if relaxes(self.algorithm) else None,
            found.errors,
            max(found.steps_to_reach, 1),
            max(found.levels, 1),
            "sum" if found.loss.reduction == "sum" else "",
            (*found.reach.unreached, *found.reach.dead),
        )
        first = trial = self.first
        self.problems += faults(first, bounds)
        if isinstance(first.error, LossReductionError) and has_setting(self.algorithm, "loss_reduction"):
            trial = self.subject.tried(replace(self.algorithm, loss_reduction="sum"))  # type: ignore[type-var]
            self.problems += faults(trial, bounds)
        agreed = self._agreement(trial)
        exact = None if agreed is None else agreed.relative_error <= self._rounding()
        share = self._share(trial)
        self._tell_of_relaxation(trial)
        return replace(
            found,
            regime=regime_of(found.r, found.beta, exact) if found.levels else "",
            agreement=agreed,
            exact=exact,
            share=share,
            without_signal=without_signal(trial, bounds),
            levels_not_reached=levels_not_reached(trial, bounds),
            energy_rise=trial.rise,
            advice=tuple(advice_for(first, bounds, self.subject.tried)),
        )

    def _agreement(self, trial: Trial) -> Agreement | None:
        if trial.state is None:
            return None
        reference = {name: g for name, g in self.reference.items() if g is not None}
        ours = {name: trial.gradients.get(name, torch.zeros_like(g)) for name, g in reference.items()}
        return agreement(joined(ours), joined(reference))

    def _rounding(self) -> float:
        """What the relative error of an exact gradient may be."""
        return float(self._epsilon() ** (2 / 3))

    def _epsilon(self) -> float:
        """Of the coarsest dtype that parameters have."""
        return max(float(torch.finfo(g.dtype).eps) for g in self.reference.values() if g is not None)

    def _share(self, trial: Trial) -> dict[str, float]:
        """By node <e, e*> / <e*, e*>, e* the error at equilibrium."""
        if trial.state is None or not relaxes(self.algorithm) or went_all_the_way(trial.state.relaxation):
            return {}
        kept = {n: getattr(self.algorithm, n) for n in ("energies", "loss_reduction")}
        kept |= {n: getattr(self.algorithm, n) for n in ("free", "clamp") if getattr(self.algorithm, n, None)}
        rest = PredictiveCoding(
            solver=ErrorConjugateGradient(tol=1e-3, steps=100),
            nudging=OneSided(abs(trial.state.relaxation.beta)),
            batch_statistics=getattr(self.algorithm, "batch_statistics", "live"),
            **kept,
        )
        settled = self.subject.tried(rest)
        if settled.state is None or trial.state.relaxation.beta < 0:
            return {}
        names = [node.name for node in trial.state.graph.hidden_nodes]
        found = {name: _share_of(trial.state.error[name], settled.state.error[name]) for name in names}
        return {name: share for name, share in found.items() if share is not None}

    def _tell_of_relaxation(self, trial: Trial) -> None:
        if trial.state is not None and trial.state.relaxation.converged is False:
            relaxation = trial.state.relaxation
            text = f"not settled after {relaxation.steps} steps (residual {relaxation.residual:.3g})."
            if relaxation.on_kinks:
                text += f" {100 * relaxation.on_kinks:.3g}% of the samples rest on kinks."
            self.notes.append(Finding("not settled", "the relaxation", text, "More steps, or a larger tol."))


def _share_of(error: Any, at_rest: Any) -> float | None:
    pairs = list(zip(_each(error), _each(at_rest), strict=True))
    whole = sum(float(b.double().square().sum()) for _, b in pairs)
    return sum(float((a.double() * b.double()).sum()) for a, b in pairs) / whole if whole else None


def _each(error: Any) -> Iterator[Tensor]:
    yield from error if isinstance(error, tuple) else (error,)
