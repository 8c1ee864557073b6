"""What functions of torch do: which make no tensor, which write in place, which draw or move what nobody sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch2ebm.capture.run import Constant, Hot, Record
from torch2ebm.common.nested import leaves_of


def _getters(*names: str) -> Iterator[Any]:
    return (getattr(Tensor, name).__get__ for name in names if hasattr(Tensor, name))


def _methods(*names: str) -> Iterator[Any]:
    return (getattr(Tensor, name) for name in names if hasattr(Tensor, name))


# What tells of a tensor and makes none. Their results matter where they are numbers of later operations.
PASSIVE = frozenset(
    [
        *_getters("shape", "dtype", "device", "ndim", "layout", "is_leaf", "requires_grad", "grad_fn", "names", "name"),
        *_getters("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_nested", "is_quantized", "is_mkldnn", "is_mps"),
        *_getters("_version", "output_nr", "itemsize", "nbytes", "_base", "_backward_hooks", "grad", "is_sparse_csr"),
        *_methods("dim", "size", "numel", "nelement", "ndimension", "stride", "storage_offset", "is_contiguous"),
        *_methods(
            "is_floating_point", "is_complex", "is_signed", "is_inference", "data_ptr", "element_size", "is_conj"
        ),
        *_methods("item", "tolist", "numpy", "get_device", "untyped_storage", "storage", "is_neg", "equal", "allclose"),
        *_methods("__bool__", "__len__", "__int__", "__float__", "__index__", "__complex__", "__format__", "__repr__"),
        *_methods("__contains__", "__hash__", "__array__", "is_shared", "is_same_size", "is_set_to", "is_pinned"),
        *_methods("retain_grad", "requires_grad_", "__reduce_ex__", "__deepcopy__"),
        *(torch.is_floating_point, torch.is_complex, torch.numel, torch.equal, torch.allclose, torch.is_nonzero),
        *(torch.result_type, torch.is_same_size, torch.is_signed, torch.is_inference, torch.is_conj, torch.is_neg),
    ]
)
# what gives Python a tensor's numbers, so that a branch or a later number may depend on them
VALUES = frozenset(
    [
        *_methods("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "equal"),
        *_methods("__contains__", "__array__", "allclose"),
        *(torch.equal, torch.allclose, torch.is_nonzero),
    ]
)
GRADIENTS = frozenset([torch.autograd.grad, torch.autograd.backward, Tensor.backward])


def with_hook(tensor: Tensor, hook: Callable[..., Any]) -> Tensor:
    """``tensor``, with a hook on its gradient: what ``register_hook`` does to all who read it later."""
    hooked = tensor.view_as(tensor)
    if hooked.requires_grad:
        hooked.register_hook(hook)  # type: ignore[no-untyped-call]
    return hooked


def tensors_of(structure: Any) -> Iterator[Tensor]:
    return (leaf for leaf in leaves_of(structure) if isinstance(leaf, Tensor))


def makes_tensors(function: Any, result: Any) -> bool:
    if result is None:
        return function is Tensor.__setitem__
    return any(True for _ in tensors_of(result))


def writes_its_first(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return function is Tensor.__setitem__ or named_in_place(function) or name in _AUGMENTED


_AUGMENTED = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
)


def named_in_place(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def is_among(tensor: Tensor, tensors: Iterable[Tensor]) -> bool:
    return any(tensor is each for each in tensors)


def share_memory(a: Tensor, b: Tensor) -> bool:
    try:
        return a is b or a.untyped_storage()._cdata == b.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse tensors have no storage
        return False


def apart(written: Sequence[Tensor]) -> list[Tensor]:
    """The first of those that share their memory: torch counts writes to the memory, and not to the view."""
    found: list[Tensor] = []
    for tensor in written:
        if not any(share_memory(tensor, other) for other in found):
            found.append(tensor)
    return found


def moved_by(record: Record) -> Iterator[Constant]:
    """The running statistics of a batch norm, which torch moves without a new version of the buffer."""
    if record.function is functional.batch_norm:
        given = (*record.args[1:3], record.kwargs.get("running_mean"), record.kwargs.get("running_var"))
        yield from (each for each in given if isinstance(each, Constant))


def written_parameters(records: Iterable[Record]) -> list[str]:
    """Paths of the parameters that operations have written in place, themselves or through a view."""
    base: dict[Any, Any] = {}
    found: dict[str, None] = {}
    for record in records:
        for target in record.wrote:
            path = base.get(target.place, target.place)
            if isinstance(target, Hot) and isinstance(path, str):
                found[path] = None
        for number, source in record.sources.items():
            base[number] = base.get(source.place, source.place)
    return list(found)


def draws_from_its_own(numbers: Iterable[Any]) -> bool:
    """Whether there is a generator among the arguments of an operation."""
    return any(isinstance(number, torch.Generator) for number in numbers)


def hung_on_autograd(module: nn.Module) -> bool:
    """Whether a module has backward hooks, which torch hangs on the autograd functions of its inputs and results."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def runs_elsewhere(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule"
