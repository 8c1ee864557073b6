"""How values relax: one solver a file."""

from torch2ebm.solvers.base import Solver
from torch2ebm.solvers.gradient_descent import GradientDescent

__all__ = ["GradientDescent", "Solver"]
