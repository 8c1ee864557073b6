"""The optimizer wrapper: attaches an algorithm to a model, and is the wrapped optimizer in everything else."""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.capture.problems import users_level
from torch2ebm.common.checks import check_steps
from torch2ebm.errors import (
    AttachmentError,
    CheckpointError,
    LossIndependentError,
    NoStateError,
    PlainBackwardWarning,
)
from torch2ebm.isolation.interrupts import InterruptsDeferred
from torch2ebm.isolation.out_of_memory import exhausted_memory_named
from torch2ebm.model.conversion import Conversion
from torch2ebm.model.energy_model import EnergyModel

_OWN_KEY = "torch2ebm"  # in a state_dict; the bare optimizer does not look at it
_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)  # the wrapped optimizer runs them


class Monitor(Protocol):
    """A function of your own that is told how each step went: ``EnergyOptimizer(..., monitor=...)``.

    ``SummaryWriter.add_scalar`` of TensorBoard fits as it is. What it raises comes out of ``optimizer.step()``, after
    the step has been made.

    Example:
        >>> import torch, torch2ebm
        >>> seen = {}
        >>> def monitor(name, value, step):
        ...     seen[name] = value
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model, sgd = torch2ebm.convert(net), torch.optim.SGD(net.parameters(), lr=0.1)
        >>> optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.PredictiveCoding(), monitor=monitor)
        >>> model(torch.randn(5, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> list(seen)
        ['energy/0', 'energy', 'loss', 'relaxation/steps', 'relaxation/residual']
    """

    def __call__(self, name: str, value: float, step: int, /) -> Any:
        """Called for each number, in every ``optimizer.step()``.

        Args:
            name: ``energy/<node>``, ``energy``, ``loss``, ``relaxation/steps`` or ``relaxation/residual``.
            value: Energies and the loss are summed over samples, in units of lambda times the loss.
            step: How many steps of the optimizer have been made before.
        """


