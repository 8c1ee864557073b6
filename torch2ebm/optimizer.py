"""The optimizer wrapper: attaches an algorithm to a model, and is the wrapped optimizer in everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.errors import AttachmentError, LossIndependentError
from torch2ebm.model import EnergyModel


class EnergyOptimizer(Optimizer):
    """Any torch optimizer, with local gradients instead of backpropagation's.

    It shares ``param_groups`` and ``state`` with the wrapped optimizer, so schedulers, gradient scalers and
    checkpoints work on either. ``loss.backward()`` fills ``.grad``; ``step()`` is the wrapped optimizer's.

    Args:
        optimizer: The optimizer to wrap.
        model: The converted model, or a wrapper of it (``DistributedDataParallel``, ``torch.compile``).
        algorithm: What computes the gradients.

    Raises:
        AttachmentError: if the model is not converted, or has an algorithm attached.

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

    def __init__(self, optimizer: Optimizer, model: nn.Module, algorithm: Algorithm) -> None:
        converted = unwrapped(model)
        _check(optimizer, algorithm)
        converted.attach(algorithm)
        self.optimizer, self.model, self.algorithm = optimizer, converted, algorithm
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share()

    def _share(self) -> None:
        self.param_groups = self.optimizer.param_groups
        self.state = self.optimizer.state
        self.defaults = self.optimizer.defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The wrapped optimizer's step; returns what ``closure`` returns.

        Raises :class:`LossIndependentError` if the model ran since the last step and no backward reached it.
        """
        if closure is None:
            self._check_backward()
        result = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self.model.forwards.stepped()
        return result

    def _check_backward(self) -> None:
        forwards = self.model.forwards
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
        self.model.detach()
        return self.optimizer

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "optimizer" not in self.__dict__ or self.param_groups is not self.optimizer.param_groups:
            super().add_param_group(param_group)  # while Optimizer.__init__ runs
        else:
            self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "model": self.model, "algorithm": self.algorithm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        optimizer, model, algorithm = state["optimizer"], state["model"], state["algorithm"]
        self.optimizer, self.model, self.algorithm = optimizer, model, algorithm
        if not model.attached:
            model.attach(algorithm)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share()

    def __repr__(self) -> str:
        return f"EnergyOptimizer({self.optimizer!r}, {self.algorithm!r})"


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


def _check(optimizer: Optimizer, algorithm: Algorithm) -> None:
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
