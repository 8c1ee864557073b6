"""Products with the Jacobian of one step of a Hopfield-type energy, at given states.

With f_n(s) = act_n(d_n), d_n = dPhi/ds_n / c_n and H the Hessian of Phi, J = D C^-1 H, D = act'(d) and C = diag(c).
H is symmetric, so J^T z = H C^-1 D z and J v = D C^-1 H v are one kind of product (Almeida 1987; Pineda 1987).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torch2ebm.engine.call import at_least_single
from torch2ebm.engine.gradients import GradientSum
from torch2ebm.equilibrium.dynamics import Equilibrium, States, sum_of
from torch2ebm.equilibrium.linear_solvers import Vector
from torch2ebm.errors import NoEquilibriumError


class LinearisedStep:
    """J and J^T of one synchronous step. The states are leaves, so no graph crosses a node boundary.

    Attributes:
        drives: What the activations are applied to.
    """

    def __init__(self, equilibrium: Equilibrium, states: States) -> None:
        self.equilibrium = equilibrium
        self._leaves = {slot: value.detach().requires_grad_() for slot, value in states.items()}
        # kept with its graph: each product differentiates it once more
        self._gradients = self._phi_gradients()
        self.drives = {slot: g.detach() / equilibrium.weight[slot] for slot, g in self._gradients.items()}
        self._slopes = {slot: self._slope(slot, drive) for slot, drive in self.drives.items()}

    def _phi_gradients(self) -> Vector:
        """dPhi/ds_n, which can be differentiated once more."""
        hopfield, weight, found = self.equilibrium.hopfield, self.equilibrium.weight, dict[str, Tensor]()
        predictions, cotangents = [], []
        with torch.enable_grad():
            for term in (*hopfield.fixed, *hopfield.terms):
                evaluated = self.equilibrium.evaluate(term, self._leaves, leaves=False)
                for slot, a in zip(term.states, evaluated.predictions, strict=True):
                    predictions.append(at_least_single(a, detach=False))
                    # c_n s_n, on the graph: Phi is differentiated in it, too
                    cotangents.append(self._leaves[slot] * weight[slot])
                    found[slot] = predictions[-1] * weight[slot]
            # d/ds_n of <c s, a(s)> through a alone; the derivative in s itself is c_n a_n, added above
            feedback = _gradients(predictions, list(self._leaves.values()), cotangents, create_graph=True)
            for slot, message in zip(self._leaves, feedback, strict=True):
                if message is not None:
                    found[slot] = found[slot] + message
        return {slot: found[slot] for slot in self._leaves}

    def _slope(self, slot: str, drive: Tensor) -> Tensor | None:
        """act'(d), element by element; None for the identity."""
        activation = self.equilibrium.hopfield.states[slot].activation
        if activation is None:
            return None
        leaf = drive.detach().requires_grad_()
        with torch.enable_grad():
            value = activation.evaluate((leaf,))[0]
        # an activation acts element by element, so this sum has the diagonal of its Jacobian
        found = _gradients([value], [leaf], [torch.ones_like(value)])[0]
        return torch.zeros_like(leaf) if found is None else found

    @property
    def has_energy(self) -> bool:
        """Whether no activation falls: then J is similar to a symmetric matrix."""
        return all(slope is None or bool((slope >= 0).all()) for slope in self._slopes.values())

    def symmetric(self, v: Vector) -> Vector:
        """(D C^-1)^1/2 H (D C^-1)^1/2 v, which has the eigenvalues of J; where :attr:`has_energy`."""
        return self._by_root(self._hessian(self._by_root(v)))

    def _by_root(self, vector: Mapping[str, Tensor]) -> Vector:
        roots = {s: None if slope is None else slope.sqrt() for s, slope in self._slopes.items()}
        scaled = {s: v / self.equilibrium.weight[s] ** 0.5 for s, v in vector.items()}
        return {s: v if (root := roots[s]) is None else v * root for s, v in scaled.items()}

    def at_drives(self, vector: Mapping[str, Tensor]) -> Vector:
        """D v."""
        return {s: v if (slope := self._slopes[s]) is None else v * slope for s, v in vector.items()}

    def transposed(self, z: Vector) -> Vector:
        """J^T z."""
        return self._hessian(self._divided(self.at_drives(z)))  # H C^-1 D z

    def product(self, v: Vector) -> Vector:
        """J v."""
        return self.at_drives(self._divided(self._hessian(v)))  # D C^-1 H v

    def _divided(self, vector: Vector) -> Vector:
        return {slot: each / self.equilibrium.weight[slot] for slot, each in vector.items()}

    def _hessian(self, v: Vector) -> Vector:
        products = self._pulled(v, list(self._leaves.values()))
        pairs = zip(self._leaves.items(), products, strict=True)
        return {slot: torch.zeros_like(leaf) if p is None else p for (slot, leaf), p in pairs}

    def _pulled(self, v: Vector, wrt: Sequence[Tensor]) -> Sequence[Tensor | None]:
        # a drive of clamped inputs and frozen parameters has no graph
        used = [slot for slot, gradient in self._gradients.items() if gradient.requires_grad]
        if not used or not wrt:
            return [None] * len(wrt)
        try:
            return _gradients([self._gradients[s] for s in used], wrt, [v[s] for s in used], retain_graph=True)
        except RuntimeError as error:
            # torch has no class for a derivative that is missing
            if "not implemented" not in str(error):
                raise
            raise NoEquilibriumError(
                "RecurrentBackprop",
                f"an operation without a second derivative ({str(error).splitlines()[0]})",
                "pre-activations that can be differentiated twice",
                "Take EquilibriumPropagation, or attention that is written out.",
            ) from error

    def collect(self, z: Vector, scale: float, result: GradientSum) -> None:
        """Add scale * (df/dtheta)^T z, of clamped inputs too."""
        call, hopfield = self.equilibrium.call, self.equilibrium.hopfield
        nodes = [term.node for term in (*hopfield.fixed, *hopfield.terms)]
        parameters = {n: call.parameters[n] for node in nodes for n in node.parameters}
        parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        clamped = {name: leaf for node in nodes for name, leaf in call.clamped_inputs(node).items()}
        # df/dtheta = D C^-1 d2Phi/(dtheta ds), transposed: z goes through D and C^-1 first
        scaled = {slot: each * scale for slot, each in self._divided(self.at_drives(z)).items()}
        found = iter(self._pulled(scaled, [*parameters.values(), *clamped.values()]))
        for name, parameter in parameters.items():
            product = next(found)
            product = torch.zeros_like(parameter) if product is None else product
            result.parameters[name] = sum_of(
                [result.parameters[name], product] if name in result.parameters else [product]
            )
        for name in clamped:
            if (product := next(found)) is not None:
                result.clamped[name] = sum_of([result.clamped[name], product] if name in result.clamped else [product])


def _gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    directions: Sequence[Tensor],
    create_graph: bool = False,
    retain_graph: bool = False,
) -> Sequence[Tensor | None]:
    pairs = [(o, d) for o, d in zip(outputs, directions, strict=True) if o.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    return torch.autograd.grad(
        [output for output, _ in pairs],
        list(inputs),
        [direction for _, direction in pairs],
        create_graph=create_graph,
        retain_graph=retain_graph or create_graph,
        allow_unused=True,
    )
