"""torch2ebm: train the PyTorch model that you have by energy-based local learning, in the loop that you have."""

from torch2ebm import errors, torch2pc
from torch2ebm.agreement import Agreement
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
from torch2ebm.compare import GradientComparison, compare
from torch2ebm.energies import Categorical, Energy, Gaussian
from torch2ebm.errors import Torch2EBMError
from torch2ebm.graph import EnergyGraph, Node
from torch2ebm.idx import load_mnist, read_idx
from torch2ebm.model import EnergyModel, convert
from torch2ebm.mq import MQ
from torch2ebm.nudging import Holomorphic, OneSided, RandomSign, Symmetric
from torch2ebm.optimizer import EnergyOptimizer
from torch2ebm.recorder import EnergyLoss
from torch2ebm.solvers import (
    Adam,
    Anderson,
    ConjugateGradient,
    ErrorDescent,
    FixedPointSolve,
    GradientDescent,
    LocalErrorDescent,
    Momentum,
    Neumann,
    SequentialDescent,
    Solver,
)
from torch2ebm.state import InferenceState, Relaxation
from torch2ebm.updates import AndersonMixing, GaussSeidel

__all__ = [
    "MQ",
    "Adam",
    "Agreement",
    "Algorithm",
    "Anderson",
    "AndersonMixing",
    "Backprop",
    "Categorical",
    "ConjugateGradient",
    "ContrastiveHebbian",
    "CoupledLearning",
    "Energy",
    "EnergyGraph",
    "EnergyLoss",
    "EnergyModel",
    "EnergyOptimizer",
    "EquilibriumPropagation",
    "ErrorDescent",
    "FixedPointSolve",
    "FixedPrediction",
    "GaussSeidel",
    "Gaussian",
    "GradientComparison",
    "GradientDescent",
    "Holomorphic",
    "ImplicitSGD",
    "IncrementalPredictiveCoding",
    "InferenceState",
    "LocalErrorDescent",
    "Momentum",
    "Neumann",
    "Node",
    "OneSided",
    "PredictiveCoding",
    "ProximalInferenceLearning",
    "RandomSign",
    "RecurrentBackprop",
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
