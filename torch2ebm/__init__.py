"""torch2ebm: train the PyTorch model that you have by energy-based local learning, in the loop that you have."""

from typing import TYPE_CHECKING

from torch2ebm import errors, extend, theory, torch2pc
from torch2ebm.algorithms import (
    Algorithm,
    Backprop,
    ContrastiveHebbian,
    CoupledLearning,
    EquilibriumPropagation,
    FixedPrediction,
    ImplicitSGD,
    IncrementalPredictiveCoding,
    PredictiveCoding,
    ProximalInferenceLearning,
    RecurrentBackprop,
    ZeroDivergence,
)
from torch2ebm.analysis.energy_terms import EnergyTerms
from torch2ebm.analysis.hessian import Hessian
from torch2ebm.check import CheckReport, check
from torch2ebm.clamping.inferred import Inferred
from torch2ebm.common.moved import old_name, serve_old_paths
from torch2ebm.compare import GradientComparison, compare
from torch2ebm.diagnose import Diagnosis, diagnose
from torch2ebm.engine.energies import Categorical, Energy, Gaussian
from torch2ebm.engine.nudging import Holomorphic, OneSided, RandomSign, Relative, Symmetric
from torch2ebm.engine.precision import Precision
from torch2ebm.engine.results import InferenceState, Relaxation
from torch2ebm.equilibrium.linear_solvers import ConjugateGradient, FixedPointSolve, Neumann
from torch2ebm.equilibrium.updates import AndersonMixing, GaussSeidel
from torch2ebm.errors import Torch2EBMError
from torch2ebm.graph.energy_graph import EnergyGraph, Node
from torch2ebm.inference.curvature import Curvature
from torch2ebm.inference.relaxation import InferenceStep
from torch2ebm.loss.energy_loss import EnergyLoss
from torch2ebm.mnist import load_mnist, read_idx
from torch2ebm.model.energy_model import EnergyModel, convert
from torch2ebm.mq import MQ
from torch2ebm.optimizer import EnergyOptimizer
from torch2ebm.potentials.discrete import Bernoulli, Poisson
from torch2ebm.potentials.function import FunctionEnergy
from torch2ebm.potentials.robust import Huber, Laplace, StudentT, VonMises
from torch2ebm.report import Report, report
from torch2ebm.reports.agreement import Agreement
from torch2ebm.reports.findings import Finding
from torch2ebm.solvers import (
    AdamDescent,
    AndersonErrorDescent,
    ErrorConjugateGradient,
    ErrorDescent,
    GradientDescent,
    Langevin,
    LocalErrorDescent,
    Momentum,
    ODEFlow,
    SequentialDescent,
    Solver,
)

__all__ = [
    "MQ",
    "AdamDescent",
    "Agreement",
    "Algorithm",
    "AndersonErrorDescent",
    "AndersonMixing",
    "Backprop",
    "Bernoulli",
    "Categorical",
    "CheckReport",
    "ConjugateGradient",
    "ContrastiveHebbian",
    "CoupledLearning",
    "Curvature",
    "Diagnosis",
    "Energy",
    "EnergyGraph",
    "EnergyLoss",
    "EnergyModel",
    "EnergyOptimizer",
    "EnergyTerms",
    "EquilibriumPropagation",
    "ErrorConjugateGradient",
    "ErrorDescent",
    "Finding",
    "FixedPointSolve",
    "FixedPrediction",
    "FunctionEnergy",
    "GaussSeidel",
    "Gaussian",
    "GradientComparison",
    "GradientDescent",
    "Hessian",
    "Holomorphic",
    "Huber",
    "ImplicitSGD",
    "IncrementalPredictiveCoding",
    "InferenceState",
    "InferenceStep",
    "Inferred",
    "Langevin",
    "Laplace",
    "LocalErrorDescent",
    "Momentum",
    "Neumann",
    "Node",
    "ODEFlow",
    "OneSided",
    "Poisson",
    "Precision",
    "PredictiveCoding",
    "ProximalInferenceLearning",
    "RandomSign",
    "RecurrentBackprop",
    "Relative",
    "Relaxation",
    "Report",
    "SequentialDescent",
    "Solver",
    "StudentT",
    "Symmetric",
    "Torch2EBMError",
    "VonMises",
    "ZeroDivergence",
    "check",
    "compare",
    "convert",
    "diagnose",
    "errors",
    "extend",
    "load_mnist",
    "read_idx",
    "report",
    "theory",
    "torch2pc",
]

__version__: str  # read from setup.cfg, or from what the installation has noted, when it is asked for


def __dir__() -> list[str]:
    """The public names, and nothing of how the package is built."""
    return [*__all__, *(name for name in globals() if name.startswith("__")), "__version__"]


if not TYPE_CHECKING:  # a type checker would take it to have every name

    def __getattr__(name):
        if name == "__version__":
            from torch2ebm.common.version import version

            return version()
        return old_name(name)


serve_old_paths()
