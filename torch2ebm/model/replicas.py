"""Several processes: what ``DistributedDataParallel`` does not see by itself."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.common.users_code import users_level
from torch2ebm.errors import UnsynchronisedError, UnsynchronisedWarning


def process_count() -> int:
    """How many processes can exchange messages; 1 without a process group."""
    return distributed.get_world_size() if _initialised() else 1


def _initialised() -> bool:
    return distributed.is_available() and distributed.is_initialized()


class Replicas:
    """The wrapper that synchronises a model's gradients, known from the first forward that comes through it."""

    def __init__(self) -> None:
        self._wrapper: weakref.ref[DistributedDataParallel] | None = None
        self._warned = False

    @property
    def wrapper(self) -> DistributedDataParallel | None:
        return None if self._wrapper is None else self._wrapper()

    def forward(self, name: str, algorithm: Algorithm) -> None:
        """A forward begins. Raises :class:`UnsynchronisedError` if it passes by a wrapper that was seen before.

        Raises it also inside of ``Join``, for an algorithm that exchanges messages of its own, by its further
        steps or by precisions that learn: the
        processes that have run out of batches answer those of the wrapper's backward alone.

        Warns :class:`UnsynchronisedWarning`, once, if there are several processes and no wrapper was ever seen.
        """
        active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if active is not None:
            if (algorithm.weights_move or algorithm.learned) and getattr(
                getattr(active, "_join_config", None), "enable", False
            ):
                raise _joins(type(algorithm).__name__)
            self._wrapper = weakref.ref(active)
        elif self.wrapper is not None and _initialised():
            raise _passed_by(name)
        elif process_count() > 1 and not self._warned:
            self._warned = True
            warnings.warn(_nothing_synchronises(name), stacklevel=users_level())  # where model(...) stands

    def averaged(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The mean over processes, as the wrapper makes it of ``.grad``: one message a type and device."""
        wrapper = self.wrapper
        if wrapper is None:
            return gradients
        kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        for name, gradient in gradients.items():
            kinds.setdefault((gradient.dtype, gradient.device), []).append(name)
        found: dict[str, Tensor] = {}
        for names in kinds.values():
            message = torch.cat([gradients[name].reshape(-1) for name in names])
            distributed.all_reduce(message, group=wrapper.process_group)
            message /= distributed.get_world_size(wrapper.process_group)
            parts = torch.split(message, [gradients[name].numel() for name in names])
            found.update((n, part.view_as(gradients[n])) for n, part in zip(names, parts, strict=True))
        return found


def _joins(algorithm: str) -> UnsynchronisedError:
    return UnsynchronisedError(
        f"model(...) inside of torch.distributed.algorithms.Join, {algorithm}",
        "processes that may have different numbers of batches",
        "as many batches in every process, since each step exchanges messages of its own",
        "Take a DistributedSampler, which drops or repeats samples, in the place of Join; or take an algorithm without "
        "further steps and precisions that learn, for example torch2ebm.PredictiveCoding().",
    )


def _passed_by(name: str) -> UnsynchronisedError:
    return UnsynchronisedError(
        f"model(...), EnergyModel({name})",
        "a forward with gradients outside the DistributedDataParallel that this model has run in",
        "one through the wrapper, which synchronises the gradients of all processes",
        "Call the wrapper; evaluate under torch.no_grad(); detach() the optimizer to train in one process.",
    )


def _nothing_synchronises(name: str) -> UnsynchronisedWarning:
    return UnsynchronisedWarning(
        f"model(...), EnergyModel({name}): got a forward with gradients among {process_count()} processes that nothing "
        "synchronises; expected one through a wrapper. Wrap the model in torch.nn.parallel.DistributedDataParallel and "
        "call the wrapper, or fully_shard all of it before torch2ebm.convert; if you average .grad yourself, filter "
        "this class out: warnings.filterwarnings('ignore', category=UnsynchronisedWarning)."
    )
