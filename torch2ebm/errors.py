"""Everything torch2ebm refuses, one class each. Every message says where, what was got, what was expected, what to do.

Three families say at once what kind of refusal it is: :class:`UnsupportedError` (cannot be supported),
:class:`ConfigurationError` (a choice or a use that is not legal) and :class:`NumericalError` (the numbers went wrong).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Torch2EBMError(Exception):
    """Base of all errors of torch2ebm."""

    def __init__(self, where: str, got: str, expected: str, remedy: str) -> None:
        super().__init__(where, got, expected, remedy)
        self.where, self.got, self.expected, self.remedy = where, got, expected, remedy

    def __str__(self) -> str:
        return f"{self.where}: got {self.got}; expected {self.expected}. {self.remedy}"


class UnsupportedError(Torch2EBMError):
    """What was asked for has no meaning here, or cannot be done."""


class ConfigurationError(Torch2EBMError, ValueError):
    """An argument, or a combination of arguments, that is not legal."""


class NumericalError(Torch2EBMError, ArithmeticError):
    """The numbers of a step went wrong; weights, buffers and optimizer state are as before it."""


# Capture and partition ------------------------------------------------------------------------------------------------


class UntraceableError(UnsupportedError):
    """The module's forward cannot be turned into a graph."""


class CaptureMismatchError(UnsupportedError):
    """The captured graph does not compute what the module computes."""


class UnknownNodeError(ConfigurationError):
    """A name in ``nodes=[...]`` is no submodule of the model."""


class PartitionError(ConfigurationError):
    """The model cannot be cut in value nodes as asked for."""


class DenseLayerError(UnsupportedError):
    """A node is not one dense layer with parameters of its own, which the algorithm's theory asks for."""


class NotCapturedError(ConfigurationError, AttributeError):
    """The graph was asked for before any example input was seen."""


class NoEquilibriumError(UnsupportedError):
    """The module has a part for which there is no energy whose equilibrium a relaxation would find."""


class ModuleChangedError(ConfigurationError):
    """Layers or parameters of the module were replaced after ``convert``."""


class ChangingForwardWarning(UserWarning):
    """Forward runs other operations in nearly every call, and each sequence of operations is captured anew."""


class OpaqueModuleWarning(UserWarning):
    """A module cannot be looked into, and is one node: inside of it gradients are backpropagation's."""


class PlainBackwardWarning(UserWarning):
    """A loop trains without an algorithm: it does not call the model, or no optimizer was attached to it."""


class WrappedStepWarning(UserWarning):
    """The step of the wrapped optimizer itself was called, and not the one of the EnergyOptimizer around it."""


class LoneNodeWarning(UserWarning):
    """One node has every parameter of the module, so nothing can relax."""


class KeptValueWarning(UserWarning):
    """A tensor from inside of a node is kept by a hook or an attribute, so the node is cut there."""


class UncalledNodeWarning(UserWarning):
    """A submodule that ``nodes`` names was called in no run so far, or on data alone."""


class NameCollisionWarning(UserWarning):
    """The module has attributes of its own that are called as some of torch2ebm's."""


# The training loop ----------------------------------------------------------------------------------------------------


class UnknownSettingError(ConfigurationError, TypeError):
    """An argument that an algorithm, a solver, a nudging, an energy or an update does not have."""


class AttachmentError(ConfigurationError):
    """An optimizer and a model that do not belong together, or a second attachment beside the first."""


class EnergyGradientError(ConfigurationError):
    """The gradients that an energy of your own returns are not those of its value."""


class UnsynchronisedError(ConfigurationError):
    """A forward whose gradients the wrapper of this model cannot synchronise among processes."""


class ShardingError(UnsupportedError):
    """A sharded module whose parameters cannot be gathered, or their gradients scattered, as they would have to be."""


class UnsynchronisedWarning(UserWarning):
    """A forward with gradients among several processes, and no wrapper that would synchronise them."""


class CheckpointError(ConfigurationError):
    """A checkpoint of another model or of another algorithm, or one with an entry that cannot be what was saved."""


