"""One algorithm a file: a call and its loss in, local gradients out.

May import all wings up to `solvers`, `equilibrium` and `implicit`.
"""

from torch2ebm.algorithms.backprop import Backprop
from torch2ebm.algorithms.base import Algorithm
from torch2ebm.algorithms.contrastive_hebbian import ContrastiveHebbian
from torch2ebm.algorithms.coupled_learning import CoupledLearning
from torch2ebm.algorithms.equilibrium_propagation import EquilibriumPropagation
from torch2ebm.algorithms.fixed_prediction import FixedPrediction
from torch2ebm.algorithms.implicit_sgd import ImplicitSGD
from torch2ebm.algorithms.incremental_predictive_coding import IncrementalPredictiveCoding
from torch2ebm.algorithms.predictive_coding import PredictiveCoding
from torch2ebm.algorithms.proximal import ProximalInferenceLearning
from torch2ebm.algorithms.recurrent_backprop import RecurrentBackprop
from torch2ebm.algorithms.zero_divergence import ZeroDivergence

__all__ = [
    "Algorithm",
    "Backprop",
    "ContrastiveHebbian",
    "CoupledLearning",
    "EquilibriumPropagation",
    "FixedPrediction",
    "ImplicitSGD",
    "IncrementalPredictiveCoding",
    "PredictiveCoding",
    "ProximalInferenceLearning",
    "RecurrentBackprop",
    "ZeroDivergence",
]
