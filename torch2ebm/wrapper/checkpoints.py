"""What an optimizer's checkpoint says of whom it was saved for, and what may be loaded."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.common.users_code import users_level
from torch2ebm.errors import CheckpointError, CheckpointWarning, first_line
from torch2ebm.memory.last_values import is_state

OWN_KEY: Final = "torch2ebm"  # in a state_dict; the bare optimizer does not look at it
VALUES: Final = "values"  # under OWN_KEY: where the next batch begins
_WHERE: Final = "EnergyOptimizer.load_state_dict"
_ALL_THE_SAME: Final = f"Attach what it was saved with, or remove its entry '{OWN_KEY}' to load it all the same."
_OF_ANOTHER_SHAPE: Final = ("LBFGS", "Adafactor")  # torch's optimizers whose state is not shaped as the parameter


def identity(algorithm: Algorithm, module: nn.Module, parameters: Sequence[str]) -> dict[str, Any]:
    """For whom a checkpoint is saved: text alone, which ``torch.load(weights_only=True)`` loads."""
    return {
        "algorithm": type(algorithm).__name__,
        "settings": _settings(algorithm),
        "model": type(module).__name__,
        "parameters": list(parameters),
    }


def _settings(algorithm: Algorithm) -> dict[str, str]:
    if not dataclasses.is_dataclass(algorithm):
        return {}
    shown = [
        field.name
        for field in dataclasses.fields(algorithm)
        if field.init and field.compare and not field.name.startswith("_")
    ]
    return {name: repr(getattr(algorithm, name)) for name in shown}


def check_identity(saved: object, own: Mapping[str, Any]) -> None:
    """Compare whom a checkpoint was saved for with whom it is loaded for.

    Raises:
        CheckpointError: for another algorithm, other parameters, or an entry that is none of this class's.

    Warns:
        CheckpointWarning: for other settings of the same algorithm.
    """
    if saved is None:
        return  # of the bare optimizer, or taken out
    entry = _well_formed(saved)
    if any(entry[part] != own[part] for part in ("algorithm", "parameters")):
        pairs = itertools.zip_longest(entry["parameters"], own["parameters"], fillvalue="nothing")
        got, expected = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
        raise CheckpointError(
            _WHERE,
            f"a checkpoint of {entry['algorithm']} on {entry['model']}" + (f" with parameter {got}" if got else ""),
            f"one of {own['algorithm']} on {own['model']}" + (f", whose parameter there is {expected}" if got else ""),
            _ALL_THE_SAME,
        )
    _tell_of_settings(entry.get("settings", {}), own)


def _well_formed(saved: object) -> Mapping[str, Any]:
    if isinstance(saved, Mapping):
        names, settings = saved.get("parameters"), saved.get("settings", {})
        if isinstance(names, (list, tuple)) and isinstance(settings, Mapping):
            texts = (saved.get("algorithm"), saved.get("model"), *names, *settings.keys(), *settings.values())
            if all(isinstance(text, str) for text in texts) and is_state(saved.get(VALUES, {})):
                return {**saved, "parameters": list(names)}
    raise CheckpointError(
        _WHERE,
        f"an entry '{OWN_KEY}' that is {_short(saved)}",
        "algorithm and model as text, parameters as a list of text, settings as a dictionary of text, values as "
        "dictionaries of tensors",
        f"Load what state_dict() has returned, or remove its entry '{OWN_KEY}'.",
    )


def _tell_of_settings(saved: Mapping[str, str], own: Mapping[str, Any]) -> None:
    now = own["settings"]
    changed = [f"{name}={saved[name]} (now {now[name]})" for name in now if name in saved and saved[name] != now[name]]
    if changed:
        warnings.warn(
            CheckpointWarning(
                f"{_WHERE}: got a checkpoint of {own['algorithm']} with {', '.join(changed)}; expected the settings "
                "that are attached. They stay as they are now: attach the algorithm with the saved ones if training "
                "is to go on as before."
            ),
            stacklevel=users_level(),
        )


def no_dictionary(state_dict: object) -> CheckpointError:
    """The error for what is no checkpoint at all."""
    return CheckpointError(
        _WHERE, f"a {type(state_dict).__name__}", "a dictionary", "Load what state_dict() has returned."
    )


def load_wholly(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load it into the wrapped optimizer, or leave that as it is.

    Raises:
        CheckpointError: for an entry that the optimizer cannot take, or could not make a step with.
    """
    # loading makes new ones of both; state_dict() itself may be more than this process has (ZeroRedundancyOptimizer)
    before = {name: value for name, value in vars(optimizer).items() if name in ("param_groups", "state")}
    groups = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(dict(state_dict))
        problem = _problem(optimizer, groups)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        vars(optimizer).update(before)
        raise _malformed(optimizer, f"one that it cannot load ({type(error).__name__}: {first_line(error)})") from error
    if problem:
        vars(optimizer).update(before)
        raise _malformed(optimizer, problem)


def _malformed(optimizer: Optimizer, got: str) -> CheckpointError:
    return CheckpointError(
        _WHERE,
        got,
        f"a state_dict of {type(optimizer).__name__} with as many groups and parameters",
        "Load what state_dict() of such an optimizer has returned; nothing was changed.",
    )


def _problem(optimizer: Optimizer, before: Sequence[Mapping[str, Any]]) -> str:
    """What the next step would fail on, or take for something else; nothing where all is well."""
    settings = getattr(optimizer, "defaults", {})
    for number, (group, old) in enumerate(zip(optimizer.param_groups, before, strict=False)):
        for name in (name for name in old if name in settings):
            if name not in group:
                return f"a group {number} without {name}"
            if not _alike(group[name], old[name]):
                return f"a group {number} with {name}={_short(group[name])} in the place of {_short(old[name])}"
    torchs = type(optimizer).__module__.startswith("torch.optim")
    for parameter, entries in list(optimizer.state.items()):
        if torchs and not isinstance(parameter, Tensor):
            return f"a state of {_short(parameter)}, which is no parameter"
        if not isinstance(entries, Mapping):
            return f"a state that is {_short(entries)}"
        for name, value in entries.items() if torchs and type(optimizer).__name__ not in _OF_ANOTHER_SHAPE else ():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                return f"{name} of shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}"
    return ""


def _alike(value: object, old: object) -> bool:
    """Whether a setting is of the kind that it was before: a flag, a number, or so many of them."""
    if isinstance(old, bool):
        return value is None or isinstance(value, bool)
    if isinstance(old, (int, float, Tensor)):
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            return False
        return not isinstance(value, (int, float)) or math.isfinite(value) or value == old
    if isinstance(old, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(value) == len(old) and all(map(_alike, value, old))
    return True


def _short(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
