"""The optimizer wrapper: attaches an algorithm to a model, and is the wrapped optimizer in everything else."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.common.checks import check_steps
from torch2ebm.errors import AttachmentError, CheckpointError, LossIndependentError, NoStateError
from torch2ebm.isolation.interrupts import InterruptsDeferred
from torch2ebm.isolation.out_of_memory import exhausted_memory_named
from torch2ebm.model.conversion import Conversion
from torch2ebm.model.energy_model import EnergyModel
from torch2ebm.monitor import Monitor, StepMonitor
from torch2ebm.wrapper.attaching import attach, check_parts, parameters_of, unwrapped
from torch2ebm.wrapper.checkpoints import OWN_KEY, VALUES, check_identity, identity, load_wholly, no_dictionary
from torch2ebm.wrapper.steps_told import StepsTold
from torch2ebm.wrapper.wrapped import evaluates_again, is_wrappeds, method_of, versions, with_closures

_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)  # the wrapped optimizer runs them


class EnergyOptimizer(Optimizer):
    """Any torch optimizer, with local gradients instead of backpropagation's.

    It shares ``param_groups`` and ``state`` with the wrapped optimizer, so schedulers, gradient scalers and
    checkpoints work on either. ``loss.backward()`` fills ``.grad``; ``step()`` is the wrapped optimizer's. What that
    has of its own (``train()`` and ``eval()`` of a schedule-free one, ``first_step()`` of SAM, ``rho``) is read,
    called and written here as there.

    Several optimizers may train one model, each with parameters of its own. Wrap them all, with the same algorithm,
    or leave all but one plain: ``.grad`` is filled for the whole model, whoever steps.

    Args:
        optimizer: The optimizer to wrap.
        model: The converted model, or a wrapper of it (``DistributedDataParallel``, ``torch.compile``).
        algorithm: What computes the gradients.
        monitor: Called in every ``step()``, as ``monitor(name, value, step)``, with the energy of each node, their sum
            with the loss, and how the relaxation went. ``torch2ebm.monitor`` has ready ones for TensorBoard, W&B and
            CSV files, and one that measures steps and angles.
        replace: Take the place of the optimizer that is attached, as where a notebook's cell runs again.
        accumulation: What your loop divides the loss by because it accumulates gradients over so many batches. The
            division then scales gradients and is no part of the loss: 4 batches of 8 learn as one of 32. Left at 1,
            ``loss / 4`` is the loss that enters the energy. Trainers and gradient scalers need nothing.
        check_every: Hold one of so many calls against the module itself: outputs, buffers and gradients. The module
            then runs once more, so anything that it counts or draws by itself is counted twice. None never does.

    Raises:
        AttachmentError: if the model is not converted, or if the optimizer steps none of its parameters. Also if an
            optimizer is still attached, unless ``replace`` is given, or this one has other parameters and the same
            algorithm.
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

    optimizer: Optimizer
    model: EnergyModel
    algorithm: Algorithm
    monitor: Monitor | None
    monitored: int  # steps that the monitor has been told of
    _steps: StepsTold

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        algorithm: Algorithm,
        *,
        monitor: Monitor | None = None,
        replace: bool = False,
        check_every: int | None = None,
        accumulation: int = 1,
    ) -> None:
        check_parts(optimizer, model, algorithm, monitor, EnergyOptimizer)
        converted = unwrapped(model)
        check_steps("EnergyOptimizer", accumulation, "accumulation")
        if check_every is not None:
            check_steps("EnergyOptimizer", check_every, "check_every")
        self._be(optimizer, converted, algorithm, monitor, accumulation=accumulation)
        attach(self, converted, algorithm, replace)
        converted.torch2ebm.forwards.accumulation = accumulation
        if check_every is not None:
            converted.torch2ebm.check_every = check_every

    def _be(
        self,
        optimizer: Optimizer,
        model: EnergyModel,
        algorithm: Algorithm,
        monitor: Monitor | None = None,
        monitored: int = 0,
        accumulation: int = 1,
    ) -> None:
        """Nothing of ``Optimizer.__init__`` is kept but the hooks of ``step``: the rest is the wrapped optimizer's."""
        super().__init__(optimizer.param_groups, getattr(optimizer, "defaults", {}))
        for name in _HOOKS:  # Lookahead and its like may have none, since they never run Optimizer.__init__
            self.__dict__[name] = getattr(optimizer, name, OrderedDict())
        self.__dict__.update(optimizer=optimizer, model=model, algorithm=algorithm, monitor=monitor)
        self.__dict__.update(monitored=monitored, accumulation=accumulation, _steps=StepsTold(self))

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
        return getattr(self.optimizer, "defaults", {})

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._set("defaults", defaults)

    def _set(self, name: str, value: Any) -> None:
        if "optimizer" in self.__dict__:  # not while Optimizer.__init__ runs
            setattr(self.optimizer, name, value)

    def __getattr__(self, name: str) -> Any:
        """What only the wrapped optimizer has. A method of its own that moves the weights counts as a step."""
        optimizer = self.__dict__.get("optimizer")
        if optimizer is None or not is_wrappeds(name, optimizer):
            kind = type(self).__name__ if optimizer is None else f"{type(self).__name__}({type(optimizer).__name__})"
            raise AttributeError(f"'{kind}' object has no attribute '{name}'")
        return method_of(getattr(optimizer, name), optimizer, lambda call: self._moved_by(name, call))

    def __setattr__(self, name: str, value: Any) -> None:
        optimizer = self.__dict__.get("optimizer")
        own = optimizer is None or name in self.__dict__ or hasattr(type(self), name)
        if own or not is_wrappeds(name, optimizer):  # type: ignore[arg-type]  # own where there is none
            object.__setattr__(self, name, value)
        else:
            setattr(optimizer, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *(name for name in dir(self.optimizer) if not name.startswith("_"))})

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """The wrapped optimizer's step, with all its arguments; returns what that returns, for most the closure's loss.

        Algorithms whose weights move with the values make their further steps here (IncrementalPredictiveCoding).
        Ctrl-C is handled before or after, never in between (in a closure, at once).
        Raises :class:`LossIndependentError` if the model ran since the last step and no backward reached it, and
        :class:`NonFiniteError` if gradients overflowed under a factor of the loss and no gradient scaler skips them.
        """
        if closure is None:
            self._check_backward()
            self._check_skipped()
        if isinstance(self.monitor, StepMonitor):
            self.monitor.before_step(self.model, self.monitored)
        given: list[Any] = [*([] if closure is None and not args else [closure]), *args]
        with InterruptsDeferred() as section, self._whole(closure is not None), self._steps.own():
            given, kwargs = with_closures(given, kwargs, lambda each: section.lifted_in(self._checked(each)))
            result = self.optimizer.step(*given, **kwargs)
            with exhausted_memory_named("optimizer.step()", self.algorithm):
                self._step_on()
            self._stepped()
        self._report()
        return result

    def _stepped(self) -> None:
        self._steps.made()
        self._conversion.forwards.stepped()
        self._conversion.standing.stepped()

    def _moved_by(self, name: str, call: Callable[[], Any]) -> Any:
        """A method of the wrapped optimizer's own, which may move the weights: ``first_step``, ``train``, ``eval``."""
        parameters = parameters_of(self)
        before = versions(parameters)
        with self._whole(False), self._steps.own():
            result = call()
            if versions(parameters) != before:
                if self._conversion.forwards.later:
                    raise _further_steps_left_out(name, self.algorithm, self.optimizer)
                self._stepped()
        return result

    def _check_skipped(self) -> None:
        if self._conversion.forwards.overflowed:
            own = set(map(id, parameters_of(self)))
            named = self._conversion.trained_parameters().items()
            gradients = {name: p.grad for name, p in named if p.grad is not None and id(p) in own}
            self._conversion.forwards.check_skipped(gradients)

    def _checked(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        parameters = parameters_of(self)
        before = versions(parameters)

        def checked(*args: Any, **kwargs: Any) -> Any:
            self._steps.closure_called(versions(parameters) != before)
            result = closure(*args, **kwargs)
            self._check_skipped()
            return result

        return checked

    def _step_on(self) -> None:
        """The steps that follow the first where weights move with the values; ``.grad`` is left as the first saw it."""
        if not self._conversion.forwards.later:
            return
        own = self._conversion.trained_parameters()
        everything = parameters_of(self)
        first = [(parameter, parameter.grad) for parameter in {*everything, *own.values()}]
        try:
            for gradients in self._conversion.forwards.later_gradients():
                for parameter, _ in first:
                    parameter.grad = None  # what is no part of the model has had its step
                for name, gradient in self._conversion.synchronised(gradients).items():
                    own[name].grad = gradient
                self.optimizer.step()
        finally:
            for parameter, seen in first:
                parameter.grad = seen

    @contextmanager
    def _whole(self, with_closure: bool) -> Iterator[None]:
        """Where weights move more than once in a step: if a later move fails, all is as before the first."""
        again = with_closure and (evaluates_again(self.optimizer) or self._steps.may_move_before_closure)
        if not self.algorithm.weights_move and not again:
            yield
            return
        parameters = [*parameters_of(self), *self.model.buffers()]
        before = [parameter.detach().clone() for parameter in parameters]
        state = copy.deepcopy(self.optimizer.state_dict())
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
            with suppress(CheckpointError):  # of an optimizer that cannot load what it has saved
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
        if isinstance(self.monitor, StepMonitor):
            self.monitor.after_step(self.model, self.monitored)
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
        """End the attachment and return the wrapped optimizer: the plain loop is back.

        Where several optimizers are attached, the algorithm stays until the last of them is detached.
        """
        self._conversion.detach_from(self)
        self._steps.end()
        return self.optimizer

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """The wrapped optimizer's; arguments as there (``set_to_none``)."""
        self._conversion.forwards.given_up()
        self.optimizer.zero_grad(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "optimizer" in self.__dict__:  # Optimizer.__init__ adds the groups that the wrapped one has already
            self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, which it loads itself, and for whom it was made under ``"torch2ebm"``.

        There, too, are the values at which the next batch begins, under ``start="last"`` and ``start="average"``.
        """
        kept = self._conversion.memory.state()
        return {**self.optimizer.state_dict(), OWN_KEY: {**self._identity(), **({VALUES: kept} if kept else {})}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class or the bare optimizer has saved.

        Raises :class:`CheckpointError` if it says that it is of another algorithm or of another model, and for an
        entry that cannot be what was saved; nothing has been loaded then. Warns :class:`CheckpointWarning` if the
        algorithm had other settings, for example other steps or another rate. Those that are attached stay.
        """
        if not isinstance(state_dict, Mapping):
            raise no_dictionary(state_dict)
        own = state_dict.get(OWN_KEY)
        check_identity(own, self._identity())
        load_wholly(self.optimizer, {key: value for key, value in state_dict.items() if key != OWN_KEY})
        if own is not None:
            self._conversion.memory.load(own.get(VALUES, {}))

    def _identity(self) -> dict[str, Any]:
        names = {id(parameter): name for name, parameter in self._conversion.trained_parameters().items()}
        parameters = [f"{names.get(id(p), 'outside the model')} {tuple(p.shape)}" for p in parameters_of(self)]
        return identity(self.algorithm, self._conversion.module, parameters)

    def __getstate__(self) -> dict[str, Any]:
        """Without the monitor, which belongs to the process."""
        return {name: getattr(self, name) for name in ("optimizer", "model", "algorithm", "monitored", "accumulation")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        optimizer, model, algorithm = state["optimizer"], state["model"], state["algorithm"]
        self._be(optimizer, model, algorithm, monitored=state["monitored"], accumulation=state.get("accumulation", 1))
        with suppress(AttachmentError):  # where another stands already, this copy was detached
            attach(self, model, algorithm, replace=False)
            model.torch2ebm.forwards.accumulation = self.accumulation

    def __repr__(self) -> str:
        accumulation = "" if self.accumulation == 1 else f", accumulation={self.accumulation}"
        return f"EnergyOptimizer({self.optimizer!r}, {self.algorithm!r}{accumulation})"


def _further_steps_left_out(name: str, algorithm: Algorithm, optimizer: Optimizer) -> AttachmentError:
    return AttachmentError(
        f"optimizer.{name}(...)",
        f"weights that {type(optimizer).__name__} has moved by itself, under {type(algorithm).__name__}",
        "optimizer.step(), in which that algorithm makes its further steps",
        "Use an optimizer whose step() is one move of the weights, or an algorithm without further steps, for example "
        "torch2ebm.PredictiveCoding(); nothing was changed.",
    )
