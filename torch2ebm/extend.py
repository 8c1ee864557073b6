"""All that an algorithm, solver, energy, nudging or monitor of your own imports. ``docs/extending.md`` has one of each.

======================  ====================================================================================
You write               with
======================  ====================================================================================
an algorithm            :class:`Algorithm`. It is given a :class:`Call` and an :class:`OutputLoss`. It returns
                        :class:`LocalGradients`, with an :class:`InferenceState` and a :class:`Relaxation` inside.
... node by node        :class:`EnergyGraph` and :class:`Node` say what there is. A :class:`NodePass` is one evaluation,
                        :class:`GradientSum` adds up gradients. :func:`reverse_sweep` does so in one sweep, and returns
                        :class:`Swept`.
... by relaxation       :func:`relax` with a solver, and :class:`ValueInference` or :class:`ErrorInference`
... on another loss     :class:`NudgedLoss` is a multiple of one, :class:`LossExpansion` its second order
a solver                :class:`ValueSolver` or :class:`ErrorSolver`, the two kinds of :class:`Solver`; one with a
                        residual of its own returns a :class:`Rest`
an energy of a node     :class:`FunctionEnergy` of one function; or :class:`Energy`, with derivatives of your own
a nudging               :class:`Nudging`
an equilibrium's step   :class:`Update`. It is given an :class:`Equilibrium`, an :class:`Influence` and an
                        :class:`UpdateHistory`. It returns a :class:`Step`, as :func:`synchronous_step` does.
a linear solver         :class:`LinearSolver`. It is given a :class:`System`, and returns a :class:`Solution`.
a monitor               :class:`Monitor`; or :class:`StepMonitor`, which also sees the model around each step
======================  ====================================================================================

Settings are checked by :func:`check_positive`, :func:`check_steps`, :func:`check_tolerance` and :func:`check_choice`.
What cannot be done is raised: :class:`ConfigurationError` for an illegal setting, :class:`UnsupportedError` for a model
or a loss that has no meaning here, :class:`NonFiniteError` and :class:`DivergenceError` for numbers that went wrong.
:func:`call_and_loss` makes what an algorithm is given, so that you can try things out, and write tests.
"""

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.common.checks import check_choice, check_positive, check_steps, check_tolerance
from torch2ebm.engine.call import Call, NodePass
from torch2ebm.engine.energies import Energy
from torch2ebm.engine.gradients import GradientSum, Swept
from torch2ebm.engine.nudging import Nudging
from torch2ebm.engine.results import InferenceState, LocalGradients, Relaxation
from torch2ebm.engine.reverse_sweep import reverse_sweep
from torch2ebm.equilibrium.dynamics import Equilibrium, Influence
from torch2ebm.equilibrium.linear_solvers import LinearSolver, Solution, System
from torch2ebm.equilibrium.updates import Step, Update, UpdateHistory, synchronous_step
from torch2ebm.errors import ConfigurationError, DivergenceError, NonFiniteError, UnsupportedError
from torch2ebm.graph.energy_graph import EnergyGraph, Node
from torch2ebm.inference.error_inference import ErrorInference
from torch2ebm.inference.relaxation import relax
from torch2ebm.inference.solver import ErrorSolver, Rest, Solver, ValueSolver
from torch2ebm.inference.value_inference import ValueInference
from torch2ebm.loss.output_loss import LossExpansion, NudgedLoss, OutputLoss
from torch2ebm.model.trial import call_and_loss
from torch2ebm.monitor import Monitor, StepMonitor
from torch2ebm.potentials.function import FunctionEnergy

__all__ = [
    "Algorithm",
    "Call",
    "ConfigurationError",
    "DivergenceError",
    "Energy",
    "EnergyGraph",
    "Equilibrium",
    "ErrorInference",
    "ErrorSolver",
    "FunctionEnergy",
    "GradientSum",
    "InferenceState",
    "Influence",
    "LinearSolver",
    "LocalGradients",
    "LossExpansion",
    "Monitor",
    "Node",
    "NodePass",
    "NonFiniteError",
    "NudgedLoss",
    "Nudging",
    "OutputLoss",
    "Relaxation",
    "Rest",
    "Solution",
    "Solver",
    "Step",
    "StepMonitor",
    "Swept",
    "System",
    "UnsupportedError",
    "Update",
    "UpdateHistory",
    "ValueInference",
    "ValueSolver",
    "call_and_loss",
    "check_choice",
    "check_positive",
    "check_steps",
    "check_tolerance",
    "relax",
    "reverse_sweep",
    "synchronous_step",
]
