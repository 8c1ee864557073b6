"""What a model was called with, checked before anything runs."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.common.nested import leaves_of, map_leaves
from torch2ebm.engine.batch import GUESSED, BatchDimension, candidates, find_batch_dimension
from torch2ebm.engine.finite import all_finite, count_bad
from torch2ebm.errors import (
    ConfigurationError,
    NodeEvaluationError,
    NonFiniteError,
    Torch2EBMError,
    first_line,
)
from torch2ebm.isolation.module_state import untouched


def as_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    example_inputs = ordinary(example_inputs)
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def of_batch(
    where: str, batch: Any, loss_fn: Callable[..., Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any], Callable[[Any], Tensor]]:
    """Arguments of the model, and the loss of its output, from ``(inputs, target)`` or a dict of keywords."""
    batch = ordinary(batch)
    if isinstance(batch, Mapping):
        return (), dict(batch), loss_fn
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ConfigurationError(
            f"{where}(batch=...)",
            type(batch).__name__,
            "(inputs, target), or a dict of keyword arguments",
            "Put several inputs in a tuple: ((a, b), target).",
        )
    inputs, target = batch
    args, kwargs = as_arguments(inputs)
    return args, kwargs, lambda output: loss_fn(output, target)


def ordinary(structure: Any) -> Any:
    """With copies of the tensors that were made in inference mode, which autograd refuses."""
    if not any(_is_inference(leaf) for leaf in leaves_of(structure)):
        return structure
    with torch.inference_mode(False):
        return map_leaves(lambda leaf: leaf.clone() if _is_inference(leaf) else leaf, structure)


def _is_inference(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_inference()


def check_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigurationError(
            f"model(...), {type(module).__name__}.forward",
            f"{len(args)} positional arguments and {sorted(kwargs) or 'no keywords'}",
            f"the arguments {inspect.signature(module.forward)}",
            f"Python says: {error}.",
        ) from error


@dataclass(frozen=True)
class Arguments:
    """What a module is called with.

    Attributes:
        module: What is called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        tensors: The tensors among them, in order.
        device: That of the first tensor; of a module without any, that of its parameters.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensors: Sequence[Tensor]
    device: torch.device

    @staticmethod
    def of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        tensors = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)]
        device = tensors[0].device if tensors else next((p.device for p in module.parameters()), torch.device("cpu"))
        return Arguments(module, args, kwargs, tensors, device)

    def names(self) -> dict[int, str]:
        """From the id of each tensor to the name of the argument that holds it."""
        found: dict[int, str] = {}
        positional = zip(_positional(self.module, len(self.args)), self.args, strict=False)
        for name, argument in [*positional, *self.kwargs.items()]:
            held = [leaf for leaf in leaves_of(argument) if isinstance(leaf, Tensor)]
            for i, tensor in enumerate(held):
                found.setdefault(id(tensor), re.sub(r"\W", "_", name if len(held) == 1 else f"{name}_{i}"))
        return found


def _positional(module: nn.Module, count: int) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return names + [f"input_{i}" for i in range(len(names), count)]  # those that *args takes


def batch_dimension_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> BatchDimension:
    """Which dimension counts samples, if need be by runs on fewer; the module is left as it was."""
    arguments = Arguments.of(module, args, kwargs)
    dims = candidates(arguments.tensors, output)
    if len(dims) < 2:
        return BatchDimension(dims[0], known="found") if dims else GUESSED
    modes = [(part, part.training) for part in module.modules()]
    with untouched(module, arguments.device), torch.no_grad():
        try:
            module.eval()  # without dropout, and without the statistics of the batch
            return find_batch_dimension(module, arguments.tensors, args, kwargs, dims)
        finally:
            for part, training in modes:
                part.training = training


