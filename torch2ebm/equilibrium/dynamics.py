"""The Hopfield-type energy of one call: the drive of each state, the nudge by the loss, and the gradient of Phi.

A node is evaluated on leaves, so no autograd graph crosses a node boundary. One call of the engine pulls the states
back through all nodes: s_n <- act_n(d(Phi - beta c_o C)/ds_n / c_n) (Scellier and Bengio 2017).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch2ebm.engine.call import Call, NodePass, at_least_single, pull_back
from torch2ebm.engine.gradients import GradientSum
from torch2ebm.equilibrium.hopfield import HopfieldGraph, Term
from torch2ebm.loss.output_loss import OutputLoss

States = Mapping[str, Tensor]  # by slot


class Equilibrium:
    """The states of one call: Phi, its gradient, and the step. An :class:`Update` is given one.

    A state is by slot, in the shape of the activation's value, for example ``[batch, features]``.

    Attributes:
        states: The feed-forward values, where the free phase starts; once it has ended, where it led.
        weight: c_n of each state, by slot.
        output_weight: c_o.
        nudged: Slots of the states that the loss acts on.
        precision: Of the coarsest numbers that states are read as, relative to their size.

    Example:
        A synchronous step, written out. The examples of the methods go on from it.

        >>> import torch, torch2ebm
        >>> from torch2ebm.extend import Step, Update
        >>> class Plain(Update):
        ...     name, share = "plain", 1.0
        ...     def step(self, equilibrium, states, influence, past=None):
        ...         self.seen = equilibrium, states, influence
        ...         drives = equilibrium.drive(states)
        ...         influence.nudge(equilibrium, states, drives)
        ...         moved = equilibrium.activate(drives)
        ...         influence.hold(moved)
        ...         return Step(states, moved, drives)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model, update = torch2ebm.convert(net), Plain()
        >>> algorithm = torch2ebm.EquilibriumPropagation(feedback=0.1, update=update)
        >>> optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
        >>> output = model(torch.randn(5, 4))
        >>> equilibrium, states, influence = update.seen
        >>> [state.shape for state in states.values()]
        [torch.Size([5, 8]), torch.Size([5, 3])]
    """

    def __init__(self, call: Call, hopfield: HopfieldGraph, feedback: float) -> None:
        self.call, self.hopfield, self.feedback = call, hopfield, feedback
        self.states = {slot: at_least_single(call.values[slot]) for slot in hopfield.states}
        # states are kept in single precision at least, and read by the nodes as the module computed them
        self._read_as = {slot: call.values[slot].dtype for slot in hopfield.states}
        # c_n = feedback^depth(n), one c_o for all outputs
        self.weight = {slot: feedback**state.depth for slot, state in hopfield.states.items()}
        self.output_weight = feedback**hopfield.output_depth
        self.nudged = hopfield.nudged()
        self.precision = max(torch.finfo(dtype).eps for dtype in self._read_as.values())
        # pre-activations of clamped inputs alone: no state can change them, so they are never evaluated again
        self.fixed = {
            made: at_least_single(call.values[slot])
            for term in hopfield.fixed
            for slot, made in zip(term.node.slots, term.states, strict=True)
        }

    # Phi

    def evaluate(self, term: Term, states: States, leaves: bool = True) -> NodePass:
        """The pre-activations of one node; with ``leaves`` the states that it reads are leaves of its graph."""
        reads = term.node.reads
        inputs = [states[slot].to(self._reading(slot, states[slot])) for slot in reads]
        if leaves:
            inputs = [value.detach().requires_grad_() for value in inputs]
        return self.call.evaluate(term.node, inputs)

    def _reading(self, slot: str, value: Tensor) -> torch.dtype:
        return value.dtype if value.is_complex() else self._read_as[slot]  # there is no complex bfloat16

    def drive(self, states: States, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
        """dPhi/ds_n / c_n: the pre-activation of each state, and the feedback of those that read it.

        Args:
            states: By slot. They are read, and not written.
            wanted: The slots whose drive is wanted; None for all.

        Returns:
            By slot, in the shape of the state.

        Example:
            >>> drives = equilibrium.drive(states)
            >>> drives.keys() == states.keys()
            True
        """
        drives = {slot: a for slot, a in self.fixed.items() if wanted is None or slot in wanted}
        # all graphs are built before any is pulled back: one run of the engine costs less than one for each node
        passes = [(term, self._pass(term, states)) for term in self.hopfield.terms if _concerns(term, wanted)]
        for term, evaluated in passes:
            for slot, prediction in zip(term.states, evaluated.predictions, strict=True):
                if wanted is None or slot in wanted:
                    drives[slot] = at_least_single(prediction)
        messages = self._feedback(passes, states, wanted)
        passes.clear()  # so that each drive is freed when it is replaced
        for slot in list(messages):
            # a_n + sum_c c_c (da_c/ds_n)^T s_c / c_n
            drives[slot] = drives[slot].add(messages.pop(slot), alpha=1 / self.weight[slot])
        return drives

    def _pass(self, term: Term, states: States) -> NodePass:
        with torch.enable_grad():
            return self.evaluate(term, states)

    def _feedback(
        self, passes: Sequence[tuple[Term, NodePass]], states: States, wanted: Collection[str] | None
    ) -> dict[str, Tensor]:
        """sum over children of c_c (da_c/ds_n)^T s_c, by one call of the engine for all nodes."""
        sources = [
            (slot, leaf)
            for term, evaluated in passes
            for slot, leaf in zip(term.node.reads, evaluated.inputs, strict=True)
            if wanted is None or slot in wanted
        ]
        predictions = [prediction for _, evaluated in passes for prediction in evaluated.predictions]
        cotangents = [self._weighted(slot, states[slot]) for term, _ in passes for slot in term.states]
        cotangents = [match(each, a) for each, a in zip(cotangents, predictions, strict=True)]
        messages: dict[str, Tensor] = {}
        products = pull_back(predictions, cotangents, [leaf for _, leaf in sources])
        for (slot, _), message in zip(sources, products, strict=True):
            if message is not None:
                # torch returns the conjugate of a holomorphic derivative
                message = at_least_single(message.conj() if message.is_complex() else message)
                messages[slot] = messages[slot] + message if slot in messages else message
        return messages

    def _weighted(self, slot: str, state: Tensor, factor: complex = 1.0) -> Tensor:
        factor = factor * self.weight[slot]
        return state if factor == 1.0 else state * factor  # no copy of the states at feedback 1

    def activate(self, drives: States) -> dict[str, Tensor]:
        """s_n = act_n(drive_n).

        Args:
            drives: By slot, of all states or of some.

        Returns:
            The states, by the same slots.

        Example:
            >>> moved = equilibrium.activate(equilibrium.drive(states))
            >>> [bool((state.abs() <= 1).all()) for state in moved.values()][0]  # behind a tanh
            True
        """
        states = {}
        with torch.no_grad():
            for slot, drive in drives.items():
                activation = self.hopfield.states[slot].activation
                if activation is None:
                    states[slot] = drive
                else:
                    read = drive.to(self._reading(slot, drive))
                    states[slot] = at_least_single(activation.evaluate((read,))[0])
        return states

    # the output

    def outputs(self, states: States) -> dict[str, Tensor]:
        """What the loss reads, by slot of the model's output."""
        found = {slot: states[state] for slot, state in self.hopfield.outputs.items()}
        with torch.no_grad():
            for node in self.hopfield.readouts:
                evaluated = self.evaluate(Term(node, ()), states, leaves=False)
                found.update(zip(node.slots, evaluated.predictions, strict=True))
        return found

    # gradients of Phi in the parameters

    def contrast(self, phases: Sequence[tuple[States, complex]], result: GradientSum) -> None:
        """Add the real part of sum_k w_k dPhi/dtheta(s_k) over pairs of states and weight."""
        for term in self.hopfield.terms:
            # frozen, and fed by no input that wants a gradient
            if not self._is_learning(term):
                continue
            # a_n depends on the states that it reads, which differ: one product for each phase
            for states, factor in phases:
                with torch.enable_grad():
                    evaluated = self.evaluate(term, states, leaves=False)
                weighted = [self._weighted(slot, states[slot], factor) for slot in term.states]
                self._add(evaluated, weighted, result)
        for term in self.hopfield.fixed:
            if self._is_learning(term):  # linear in the states: differences first, then one product
                with torch.enable_grad():
                    evaluated = self.evaluate(term, {})
                sums = [sum_of([states[slot] * factor for states, factor in phases]) for slot in term.states]
                weighted = [self._weighted(slot, each) for slot, each in zip(term.states, sums, strict=True)]
                self._add(evaluated, weighted, result)

    def _add(self, evaluated: NodePass, weighted: Sequence[Tensor], result: GradientSum) -> None:
        pairs = zip(weighted, evaluated.predictions, strict=True)
        result.add(self.call, evaluated, [match(each, a) for each, a in pairs])

    def _is_learning(self, term: Term) -> bool:
        own = any(self.call.parameters[name].requires_grad for name in term.node.parameters)
        return own or bool(self.call.clamped_inputs(term.node))


