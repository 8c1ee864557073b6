"""Whether the states rest in a minimum of the energy, or in a saddle, by a few products with the Hessian.

E = sum_n c_n G_n(s_n) - Phi(s) has the Hessian C D^-1 - H, D = act'(d). It is positive exactly where the largest
eigenvalue of (D C^-1)^1/2 H (D C^-1)^1/2 is below 1. That matrix is symmetric and similar to the step's Jacobian
J = D C^-1 H: above 1 a small push grows under ds/dt = f(s) - s. Where an activation falls (GELU, SiLU) there is no
energy, and the eigenvalue with the largest real part of J itself decides.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from torch2ebm.common.rows import Rows
from torch2ebm.common.text import listed
from torch2ebm.common.users_code import users_level
from torch2ebm.engine.call import Call
from torch2ebm.equilibrium.dynamics import Equilibrium, States
from torch2ebm.equilibrium.linearised import LinearisedStep
from torch2ebm.equilibrium.updates import Damped, GaussSeidel, Synchronous, Update
from torch2ebm.errors import NoEquilibriumError, NotAMinimumWarning

PRODUCTS = 12
EVERY = 16  # free phases of a graph to one that is looked at
MARGIN = 1e-3  # above 1: a state that is not quite at rest has another Jacobian
_DESCENDING = (Synchronous, Damped, GaussSeidel)  # a saddle repels these, as every small push grows under them


class MinimumCheck:
    """Looks at the first free phase of a graph, and at one of every so many: a look costs about 30 steps."""

    def __init__(self) -> None:
        self.phases, self.told = 0, False

    @classmethod
    def of(cls, call: Call) -> MinimumCheck:
        return call.graph.once("equilibrium at a minimum", cls)

    def look(self, equilibrium: Equilibrium, states: States, update: Update) -> Tensor | None:
        """Which samples rest in a minimum, shape ``[batch]``; None where nobody has looked. Warns of the first saddle.

        Args:
            equilibrium: The dynamics of the call.
            states: Where the free phase has settled.
            update: What has moved them; the plain ones end in a minimum by themselves.
        """
        if isinstance(update, _DESCENDING):
            return None
        self.phases += 1
        if (self.phases - 1) % EVERY:
            return None
        try:
            found = are_minima(equilibrium, states)
        except NoEquilibriumError:  # an operation without a second derivative
            return None
        saddles = torch.nonzero(~found).flatten().tolist()
        if saddles and not self.told:
            self.told = True
            _warn(saddles, len(found), update)
        return found


def are_minima(equilibrium: Equilibrium, states: States, products: int = PRODUCTS) -> Tensor:
    """Which samples rest where no small push grows, shape ``[batch]``, or ``[1]`` where samples cannot be told apart.

    Krylov's method on each sample, from the same noise in every run. An eigenvalue above 1 that so many products do
    not show counts as none; one that they show is there, for a symmetric matrix for certain.
    """
    step = LinearisedStep(equilibrium, states)
    rows = Rows(states, tuple(states), equilibrium.call.batch_size)
    product = step.symmetric if step.has_energy else step.product
    vector = rows.pack(_noise(states))
    basis: list[Tensor] = []
    matrix = vector.new_zeros(rows.count, products, products, dtype=torch.float64)
    for number in range(products):
        size = vector.norm(dim=1, keepdim=True)
        basis.append(torch.where(size > 0, vector / size, 0.0))  # an exhausted sample is zero from here on
        by_slot = dict(states)
        rows.unpack(basis[-1], by_slot)
        vector = rows.pack(product(by_slot))
        whole = vector.norm(dim=1, keepdim=True)
        for _ in range(2):  # once more: what is left after the first time is rounding
            for place, each in enumerate(basis):
                part = (vector.double() * each.double()).sum(1)
                matrix[:, place, number] += part
                vector = vector - part.to(vector)[:, None] * each
        left = vector.norm(dim=1, keepdim=True)
        vector = torch.where(left > 1e3 * torch.finfo(vector.dtype).eps * whole, vector, 0.0)
        if number + 1 < products:
            matrix[:, number + 1, number] = vector.norm(dim=1).double()
    return _abscissa(matrix, vector.norm(dim=1).double(), step.has_energy) <= 1 + MARGIN


def _abscissa(matrix: Tensor, beyond: Tensor, symmetric: bool) -> Tensor:
    """The largest real part of an eigenvalue, a sample; of no symmetric matrix less what it may be wrong by."""
    if symmetric:
        # a lower bound of the largest eigenvalue, whatever the number of products
        lower: Tensor = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)[:, -1]
        return lower
    values, vectors = torch.linalg.eig(matrix)
    wrong = beyond[:, None] * vectors[:, -1, :].abs()
    largest: Tensor = (values.real - wrong).amax(1)
    return largest


def _noise(states: States) -> dict[str, Tensor]:
    """The same in every run and in every sample, and nothing that the user draws."""
    generator = torch.Generator().manual_seed(0)
    return {
        slot: torch.randn(state.shape, generator=generator, dtype=torch.float64).to(state)
        for slot, state in states.items()
    }


def _warn(saddles: list[int], batch_size: int, update: Update) -> None:
    named = listed([str(sample) for sample in saddles])
    warnings.warn(
        NotAMinimumWarning(
            f"{update!r} has settled in a saddle of the energy, where a small push grows, in {len(saddles)} of "
            f"{batch_size} samples ({named}). Output and gradient there are those of an equilibrium that the plain "
            "dynamics leaves. Take update=GaussSeidel(), whose steps lower the energy, or damping=0.5, or a lower "
            f"feedback (feedback=0.5). state.phases[0].at_minimum names the samples of one batch in {EVERY}."
        ),
        stacklevel=users_level(),
    )
