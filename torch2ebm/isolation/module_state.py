"""The state of a module, put back: buffers, hooks, attributes, parameters, whether parameters are frozen.

Captures, verifications and relaxations run a user's forward more often than the training loop does. After each of
these runs the module is as it was before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from torch2ebm.isolation.interrupts import Change, restored_by
from torch2ebm.isolation.random_numbers import Generators


class BufferSnapshot:
    """Copies of the buffers that a forward pass changes."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        held = list(buffers.values())
        self.copies = list(zip(held, _copied(held), strict=True))

    def restore(self) -> None:
        for buffer, copy in self.copies:
            buffer.data.copy_(copy)  # .data: autograd graphs that saved the buffer keep their version of it

    def preserved(self) -> Change:
        return restored_by(self.restore)

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.restore()
            raise


_clone: Callable[[list[Tensor]], Sequence[Tensor]] | None = getattr(torch, "_foreach_clone", None)  # not in torch 2.6


def _copied(tensors: list[Tensor]) -> Sequence[Tensor]:
    if _clone is None or not tensors:
        return [tensor.detach().clone() for tensor in tensors]
    # one call, since a network has hundreds of small buffers; no torch.no_grad, which an interruption could leave on
    return _clone([tensor.detach() if tensor.requires_grad else tensor for tensor in tensors])


class BufferHistory:
    """The buffers before and after one forward; a refused step can then take the forward's update back."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self.buffers = buffers
        self.before = BufferSnapshot(buffers)
        self.after = self.before
        self._undoing = False

    def forward_ended(self) -> None:
        self.after = BufferSnapshot(self.buffers)

    def undo(self) -> None:
        """Give them their contents from before, unless something else has changed them since."""
        # |=: after an interrupted undo some buffers are back, and no longer equal to what the forward left
        self._undoing |= all(torch.equal(buffer, copy) for buffer, copy in self.after.copies)
        if self._undoing:
            self.before.restore()


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same numbers, NaN among them."""
    # not torch.equal: a NaN that was there before has not changed
    if a.shape != b.shape or a.layout is not b.layout:
        return False
    if a.layout is not torch.strided:
        return a is b or (a.layout is torch.sparse_coo and identical(a.to_dense(), b.to_dense()))
    if a.is_floating_point() and a.itemsize == 1:  # torch compares no numbers of eight bits
        a, b = a.float(), b.float()
    return bool(((a == b) | ((a != a) & (b != b))).all())


def is_lazy(tensor: Tensor) -> bool:
    """Whether a lazy module has not made it yet."""
    return isinstance(tensor, (UninitializedParameter, UninitializedBuffer))


def hooks_suspended(parameters: Iterable[Tensor]) -> Change:
    """Keep the hooks of parameters out of the gradients taken inside: they run once, when ``.grad`` is filled."""
    # torch.autograd.grad runs a leaf's register_hook hooks too, and returns what they make of the gradient
    hooked = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]

    def suspend() -> None:
        for parameter, _ in hooked:
            parameter._backward_hooks = None

    def restore() -> None:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks

    return Change(suspend, restore)


def tensors_in_place(module: nn.Module, tensors: Mapping[str, Tensor]) -> Change:
    """Put ``tensors`` in the place of the parameters of these names; a shared parameter is replaced everywhere."""
    # into the registries, not by setattr: nn.Module refuses a plain tensor where a parameter is registered
    own = {name: parameter for name, parameter in module.named_parameters() if name in tensors}
    places = [
        (registry, key, name)
        for name, parameter in own.items()
        for registry in (each._parameters for each in module.modules())
        for key, entry in registry.items()
        if entry is parameter
    ]

    def replace() -> None:
        for registry, key, name in places:
            registry[key] = tensors[name]  # type: ignore[assignment]

    def restore() -> None:
        for registry, key, name in places:
            registry[key] = own[name]

    return Change(replace, restore)


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Gradients on, whatever the caller has set: inference mode, no_grad, or the saved-tensor hooks of a checkpoint."""
    with torch.inference_mode(False), torch.enable_grad(), nothing_packed():
        yield


def nothing_packed() -> AbstractContextManager[None]:
    """Switch off the saved-tensor hooks outside, a checkpoint's for example."""
    if not may_be_packed():
        return nullcontext()  # transforms of torch.func refuse hooks, those that do nothing too
    # torch asks the innermost pair alone
    return torch.autograd.graph.saved_tensors_hooks(unchanged, unchanged)


