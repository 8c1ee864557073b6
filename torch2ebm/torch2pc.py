"""Torch2PC's own call, for people who come from it: the same arguments, results, sign and staleness (Rosenbaum 2022).

Everything here keeps Torch2PC's conventions, which are not those of the rest of the package (Rosenbaum 2022):
``epsilon`` is prediction minus belief, so plus dL/dvhat for ``"Exact"``; it is that of before the last update of the
beliefs; the loss enters the energy as it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.capture.run import Run
from torch2ebm.engine.call import Call, NodePass
from torch2ebm.engine.gradients import GradientSum
from torch2ebm.errors import ConfigurationError, NonFiniteError
from torch2ebm.graph.energy_graph import EnergyGraph, Node, OutputReference
from torch2ebm.isolation.module_state import BufferSnapshot
from torch2ebm.isolation.random_numbers import RandomState

ERROR_TYPES = ("Strict", "FixedPred", "Exact")
INPUT = "X"

LossFunction = Callable[[Tensor, Any], Tensor]
Entries = list[Tensor | None]


def PCInfer(
    model: nn.Sequential,
    LossFun: LossFunction,
    X: Tensor,
    Y: Any,
    ErrType: str,
    eta: float = 0.1,
    n: int = 20,
    vinit: Sequence[Tensor | None] | None = None,
) -> tuple[list[Tensor], Tensor, Tensor, Entries, Entries]:
    """Predictive coding on one batch as Torch2PC does it; every child of ``model`` is one layer.

    Sets ``.grad`` of the parameters, whatever it was before. Batch statistics, dropout masks and running statistics
    are those of the one feed-forward pass, however many steps follow.

    Args:
        model: L layers, each from one tensor to one tensor.
        LossFun: From the output and ``Y`` to one number; taken as it is written, mean or sum.
        X: The inputs.
        Y: Whatever ``LossFun`` takes.
        ErrType: ``"Strict"``: predictions are computed again as the beliefs move; ``"FixedPred"``: predictions stay
            those of the feed-forward pass; ``"Exact"``: backpropagation.
        eta: Step size of the beliefs. ``"Exact"`` does not look at it.
        n: Number of steps. ``"Exact"`` does not look at it.
        vinit: Initial beliefs, as long as the returned ``v``; only ``"Strict"`` looks at it. Entry 0 may be None,
            since inputs are clamped. None starts at the feed-forward pass.

    Returns:
        ``(vhat, Loss, dLdy, v, epsilon)``, all detached. ``vhat``, the feed-forward activations, ``v``, the beliefs,
        and ``epsilon``, the errors, have L + 1 entries, that of the inputs first: it is None in ``epsilon`` unless
        ``ErrType`` is ``"FixedPred"``, and None in ``v`` if it is ``"Exact"``. ``dLdy`` is the gradient of ``Loss``
        in ``vhat[-1]``.

    Raises:
        ConfigurationError: for a model that is no plain ``nn.Sequential``, an unknown ``ErrType``, an illegal
            ``eta``, ``n`` or ``vinit``, or a loss that is not one number that depends on the output.
        NodeEvaluationError: if a layer fails on what it is given.
        NonFiniteError: if a gradient is NaN or infinite. ``.grad`` and buffers are as before after any error.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch2ebm.torch2pc import PCInfer
        >>> net = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3))
        >>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> vhat, Loss, dLdy, v, epsilon = PCInfer(net, nn.CrossEntropyLoss(), x, y, "Strict", eta=0.1, n=20)
        >>> [tuple(belief.shape) for belief in v]
        [(5, 4), (5, 8), (5, 3)]
    """
    _check_arguments(model, X, ErrType, eta, n)
    X = X.detach().requires_grad_(ErrType == "FixedPred" and X.is_floating_point())  # its belief moves there
    run = Run(constants=[X], external_leaves={0: X} if X.requires_grad else {})
    call = Call(_graph(model), run, X.device, X.shape[0] if X.ndim else 1)
    with torch.enable_grad(), _restored_on_error(model, call.device):
        call.feedforward(keep_graph=ErrType != "Strict")
        chain = _Chain(call, X, lambda prediction: LossFun(prediction, Y))
        Loss, dLdy = chain.loss(chain.vhat[-1])
        with BufferSnapshot(dict(model.named_buffers())).preserved():
            if ErrType == "Exact":
                v, epsilon = _exact(chain, dLdy)
            elif ErrType == "FixedPred":
                v, epsilon = _fixed_prediction(chain, dLdy, eta, n)
            else:
                v, epsilon = _strict(chain, _initial_beliefs(vinit, chain.vhat), eta, n)
        _check_finite(chain.gradients.parameters)
    for name, gradient in chain.gradients.parameters.items():
        call.graph.parameters[name].grad = gradient.clone()  # autograd may have handed out an entry of epsilon itself
    return chain.vhat, Loss, dLdy, v, epsilon


# The three kinds of errors --------------------------------------------------------------------------------------------


def _exact(chain: _Chain, dLdy: Tensor) -> tuple[Entries, Entries]:
    epsilon = [*chain.vhat[:-1], dLdy]
    for layer in chain.layers_from_output():
        message = chain.collect(layer, chain.feedforward_pass(layer), epsilon[layer])
        if layer > 1:
            epsilon[layer - 1] = message
    v = [value - error for value, error in zip(chain.vhat, epsilon, strict=True)]
    return [None, *v[1:]], [None, *epsilon[1:]]


def _fixed_prediction(chain: _Chain, dLdy: Tensor, eta: float, n: int) -> tuple[Entries, Entries]:
    v, epsilon = _copies(chain.vhat), [*chain.vhat[:-1], dLdy]
    lowest = 0 if chain.vhat[0].is_floating_point() else 1
    for _ in range(n):
        for below in reversed(range(lowest, chain.length)):
            epsilon[below] = chain.vhat[below] - v[below]
            # epsilon above is of this step, but of before v above moved: the update is synchronous
            message = chain.message(chain.feedforward_pass(below + 1), epsilon[below + 1], retain_graph=True)
            v[below] = v[below] + eta * (epsilon[below] - message)
    for layer in chain.layers_from_output():
        chain.collect(layer, chain.feedforward_pass(layer), epsilon[layer])
    return [*v], [*([None] * lowest), *epsilon[lowest:]]


def _strict(chain: _Chain, v: list[Tensor], eta: float, n: int) -> tuple[Entries, Entries]:
    epsilon = list(v)
    first = chain.evaluate(1, v)  # reads the clamped inputs: its prediction never changes
    for _ in range(n):
        message = torch.empty(())
        for layer in chain.layers_from_output():
            evaluated = chain.evaluate(layer, v) if layer > 1 else first
            prediction = evaluated.predictions[0].detach()
            if layer == chain.length:
                epsilon[layer] = chain.loss(prediction)[1]
            else:
                epsilon[layer] = prediction - v[layer]
                v[layer] = v[layer] + eta * (epsilon[layer] - message)
            if layer > 1:
                message = chain.message(evaluated, epsilon[layer])
    for layer in chain.layers_from_output():  # at the final beliefs, with the errors of before the last update
        chain.collect(layer, chain.evaluate(layer, v) if layer > 1 else first, epsilon[layer])
    return [*v], [None, *epsilon[1:]]


def _initial_beliefs(vinit: Sequence[Tensor | None] | None, vhat: Sequence[Tensor]) -> list[Tensor]:
    if vinit is None:
        return _copies(vhat)
    expected = [tuple(value.shape) for value in vhat]
    got = [tuple(belief.shape) if isinstance(belief, Tensor) else None for belief in vinit]
    if got[:1] == [None]:
        got[0] = expected[0]
    if got != expected:
        raise ConfigurationError(
            "PCInfer(vinit=...)",
            f"{len(got)} entries of shapes {got}",
            f"{len(expected)} of shapes {expected}",
            "Start from a copy of vhat, or of v, as PCInfer returns it.",
        )
    beliefs = [belief.detach() for belief in vinit[1:] if belief is not None]
    return _copies([vhat[0], *(belief.to(value) for belief, value in zip(beliefs, vhat[1:], strict=True))])


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


# The model as a chain -------------------------------------------------------------------------------------------------


class _Chain:
    """One call of a chain of L layers: layer l, from 1 to L, leads from entry l - 1 of ``vhat`` to entry l."""

    def __init__(self, call: Call, X: Tensor, loss_function: Callable[[Tensor], Tensor]) -> None:
        self.call, self.loss_function = call, loss_function
        self.nodes = call.graph.order
        self.length = len(self.nodes)
        self.vhat = [X.detach(), *(call.values[node.name].detach() for node in self.nodes)]
        self.gradients = GradientSum()

    def layers_from_output(self) -> range:
        return range(self.length, 0, -1)

    def feedforward_pass(self, layer: int) -> NodePass:
        return self.call.passes[self.nodes[layer - 1].name]

    def evaluate(self, layer: int, v: Sequence[Tensor]) -> NodePass:
        inputs = [v[layer - 1].detach().requires_grad_()] if layer > 1 else []
        return self.call.evaluate(self.nodes[layer - 1], inputs)

    def message(self, evaluated: NodePass, error: Tensor, retain_graph: bool = False) -> Tensor:
        """J^T error, shape of what the layer reads."""
        read = evaluated.inputs or tuple(self.call.clamped_inputs(evaluated.node).values())
        (message,) = evaluated.pullback([error], read, retain_graph)
        return torch.zeros_like(read[0]) if message is None else message

    def collect(self, layer: int, evaluated: NodePass, error: Tensor) -> Tensor:
        """Add (dmu/dtheta)^T error to the gradients; returns J^T error, zero for the first layer."""
        products = self.gradients.add(self.call, evaluated, [error], evaluated.inputs)
        message = products[0] if products else None
        return torch.zeros_like(self.vhat[layer - 1]) if message is None else message

    def loss(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """The loss as it is written, and its gradient in the prediction."""
        leaf = prediction.detach().requires_grad_()
        loss = self.loss_function(leaf)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigurationError(
                "PCInfer(LossFun=...)",
                f"a loss that is {got}",
                "one number that depends on the output",
                "Reduce it over the batch, for example nn.CrossEntropyLoss(), without detach().",
            )
        (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)
        return loss.detach(), gradient


def _graph(model: nn.Sequential) -> EnergyGraph:
    """One node a child, without tracing: there is nothing to find out about a chain."""
    parameter_names = {id(parameter): name for name, parameter in model.named_parameters()}
    nodes: list[Node] = []
    for name, child in zip(model._modules, model, strict=True):
        reads = (nodes[-1].name,) if nodes else ()
        nodes.append(
            Node(
                name,
                (),
                (),
                partial(_run, child),
                {parameter_names[id(p)]: p for p in child.parameters()},
                0,
                slots=(name,),
                reads=reads,
                constants=() if reads else (INPUT,),
                random=True,
                batch_statistics=True,
                description=type(child).__name__,
            )
        )
    outputs = (OutputReference(slot=nodes[-1].name),)
    return EnergyGraph(model, nodes, lambda run: {INPUT: run.constants[0]}, outputs, constants=(INPUT,))


def _run(layer: nn.Module, value: Tensor) -> Tensor:
    result = layer(value.clone())  # a layer may write its input in place
    if not isinstance(result, Tensor) or not result.is_floating_point():
        got = result.dtype if isinstance(result, Tensor) else type(result).__name__
        raise TypeError(f"a layer returns one floating point tensor, and this one {got}")
    return result


# Refusals -------------------------------------------------------------------------------------------------------------


def _check_arguments(model: nn.Sequential, X: Tensor, ErrType: str, eta: float, n: int) -> None:
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward or not len(model):
        raise ConfigurationError(
            "PCInfer(model)",
            type(model).__name__,
            "an nn.Sequential with layers and its own forward",
            "For any other model use torch2ebm.convert and an EnergyOptimizer; nodes='children' cuts as Torch2PC does.",
        )
    if not isinstance(X, Tensor):
        raise ConfigurationError("PCInfer(X=...)", type(X).__name__, "a tensor", "Convert it: torch.as_tensor(X).")
    if ErrType not in ERROR_TYPES:
        raise ConfigurationError("PCInfer(ErrType=...)", repr(ErrType), f"one of {ERROR_TYPES}", "Choose one of them.")
    if ErrType == "Exact":
        return
    if not (isinstance(eta, (int, float)) and math.isfinite(eta) and eta > 0):
        raise ConfigurationError("PCInfer(eta=...)", repr(eta), "a finite number above 0", "Torch2PC takes 0.1.")
    if not isinstance(n, Integral) or isinstance(n, bool) or n < 1:
        raise ConfigurationError("PCInfer(n=...)", repr(n), "a whole number, 1 or more", "Torch2PC takes 20.")


def _check_finite(gradients: Mapping[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        if not bool(torch.isfinite(gradient).all()):
            raise NonFiniteError(
                f"PCInfer, gradient of parameter '{name}'",
                "NaN or infinity",
                "finite numbers",
                "Take a smaller eta or fewer steps; look at the inputs, the targets and the parameters.",
            )


@contextmanager
def _restored_on_error(model: nn.Module, device: torch.device) -> Iterator[None]:
    random = RandomState(device)
    with BufferSnapshot(dict(model.named_buffers())).restored_on_error():
        try:
            yield
        except BaseException:
            random.restore()
            raise
