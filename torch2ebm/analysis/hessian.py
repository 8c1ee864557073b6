"""The Hessian of F in the values of a call, or in its errors, where you want it: products, and eigenvalues by Lanczos.

F is differentiated twice as it is written, so second derivatives of all nodes count, away from the feed-forward pass,
too. Products end at each node in the values; in the errors they go through all nodes below.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torch2ebm.analysis.direct_loss import DirectLoss
from torch2ebm.analysis.energy_function import ByNode, CallEnergy, Point, by_slot, detached, still
from torch2ebm.analysis.energy_terms import by_node
from torch2ebm.analysis.lanczos import MOST_NUMBERS, Ritz, lanczos
from torch2ebm.common.checks import check_choice, check_finite, check_reduction, check_steps, check_tolerance
from torch2ebm.common.rows import Rows
from torch2ebm.common.users_code import users_level
from torch2ebm.engine.call import Call, at_least_single
from torch2ebm.engine.energies import Energy
from torch2ebm.engine.precision import Precision
from torch2ebm.errors import ConfigurationError, NonFiniteError, NotSettledWarning
from torch2ebm.inference.curvature import commutes, noise, packed
from torch2ebm.inference.relaxation import relax
from torch2ebm.inference.solver import Solver
from torch2ebm.loss.output_loss import NudgedLoss
from torch2ebm.potentials.node_energies import NodeEnergies, check_names, node_energies
from torch2ebm.solvers import ErrorConjugateGradient

_WHERE = "model.hessian"
_APART = 0.02  # far above what differences leave, far below a node that is cut off
BySlot = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Hessian:
    """The second derivative of F, summed over samples, in the values or the errors of one call.

    Attributes:
        coordinates: ``"values"`` or ``"errors"``.
        at: Node name to the value at which it is taken, a tuple for a node of several slots.
        size: How many entries it acts on.
        samples: How many blocks it has, one for each sample; 1 where samples depend on each other.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
        >>> batch = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
        >>> hessian = torch2ebm.convert(net).hessian(torch.nn.functional.cross_entropy, batch)
        >>> hessian.size, hessian.product({"0": torch.ones(5, 8).double()})["0"].shape
        (40, torch.Size([5, 8]))
        >>> abs(hessian.smallest - 1) < 1e-9, hessian.condition_number == hessian.largest / hessian.smallest
        (True, True)
    """

    coordinates: str
    at: ByNode
    size: int
    samples: int
    _curved: Curved
    _rows: Rows
    _most: int
    _tol: float

    def product(self, direction: ByNode) -> dict[str, Any]:
        """The Hessian times a vector.

        Args:
            direction: Node name to its part, in the shape of the value; a missing one is zero.

        Returns:
            By name, in the same shapes, all nodes with a value.

        Raises:
            ConfigurationError: for an unknown name, a node without a value of its own, or another shape.
        """
        curved = self._curved
        check_names(f"{_WHERE}(...).product", direction, curved.function.graph)
        given = by_slot(f"{_WHERE}(...).product", direction, curved.function.graph, curved.leaves)
        return _of_hidden(curved.function, curved.product(given))

    def matrix(self) -> Tensor:
        """Written out, by as many products as there are entries in a sample.

        Returns:
            Shape ``[size, size]``; entries are in the order of ``[value.flatten() for value in hessian.at.values()]``.

        Raises:
            ConfigurationError: where it is too large to be written out.
        """
        if self.size**2 > MOST_NUMBERS:
            raise ConfigurationError(
                f"{_WHERE}(...).matrix()",
                f"{self.size} entries",
                f"at most {int(MOST_NUMBERS**0.5)}",
                "Use spectrum(k).",
            )
        curved = self._curved
        found = []
        for slot, leaf in curved.leaves.items():
            for entry in range(leaf.numel()):
                unit = torch.zeros_like(leaf)
                unit.view(-1)[entry] = 1
                product = curved.product({slot: unit})
                found.append(torch.cat([product[each].flatten() for each in curved.leaves]))
        return torch.stack(found, 1) if found else torch.zeros(0, 0)

    def spectrum(self, k: int, end: str = "largest") -> Tensor:
        """Eigenvalues from one end of the spectrum, by Lanczos.

        Args:
            k: How many; there are fewer where the matrix is smaller. An eigenvalue that several directions of one
                sample share is found once.
            end: ``"largest"`` or ``"smallest"``.

        Returns:
            Shape ``[k]``, from the end inwards, in double precision on the CPU.

        Raises:
            ConfigurationError: for an illegal number or end.
            NonFiniteError: where a product is not finite.
        """
        check_steps(f"{_WHERE}(...).spectrum", k, "k")
        check_choice(f"{_WHERE}(...).spectrum", "end", end, ("largest", "smallest"))
        return self._ritz(lambda ritz: self._is_known(ritz, k, end)).ends(k, end)[0]

    @property
    def largest(self) -> float:
        """The largest eigenvalue, over all samples."""
        return float(self._ends.ends(1, "largest")[0])

    @property
    def smallest(self) -> float:
        """The smallest eigenvalue, over all samples; below 0 at a saddle."""
        return float(self._ends.ends(1, "smallest")[0])

    @property
    def bounds(self) -> tuple[float, float]:
        """Some eigenvalue is within so much of ``largest``, and one of ``smallest``; 0 once all is known."""
        largest, smallest = (float(self._ends.ends(1, end)[1]) for end in ("largest", "smallest"))
        return largest, smallest

    @property
    def condition_number(self) -> float:
        """The largest eigenvalue over the smallest; infinite where the smallest is not above 0."""
        return self.largest / self.smallest if self.smallest > 0 else float("inf")

    @cached_property
    def _ends(self) -> Ritz:
        return self._ritz(lambda ritz: all(self._is_known(ritz, 1, end) for end in ("largest", "smallest")))

    def _is_known(self, ritz: Ritz, k: int, end: str) -> bool:
        values, bounds = ritz.ends(k, end)
        return len(values) == k and bool((bounds <= self._tol * values.abs()).all())

    def _ritz(self, known: Callable[[Ritz], bool]) -> Ritz:
        if not self.size:
            nothing = torch.zeros(1, 1, dtype=torch.float64)
            return Ritz(nothing, nothing, 0, True)
        generator = torch.Generator().manual_seed(0)  # the same in every run, and nothing that the user draws
        shape = self._rows.count, self.size // self._rows.count
        start = torch.randn(*shape, generator=generator).to(next(iter(self._curved.leaves.values())))
        most = max(4, min(self._most, MOST_NUMBERS // self.size))
        return lanczos(packed(self._curved.product, self._rows), start, most, known, _not_finite)

    def __repr__(self) -> str:
        return f"Hessian(coordinates={self.coordinates!r}, size={self.size}, samples={self.samples})"


class Curved:
    """F and its gradient at one point, whose graph stays for products with the Hessian.

    Args:
        function: F of a call.
        loss: Its loss.
        beta: The factor of that.
        coordinates: ``"values"`` or ``"errors"``.
        point: Where, by hidden slot in these coordinates.
    """

    def __init__(self, function: CallEnergy, loss: DirectLoss, beta: float, coordinates: str, point: BySlot) -> None:
        self.function, self._loss, self._beta, self._coordinates = function, loss, beta, coordinates
        self.leaves = {slot: value.detach().clone().requires_grad_() for slot, value in point.items()}
        self._gradient = self._slope(self.leaves, create_graph=True)
        self._twice = self._is_differentiable_twice()

    def zeros(self) -> dict[str, Tensor]:
        return {slot: torch.zeros_like(leaf) for slot, leaf in self.leaves.items()}

    def product(self, direction: BySlot) -> dict[str, Tensor]:
        """By slot; a missing one is zero."""
        return self._by_second_derivative(direction) if self._twice else self._by_difference(direction)

    def _is_differentiable_twice(self) -> bool:
        """Whether the graph of the gradient has the derivative that differences find, along some direction.

        Fused attention has no second derivative. One of an own function may be cut off without a word.
        """
        direction = noise(self.leaves)
        try:
            exact = self._by_second_derivative(direction)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
        other = self._by_difference(direction)
        gap = sum(float((exact[slot] - other[slot]).norm()) ** 2 for slot in other) ** 0.5
        size = sum(float(part.norm()) ** 2 for part in other.values()) ** 0.5
        return not gap > _APART * size  # not ... >: what is not finite is told of later

    def commutes(self, rows: Rows) -> bool:
        """Whether no sample has a say in another."""
        exact = commutes(self.product, rows, 1e-6)
        return exact or (not self._twice and commutes(self.product, rows))

    def _slope(self, at: BySlot, create_graph: bool = False) -> dict[str, Tensor]:
        if not at:
            return {}
        with torch.inference_mode(False), torch.enable_grad():
            point = self.function.at(at, self._coordinates)
            energy = self.function.of_nodes(point) + self._beta * self._loss.total(point.values)
            found = torch.autograd.grad(
                energy, list(at.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        return dict(zip(at, found, strict=True))

    def _by_second_derivative(self, direction: BySlot) -> dict[str, Tensor]:
        pairs = [(g, direction[slot]) for slot, g in self._gradient.items() if slot in direction and g.requires_grad]
        if not pairs:
            return self.zeros()
        gradients, along = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            gradients, list(self.leaves.values()), along, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(self.leaves, found, strict=True))

    def _by_difference(self, direction: BySlot) -> dict[str, Tensor]:
        size = max((float(part.abs().max()) for part in direction.values()), default=0.0)
        if size == 0.0:
            return self.zeros()
        widest = max(float(self.leaves[slot].detach().abs().max()) for slot in direction)
        width = torch.finfo(next(iter(direction.values())).dtype).eps ** (1 / 3) * max(widest, 1.0) / size

        def at(shift: float) -> dict[str, Tensor]:
            return self._slope({
                slot: (leaf.detach() + shift * direction[slot] if slot in direction else leaf.detach()).requires_grad_()
                for slot, leaf in self.leaves.items()
            })  # fmt: skip

        above, below = at(width), at(-width)
        return {slot: (above[slot] - below[slot]) / (2 * width) for slot in self.leaves}


def hessian_of(
    call: Call,
    loss_of: Callable[[Any], Tensor],
    *,
    at: ByNode | str | None = None,
    coordinates: str = "values",
    beta: float = 1.0,
    precisions: Mapping[str, float | Tensor | Precision] | None = None,
    energies: Mapping[str, Energy] | None = None,
    loss_reduction: str = "mean",
    solver: Solver[Any] | None = None,
    products: int = 300,
    tol: float = 1e-9,
) -> Hessian:
    """Of a call after its feed-forward pass; see :meth:`EnergyModel.hessian`."""
    check_choice(_WHERE, "coordinates", coordinates, ("values", "errors"))
    check_finite(_WHERE, beta=beta)
    check_reduction(_WHERE, loss_reduction)
    check_steps(_WHERE, products, "products")
    check_tolerance(_WHERE, tol)
    named = node_energies(_WHERE, precisions or {}, energies or {})
    check_names(_WHERE, named, call.graph)
    # copies: the graph outlives the weights of this step, and the batch
    parameters = {name: parameter.clone() for name, parameter in detached(call.parameters).items()}
    for name, each in call.environment.items():
        call.environment[name] = each.detach().clone() if isinstance(each, Tensor) else each
    function = CallEnergy(call, still(named), parameters)
    loss = DirectLoss(function, loss_of, call.batch_size if loss_reduction == "mean" else 1)
    point = _point(function, loss, at, beta, solver)
    named_point = point.values if coordinates == "values" else point.errors
    hidden = {slot: named_point[slot] for slot in point.errors}  # outputs have no value of their own
    curved = Curved(function, loss, beta, coordinates, hidden)
    rows = Rows(curved.leaves, tuple(curved.leaves), call.batch_size)
    if call.couples_samples or not curved.commutes(rows):
        rows.count = 1
    size = sum(leaf.numel() for leaf in curved.leaves.values())
    return Hessian(coordinates, _of_hidden(function, point.values), size, rows.count, curved, rows, products, tol)


def _point(
    function: CallEnergy, loss: DirectLoss, at: ByNode | str | None, beta: float, solver: Solver[Any] | None
) -> Point:
    """The values and the errors of all hidden slots where the Hessian is wanted."""
    graph, call = function.graph, function.call
    hidden = {slot: call.values[slot] for node in graph.hidden_nodes for slot in node.slots}
    if isinstance(at, str):
        if at != "equilibrium":
            raise ConfigurationError(
                f"{_WHERE}(at=...)",
                repr(at),
                "'equilibrium', values by the names of nodes, or nothing for the feed-forward pass",
                "For example at='equilibrium'.",
            )
        given = _at_rest(function, loss, beta, solver or _exact(next(iter(hidden.values()), torch.zeros(()))))
    else:
        check_names(f"{_WHERE}(at=...)", at or {}, graph)
        given = by_slot(f"{_WHERE}(at=...)", at or {}, graph, call.values)
    with torch.no_grad():
        values = function.at(given).values
        return function.at({slot: at_least_single(values[slot]) for slot in hidden})


def _at_rest(function: CallEnergy, loss: DirectLoss, beta: float, solver: Solver[Any]) -> dict[str, Tensor]:
    nudged = loss if beta == 1.0 else NudgedLoss(loss, beta)
    inference = solver.inference(function.call, nudged, NodeEnergies(function.energies), retain_call=True)
    state = relax(solver, inference, beta).state
    if state.relaxation.converged is False:
        got = f"{solver!r} with a residual of {state.relaxation.residual:.3g}"
        message = f'{_WHERE}(at="equilibrium"): got {got}; expected rest. Give a solver with more steps: solver=...'
        warnings.warn(NotSettledWarning(message), stacklevel=users_level())
    values = {node.name: state.value[node.name] for node in function.graph.hidden_nodes}
    return by_slot(_WHERE, values, function.graph, function.call.values)


def _exact(like: Tensor) -> Solver[Any]:
    return ErrorConjugateGradient(tol=torch.finfo(at_least_single(like).dtype).eps ** 0.5, steps=500)


def _of_hidden(function: CallEnergy, tensors: BySlot) -> dict[str, Any]:
    shown = by_node(function.graph, {slot: tensors.get(slot) for slot in function.graph.owner})  # type: ignore[misc]
    return {node.name: shown[node.name] for node in function.graph.hidden_nodes}


def _not_finite() -> NonFiniteError:
    return NonFiniteError(
        _WHERE, "a product that is not finite", "finite numbers", "Look for NaN or infinity in values and weights."
    )