def match(cotangent: Tensor, prediction: Tensor) -> Tensor:
    """The cotangent that autograd needs for this factor of a prediction. For complex tensors torch takes conjugates."""
    if not cotangent.is_complex():
        return cotangent
    # a real prediction is one of clamped inputs alone
    return cotangent.conj() if prediction.is_complex() else cotangent.real


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _concerns(term: Term, wanted: Collection[str] | None) -> bool:
    return wanted is None or any(slot in wanted for slot in (*term.states, *term.node.reads))


@dataclass(frozen=True, eq=False)
class Influence:
    """What the loss does to the states of a phase; by default nothing.

    Attributes:
        loss: C, summed over samples, which stands in the energy as beta c_o C.
        beta: The nudge.
        held: States that are clamped, by slot.

    Example:
        The examples of the methods go on from this one.

        >>> import torch
        >>> from torch2ebm.extend import Influence
        >>> held = Influence(held={"output": torch.ones(1, 2)})
        >>> held.loss is None
        True
    """

    loss: OutputLoss | None = None
    beta: complex = 0.0
    held: States = field(default_factory=dict)

    def nudge(self, equilibrium: Equilibrium, states: States, drives: dict[str, Tensor]) -> None:
        """Subtract beta c_o dC/ds_n / c_n from the drives that are there.

        Args:
            equilibrium: The dynamics of the call.
            states: Where the loss is evaluated, by slot.
            drives: By slot, in the shape of the state; those of the outputs are written.

        Example:
            >>> drives = {}
            >>> held.nudge(None, {}, drives)  # no loss: nothing to do
            >>> drives
            {}
        """
        if self.loss is None or drives.keys().isdisjoint(equilibrium.nudged):
            return
        for slot, gradient in cost_gradients(equilibrium, states, self.loss).items():
            if slot in drives:
                # Divided by c_n, as the whole drive is. Without c_o the nudge would outgrow the feedback in c_n, and
                # diverge.
                factor = self.beta * equilibrium.output_weight / equilibrium.weight[slot]
                drives[slot] = drives[slot].sub(gradient, alpha=factor)

    def hold(self, states: dict[str, Tensor]) -> None:
        """Put what is held in the place of what a step has made.

        Args:
            states: By slot; those that are held are written.

        Example:
            >>> states = {"output": torch.zeros(1, 2)}
            >>> held.hold(states)
            >>> states["output"]
            tensor([[1., 1.]])
        """
        states.update({slot: value for slot, value in self.held.items() if slot in states})


