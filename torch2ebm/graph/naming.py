"""What nodes are called, and what is said of them: the path of the module that they come from, and what they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx, nn

from torch2ebm.graph.operations import called_module, name_of_target, opaque_module, scope_of
from torch2ebm.graph.partition import Group
from torch2ebm.graph.roles import Roles


def name_of(group: Group, module: nn.Module, roles: Roles) -> str:
    """The path of the module that the group is, or of the operation that it is about."""
    operation = group.root or group.tip
    if operation in roles.sites:
        return roles.sites[operation].name
    return operation_name(operation, module)


def operation_name(node: fx.Node, module: nn.Module) -> str:
    """The path of the layer that an operation is, or its own name within the submodule that it is part of."""
    if opaque_module(node) is not None:
        return str(getattr(node.target, "opaque_path", "")) or "(all)"
    if called := called_module(node, module):
        return called
    scope, _ = scope_of(node)
    return f"{scope}.{node.name}" if scope else node.name


def described(members: Sequence[fx.Node], module: nn.Module, roles: Roles) -> str:
    """What a node does, its members in order: a layer or a named submodule by its class, all else as torch names it."""
    return " > ".join(_operations(members, module, roles))


def _operations(members: Sequence[fx.Node], module: nn.Module, roles: Roles) -> Iterator[str]:
    site = None
    for node in members:
        before, site = site, roles.sites.get(node)
        if site is None:
            called = called_module(node, module)
            yield type(module.get_submodule(called)).__name__ if called else name_of_target(node.target)
        elif site != before:
            yield type(module.get_submodule(site.name)).__name__


def unique_name(name: str, taken: set[str]) -> str:
    """The name, with a number where it is taken; it is taken from now on."""
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
