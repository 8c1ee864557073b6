"""The second way to a :class:`Trace`: ``torch.export`` from real inputs, where symbolic tracing cannot follow forward.

Export replaces every submodule by its ATen operations, and every parameter by an input. :class:`_Importer` turns that
back into what the rest of the library reads: attributes by their path, no guards, no nested regions. Then writes in
place are removed.
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
        aten_without_writes(graph)  # before dead code goes: it leaves views that nobody reads any more
        graph.eliminate_dead_code()
        effects_as_methods(graph)  # last: fx drops a method call that nobody reads, even one that writes
    return Trace(graph, constants, leaves, settings_read_by(list(module.modules())), {}, captured_by="export")


class _Seen:
    """The leaves of the last output, with TENSOR for each that export returns."""

    # in an object of its own: export puts back the attributes that forward has set, but not what these hold
    leaves: Sequence[Any] = ()


class _Flat(nn.Module):
    """The module as a function from a flat list of tensors to those leaves of its output that are computed.

    Export takes registered containers only, and would lose an output's class; a signature and a template keep both.
    """

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self.signature = signature
        self.seen = _Seen()

    def forward(self, *tensors: Tensor) -> list[Any]:
        args, kwargs = self.signature.unflatten(tensors)
        leaves = list(leaves_of(self.module(*args, **kwargs)))
        # a size that forward returns is a symbol while export runs, and depends on the input as a tensor does
        computed = [isinstance(leaf, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)) for leaf in leaves]
        self.seen.leaves = [TENSOR if c else leaf for c, leaf in zip(computed, leaves, strict=True)]
        return [leaf for c, leaf in zip(computed, leaves, strict=True) if c]


def _program(
    module: nn.Module, signature: Signature, tensors: Sequence[Tensor]
) -> tuple[_Flat, torch.export.ExportedProgram]:
    """Export with as many dynamic dimensions as it can follow: all, then the first of each input, then none.

    A dynamic dimension lets one graph serve other sizes; an export takes seconds.
    """
    # AUTO, not a named Dim: a size that forward fixes (view(4, -1)) becomes a constant, where a Dim raises
    auto = torch.export.Dim.AUTO
    attempts: list[Any] = [
        (tuple(dict.fromkeys(range(tensor.ndim), auto) for tensor in tensors),),
        (tuple({0: auto} if tensor.ndim else {} for tensor in tensors),),
        None,
    ]
    for i, dimensions in enumerate(attempts):
        flat = _Flat(module, signature)
        try:
            # not strict: forward runs in Python on fake tensors. Strict export reads bytecode, and follows less.
            program = torch.export.export(flat, tuple(tensors), dynamic_shapes=dimensions, strict=False)
            _check_constants(program)
            return flat, program
        except Torch2EBMError:
            raise
        except Exception as error:  # export's own, those of symbolic shapes, the user's: of no one class
            if i == len(attempts) - 1:
                raise _unexportable(module, error) from error
    raise AssertionError


def _check_constants(program: torch.export.ExportedProgram) -> None:
    """Refuse what forward computes and then reads through ``.data``: torch 2.6 exports it as an empty constant.

    Newer versions refuse it themselves.
    """
    from torch._subclasses.fake_tensor import FakeTensor  # it loads sympy

    if lost := [name for name, constant in program.constants.items() if isinstance(constant, FakeTensor)]:
        raise TypeError(f"export takes what forward computes ({', '.join(lost)}) for a constant, as it does for .data")


@contextmanager
def _custom_functions_refused() -> Iterator[None]:
    """Export would follow the forward of a custom autograd function, and lose its backward."""
    # the classmethod itself: getattr would bind it to Function, and every subclass would then apply Function
    apply = torch.autograd.Function.__dict__["apply"]

    def refused(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.__module__.startswith("torch."):  # checkpoint's and others of torch's own
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
    """The innermost submodules that export cannot follow on their own; the module itself if there is none."""
    calls = _calls(module, signature, tensors)
    # deepest paths first: an outer module is asked only if nothing inside of it has failed
    found: dict[str, Problem] = {}
    for name, (args, kwargs) in sorted(calls.items(), key=lambda call: -call[0].count(".") if call[0] else 1):
        if any(inner.startswith(f"{name}.") for inner in found) or (found and not name):
            continue  # its failure may be that of its part
        part = module.get_submodule(name)
        try:
            given, part_signature = flatten_arguments(args, kwargs)
            export(part, part_signature, given)
        except UntraceableError as error:
            if isinstance(error.__cause__, Exception):
                problem = problem_of(part, error.__cause__)
                found[name] = replace(problem, scope=".".join(filter(None, (name, problem.scope))))
        except Torch2EBMError:
            continue  # its arguments cannot be inputs of a capture: the module around it is asked instead
    return list(found.values())


def _calls(module: nn.Module, signature: Signature, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The arguments of the first call of every submodule that is not torch's own, in a real run."""
    calls: dict[str, Any] = {}

    def noting(name: str) -> Callable[..., None]:
        # None in the end: what a forward pre-hook returns replaces the arguments
        return lambda part, args, kwargs: calls.setdefault(name, (args, kwargs)) and None

    parts = [(name, part) for name, part in module.named_modules() if not type(part).__module__.startswith("torch.")]
    handles = [part.register_forward_pre_hook(noting(name), with_kwargs=True) for name, part in parts]
    try:
        run_once(module, signature, tensors)
    finally:
        for handle in handles:
            handle.remove()
    return calls
