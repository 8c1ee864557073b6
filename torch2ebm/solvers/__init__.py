"""How values relax: one solver a file, each with `start` and `step`.

May import all wings up to `inference`.
"""

from torch2ebm.inference.solver import Solver
from torch2ebm.solvers.adam_descent import AdamDescent
from torch2ebm.solvers.anderson_error_descent import AndersonErrorDescent
from torch2ebm.solvers.error_conjugate_gradient import ErrorConjugateGradient
from torch2ebm.solvers.error_descent import ErrorDescent
from torch2ebm.solvers.gradient_descent import GradientDescent
from torch2ebm.solvers.langevin import Langevin
from torch2ebm.solvers.local_error_descent import LocalErrorDescent
from torch2ebm.solvers.momentum import Momentum
from torch2ebm.solvers.ode_flow import ODEFlow
from torch2ebm.solvers.sequential_descent import SequentialDescent

__all__ = [
    "AdamDescent",
    "AndersonErrorDescent",
    "ErrorConjugateGradient",
    "ErrorDescent",
    "GradientDescent",
    "Langevin",
    "LocalErrorDescent",
    "Momentum",
    "ODEFlow",
    "SequentialDescent",
    "Solver",
]
