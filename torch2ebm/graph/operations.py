"""What a recorded operation is: of which module, with which parameters, whether a layer begins with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from torch2ebm.capture.in_place import attribute

# functions whose first argument is data, and whose second is a weight
_LAYERS = frozenset(
    [
        *("linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"),
        *("conv_transpose3d", "multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu"),
        *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    ]
)


def parameters_of(node: fx.Node, module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that an operation reads; of a module that is one operation, its own too."""
    for source in node.all_input_nodes:
        if source.op == "get_attr" and isinstance(found := attribute(module, str(source.target)), nn.Parameter):
            yield found
    if (opaque := opaque_module(node)) is not None:
        yield from opaque.parameters()


def opaque_module(node: fx.Node) -> nn.Module | None:
    """The module that the operation is a call of, for a module that cannot be looked into."""
    return getattr(node.target, "opaque_module", None)


def begins_a_layer(node: fx.Node) -> bool:
    """Whether it is a layer on data, and no preparation of weights."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in _LAYERS or opaque_module(node) is not None


def scope_of(node: fx.Node) -> tuple[str, str]:
    """The innermost call of a submodule that it is part of, with the number of the call, and the submodule's path."""
    calls: dict[str, str] = node.meta.get("calls", {})
    return list(calls.items())[-1] if calls else ("", "")


def called_module(node: fx.Node, module: nn.Module) -> str:
    """The path of the layer without submodules that the operation is all of, as ``F.linear`` is of ``nn.Linear``."""
    _, path = scope_of(node)
    if not path:
        return ""
    part = module.get_submodule(path)
    own = list(part.parameters())
    if own:
        read = list(parameters_of(node, module))
        whole = all(any(each is parameter for each in read) for parameter in own)
    else:
        whole = type(part).__module__.startswith("torch.nn") and not any(True for _ in part.children())
    return path if whole else ""


def name_of_target(target: Any) -> str:
    name = target if isinstance(target, str) else str(getattr(target, "__name__", target))
    return name.strip("_") if name.startswith("__") else name  # h[0] is called __getitem__
