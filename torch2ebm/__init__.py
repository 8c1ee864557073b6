"""torch2ebm: train the PyTorch model that you have by energy-based local learning, in the loop that you have."""

from torch2ebm import errors, torch2pc
from torch2ebm.agreement import Agreement
from torch2ebm.algorithms import Algorithm, Backprop, FixedPrediction, PredictiveCoding, ZeroDivergence
from torch2ebm.compare import GradientComparison, compare
from torch2ebm.energies import Categorical, Energy, Gaussian
from torch2ebm.errors import Torch2EBMError
from torch2ebm.graph import EnergyGraph, Node
from torch2ebm.idx import load_mnist, read_idx
from torch2ebm.model import EnergyModel, convert
from torch2ebm.nudging import OneSided, Symmetric
from torch2ebm.optimizer import EnergyOptimizer
from torch2ebm.recorder import EnergyLoss
from torch2ebm.solvers import (
    Adam,
    Anderson,
    ErrorDescent,
    GradientDescent,
    LocalErrorDescent,
    Momentum,
    SequentialDescent,
    Solver,
)
from torch2ebm.state import InferenceState, Relaxation

__all__ = [
    "Adam",
    "Agreement",
    "Algorithm",
    "Anderson",
    "Backprop",
    "Categorical",
    "Energy",
    "EnergyGraph",
    "EnergyLoss",
    "EnergyModel",
    "EnergyOptimizer",
    "ErrorDescent",
    "FixedPrediction",
    "Gaussian",
    "GradientComparison",
    "GradientDescent",
    "InferenceState",
    "LocalErrorDescent",
    "Momentum",
    "Node",
    "OneSided",
    "PredictiveCoding",
    "Relaxation",
    "SequentialDescent",
    "Solver",
    "Symmetric",
    "Torch2EBMError",
    "ZeroDivergence",
    "compare",
    "convert",
    "errors",
    "load_mnist",
    "read_idx",
    "torch2pc",
]
