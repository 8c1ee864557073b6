"""Programs: what a function does to tensors, recorded once as a list of ATen calls and run again on others.

A program runs no Python of ours and builds no autograd graph. While recording, tensors are known by identity: those
that the caller names become inputs wherever the function finds them, in a module, a buffer or a closure.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch2ebm.draws import UnknownDrawError, is_draw
from torch2ebm.errors import CompilationWarning, NodeEvaluationError
from torch2ebm.exclusive import TRACING
from torch2ebm.freezing import RandomState
from torch2ebm.structure import fill, leaves_of, template_of

_aten = torch.ops.aten
_ALIASES = frozenset([_aten.detach.default, _aten.alias.default])  # without autograd each is its argument
_LIFTS = frozenset([_aten.lift_fresh_copy.default, _aten.lift_fresh.default])  # a number in the code, made a tensor


class NotRecordableError(Exception):
    """The function does something that a program cannot repeat."""


@dataclass(frozen=True)
class _Source:
    """Where a leaf of a program's result comes from: one of its outputs, an input as it stands, or a constant."""

    output: int = -1
    input: int = -1
    constant: Any = None

    @property
    def is_constant(self) -> bool:
        return self.output < 0 and self.input < 0

    def leaf(self, outputs: Sequence[Any], tensors: Sequence[Any]) -> Any:
        if self.output >= 0:
            return outputs[self.output]
        return tensors[self.input] if self.input >= 0 else self.constant