class EnergyOptimizer(Optimizer):
    """Any torch optimizer, with local gradients instead of backpropagation's.

    It shares ``param_groups`` and ``state`` with the wrapped optimizer, so schedulers, gradient scalers and
    checkpoints work on either. ``loss.backward()`` fills ``.grad``; ``step()`` is the wrapped optimizer's.

    Args:
        optimizer: The optimizer to wrap.
        model: The converted model, or a wrapper of it (``DistributedDataParallel``, ``torch.compile``).
        algorithm: What computes the gradients.
        monitor: Called in every ``step()``, as ``monitor(name, value, step)``, with the energy of each node, their sum
            with the loss, and how the relaxation went. ``SummaryWriter.add_scalar`` of TensorBoard fits as it is.
        accumulation: What your loop divides the loss by because it accumulates gradients over so many batches. The
            division then scales gradients and is no part of the loss: 4 batches of 8 learn as one of 32. Left at 1,
            ``loss / 4`` is the loss that enters the energy. Trainers and gradient scalers need nothing.
        check_every: Hold one of so many calls against the module itself: outputs, buffers and gradients. The module
            then runs once more, so anything that it counts or draws by itself is counted twice. None never does.

    Raises:
        AttachmentError: if the model is not converted, or has an algorithm attached whose optimizer is still there.
        ConfigurationError: if ``accumulation`` is no whole number, 1 or more.
        CaptureMismatchError: by a call that is checked, where the energy graph is not the module.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.ZeroDivergence())
        >>> optimizer.zero_grad()
        >>> torch.nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        algorithm: Algorithm,
        *,
        monitor: Monitor | None = None,
        check_every: int | None = None,
        accumulation: int = 1,
    ) -> None:
        converted = unwrapped(model)
        _check(optimizer, algorithm, monitor)
        check_steps("EnergyOptimizer", accumulation, "accumulation")
        if check_every is not None:
            check_steps("EnergyOptimizer", check_every, "check_every")
        converted.torch2ebm.attach(algorithm, self)
        if check_every is not None:
            converted.torch2ebm.check_every = check_every
        self._be(optimizer, converted, algorithm, accumulation)
        self.monitor, self.monitored = monitor, 0
        self._told = False

    def _be(self, optimizer: Optimizer, model: EnergyModel, algorithm: Algorithm, accumulation: int) -> None:
        """Nothing of ``Optimizer.__init__`` is kept but the hooks of ``step``: the rest is the wrapped optimizer's."""
        super().__init__(optimizer.param_groups, optimizer.defaults)
        for name in _HOOKS:
            self.__dict__[name] = getattr(optimizer, name)
        self.optimizer, self.model, self.algorithm = optimizer, model, algorithm
        self.accumulation = model.torch2ebm.forwards.accumulation = accumulation

    @property
    def _conversion(self) -> Conversion:
        return self.model.torch2ebm

    @property  # read each time, since loading a checkpoint into the wrapped optimizer gives it new ones
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._set("param_groups", groups)

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        return self.optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self._set("state", state)

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._set("defaults", defaults)

    def _set(self, name: str, value: Any) -> None:
        if "optimizer" in self.__dict__:  # not while Optimizer.__init__ runs
            setattr(self.optimizer, name, value)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The wrapped optimizer's step; returns what ``closure`` returns.

        Algorithms whose weights move with the values make their further steps here (IncrementalPredictiveCoding).
        Ctrl-C is handled before or after, never in between (in a closure, at once).
        Raises :class:`LossIndependentError` if the model ran since the last step and no backward reached it, and
        :class:`NonFiniteError` if gradients overflowed under a factor of the loss and no gradient scaler skips them.
        """
        if closure is None:
            self._check_backward()
            self._check_skipped()
        with InterruptsDeferred() as section, self._whole(closure is not None):
            result = self.optimizer.step(*([] if closure is None else [section.lifted_in(self._checked(closure))]))
            with exhausted_memory_named("optimizer.step()", self.algorithm):
                self._step_on()
            self._tell_of_plain_backward()
            self._conversion.forwards.stepped()
            self._conversion.standing.stepped()
        self._report()
        return result

    def _tell_of_plain_backward(self) -> None:
        """Say once where a step was made on gradients that no backward of the model has filled."""
        if self._told or self._conversion.forwards.answered_since_step:
            return
        if any(parameter.grad is not None for parameter in self.model.parameters()):
            self._told = True
            warnings.warn(
                f"optimizer.step(): the gradients are not {type(self.algorithm).__name__}'s, since no backward came "
                "through the converted model since the last step. Call model(x), the converted model, in your loop, "
                "and not the module that you converted (net(x)) or a part of it.",
                PlainBackwardWarning,
                stacklevel=users_level(),
            )

    def _check_skipped(self) -> None:
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self._conversion.forwards.check_skipped(gradients)

    def _checked(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def checked() -> Any:
            result = closure()
            self._check_skipped()
            return result

        return checked

    def _step_on(self) -> None:
        """The steps that follow the first where weights move with the values; ``.grad`` is left as the first saw it."""
        if not self._conversion.forwards.later:
            return
        own = self._conversion.trained_parameters()
        everything = [p for group in self.param_groups for p in group["params"]]
        first = [(parameter, parameter.grad) for parameter in {*everything, *own.values()}]
        try:
            for gradients in self._conversion.forwards.later_gradients():
                for parameter, _ in first:
                    parameter.grad = None  # what is no part of the model has had its step
                for name, gradient in self._conversion.synchronised(gradients).items():
                    own[name].grad = gradient
                self.optimizer.step()
        finally:
            for parameter, gradient in first:
                parameter.grad = gradient

    @contextmanager
    def _whole(self, with_closure: bool) -> Iterator[None]:
        """Where weights move more than once in a step: if a later move fails, all is as before the first."""
        if not self.algorithm.weights_move and not (with_closure and _evaluates_again(self.optimizer)):
            yield
            return
        parameters = [*(p for group in self.param_groups for p in group["params"]), *self.model.buffers()]
        before = [parameter.detach().clone() for parameter in parameters]
        state = copy.deepcopy(self.optimizer.state_dict())
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
            self.load_state_dict(state)
            self._conversion.forwards.stepped()
            raise

    def _report(self) -> None:
        """What the last backward left goes to the monitor."""
        if self.monitor is None:
            return
        with suppress(NoStateError):
            for name, value in self._conversion.state.scalars().items():
                self.monitor(name, value, self.monitored)
        self.monitored += 1

    def _check_backward(self) -> None:
        forwards = self._conversion.forwards
        if forwards.unanswered:
            forwards.stepped()
            forwards.undo()
            raise LossIndependentError(
                "optimizer.step()",
                "a forward since the last step, and no backward that reached the model",
                "a loss computed from the model's output, and loss.backward()",
                "Look for a detach() between model(x) and the loss; run forwards for evaluation under torch.no_grad().",
            )

    def detach(self) -> Optimizer:
        """End the attachment and return the wrapped optimizer: the plain loop is back."""
        self._conversion.detach()
        return self.optimizer

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._conversion.forwards.given_up()
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "optimizer" in self.__dict__:  # Optimizer.__init__ adds the groups that the wrapped one has already
            self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, which it loads itself, and for whom it was made under ``"torch2ebm"``."""
        return {**self.optimizer.state_dict(), _OWN_KEY: self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class or the bare optimizer has saved.

        Raises :class:`CheckpointError` if it says that it is of another algorithm or of another model.
        """
        self._check_checkpoint(state_dict.get(_OWN_KEY))
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != _OWN_KEY})

    def _identity(self) -> dict[str, Any]:
        names = {id(parameter): name for name, parameter in self._conversion.trained_parameters().items()}
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return {
            "algorithm": type(self.algorithm).__name__,
            "model": type(self._conversion.module).__name__,
            "parameters": [f"{names.get(id(p), 'outside the model')} {tuple(p.shape)}" for p in parameters],
        }

    def _check_checkpoint(self, saved: dict[str, Any] | None) -> None:
        own = self._identity()
        if saved is None or all(saved.get(part) == own[part] for part in ("algorithm", "parameters")):
            return
        pairs = itertools.zip_longest(saved["parameters"], own["parameters"], fillvalue="nothing")
        differing = [pair for pair in pairs if pair[0] != pair[1]]
        got, expected = differing[0] if differing else ("", "")
        raise CheckpointError(
            "EnergyOptimizer.load_state_dict",
            f"a checkpoint of {saved['algorithm']} on {saved['model']}" + (f" with parameter {got}" if got else ""),
            f"one of {own['algorithm']} on {own['model']}" + (f", whose parameter there is {expected}" if got else ""),
            f"Attach what it was saved with, or remove its entry '{_OWN_KEY}' to load it all the same.",
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the monitor, which belongs to the process."""
        return {name: getattr(self, name) for name in ("optimizer", "model", "algorithm", "monitored", "accumulation")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        optimizer, model, algorithm = state["optimizer"], state["model"], state["algorithm"]
        if not model.torch2ebm.attached:
            model.torch2ebm.attach(algorithm, self)
        self._be(optimizer, model, algorithm, state.get("accumulation", 1))
        self.monitor, self.monitored, self._told = None, state["monitored"], False

    def __repr__(self) -> str:
        accumulation = "" if self.accumulation == 1 else f", accumulation={self.accumulation}"
        return f"EnergyOptimizer({self.optimizer!r}, {self.algorithm!r}{accumulation})"


def _evaluates_again(optimizer: Optimizer) -> bool:
    """Whether it cannot do without a closure, as LBFGS: it runs it on weights that it has moved already."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def unwrapped(model: nn.Module) -> EnergyModel:
    """The converted model inside the wrappers that are known."""
    inner: Any = model
    while not isinstance(inner, EnergyModel):
        inner = getattr(inner, "_orig_mod", None) or (
            getattr(inner, "module", None) if isinstance(inner, nn.Module) else None
        )
        if not isinstance(inner, nn.Module):
            raise AttachmentError(
                "EnergyOptimizer(optimizer, model, algorithm)",
                f"a {type(model).__name__}",
                "a model made by torch2ebm.convert, or a wrapper of one",
                "Convert it first: torch2ebm.convert(net).",
            )
    return inner


def _check(optimizer: Optimizer, algorithm: Algorithm, monitor: Monitor | None) -> None:
    where = "EnergyOptimizer(optimizer, model, algorithm)"
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, EnergyOptimizer):
        raise AttachmentError(
            where,
            f"{type(optimizer).__name__} as the optimizer",
            "a torch.optim.Optimizer that is not wrapped yet",
            "Pass the optimizer itself, for example torch.optim.Adam(net.parameters()).",
        )
    if not isinstance(algorithm, Algorithm):
        raise AttachmentError(
            where,
            f"{algorithm!r} as the algorithm",
            "an algorithm object, for example torch2ebm.PredictiveCoding()",
            "Write the parentheses: an object, not the class.",
        )
    if monitor is not None and not callable(monitor):
        raise AttachmentError(
            where,
            f"{monitor!r} as the monitor",
            "a function of (name, value, step)",
            "For example SummaryWriter().add_scalar.",
        )