def cost_gradients(
    equilibrium: Equilibrium, states: States, loss: OutputLoss, collected: GradientSum | None = None, scale: float = 1.0
) -> dict[str, Tensor]:
    """dC/ds of every state that the loss acts on; with ``collected``, scale * dC/dtheta of read-outs is added to it."""
    hopfield = equilibrium.hopfield
    with torch.enable_grad():
        passes = [equilibrium.evaluate(Term(node, ()), states) for node in hopfield.readouts]
    predictions = {slot: states[state] for slot, state in hopfield.outputs.items()}
    for each in passes:
        predictions.update(zip(each.node.slots, [p.detach() for p in each.predictions], strict=True))
    # one evaluation for all outputs: the loss may join them
    _, gradients = loss.gradients(predictions)
    return pulled_through(equilibrium, passes, gradients, collected, scale)


def pulled_through(
    equilibrium: Equilibrium,
    passes: Sequence[NodePass],
    gradients: Mapping[str, Tensor],
    collected: GradientSum | None,
    scale: float,
) -> dict[str, Tensor]:
    """From dC/doutput to dC/ds: of outputs that are states, and of what read-outs read."""
    found = by_state(equilibrium.hopfield, gradients)
    for each in passes:
        given = [gradients.get(slot) for slot in each.node.slots]
        pairs = zip(given, each.predictions, strict=True)
        cotangents = [None if gradient is None else match(gradient, a) for gradient, a in pairs]
        # kept where the parameters ask for a second product, with scaled cotangents
        products = each.pullback(cotangents, each.inputs, retain_graph=collected is not None)
        if collected is not None:
            scaled = [None if cotangent is None else cotangent * scale for cotangent in cotangents]
            collected.add(equilibrium.call, each, scaled)
        for slot, product in zip(each.node.reads, products, strict=True):
            if product is not None:
                product = at_least_single(product.conj() if product.is_complex() else product)
                found[slot] = found[slot] + product if slot in found else product
    return found


def by_state(hopfield: HopfieldGraph, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by output slot, summed by the state that several of them may be."""
    found: dict[str, Tensor] = {}
    for slot, state in hopfield.outputs.items():
        gradient = gradients.get(slot)
        if gradient is None:
            continue
        # one state may be returned twice
        found[state] = found[state] + gradient if state in found else at_least_single(gradient)
    return found