class Program:
    """One recorded function of tensors.

    Attributes:
        result: The structure of what the function returned, without its leaves.
        size: How many leaves that has.
        is_compiled: Whether the compiler has been asked to make it faster.
    """

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[int], sources: list[_Source], result: Any):
        self._graph_module, self._inputs, self._sources, self.result = graph_module, inputs, sources, result
        self.size = sum(1 for _ in leaves_of(result))
        self._run: Callable[..., Sequence[Tensor]] = graph_module.forward
        self.is_compiled = False

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those that it takes, of its first inputs alone: the others come late."""
        return [tensors[i] for i in self._inputs if i < len(tensors)]

    def leaves(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The leaves of the function's result for other tensors, given in the order they had when recording."""
        with torch.no_grad():
            outputs = self._run(*[tensors[i] for i in self._inputs])
        return [source.leaf(outputs, tensors) for source in self._sources]

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        return fill(self.result, self.leaves(tensors))

    def __len__(self) -> int:
        """How many operations it calls."""
        return len(self._graph_module.graph.nodes) - len(self._inputs) - 1

    def repeated(self, rounds: int, count: int, first: int) -> Program:
        """Several rounds as one program: tensors among the first ``count`` leaves of one go into the next.

        They are the inputs from number ``first`` on. The new program's leaves are these, as the last round leaves
        them, and then the others of every round.
        """
        template, graph = self._graph_module.graph, fx.Graph()
        placeholders = template.find_nodes(op="placeholder")
        positions = sorted({*self._inputs, *[source.input for source in self._sources if source.input >= 0]})
        inputs = {i: graph.placeholder(f"tensor_{i}") for i in positions}
        moving = [i for i, source in enumerate(self._sources[:count]) if not source.is_constant]
        current: Any = dict(inputs)
        others: list[fx.Node | _Source] = []
        for _ in range(rounds):
            copies: Any = dict(zip(placeholders, [current[i] for i in self._inputs], strict=True))
            returned: Any = graph.graph_copy(template, copies)
            found = [source if source.is_constant else source.leaf(returned, current) for source in self._sources]
            current |= {first + place: found[i] for place, i in enumerate(moving)}
            others += found[count:]
        leaves = [*found[:count], *others]
        known = {node: _Source(input=i) for i, node in inputs.items()}
        outputs = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node) and leaf not in known))
        known |= {node: _Source(output=i) for i, node in enumerate(outputs)}
        graph.output(outputs)
        sources = [known[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        module = fx.GraphModule(self._graph_module, graph)
        used = [positions[i] for i in _keep_used_inputs(module)]
        return Program(module, used, sources, list(range(len(sources))))

    def compile(self) -> None:
        """Hand the program to torch's compiler; where that fails or computes otherwise, warn, and go on without."""
        if not self.is_compiled:
            self.is_compiled, self._run = True, self._first_compiled

    def _first_compiled(self, *inputs: Tensor) -> Sequence[Tensor]:
        self._run = self._graph_module.forward
        if not any(each.is_complex() or each.is_neg() for each in inputs):  # the compiler makes no code for these
            with TRACING:
                reason, compiled = _compiled(self._graph_module, inputs)
            if reason:
                warnings.warn(not_compiled(reason), stacklevel=2)
            else:
                self._run = compiled
        return self._run(*inputs)


def _compiled(module: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[str, Callable[..., Sequence[Tensor]]]:
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
    max-pool takes.
    """
    numbers = [each for each in expected if each.is_floating_point()]
    largest = max((float(each.norm()) for each in numbers), default=0.0)
    decided = max((_decided_by_rounding(each.dtype) for each in numbers), default=0.0)
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            return False
        if theirs.is_floating_point():
            rounding = min(1e3 * torch.finfo(theirs.dtype).eps, 0.1) * largest
            tolerance = _decided_by_rounding(theirs.dtype) * float(theirs.norm()) + rounding
            if not float((ours - theirs).norm()) <= tolerance:
                return False
        elif int((ours != theirs).sum()) > decided * theirs.numel():
            return False
    return True


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


def first_line(error: BaseException) -> str:
    """The first that is no heading: the compiler's own says only which backend has failed."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line and not line.endswith(":")), type(error).__name__).rstrip(".")


def record(function: Callable[[], Any], tensors: Sequence[Tensor]) -> tuple[Program, Any]:
    """Run ``function`` once, on real numbers; returns the program and the result.

    Raises :class:`NotRecordableError` where the result would depend on a tensor that is not among ``tensors``, on a
    number taken out of one, or on fresh random numbers.
    """
    positions = _first_positions(tensors)
    named = [tensors[i] for i in positions]
    graph_module, result = _traced(function, named)
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and is_draw(node.target, node.args, node.kwargs):
            raise NotRecordableError(f"{node.target} draws fresh random numbers")
    used = _keep_used_inputs(graph_module)
    sources = _sources(result, {id(tensor): i for tensor, i in zip(named, positions, strict=True)})
    return Program(graph_module, [positions[i] for i in used], sources, template_of(result)), result


def record_in_two(
    function: Callable[[], tuple[Any, Any]], early: Sequence[Tensor], late: Sequence[Tensor]
) -> tuple[Program, Program]:
    """Two programs for a function whose first result needs the ``early`` tensors alone, and may draw random numbers.

    The first program gives the leaves of the first result, and then what the second needs beside the tensors. That is
    called with the early tensors, these, and the late ones.
    """
    positions = _first_positions(early)
    named = [early[i] for i in positions]
    graph_module, (first, second) = _traced(function, [*named, *late])
    inputs = {id(tensor): i for tensor, i in zip(named, positions, strict=True)}
    of_first = _sources(first, inputs)
    count = sum(source.output >= 0 for source in of_first)
    before, after, saved = _split(graph_module, len(named), count)
    of_first += [_Source(output=count + i) for i in range(saved)]
    inputs |= {id(tensor): len(early) + saved + i for i, tensor in enumerate(late)}
    places = [*positions, *range(len(early), len(early) + saved + len(late))]
    return (
        Program(before, [positions[i] for i in _keep_used_inputs(before)], of_first, template_of(first)),
        Program(after, [places[i] for i in _keep_used_inputs(after)], _sources(second, inputs), template_of(second)),
    )


def _split(module: fx.GraphModule, early: int, outputs: int) -> tuple[fx.GraphModule, fx.GraphModule, int]:
    """What does not depend on the inputs from number ``early`` on, what does, and how many values go between them."""
    nodes = list(module.graph.nodes)
    late = set(module.graph.find_nodes(op="placeholder")[early:])
    for node in nodes[:-1]:  # the last one is the output
        if not late.isdisjoint(node.all_input_nodes):
            late.add(node)
    (returned,) = nodes[-1].args
    first, second = returned[:outputs], returned[outputs:]
    if not late.isdisjoint(first):
        raise NotRecordableError("its first result depends on what comes late")
    read = {each for node in late for each in node.all_input_nodes} | set(second)
    saved = [node for node in nodes if node in read and node not in late and node.op != "placeholder"]
    before, after = fx.Graph(), fx.Graph()
    copies: tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]] = ({}, {})
    for node in nodes[:-1]:
        if node not in late:
            copies[0][node] = before.node_copy(node, copies[0].__getitem__)
    before.output([copies[0][node] for node in (*first, *saved)])
    placeholders = module.graph.find_nodes(op="placeholder")
    for node in (*placeholders[:early], *saved, *placeholders[early:]):
        copies[1][node] = after.placeholder(node.name)
    for node in nodes[:-1]:
        if node in late and node.op != "placeholder":
            copies[1][node] = after.node_copy(node, copies[1].__getitem__)
    after.output([copies[1][node] for node in second])
    return fx.GraphModule(module, before), fx.GraphModule(module, after), len(saved)


def _traced(function: Callable[[], Any], named: Sequence[Tensor]) -> tuple[fx.GraphModule, Any]:
    from torch.fx.experimental.proxy_tensor import make_fx  # it loads sympy

    found: list[Any] = []

    def traced(*inputs: Tensor) -> list[Tensor]:
        found.append(function())
        return [leaf for leaf in leaves_of(found[0]) if isinstance(leaf, Tensor) and not _is_one_of(leaf, named)]

    try:
        with TRACING:
            graph_module = make_fx(traced, tracing_mode="real")(*named)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, UnknownDrawError, NodeEvaluationError, TypeError, ValueError) as error:
        raise NotRecordableError(first_line(error)) from error
    _check_sources(graph_module)
    _check_shapes(graph_module)
    _simplify(graph_module)
    return graph_module, found[0]