_hooks_of_saved: Callable[[bool], object] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def may_be_packed() -> bool:
    """Whether there are hooks on the tensors that autograd saves; torch 2.6 cannot say."""
    return _hooks_of_saved is None or _hooks_of_saved(False) is not None


def unchanged(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def untouched(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore generators, buffers and attributes at the end. No hook of a parameter runs inside."""
    random = Generators(device)
    buffers = BufferSnapshot({name: b for name, b in module.named_buffers() if not b.is_meta and not is_lazy(b)})
    with ExitStack() as stack:
        stack.callback(random.restore)
        stack.callback(buffers.restore)
        stack.enter_context(attributes_restored(module))
        stack.enter_context(hooks_suspended(module.parameters()))
        yield


class AttributeSnapshot:
    """The attributes of modules, with the contents of those that are lists and dicts."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.before = [(m, dict(m.__dict__), _contents(m)) for m in modules]

    def changed(self) -> list[nn.Module]:
        """The modules that have other attributes by now, or other contents of them."""
        return [
            m
            for m, attributes, contents in self.before
            if not _same_objects(m.__dict__, attributes) or not all(_same_objects(now, then) for now, then in contents)
        ]

    def restore(self) -> None:
        for m, attributes, contents in self.before:
            # __dict__ and not setattr: a module's __setattr__ sorts by type
            _put_back(m.__dict__, attributes)
            for collection, content in contents:
                _restore(collection, content)


@contextmanager
def attributes_restored(module: nn.Module) -> Iterator[None]:
    """Restore the attributes of all submodules at the end."""
    before = AttributeSnapshot(module.modules())
    try:
        yield
    finally:
        before.restore()


_COLLECTIONS = (list, dict, set, deque)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """The collections and the objects' attributes among the attributes, each with a copy.

    ``_parameters`` and ``_buffers`` are among them.
    """
    found = [value if isinstance(value, _COLLECTIONS) else _names_of(value) for value in module.__dict__.values()]
    return [(value, value.copy()) for value in found if value is not None]


def _names_of(value: Any) -> dict[str, Any] | None:
    """The attributes of a config object or a counter; None for numbers, tensors, modules, functions and classes."""
    if isinstance(value, (Tensor, nn.Module, type, FunctionType)) or type(value).__module__ in ("builtins", "torch"):
        return None
    names = getattr(value, "__dict__", None)
    return names if isinstance(names, dict) else None


def _restore(collection: Any, content: Any) -> None:
    if isinstance(collection, list):
        collection[:] = content
    elif isinstance(collection, set):
        collection.clear()
        collection.update(content)
    elif isinstance(collection, deque):
        collection.clear()
        collection.extend(content)
    # by identity: == between tensors has no truth value
    elif [(key, id(value)) for key, value in collection.items()] != [(k, id(value)) for k, value in content.items()]:
        _put_back(collection, content)
        if list(collection) != list(content):
            collection.clear()
            collection.update(content)


def _same_objects(now: Any, before: Any) -> bool:
    if isinstance(now, set):
        return bool(now == before)
    if isinstance(now, dict):
        return now.keys() == before.keys() and all(value is before[name] for name, value in now.items())
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _put_back(names: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    """No clear: an interruption would leave a module without its attributes."""
    names.update(before)
    for name in names.keys() - before.keys():
        del names[name]


@contextmanager
def all_parameters_trainable(module: nn.Module) -> Iterator[None]:
    """All parameters require gradients inside: whether an operation can learn must not depend on what is frozen now."""
    frozen = [p for p in module.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
