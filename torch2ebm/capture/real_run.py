"""Runs of the module itself, which leave it as it was. Every captured graph is compared with one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.capture.signature import Signature
from torch2ebm.common.nested import leaves_of, template_of
from torch2ebm.errors import CaptureMismatchError, NodeEvaluationError, first_line
from torch2ebm.isolation.module_state import plain_autograd, untouched


@dataclass(frozen=True)
class RealRun:
    """One real run of the module: the outputs, buffers and gradients that its energy graph has to reproduce."""

    tensors: tuple[Tensor, ...]
    outputs: list[Any]
    structure: Any  # a template of the output
    changed_buffers: Mapping[str, Tensor]  # name -> contents after the run
    cotangents: Sequence[Tensor | None] = ()  # for each output an arbitrary gradient, None where it has none
    gradients: Mapping[str, Tensor] | None = None  # of the parameters for these; None where the module has no backward
    kept: frozenset[str] = frozenset()  # plain attributes, by path, in which forward left tensors

    def check(self, module: nn.Module, outputs: Sequence[Any]) -> None:
        """Raise :class:`CaptureMismatchError` where ``outputs`` or the module's buffers now differ."""
        buffers = dict(module.named_buffers())
        if len(outputs) != len(self.outputs):
            raise _mismatch(module, [f"{len(outputs)} outputs where the module has {len(self.outputs)}"])
        differences = [
            f"output {i}"
            for i, (ours, real) in enumerate(zip(outputs, self.outputs, strict=True))
            if not _same(ours, real)
        ] + [f"buffer {name}" for name, after in self.changed_buffers.items() if not _same(buffers[name], after)]
        if differences:
            raise _mismatch(module, differences)


def _mismatch(module: nn.Module, differences: Sequence[str]) -> CaptureMismatchError:
    return CaptureMismatchError(
        f"torch2ebm cannot capture {type(module).__name__}",
        f"another result in {', '.join(differences)}",
        "the module's own outputs and buffers",
        "Its forward depends on something that tracing does not see (a value, a counter, a view written in "
        "place, the order of random draws): make that submodule one node with nodes=[...].",
    )


def _identical(a: Tensor, b: Tensor) -> bool:
    # not torch.equal: a NaN that was there before has not changed
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _same(ours: Any, real: Any) -> bool:
    if not isinstance(real, Tensor):
        return not isinstance(ours, Tensor) and bool(ours == real)
    if not isinstance(ours, Tensor) or ours.shape != real.shape or ours.dtype != real.dtype:
        return False
    if not (real.is_floating_point() or real.is_complex()):
        return torch.equal(ours, real)
    # Not equal: accelerators add in no fixed order. On the CPU the same operations give the same bits.
    tolerance = 16 * torch.finfo(real.dtype).eps
    return torch.allclose(ours, real, rtol=tolerance, atol=tolerance, equal_nan=True)


def run_once(module: nn.Module, signature: Signature, tensors: Sequence[Tensor]) -> RealRun:
    """What the module itself makes of ``tensors``. Raises :class:`NodeEvaluationError` where it refuses them."""
    device = tensors[0].device if tensors else torch.device("cpu")
    with plain_autograd(), untouched(module, device):
        return real_run(module, signature, [tensor.detach().clone() for tensor in tensors])


def real_run(module: nn.Module, signature: Signature, tensors: Sequence[Tensor]) -> RealRun:
    before, held = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}, _tensors_held(module)
    args, kwargs = signature.unflatten([tensor.clone() for tensor in tensors])  # clones: forward may write its input
    try:
        output = module(*args, **kwargs)
    # How torch refuses an input: RuntimeError for shapes, dtypes and devices of a kernel, ValueError for layers' own
    # checks, IndexError for a dimension or an embedding's row, TypeError for no tensor. All else is the user's own.
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise NodeEvaluationError(
            f"{type(module).__name__}.forward",
            ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors),
            "inputs that the module takes",
            f"The module said: {first_line(error)}. Check shape, dtype and device of the input.",
        ) from error
    kept = frozenset(
        path for path, now in _tensors_held(module).items() if list(map(id, now)) != list(map(id, held.get(path, ())))
    )
    leaves = list(leaves_of(output))
    cotangents, gradients = _real_backward(module, leaves)
    outputs = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    changed = {
        name: buffer.detach().clone()
        for name, buffer in module.named_buffers()
        if name in before and not _identical(buffer, before[name])
    }
    return RealRun(tuple(tensors), outputs, template_of(output), changed, cotangents, gradients, kept)


def _real_backward(module: nn.Module, leaves: Sequence[Any]) -> tuple[list[Tensor | None], dict[str, Tensor] | None]:
    """Gradients of the parameters for a fixed, uneven gradient of the outputs."""
    cotangents = [_uneven(leaf) if is_live(leaf) else None for leaf in leaves]
    live = {id(leaf): (leaf, c) for leaf, c in zip(leaves, cotangents, strict=True) if c is not None}
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not live or not trainable:
        return cotangents, None
    # an output returned twice gets one cotangent: autograd would add two, and its slot in the graph is one
    outputs, directions = zip(*live.values(), strict=True)
    once = [c if c is None or live[id(leaf)][1] is c else None for leaf, c in zip(leaves, cotangents, strict=True)]
    try:
        found = torch.autograd.grad(outputs, list(trainable.values()), directions, allow_unused=True)
    except RuntimeError:  # an operation without a backward: then there are no gradients to be held against
        return once, None
    return once, {name: g for name, g in zip(trainable, found, strict=True) if g is not None}


def _uneven(output: Tensor) -> Tensor:
    # not ones: the pullback of a constant through a softmax or a layer norm is zero, which would show nothing
    return torch.linspace(-1, 1.5, output.numel(), device=output.device).reshape(output.shape).to(output.dtype)


def _tensors_held(module: nn.Module) -> dict[str, list[Tensor]]:
    """Path of each plain attribute that holds tensors, to these tensors.

    They are compared by identity. Keeping them alive keeps a new tensor from getting the address of an old one.
    """
    held = {
        f"{prefix}.{name}".removeprefix("."): [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]
        for prefix, each in module.named_modules()
        for name, value in each.__dict__.items()
        if name not in ("_parameters", "_buffers", "_modules")
    }
    return {path: tensors for path, tensors in held.items() if tensors}


def is_live(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and (value.is_floating_point() or value.is_complex())
