"""The second way to a :class:`Trace`: ``torch.export`` from real inputs, where symbolic tracing cannot follow forward.

Export inlines every submodule into operations of ATen. They are turned back into what the rest of the library reads:
attributes by their path, no writes in place, no guards, no regions of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.capture.export_import import _Importer
from torch2ebm.capture.in_place_aten import aten_without_writes, effects_as_methods
from torch2ebm.capture.problems import Problem, problem_of
from torch2ebm.capture.real_run import run_once
from torch2ebm.capture.signature import TENSOR, Signature, flatten_arguments
from torch2ebm.capture.trace import Trace, settings_read_by
from torch2ebm.common.nested import leaves_of
from torch2ebm.errors import Torch2EBMError, UntraceableError
from torch2ebm.isolation.module_state import plain_autograd, untouched


def export(
    module: nn.Module, signature: Signature, tensors: Sequence[Tensor], leaves: frozenset[str] = frozenset()
) -> Trace:
    """Export ``module`` as it runs on ``tensors``. Raises :class:`UntraceableError`; alters nothing."""
    device = tensors[0].device if tensors else torch.device("cpu")
    with plain_autograd(), untouched(module, device), _custom_functions_refused(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat, program = _program(module, signature, [tensor.detach().clone() for tensor in tensors])
        graph, constants = _Importer(module, program, list(signature.names(module))).graph(flat.seen.leaves)
        aten_without_writes(graph)
        graph.eliminate_dead_code()
        effects_as_methods(graph)
    return Trace(graph, constants, leaves, settings_read_by(list(module.modules())), {}, captured_by="export")


class _Seen:
    """The leaves of the last output, TENSOR where export returns one. Export resets attributes of modules."""

    leaves: Sequence[Any] = ()


class _Flat(nn.Module):
    """The module as a function from a flat list of tensors to the leaves of its output that depend on them."""

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self.signature = signature
        self.seen = _Seen()

    def forward(self, *tensors: Tensor) -> list[Any]:
        args, kwargs = self.signature.unflatten(tensors)
        leaves = list(leaves_of(self.module(*args, **kwargs)))
        computed = [isinstance(leaf, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)) for leaf in leaves]
        self.seen.leaves = [TENSOR if c else leaf for c, leaf in zip(computed, leaves, strict=True)]
        return [leaf for c, leaf in zip(computed, leaves, strict=True) if c]


def _program(
    module: nn.Module, signature: Signature, tensors: Sequence[Tensor]
) -> tuple[_Flat, torch.export.ExportedProgram]:
    """As many dynamic dimensions as export can follow: all, the first of each input, none."""
    auto = torch.export.Dim.AUTO
    attempts: list[Any] = [
        (tuple(dict.fromkeys(range(tensor.ndim), auto) for tensor in tensors),),
        (tuple({0: auto} if tensor.ndim else {} for tensor in tensors),),
        None,
    ]
    for i, dimensions in enumerate(attempts):
        flat = _Flat(module, signature)
        try:
            program = torch.export.export(flat, tuple(tensors), dynamic_shapes=dimensions, strict=False)
            _check_constants(program)
            return flat, program
        except Torch2EBMError:
            raise
        except Exception as error:
            if i == len(attempts) - 1:
                raise _unexportable(module, error) from error
    raise AssertionError


def _check_constants(program: torch.export.ExportedProgram) -> None:
    """What forward reads through ``.data`` is lost; newer versions of torch refuse that themselves."""
    from torch._subclasses.fake_tensor import FakeTensor  # it loads sympy

    if lost := [name for name, constant in program.constants.items() if isinstance(constant, FakeTensor)]:
        raise TypeError(f"export takes what forward computes ({', '.join(lost)}) for a constant, as it does for .data")


@contextmanager
def _custom_functions_refused() -> Iterator[None]:
    """Export would follow the forward of a custom autograd function, and lose its backward."""
    apply = torch.autograd.Function.__dict__["apply"]

    def refused(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.__module__.startswith("torch."):
            return apply.__func__(function, *args, **kwargs)
        raise TypeError(f"{function.__name__}.apply: export loses the backward of a custom autograd function")

    torch.autograd.Function.apply = classmethod(refused)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


def _unexportable(module: nn.Module, error: Exception) -> UntraceableError:
    return UntraceableError(
        f"torch2ebm cannot capture {type(module).__name__}",
        str(problem_of(module, error)),
        "operations on tensors that do not branch on a tensor's value",
        "Make the submodule concerned one node with nodes=[...], or rewrite the branch with torch.where.",
    )


def failing_parts(module: nn.Module, signature: Signature, tensors: Sequence[Tensor]) -> list[Problem]:
    """Every innermost submodule that export cannot follow on its own, then the rest of the module."""
    calls = _calls(module, signature, tensors)
    found: dict[str, Problem] = {}
    for name, (args, kwargs) in sorted(calls.items(), key=lambda call: -call[0].count(".") if call[0] else 1):
        if any(inner.startswith(f"{name}.") for inner in found) or (found and not name):
            continue  # what is wrong in it may be what is wrong inside of it
        part = module.get_submodule(name)
        try:
            given, part_signature = flatten_arguments(args, kwargs)
            export(part, part_signature, given)
        except UntraceableError as error:
            if isinstance(error.__cause__, Exception):
                problem = problem_of(part, error.__cause__)
                found[name] = replace(problem, scope=".".join(filter(None, (name, problem.scope))))
        except Torch2EBMError:
            continue  # arguments that are no tensors: the module around it will tell
    return list(found.values())


def _calls(module: nn.Module, signature: Signature, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The arguments of the first call of every submodule that is not torch's own, in a real run."""
    calls: dict[str, Any] = {}

    def noting(name: str) -> Callable[..., None]:
        return lambda part, args, kwargs: calls.setdefault(name, (args, kwargs)) and None

    parts = [(name, part) for name, part in module.named_modules() if not type(part).__module__.startswith("torch.")]
    handles = [part.register_forward_pre_hook(noting(name), with_kwargs=True) for name, part in parts]
    try:
        run_once(module, signature, tensors)
    finally:
        for handle in handles:
            handle.remove()
    return calls
