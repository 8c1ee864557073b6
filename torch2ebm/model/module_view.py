"""Being the module: what is read, written or deleted on a converted model is read, written or deleted on the module."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any

from torch import nn

from torch2ebm.common.own_forward import calls_one_of
from torch2ebm.common.users_code import users_level
from torch2ebm.engine.batch import GUESSED
from torch2ebm.errors import ConfigurationError, NameCollisionWarning, UnsupportedError
from torch2ebm.model.arguments import with_signature_of
from torch2ebm.model.conversion import Conversion
from torch2ebm.model.own_methods import is_own_method, with_forward

HELD = "torch2ebm"  # the one attribute of a view that is not the module's

_HOOKS_AROUND_THE_CALL = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
_REGISTERING = ("add_module", "register_module", "register_buffer", "register_parameter", "set_submodule")
_ALWAYS_THE_MODULES = (
    *(*_REGISTERING, "get_submodule", "get_parameter", "get_buffer"),
    *("apply", "_apply", "train", "state_dict", "load_state_dict"),
)
_NEVER_THE_MODULES = (  # of the call, of the hooks around it and of the text: of what people call and print
    *("forward", "compile", "_call_impl", "_wrapped_call_impl", "_slow_forward", "_compiled_call_impl"),
    *("register_forward_hook", "register_forward_pre_hook", "register_backward_hook"),
    *("register_full_backward_hook", "register_full_backward_pre_hook"),
    *("accepts_loss_kwargs", "extra_repr", "_get_name", "_replicate_for_data_parallel"),
)
_CONTAINERS = (  # Python looks these up on the class, where __getattr__ is not asked
    *("__len__", "__iter__", "__reversed__", "__contains__", "__bool__", "__enter__", "__exit__"),
    *("__getitem__", "__setitem__", "__delitem__", "__add__", "__iadd__", "__mul__", "__rmul__", "__imul__"),
)


class ModuleView(nn.Module):
    """Is a module in everything but its forward and the hooks around it. Abstract: a subclass has the forward.

    Attributes, parameters, buffers and submodules are the module's, whichever of the two they are written on. A name
    that a subclass defines is the module's where the module has it too, as in the loop that was written for the
    module, and a :class:`NameCollisionWarning` says so. What the view has of its own is ``torch2ebm``.
    """

    torch2ebm: Conversion

    def __init__(self, conversion: Conversion, told: bool = False) -> None:
        fresh = vars(nn.Module())
        self.__dict__.update({HELD: conversion, **{name: fresh[name] for name in _HOOKS_AROUND_THE_CALL}})
        _look_like_the_module(self, told)

    def __getattr__(self, name: str) -> Any:
        if HELD not in self.__dict__:  # while it is unpickled
            raise AttributeError(name)
        if _is_ours(self, name):  # a property has raised an AttributeError, which says more than the module would
            return getattr(self.torch2ebm, name)
        held = self.torch2ebm
        found = getattr(held.module, name)
        if is_own_method(found, held.module, name):
            return with_forward(found, held.module, held.answer_by, lambda: held.algorithm is not None, self)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("__class__", "__dict__"):
            object.__setattr__(self, name, value)
        elif _stays(self, name, value):
            self.__dict__[name] = value
        elif _is_refused(self, name, value):
            raise _no_attribute(name, self.torch2ebm.module)
        else:
            if name == "forward":
                self.__dict__.pop(name, None)  # a wrapper, which this one replaces
            with _change_followed(self, name) as module:
                setattr(module, name, _of_module(self, value) if name == "forward" else value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ and name != HELD:
            del self.__dict__[name]
        else:
            with _change_followed(self, name) as module:
                delattr(module, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.torch2ebm.module)})

    def __getstate__(self) -> dict[str, Any]:
        """The module, the choices, and what stands around the call; captures and states are made when needed."""
        held, others = self.torch2ebm, (HELD, "_compiled_call_impl")
        around = {name: value for name, value in vars(self).items() if name not in others}
        choices = {"granularity": held.granularity, "algorithm": held.algorithm, "batch": held.batch}
        return {"module": held.module, **choices, "around": around}

    def __setstate__(self, state: dict[str, Any]) -> None:
        batch = state.get("batch", GUESSED)  # version 0.1 saved none
        conversion = Conversion(state["module"], state["granularity"], state["algorithm"], batch)
        ModuleView.__init__(self, conversion, told=True)
        self.__dict__.update(state.get("around", {}))  # version 0.1 saved none

    def __reduce__(self) -> tuple[Any, ...]:
        base = _plain_class(self)
        return base.__new__, (base,), self.__getstate__()

    def _replicate_for_data_parallel(self) -> ModuleView:
        raise UnsupportedError(
            "torch.nn.DataParallel(model)",
            "several devices, which each get a replica of the converted model",
            "one device in a process",
            "Start one process for each device and wrap the model in torch.nn.parallel.DistributedDataParallel.",
        )


# where an attribute is


def _stays(view: ModuleView, name: str, value: Any) -> bool:
    """Whether it is of the hooks around the call, or leads back to the view's own forward.

    In the module's place such a wrapper would call itself, since the view's forward calls the module's.
    """
    if name != "forward" and (name in _NEVER_THE_MODULES or name in vars(view).keys() - {HELD}):
        return True
    classes = [each for each in type(view).__mro__ if issubclass(each, ModuleView)]
    return calls_one_of(value, [vars(each)["forward"] for each in classes if "forward" in vars(each)])


def _is_ours(view: ModuleView, name: str) -> bool:
    """Whether a name is one that the view's class has for people, and the module has not."""
    own = type(view).__dict__.keys()
    return name in vars(_plain_class(view)) and name not in own and name not in _NEVER_THE_MODULES


