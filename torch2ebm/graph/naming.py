"""What nodes are called, and what is said of them: the path of the module that they come from, and what they do."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn

from torch2ebm.capture.in_place_aten import is_aliasing
from torch2ebm.capture.in_place_fx import attribute
from torch2ebm.graph.partition import Group
from torch2ebm.graph.roles import Roles


def name_of(group: Group, module: nn.Module, roles: Roles) -> str:
    """The path of the module that the group is, or of the operation that it is about."""
    operation = group.root or group.tip
    if operation.op == "call_module":
        return str(operation.target)
    if operation in roles.sites:
        return roles.sites[operation].name
    stack = operation.meta.get("nn_module_stack") or {}
    scope = next(iter(reversed(list(stack))), "") if stack else ""
    called = re.sub(r"@\d+", "", scope)  # a second call of a module is traced as module@1
    if called and _is_whole_module(module, called, operation):
        return called
    return f"{scope}.{operation.name}" if scope else operation.name


def _is_whole_module(module: nn.Module, scope: str, operation: fx.Node) -> bool:
    """An operation that reads all parameters of a module is that module: ``encoder.query``, exported or not."""
    read = [attribute(module, str(s.target)) for s in operation.all_input_nodes if s.op == "get_attr"]
    own = list(module.get_submodule(scope).parameters())
    return bool(own) and all(any(each is parameter for each in read) for parameter in own)


def described(members: Sequence[fx.Node], module: nn.Module, roles: Roles) -> str:
    """What a node does, its members in order: a named submodule by its class; of exported operations not the views."""
    return " > ".join(_operations(members, module, roles))


def _operations(members: Sequence[fx.Node], module: nn.Module, roles: Roles) -> Iterator[str]:
    site = None
    for node in [n for n in members if not _only_looks(n)] or members:
        before, site = site, roles.sites.get(node)
        if site is None:
            yield _operation(node, module)
        elif site != before:
            yield type(module.get_submodule(site.name)).__name__


def _operation(node: fx.Node, module: nn.Module) -> str:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))


def _only_looks(node: fx.Node) -> bool:
    """Whether an exported operation gives what it reads in another shape, or a part of it."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _only_looks(node.args[0])
    return isinstance(node.target, torch._ops.OpOverload) and is_aliasing(node.target)


def unique_name(name: str, taken: set[str]) -> str:
    """The name, with a number where it is taken; it is taken from now on."""
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