def _first_positions(tensors: Sequence[Tensor]) -> list[int]:
    first: dict[int, int] = {}
    for i, tensor in enumerate(tensors):
        first.setdefault(id(tensor), i)
    return list(first.values())


def _is_one_of(tensor: Tensor, named: Sequence[Tensor]) -> bool:
    return any(tensor is each for each in named)


def _sources(result: Any, inputs: Mapping[int, int]) -> list[_Source]:
    sources, outputs = [], 0
    for leaf in leaves_of(result):
        if not isinstance(leaf, Tensor):
            sources.append(_Source(constant=leaf))
        elif id(leaf) in inputs:
            sources.append(_Source(input=inputs[id(leaf)]))
        else:
            sources.append(_Source(output=outputs))
            outputs += 1
    return sources


def _check_shapes(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
            continue
        if node.target is not _aten.index.Tensor or any(_is_mask(index) for index in node.args[1]):
            raise NotRecordableError(f"the shape of what {node.target} returns depends on numbers in a tensor")


def _is_mask(index: fx.Node | None) -> bool:
    return index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8)


def _check_sources(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and any(user.target not in _LIFTS for user in node.users):
            tensor = getattr(graph_module, node.target, None)
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
            raise NotRecordableError(
                f"a tensor of shape {shape} comes from outside of the model, its input and the loss"
            )


def _simplify(graph_module: fx.GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target in _ALIASES:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    for node in graph_module.graph.nodes:
        node.meta.clear()  # it holds the tensors of the recording


def _keep_used_inputs(graph_module: fx.GraphModule) -> list[int]:
    used = []
    for i, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        if node.users:
            used.append(i)
        else:
            graph_module.graph.erase_node(node)
    graph_module.recompile()
    return used


def alias_pattern(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Which of the tensors are one and the same."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(tensor), i) for i, tensor in enumerate(tensors))
