"""The flow of the values down the energy, integrated by a solver of ordinary differential equations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from torch2ebm.common.checks import check_choice, check_positive, check_steps, check_tolerance
from torch2ebm.common.rows import Rows
from torch2ebm.errors import ConfigurationError, DivergenceError, first_line
from torch2ebm.inference.solver import ValueSolver
from torch2ebm.inference.value_inference import ValueInference

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "rk4")
MOST = 20_000  # evaluations of an interval; a step that has become too small would never end it
_PACKAGE = "torchdiffeq"
_STIFF = (
    "Take larger rtol and atol, a shorter duration, or ErrorConjugateGradient, which steep energies do not slow down."
)


@dataclass(frozen=True)
class ODEFlow(ValueSolver):
    """``dv/dt = -dF/dv`` for all values, by torchdiffeq (``pip install torch2ebm[ode]``), as JPC solves it by diffrax.

    The step size is chosen from the error of integration, so stiff and flat energies need no learning rate. The whole
    batch has one step size: how exactly a sample is integrated depends on the others, within ``rtol`` and ``atol``.
    The flow comes to rest where :class:`GradientDescent` does. ``compile=True`` records none of it.

    Args:
        duration: How long the values flow; the slowest direction needs a few times 1 over its curvature.
        rtol: Relative error of a step of integration, for an adaptive method.
        atol: Absolute error of one.
        method: ``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"fehlberg2"`` or ``"adaptive_heun"``, which are adaptive;
            ``"euler"``, ``"midpoint"`` or ``"rk4"``, which make one step an interval. ``"euler"`` is gradient descent.
        steps: Intervals of the same length, after each of which the report has an energy, and ``tol`` is looked at.
        tol: Stop when no entry of dF/dv exceeds it in any node or sample; 0 flows for the whole duration.

    Raises:
        ConfigurationError: for an illegal setting, or where torchdiffeq is not installed.

    Example:
        >>> import importlib.util, torch2ebm
        >>> if importlib.util.find_spec("torchdiffeq") is not None:
        ...     algorithm = torch2ebm.PredictiveCoding(solver=torch2ebm.ODEFlow(duration=10.0))
    """

    duration: float = 20.0
    rtol: float = 1e-4
    atol: float = 1e-6
    method: str = "dopri5"
    steps: int = field(default=20, kw_only=True)
    tol: float = field(default=0.0, kw_only=True)

    remedy: ClassVar[str] = "Take a shorter duration, or smaller rtol and atol."

    def __post_init__(self) -> None:
        check_positive("ODEFlow", duration=self.duration, rtol=self.rtol, atol=self.atol)
        check_choice("ODEFlow", "method", self.method, (*ADAPTIVE, *FIXED))
        check_steps("ODEFlow", self.steps)
        check_tolerance("ODEFlow", self.tol)
        if find_spec(_PACKAGE) is None:
            raise ConfigurationError(
                "ODEFlow(...)",
                f"no package {_PACKAGE}",
                "an optional package of torch2ebm",
                "Run pip install torch2ebm[ode].",
            )

    def with_steps(self, steps: int) -> ODEFlow:
        """The same step length: so many intervals of the old length."""
        return replace(self, steps=steps, duration=self.duration * steps / self.steps)

    def start(self, inference: ValueInference) -> None:
        return None

    def step(self, inference: ValueInference, state: None) -> None:
        flow = _Flow(inference)
        if not flow.rows.like:
            return
        times = torch.tensor([0.0, self.duration / self.steps], dtype=torch.float64).to(flow.start)
        # an adaptive method lands on the end: in between it interpolates, with an error that nothing bounds
        options = {"step_t": times[1:]} if self.method in ADAPTIVE else None
        integrate: Callable[..., Tensor] = import_module(_PACKAGE).odeint
        try:
            with torch.no_grad():
                ends = integrate(
                    flow, flow.start, times, rtol=self.rtol, atol=self.atol, method=self.method, options=options
                )
        except AssertionError as error:  # what torchdiffeq says of a step that has become too small
            raise flow.diverged(first_line(error), self.remedy) from error
        flow.ended(ends[-1])


class _Flow:
    """-dF/dv as a function of time and of displacements from where values began, one row for each sample."""

    def __init__(self, inference: ValueInference) -> None:
        self.inference = inference
        self.rows = Rows(inference.values, tuple(inference.values), inference.call.batch_size)
        values = inference.values
        still = {slot: torch.zeros_like(origin) for slot, origin in values.origins.items()}
        self.start = self.rows.pack({**still, **values.displacements})
        first = self.rows.pack(dict(inference.sweep()))
        self._first = first.neg()
        # of the report: the energy and the residual of a step are those of its start
        self._evaluations = 0
        self._driving, self._measuring = inference.driving, inference.measuring

    def __call__(self, time: Tensor, values: Tensor) -> Tensor:
        if torch.equal(values, self.start):
            return self._first
        inference = self.inference
        self._evaluations += 1
        if self._evaluations > MOST:
            raise self.diverged(f"an interval that is not through after {MOST:,} evaluations", _STIFF)
        self._put(values)
        inference.measuring = False
        found = self.rows.pack(dict(inference.sweep())).neg()
        inference.history.pop()
        inference.driving, inference.measuring = self._driving, self._measuring
        if not bool(torch.isfinite(found).all()):
            raise self.diverged("a gradient that is not finite", ODEFlow.remedy)
        return found

    def ended(self, values: Tensor) -> None:
        self._put(values)

    def diverged(self, got: str, remedy: str) -> DivergenceError:
        return DivergenceError(
            f"ODEFlow, inference step {len(self.inference.history)}", got, "a flow that ends", remedy
        )

    def _put(self, values: Tensor) -> None:
        found: dict[str, Tensor] = {}
        self.rows.unpack(values, found)
        for slot, displacement in found.items():
            self.inference.values.displace(slot, displacement)
        self.inference.moved.update(found)
