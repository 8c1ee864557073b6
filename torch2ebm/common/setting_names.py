"""Names of settings: those of other libraries and papers are answered with ours, misspelt ones with the nearest."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from torch2ebm.errors import UnknownSettingError

Made = TypeVar("Made", bound="NamedSettings")

_STEPS = ("steps", "terms", "max_steps", "free_steps")
# What Torch2PC (n, eta, ErrType), PCX (T), JPC (max_t1, dt) and papers (T, K, gamma) call it, to what it may be here.
OURS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("T", "n", "K", "num_steps", "n_steps", "inference_steps", "steps_per_batch", "t_max"), _STEPS),
        **dict.fromkeys(("n_iter", "n_iters", "num_iters", "iterations", "max_iter", "max_iters", "max_t1"), _STEPS),
        **dict.fromkeys(("T1", "free_iterations", "T_free"), ("free_steps", "steps")),
        **dict.fromkeys(("T2", "T_nudge", "nudge_steps"), ("nudged_steps", "clamped_steps", "steps")),
        **dict.fromkeys(("gamma", "eta", "dt", "step_size", "learning_rate", "epsilon"), ("lr", "alpha")),
        **dict.fromkeys(("inference_lr", "infer_lr", "x_lr", "lr_x", "h_lr", "lr_h", "value_lr"), ("lr",)),
        **dict.fromkeys(("tolerance", "atol", "threshold", "eps_converged"), ("tol",)),
        **dict.fromkeys(("precision", "sigma", "Sigma", "variance", "variances"), ("precisions", "energies")),
        **dict.fromkeys(("energy", "energy_fn"), ("energies",)),
        **dict.fromkeys(("reduction", "reduce"), ("loss_reduction",)),
        **dict.fromkeys(("beta", "nudge"), ("beta", "nudging")),
        **dict.fromkeys(("optimizer_x", "optim_h", "inference_optimizer"), ("solver",)),
    }
)
_OBJECTS: Mapping[str, str] = MappingProxyType(  # of the settings that are no numbers
    {
        "nudging": "OneSided({})",
        "solver": "GradientDescent(...)",
        "precisions": "{{'node': {}}}",
        "energies": "{{'node': Gaussian(...)}}",
    }
)
_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "ErrType": "each ErrType is a class: PredictiveCoding (Strict), FixedPrediction (FixedPred), ZeroDivergence "
        "(Exact)",
        "vinit": "values start at the feed-forward pass",
        **dict.fromkeys(("LossFun", "loss", "loss_fn", "criterion"), "the loss is the one of your loop"),
        **dict.fromkeys(("w_lr", "lr_w", "lr_p", "p_lr", "weight_lr", "param_lr"), "it is the lr of your optimizer"),
        **dict.fromkeys(("momentum",), "values with momentum relax by solver=Momentum(...)"),
        **dict.fromkeys(
            ("tolerance", "atol", "threshold", "tol"), "the solver has it: solver=GradientDescent(tol=...)"
        ),
        **dict.fromkeys(("model", "net", "optimizer"), "EnergyOptimizer takes it"),
    }
)


class NamedSettings:
    """A class whose settings are its arguments by name: an unknown one is told what there is.

    Raises:
        UnknownSettingError: for a name that is no setting.
    """

    def __new__(cls: type[Made], *args: Any, **kwargs: Any) -> Made:
        if not kwargs.keys() <= getattr(cls, "__dataclass_fields__", {}).keys():
            _check_names(cls, kwargs)
        return super().__new__(cls)


def _check_names(kind: type, given: Mapping[str, Any]) -> None:
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]  # type: ignore[misc]
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        return
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ours = [each.name for each in parameters if each.kind in named and not each.name.startswith("_")]
    unknown = [name for name in given if name not in ours]
    if unknown:
        raise UnknownSettingError(
            f"{kind.__name__}({', '.join(f'{name}=...' for name in unknown)})",
            " and ".join(f"{name}={_short(given[name])}" for name in unknown),
            ", ".join(ours) or "no settings",
            " ".join(_remedy(kind, name, given[name], ours) for name in unknown),
        )


def _remedy(kind: type, name: str, value: object, ours: list[str]) -> str:
    found = next((each for each in OURS.get(name, ()) if each in ours), "")
    if found:
        ours_of = _OBJECTS.get(found, "{}").format(_short(value))
        return f"What is {name} elsewhere is {found} here: {kind.__name__}({found}={ours_of})."
    if name in _ELSEWHERE:
        return f"{kind.__name__} has no {name}: {_ELSEWHERE[name]}."
    near = difflib.get_close_matches(name.lower(), ours, 1)
    return f"Write {near[0]}, and not {name}." if near else f"Leave {name} out."


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
