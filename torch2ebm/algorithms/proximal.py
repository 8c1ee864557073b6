"""IL-prox: inference learning as an approximate implicit gradient step (Alonso et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch2ebm.algorithms.base import Algorithm
from torch2ebm.common.checks import check_positive, check_reduction, check_steps
from torch2ebm.engine.call import Call
from torch2ebm.engine.results import LocalGradients
from torch2ebm.engine.signal import Cures, tell_where_there_is_no_signal
from torch2ebm.implicit.proximal_inference import (
    ProximalInference,
    ProximalRates,
    check_not_negative,
    dense_layers_of,
)
from torch2ebm.loss.output_loss import OutputLoss

_CURES = Cures(
    late="take {steps} steps or more.",
    rounding="Take more steps and a larger feedback_rate, or double precision (model.double()).",
    flat="the loss has no slope at this output, or the last layer reads nothing but zeros.",
)


@dataclass(frozen=True)
class ProximalInferenceLearning(Algorithm):
    """Inference learning whose weights take a normalised step (IL-prox; Alonso et al. 2022), stable at any ``alpha``.

    Values stand before the activations (``nodes="preactivation"``): ``p_{l+1} = W_l act(h_l) + b_l``. From the
    feed-forward pass all hidden values move together, ``h_l <- h_l - error_rate e_l + feedback_rate J^T e``, with
    ``e_l = h_l - p_l`` and, at the output, ``e_L = -(alpha nm / (1 + alpha nm)) dL/dp_L`` for each sample. Then
    ``dW_l = mean_b(e_{l+1} a_l^T) / nm_l`` and ``db_l = mean_b(e_{l+1}) / nm_l`` with the layer's input ``a_l`` and
    ``nm_l = mean_b |a_l|^2 + 1`` (the 1 for a bias) ``+ eps``: with one sample and ``eps = 0`` the layers then predict
    exactly the values that inference came to. ``.grad`` is ``-dW``, times a scaler's factor: step it by
    ``torch.optim.SGD(parameters, lr=1.0)``. ``alpha`` is the only rate of learning, and it appears nowhere else.

    The output's error is the exact proximal step of a loss whose Hessian in ``p_L`` is the identity, and a shorter one
    where it is less: ``q = p_L + e_L`` cannot overshoot the loss's minimum, for any ``alpha``. That holds for the mean
    over the batch of cross-entropies (Hessian at most 1/2), of half squared errors (1) and of squared errors averaged
    over two or more features (2 over their number). A loss that is more curved would make ``alpha nm -> infinity`` a
    gradient step that is too long; it is refused, after two power iterations by differences of its
    gradient where inference starts. A scaler's factor scales ``.grad``, not this.

    ``state.value`` of an output is ``p_L + e_L``. In ``state.relaxation`` the energy is the sum over all nodes,
    outputs included, of half the squared error; ``loss`` is the loss beside it, summed over samples, no part of it.

    Args:
        alpha: Learning rate.
        steps: Inference steps T.
        feedback_rate: Step size of what the children send.
        error_rate: Step size of a value's own error; 0 lets the values be pushed only.
        eps: Added to the squared norms; damps the steps of the weights.
        loss_reduction: ``"mean"`` for a loss that is a mean over the batch, ``"sum"`` to take it as it is written.

    Raises:
        ConfigurationError: for an illegal number, and, when the model is called, for a partition whose nodes are not
            linear in their parameters.
        LossCurvatureError: during backward, for a loss that is too curved.

    Example:
        >>> import torch, torch2ebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model = torch2ebm.convert(net)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=1.0)
        >>> optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.ProximalInferenceLearning(alpha=100.0))
        >>> x, y = torch.randn(1, 4), torch.tensor([2])
        >>> torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> target = model.state.value["2"]
        >>> optimizer.step()
        >>> bool(torch.allclose(net(x), target, atol=1e-5))
        True
    """

    partition = "preactivation"
    has_input_gradients = False  # .grad is a step of parameters and no gradient: none for an input to pass on

    alpha: float = 1.0
    steps: int = 25  # T, g_bot and g_top as in the authors' IL-prox
    feedback_rate: float = 0.015
    error_rate: float = 0.015
    eps: float = 0.0
    loss_reduction: str = field(default="mean", kw_only=True)

    def __post_init__(self) -> None:
        where = "ProximalInferenceLearning"
        check_positive(where, alpha=self.alpha, feedback_rate=self.feedback_rate)
        check_steps(where, self.steps)
        check_not_negative(where, error_rate=self.error_rate, eps=self.eps)
        check_reduction(where, self.loss_reduction)

    @classmethod
    def fast(cls, alpha: float = 1.0, eps: float = 0.0, *, loss_reduction: str = "mean") -> ProximalInferenceLearning:
        """The authors' Fast form: half the inference steps, and no pull of a value towards its prediction."""
        return cls(alpha, 12, 0.025, 0.0, eps, loss_reduction=loss_reduction)  # T, g_bot, g_top

    @classmethod
    def adam(cls, alpha: float = 1.0, eps: float = 0.0, *, loss_reduction: str = "mean") -> ProximalInferenceLearning:
        """The authors' Adam form: its normalised changes go into ``torch.optim.Adam(parameters, lr=3e-5)``."""
        return cls(alpha, 20, 0.02, 0.015, eps, loss_reduction=loss_reduction)  # T, g_bot, g_top

    def with_steps(self, steps: int) -> ProximalInferenceLearning:
        return replace(self, steps=steps)

    def forward(self, call: Call) -> None:
        call.feedforward(keep_graph=False)

    def backward(self, call: Call, kept: None, loss: OutputLoss, retain_graph: bool) -> LocalGradients:
        # a record of its own: inference stands below the algorithms, and cannot import this class
        rates = ProximalRates(
            self.alpha, self.steps, self.feedback_rate, self.error_rate, self.eps, self.loss_reduction
        )
        found = ProximalInference(rates, call, loss, dense_layers_of(call)).run()
        call.graph.once(
            ("signal", ProximalInferenceLearning, self.steps),
            lambda: tell_where_there_is_no_signal(
                "ProximalInferenceLearning", found.state, found.parameters, cures=_CURES
            ),
        )
        return found