def called(run: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call the module by ``run``. Raises :class:`NodeEvaluationError` where it refuses its inputs."""
    try:
        return run(*args, **kwargs)
    except Torch2EBMError:
        raise
    # How torch refuses an input: RuntimeError for shapes, dtypes and devices of a kernel, ValueError for layers' own
    # checks, IndexError for a dimension or an embedding's row, TypeError for no tensor. All else is the user's own.
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if type(error) not in (RuntimeError, ValueError, IndexError, TypeError):
            raise
        check_arguments(module, args, kwargs)
        check_not_meta(module)
        path, tensors = _refusing(module, error)
        if not path:
            tensors = Arguments.of(module, args, kwargs).tensors
        raise NodeEvaluationError(
            f"{type(module).__name__}.forward{f', in module {path!r}' if path else ''}",
            ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors),
            "inputs that the module takes",
            f"The module said: {first_line(error)}. {_remedy(module, args, kwargs, error)}",
        ) from error


def _remedy(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> str:
    if str(error).startswith("Expected more than 1 value per channel"):
        return (
            "Statistics of one value are no statistics: give the batch two samples or more "
            "(DataLoader(drop_last=True)), or switch the module, or its batch norms alone, to eval()."
        )
    if str(error).startswith("Inference tensors"):
        if any(_is_inference(p) for p in [*module.parameters(), *module.buffers()]):
            return "Make and load the module outside of torch.inference_mode(): its parameters were made inside."
        if any(_is_inference(leaf) for leaf in leaves_of((args, kwargs))):
            return "The input was made in torch.inference_mode(): pass x.clone(), or load data outside of it."
    return "Check shape, dtype and device of the input."


def _refusing(module: nn.Module, error: Exception) -> tuple[str, Sequence[Tensor]]:
    """The innermost submodule whose code was running, and the tensors that this was given."""
    paths = {id(part): path for path, part in module.named_modules()}
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        values = [frame.f_locals.get(name) for name in names]
        if values and id(values[0]) in paths:
            return paths[id(values[0])], [leaf for leaf in leaves_of(values[1:]) if isinstance(leaf, Tensor)]
    return "", []


def check_not_meta(module: nn.Module) -> None:
    """Raise :class:`NodeEvaluationError` for a module that was made on the meta device, and has no numbers yet."""
    named = [*module.named_parameters(), *module.named_buffers()]
    empty = [name for name, tensor in named if tensor.is_meta]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise NodeEvaluationError(
            f"{type(module).__name__}.forward",
            f"'{empty[0]}'{more} on the meta device, where tensors have no numbers",
            "parameters and buffers with numbers",
            "Call net.to_empty(device='cpu'), then load or initialise the weights, before you call the model.",
        )


def check_inputs(module: nn.Module, tensors: Sequence[Tensor]) -> None:
    first = next((i for i, tensor in enumerate(tensors) if tensor.ndim), None)
    for i, tensor in enumerate(tensors):
        if tensor.is_meta:
            check_not_meta(module)
            raise NodeEvaluationError(
                f"model(...), input {i}",
                "a tensor on the meta device",
                "a tensor with data",
                "Move it: tensor.to(...).",
            )
        if i == first and tensor.shape[0] == 0:  # others may be empty: a class without samples, a bag without words
            raise ConfigurationError(f"model(...), input {i}", "a batch of 0", "at least one sample", "Skip the batch.")


def check_finite_inputs(tensors: Sequence[Tensor]) -> None:
    """Raise :class:`NonFiniteError` for the input to blame where an output is not finite.

    An input that is not finite is no fault in itself: forward may fill in what is missing, or mask by infinities.
    """
    for i, tensor in enumerate(tensors):
        if tensor.is_floating_point() and tensor.layout is torch.strided and not all_finite(tensor):
            raise NonFiniteError(
                f"model(...), input {i}", count_bad(tensor), "finite numbers", "Check how the batch was made."
            )


def with_signature_of(shown: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """The function ``method`` with the signature of the bound method ``shown``, for callers that inspect it.

    One is the Hugging Face Trainer, which passes a model the columns that its ``forward`` names.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    signature = inspect.signature(shown)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [own, *signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward
