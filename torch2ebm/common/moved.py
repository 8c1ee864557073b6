"""The paths of version 0.1, for one version: who imports or unpickles by one gets what it names, and a warning.

``import torch2ebm`` calls :func:`serve_old_paths`, at the cost of an entry in ``sys.meta_path``: old modules are made
when they are asked for. Type checkers do not see the old paths.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

PACKAGE: Final = "torch2ebm"
PUBLIC: Final = (PACKAGE, f"{PACKAGE}.extend")  # where a warning sends people, if what they want is there
GONE_IN: Final = "0.3"

# Old module to the modules that have its names now, both without the package's name. Those of the second part still
# stand, and only some of their names have moved.
MOVED: Final[dict[str, tuple[str, ...]]] = {
    "activations": ("graph.activations",),
    "affine": ("implicit.dense_layers",),
    "agreement": ("reports.agreement",),
    "algorithms.divergence": ("inference.divergence",),
    "algorithms.node_energies": ("potentials.node_energies",),
    "arguments": ("model.arguments",),
    "assembly": ("graph.build",),
    "backward": ("model.backward", "model.open_forwards"),
    "call_sites": ("graph.named_nodes",),
    "captures": ("model.capture_cache",),
    "curvature": ("implicit.curvature",),
    "distributed": ("model.replicas",),
    "drawing": ("reports.drawing",),
    "draws": ("isolation.random_numbers",),
    "energies": ("engine.energies",),
    "error_inference": ("inference.error_inference",),
    "exclusive": ("isolation.torch_modes",),
    "exported": ("capture.recording",),
    "exported_writes": ("capture.in_place",),
    "extras": ("reports.figures",),
    "fingerprint": ("capture.fingerprint",),
    "finite": ("engine.finite",),
    "free_phase": ("equilibrium.free_phase", "equilibrium.settling", "equilibrium.settling_checks"),
    "freezing": ("isolation.module_state", "isolation.batch_statistics", "isolation.random_numbers"),
    "functional_graph": ("capture.in_place",),
    "fused": ("programs.cache", "programs.surroundings", "inference.runs"),
    "holomorphic": ("equilibrium.holomorphic",),
    "hopfield": ("equilibrium.hopfield", "equilibrium.refusals", "graph.activations"),
    "idx": ("mnist",),
    "interrupts": ("isolation.interrupts",),
    "linearised": ("equilibrium.linearised",),
    "memory": ("isolation.out_of_memory",),
    "modes": ("isolation.torch_modes",),
    "nudging": ("engine.nudging",),
    "observing": ("capture.observation",),
    "output_loss": ("loss.output_loss",),
    "partition": ("graph.partition", "graph.granularity", "graph.roles"),
    "plots": ("reports.plots",),
    "problems": ("common.users_code",),
    "proximal_objective": ("implicit.objective",),
    "recorded_loss": ("loss.replayed_loss",),
    "recorded_sweep": ("common.moved", "engine.gradients"),
    "recorded_update": ("equilibrium.updates",),
    "recorder": ("loss.energy_loss", "loss.tape", "loss.taped_tensor"),
    "references": ("capture.running", "isolation.module_state"),
    "settling": ("equilibrium.settling",),
    "sharding": ("model.shards",),
    "signature": ("model.arguments",),
    "solvers.adam": ("solvers.adam_descent",),
    "solvers.anderson": ("solvers.anderson_error_descent",),
    "solvers.base": ("inference.solver", "inference.relaxation", "common.checks"),
    "solvers.linear": ("equilibrium.linear_solvers",),
    "solvers.newton": ("implicit.newton",),
    "solvers.rows": ("common.rows",),
    "state": ("engine.call", "engine.results"),
    "structure": ("common.nested",),
    "summary": ("reports.tables",),
    "tracing": ("capture.watch", "capture.recording"),
    "updates": ("equilibrium.updates",),
    "value_inference": ("inference.value_inference",),
    "verification": ("model.verification",),
    # modules that stand
    "algorithms.base": ("common.checks",),
    "equilibrium": ("equilibrium.dynamics",),
    "graph": ("graph.energy_graph",),
    "inference": ("inference.base", "engine.gradients"),
    "model": ("model.energy_model",),
    "programs": ("programs.program", "programs.record", "programs.compiler"),
    "solvers": ("equilibrium.linear_solvers", "solvers"),
}
RENAMED: Final = {
    "Adam": "AdamDescent",
    "Anderson": "AndersonErrorDescent",
}


class RecordedSweep:
    """What pickles of algorithms of 0.1 hold of a sweep that was compiled. Nothing reads it."""


def serve_old_paths() -> None:
    """Make modules that are gone importable, and let those that stand answer for the names that have left them."""
    if not any(isinstance(finder, OldModules) for finder in sys.meta_path):
        sys.meta_path.append(OldModules())  # last: it is asked only for what is nowhere else
    for old in MOVED:
        standing = sys.modules.get(f"{PACKAGE}.{old}")
        if standing is not None:
            vars(standing)["__getattr__"] = partial(_moved, old)


def old_name(name: str) -> Any:
    """What ``torch2ebm.<name>`` was in 0.1: a module, or something that has another name now."""
    if name in MOVED:
        return import_module(f"{PACKAGE}.{name}")
    renamed = vars(sys.modules[PACKAGE]).get(RENAMED.get(name, ""))
    if renamed is None:
        raise AttributeError(f"module '{PACKAGE}' has no attribute '{name}'")
    _warn(f"{PACKAGE}.{name} is now {PACKAGE}.{RENAMED[name]}.", stacklevel=4)
    return renamed


class OldModules(MetaPathFinder, Loader):
    """Makes the modules that are gone, empty: each answers for its names when they are asked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == PACKAGE and old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.partition(".")[2]
        vars(module)["__getattr__"] = partial(_moved, old)
        places = ", ".join(f"{PACKAGE}.{new}" for new in MOVED[old])
        _warn(f"{module.__name__} is gone. What it had is now in {places}.", stacklevel=3)


def _moved(old: str, name: str) -> Any:
    """The ``__getattr__`` of an old module."""
    if f"{old}.{name}" in MOVED:
        return import_module(f"{PACKAGE}.{old}.{name}")
    known_as = RENAMED.get(name, name)
    places = () if name.startswith("_") else MOVED[old]  # Python asks any module for __path__, __file__, __wrapped__
    for new in places:
        module = import_module(f"{PACKAGE}.{new}")
        if known_as in vars(module):
            found = vars(module)[known_as]
            _warn(f"{PACKAGE}.{old}.{name} is now {_home(found, known_as, module)}.{known_as}.", stacklevel=3)
            return found
    raise AttributeError(f"module '{PACKAGE}.{old}' has no attribute '{name}'")


def _home(found: object, name: str, module: ModuleType) -> str:
    """Where to import it from: a public place if there is one, else where it is defined; a constant does not say."""
    for place in PUBLIC:
        if place in sys.modules and vars(sys.modules[place]).get(name) is found:
            return place
    defined = str(getattr(found, "__module__", ""))
    return defined if defined.startswith(PACKAGE) else module.__name__


def _warn(what: str, stacklevel: int) -> None:
    then = f"Version {GONE_IN} will not know the old path: until then, save pickles that hold it again."
    warnings.warn(f"{what} {then}", DeprecationWarning, stacklevel=stacklevel)
