"""The compiler behind ``torch.compile``, applied to one program and held against it before anybody gets the result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from torch2ebm.errors import CompilationWarning, first_line
from torch2ebm.isolation.random_numbers import RandomState

_aten = torch.ops.aten


def compiled_by_torch(module: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[str, Callable[..., Sequence[Tensor]]]:
    """The compiled module, and what speaks against it; tried on copies, so that inputs and generators stay."""
    device = next((each.device for each in inputs), torch.device("cpu"))
    ours, theirs = ([_twin(each) for each in inputs] for _ in range(2))
    generators = RandomState(device)
    expected = [*module.forward(*ours), *ours]
    generators.restore()
    try:
        with generators.replayed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler about itself
            compiled = _machine_code(module, theirs)
            found = [*compiled(*theirs), *theirs]
    except Exception as error:  # whatever a compiler may raise
        return f"the compiler failed: {first_line(error)}", module.forward
    if not _agree(found, expected):
        return "the compiler computes other numbers", module.forward
    return "", compiled


def _machine_code(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """By the compiler behind ``torch.compile``, without what that puts before it.

    A program is known by all that its guards would ask for, and they refuse to run while another thread traces.
    """
    import torch._inductor  # it loads sympy

    options = {"fallback_random": True}  # it draws what the module would have drawn
    compiled: Callable[..., Sequence[Tensor]] = torch._inductor.compile(_without_alpha(module), list(inputs), options)
    return compiled


def _twin(tensor: Tensor) -> Tensor:
    """A copy that lies in memory alike, gaps and overlaps included: the code is made for its strides."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.detach().as_strided((length if tensor.numel() else 0,), (1,)).clone()
    copy = memory.as_strided(tensor.shape, tensor.stride())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copy, tensor.requires_grad)
    return copy.requires_grad_(tensor.requires_grad)


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Up to rounding, of each tensor and of the largest (where all else cancels), and to what rounding decides in it.

    By norms, and by how many whole numbers differ: in single precision rounding decides here and there which entry a
    max-pool takes. Entries that are not finite have to be the same.
    """
    numbers = [each for each in expected if each.is_floating_point()]
    largest = max((_size(each) for each in numbers), default=0.0)
    decided = max((_decided_by_rounding(each.dtype) for each in numbers), default=0.0)
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            return False
        if theirs.is_floating_point():
            rounding = min(1e3 * torch.finfo(theirs.dtype).eps, 0.1) * largest
            tolerance = _decided_by_rounding(theirs.dtype) * _size(theirs) + rounding
            # infinity less infinity is no number, and no difference either
            same = (ours == theirs) | (ours.isnan() & theirs.isnan())
            if not float(torch.where(same, 0.0, ours - theirs).norm()) <= tolerance:
                return False
        elif int((ours != theirs).sum()) > decided * theirs.numel():
            return False
    return True


def _size(tensor: Tensor) -> float:
    return float(torch.where(tensor.isfinite(), tensor, 0.0).norm())


def _decided_by_rounding(dtype: torch.dtype) -> float:
    """The share of a result that may be other than expected, a tenth in half precision."""
    return float(min(30 * torch.finfo(dtype).eps ** 0.5, 0.1))


def _without_alpha(module: fx.GraphModule) -> fx.GraphModule:
    """x + alpha y as a product and a sum: torch 2.13's compiler loses ``alpha`` where y is a matrix product."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.find_nodes(op="call_function", target=_aten.add.Tensor):
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1 and isinstance(node.args[1], fx.Node):
            with graph.inserting_before(node):
                scaled = graph.call_function(_aten.mul.Tensor, (node.args[1], alpha))
            node.args, node.kwargs = (node.args[0], scaled), {}
    return fx.GraphModule(module, graph)


def not_compiled(reason: str) -> CompilationWarning:
    return CompilationWarning(f"compile=True: {reason}. The inference goes on without, with the same numbers.")