class CheckpointWarning(UserWarning):
    """A checkpoint of the same algorithm with other settings; those that are attached stay."""


class UnknownNameError(ConfigurationError, KeyError):
    """A state or a graph was asked for a node that it does not have."""


class NodeEvaluationError(ConfigurationError, RuntimeError):
    """A node's function failed on what it was given, by a wrong shape, dtype or device as a rule."""


class LossNotRecordedError(ConfigurationError):
    """No loss was seen that can be evaluated again while the prediction moves."""


class LossReplayError(LossNotRecordedError):
    """The loss on the tape does not have the gradient that autograd delivered."""


class LossIndependentError(ConfigurationError):
    """The loss does not depend on the model's output."""


class LossReductionError(ConfigurationError):
    """A summed loss meets an algorithm that takes the loss for a mean over the batch."""


class LossCurvatureError(UnsupportedError):
    """The loss is more curved in the prediction than the algorithm's step at the output allows."""


class HigherOrderGradientError(UnsupportedError):
    """``create_graph=True``: local gradients are not differentiable."""


class ChangedSinceForwardError(ConfigurationError, RuntimeError):
    """An input, a parameter or a mode is another than when the model was called."""


class GraphFreedError(ConfigurationError, RuntimeError):
    """A second backward through a call that the first one has released."""


class InputGradientError(UnsupportedError):
    """The inputs require a gradient that the attached algorithm does not have."""


# Results and numbers --------------------------------------------------------------------------------------------------


class NoStateError(ConfigurationError, AttributeError):
    """The state was asked for before the first backward, or after the next forward."""


class BatchDimensionError(UnsupportedError):
    """Something per sample was asked of values that have no leading batch dimension."""


class NonFiniteError(NumericalError):
    """NaN or infinity, with the node, the phase and the count of bad elements."""


class OutOfMemoryError(Torch2EBMError, torch.OutOfMemoryError):
    """No memory for a forward or a backward; weights, buffers and optimizer state are as before it."""

    def __init__(self, where: str, got: str, expected: str, remedy: str) -> None:
        super().__init__(where, got, expected, remedy)
        self.args = (str(self),)  # where batch size finders look for the words

    def __reduce__(self) -> tuple[type[OutOfMemoryError], tuple[str, ...]]:
        return type(self), (self.where, self.got, self.expected, self.remedy)


class DivergenceError(NumericalError):
    """The relaxation ran away; ``energy`` is the curve until then."""

    def __init__(self, where: str, got: str, expected: str, remedy: str, energy: Sequence[float] = ()) -> None:
        super().__init__(where, got, expected, remedy)
        self.energy = tuple(energy)


class LostMinimumError(DivergenceError):
    """A negative nudge is so large that the minimum it was to move is gone."""


class NotSettledError(NumericalError):
    """The values still move so much that an estimate of the gradient would show that, and not the loss."""


class NotSettledWarning(UserWarning):
    """The values still move, or cycle, where an equilibrium was expected."""


class NotAMinimumWarning(UserWarning):
    """An equilibrium, or where errors rest, is a saddle of the energy: plain descent would leave it."""


class DivergenceWarning(UserWarning):
    """A relaxation ran away and its batch gives no gradient, as ``on_divergence="warn"`` asked for."""


class CurvatureWarning(UserWarning):
    """A loss that is not convex in the errors, or has no curvature there; the message says what the nudge is then."""


class StepSizeWarning(UserWarning):
    """A step size with which the energy rises, or a stable one that is too small to get anywhere.

    The message says the largest one that does not raise it, or what to take instead.
    """


class NoSignalWarning(UserWarning):
    """Some nodes learn nothing: no error has reached them, or only rounding, or their gradients are exactly zero."""


class CompilationWarning(UserWarning):
    """``compile=True`` could not be followed; the same inference runs without, and the message says why."""


def first_line(error: BaseException) -> str:
    """Of what an error says, the first line that is no heading: a compiler's own names only the backend that failed."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line and not line.endswith(":")), type(error).__name__).rstrip(".")
