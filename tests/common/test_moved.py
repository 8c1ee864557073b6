"""The paths of version 0.1: each still gives what it named, and says where that is now."""

import importlib
import re
import sys
import warnings
from typing import Any

import pytest

import torch2ebm
from torch2ebm.common import moved

MODULES_OF_0_1 = """
activations affine agreement algorithms algorithms.backprop algorithms.base algorithms.clamped
algorithms.contrastive_hebbian algorithms.coupled_learning algorithms.divergence algorithms.equilibrium_propagation
algorithms.fixed_prediction algorithms.implicit_sgd algorithms.incremental_predictive_coding algorithms.node_energies
algorithms.predictive_coding algorithms.proximal algorithms.recurrent_backprop algorithms.zero_divergence arguments
assembly backward call_sites captures cli compare curvature demo distributed drawing draws energies equilibrium
error_inference errors exclusive exported exported_writes extras fingerprint finite free_phase freezing functional_graph
fused graph holomorphic hopfield idx inference interrupts linearised memory model modes mq nudging observing optimizer
output_loss partition plots problems programs proximal_objective recorded_loss recorded_sweep recorded_update recorder
references settling sharding signature solvers solvers.adam solvers.anderson solvers.base solvers.error_descent
solvers.gradient_descent solvers.linear solvers.local_error_descent solvers.momentum solvers.newton solvers.rows
solvers.sequential_descent state structure summary torch2pc tracing updates value_inference verification
"""
MODULES = re.findall(r"\S+", MODULES_OF_0_1)
NAMES = {
    "agreement": ("Agreement", "agreement"),
    "algorithms.base": ("check_choice", "check_reduction"),
    "algorithms.divergence": ("check_on_divergence", "no_gradients"),
    "algorithms.node_energies": ("check_names", "node_energies"),
    "energies": ("Categorical", "Energy", "Gaussian"),
    "equilibrium": ("Equilibrium",),
    "error_inference": ("ErrorInference",),
    "extras": ("MARKERS", "PALETTE", "new_figure", "save"),
    "graph": ("EnergyGraph", "Node"),
    "hopfield": ("HopfieldGraph",),
    "idx": ("load_mnist", "read_idx"),
    "inference": ("GradientSum", "Inference"),
    "model": ("EnergyModel", "convert"),
    "nudging": ("Holomorphic", "Nudging", "OneSided", "RandomSign", "Symmetric", "check_beta"),
    "output_loss": ("LossExpansion", "NudgedLoss", "OutputLoss"),
    "recorder": ("EnergyLoss",),
    "solvers": ("Adam", "Anderson", "ConjugateGradient", "FixedPointSolve", "LinearSolver", "Neumann"),
    "solvers.adam": ("Adam",),
    "solvers.anderson": ("Anderson",),
    "solvers.base": (
        *("ErrorSolver", "Solver", "ValueSolver", "relax"),
        *("check_positive", "check_steps", "check_tolerance"),
    ),
    "solvers.linear": ("ConjugateGradient", "FixedPointSolve", "LinearSolver", "Neumann"),
    "state": ("Call", "InferenceState", "LocalGradients", "NodePass", "Relaxation"),
    "updates": ("AndersonMixing", "GaussSeidel", "Update"),
    "value_inference": ("ValueInference",),
}  # public names, and what the documentation of 0.1 imports from elsewhere


def resolved(path: str) -> Any:
    """What a dotted path names, and without a warning."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def is_gone(old: str) -> bool:
    """Whether no file is this module now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return not hasattr(importlib.import_module(f"torch2ebm.{old}"), "__file__")


def test_most_of_the_modules_of_0_1_are_gone() -> None:
    gone = set(filter(is_gone, MODULES))
    assert {"value_inference", "state", "solvers.base", "recorder"} <= gone
    assert not gone & {"algorithms.base", "compare", "equilibrium", "graph", "inference", "model", "programs"}
    assert gone <= moved.MOVED.keys() <= set(MODULES)


@pytest.mark.parametrize("old", MODULES)
def test_every_module_of_0_1_is_imported_and_says_so_if_it_is_gone(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, gone = f"torch2ebm.{old}", is_gone(old)
    if gone:
        monkeypatch.delitem(sys.modules, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(path)
    assert module.__name__ == path
    assert [warning.category for warning in caught] == [DeprecationWarning] * gone
    if gone:
        places = re.search(r"What it had is now in ([\w., ]+)\. Version", str(caught[0].message))
        assert places and all(importlib.import_module(place).__file__ for place in places[1].split(", "))


@pytest.mark.parametrize(("old", "name"), [(old, name) for old, names in NAMES.items() for name in names])
def test_a_name_of_0_1_is_the_object_at_the_place_that_the_warning_says(old: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module(f"torch2ebm.{old}")
    with pytest.warns(DeprecationWarning, match=re.escape(f"torch2ebm.{old}.{name} is now torch2ebm.")) as caught:
        found = getattr(module, name)
    said = re.search(r"is now (torch2ebm[\w.]+)\. ", str(caught[0].message))
    assert said and resolved(said[1]) is found
    assert caught[0].filename == __file__  # the line that uses the old path
    public = moved.RENAMED.get(name, name)
    assert said[1] == f"torch2ebm.{public}" or public not in torch2ebm.__all__


def test_an_import_statement_is_warned_of_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch2ebm.value_inference", raising=False)
    with pytest.warns(DeprecationWarning, match="torch2ebm.value_inference") as caught:
        from torch2ebm.value_inference import ValueInference
    assert ValueInference is resolved("torch2ebm.inference.value_inference.ValueInference")
    assert {warning.filename for warning in caught} == {__file__}


def test_old_modules_are_attributes_too() -> None:
    with pytest.warns(DeprecationWarning, match="torch2ebm.solvers.base.ValueSolver is now"):
        assert torch2ebm.solvers.base.ValueSolver is resolved("torch2ebm.inference.solver.ValueSolver")
    with pytest.warns(DeprecationWarning, match="torch2ebm.state.Call is now"):
        assert torch2ebm.state.Call is resolved("torch2ebm.engine.call.Call")


@pytest.mark.parametrize("old", ["state", "model", "solvers.base"])
def test_what_was_in_no_module_is_an_attribute_error(old: str) -> None:
    is_gone(old)
    module = sys.modules[f"torch2ebm.{old}"]
    with pytest.raises(AttributeError, match=f"module 'torch2ebm.{old}' has no attribute 'Cal'"):
        module.Cal  # noqa: B018
    assert not hasattr(module, "__wrapped__")  # what inspect and doctest ask any module for: no warning
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"torch2ebm.{old}.nothing")


@pytest.mark.parametrize("old", ["Adam", "Anderson"])
def test_an_old_name_of_a_solver_is_the_solver_and_is_not_shown(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"torch2ebm.{old} is now torch2ebm.{moved.RENAMED[old]}") as caught:
        found = getattr(torch2ebm, old)
    assert found is getattr(torch2ebm, moved.RENAMED[old])
    assert old not in dir(torch2ebm) and old not in torch2ebm.__all__
    assert caught[0].filename == __file__


def test_serving_twice_is_serving_once() -> None:
    moved.serve_old_paths()
    assert sum(isinstance(finder, moved.OldModules) for finder in sys.meta_path) == 1
