"""Predictive coding (Strict in Torch2PC): relax all values on the energy, then take each node's local gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.clamping.data_loss import WithData
from torch2ebm.clamping.relaxing import Clamped
from torch2ebm.clamping.start import NUDGED, NUDGED_BACK, begin_at, ended_at, kept_start
from torch2ebm.clamping.training import check_nudging_of_data, clamped_call, with_energies_of_data
from torch2ebm.common.checks import check_choice, check_reduction
from torch2ebm.engine.call import Call
from torch2ebm.engine.energies import Energy
from torch2ebm.engine.nudging import Nudging, OneSided, Relative
from torch2ebm.engine.precision import Precision
from torch2ebm.engine.results import LocalGradients
from torch2ebm.engine.signal import tell_of_kinks, tell_where_there_is_no_signal
from torch2ebm.errors import ConfigurationError, DivergenceError
from torch2ebm.inference.divergence import check_on_divergence, check_phases, no_gradients, of_phase
from torch2ebm.inference.nudge_unit import NudgeUnit, carried
from torch2ebm.inference.relaxation import OnStep, check_on_step, relax
from torch2ebm.loss.output_loss import NudgedLoss, OutputLoss
from torch2ebm.memory.last_values import FEEDFORWARD, STARTS
from torch2ebm.potentials.energy_parameters import check_at_forward
from torch2ebm.potentials.node_energies import NodeEnergies, check_free, check_names, node_energies
from torch2ebm.programs.cache import Programs
from torch2ebm.solvers import ErrorConjugateGradient, GradientDescent, Solver


class _Implied:
    """Marks a number that nobody gave: a default, or one that was read off the solver. It contradicts nothing."""


class _ImpliedSteps(_Implied, int):
    pass


class _ImpliedRate(_Implied, float):
    pass


class _ImpliedWord(_Implied, str):
    __slots__ = ()


STEPS, RATE = _ImpliedSteps(20), _ImpliedRate(0.1)
R = 0.1  # the nudge of PredictiveCoding() in units of the curvature; benchmarks/learning.py shows why
# An attribute of a solver that was made here: dataclasses.replace(algorithm, lr=...) may then make another one.
_MADE = "_made_of_steps_and_lr"
_CALIBRATED = "_made_of_nothing"  # the same of a solver and a nudging that stand for no settings


@dataclass(frozen=True, repr=False)
class PredictiveCoding(Algorithm):
    """Predictive coding (Rao and Ballard 1999; Whittington and Bogacz 2017; Rosenbaum 2022) on any graph and loss.

    The values start at the feed-forward pass and relax on the energy: that of the prediction errors plus ``beta``
    times the loss. The gradient of a parameter is then local to its node, with errors taken at the final values, and
    divided by ``beta``. It tends to backprop's as ``beta`` goes to 0 (Millidge et al. 2022). The loss acts on the
    prediction of the output.

    With neither ``steps`` nor ``lr`` nor ``solver`` it calibrates itself. Errors relax to their equilibrium by
    :class:`ErrorConjugateGradient`, and ``nudging`` is ``Relative(0.1, largest_error=0.1)``. There is no step size to
    set, and ``beta`` follows the curvature of the loss. With ``steps`` or ``lr`` it is the strict algorithm of the
    literature (Strict in Torch2PC): so many steps of descent on the values, at ``beta = 1``.

    Args:
        steps: Inference steps, each one vector-Jacobian product a node; 20 where only ``lr`` is given.
            ``"auto"``: until all rest.
        lr: Step size of the values; 0.1 where only ``steps`` is given. ``"auto"``: from the curvature.
        solver: How the values relax, instead of ``GradientDescent(steps, lr)``.
        nudging: How strongly the loss enters the energy: ``OneSided(beta)``, ``Symmetric(beta)``, which relaxes
            twice, or ``Relative(r)``, in units of the curvature. The free phase needs no relaxation: it is the
            feed-forward pass.
        precisions: Node name to precision, a number or a tensor that broadcasts against the node's value; 1 elsewhere.
            A :class:`Precision` learns in your optimizer.
        energies: Node name to energy, for example :class:`Categorical`; Gaussian elsewhere.
        loss_reduction: ``"mean"`` for a loss that is a mean over the batch, ``"sum"`` to take it as it is written.
        batch_statistics: ``"live"``: a batch norm normalises by the statistics of the values that it reads, as they
            move; ``"frozen"``: by those of the feed-forward pass, so that samples are independent.
        on_divergence: What a relaxation that runs away does: ``"raise"`` :class:`DivergenceError`, ``"warn"`` with a
            ``DivergenceWarning`` or ``"skip"``; with these two the batch gives no gradient (``.grad`` stays as it is).
        compile: Record a step once as a list of ATen calls and run that from then on; the step that repeats goes to
            ``torch.compile``. The same numbers to rounding. What cannot be recorded runs as it is, with a
            ``CompilationWarning``; hooks of submodules run while recording only.
        clamp: Node name to the value that the node has: a tensor in its shape, or without its batch dimension, or a
            number; ``(value, mask)`` where a part of it is given, True where it is; or a function without arguments
            that returns one of these for the batch of the forward, or None for nothing. The name of another node ties
            two values. Its energy is that of the node, and counts whole: ``nudging`` has to be ``OneSided(1)``.
        free: Inputs that are values of their own, ``"input"`` or the names of arguments. What you pass is then their
            prediction, with the energy of the node of that name. Zeros are a prior around zero. The output of another
            module is an amortised guess, and its error is what that module learns from.
        start: Where the values begin. ``"feedforward"``: at the feed-forward pass. ``"last"``: where those of the batch
            before have ended, as suits the next frame of a sequence. ``"average"``: at their mean over all samples
            since. Where there is none, or a shape is another, it is the feed-forward pass. ``model.forget()`` begins
            anew, checkpoints of the optimizer keep the values, and ``detach()`` drops them.
        on_step: Called with an :class:`InferenceStep` after every step of every phase, under ``compile=True`` too. Each
            call costs one evaluation of all nodes more. What it raises ends the backward, which leaves no trace. One
            with a method ``wants(step, last)``, as :class:`torch2ebm.monitor.Progress`, is asked first. A method
            ``closed()`` of it is called when a phase ends, by an error as well.

    Raises:
        ConfigurationError: for an illegal step size, number of steps, precision, energy, node name or reduction.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.PredictiveCoding(steps=20, lr=0.1))
        >>> torch.nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
        >>> model.state.error["0"].shape
        torch.Size([5, 8])
    """

    steps: int | str = STEPS
    lr: float | str = RATE
    solver: Solver[Any] = field(default=None, kw_only=True)  # type: ignore[arg-type]  # then made of steps and lr
    nudging: Nudging = field(default=None, kw_only=True)  # type: ignore[assignment]  # OneSided(1), or relative
    precisions: InitVar[Mapping[str, float | Tensor | Precision] | None] = field(default=None, kw_only=True)
    energies: Mapping[str, Energy] = field(default_factory=NodeEnergies, kw_only=True)
    loss_reduction: str = field(default="mean", kw_only=True)
    batch_statistics: str = field(default="live", kw_only=True)
    on_divergence: str = field(default="raise", kw_only=True)
    compile: bool = field(default=False, kw_only=True)
    clamp: Mapping[str, Any] = field(default_factory=dict, kw_only=True, compare=False)  # == of tensors is no bool
    free: Sequence[str] = field(default=(), kw_only=True)
    start: str = field(default=FEEDFORWARD, kw_only=True)
    on_step: OnStep | None = field(default=None, kw_only=True, compare=False)  # it looks on, and decides nothing
    _programs: Programs = field(default_factory=Programs, init=False, repr=False, compare=False)

    def __post_init__(self, precisions: Mapping[str, float | Tensor | Precision] | None) -> None:
        check_reduction("PredictiveCoding", self.loss_reduction)
        check_choice("PredictiveCoding", "batch_statistics", self.batch_statistics, ("live", "frozen"))
        check_on_divergence("PredictiveCoding", self.on_divergence)
        check_choice("PredictiveCoding", "start", self.start, STARTS)
        _check_kind("solver", self.solver, Solver, "For example GradientDescent(steps=50).")
        _check_kind("nudging", self.nudging, Nudging, "For example Symmetric(beta=0.1).")
        _check_real(self.nudging)
        object.__setattr__(self, "free", (self.free,) if isinstance(self.free, str) else tuple(self.free))
        check_on_step("PredictiveCoding", self.on_step)
        given = {name: number for name in ("steps", "lr") if not isinstance(number := getattr(self, name), _Implied)}
        if given.get("lr", 0) is None and self.solver is not None and not hasattr(self.solver, "lr"):
            del given["lr"]  # what was read off a solver without a step size
        solver, nudging = self._chosen(given)
        check_nudging_of_data("PredictiveCoding", self.clamp, nudging)
        settings = {
            "solver": solver,
            "steps": _implied(solver.steps, _ImpliedSteps),
            "lr": _implied(solver.lr, _ImpliedRate) if hasattr(solver, "lr") else None,
            "nudging": nudging,
            "energies": node_energies("PredictiveCoding", precisions or {}, self.energies or {}),
        }
        for name, value in settings.items():
            object.__setattr__(self, name, value)  # frozen: no other way in __post_init__

    def _chosen(self, given: Mapping[str, Any]) -> tuple[Solver[Any], Nudging]:
        """What was given, or stands for no settings: strict where there are steps or lr, calibrated where not."""
        # by dataclasses.replace, what stood for no settings makes room for some
        solver = None if given and hasattr(self.solver, _CALIBRATED) else self.solver
        nudging = None if given and hasattr(self.nudging, _CALIBRATED) else self.nudging
        if solver is None and not given:
            # data and priors are part of the energy, which a small nudge would leave alone
            usual = OneSided() if self.clamp or self.free else Relative(R, largest_error=R)
            return _marked(ErrorConjugateGradient(), _CALIBRATED), nudging or _marked(usual, _CALIBRATED)
        if solver is None:
            solver = _marked(GradientDescent(_plain(given.get("steps", STEPS)), _plain(given.get("lr", RATE))), _MADE)
        elif given and hasattr(solver, _MADE):
            solver = _marked(GradientDescent(_plain(self.steps), _plain(self.lr)), _MADE)
        else:
            _check_agreement(given, solver)
        return solver, nudging or OneSided()

    @property
    def programs(self) -> Programs | None:
        """Where its programs are kept; None where it does not compile."""
        return self._programs if self.compile else None

    def __repr__(self) -> str:
        calibrated = hasattr(self.solver, _CALIBRATED) and hasattr(self.nudging, _CALIBRATED)
        parts = [] if calibrated else [f"solver={self.solver!r}"]
        parts += [f"loss_reduction={self.loss_reduction!r}"] * (not calibrated or self.loss_reduction != "mean")
        parts += [f"nudging={self.nudging!r}"] * (not calibrated and self.nudging != OneSided())
        parts += [f"energies={dict(self.energies)!r}"] * bool(self.energies)
        parts += ["batch_statistics='frozen'"] * (self.batch_statistics == "frozen")
        parts += [f"clamp={{{', '.join(f'{name!r}: ...' for name in self.clamp)}}}"] * bool(self.clamp) + [
            f"free={self.free!r}"
        ] * bool(self.free)
        parts += [f"start={self.start!r}"] * (self.start != FEEDFORWARD) + ["compile=True"] * self.compile
        parts += [f"on_divergence={self.on_divergence!r}"] * (self.on_divergence != "raise")
        return f"PredictiveCoding({', '.join(parts)})"

    @property
    def free_inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The inputs that are values of their own."""
        return tuple(self.free)

    def forward(self, call: Call) -> Clamped | None:
        check_names("PredictiveCoding", self.energies, call.graph)
        # a program cannot wind a generator back: dropout masks become its inputs
        frozen = self.batch_statistics == "frozen"
        call.feedforward(keep_graph=False, keep_draws=self.compile, freeze_statistics=frozen)
        check_at_forward("PredictiveCoding", self.energies, call)
        clamped = clamped_call("PredictiveCoding", call, self.clamp, self.energies) if self.clamp else None
        check_free("PredictiveCoding", self.energies, () if clamped is None else clamped.whole)
        return clamped

    def backward(self, call: Call, kept: Clamped | None, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        if kept is not None:
            call, loss, retain_graph = kept.call, WithData(loss, kept.loss), True
        try:
            unit = self._unit(call, loss)
            drawn = self.nudging.drawn()  # once: a random sign is drawn
            *others, last = (beta.real if unit is None else beta.real / unit.scale for beta in drawn)
            # only the last phase may free the feed-forward values, from which each starts
            phases = [self._phase(call, loss, beta, unit, retain_call=True) for beta in others]
            phases.append(self._phase(call, loss, last, unit, retain_call=retain_graph))
            self._keep(call, phases)
            # before the mean: a phase that has lost its minimum would spoil it silently
            check_phases([phase.state.relaxation for phase in phases])
        except DivergenceError as error:
            return no_gradients(self.on_divergence, error, call)
        found = mean_of(phases)
        if kept is not None:
            found = with_energies_of_data(found, kept, loss.scale)
        call.graph.once(
            ("signal", type(self.solver), self.solver.steps),
            lambda: tell_where_there_is_no_signal("PredictiveCoding", found.state, found.parameters),
        )
        call.graph.once(("kinks of energies",), lambda: tell_of_kinks("PredictiveCoding", found.state))
        return found if kept is None else replace(found, state=kept.state_of(found.state))

    def with_steps(self, steps: int) -> PredictiveCoding:
        if hasattr(self.solver, _MADE):
            return replace(self, steps=steps)
        return replace(self, solver=self.solver.with_steps(steps))

    @classmethod
    def _settings_of_0_1(cls, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**state, "compile": state["programs"] is not None}

    def _unit(self, call: Call, loss: OutputLoss) -> NudgeUnit | None:
        """What a relative nudge is divided by; None for another one."""
        if not isinstance(self.nudging, Relative):
            return None
        memory = carried(call, NodeEnergies(self.energies), self.loss_reduction, self.nudging)
        return memory.unit(call, loss, NodeEnergies(self.energies), self.nudging)

    def _keep(self, call: Call, phases: list[LocalGradients]) -> None:
        for found in phases if self.start != FEEDFORWARD else ():
            phase = phase_of(found.state.relaxation.beta)
            call.memory.offer(self.start, phase, ended_at(found.state), call.batch_size)

    def _phase(
        self, call: Call, loss: OutputLoss, beta: float, unit: NudgeUnit | None, retain_call: bool
    ) -> LocalGradients:
        nudged = loss if beta == 1.0 else NudgedLoss(loss, beta)  # no product by one in every step
        try:
            inference = self.solver.inference(call, nudged, self.energies, retain_call)
            inference.nudge = None if unit is None else beta * unit.sigma_squared
            # what a relative nudge keeps from call to call is r, up to rounding
            inference.carried_under = (unit is None, self.loss_reduction, float(f"{inference.nudge or beta:.6g}"))
            begin_at(inference, kept_start(inference, self.start, phase_of(beta)))
            found = relax(self.solver, inference, beta, self.programs, self.on_step)
        except DivergenceError as error:
            raise of_phase(error, beta) from error
        return found if unit is None else _with_unit(found, unit)


def phase_of(beta: float) -> str:
    """The name under which a phase's values are kept: a nudge the other way leads to other values."""
    return NUDGED if beta > 0 else NUDGED_BACK


def _with_unit(found: LocalGradients, unit: NudgeUnit) -> LocalGradients:
    relaxation = replace(found.state.relaxation, sigma_squared=unit.sigma_squared, curvature_cost=unit.backprops)
    return replace(found, state=replace(found.state, relaxation=relaxation, phases=(relaxation,)))


def mean_of(phases: list[LocalGradients]) -> LocalGradients:
    """The estimate of several nudged phases; values and errors are those of the first."""
    # The mean over phases of (dF/dtheta) / beta (Millidge et al. 2022); each phase is divided by its beta already.
    # At rest dE/dtheta is zero: no free phase has to be subtracted.
    first, *others = phases
    if not others:
        return first
    parameters = dict(first.parameters)
    for name in parameters:
        for other in others:
            parameters[name] = parameters[name] + other.parameters[name]
        parameters[name] = parameters[name] / len(phases)
    inputs = [_mean([phase.inputs[i] for phase in phases]) for i in range(len(first.inputs))]
    learned = {name: torch.stack([phase.learned[name] for phase in phases]).mean(0) for name in first.learned}
    relaxations = tuple(phase.state.relaxation for phase in phases)
    return LocalGradients(parameters, inputs, replace(first.state, phases=relaxations), learned=learned)


def _mean(parts: list[Tensor | None]) -> Tensor | None:
    # missing in one phase is zero there, hence the length of all
    found = [part for part in parts if part is not None]
    return sum(found[1:], start=found[0]) / len(parts) if found else None


def _marked(made: Any, mark: str) -> Any:
    object.__setattr__(made, mark, True)  # frozen: no other way
    return made


def _implied(setting: Any, kind: Callable[[Any], Any]) -> Any:
    return _ImpliedWord(setting) if isinstance(setting, str) else kind(setting)


def _plain(number: Any) -> Any:
    """The number alone, for the solver to show and to check."""
    kinds: Mapping[type, Callable[[Any], Any]] = {_ImpliedSteps: int, _ImpliedRate: float, _ImpliedWord: str}
    return kinds[type(number)](number) if type(number) in kinds else number


def _check_agreement(given: Mapping[str, float], solver: Solver[Any]) -> None:
    """Refuse ``steps`` or ``lr`` beside a solver that has others: one of them would be ignored."""
    own = {"steps": solver.steps, "lr": getattr(solver, "lr", None)}
    contradicting = [f"{name}={value!r}" for name, value in given.items() if value != own[name]]
    if contradicting:
        raise ConfigurationError(
            "PredictiveCoding(steps, lr, solver=...)",
            f"{', '.join(contradicting)} beside solver={solver!r}",
            "steps and lr, or a solver, which has its own",
            f"Give them to the solver: {type(solver).__name__}({', '.join(contradicting)}).",
        )


def _check_real(nudging: Nudging | None) -> None:
    if nudging is not None and nudging.is_complex:
        raise ConfigurationError(
            "PredictiveCoding(nudging=...)",
            f"{nudging!r}, whose nudges are complex numbers",
            "a nudging of real numbers, since values are real here",
            "For example Symmetric(beta=0.1); EquilibriumPropagation takes complex ones.",
        )


def _check_kind(name: str, value: object, kind: type, example: str) -> None:
    if value is not None and not isinstance(value, kind):
        got, expected = repr(value), f"a {kind.__name__.lower()} object"
        raise ConfigurationError(f"PredictiveCoding({name}=...)", got, expected, example)
