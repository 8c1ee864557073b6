"""Closed forms that a relaxation has to end in: linear Gaussian networks under any pattern of clamped values.

May import the ground only: `torch2ebm.errors`.
"""

from torch2ebm.theory.linear_gaussian import LinearGaussian
from torch2ebm.theory.posterior import Posterior

__all__ = ["LinearGaussian", "Posterior"]