def _is_refused(view: ModuleView, name: str, value: Any) -> bool:
    """Whether it would be an attribute of the module that nobody reads; a layer or a parameter is registered."""
    registered = isinstance(value, (nn.Module, nn.Parameter)) or name in _names_of(view.torch2ebm.module)
    return _is_ours(view, name) and not registered


def _no_attribute(name: str, module: nn.Module) -> ConfigurationError:
    return ConfigurationError(
        f"model.{name} = ...",
        f"a name of torch2ebm's that {type(module).__name__} does not have",
        "an attribute of the module, or another name",
        f"An EnergyOptimizer attaches an algorithm; if forward is to read self.{name}, set it on the module before "
        "torch2ebm.convert.",
    )


def _of_module(view: ModuleView, value: Any) -> Any:
    """A method that was bound to the view gets the module as its ``self``."""
    if isinstance(value, MethodType) and value.__self__ is view:
        return MethodType(value.__func__, view.torch2ebm.module)
    return value


@contextmanager
def _change_followed(view: ModuleView, name: str | None = None) -> Iterator[nn.Module]:
    """Inside, an attribute of the module may be changed; the view then looks like the module again."""
    yield view.torch2ebm.module
    if name in (None, HELD) or hasattr(_plain_class(view), str(name)):
        _look_like_the_module(view)


# the class of a view


class _OfTheModule:
    """A name that the view's class would hide. Methods that return the module return the view."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, view: ModuleView | None, owner: type | None = None) -> Any:
        if view is None:
            return self
        module = view.torch2ebm.module
        found = getattr(module, self.name)
        if not isinstance(found, MethodType) or found.__self__ is not module:
            return found

        @functools.wraps(found)
        def method(*args: Any, **kwargs: Any) -> Any:
            with _change_followed(view) if self.name in _REGISTERING else nullcontext():
                result = found(*args, **kwargs)
            return view if result is module else result

        return method


def _look_like_the_module(view: ModuleView, told: bool = False) -> None:
    """Give the view a class of its own, with the module's arguments of forward, that hides no name of the module's."""
    module, base = view.torch2ebm.module, _plain_class(view)
    hidden = _hidden_by(base, module)
    known = {*vars(type(view))} if type(view) is not base else set()
    view.__class__ = type(
        base.__name__,
        (base,),
        {
            "forward": with_signature_of(module.forward, vars(base)["forward"]),
            **{name: _OfTheModule(name) for name in {*_ALWAYS_THE_MODULES, *hidden}},
            "__module__": base.__module__,
            "__doc__": base.__doc__,
        },
    )
    if not told:
        _tell_of_collisions(module, sorted((hidden & {*vars(base), HELD}) - known))


def _plain_class(view: ModuleView) -> type[ModuleView]:
    """Without what :func:`_look_like_the_module` has added."""
    return next(each for each in type(view).__mro__ if ModuleView in each.__bases__)


def _hidden_by(base: type[ModuleView], module: nn.Module) -> set[str]:
    """Names of the module's that ``base`` defines, or that Python would not look for on an object."""
    names = _names_of(module).union(name for name in vars(base) if _found_by_getattr(module, name))
    return {
        name
        for name in names - {*_NEVER_THE_MODULES}
        if name in (*_CONTAINERS, HELD) or (hasattr(base, name) and not name.startswith("__"))
    }


def _names_of(module: nn.Module) -> set[str]:
    """Those of the module and of its class that are not every module's."""
    classes = [each for each in type(module).__mro__ if each not in nn.Module.__mro__]
    own = (vars(module), module._parameters, module._buffers, module._modules, *map(vars, classes))
    return {name for each in own for name in each}


def _found_by_getattr(module: nn.Module, name: str) -> bool:
    """Whether a ``__getattr__`` of the module's own, which does not answer to every name, answers to this one."""
    if type(module).__getattr__ is nn.Module.__getattr__ or hasattr(nn.Module, name):
        return False
    return _has(module, name) and not _has(module, "no attribute has this name")


def _has(module: nn.Module, name: str) -> bool:
    try:
        return hasattr(module, name)
    except Exception:  # the user's code may raise anything
        return False


def _tell_of_collisions(module: nn.Module, names: Sequence[str]) -> None:
    said = [f"model.{name} is the module's; torch2ebm's is model.{HELD}.{name}" for name in names if name != HELD]
    if HELD in names:
        said.append(f"model.{HELD} is torch2ebm's; the module's is model.{HELD}.module.{HELD}")
    if said:
        warnings.warn(
            NameCollisionWarning(
                f"EnergyModel({type(module).__name__}): got attributes of the module that have the name of one of "
                f"torch2ebm's; expected other names. {'. '.join(said)}. Rename them, or filter this class out: "
                "warnings.filterwarnings('ignore', category=NameCollisionWarning)."
            ),
            stacklevel=users_level(),
        )
