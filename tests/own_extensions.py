"""What a user's own file may hold: classes made of what ``torch2ebm.extend`` offers, frozen dataclasses and plain ones.

Run as a script, this file is a process that loads a pickled model and prints its gradients.
"""

import pickle
import sys
from dataclasses import dataclass, replace

import torch

from torch2ebm.extend import (
    Algorithm,
    DivergenceError,
    Energy,
    InferenceState,
    LocalGradients,
    Nudging,
    Step,
    Update,
    ValueSolver,
    reverse_sweep,
    synchronous_step,
)


@dataclass(frozen=True)
class Swept(Algorithm):
    """Backprop by one sweep, ``gain`` times; ``forward`` hands on how often it has run before."""

    gain: float = 1.0
    steps: int = 1

    partition = "module"
    reevaluates_loss = False

    def forward(self, call):
        call.feedforward(keep_graph=True)
        return {"output": call.output()[0].detach().clone()}

    def backward(self, call, kept, loss, retain_graph):
        if self.gain > 1e6:
            raise DivergenceError("Swept", f"a gain of {self.gain:g}", "less", "Take a smaller one.")
        assert torch.equal(kept["output"], call.output()[0])
        swept = reverse_sweep(call, {slot: self.gain * each for slot, each in loss.delivered.items()}, retain_graph)
        state = InferenceState(call.graph, call.batch_size, call.values, swept.deltas, -loss.unit)
        return LocalGradients(swept.gradients.parameters, call.input_gradients(swept.gradients.clamped), state)

    def with_steps(self, steps):
        return replace(self, steps=steps)


class PlainDescent(ValueSolver):
    """Gradient descent by a class of no dataclass, whose settings may change."""

    def __init__(self, steps=6, lr=0.1, tol=0.0):
        self.steps, self.lr, self.tol = steps, lr, tol

    def with_steps(self, steps):
        return type(self)(steps, self.lr, self.tol)

    def start(self, inference):
        return None

    def step(self, inference, state):
        for slot, gradient in inference.sweep():
            inference.move(slot, gradient * self.lr, -1.0)


@dataclass
class LooseDescent(PlainDescent):
    """The same by a dataclass that is not frozen, and has no hash."""

    steps: int = 6
    lr: float = 0.1
    tol: float = 0.0


class Weighted(Energy):
    """Half the weighted squares, of no dataclass."""

    def __init__(self, weight):
        self.weight = weight

    def of_samples(self, error, prediction):
        return 0.5 * self.weight * error.square().flatten(1).sum(1)

    def of_batch(self, error, prediction):
        return self.of_samples(error, prediction).sum()

    def gradients(self, error, prediction):
        return self.weight * error, self.weight * error


class Negative(Nudging):
    """One negative phase."""

    def __init__(self, beta):
        self.beta = beta

    @property
    def betas(self):
        return (-self.beta,)


class Partial(Update):
    """A part of the synchronous step."""

    name = "partial"

    def __init__(self, share):
        self.share = share

    def step(self, equilibrium, states, influence, past=None):
        whole = synchronous_step(equilibrium, states, influence)
        moved = {slot: states[slot] + self.share * (state - states[slot]) for slot, state in whole.states.items()}
        return Step(states, moved, whole.drives)


if __name__ == "__main__":
    model = pickle.load(sys.stdin.buffer)
    model(torch.ones(2, 4)).square().sum().backward()
    print([parameter.grad.sum().item() for parameter in model.parameters()], model.algorithm)
