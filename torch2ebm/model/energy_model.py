"""``convert`` and the model that people call: the module it came from, with an energy graph and an algorithm."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.analysis.energy_terms import EnergyTerms
from torch2ebm.analysis.hessian import Hessian
from torch2ebm.clamping.answering import start_of
from torch2ebm.clamping.asking import Question, nothing_is_empty
from torch2ebm.clamping.inferred import Inferred
from torch2ebm.engine.batch import GUESSED, BatchDim, BatchDimension
from torch2ebm.engine.energies import Energy
from torch2ebm.engine.precision import Precision
from torch2ebm.engine.results import InferenceState
from torch2ebm.errors import ConfigurationError
from torch2ebm.graph.energy_graph import EnergyGraph, Node
from torch2ebm.graph.granularity import Granularity
from torch2ebm.inference.curvature import Curvature
from torch2ebm.inference.relaxation import OnStep
from torch2ebm.inference.solver import Solver
from torch2ebm.model.arguments import as_arguments
from torch2ebm.model.conversion import Conversion
from torch2ebm.model.module_view import ModuleView
from torch2ebm.reports.picture import GraphPicture


def convert(
    module: nn.Module, nodes: Granularity = "auto", example_inputs: Any = None, batch_dim: BatchDim = None
) -> EnergyModel:
    """Make an energy model of ``module``: same parameters, same outputs, value nodes inside.

    Args:
        module: Any module whose forward can be traced. It is left as it is and shares everything with the result.
        nodes: What becomes a value node. ``"auto"``: what the attached algorithm asks for, ``"layer"`` until one is;
            ``"layer"``: a parameterised operation with the activations that follow; ``"preactivation"``: cut before
            the activations; ``"activation"``: cut before and after them; ``"module"``: every leaf module; ``"op"``:
            every operation; ``"children"``: each top-level child, as Torch2PC; or a list of submodule names that
            each become one node.
        example_inputs: A tuple is positional, a dict is keywords, a tensor is one positional. Without it the graph
            is cut and verified at the first call.
        batch_dim: Which dimension counts samples: a number for the first input, or ``{"x": 0}`` for the argument ``x``.
            Without it, it is found on ``example_inputs`` by a second run with fewer samples; without these, it is
            dimension 0 of the first input, which is a guess.

    Raises:
        UntraceableError: if forward cannot be turned into a graph, with place and remedy.
        UnknownNodeError: if a name in ``nodes`` is no submodule's.
        PartitionError: if a name in ``nodes`` computes nothing that depends on a parameter.
        CaptureMismatchError: if the graph does not compute what the module computes.

    Warns:
        UncalledNodeWarning: if a submodule in ``nodes`` was not called, as in a branch that data decides.
        NameCollisionWarning: if the module has attributes of its own that are called as those of
            :class:`EnergyModel`: ``model.state`` is then the module's, ``model.torch2ebm.state`` torch2ebm's.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net, example_inputs=torch.randn(2, 4))
        >>> list(model.nodes)
        ['0', '2']
    """
    if not isinstance(module, nn.Module) or isinstance(module, EnergyModel):
        raise ConfigurationError(
            "torch2ebm.convert(module)",
            type(module).__name__,
            "a torch.nn.Module that is not converted yet",
            "Pass the network itself.",
        )
    return EnergyModel(module, nodes, example_inputs, batch_dim)


class EnergyModel(ModuleView):
    """A module with value nodes. Made by :func:`convert`; called, moved, saved and switched as the module it came from.

    Without an algorithm, ``loss.backward()`` is ordinary backpropagation. With one (see :class:`EnergyOptimizer`) and
    gradients enabled, the algorithm runs in training and evaluation mode alike. Under ``torch.no_grad`` the original
    module runs.

    Everything else is the module's. You read, write and delete attributes, parameters, buffers and submodules on the
    model as on the module: ``model.tau = 0.5`` is what forward reads.

    The names below are the exception, unless the module that you convert has an attribute of the same name.
    ``model.state`` is then the module's, and :func:`convert` warns. ``model.torch2ebm`` has all of torch2ebm's names in
    any case, for example ``model.torch2ebm.state``; ``model.torch2ebm.module`` is the module itself.

    A hook around the call (``model.register_forward_hook``) belongs to the model. It runs once each time you call the
    model, and gets the model. Hooks that you register on the module or its layers run as in the module itself, and
    what they compute is part of the graph.

    A forward that you write on the model (``model.forward = f``) takes the place of the module's forward. One that
    calls the ``model.forward`` that it replaces stays around the model, as a wrapper for mixed precision does.

    Example:
        >>> import torch, torch2ebm
        >>> class Tempered(torch.nn.Linear):
        ...     tau = 1.0
        ...     def forward(self, x):
        ...         return super().forward(x) / self.tau
        >>> model = torch2ebm.convert(Tempered(4, 3))
        >>> model.tau = 0.5
        >>> model.torch2ebm.module.tau
        0.5
    """

    accepts_loss_kwargs = False  # the Hugging Face Trainer then passes no num_items_in_batch

    def __init__(
        self, module: nn.Module, nodes: Granularity = "auto", example_inputs: Any = None, batch_dim: BatchDim = None
    ) -> None:
        told = GUESSED if batch_dim is None else BatchDimension.told(batch_dim)
        super().__init__(Conversion(module, nodes, batch=told))
        if example_inputs is not None:
            args, kwargs = as_arguments(example_inputs)
            output = self.torch2ebm.capture(args, kwargs)
            if batch_dim is None:
                self.torch2ebm.find_batch(args, kwargs, output)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        answer = self.torch2ebm.answer
        if torch.compiler.is_dynamo_compiling():  # it would trace the capture and the tape, to no gain
            return torch.compiler.disable(answer)(args, kwargs)  # type: ignore[no-untyped-call]
        return answer(args, kwargs)

    def feedforward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain module's output, whatever algorithm is attached, with ordinary autograd."""
        return self.torch2ebm.feedforward(*args, **kwargs)

    # what people look at

    @property
    def graph(self) -> EnergyGraph:
        """The energy graph of the last call. Raises :class:`NotCapturedError` before any input was seen."""
        return self.torch2ebm.graph

    @property
    def nodes(self) -> Mapping[str, Node]:
        """Name to :class:`Node`, parents before children."""
        return self.torch2ebm.nodes

    @property
    def captured_by(self) -> str:
        """How the graph of the last call was captured: ``"run"``, by a run of the module.

        Raises :class:`NotCapturedError` before any input was seen.
        """
        return self.torch2ebm.captured_by

    @property
    def algorithm(self) -> Algorithm | None:
        """The attached algorithm, or None: ordinary backpropagation."""
        return self.torch2ebm.algorithm

    @property
    def state(self) -> InferenceState:
        """Values, predictions, errors and energies of the last backward; released at the next forward.

        Raises :class:`NoStateError` before the first backward.
        """
        return self.torch2ebm.state

    def summary(self) -> str:
        """A table of the nodes: name, level, function, shape of the value, parameters."""
        return self.torch2ebm.summary()

    def draw(self, path: str | os.PathLike[str] | None = None, *, depth: int | None = None) -> GraphPicture:
        """The picture of the graph: a box a node, with the shape of its value, batch included.

        Graphviz draws it, where its program ``dot`` is installed: modules are frames around their nodes. Otherwise
        matplotlib does (``pip install torch2ebm[plot]``), one row a level.

        Args:
            path: File to write, in the format of its suffix: ``.svg``, ``.png``, ``.pdf``, or any that ``dot`` has.
                ``.dot`` is the text that Graphviz reads. None writes no file.
            depth: Modules deeper than this are one box each: 1 shows the module's own children, 2 what is in them.
                None shows every node.

        Returns:
            The picture, which a notebook shows. ``picture.dot`` is the text for Graphviz, and needs no package.

        Raises:
            NotCapturedError: before any input was seen.
            ConfigurationError: for a suffix that is no format, an illegal depth, or with a path where neither Graphviz
                nor matplotlib is installed.

        Example:
            >>> import torch, torch2ebm
            >>> encoder = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
            >>> net = torch.nn.Sequential(encoder, torch.nn.Linear(3, 2))
            >>> model = torch2ebm.convert(net, example_inputs=torch.randn(5, 4))
            >>> model.draw(), model.draw(depth=1)
            (GraphPicture(Sequential: 3 nodes, 3 boxes), GraphPicture(Sequential: 3 nodes, 2 boxes))
        """
        return self.torch2ebm.draw(path, depth=depth)

    def curvature(
        self,
        loss_fn: Callable[..., Tensor],
        batch: Any,
        *,
        precisions: Mapping[str, float | Tensor | Precision] | None = None,
        energies: Mapping[str, Energy] | None = None,
        loss_reduction: str = "mean",
        products: int = 100,
        tol: float = 1e-8,
    ) -> Curvature:
        """How curved the loss is in the errors of one batch: the largest eigenvalue, sigma squared.

        Around the feed-forward pass the Hessian of the energy in the errors is Pi + beta J^T H J. Pi holds the
        precisions, J is the derivative of the outputs in the errors, H the Hessian of the loss, summed over samples, in
        the outputs. The curvature is the largest eigenvalue of Pi^-1/2 J^T H J Pi^-1/2. It is found by Lanczos on
        products that end at each node, and nothing is differentiated twice but the loss. Weights, buffers, ``.grad``
        and generators are left as they were.

        Args:
            loss_fn: ``loss_fn(output, target)``, or ``loss_fn(output)`` where ``batch`` is a dict.
            batch: ``(inputs, target)``, inputs being a tensor, a tuple of positional or a dict of keyword arguments;
                or a dict of keyword arguments.
            precisions: Node name to precision, a number or a tensor that broadcasts against the value; 1 elsewhere.
            energies: Node name to energy; one that is not Gaussian counts by its ``precision_at_rest()``, a full matrix
                by its diagonal.
            loss_reduction: ``"mean"`` for a loss that is a mean over the batch, ``"sum"`` to take it as it is written.
            products: Most products with the matrix. Five are within a few percent as a rule.
            tol: Stop once the eigenvalue is known to so much of itself.

        Returns:
            The curvature, with the smallest eigenvalue, that of each sample, and what the measurement cost.

        Raises:
            ConfigurationError: for a batch of another form, a name that no node has, an illegal number.
            LossNotRecordedError: for a loss that cannot be evaluated again; wrap it in ``EnergyLoss``.
            NonFiniteError: where a product is not finite.

        Example:
            >>> import torch, torch2ebm
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)).double()
            >>> batch = torch.randn(5, 4).double(), torch.randn(5, 3).double()
            >>> curvature = torch2ebm.convert(net).curvature(torch.nn.functional.mse_loss, batch)
            >>> largest = torch.linalg.norm(net[1].weight.detach(), 2)  # one error, with the last weights as J
            >>> abs(float(curvature) - 2 / 3 * float(largest) ** 2) < 1e-6  # the loss is a mean over 3 features
            True
        """
        return self.torch2ebm.curvature(
            loss_fn,
            batch,
            precisions=precisions,
            energies=energies,
            loss_reduction=loss_reduction,
            products=products,
            tol=tol,
        )

    def infer(
        self,
        *inputs: Any,
        clamp: Mapping[str, Any] | None = None,
        mask: Mapping[str, Tensor] | None = None,
        free: Sequence[str] = (),
        start: Mapping[str, Any] | str | None = None,
        prior: Mapping[str, Any] | None = None,
        solver: Solver[Any] | None = None,
        tol: float | None = None,
        precisions: Mapping[str, float | Tensor | Precision] | None = None,
        energies: Mapping[str, Energy] | None = None,
        compile: bool = False,
        on_step: OnStep | None = None,
        **keywords: Any,
    ) -> Inferred:
        """Find the values of some nodes, inputs or outputs, with others given. No weight moves.

        The energy has no direction: any value may be given, or found. The values that are free come to rest where the
        sum of all energies, phi(value, prediction) of each node, is smallest. For example::

            model.infer(x)                                               # the plain output
            model.infer(x, clamp={"output": y})                          # hidden values, as in training
            model.infer(clamp={"output": image}, free=["input"], prior={"input": torch2ebm.Gaussian()})   # a latent
            model.infer(clamp={"output": image}, mask={"output": seen}, free=["input"], ...)              # completion

        Names are those of nodes, ``"input"`` and ``"output"``. Where there are several inputs they have the names of
        the arguments. Where there are several outputs they have their keys, or ``"output_0"`` and so on.

        Args:
            *inputs: What the module is called with. A free input may be missing; one that is given begins there.
            clamp: Name to what is given: a tensor in the shape of the value, or without its batch dimension, or a
                number. The name of another node ties two values: both predictions then pull on one.
            mask: Name to a bool tensor in the shape of the value, True where it is given. All else of it is free.
            free: Names of inputs that are found. Nodes and outputs are free unless they are clamped.
            start: Name to where a value begins; elsewhere it is the feed-forward pass. ``"last"``: values begin where
                those of the last ``infer`` have ended, or those of the last backward, as suits a sequence's next frame.
                ``"average"``: at their mean over all samples that were inferred so. Where there is none, or a shape is
                another, it is the feed-forward pass; :meth:`forget` begins anew.
            prior: Name of a free input to its energy, around zero, or to a pair of an energy and a mean. An input
                without a prior costs nothing by itself.
            solver: How values relax; ``ErrorConjugateGradient(tol, steps=200)``, which needs no step size.
            tol: Where a sample is at rest, in the solver's measure. It is 0.001 where no solver is given.
            precisions: Name of a node to its precision; 1 elsewhere.
            energies: Name of a node to its energy; Gaussian elsewhere. That of a clamped node is paid for the data.
            compile: Record a step once as a list of ATen calls and run that from then on; the step that repeats goes to
                ``torch.compile``. It pays off from the second call with the same shapes on.
            on_step: Called with an :class:`InferenceStep` after every step, for example
                ``torch2ebm.monitor.Progress()``. It has the values and errors of the nodes of which nothing is given;
                all other energies are its ``loss``.
            **keywords: Keyword arguments of the module.

        Returns:
            Values, predictions, errors and energies of all nodes, and how the relaxation went. Module, buffers,
            ``.grad`` and generators are as before.

        Raises:
            ConfigurationError: for clamps that contradict each other, a shape or a mask that does not fit, nothing
                free, a free input of integers, or one that nothing decides; before anything moves.
            NonFiniteError: for given values that are not finite.
            DivergenceError: where the relaxation runs away.

        Warns:
            NotSettledWarning: where the steps were too few.

        Example:
            >>> import torch, torch2ebm
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
            >>> model = torch2ebm.convert(net)
            >>> x, label = torch.randn(5, 4), torch.eye(3)[[0, 1, 2, 0, 1]]
            >>> found = model.infer(x, clamp={"output": label})
            >>> found.value["0"].shape, bool(found.relaxation.energy[-1] < found.relaxation.energy[0])
            (torch.Size([5, 8]), True)
        """
        begin, kept = start_of(start or {})
        return self.torch2ebm.infer(
            inputs,
            keywords,
            question=Question(*map(nothing_is_empty, (clamp, mask, free, begin))),
            prior=nothing_is_empty(prior),
            start=kept,
            compile=compile,
            on_step=on_step,
            solver=solver,
            tol=tol,
            precisions=precisions or {},
            energies=energies or {},
        )

    def energy(
        self,
        values: Mapping[str, Any],
        *inputs: Any,
        loss_fn: Callable[..., Tensor] | None = None,
        target: Any = None,
        beta: float = 1.0,
        precisions: Mapping[str, float | Tensor | Precision] | None = None,
        energies: Mapping[str, Energy] | None = None,
        parameters: bool = False,
    ) -> EnergyTerms:
        """The energy F at values that you give, as a function that autograd differentiates.

        A node without a given value has its prediction for one, and costs nothing. The loss acts on the output, which
        is the prediction of the last node. Where you give a value for an output node, this node has an energy, too, and
        the loss acts on the value. The module runs once, and it, its buffers, ``.grad`` and all generators are left as
        they were.

        Args:
            values: Node name to value, in the shape of ``model.state.value``: a tensor ``[batch, ...]``, or a tuple
                for a node of several slots. Gradients reach them, and inputs that require a gradient.
            inputs: What you call the model with; a single dict has keyword arguments.
            loss_fn: ``loss_fn(output, target)``, or ``loss_fn(output)`` without a target. It returns the loss of each
                sample, shape ``[batch]``, or one number that is a mean or a sum over samples.
            target: For the loss.
            beta: Factor of the loss.
            precisions: Node name to precision, a number or a tensor that broadcasts against the value; 1 elsewhere.
            energies: Node name to energy; Gaussian elsewhere.
            parameters: Whether gradients reach the parameters, too.

        Returns:
            Frozen, with ``total`` of shape ``[batch]``, ``nodes`` by name, and ``loss``.

        Raises:
            UnknownNameError: for a name that no node has.
            ConfigurationError: for a value of another shape, or a loss that joins samples.
            BatchDimensionError: for a value without a leading batch dimension.

        Example:
            An optimizer of torch's own moves the values.

            >>> import torch, torch2ebm
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
            >>> model, x, y = torch2ebm.convert(net), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
            >>> loss_fn = torch.nn.functional.cross_entropy
            >>> hidden = model.energy({}, x).value["0"].detach().requires_grad_()
            >>> optimizer = torch.optim.Adam([hidden], lr=0.01)
            >>> for step in range(3):
            ...     terms = model.energy({"0": hidden}, x, loss_fn=loss_fn, target=y)
            ...     optimizer.zero_grad()
            ...     terms.total.sum().backward()
            ...     optimizer.step()
            >>> terms.total.shape, net[0].weight.grad is None
            (torch.Size([5]), True)
        """
        return self.torch2ebm.energy(
            values,
            *inputs,
            loss_fn=loss_fn,
            target=target,
            beta=beta,
            precisions=precisions,
            energies=energies,
            parameters=parameters,
        )

    def hessian(
        self,
        loss_fn: Callable[..., Tensor],
        batch: Any,
        *,
        at: Mapping[str, Any] | str | None = None,
        coordinates: str = "values",
        beta: float = 1.0,
        precisions: Mapping[str, float | Tensor | Precision] | None = None,
        energies: Mapping[str, Energy] | None = None,
        loss_reduction: str = "mean",
        solver: Solver[Any] | None = None,
        products: int = 300,
        tol: float = 1e-9,
    ) -> Hessian:
        """The second derivative of the energy F, summed over samples, in values or errors: products and eigenvalues.

        It is exact: second derivatives of all nodes count. Weights, buffers, ``.grad`` and generators are left as they
        were, and the result stays as it is when weights move.

        Args:
            loss_fn: ``loss_fn(output, target)``, or ``loss_fn(output)`` where ``batch`` is a dict.
            batch: ``(inputs, target)``, inputs being a tensor, a tuple of positional or a dict of keyword arguments;
                or a dict of keyword arguments.
            at: Node name to the value at which it is taken; a missing one has its prediction, which is the feed-forward
                pass without ``at``. ``"equilibrium"``: where F is smallest.
            coordinates: ``"values"``, which solvers as ``GradientDescent`` move, or ``"errors"``, which solvers as
                ``ErrorDescent`` move: later values then follow.
            beta: Factor of the loss.
            precisions: Node name to precision, a number or a tensor that broadcasts against the value; 1 elsewhere.
            energies: Node name to energy; Gaussian elsewhere.
            loss_reduction: ``"mean"`` for a loss that is a mean over the batch, ``"sum"`` to take it as it is written.
            solver: What finds the equilibrium; without one ``ErrorConjugateGradient``, to nearly full precision.
            products: Most products that Lanczos makes; none are needed beyond the entries of a sample.
            tol: Lanczos stops once an eigenvalue is known to so much of itself.

        Returns:
            Frozen, with ``product``, ``matrix``, ``spectrum``, ``largest``, ``smallest`` and ``condition_number``.

        Raises:
            ConfigurationError: for a batch of another form, a name that no node has, an illegal setting.
            LossNotRecordedError: for a loss that is not one number.
            NonFiniteError: where a product is not finite.

        Warns:
            NotSettledWarning: where the solver has not come to rest.

        Example:
            >>> import torch, torch2ebm
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)).double()
            >>> batch = torch.randn(5, 4).double(), torch.randn(5, 3).double()
            >>> half = lambda output, target: 0.5 * (output - target).square().sum()
            >>> hessian = torch2ebm.convert(net).hessian(half, batch, loss_reduction="sum")
            >>> largest = torch.linalg.norm(net[1].weight.detach(), 2)  # 1 + W^T W
            >>> abs(hessian.largest - 1 - float(largest) ** 2) < 1e-9
            True
        """
        return self.torch2ebm.hessian(
            loss_fn,
            batch,
            at=at,
            coordinates=coordinates,
            beta=beta,
            precisions=precisions,
            energies=energies,
            loss_reduction=loss_reduction,
            solver=solver,
            products=products,
            tol=tol,
        )

    def forget(self) -> None:
        """A new sequence begins: the next batch starts at the feed-forward pass.

        It drops the values that ``PredictiveCoding(start="last")``, ``start="average"`` and ``model.infer`` keep from
        batch to batch. Weights, algorithm and optimizer are as before.

        Example:
            >>> import torch, torch2ebm
            >>> model, x = torch2ebm.convert(torch.nn.Linear(4, 3)), torch.randn(5, 4)
            >>> found = model.infer(free=["input"], clamp={"output": torch.ones(5, 3)}, start={"input": x})
            >>> model.forget()
        """
        self.torch2ebm.forget()

    # attaching

    @property
    def attached(self) -> bool:
        """Whether whoever attached the algorithm is still there."""
        return self.torch2ebm.attached

    def attach(self, algorithm: Algorithm, optimizer: object | None = None) -> None:
        """Called by :class:`EnergyOptimizer`. The algorithm stays when the optimizer goes, until another is attached.

        Raises :class:`AttachmentError` if one is attached whose optimizer is still there.
        """
        self.torch2ebm.attach(algorithm, optimizer)

    def detach(self) -> None:
        """End the attachment: the model is ordinary backpropagation again."""
        self.torch2ebm.detach()

    def extra_repr(self) -> str:
        return f"{type(self.torch2ebm.module).__name__}, algorithm={self.torch2ebm.algorithm!r}"
