"""What ``nodes=`` may be, and the submodules that it names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from torch2ebm.errors import ConfigurationError, UnknownNodeError

Granularity = str | Sequence[str]
GRANULARITIES = ("layer", "preactivation", "activation", "module", "op", "children")


def named_leaves(module: nn.Module, granularity: Granularity) -> frozenset[str]:
    """The submodules that become one node each.

    Raises:
        ConfigurationError: where ``granularity`` is nothing that a module can be cut by.
        UnknownNodeError: where a name is no submodule's.
    """
    if granularity == "children":
        return frozenset(_callable_children(module))
    if not isinstance(granularity, str):
        if not isinstance(granularity, Sequence) or not all(isinstance(name, str) for name in granularity):
            raise ConfigurationError(
                "convert(nodes=...)", repr(granularity), "a string or a list of submodule names", "See convert's help."
            )
        _check_known(module, frozenset(granularity))
        return frozenset(granularity)
    if granularity not in ("auto", *GRANULARITIES):
        raise ConfigurationError(
            "convert(nodes=...)",
            repr(granularity),
            f"'auto', {', '.join(map(repr, GRANULARITIES))}, or a list of names",
            "To make one submodule a node write its name in a list: nodes=['encoder'].",
        )
    return frozenset()


def _check_known(module: nn.Module, names: frozenset[str]) -> None:
    known = {name for name, _ in module.named_modules()} - {""}
    if unknown := sorted(names - known):
        raise UnknownNodeError(
            "convert(nodes=[...])",
            f"{unknown}",
            f"names of submodules of {type(module).__name__} ({', '.join(sorted(known)[:12])}, ...)",
            "Take them from module.named_modules().",
        )


def _callable_children(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Children by path; those of lists and dicts of modules in place of these, which have no forward."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _callable_children(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
