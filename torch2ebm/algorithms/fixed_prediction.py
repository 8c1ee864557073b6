"""Fixed-prediction coding (FixedPred in Torch2PC): errors relax while predictions and Jacobians stay fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.common.checks import check_choice, check_positive, check_reduction, check_steps
from torch2ebm.engine.call import Call, at_least_single
from torch2ebm.engine.gradients import GradientSum, Swept
from torch2ebm.engine.results import InferenceState, LocalGradients, Relaxation
from torch2ebm.engine.signal import Cures, tell_where_there_is_no_signal
from torch2ebm.loss.output_loss import OutputLoss

_CURES = Cures(late="take {steps} steps or more, or ZeroDivergence(), whose one sweep reaches all.")
METHODS = ("closed_form", "sweep")


@dataclass(frozen=True, repr=False)
class FixedPrediction(Algorithm):
    """Predictive coding under the fixed-prediction assumption (Rosenbaum 2022; Millidge, Tschantz and Buckley 2020).

    ``e_n <- (1 - lr) e_n + lr sum_c J_c^T e_c`` with the output's error fixed. The map is linear with constant
    coefficients, so no sweeps are needed: what has travelled a path of k edges within ``steps`` updates has the
    weight P(Binomial(steps, lr) >= k). On a chain the direction of every gradient is backprop's; at ``lr=1`` it is
    backprop itself from ``steps`` = depth on. Any loss will do.

    Args:
        steps: Updates of the errors.
        lr: Step size of the errors.
        method: ``"closed_form"``: one reverse sweep with one vector a path length (one in all on a chain);
            ``"sweep"``: the literal iteration.
        loss_reduction: In which units ``state.error`` is given; the gradients are the same.
        compile: Changes nothing: the forward pass is the module's own run, and the sweep walks what it has left.

    Raises:
        ConfigurationError: for an illegal step size, number of steps, method or reduction.

    Example:
        >>> import torch2ebm
        >>> torch2ebm.FixedPrediction(steps=20, lr=0.1)
        FixedPrediction(steps=20, lr=0.1, method='closed_form', loss_reduction='mean')
    """

    reevaluates_loss = False  # e_o = -dL/dmu_o stays that of the feed-forward prediction

    steps: int = 20
    lr: float = 0.1
    method: str = field(default="closed_form", kw_only=True)
    loss_reduction: str = field(default="mean", kw_only=True)
    compile: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_steps("FixedPrediction", self.steps)
        check_positive("FixedPrediction", lr=self.lr)
        check_choice("FixedPrediction", "method", self.method, METHODS)
        check_reduction("FixedPrediction", self.loss_reduction)

    def __repr__(self) -> str:
        return (
            f"FixedPrediction(steps={self.steps}, lr={self.lr}, method={self.method!r}, "
            f"loss_reduction={self.loss_reduction!r}{', compile=True' if self.compile else ''})"
        )

    def forward(self, call: Call) -> None:
        call.feedforward(keep_graph=True)

    def backward(self, call: Call, kept: None, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        sweep = self._sweep if self.method == "sweep" else self._closed_form
        swept = sweep(call, loss.delivered, retain_graph)
        unreached = tuple(n.name for n in call.graph.hidden_nodes if not any(s in swept.deltas for s in n.slots))
        relaxation = Relaxation(steps=self.steps, residual=math.nan)  # in closed form no step shows a residual
        unit, phases = -loss.unit, (relaxation,)
        # values stay the feed-forward ones: that is the assumption
        state = InferenceState(
            call.graph, call.batch_size, call.values, swept.deltas, unit, relaxation, unreached, phases=phases
        )
        call.graph.once(
            ("signal", FixedPrediction, self.steps),
            lambda: tell_where_there_is_no_signal("FixedPrediction", state, swept.gradients.parameters, cures=_CURES),
        )
        return LocalGradients(swept.gradients.parameters, call.input_gradients(swept.gradients.clamped), state)

    def with_steps(self, steps: int) -> FixedPrediction:
        return replace(self, steps=steps)

    def _closed_form(self, call: Call, delivered: Mapping[str, Tensor], retain_graph: bool) -> Swept:
        arrived = arrivals(self.steps, self.lr, call.graph.depth)
        gradients = GradientSum()
        # by slot and path length k: arrived[k] times the share of paths of k edges in backprop's delta
        shares: dict[str, dict[int, Tensor]] = {slot: {0: delta} for slot, delta in delivered.items()}
        for node in reversed(tuple(call.graph.nodes.values())):
            evaluated = call.passes[node.name] if retain_graph else call.passes.pop(node.name)
            own = [shares.get(slot, {}) for slot in node.slots]
            lengths = sorted({length for share in own for length in share})
            for length in lengths[:-1]:
                # one product for each path length: each will be weighted differently, which a sum could not be
                messages = evaluated.pullback([s.get(length) for s in own], evaluated.inputs, retain_graph=True)
                self._pass_on(node.reads, messages, length, arrived, shares)
            if len(lengths) > 1:
                # all lengths at once, J^T being linear
                gradients.add(call, evaluated, [_total(share) for share in own], retain_graph=True)
            if not lengths:
                # no path to the loss, or none that `steps` updates can travel: an exact zero
                gradients.add_zeros(call, node)
                continue
            last = [share.get(lengths[-1]) for share in own]
            if len(lengths) > 1:
                messages = evaluated.pullback(last, evaluated.inputs, retain_graph=retain_graph)
            else:
                # one length, as on every chain: parents and parameters by a single product
                messages = gradients.add(call, evaluated, last, evaluated.inputs, retain_graph)
            self._pass_on(node.reads, messages, lengths[-1], arrived, shares)
        deltas = {slot: total for slot, share in shares.items() if (total := _total(share)) is not None}
        return Swept(gradients, deltas)

    def _pass_on(
        self,
        reads: tuple[str, ...],
        messages: Sequence[Tensor | None],
        length: int,
        arrived: list[float],
        shares: dict[str, dict[int, Tensor]],
    ) -> None:
        """One edge further: from the weight of ``length`` edges to that of one more."""
        if arrived[length + 1] == 0.0:  # no update came so far; the next ratio would be 0 / 0
            return
        # the share carries the weight of `length` edges already
        ratio = arrived[length + 1] / arrived[length]
        for slot, message in zip(reads, messages, strict=True):
            if message is None:
                continue
            # exactly 1 at lr = 1: then this is backprop, without a copy
            if ratio != 1.0:
                message = message * ratio
            share = shares.setdefault(slot, {})
            share[length + 1] = share[length + 1] + message if length + 1 in share else message

    def _sweep(self, call: Call, delivered: Mapping[str, Tensor], retain_graph: bool) -> Swept:
        # Deltas are -e, so that e <- (1 - lr) e + lr sum_c J_c^T e_c holds for them too (Rosenbaum 2022).
        # At least single precision: in half, small updates are lost.
        deltas = {slot: at_least_single(delta) for slot, delta in delivered.items()}
        for _ in range(self.steps):
            messages: dict[str, Tensor] = {}
            for node in reversed(tuple(call.graph.nodes.values())):
                evaluated = call.passes[node.name]
                cotangents = [deltas.get(slot) for slot in node.slots]
                products = evaluated.pullback(cotangents, evaluated.inputs, retain_graph=True)
                for slot, product in zip(node.reads, products, strict=True):
                    if product is not None:
                        message = at_least_single(product)
                        messages[slot] = messages[slot] + message if slot in messages else message
                # an output's error is fixed
                for slot in () if node.is_output else node.slots:
                    # all readers have sent with the old errors: updating now is the synchronous update
                    change = self.lr * messages[slot] if slot in messages else None
                    if slot in deltas:
                        kept = (1 - self.lr) * deltas[slot]
                        deltas[slot] = kept if change is None else kept + change
                    elif change is not None:
                        deltas[slot] = change
        gradients = GradientSum()
        # dtheta = -(dmu/dtheta)^T e, at the feed-forward values
        for node in reversed(tuple(call.graph.nodes.values())):
            gradients.add(call, call.passes[node.name], [deltas.get(slot) for slot in node.slots], retain_graph=True)
        return Swept(gradients, deltas)


def arrivals(steps: int, lr: float, longest: int) -> list[float]:
    """P(Binomial(steps, lr) >= k) for k = 0 .. longest + 1, by its recursion, which also holds for ``lr`` above 1."""
    # P(Binomial(0, lr) >= k) is 1 for k = 0 alone
    weights = [1.0] + [0.0] * (longest + 1)
    for _ in range(steps):
        weights = [1.0] + [(1 - lr) * weights[k] + lr * weights[k - 1] for k in range(1, longest + 2)]
    return weights


def _total(share: dict[int, Tensor]) -> Tensor | None:
    vectors = iter(share.values())
    total = next(vectors, None)
    for vector in vectors:
        assert total is not None
        total = total + vector
    return total
